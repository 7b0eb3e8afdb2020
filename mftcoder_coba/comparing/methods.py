"""What is compared: names of methods -> `balancer` sections of a config."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mftcoder_coba.config import BALANCERS
from mftcoder_coba.errors import UserError, suggestion

SINGLE_TASK = "single_task"
# None stands for `single_task`: no balancer, a model of its own for each task.
Methods = dict[str, dict[str, Any] | None]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\*?")
_EXAMPLE = '{"coba": "coba", "coba-tau2": {"kind": "coba", "tau": 2.0}, "STL": "single_task"}'


def built_in() -> Methods:
    """Every balancer that needs no settings, with its defaults; with a star, the form that looks at validation losses; and `single_task`."""
    found: Methods = {}
    for kind, section in BALANCERS.items():
        fields = section.model_fields
        if any(field.is_required() for name, field in fields.items() if name != "kind"):
            continue
        found[kind] = {"kind": kind}
        if "signal" in fields:
            found[f"{kind}*"] = {"kind": kind, "signal": "validation"}
    return found | {SINGLE_TASK: None}


def choose_methods(names: Sequence[str], plan: Path | None) -> Methods:
    """The methods of a comparison, in the order given: those of the plan file, then those named.

    Args:
        names: built-in names.
        plan: a JSON file, name -> `balancer` section of a config, or a built-in name.

    Returns:
        name -> section, not yet validated; all built-in methods where nothing is given.

    Raises:
        UserError: an unknown name, a name given twice for different things, a broken file.
    """
    chosen: Methods = {} if plan is None else _read_plan(plan)
    for name in names:
        section = _built_in(name, f"--methods {name}")
        if name in chosen and chosen[name] != section:
            raise UserError(f"{name} stands for two methods", f"--methods {name}", f"it is another one in {plan}: rename it there")
        chosen[name] = section
    return chosen or built_in()


def folder_name(method: str) -> str:
    """A method's name as part of a folder's name: a star means something to shells."""
    return method.replace("*", "-star")


def _built_in(name: str, where: str) -> dict[str, Any] | None:
    known = built_in()
    if name not in known:
        what = "needs settings of its own" if name == "fixed" else f"is no method that is known by its name; {suggestion(name, known)}"
        raise UserError(what, where, "other settings have a place in a --plan file")
    return known[name]


def _read_plan(path: Path) -> Methods:
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
        if not isinstance(value, dict | str) or isinstance(value, dict) and "kind" not in value:
            raise UserError("must be an object with `kind`, as a config's `balancer`, or a built-in name", where, f"for example {_EXAMPLE}")
        methods[name] = value if isinstance(value, dict) else _built_in(value, where)
    return methods


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name come twice; the second would silently win."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice")
    return dict(pairs)
