"""The command line: it parses, calls, and turns errors into messages and exit codes: 0 success, 2 the user's mistake,
75 a run that stopped on a signal, 1 a failure."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mftcoder_coba.caches import cache_folder, keep_libraries_in
from mftcoder_coba.errors import Interrupted, RunFailure, UserError
from mftcoder_coba.merging import METHODS as MERGING_METHODS

if TYPE_CHECKING:
    from mftcoder_coba.config import Config
    from mftcoder_coba.data import Corpus, TrainSchedule

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune one large language model on many tasks, so that all converge together.",
)

ConfigFile = Annotated[Path, typer.Option("--config", help="the experiment's JSON file")]
Overrides = Annotated[list[str], typer.Option("--set", help="override a key, e.g. training.learning_rate=1e-5; may be repeated")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nobody changes it
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="go on from a checkpoint although the config now makes another run of it")
    ] = False,
) -> None:
    """Train, or go on; start it with the deepspeed launcher for several processes."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mftcoder_coba.training import train as run_training

    run_dir = run_training(loaded, sys.argv, allow_config_change)
    if run_dir:
        from mftcoder_coba.reporting import print_final_table
        from mftcoder_coba.reporting.report import build_report

        # Without any finite validation there is no best model.
        written = {"adapter" if loaded.adapter else "model": run_dir / "export"} if (run_dir / "export").is_dir() else {}
        try:
            written["report"] = build_report(run_dir)
        except OSError as error:
            print(f"warning: the report could not be written ({error}); later: python -m mftcoder_coba report {run_dir}", file=sys.stderr)
        print_final_table(run_dir, written)


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Read and tokenise the data into the cache, and show what becomes of every sample."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    _prepared(loaded)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    gpus: Annotated[int, typer.Option(min=1, help="processes of the run")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu_memory_gib: Annotated[float, typer.Option(min=0)] = 80.0,
    peak_tflops: Annotated[float, typer.Option(min=1e-3, help="of one GPU in the model's dtype; an A100 has 312 in bfloat16")] = 312.0,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="part of the peak that training reaches")] = 0.4,
    bandwidth_gb: Annotated[float | None, typer.Option(min=1e-3, help="GB/s that a GPU sends; else 200 in one machine, 20 between machines")] = None,
    suggest: Annotated[Path | None, typer.Option(help="write the smallest DeepSpeed settings that fit to this new file")] = None,
    model_config: Annotated[Path | None, typer.Option(help="a config.json of the model, where model.path is not here")] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="without data: memory, traffic and FLOPs of full rows alone")] = False,
) -> None:
    """Show a run before it starts: data, steps, memory of a GPU, traffic and time. No weights and no GPU are needed."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed on a GPU; else DeepSpeed looks for one, and tells about it
    from mftcoder_coba import planning

    planning.accumulation_steps(loaded, gpus)  # what is wrong without data is told before it is read
    steps, validation, share = (loaded.training.max_steps, None, 1.0) if no_data else _planned_steps(loaded, gpus)
    from mftcoder_coba.planning.cluster import Cluster, plan_cluster, write_suggestion
    from mftcoder_coba.planning.showing import cluster_lines

    speed = bandwidth_gb or (200.0 if gpus <= gpus_per_node else 20.0)
    cluster = Cluster(gpus, gpus_per_node, gpu_memory_gib, peak_tflops, utilisation, speed)
    planned = plan_cluster(loaded, cluster, model_config, share)
    print("\n".join(cluster_lines(loaded, cluster, planned, steps, validation)))
    if suggest:
        write_suggestion(planned, suggest)
        print(f"written     {suggest}")


def _planned_steps(config: Config, gpus: int) -> tuple[int, int, float]:
    """Shows data and steps; (steps, rows of a full validation, supervised part of the tokens)."""
    from mftcoder_coba import planning
    from mftcoder_coba.balancing import resolve
    from mftcoder_coba.data import validation_rows

    corpus, schedule = _prepared(config)
    rows, valid = gpus * config.validation.balancer_rows_per_rank, corpus.splits["valid"]
    stream = planning.balancer_stream(config, valid, rows)
    resolved = config.model_copy(update={"balancer": resolve(config.balancer, stream.coverage if stream else 0)})
    steps = planning.plan_steps(config, schedule, gpus)
    print("\n".join(planning.step_lines(resolved, steps, stream, rows)))
    mixture = planning.mixture(config, corpus, schedule)
    supervised = sum(task.supervised_tokens for task in mixture.tasks.values()) / mixture.tokens
    measured = validation_rows([task.lengths for task in valid], config.data.sequence_length, config.data.packing)
    return steps.total_steps, len(measured), supervised


def _prepared(config: Config) -> tuple[Corpus, TrainSchedule]:
    """The tokenised data and its order, after telling about both."""
    from mftcoder_coba import data, planning
    from mftcoder_coba.reporting.data_tables import print_data

    corpus = data.prepare(config.data, config.model.path, config.model.trust_remote_code)
    schedule = planning.training_schedule(config, corpus.splits["train"])
    print_data(planning.accounting(config, corpus, schedule))
    return corpus, schedule


@app.command("check-nodes")
def check_nodes(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0, help="how long the processes add up, to measure the network")] = 10.0,
    min_bandwidth_gb: Annotated[float, typer.Option(min=0, help="refuse a slower network; bus bandwidth in GB/s, as nccl-tests gives it")] = 0.0,
    free_disk_gib: Annotated[float | None, typer.Option(min=0, help="what must be free where the run's checkpoints go; else their size")] = None,
    allow_config_change: Annotated[bool, typer.Option("--allow-config-change", hidden=True)] = False,  # the same arguments serve `train`
) -> None:
    """Check the machines of a run before it starts; start it with the launcher and the number of processes of the run."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    from mftcoder_coba.preflight import check_nodes as run_checks

    lines = run_checks(loaded, seconds, min_bandwidth_gb, free_disk_gib)
    if int(os.environ["RANK"]) == 0:
        print("\n".join(lines), flush=True)


@app.command()
def replay(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CSV", help="a run folder, or a CSV: step,TASK,... with the losses before training at step 0")
    ],
    balancers: Annotated[
        list[str], typer.Option("--balancer", help='a method, a JSON object such as {"kind": "lbtw", "signal": "validation"}, or run: the run\'s own')
    ] = [],  # noqa: B006
    settings: Annotated[list[str], typer.Option("--set", help="KEY=VALUE for those balancers that have the key; may be repeated")] = [],  # noqa: B006
    sweeps: Annotated[list[str], typer.Option("--sweep", help="KEY=VALUE,VALUE,...: a replay for each value; may be repeated")] = [],  # noqa: B006
    coverage: Annotated[int | None, typer.Option(min=1, help="validation mini-batches that cover the validation set, where nothing tells")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for weights.csv and figures; else RUN/replay, or beside the CSV")] = None,
) -> None:
    """Show the weights that balancers would have chosen for recorded validation losses, without training."""
    keep_libraries_in(cache_folder(None))
    from mftcoder_coba.replaying import replay as run_replay

    print("\n".join(run_replay(source, balancers, settings, sweeps, coverage, out)))


@app.command()
def compare(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="the comparison's folder; the same command goes on in it")],
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods", help="a balancer with its defaults; lbtw*, gradnorm*, famo*: on validation losses; single_task: a model per task; else all"
        ),
    ] = [],  # noqa: B006
    plan: Annotated[
        Path | None,
        typer.Option(
            help='a JSON file of methods with settings: {"coba-paired": {"kind": "coba", "slope": "paired"}, '
            '"lora-per-task": {"per_task": true, "adapter": {"kind": "lora", "rank": 4}}, '
            '"full": {"adapter": null, "training": {"learning_rate": 1e-5}, "balancer": {"kind": "uniform"}}}; '
            "what a method does not name is the experiment's"
        ),
    ] = None,
    seeds: Annotated[list[int], typer.Option("--seeds", help="may be repeated; else the experiment's")] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    launcher: Annotated[str, typer.Option(help='what starts each run on several processes, e.g. "deepspeed --num_gpus 2"')] = "",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="keep the best model of each run")] = False,
) -> None:
    """Train with several balancers, adapters and seeds, all else being equal, and write tables and figures."""
    from mftcoder_coba.config import load_config

    keep_libraries_in(cache_folder(load_config(config, overrides).data.cache_dir))
    from mftcoder_coba.comparing import compare as run_comparison

    run_comparison(config, out, methods, plan, seeds, overrides, launcher, keep_models)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="a run folder, or the folder of an adapter")],
    out: Annotated[Path, typer.Option(help="a new folder; without --task, each task has one below it")],
    task: Annotated[str | None, typer.Option(help="one task of an adapter with experts; else all")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="a full model with the adapter merged in, instead of a plain LoRA adapter")] = False,
    base_model: Annotated[str | None, typer.Option(help="a Hugging Face folder or hub id to merge into; else the one that the adapter names")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"] | None, typer.Option(help="of the full model; else the base model's own")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the base model")] = False,
) -> None:
    """Write adapters in the forms that servers load: a plain LoRA adapter for each task, or merged full models."""
    keep_libraries_in(cache_folder(None))
    from mftcoder_coba.models.exporting import export as run_export

    print("\n".join(run_export(source, out, task, merged, base_model, dtype, trust_remote_code)))


@app.command()
def merge(
    base: Annotated[str, typer.Option(help="the model that all were trained from: a Hugging Face folder or hub id")],
    models: Annotated[list[Path], typer.Option("--models", help="a fine-tuned full model, a LoRA adapter, or a run; repeat it for each")],
    out: Annotated[Path, typer.Option(help="a new folder")],
    method: Annotated[Literal[*MERGING_METHODS], typer.Option(help="how each tensor is merged")] = "parameter_selection",
    probabilities: Annotated[
        list[float], typer.Option("--probabilities", help="parameter_selection: of choosing a model, one for each in their order; else equal")
    ] = [],  # noqa: B006
    resample_rounds: Annotated[
        int | None, typer.Option(min=0, help="parameter_selection: draw again, so often, where the chosen model left a parameter unchanged; else 0")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="parameter_selection, dare_*: of the draws; else 0")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare_*: the share of each update that is kept; else 0.2, for dare_* 0.1")] = None,
    weight: Annotated[
        list[float], typer.Option("--weight", help="linear, task_arithmetic, ties, dare_*: one for all, or one for each; else 1/K")
    ] = [],  # noqa: B006
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="of the merged full model; else the models' own")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="adapters: write a LoRA adapter of this rank, instead of a full model")] = None,
) -> None:
    """Merge models that were trained from one base, e.g. in different data orders, into one."""
    from mftcoder_coba.merging import merge as run_merge

    options = {"probabilities": probabilities, "resample_rounds": resample_rounds, "seed": seed, "density": density, "weight": weight}
    print("\n".join(run_merge(base, models, method, out, dtype, rank, **options)))


@app.command()
def orders(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="the folder of runs, merges and tables; the same command goes on in it")],
    count: Annotated[int, typer.Option(help="data orders, with a run for each; may be raised later")] = 5,
    methods: Annotated[
        list[str],
        typer.Option("--methods", help="of the command merge, may be repeated; else linear, norm_rescaled_average and parameter_selection"),
    ] = [],  # noqa: B006
    resample_rounds: Annotated[int, typer.Option(help="parameter_selection is also tried with so many; 0: it is not")] = 10,
    selection_seeds: Annotated[int, typer.Option(help="merges of each method that draws")] = 3,
    positions: Annotated[int, typer.Option(help="training samples whose loss is set against their place in the first epoch; 0: none")] = 4000,
    overrides: Overrides = [],  # noqa: B006
    launcher: Annotated[str, typer.Option(help='what starts each run on several processes, e.g. "deepspeed --num_gpus 2"')] = "",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="keep the merged models; those of the runs always stay")] = False,
) -> None:
    """Train models in several data orders, merge them, and measure what merging and the order do."""
    from mftcoder_coba.config import load_config

    keep_libraries_in(cache_folder(load_config(config, overrides).data.cache_dir))
    from mftcoder_coba.orders import orders as run_orders

    run_orders(config, out, count, methods, resample_rounds, selection_seeds, positions, overrides, launcher, keep_models)


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a run folder; or with --config the folder of an adapter or of a full model")],
    config: Annotated[
        Path | None, typer.Option(help="the experiment whose data is used, and whose adapter section says of 4 bits; else the run's")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    tasks: Annotated[list[str], typer.Option("--task", help="may be repeated; else all tasks of the experiment")] = [],  # noqa: B006
    split: Annotated[Literal["valid", "test", "train"] | None, typer.Option(help="else test where each task has test files, or valid")] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the results")] = None,
    model: Annotated[str | None, typer.Option(help="an adapter's base model, a Hugging Face folder or hub id; else the experiment's")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="rows of one forward pass; else training.micro_batch_rows")] = None,
    metrics: Annotated[
        list[str],
        typer.Option(
            "--metric", help="of generated answers: span_f1, exact_match or bleu; for one task: TASK=NAME; else those in the tasks' metrics"
        ),
    ] = [],  # noqa: B006
    code_tasks: Annotated[list[Path], typer.Option("--code-tasks", help="a JSONL file of code problems, for pass@k")] = [],  # noqa: B006
    code_format: Annotated[Literal["humaneval", "humaneval_x"], typer.Option(help="of the files of --code-tasks")] = "humaneval",
    code_prompt: Annotated[
        Literal["raw", "chat"], typer.Option(help="the model continues the problem's text, or answers it as a user's turn")
    ] = "raw",
    code_as: Annotated[str, typer.Option(help="the task whose experts write code, for an adapter that has some")] = "",
    allow_code_execution: Annotated[bool, typer.Option("--allow-code-execution", help="programs that the model has written may run")] = False,
    without_namespaces: Annotated[
        bool, typer.Option("--without-namespaces", help="run them under limits alone: network and your files are within their reach")
    ] = False,
    pass_at: Annotated[list[int], typer.Option(min=1, help="k of pass@k; may be repeated; else 1")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="answer only so many samples of each task, and problems of each file")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer at most")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="of sampling; 0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="of sampling")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="answers to each prompt; metrics of texts take the first")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of sampling")] = 1234,
    generation_rows: Annotated[int, typer.Option(min=1, help="prompts at a time")] = 8,
    engine: Annotated[Literal["auto", "transformers", "vllm"], typer.Option(help="auto: vLLM where it is installed and there is a GPU")] = "auto",
    generations: Annotated[Path | None, typer.Option(help="folder for the answers; the same command goes on in it; else beside --out")] = None,
) -> None:
    """Measure each task: exact loss and perplexity, metrics of generated answers, and pass@k of generated code."""
    from mftcoder_coba.evaluation import Wanted
    from mftcoder_coba.evaluation import evaluate as run_evaluation
    from mftcoder_coba.evaluation.generation import Decoding

    wanted = Wanted(
        metrics=metrics,
        limit=limit,
        code_tasks=code_tasks,
        code_format=code_format,
        code_prompt=code_prompt,
        code_as=code_as,
        ks=tuple(pass_at) or (1,),
        allow_code_execution=allow_code_execution,
        namespaces=not without_namespaces,
        engine=engine,
        decoding=Decoding(max_new_tokens, temperature, top_p, samples, seed, generation_rows),
        folder=generations,
    )
    run_evaluation(source, config, overrides, tasks, split, out, model, batch_rows, wanted)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, e.g. runs/demo; several are compared side by side")],
    out: Annotated[Path | None, typer.Option(help="folder for report.html and its figures; needed for several runs; else RUN/report")] = None,
) -> None:
    """Build report.html and its figures from one run folder, or from several side by side."""
    keep_libraries_in(cache_folder(None))
    from mftcoder_coba.reporting.report import build_report

    print(build_report(*runs, out=out))


def main() -> None:
    """Runs a command. All ranks of a run meet the same mistake; one of them tells it."""
    # The deepspeed launcher puts this before the command's name; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    try:
        app(args=arguments)
    except (UserError, RunFailure, Interrupted) as error:
        if int(os.environ.get("RANK", 0)) == getattr(error, "told_by", 0):
            print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
