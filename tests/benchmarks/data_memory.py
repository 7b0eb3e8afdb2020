"""Resident memory of a process that trains on little and on much data.

    PYTHONPATH=. python tests/benchmarks/data_memory.py --tokenizer FOLDER --data FOLDER/*/train.jsonl [--megabytes 1 300]

The files, repeated to so many megabytes in all, are prepared, ordered, packed and read as a training rank does it; each size in
a process of its own, which says how much memory it holds then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from mftcoder_coba.config import validate
from mftcoder_coba.data import collate, prepare
from mftcoder_coba.planning import mixture, plan_steps, training_schedule

ROWS = 4096


def repeated(files: list[Path], megabytes: int, folder: Path) -> list[Path]:
    """The files, each repeated as often as it takes, cut at a line's end."""
    total, results = sum(file.stat().st_size for file in files), []
    for number, file in enumerate(files):
        data = file.read_bytes()
        wanted = int(megabytes * 1e6 * len(data) / total)
        results.append(folder / f"task{number}.jsonl")
        with open(results[-1], "wb") as out:
            while (left := wanted - out.tell()) > 0:
                out.write(data if len(data) <= left else data[: data.rfind(b"\n", 0, left) + 1] or data[: data.find(b"\n") + 1])
                if len(data) > left:
                    break
    return results


def resident_mib() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


def rank(tokenizer: str, files: list[str], cache: str) -> None:
    tree = {
        "run": {"name": "benchmark"},
        "model": {"path": tokenizer},
        "data": {
            "tasks": [{"name": f"task{number}", "train": [file]} for number, file in enumerate(files)],
            "sequence_length": 1024,
            "too_long": "truncate",
            "cache_dir": cache,
        },
        "training": {"global_batch_rows": 64, "micro_batch_rows": 8, "learning_rate": 1e-4},
    }
    config = validate(tree, "benchmark")
    corpus = prepare(config.data, tokenizer, progress=False)
    train = corpus.splits["train"]
    schedule = training_schedule(config, train)
    plan, found = plan_steps(config, schedule, 1), mixture(config, corpus, schedule)
    for start in range(0, min(ROWS, found.rows), 8):
        collate(schedule.rows(start, min(start + 8, found.rows)), train, len(train), corpus.pad_token_id, "token", max_length=1024)
    print(f"{found.documents:,} samples, {found.tokens:,} tokens, {plan.total_steps:,} steps: {resident_mib()} MiB resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face folder or hub id")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="files in MFTCoder's format; each is a task")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 300])
    parser.add_argument("--cache", help=argparse.SUPPRESS)  # this process is the rank
    arguments = parser.parse_args()
    if arguments.cache:
        rank(arguments.tokenizer, [str(file) for file in arguments.data], arguments.cache)
        return
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            files = repeated(arguments.data, megabytes, Path(folder))
            command = [sys.executable, __file__, "--tokenizer", arguments.tokenizer, "--cache", folder, "--data", *map(str, files)]
            print(f"{megabytes} MB:", subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
