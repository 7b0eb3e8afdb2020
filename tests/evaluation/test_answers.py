"""Generated answers: what is asked, resuming after a kill, experts by task, metrics, and a user's mistakes."""

import json
import subprocess
import sys

import pytest
import torch
from ranks import ROOT
from toy import TASKS, write_samples

from mftcoder_coba.config import load_config
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation import Wanted, evaluate
from mftcoder_coba.evaluation.engines import by_transformers, choose_engine
from mftcoder_coba.evaluation.generation import Decoding, generate
from mftcoder_coba.evaluation.loading import find_model, load
from mftcoder_coba.evaluation.prompts import Prompter

DECODING = Decoding(max_new_tokens=8, batch_rows=3)


def prompts_of(trained, task="count", split="test"):
    prompter = Prompter(load_config(trained / "toy.json"))
    return prompter, prompter.samples(task, split)


def completer(trained, name, decoding=DECODING, task="count"):
    found = find_model(trained / "runs" / name, load_config(trained / "runs" / name / "config.json"), list(TASKS), False)
    model = load(found, list(TASKS))
    prompter = Prompter(found.config)
    return by_transformers(model, prompter, decoding, task), prompter, model


def test_a_prompt_is_all_before_the_last_answer_and_the_answer_is_a_reference(trained, tmp_path):
    prompter, samples = prompts_of(trained)
    lines = [json.loads(line) for line in (trained / "data/count/test.jsonl").read_text().splitlines()]
    for found, line in zip(samples, lines, strict=True):
        human, bot = line["chat_rounds"]
        assert prompter.tokenizer.decode(found.prompt) == f"<s>human\n{human['content']}\n<s>bot\n"
        assert found.references == [bot["content"]]


def test_further_references_and_earlier_turns_are_taken_from_the_line(trained, tmp_path):
    rounds = [("human", "one"), ("bot", "1"), ("human", "two"), ("bot", "2")]
    line = {"chat_rounds": [{"role": role, "content": text} for role, text in rounds], "references": ["II", "zwei"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(line) + "\n")
    prompter = Prompter(load_config(trained / "toy.json", [f'data.tasks.count.test=["{tmp_path / "test.jsonl"}"]']))
    (found,) = prompter.samples("count", "test")
    assert prompter.tokenizer.decode(found.prompt) == "<s>human\none\n<s>bot\n1</s>\n<s>human\ntwo\n<s>bot\n"
    assert found.references == ["2", "II", "zwei"]


@pytest.mark.parametrize("name", ["full", "lora", "cgc"])
def test_answers_of_a_batch_are_those_of_each_prompt_alone_greedily(trained, name):
    complete, _, model = completer(trained, name)
    prompts = [found.prompt for found in prompts_of(trained)[1]]
    together = complete(prompts, 0)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(DECODING.max_new_tokens):  # without cache, padding or generate
            with torch.no_grad():
                more = {"task": "count"} if name == "cgc" else {}
                token = int(model(input_ids=torch.tensor([ids]), **more).logits[0, -1].argmax())
            if token == 1:  # </s>
                break
            ids.append(token)
        assert answer == ids[len(prompt) :]


def test_experts_answer_as_their_task(trained):
    complete, _, model = completer(trained, "cgc", task="count")
    prompts = [found.prompt for found in prompts_of(trained)[1]]
    with torch.no_grad():
        for parameter in model.own_parameters("upper"):
            parameter.normal_(std=0.5)
    before = complete(prompts, 0)
    as_upper = by_transformers(model, Prompter(load_config(trained / "toy.json")), DECODING, "upper")(prompts, 0)
    assert complete(prompts, 0) == before != as_upper


def test_sampled_answers_are_the_same_wherever_a_run_was_interrupted(trained, tmp_path):
    decoding = Decoding(max_new_tokens=6, temperature=1.0, samples=2, batch_rows=3)
    complete, prompter, _ = completer(trained, "lora", decoding)
    prompts = [found.prompt for found in prompts_of(trained)[1]]
    whole = generate(prompts, complete, prompter.text, decoding, {}, tmp_path / "whole.jsonl")
    assert any(first != second for first, second in whole)
    text = (tmp_path / "whole.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 11
    for kept in (0, len(lines[0]), len(lines[0]) + 5, sum(map(len, lines[:4])), sum(map(len, lines[:6])) - 3, len(text)):
        path = tmp_path / f"{kept}.jsonl"
        path.write_bytes(text[:kept])
        asked = []

        def counted(batch, seed, asked=asked):
            asked.append(len(batch))
            return complete(batch, seed)

        assert generate(prompts, counted, prompter.text, decoding, {}, path) == whole
        assert path.read_bytes() == text and sum(asked) == 10 - max(0, text[:kept].count(b"\n") - 1) // 3 * 3 - (kept == len(text))


def test_generations_of_other_settings_are_refused_with_the_difference(tmp_path):
    def complete(batch, seed):
        return [[1]] * len(batch)

    generate([[1]], complete, str, DECODING, {"model": "a"}, tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="model: 'a' then, 'b' now"):
        generate([[1]], complete, str, DECODING, {"model": "b"}, tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text("nothing\n")
    with pytest.raises(UserError, match="no file of generations"):
        generate([[1]], complete, str, DECODING, {}, tmp_path / "y.jsonl")
    with pytest.raises(UserError, match="greedy answers"):
        Decoding(samples=2)


def test_metrics_of_the_command_or_of_the_config_are_measured(trained, tmp_path):
    decoding = Decoding(max_new_tokens=8)
    wanted = Wanted(metrics=["exact_match", "count=span_f1", "count=bleu"], decoding=decoding)
    found = evaluate(trained / "runs" / "cgc", tasks=["count", "reverse"], out=tmp_path / "a.json", wanted=wanted)
    assert set(found["tasks"]["count"]) >= {"answers", "exact_match", "span_f1", "bleu"} and "bleu" not in found["tasks"]["reverse"]
    assert found["tasks"]["count"]["answers"] == 5 and found["decoding"]["engine"] == "transformers"
    written = sorted(path.name for path in (tmp_path / "generations").iterdir())
    assert written == ["count.jsonl", "reverse.jsonl"]
    named = ['data.tasks.count.metrics=["span_f1"]']
    again = evaluate(trained / "runs" / "cgc", overrides=named, tasks=["count"], out=tmp_path / "b.json", wanted=Wanted(decoding=decoding))
    assert again["tasks"]["count"]["span_f1"] == found["tasks"]["count"]["span_f1"]


def test_a_model_that_answers_right_has_the_full_score(trained, tmp_path, monkeypatch):
    answers = {tuple(found.prompt): found.references[0] for found in prompts_of(trained)[1]}

    def right(model, prompter, decoding, task):
        return lambda batch, seed: [prompter.tokenizer(answers[tuple(prompt)])["input_ids"] for prompt in batch]

    monkeypatch.setattr("mftcoder_coba.evaluation.answers.by_transformers", right)
    wanted = Wanted(metrics=["span_f1", "exact_match", "bleu"], decoding=DECODING)
    (found,) = evaluate(trained / "runs" / "lora", tasks=["count"], out=tmp_path / "a.json", wanted=wanted)["tasks"].values()
    assert [found[name] for name in ("span_f1", "exact_match", "bleu")] == [pytest.approx(100.0)] * 3


def test_data_that_is_not_evaluated_need_not_be_there(trained, tmp_path):
    write_samples(tmp_path / "test.jsonl", [("count abc", "0 1 2")])
    gone = [f'data.tasks.{task}.{split}=["{tmp_path}/gone.jsonl"]' for task in TASKS for split in ("train", "valid")]
    there = [*gone, f'data.tasks.count.test=["{tmp_path}/test.jsonl"]']
    assert evaluate(trained / "runs" / "lora", overrides=there, tasks=["count"], split="test")["tasks"]["count"]["samples"] == 1
    with pytest.raises(UserError, match="gone.jsonl"):
        evaluate(trained / "runs" / "lora", overrides=there, tasks=["count"], split="valid")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(metrics=["span_f2"]), 'did you mean "span_f1"'),
        (Wanted(metrics=["cont=bleu"]), 'did you mean "count"'),
        (Wanted(metrics=["bleu"]), "generations need a folder"),
        (Wanted(code_tasks=["a.jsonl"], ks=(10,)), "needs as many answers"),
        (Wanted(code_tasks=["a.jsonl", "b/a.jsonl.gz"]), "same name"),
        (Wanted(code_as="coun"), 'did you mean "count"'),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(trained, wanted, message):
    from pathlib import Path

    wanted = Wanted(**{**vars(wanted), "code_tasks": [Path(path) for path in wanted.code_tasks]})
    with pytest.raises(UserError) as error:
        evaluate(trained / "runs" / "lora", wanted=wanted)
    assert message in error.value.what


def test_code_needs_permission_and_a_task_whose_experts_write_it(trained, shared, tmp_path):
    file = shared / "data" / "eval" / "humaneval.jsonl.gz"
    with pytest.raises(UserError, match="programs that a model has written"):
        evaluate(trained / "runs" / "cgc", out=tmp_path / "a.json", wanted=Wanted(code_tasks=[file]))
    allowed = Wanted(code_tasks=[file], allow_code_execution=True, namespaces=False, limit=1, decoding=Decoding(max_new_tokens=4))
    with pytest.raises(UserError, match="nothing says whose write code"):
        evaluate(trained / "runs" / "cgc", out=tmp_path / "a.json", wanted=allowed)


def test_vllm_is_refused_without_a_gpu_and_is_never_chosen_then(trained):
    found = find_model(trained / "runs" / "lora", load_config(trained / "runs" / "lora" / "config.json"), list(TASKS), False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert choose_engine("auto", found) == "transformers"
    with pytest.raises(UserError, match="needs a GPU and the package vllm"):
        choose_engine("vllm", found)


def test_the_room_and_its_code_are_imported_without_torch():
    code = "import sys, mftcoder_coba.evaluation, mftcoder_coba.evaluation.code.passing; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
