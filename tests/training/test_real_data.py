"""A pretrained model on real tasks: skipped where the shared data is not there."""

import json

import pytest

SUITES = {
    "mdqa": ["mdqa/mdqa_text2code", "mdqa/mdqa_math", "mdqa/mdqa_instruct"],
    "mdqa and xup": ["mdqa/mdqa_text2code", "mdqa/mdqa_math", "mdqa/mdqa_instruct", "xup/xup_en", "xup/xup_ar", "xup/xup_bn"],
}


@pytest.fixture
def run(shared, tmp_path, command_line):
    def run(suite, steps, **validation):
        tree = {
            "run": {"name": "run", "dir": "runs"},
            "model": {"path": str(shared / "models" / "stories260k"), "dtype": "float32"},
            "data": {
                "tasks": [
                    {"name": task.split("/")[1], **{split: [str(shared / "data" / task / f"{split}.jsonl")] for split in ("train", "valid")}}
                    for task in SUITES[suite]
                ],
                "sequence_length": 512,
                "too_long": "truncate",
                "cache_dir": "cache",
            },
            "balancer": {"kind": "coba"},
            "training": {"max_steps": steps, "global_batch_rows": 16, "micro_batch_rows": 8, "learning_rate": 6e-3, "warmup_steps": 10},
            "validation": {"every_steps": 50, "balancer_rows_per_rank": 8} | validation,
            "checkpoint": {"every_steps": 150},
            "deepspeed": {"zero_optimization": {"stage": 2}},
        }
        (tmp_path / "x.json").write_text(json.dumps(tree), encoding="utf-8")
        result = command_line(2, "train", "--config", str(tmp_path / "x.json"), timeout=1500)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        lines = (tmp_path / "runs" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return run


def test_every_task_of_the_real_suite_falls_below_six_tenths_of_its_loss(run):
    records = run("mdqa", 150)
    last = [record for record in records if record["kind"] == "validation"][-1]
    assert last["step"] == 150
    assert all(task["ratio"] < 0.6 for task in last["tasks"].values()), last
    observed = [record for record in records if record["kind"] == "balancer"]
    assert len(observed) == 150 and observed[-1]["df"] is not None


def test_a_task_of_85_samples_needs_no_special_case(run):
    records = run("mdqa and xup", 12, every_steps=12)
    last = [record for record in records if record["kind"] == "validation"][-1]
    assert set(last["tasks"]) == {task.split("/")[1] for task in SUITES["mdqa and xup"]}
    assert all(task["ratio"] < 1 for task in last["tasks"].values()), last
