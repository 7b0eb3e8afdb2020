"""What the user names, sets and sweeps -> balancer configs, checked as the `balancer` section of an experiment is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mftcoder_coba.config import BalancerConfig, validate
from mftcoder_coba.errors import UserError, suggestion
from mftcoder_coba.replaying.recordings import Recording

OWN = "run"
MOST = 48  # more could not be told apart by eye


@dataclass(frozen=True)
class Variant:
    """A balancer with its settings. `own`: it is the run's, as it is."""

    label: str
    config: BalancerConfig
    own: bool


def variants(recording: Recording, balancers: Sequence[str], settings: Sequence[str], sweeps: Sequence[str]) -> list[Variant]:
    """Every balancer with every combination of swept values, in the order given; what comes twice is taken once.

    A setting or sweep goes to those of the balancers that have its key. Arguments as in `replaying.replay`.

    Raises:
        UserError: what cannot be read, an unknown balancer or key, a wrong value.
    """
    bases = [(_base(text, recording), text) for text in balancers or (OWN,)]
    axes = [[(*_split(f"--set {text}", text), False)] for text in settings] + [_axis(text) for text in sweeps]
    keys = [_keys_of(base, text, recording) for base, text in bases]
    for (key, _, source, _), *_ in axes:
        if not any(key in known for known in keys):
            raise UserError(f"no balancer here has the key {key}: {suggestion(key, set().union(*keys) - {'kind'})}", source)

    found: dict[str, Variant] = {}
    for (base, text), known in zip(bases, keys, strict=True):
        for choice in itertools.product(*([change for change in axis if change[0] in known] or [None] for axis in axes)):
            changes = [change for change in choice if change is not None]
            source = " ".join(
                [f"--balancer {text}", *(f"{'--sweep' if swept else '--set'} {key}={_text(value)}" for key, value, _, swept in changes)]
            )
            config = _validated(base | {key: value for key, value, _, _ in changes}, recording, source)
            own = text == OWN and config.model_dump() == _validated(base, recording, source).model_dump()
            label = _label(config, [key for key, *_, swept in changes if swept])
            variant = Variant(f"{label} (the run's own)" if own else label, config, own)
            found.setdefault(variant.label, variant)
    if len(found) > MOST:
        raise UserError(f"these are {len(found)} replays; at most {MOST} can be shown", "--sweep", "sweep fewer values, or one key at a time")
    return list(found.values())


def _base(text: str, recording: Recording) -> dict[str, Any]:
    """A method's name, a JSON object, or "run"."""
    if text == OWN:
        if recording.own is None:
            raise UserError("the recording names no balancer", str(recording.source), "give one or more, such as --balancer coba")
        return dict(recording.own)
    if not text.lstrip().startswith("{"):
        return {"kind": text}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"is not JSON: {error}", f"--balancer {text}", 'for example --balancer \'{"kind": "lbtw", "signal": "validation"}\''
        ) from None


def _keys_of(base: dict[str, Any], text: str, recording: Recording) -> set[str]:
    return set(type(_validated(base, recording, f"--balancer {text}")).model_fields)


def _validated(tree: dict[str, Any], recording: Recording, source: str) -> BalancerConfig:
    """Checked in an experiment of the recording's tasks, so that the same rules hold and mistakes read the same."""
    experiment = {
        "run": {"name": "replay"},
        "model": {"path": "none"},
        "data": {"tasks": [{"name": task, "train": ["none"]} for task in recording.tasks]},
        "training": {"global_batch_rows": 1, "micro_batch_rows": 1, "learning_rate": 1.0},
        "balancer": tree,
    }
    return validate(experiment, source).balancer


def _split(source: str, text: str) -> tuple[str, Any, str]:
    """KEY=VALUE -> (key, value, source). The value is JSON, or else taken as a string."""
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("balancer.")  # as `--set` of the other commands writes it
    if not key or not equals or not value.strip():
        raise UserError("must have the form KEY=VALUE", source, "for example --set tau=2 --sweep window=20,40")
    if key == "kind":
        raise UserError("the method is not a setting", source, "name it with --balancer; the option may be repeated")
    return key, _value(value), source


def _axis(text: str) -> list[tuple[str, Any, str, bool]]:
    """KEY=VALUE,VALUE,... -> a setting for each value."""
    source = f"--sweep {text}"
    key, _, _ = _split(source, text)
    values = text.partition("=")[2]
    try:
        parts = json.loads(f"[{values}]")  # commas inside lists and strings are theirs
    except json.JSONDecodeError:
        parts = [_value(part) for part in values.split(",")]
    if "" in parts:
        raise UserError("a value is empty", source)
    return [(key, part, source, True) for part in parts]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()


def _label(config: BalancerConfig, swept: list[str]) -> str:
    """The method and what differs from its defaults, or is swept: "coba tau=2 window=40"."""
    fields = type(config).model_fields
    values = {name: getattr(config, name) for name in fields if name != "kind"}
    shown = {name: value for name, value in values.items() if name in swept or value != fields[name].default}
    return " ".join([config.kind, *(f"{name}={_text(value)}" for name, value in shown.items())])


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, separators=(",", ":"))
