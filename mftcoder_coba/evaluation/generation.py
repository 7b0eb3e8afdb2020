"""Answers to prompts: by transformers or by vLLM, in batches, written down as they come.

A file of generations begins with a line that says what made it; then a line for each answer. A batch is written whole or not at all, and what is in a
batch is decided before the first one, so an evaluation that was killed goes on at the next batch. Sampling begins at each batch with a seed of its
own: the text does not depend on where a run was interrupted. It does depend on the number of rows of a batch, as sampling by transformers does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.showing import progress_bar

Complete = Callable[[list[list[int]], int], list[list[int]]]  # prompts of a batch, its seed -> new token ids, up to an end token


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
        max_new_tokens: of an answer at most.
        temperature: 0 is greedy.
        top_p: of sampling.
        samples: answers to each prompt.
        batch_rows: prompts at a time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 1234
    batch_rows: int = 8

    def __post_init__(self):
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"{self.samples} greedy answers to a prompt are all the same", "--samples", "sample with --temperature, for example 0.8")


def generate(
    prompts: Sequence[list[int]], complete: Complete, to_text: Callable[[list[int]], str], decoding: Decoding, made_by: dict[str, Any], path: Path
) -> list[list[str]]:
    """Answers to each prompt, `decoding.samples` of them; what is in the file already is taken from there.

    Args:
        to_text: new token ids -> the answer.
        made_by: model and data, as plain values; they and the decoding have to be those of the file.
        path: a JSONL file; {"settings"} first, then {"prompt": number, "sample": number, "tokens": number, "text"}.

    Raises:
        UserError: the file is of other settings, or cannot be written.
    """
    # The longest first: what does not fit in memory shows at once. Rows of like lengths share a batch.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    rows = [(place, sample) for place in order for sample in range(decoding.samples)]
    batches = [rows[start : start + decoding.batch_rows] for start in range(0, len(rows), decoding.batch_rows)]
    settings = json.loads(json.dumps(asdict(decoding) | made_by | {"prompts": len(prompts)}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = _written(path, settings, batches)
        with path.open("a", encoding="utf-8") as file, progress_bar() as bar:
            if not answers and file.tell() == 0:
                _append(file, [{"settings": settings}])
            done = len(answers) // decoding.batch_rows if answers else 0
            done = len(batches) if len(answers) == len(rows) else done
            for number in bar.track(range(done, len(batches)), description=f"generating {path.stem}"):
                batch = batches[number]
                new = complete([prompts[place] for place, _ in batch], decoding.seed * 1_000_003 + number)
                texts = [to_text(ids) for ids in new]
                records = [
                    {"prompt": place, "sample": sample, "tokens": len(ids), "text": text}
                    for (place, sample), ids, text in zip(batch, new, texts, strict=True)
                ]
                _append(file, records)
                answers |= dict(zip(batch, texts, strict=True))
    except OSError as error:
        raise UserError(
            f"generations cannot be written: {error.strerror}", str(path), "make room, or name another folder with --generations"
        ) from error
    return [[answers[place, sample] for sample in range(decoding.samples)] for place in range(len(prompts))]


def _append(file: Any, records: Sequence[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    file.flush()
    os.fsync(file.fileno())


def _written(path: Path, settings: dict[str, Any], batches: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], str]:
    """The answers of whole batches that the file holds. What a kill has left behind them is cut off."""
    if not path.exists():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        found = [json.loads(line) for line in whole]
        before = found[0]["settings"] if found else settings
        places = [(record["prompt"], record["sample"]) for record in found[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("is no file of generations", str(path), "name another folder with --generations") from error
    differences = [
        f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now" for key in {**before, **settings} if before.get(key) != settings.get(key)
    ]
    if differences:
        what = "holds generations of other settings: " + "; ".join(differences)
        raise UserError(what, str(path), "name another folder with --generations, or remove the file")
    kept = 0
    for batch in batches:
        if places[kept : kept + len(batch)] != list(batch):
            break
        kept += len(batch)
    size = sum(map(len, whole[: kept + 1])) if whole else 0
    if size < path.stat().st_size:
        os.truncate(path, size)
    return {place: record["text"] for place, record in zip(places[:kept], found[1:], strict=False)}
