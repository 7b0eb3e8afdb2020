"""What an engine trains, by name: parameters and optimizer states as slices, whatever number of ranks and ZeRO stage wrote them.

STATES_FOLDER/rank-0000.safetensors ... hold, for each slice of a trained parameter NAME that the rank's optimizer steps, 1-D tensors

    fp32/NAME                           the parameter's master weights
    exp_avg/NAME, exp_avg_sq/NAME       Adam's states; absent before the first step

The metadata of each file: `format`, a version; `files`, how many files the checkpoint has; `parameters`, JSON: for each NAME
the whole parameter's "shape", where its slice begins ("start") and ends ("end") in the flattened parameter, which tensors there are ("kinds"), and
Adam's "step", null before the first.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mftcoder_coba.engine.fragments import Fragment, Layout
from mftcoder_coba.engine.tensor_files import FileDigest, write_tensors
from mftcoder_coba.errors import UserError

STATES_FOLDER = "states"
_FORMAT = "1"
_MASTER = "fp32"
_NAMED = 3  # differences that a message names


def write_states(folder: Path, layout: Layout, rank: int, world_size: int) -> dict[str, FileDigest]:
    """Writes this rank's slices into `folder`/STATES_FOLDER. No rank waits for another.

    Returns:
        what was written, by path relative to `folder`; nothing where another rank holds the same and writes it.

    Raises:
        OSError: the file could not be written whole.
    """
    if layout.replicated and rank > 0:
        return {}
    tensors: dict[str, Tensor] = {}
    table: dict[str, dict[str, Any]] = {}
    for fragment in layout.fragments:
        state = layout.adam.state.get(fragment.flat) or {}
        kinds = {_MASTER: fragment.flat}
        kinds |= {kind: value for kind, value in state.items() if kind != "step"}
        tensors |= {f"{kind}/{fragment.name}": fragment.within(value) for kind, value in kinds.items()}
        table[fragment.name] = {
            "shape": list(fragment.shape),
            "start": fragment.start,
            "end": fragment.start + fragment.numel,
            "kinds": list(kinds),
            "step": float(state["step"]) if state else None,
        }
    files = 1 if layout.replicated else world_size
    name = f"{STATES_FOLDER}/{_file_name(rank)}"
    (folder / STATES_FOLDER).mkdir(exist_ok=True)
    return {name: write_tensors(folder / name, tensors, {"format": _FORMAT, "files": str(files), "parameters": json.dumps(table)})}


def read_states(folder: Path, layout: Layout) -> None:
    """Fills this rank's flats and Adam's states with its slices, and reads nothing else. No rank waits for another.

    Raises:
        UserError: files are missing or damaged, or hold other parameters than `layout`. Nothing has been changed then.
        OSError: a file could not be read.
    """
    with contextlib.ExitStack() as open_files:
        saved = _index(folder / STATES_FOLDER, open_files)
        _check_same_parameters(saved, layout.shapes, folder)
        held: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in layout.fragments:
            held[id(fragment.flat)].append(fragment)
        for flat in layout.flats:
            fragments = held[id(flat)]
            for fragment in fragments:
                saved[fragment.name].read(_MASTER, fragment, flat)
            # A flat that is cut from many parameters is stepped as one, on every rank.
            stepped = [saved[fragment.name] for fragment in fragments] if layout.replicated else list(saved.values())
            layout.adam.state.pop(flat, None)
            if state := _new_state(flat, stepped):
                layout.adam.state[flat] = state
            for fragment in fragments:
                for kind in saved[fragment.name].kinds - {_MASTER}:
                    saved[fragment.name].read(kind, fragment, state[kind])


def _new_state(flat: Tensor, parameters: list[SavedParameter]) -> dict[str, Tensor]:
    """Adam's state for a flat that is stepped with these parameters, filled with zeros; {} before the first step.

    In stage 0 in float32 each parameter has a count of its own, which leaves out steps in which it had no gradient. Parameters that
    are stepped together share the largest count, as if their gradient had been zero in those steps.
    """
    steps = [parameter.step for parameter in parameters if parameter.step is not None]
    if not steps:
        return {}
    kinds = set().union(*(parameter.kinds for parameter in parameters)) - {_MASTER}
    # A fused Adam keeps its count beside the parameters, as float32.
    return {"step": torch.tensor(max(steps), dtype=torch.float32, device=flat.device)} | {
        kind: torch.zeros_like(flat, requires_grad=False, memory_format=torch.preserve_format) for kind in sorted(kinds)
    }


class _Piece(NamedTuple):
    """A slice [start, end) of a parameter in an open file."""

    start: int
    end: int
    shape: tuple[int, ...]
    kinds: frozenset[str]
    step: float | None
    file: Any


class SavedParameter:
    """One parameter of a checkpoint, whole but in pieces.

    Raises:
        ValueError: the pieces, of which there is at least one, do not make up the parameter.
    """

    def __init__(self, name: str, pieces: list[_Piece]):
        self.name, self.pieces = name, sorted(pieces, key=lambda piece: piece.start)
        self.shape, self.kinds, self.step = pieces[0].shape, pieces[0].kinds, pieces[0].step
        if any((piece.shape, piece.kinds, piece.step) != (self.shape, self.kinds, self.step) for piece in pieces):
            raise ValueError(f"the parts of {name} contradict each other")
        if _MASTER not in self.kinds:
            raise ValueError(f"{name} has no weights")
        reached = 0
        for piece in self.pieces:
            if piece.start != reached:
                raise ValueError(f"{name} has a gap or an overlap at element {min(reached, piece.start)}")
            reached = piece.end
        if reached != math.prod(self.shape):
            raise ValueError(f"{name} ends at element {reached} of {math.prod(self.shape)}")

    def read(self, kind: str, fragment: Fragment, into: Tensor) -> None:
        """Copies the fragment's elements to their place in `into`, which is its flat or a state of that."""
        target, first, last = fragment.within(into), fragment.start, fragment.start + fragment.numel
        for piece in self.pieces:
            begin, end = max(first, piece.start), min(last, piece.end)
            if begin < end:
                part = piece.file.get_slice(f"{kind}/{self.name}")[begin - piece.start : end - piece.start]
                target[begin - first : end - first].copy_(part)


def _index(folder: Path, open_files: contextlib.ExitStack) -> dict[str, SavedParameter]:
    """All parameters in the files of a states folder, by name. Only headers are read; all that they say is checked."""
    paths = sorted(folder.glob("rank-*.safetensors"))
    if not paths:
        raise _damaged(folder, "it holds no states")
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    files = set()
    for path in paths:
        try:
            file = open_files.enter_context(safe_open(path, "pt"))
            metadata = file.metadata()
            if metadata["format"] != _FORMAT:
                raise ValueError(f'its format is "{metadata["format"]}", and this program reads "{_FORMAT}"')
            files.add(int(metadata["files"]))
            for name, entry in json.loads(metadata["parameters"]).items():
                pieces[name].append(_piece(file, name, entry))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if files != {len(paths)} or paths != [folder / _file_name(rank) for rank in range(len(paths))]:
        raise _damaged(folder, f"it has {len(paths)} files; they say that there should be {' or '.join(map(str, sorted(files)))}")
    try:
        return {name: SavedParameter(name, of_name) for name, of_name in pieces.items()}
    except ValueError as error:
        raise _damaged(folder, str(error)) from None


def _piece(file: Any, name: str, entry: dict[str, Any]) -> _Piece:
    piece = _Piece(entry["start"], entry["end"], tuple(entry["shape"]), frozenset(entry["kinds"]), entry["step"], file)
    for kind in piece.kinds:
        if file.get_slice(f"{kind}/{name}").get_shape() != [piece.end - piece.start]:
            raise ValueError(f"{kind}/{name} is not of the size that the metadata say")
    return piece


def _check_same_parameters(saved: dict[str, SavedParameter], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    differences = {
        "only in the checkpoint": sorted(saved.keys() - shapes.keys()),
        "only in this run": sorted(shapes.keys() - saved.keys()),
        "of another shape": [
            f"{name} {list(saved[name].shape)}, now {list(shape)}" for name, shape in shapes.items() if name in saved and saved[name].shape != shape
        ],
    }
    texts = [
        f"{where}: {', '.join(found[:_NAMED])}{f' and {len(found) - _NAMED} more' if len(found) > _NAMED else ''}"
        for where, found in differences.items()
        if found
    ]
    if texts:
        raise UserError(
            f"the checkpoint holds other parameters than this run trains; {'; '.join(texts)}",
            str(folder),
            "use the model and adapter settings of the run that wrote it",
        )


def _damaged(where: Path, found: str) -> UserError:
    return UserError(f"the checkpoint is damaged: {found}", str(where), "use another checkpoint")


def _file_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"
