"""What a resumed run's config changed since its checkpoint, and whether it is still the same run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mftcoder_coba.config import Config
from mftcoder_coba.errors import UserError

# What may change in the middle of a run, with all below it. Whatever is not named here is refused, so a new key is safe.
FREE = {
    # Where things are, and what is shown and kept.
    "run.name",
    "run.dir",
    "run.hang_timeout_minutes",
    "tracking",
    "checkpoint",
    "data.cache_dir",
    "data.tasks[].test",
    "data.tasks[].metrics",
    # How the same objective is computed.
    "training.micro_batch_rows",
    "model.gradient_checkpointing",
    "model.attention",
    "model.output_loss",
    "model.trust_remote_code",
    "deepspeed",
    # Limits, and how often to look.
    "training.max_steps",
    "training.epochs",
    "validation.every_steps",
    "validation.early_stopping.patience",
}
# Free where the samples are still the same ones: those of the task, or those of every task.
FREE_WITH_THE_TASKS_DATA = {"data.tasks[].train", "data.tasks[].valid", "data.tasks[].format", "data.tasks[].fields"}
FREE_WITH_ALL_DATA = {"data.template", "data.on_error", "data.valid_fraction", "data.too_long"}
ENDS = {"training.max_steps", "training.epochs"}
SPLITS = ("train", "valid")

Fingerprints = dict[str, dict[str, dict[str, Any]]]  # task -> split -> "key" and "samples", of `Corpus.fingerprints`


class _Absent:
    """The value of a key that is not there; no default is known."""

    def __repr__(self) -> str:
        return "(not there)"


ABSENT = _Absent()


@dataclass(frozen=True)
class Changes:
    """One readable line for each difference.

    Attributes:
        refused: they make another run of it.
        free: they do not change what is trained, or are limits that users move on purpose.
    """

    refused: list[str]
    free: list[str]

    def error(self, checkpoint: Path) -> UserError:
        """The message about what is refused."""
        return UserError(
            "the config differs from the checkpoint's in ways that change the run:" + "".join(f"\n  - {line}" for line in self.refused),
            str(checkpoint),
            "restore these settings, start a new run (another run.name), or insist with --allow-config-change",
        )


def changes(saved: dict[str, Any], config: Config, saved_data: Fingerprints, data: Fingerprints) -> Changes:
    """Compares the config of a checkpoint with the one of now.

    A key that the checkpoint does not have, because it was written by an older version, counts as its default.

    Args:
        saved: `config.model_dump()` as loaded ("auto" is still in it), after a round trip through JSON.
        saved_data, data: fingerprints of the samples then and now.
    """
    other_data = _data_changes(saved_data, data)
    tasks_with_other_data = {task for task, _ in other_data}

    def is_free(path: str) -> bool:
        key = re.sub(r"\[.*?\]", "[]", path)
        if _within(key, FREE_WITH_THE_TASKS_DATA):
            return re.search(r"\[(.*?)\]", path)[1] not in tasks_with_other_data
        return _within(key, FREE) or (_within(key, FREE_WITH_ALL_DATA) and not other_data)

    training = config.training
    # A warm-up that is a part of all steps ends elsewhere too.
    rate_depends_on_the_end = training.schedule != "constant" or 0 < training.warmup_steps < 1
    refused, free = [], []
    for path, old, new in _differences("", saved, config):
        line = f"{path}: {_shown(old, new)} -> {_shown(new, old)}"
        if path in ENDS and rate_depends_on_the_end:
            line += "; the learning rate from here on follows the schedule that ends there"
        (free if is_free(path) else refused).append(line)
    return Changes(refused + [line for _, line in other_data], free)


def _within(key: str, keys: set[str]) -> bool:
    """Whether `key` is one of `keys`, or below one."""
    return any(key == other or key.startswith((f"{other}.", f"{other}[")) for other in keys)


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of the innermost values that differ. A section that is there only once, or is of another kind, is one value."""
    if isinstance(new, BaseModel):
        if isinstance(old, dict) and _kind(old, new) == getattr(new, "kind", None):
            yield from _differences_of_keys(path, old, dict(new), lambda name: _default(new, name))
        else:
            yield path, old, new.model_dump()
    elif isinstance(old, dict) and isinstance(new, dict):
        yield from _differences_of_keys(path, old, new, lambda _: ABSENT)
    elif path == "data.tasks" and isinstance(old, list):
        yield from _differences_of_tasks(path, {task["name"]: task for task in old}, {task.name: task for task in new})
    elif old != new:
        yield path, old, new


def _differences_of_keys(path: str, old: dict[str, Any], new: dict[str, Any], default: Callable[[str], Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in [*new, *(name for name in old if name not in new)]:
        before = old[name] if name in old else default(name)
        yield from _differences(f"{path}.{name}".lstrip("."), before, new.get(name, ABSENT))


def _differences_of_tasks(path: str, old: dict[str, Any], new: dict[str, BaseModel]) -> Iterator[tuple[str, Any, Any]]:
    """Tasks are found again by name; their order, which numbers them, is compared too."""
    if list(old) != list(new):
        yield f"{path}, names in their order", list(old), list(new)
    for name in new:
        if name in old:
            yield from _differences(f"{path}[{name}]", old[name], new[name])


def _kind(old: dict[str, Any], section: BaseModel) -> Any:
    return old.get("kind", getattr(section, "kind", None))


def _default(section: BaseModel, name: str) -> Any:
    field = type(section).model_fields[name]
    if field.is_required():
        return ABSENT
    value = field.get_default(call_default_factory=True)
    return value.model_dump() if isinstance(value, BaseModel) else value


def _data_changes(saved: Fingerprints, now: Fingerprints) -> list[tuple[str, str]]:
    """(task, line) for each split of a task that has other samples than it had. Tasks that came or went are named elsewhere."""
    result = []
    for task in now:
        for split in SPLITS if task in saved else ():
            old, new = saved[task].get(split), now[task].get(split)
            if old == new:
                continue
            before, after = (f"{entry['samples']:,} samples" if entry else "none" for entry in (old, new))
            result.append((task, f"data.tasks {task}/{split}: other content ({before} before, {after.removesuffix(' samples')} now)"))
    return result


def _shown(value: Any, other: Any) -> str:
    """JSON, or less where less says it: a section's kind, and of two lists what is not the same in front and at the end."""
    if value is ABSENT:
        return repr(value)
    if isinstance(value, dict) and "kind" in value:
        return value["kind"]
    if isinstance(value, list) and isinstance(other, list) and len(value) + len(other) > 16:
        front = next((place for place, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other)))
        rest = min(len(value), len(other)) - front
        back = next((place for place in range(rest) if value[-1 - place] != other[-1 - place]), rest)
        shown = [json.dumps(item, ensure_ascii=False) for item in value[front : len(value) - back]]
        return "[" + ", ".join(["..."] * (front > 0) + shown + ["..."] * (back > 0)) + "]"
    return json.dumps(value, ensure_ascii=False)
