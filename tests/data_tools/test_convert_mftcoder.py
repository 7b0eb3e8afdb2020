"""data_tools.convert_mftcoder: MFTCoder's experiments in our terms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import convert_mftcoder, mftcoder_keys
from data_tools.convert_mftcoder import Conversion, convert, pretty, publish
from data_tools.mftcoder_data import format_of, legal_name
from mftcoder_coba.config import Config, MarkersConfig, load_config
from mftcoder_coba.data.files import find_files, read_lines
from mftcoder_coba.data.formats import choose_format, parse_line
from mftcoder_coba.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# Every argument of MFTCoder's training, as its argument class lists them.
MFTCODER_KEYS = """
    data_paths output_dir tb_dir pretrained_model_path model_type load_raw_dataset task_weights data_weights low_cpu_mem_usage data_split
    padding_mode tokenize_mode weighted_loss_mode peft_type quantization lora_rank lora_alpha lora_dropout target_modules
    per_device_train_batch_size per_device_eval_batch_size tokenizer_type learning_rate min_lr weight_decay gradient_accumulation_steps
    lr_scheduler_type num_warmup_steps num_train_epochs seed seq_length resume_from_checkpoint auto_resume log_interval checkpointing_steps
    evaluation_steps max_train_steps epoch_checkpointing shuffle_before_split use_random_sampler early_stopping early_stopping_stall_num
    saving_limit use_dynamic_padding coba_warmup_steps coba_history_length coba_tau coba_update_interval coba_sample_valid_num
    attn_implementation role_markers distributed_type init_timeout_seconds use_xformers trust_remote_code weight_by_num_documents
    make_vocab_size_divisible_by model_parallel_size use_slow_tokenizer world_size
""".split()

# What the four published configs have in common, and what each has of its own.
COMMON: dict[str, Any] = {
    "data_paths": "$DATA_PATHS",
    "output_dir": "$OUTPUT_DIR",
    "tb_dir": "$TensorBoard_DIR",
    "pretrained_model_path": "$MODEL_NAME_OR_PATH",
    "model_type": "$MODEL_TYPE",
    "load_raw_dataset": True,
    "data_split": "98,2,0",
    "padding_mode": "padding",
    "use_dynamic_padding": True,
    "tokenize_mode": "sft",
    "tokenizer_type": "AutoTokenizer",
    "weighted_loss_mode": "case3",
    "attn_implementation": "flash_attention_2",
    "seq_length": 4096,
    "seed": 1234,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 5e-5,
    "min_lr": 5e-6,
    "weight_decay": 0.1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 300,
    "num_train_epochs": 4,
    "resume_from_checkpoint": None,
    "log_interval": 10,
    "checkpointing_steps": 100,
    "evaluation_steps": 100,
    "max_train_steps": None,
    "epoch_checkpointing": True,
    "shuffle_before_split": True,
    "early_stopping": True,
    "early_stopping_stall_num": 5,
    "saving_limit": None,
}
ADAPTER = {"lora_rank": 96, "lora_alpha": 32, "lora_dropout": 0.05}
COBA = {"coba_warmup_steps": 100, "coba_history_length": 200, "coba_tau": 5, "coba_update_interval": 1, "coba_sample_valid_num": 1}
PUBLISHED: dict[str, dict[str, Any]] = {
    "full": COMMON | {"peft_type": None, "saving_limit": 3},
    "lora": COMMON | ADAPTER | {"peft_type": "lora", "quantization": None},
    "qlora": COMMON | ADAPTER | {"peft_type": "qlora", "quantization": "4bit"},
    "coba": COMMON
    | ADAPTER
    | COBA
    | {"peft_type": "qlora", "quantization": "4bit", "weighted_loss_mode": "coba", "data_split": "95,5,0"}
    | {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8},
}
CHAT = {"chat_rounds": [{"role": "human", "content": "hi"}, {"role": "bot", "content": "hello"}]}
# A line of each format, in the order in which MFTCoder tries them.
FORMAT_ORDER: dict[str, dict[str, Any]] = {
    "prompt_answer": {"prompt": "", "answer": ""},
    "prompt_response": {"prompt": "", "response": ""},
    "input_output": {"input": "", "output": ""},
    "instruction_output": {"instruction": "", "output": ""},
    "instruction_response": {"instruction": "", "response": ""},
    "question_response": {"question": "", "response": ""},
    "question_answer": {"question": "", "answer": ""},
    "query_answer": {"query": "", "answer": ""},
    "mftcoder": CHAT,
    "text": {"text": ""},
}


def write_lines(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


class Experiment:
    """A model folder and data folders in a temporary place."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "configs" / "mine.json"
        (root / "model").mkdir()
        self.paths = [self.add("code", "train.jsonl", CHAT), self.add("math", "part/a.jsonl", {"question": "1+1?", "answer": "2"})]

    def add(self, task: str, file: str, *records: dict[str, Any]) -> str:
        write_lines(self.root / "data" / task / file, *records)
        return str(self.root / "data" / task)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "data_paths": f"[{','.join(self.paths)}]",
            "pretrained_model_path": str(self.root / "model"),
            "output_dir": str(self.root / "runs" / "mine"),
        }

    def convert(self, keys: dict[str, Any], gpus: int = 8, **options: Any) -> Conversion:
        source = self.root / "mft.json"
        source.write_text(json.dumps(keys), encoding="utf-8")
        return convert(source, self.options | options, self.out, gpus)

    def load(self, keys: dict[str, Any], gpus: int = 8, **options: Any) -> Config:
        publish(self.convert(keys, gpus, **options), self.out, self.root / "mft.json", force=True)
        return load_config(self.out)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path)


def test_every_argument_of_mftcoder_is_converted_or_listed_once():
    tables = [mftcoder_keys.CONVERTED, mftcoder_keys.DIFFERENT.keys(), mftcoder_keys.HARMLESS.keys()]
    assert sorted(key for table in tables for key in table) == sorted(MFTCODER_KEYS)
    assert mftcoder_keys.DEFAULTS.keys() <= set(MFTCODER_KEYS)
    assert mftcoder_keys.OTHER_TYPES.keys() <= mftcoder_keys.DEFAULTS.keys() | {"data_paths"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_converts_field_by_field(experiment, name):
    config = experiment.load(PUBLISHED[name])
    coba, full = name == "coba", name == "full"
    rows = 8 if coba else 2
    assert (config.run.name, config.run.dir, config.run.seed) == ("mine", str(experiment.root / "runs"), 1234)
    assert config.model.path == str(experiment.root / "model")
    assert (config.model.dtype, config.model.attention, config.model.gradient_checkpointing) == ("bfloat16", "auto", True)
    adapter = config.adapter and config.adapter.model_dump()
    kind = "lora" if name == "lora" else "qlora"
    assert adapter == (None if full else {"kind": kind, "rank": 96, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"})
    assert [(task.name, task.format, task.valid, task.share) for task in config.data.tasks] == [
        ("code", "mftcoder", [], None),
        ("math", "question_answer", [], None),
    ]
    data = config.data
    assert (data.valid_fraction, data.sequence_length, data.packing) == (0.05 if coba else 0.02, 4096, "none")
    assert (data.too_long, data.template) == ("drop", "mftcoder")
    balancer = config.balancer.model_dump(exclude={"slope", "df_history", "variant", "scores"})
    assert balancer == ({"kind": "coba", "tau": 5.0, "window": 200, "warmup": 100, "update_interval": 1} if coba else {"kind": "uniform"})
    assert config.training.model_dump() == {
        "epochs": 4,
        "max_steps": None,
        "global_batch_rows": 8 * rows,
        "micro_batch_rows": rows,
        "learning_rate": 5e-5,
        "min_learning_rate": 5e-6,
        "schedule": "cosine",
        "warmup_steps": 300,
        "weight_decay": 0.1,
        "betas": [0.9, 0.999],
        "gradient_clipping": 1.0,
        "reduction": "token",
        "router_loss_coefficient": "auto",
    }
    assert (config.validation.every_steps, config.validation.balancer_rows_per_rank) == (100, 8 if coba else 1)
    assert (config.validation.early_stopping.criterion, config.validation.early_stopping.patience) == ("mean_ratio", 5)
    assert (config.checkpoint.every_steps, config.checkpoint.keep, config.checkpoint.resume) == (100, 3 if full else 2, "auto")
    assert (config.tracking.log_every_steps, config.zero_stage) == (10, 2)


def test_files_of_a_converted_task_are_the_jsonl_files_below_its_folder(experiment):
    folder = experiment.add("odd [1]", "a/b/c.jsonl", CHAT)
    (Path(folder) / "notes.txt").write_text("no data")
    (Path(folder) / "old.jsonl.gz").write_bytes(b"not read by MFTCoder")
    experiment.paths = [folder, str(experiment.root / "data" / "math" / "part" / "a.jsonl")]
    tasks = experiment.load(COMMON).data.tasks
    assert [task.name for task in tasks] == ["odd-1", "a"]
    assert find_files(tasks[0].train, "") == [Path(folder) / "a" / "b" / "c.jsonl"]
    assert find_files(tasks[1].train, "") == [experiment.root / "data" / "math" / "part" / "a.jsonl"]


def test_placeholders_come_from_the_environment(experiment, monkeypatch):
    variables = {"data_paths": "DATA_PATHS", "pretrained_model_path": "MODEL_NAME_OR_PATH", "output_dir": "OUTPUT_DIR"}
    for key, variable in variables.items():
        monkeypatch.setenv(variable, experiment.options[key])
    nothing = dict.fromkeys(variables)
    assert experiment.convert(PUBLISHED["lora"], **nothing).tree == experiment.convert(PUBLISHED["lora"]).tree


ODD_VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False), st.text(max_size=5)),
    *(st.lists(st.integers(), max_size=2), st.just({}), st.sampled_from(["coba", "pack", "pretrain", "$X", "[1,2]"])),
)


@given(changes=st.dictionaries(st.sampled_from(MFTCODER_KEYS), ODD_VALUES, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_converts_or_is_told_to_the_user(experiment, changes):
    try:
        config = experiment.load(PUBLISHED["coba"] | changes)
    except UserError as error:
        assert error.what
    else:
        assert config.data.task_names == ["code", "math"]


def test_data_and_model_that_are_given_nowhere_are_named_together(experiment, monkeypatch):
    for variable in ("DATA_PATHS", "MODEL_NAME_OR_PATH"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"data_paths \(\$DATA_PATHS\), pretrained_model_path \(\$MODEL_NAME_OR_PATH\)"):
        experiment.convert(COMMON, data_paths=None, pretrained_model_path=None)


def test_without_an_output_folder_the_run_is_named_after_the_config(experiment, monkeypatch):
    monkeypatch.delenv("OUTPUT_DIR", raising=False)
    conversion = experiment.convert(COMMON, output_dir=None)
    assert conversion.tree["run"] == {"name": "mine", "seed": 1234}
    assert any("runs/mine" in note for note in conversion.notes)


def test_a_run_name_is_made_legal_and_the_change_is_told(experiment):
    conversion = experiment.convert(COMMON, output_dir=str(experiment.root / "my run"))
    assert conversion.tree["run"] == {"name": "my-run", "dir": str(experiment.root), "seed": 1234}
    assert any("my-run" in note for note in conversion.notes)


def test_the_defaults_are_mftcoders_where_a_config_is_silent(experiment):
    config = experiment.load({})
    assert (config.adapter.kind, config.adapter.rank, config.training.weight_decay, config.training.warmup_steps) == ("qlora", 96, 0.01, 0.05)
    assert (config.training.global_batch_rows, config.data.valid_fraction) == (64, 0.02)


@pytest.mark.parametrize(
    ("mode", "kind", "reduction"),
    [("case1", "proportional", "token"), ("case2", "proportional", "sample"), ("case3", "uniform", "token"), ("case4", "uniform", "sample")],
)
def test_a_loss_mode_becomes_a_balancer_and_a_reduction(experiment, mode, kind, reduction):
    config = experiment.load(COMMON | {"weighted_loss_mode": mode})
    assert (config.balancer.kind, config.training.reduction) == (kind, reduction)


def test_task_weights_become_a_fixed_balancer_where_mftcoder_uses_them(experiment):
    weights = {"task_weights": "[1.0,3.0]"}
    assert experiment.load(COMMON | weights).balancer.weights == {"code": 1.0, "math": 3.0}
    assert experiment.load(COMMON | {"task_weights": "[2,2]"}).balancer.kind == "uniform"
    conversion = experiment.convert(COMMON | weights | {"weighted_loss_mode": "case1"})
    assert conversion.tree["balancer"] == {"kind": "proportional"}
    assert any("task_weights" in note for note in conversion.notes)


@pytest.mark.parametrize("weights", ["[1.0]", "[1.0,x]", [1.0, [2.0]]])
def test_task_weights_that_do_not_fit_the_tasks_are_refused(experiment, weights):
    with pytest.raises(UserError, match="task_weights is .* there are 2 tasks"):
        experiment.convert(COMMON | {"task_weights": weights})


@pytest.mark.parametrize(
    ("mode", "packing", "too_long"), [("padding", "none", "drop"), ("pack", "best_fit", "drop"), ("concat", "best_fit", "split")]
)
def test_padding_modes(experiment, mode, packing, too_long):
    data = experiment.load(COMMON | {"padding_mode": mode}).data
    assert (data.packing, data.too_long) == (packing, too_long)


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        ({"num_warmup_steps": 300}, 8, 300),
        ({"num_warmup_steps": 300, "gradient_accumulation_steps": 4}, 8, 1200),
        ({"num_warmup_steps": 0.05}, 8, 0.05),
        ({"num_warmup_steps": 0.05, "gradient_accumulation_steps": 2}, 8, 0.1),
        ({"num_warmup_steps": 0.05, "max_train_steps": 1000}, 8, 6),
        ({"num_warmup_steps": 0.05, "max_train_steps": 1000, "gradient_accumulation_steps": 2}, 1, 100),
        ({"lr_scheduler_type": "constant"}, 8, 0),
        ({"lr_scheduler_type": "constant_with_warmup"}, 8, 300),
    ],
)
def test_warm_up_lasts_as_many_optimizer_steps_as_in_mftcoder(experiment, changes, gpus, expected):
    assert experiment.load(COMMON | changes, gpus).training.warmup_steps == expected


def test_a_relative_warm_up_is_mftcoders_by_the_scheduler_that_accelerate_moves(experiment):
    """Its arithmetic, step by step, for a run of `real_steps` optimizer steps."""
    processes, accumulation, real_steps, part = 4, 2, 500, 0.1
    planned_steps = processes * accumulation * real_steps // accumulation  # from the loader before it is divided among the processes
    scheduler_warmup = int(planned_steps * part) // processes * accumulation * processes
    optimizer_steps = len(range(0, scheduler_warmup, processes))  # each moves the scheduler on by `processes`
    keys = COMMON | {"num_warmup_steps": part, "gradient_accumulation_steps": accumulation}
    assert experiment.load(keys, processes).training.warmup_steps * real_steps == optimizer_steps == 100


def test_a_warm_up_that_mftcoder_would_never_finish_is_refused(experiment):
    with pytest.raises(UserError, match="longer than the run"):
        experiment.convert(COMMON | {"num_warmup_steps": 0.5, "gradient_accumulation_steps": 2})


def test_rows_of_a_step_are_gpus_times_batch_times_accumulation(experiment):
    training = experiment.load(COMMON | {"gradient_accumulation_steps": 3}, gpus=5).training
    assert (training.global_batch_rows, training.micro_batch_rows) == (5 * 2 * 3, 2)


def test_max_train_steps_replace_the_epochs(experiment):
    training = experiment.load(COMMON | {"max_train_steps": 50}).training
    assert (training.epochs, training.max_steps) == (None, 50)


def test_coba_counts_its_warm_up_in_observations_and_its_rows_over_all_mini_batches(experiment):
    config = experiment.load(PUBLISHED["coba"] | {"coba_update_interval": 8, "coba_sample_valid_num": 3})
    assert (config.balancer.warmup, config.balancer.window, config.balancer.update_interval) == (13, 200, 8)
    assert config.validation.balancer_rows_per_rank == 24


def test_role_markers_become_the_template(experiment):
    markers = {"system": "### System:\n", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    assert experiment.load(COMMON | {"role_markers": markers}).data.template == MarkersConfig(**markers)
    with pytest.raises(UserError, match="role_markers has no system, user"):
        experiment.convert(COMMON | {"role_markers": {"assistant": "a"}})


def test_switches_that_are_off_are_off(experiment):
    config = experiment.load(COMMON | {"early_stopping": False, "auto_resume": False, "checkpointing_steps": None, "attn_implementation": "eager"})
    assert (config.validation.early_stopping.patience, config.checkpoint.resume, config.checkpoint.every_steps) == (None, "never", 100)
    assert config.model.attention == "eager"


@pytest.mark.parametrize(("split", "fraction"), [("95,5,0", 0.05), ("90,5,5", 0.1), ("80/20", 0.2), ("100", 0.0)])
def test_all_that_is_not_train_is_validation(experiment, split, fraction):
    assert experiment.load(COMMON | {"data_split": split}).data.valid_fraction == fraction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighted_loss_mode": "selfpaced"}, "weighted_loss_mode .* coba, case1, case2, case3, case4"),
        ({"padding_mode": "bucket"}, "padding_mode .* padding, pack, concat"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "lr_scheduler_type .* cosine"),
        ({"peft_type": "prefix"}, "peft_type .* null, lora, qlora"),
        ({"tokenize_mode": "pretrain"}, "supervises every token.* code, math"),
        ({"tokenize_mode": "sst"}, "supervises every token.* code, math"),
        ({"load_raw_dataset": False}, "load_raw_dataset"),
        ({"resume_from_checkpoint": "/ckpt/step_100"}, "no optimizer state"),
        ({"data_split": "all"}, "data_split"),
        ({"data_split": "0,100,0"}, "data_split"),
        ({"learnig_rate": 1e-5}, 'unknown key learnig_rate: did you mean "learning_rate"'),
        ({"seq_length": "4096"}, 'seq_length is "4096", not a whole number'),
        ({"early_stopping": 1}, "early_stopping is 1, not true or false"),
        ({"model_type": 5}, "model_type is 5, not text or null"),
        ({"coba_update_interval": 0, "weighted_loss_mode": "coba"}, "coba_update_interval"),
    ],
)
def test_what_has_no_counterpart_is_refused(experiment, changes, message):
    with pytest.raises(UserError, match=message):
        experiment.convert(COMMON | changes)


def test_a_value_that_our_config_refuses_leaves_nothing_behind(experiment):
    with pytest.raises(UserError, match="learning_rate") as caught:
        experiment.load(COMMON | {"learning_rate": -1.0})
    assert str(experiment.root / "mft.json") in caught.value.where
    assert list(experiment.out.parent.iterdir()) == []


def test_pretraining_text_converts(experiment):
    experiment.paths = [experiment.add("books", "a.jsonl", {"text": "once"}, {"text": "upon"})]
    task = experiment.load(COMMON | {"tokenize_mode": "pretrain"}).data.tasks[0]
    assert (task.name, task.format) == ("books", "text")


@pytest.mark.parametrize("one", FORMAT_ORDER)
@pytest.mark.parametrize("other", FORMAT_ORDER)
def test_the_format_of_a_line_is_the_first_that_mftcoder_tries(one, other):
    record = {**FORMAT_ORDER[one], **FORMAT_ORDER[other], "id": 1}
    assert format_of(record) == next(name for name, fields in FORMAT_ORDER.items() if fields.keys() <= record.keys())


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "", "answer": "", "response": ""}, "prompt_answer"),
        ({"instruction": "a", "input": "", "output": "c"}, "input_output"),
        ({"instruction": "a", "output": "c"}, "instruction_output"),
        (CHAT | {"query": "a", "answer": "b"}, "query_answer"),
        (CHAT | {"text": "a", "query": "a", "response": "b"}, "mftcoder"),
        ({"chat_rounds": [], "text": "a"}, "text"),
        ({"chat_rounds": [], "id": 1}, None),
    ],
)
def test_formats_take_precedence_as_in_mftcoder(record, expected):
    assert format_of(record) == expected


def test_lines_of_several_formats_are_written_again_as_messages(experiment):
    chat = {"chat_rounds": [{"role": "system", "content": "Be short."}, *CHAT["chat_rounds"]]}
    pair = {"system": "Be long.", "prompt": "wie geht's, 😀?", "response": "gut"}
    experiment.paths.append(experiment.add("mixed", "a.jsonl", chat, pair))
    write_lines(experiment.root / "data" / "mixed" / "b" / "b.jsonl", {"query": "q", "answer": ""})
    for _ in range(2):  # a second conversion takes the place of the first
        task = experiment.load(COMMON).data.tasks[2]
    target = experiment.root / "configs" / "mine_data" / "mixed" / "train.jsonl"
    assert (task.name, task.format, task.train) == ("mixed", "messages", [str(target)])
    conversations = [parse_line(line, choose_format("messages", {})) for _, line in read_lines(target, ())]
    assert [[tuple(message) for message in conversation] for conversation in conversations] == [
        [("system", "Be short."), ("user", "hi"), ("assistant", "hello")],
        [("system", "Be long."), ("user", "wie geht's, 😀?"), ("assistant", "gut")],
        [("user", "q"), ("assistant", "")],
    ]


def test_a_bad_line_among_several_formats_publishes_nothing(experiment):
    experiment.paths.append(experiment.add("mixed", "a.jsonl", CHAT, {"prompt": "a", "answer": 5}))
    with pytest.raises(UserError, match='"answer" must be text') as caught:
        experiment.load(COMMON)
    assert caught.value.where.endswith("mixed/a.jsonl:2")
    assert list(experiment.out.parent.iterdir()) == []


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense", '{"messages": []}', '{"chat_rounds": null}', "[" * 100_000])
def test_a_line_that_mftcoder_cannot_read_is_named_by_file_and_line(experiment, line):
    file = Path(experiment.add("bad", "a.jsonl", CHAT)) / "a.jsonl"
    file.write_text(file.read_text() + line + "\n")
    experiment.paths.append(str(file.parent))
    with pytest.raises(UserError) as caught:
        experiment.convert(COMMON)
    assert caught.value.where == f"{file}:2"


def test_text_beside_conversations_is_refused(experiment):
    experiment.paths.append(experiment.add("mixed", "a.jsonl", CHAT, {"text": "a"}))
    with pytest.raises(UserError, match="lines of text beside conversations"):
        experiment.convert(COMMON)


def test_an_instruction_that_mftcoder_overlooks_is_told(experiment):
    experiment.paths.append(experiment.add("alpaca", "a.jsonl", {"instruction": "Add.", "input": "1 1", "output": "2"}))
    conversion = experiment.convert(COMMON)
    assert conversion.tasks[2].format == "input_output"
    assert any('"alpaca"' in note for note in conversion.notes)


def test_two_paths_of_one_name_are_refused(experiment):
    experiment.paths.append(experiment.add("other/code", "a.jsonl", CHAT))
    with pytest.raises(UserError, match='task name "code"') as caught:
        experiment.convert(COMMON)
    assert all(path in caught.value.what for path in (experiment.paths[0], experiment.paths[2]))


def test_names_are_made_legal_and_the_change_is_told(experiment):
    experiment.paths = [experiment.add("code & more", "a.jsonl", CHAT), experiment.add("代码", "a.jsonl", CHAT) + "/"]
    conversion = experiment.convert(COMMON)
    assert [task.name for task in conversion.tasks] == ["code-more", "task-2"]
    assert len(conversion.notes) == 2
    assert [legal_name(text) for text in ("..", "-x-", "a_b.c-1", ".hidden", "x" * 200)] == ["", "x", "a_b.c-1", "hidden", "x" * 128]


@pytest.mark.parametrize("form", ["[{}, {}]", "{},{}", '["{}","{}"]', "list"])
def test_data_paths_may_be_written_in_several_ways(experiment, form):
    paths = experiment.paths if form == "list" else form.format(*experiment.paths)
    conversion = experiment.convert(COMMON | {"data_paths": paths}, data_paths=None)
    assert [task.name for task in conversion.tasks] == ["code", "math"]


@pytest.mark.parametrize("paths", ["[]", "", "[/a,,/b]", "[/no/such/folder]"])
def test_data_paths_without_data_are_refused(experiment, paths):
    with pytest.raises(UserError, match="data_paths|no such file or folder"):
        experiment.convert(COMMON, data_paths=paths)


def test_another_file_is_overwritten_only_by_force(experiment):
    conversion = experiment.convert(COMMON)
    experiment.out.parent.mkdir()
    experiment.out.write_text("{}")
    with pytest.raises(UserError, match="not overwritten"):
        publish(conversion, experiment.out, Path("mft.json"), force=False)
    assert experiment.out.read_text() == "{}"
    publish(conversion, experiment.out, Path("mft.json"), force=True)
    publish(conversion, experiment.out, Path("mft.json"), force=False)  # the same again
    assert json.loads(experiment.out.read_text()) == conversion.tree


def test_pretty_json_is_the_same_value_on_short_lines():
    value = {"a": [{"name": "x" * 60, "b": [1, 2]}, {"name": "y" * 90}], "c": {}, "d": "ß", "e": {"f": None}}
    lines = pretty(value).splitlines()
    assert json.loads("\n".join(lines)) == value
    assert '  "e": {"f": null}' in lines and max(map(len, lines)) <= convert_mftcoder.WIDEST_LINE + 1


def test_a_listed_difference_depends_on_the_value_and_on_the_mode(experiment):
    def listed(keys: dict[str, Any]) -> set[str]:
        return {key for key, *_ in experiment.convert(keys).different}

    lora, packed, coba = listed(PUBLISHED["lora"]), listed(PUBLISHED["lora"] | {"padding_mode": "pack"}), listed(PUBLISHED["coba"])
    assert {"early_stopping", "attn_implementation", "role_markers", "peft_type", "weighted_loss_mode", "saving_limit"} <= lora
    assert packed - lora == {"padding_mode"} and coba - lora == {"coba_sample_valid_num"}
    assert "peft_type" not in listed(PUBLISHED["full"])
    assert "gradient_accumulation_steps" in listed(COMMON | {"gradient_accumulation_steps": 2}) - lora


def run_converter(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_tools.convert_mftcoder", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_from_the_command_line_to_prepared_data(toy, tmp_path, command_line):
    source, out = tmp_path / "lora_train_config.json", tmp_path / "mine.json"
    source.write_text(json.dumps(PUBLISHED["lora"]))
    paths = f"{toy}/data/count/train.jsonl,{toy}/data/reverse"
    options = ["--data_paths", f"[{paths}]", "--pretrained_model_path", str(toy / "model"), "--model_type", "llama", "--micro_batch_size", "4"]
    done = run_converter("--config", str(source), "--out", str(out), *options, "--gpus", "2", "--zero-stage", "3")
    assert done.returncode == 0, done.stderr
    # Each key that the config gives is in the listing, if it is not taken over as it is.
    for key in ("tokenizer_type", "epoch_checkpointing", "min_lr", "model_type"):
        assert key in done.stdout
    config = load_config(out)
    assert (config.training.global_batch_rows, config.training.micro_batch_rows, config.zero_stage) == (8, 4, 3)
    overrides = ["data.sequence_length=96", f"data.cache_dir={tmp_path / 'cache'}"]
    prepared = command_line(1, "prepare", "--config", str(out), *(part for text in overrides for part in ("--set", text)))
    assert prepared.returncode == 0, prepared.stderr
    assert "train" in prepared.stdout and "reverse" in prepared.stdout


def test_a_mistake_on_the_command_line_has_no_traceback(tmp_path):
    done = run_converter("--config", str(tmp_path / "none.json"), "--out", str(tmp_path / "mine.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot be read") and "Traceback" not in done.stderr
