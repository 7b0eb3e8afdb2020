"""What is compared: names of methods, and what each of them changes in the experiment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mftcoder_coba.config import BALANCERS, Config, merged
from mftcoder_coba.errors import UserError, suggestion

SINGLE_TASK = "single_task"
PARTS = ("balancer", "adapter", "training", "data_order_seed", "per_task")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\*?")
_EXAMPLE = '{"coba-tau2": {"kind": "coba", "tau": 2.0}, "STL": "single_task", "lora-per-task": {"per_task": true, "adapter": {"kind": "lora"}}}'


@dataclass(frozen=True)
class Method:
    """What a method changes in an experiment; not yet validated.

    Attributes:
        balancer: the section in the place of the experiment's; None: a model of its own for each task, which has nothing to balance.
        changes: sections that are laid over the experiment's as a file is over the one that it extends: `adapter` (None is full-parameter
            training), and `training` with a learning rate and nothing else, for all methods train on the same data; and
            `data_order_seed`, which takes the place of the experiment's `run.data_order_seed`.
    """

    balancer: dict[str, Any] | None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def per_task(self) -> bool:
        return self.balancer is None

    def over(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A config's tree with this method's sections in it; the one task of a model has its weight from `uniform`."""
        changes = {part: value for part, value in self.changes.items() if part != "data_order_seed"}
        if "data_order_seed" in self.changes:
            changes["run"] = {"data_order_seed": self.changes["data_order_seed"]}
        return merged(tree, changes) | {"balancer": self.balancer or {"kind": "uniform"}}

    def written(self) -> dict[str, Any] | None:
        """As plain values that tell methods apart: a `balancer` section, None for `single_task`, or the parts of a plan file."""
        if not self.changes:
            return self.balancer
        return {"per_task": True, **self.changes} if self.per_task else {"balancer": self.balancer, **self.changes}


Methods = dict[str, Method]


def built_in() -> Methods:
    """Every balancer that needs no settings, with its defaults; with a star, the form that looks at validation losses; and `single_task`."""
    found: Methods = {}
    for kind, section in BALANCERS.items():
        fields = section.model_fields
        if any(value.is_required() for name, value in fields.items() if name != "kind"):
            continue
        found[kind] = Method({"kind": kind})
        if "signal" in fields:
            found[f"{kind}*"] = Method({"kind": kind, "signal": "validation"})
    return found | {SINGLE_TASK: Method(None)}


def choose_methods(base: Config, names: Sequence[str], plan: Path | None) -> Methods:
    """The methods of a comparison, in the order given: those of the plan file, then those named.

    Args:
        base: the experiment; a method that names no balancer has its own.
        names: built-in names.
        plan: a JSON file, name -> method: a built-in name, a `balancer` section of a config, or an object of some of these parts:
            "balancer": a section; "adapter": a section, laid over the experiment's, or null; "training": {"learning_rate": ...};
            "data_order_seed": a number, or null for the seed of the run; "per_task": true for a model of its own for each task.

    Returns:
        name -> method, its sections not yet validated; all built-in methods where nothing is given.

    Raises:
        UserError: an unknown name or part, a name given twice for different things, a broken file.
    """
    chosen: Methods = {} if plan is None else _read_plan(plan, base)
    for name in names:
        method = _built_in(name, f"--methods {name}")
        if name in chosen and chosen[name] != method:
            raise UserError(f"{name} stands for two methods", f"--methods {name}", f"it is another one in {plan}: rename it there")
        chosen[name] = method
    return chosen or built_in()


def folder_name(method: str) -> str:
    """A method's name as part of a folder's name: a star means something to shells."""
    return method.replace("*", "-star")


def _built_in(name: str, where: str) -> Method:
    known = built_in()
    if name not in known:
        what = "needs settings of its own" if name == "fixed" else f"is no method that is known by its name; {suggestion(name, known)}"
        raise UserError(what, where, "other settings have a place in a --plan file")
    return known[name]


def _read_plan(path: Path, base: Config) -> Methods:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", f"--plan {path}") from None
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", f"--plan {path}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError("must be a JSON object of at least one method", f"--plan {path}", f"for example {_EXAMPLE}")
    methods: Methods = {}
    for name, value in tree.items():
        where = f"{path}: {name}"
        if not _NAME.fullmatch(name):
            raise UserError("a method's name becomes a folder: letters, digits, . _ -, and a star at its end", where, "rename it")
        if isinstance(value, str):
            methods[name] = _built_in(value, where)
        elif not isinstance(value, dict):
            raise UserError(f"must be a built-in name, or an object with `kind` or some of {', '.join(PARTS)}", where, f"for example {_EXAMPLE}")
        elif "kind" in value:
            methods[name] = _balancer_alone(value, where)
        else:
            methods[name] = _of_parts(value, base, path.absolute().parent, where)
    return methods


def _balancer_alone(section: dict[str, Any], where: str) -> Method:
    parts = [part for part in PARTS if part in section]
    if parts:
        raise UserError(f"`kind` makes it a balancer's section, which has no {parts[0]}", where, 'put that section under "balancer"')
    return Method(section)


def _of_parts(parts: dict[str, Any], base: Config, folder: Path, where: str) -> Method:
    """`folder`: what paths are relative to."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"unknown key {unknown[0]}: {suggestion(unknown[0], PARTS)}", where, "keys of a balancer stand beside its `kind`")
    per_task = parts.get("per_task", False)
    if not isinstance(per_task, bool):
        raise UserError(f"is {json.dumps(per_task)}: it must be true or false", f"{where}.per_task")
    changes = _changes(parts, folder, where)
    if "balancer" not in parts:
        # What the experiment leaves open stays open: a balancer that draws random numbers gets the seed of each run.
        return Method(None if per_task else base.balancer.model_dump(exclude_unset=True), changes)
    balancer = parts["balancer"]
    if per_task:
        raise UserError("a model per task has nothing to balance", f"{where}.balancer", "remove balancer, or per_task")
    if not isinstance(balancer, dict) or "kind" not in balancer:
        raise UserError("must be an object with `kind`, as a config's `balancer`", f"{where}.balancer")
    return Method(balancer, changes)


def _changes(parts: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if "adapter" in parts:
        adapter = changes["adapter"] = parts["adapter"]
        if isinstance(adapter, dict) and isinstance(adapter.get("initial_adapter"), str):
            changes["adapter"] = adapter | {"initial_adapter": os.path.normpath(folder / Path(adapter["initial_adapter"]).expanduser())}
    if "training" in parts:
        training = parts["training"]
        if not isinstance(training, dict) or list(training) != ["learning_rate"]:
            what = f"is {json.dumps(training)}; it may hold a learning_rate and nothing else, or methods would not train on equal data"
            raise UserError(what, f"{where}.training", "what all methods share belongs in the experiment")
        changes["training"] = training
    if "data_order_seed" in parts:
        changes["data_order_seed"] = parts["data_order_seed"]
    return changes


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name come twice; the second would silently win."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice")
    return dict(pairs)
