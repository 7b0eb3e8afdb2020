"""The data pipeline beside the tokenizer alone, and packing alone.

    PYTHONPATH=. python tests/benchmarks/data_pipeline.py --tokenizer FOLDER --data FOLDER/*/train.jsonl

One run prints: seconds of the tokenizer's own `encode_batch` on all texts with all cores; seconds of `prepare` into an empty
cache plus the first epoch's order and packing; their ratio; rows and fill; seconds to pack a million and ten million lengths.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mftcoder_coba.config import DataConfig
from mftcoder_coba.data import TrainSchedule, choose, load_tokenizer, pack, prepare
from mftcoder_coba.data.files import read_lines
from mftcoder_coba.data.formats import choose_format, parse_line


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def texts_of(files: list[Path], format_name: str, template: Any) -> list[str]:
    """All segments that the pipeline gives to the tokenizer."""
    format = choose_format(format_name, {})
    lines = (line for file in files for _, line in read_lines(file, format.names.values()))
    return [segment.text for line in lines for segment in template.render(parse_line(line, format)) if segment.text]


def encode_all(tokenizer: Any, texts: list[str]) -> float:
    """Seconds of `encode_batch` with all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return timed(lambda: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))[0]


def tokenizer_alone(tokenizer: Any, texts: list[str]) -> float:
    """In a fresh process: threads of the tokenizer do not survive a fork, and it would fall back to one core."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(encode_all, tokenizer, texts).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face folder or hub id")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="files; each is a task")
    parser.add_argument("--format", default="mftcoder")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="*", default=[10**6, 10**7], help="how many lengths to pack")
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.tokenizer)
    texts = texts_of(arguments.data, arguments.format, choose("auto", tokenizer))
    tasks = [{"name": f"task{n}", "train": [str(file.absolute())], "format": arguments.format} for n, file in enumerate(arguments.data)]

    def pipeline() -> TrainSchedule:
        with tempfile.TemporaryDirectory() as cache:
            tree = {"tasks": tasks, "valid_fraction": 0.0, "sequence_length": arguments.length, "too_long": "truncate", "cache_dir": cache}
            train = prepare(DataConfig.model_validate(tree), arguments.tokenizer, progress=False).splits["train"]
            schedule = TrainSchedule([task.lengths for task in train], None, 0, arguments.length, "best_fit")
            schedule.epoch(0)
            schedule.tokens = sum(int(task.lengths.sum()) for task in train)
            return schedule

    print(f"{len(texts):,} texts of {sum(map(len, texts)):,} characters, {len(os.sched_getaffinity(0))} cores")
    seconds: dict[str, list[float]] = {"encode_batch alone": [], "prepare, order and packing": [], "of these, loading the tokenizer": []}
    for _ in range(arguments.repeat):
        # Taking turns: what else the machine does falls on all.
        ours, schedule = timed(pipeline)
        loading, _ = timed(lambda: load_tokenizer(arguments.tokenizer))
        for values, value in zip(seconds.values(), (tokenizer_alone(tokenizer, texts), ours, loading), strict=True):
            values.append(value)
    for name, values in seconds.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)} s")
    # What else the machine does only ever adds time: the fastest rounds say most about the programs, the medians about the day.
    for name, choice in (("fastest", min), ("medians", statistics.median)):
        alone, ours, loading = map(choice, seconds.values())
        print(f"throughput over the tokenizer's, {name}: {alone / ours:.2f}, once it is loaded {alone / (ours - loading):.2f}")
    rows = schedule.rows_in_epoch(0)
    print(f"{rows:,} rows of {arguments.length}, fill {schedule.tokens / rows / arguments.length:.4f}")
    generator = np.random.default_rng(0)
    for count in arguments.lengths:
        lengths = np.clip(generator.lognormal(4.8, 0.8, count), 8, arguments.length).astype(np.int32)
        seconds, (_, starts) = timed(lambda lengths=lengths: pack(lengths, arguments.length))
        print(f"{count:,} lengths packed in {seconds:.2f} s, fill {lengths.sum() / (len(starts) - 1) / arguments.length:.4f}")


if __name__ == "__main__":
    main()
