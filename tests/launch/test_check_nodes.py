"""`check-nodes`: what it says where machines differ, and that it says it once."""

import json
import shutil

import pytest
from preflight_workers import HERE
from ranks import run_ranks
from toy import tree, write_samples

from mftcoder_coba.config import load_config
from mftcoder_coba.preflight.differences import differences, gpu_differences
from mftcoder_coba.preflight.disk import needed_bytes
from mftcoder_coba.preflight.facts import PACKAGE, NodeFacts, ProcessFacts, sources_digest

WORKERS = __file__.replace("test_check_nodes", "preflight_workers")
SAMPLES = [("count abc", "0 1 2"), ("count de", "0 1")]


def node(host, **sections) -> NodeFacts:
    return NodeFacts(host, host, {"program": {}, "packages": {}} | sections)


def process(rank, host, device="A100", gpus=2) -> ProcessFacts:
    return ProcessFacts(rank, rank % 2, host, host, device, gpus)


def test_machines_that_are_alike_differ_in_nothing():
    assert differences([node("a", packages={"torch": "2"}), node("b", packages={"torch": "2"})]) == {}
    assert gpu_differences([process(rank, host) for rank, host in enumerate("aabb")]) == []


def test_a_value_is_told_with_the_machines_that_have_it_the_most_common_first():
    nodes = [node("a", packages={"torch": "1"}), *(node(host, packages={"torch": "2"}) for host in "bcdefg")]
    assert differences(nodes) == {"packages": ["torch: 2 on b, c, d, e and 2 more; 1 on a"]}


def test_what_one_machine_lacks_is_none_there():
    assert differences([node("a", packages={"peft": "1"}), node("b")]) == {"packages": ["peft: 1 on a; none on b"]}


def test_a_copy_without_git_is_judged_by_its_sources_alone():
    known = node("a", program={"commit": "c1", "sources": "s"})
    assert differences([known, node("b", program={"sources": "s"})]) == {}
    assert differences([known, node("b", program={"commit": "c2", "sources": "s"})]) == {"program": ["commit: c1 on a; c2 on b"]}


def test_many_differences_are_counted():
    names = {f"{number}.jsonl": "1 bytes" for number in range(9)}
    (lines,) = differences([node("a", data=names), node("b", data={})]).values()
    assert lines[-1] == "and 5 more" and len(lines) == 5


@pytest.mark.parametrize(
    "processes, told",
    [
        ([process(0, "a"), process(1, "a"), process(2, "b", "H100"), process(3, "b", "H100")], "processes: 2 x A100 on a; 2 x H100 on b"),
        ([process(0, "a"), process(1, "a"), process(2, "b", gpus=1)], "processes: 2 x A100 on a; 1 x A100 on b"),
        ([process(0, "a", gpus=1), process(1, "b", gpus=8)], "b has 8 GPUs, of which 1 are used"),
        ([process(0, "a"), process(1, "a", "H100")], "a has different GPUs: 1 x A100, 1 x H100"),
    ],
)
def test_other_gpus_than_those_of_the_other_machines_are_told(processes, told):
    assert told in gpu_differences(processes)


def test_part_of_a_single_machine_may_be_used():
    assert gpu_differences([process(0, "a", gpus=8)]) == []


def test_the_digest_of_the_sources_changes_with_one_byte_and_not_with_other_files(tmp_path):
    copy = shutil.copytree(PACKAGE / "preflight", tmp_path / "copy")
    before = sources_digest(copy)
    (copy / "notes.txt").write_text("x")
    assert sources_digest(copy) == before == sources_digest(PACKAGE / "preflight")
    (copy / "facts.py").write_text((copy / "facts.py").read_text() + "\n")
    assert sources_digest(copy) != before


def test_the_room_for_checkpoints_is_what_a_run_leaves_and_what_it_writes_aside(toy, command_line):
    settings = ["run.name=room", "training.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=2"]
    done = command_line(1, "train", "--config", str(toy / "toy.json"), *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    config = load_config(toy / "toy.json", settings)
    checkpoint, export = (_bytes_below(toy / "runs" / "room" / name) for name in ("checkpoints/step-000004/states", "export"))
    assert needed_bytes(config) == pytest.approx(4 * checkpoint + 2 * export, rel=0.1)


def _bytes_below(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix not in (".json", ".jinja"))


@pytest.fixture
def machines(toy, tmp_path):
    """(folder of node-0, node-1, node-2; the config that all of them read). Each has data and runs of its own under one path."""
    for number in range(3):
        write_samples(tmp_path / f"node-{number}" / "train.jsonl", SAMPLES)
    shared_runs = tmp_path / "runs"
    shared_runs.mkdir()
    for number in range(3):
        (tmp_path / f"node-{number}" / "runs").symlink_to(shared_runs)
    experiment = tree()
    experiment["run"]["dir"] = f"{HERE}/runs"
    experiment["model"]["path"] = str(toy / "model")
    experiment["data"]["tasks"] = [{"name": "count", "train": [f"{HERE}/train.jsonl"]}]
    experiment["balancer"] = {"kind": "uniform"}
    config = tmp_path / "experiment.json"
    config.write_text(json.dumps(experiment))
    return tmp_path, str(config)


def checked(machines, number: int, *options: str) -> tuple[list[int], str]:
    """(exit codes, the output of all ranks)."""
    folder, config = machines
    done = run_ranks(WORKERS, "check", number, str(folder), config, "--seconds", "0.2", *options, check=False)
    return [rank.returncode for rank in done], "".join(rank.stdout for rank in done)


def test_machines_that_are_alike_pass_and_are_told_once(machines):
    codes, output = checked(machines, 2)
    assert codes == [0, 0], output
    assert output.count("machines    2, with 2 processes") == output.count("all-reduce  8 MiB in ") == 1
    assert "node-0: 1 x cpu" in output and "1 data files" in output
    assert not list((machines[0] / "runs").iterdir())


def test_everything_that_is_wrong_is_in_one_message_with_the_machine(machines):
    folder, _ = machines
    write_samples(folder / "node-1" / "train.jsonl", SAMPLES[:1])
    (folder / "node-1" / "runs").unlink()
    (folder / "node-1" / "runs").mkdir()
    (folder / "node-2" / "train.jsonl").unlink()
    shutil.copytree(PACKAGE / "preflight", folder / "node-2" / "program")
    codes, output = checked(machines, 3)
    assert codes == [2, 2, 2], output
    assert output.count("error: ") == 1 and "Traceback" not in output
    sizes = [(folder / f"node-{number}" / "train.jsonl").stat().st_size for number in range(2)]
    for expected in (
        f"data, {HERE}/train.jsonl: {sizes[0]} bytes on node-0; {sizes[1]} bytes on node-1; none on node-2",
        f"node-2: data.tasks[0].train: no such file or folder: {HERE}/train.jsonl",
        f"node-1: run.dir: {HERE}/runs is not the folder that rank 0 writes to",
        "program, sources: ",
        " on node-0, node-1; ",
        "what to do: bring every machine to the same commit",
    ):
        assert expected in output, output
    assert "packages, " not in output and "model, " not in output and "config, " not in output


@pytest.mark.parametrize(
    "option, told",
    [("--free-disk-gib=1e9", r"GiB are free in /proc/self/cwd/runs, 1000000000.0 are needed"), ("--min-bandwidth-gb=1e9", "1e+09 are asked for")],
)
def test_too_little_room_and_too_slow_a_network_are_refused(machines, option, told):
    codes, output = checked(machines, 2, option)
    assert codes == [2, 2] and told in output and output.count("error: ") == 1, output


def test_sums_that_are_wrong_on_one_rank_are_found_on_all():
    outputs = [rank.stdout for rank in run_ranks(WORKERS, "a_rank_that_adds_up_wrongly", 2)]
    assert all("UserError: an all-reduce gave wrong sums" in output for output in outputs)
    assert "rank 1 found 1 of " in outputs[1]


def test_processes_that_do_not_find_each_other_are_a_mistake_with_the_address(machines):
    (done,) = run_ranks(WORKERS, "check_alone_on_a_port_that_is_taken", 1, machines[1], check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout
    assert "the 2 processes did not all find each other" in done.stdout and "127.0.0.1:" in done.stdout
