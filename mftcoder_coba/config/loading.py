"""JSON files -> a validated `Config`: `extends`, relative paths, `--set`, and errors that help."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mftcoder_coba.config.adapters import ADAPTERS
from mftcoder_coba.config.balancers import BALANCERS
from mftcoder_coba.config.schema import Config
from mftcoder_coba.errors import UserError, suggestion


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads an experiment.

    Args:
        path: the experiment's JSON file. Paths inside a file are relative to that file.
        overrides: `a.b=value` each; the value is JSON, or else taken as a string. Paths in them are relative to the
            current folder.

    Raises:
        UserError: a missing or broken file, an unknown key, a wrong type or value.
    """
    path = Path(path)
    tree = _load_layer(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    # What the overrides name is relative to the current folder, and so is the default; everything from files is absolute by now.
    if isinstance(tree.get("run"), dict):
        tree["run"].setdefault("dir", "runs")
    tree = _absolute_paths(tree, Path.cwd(), "--set")
    return validate(tree, str(path))


def validate(tree: dict[str, Any], source: str) -> Config:
    """A plain tree -> `Config`; `source` is named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, source) from None


def _load_layer(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise UserError('"extends" goes in a circle', " -> ".join(map(str, (*seen, path))))
    tree = _absolute_paths(_read_json(path), path.parent, str(path))
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError('"extends" must be the path of one JSON file', str(path))
    return merged(_load_layer(path.parent / base, (*seen, path)), tree)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", str(path)) from None
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg}", f"{path}:{error.lineno}, column {error.colno}") from None
    if not isinstance(tree, dict):
        raise UserError("must be a JSON object { ... }", str(path))
    return tree


# Objects that say something only as a whole.
WHOLE = {"clusters"}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, key by key. An object with another `kind` replaces the base's object whole: its keys mean something else;
    so does one of `WHOLE`."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = key not in WHOLE and isinstance(old, dict) and isinstance(value, dict)
        if both and value.get("kind", old.get("kind")) == old.get("kind"):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _absolute_paths(tree: dict[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """The tree with every path made absolute; a DeepSpeed file is read in its place."""

    def absolute(value: Any) -> Any:
        return os.path.normpath(folder.absolute() / Path(value).expanduser()) if isinstance(value, str) and value else value

    tree = dict(tree)
    for section, keys in {"run": ["dir"], "adapter": ["initial_adapter"], "data": ["cache_dir"], "checkpoint": ["resume"]}.items():
        if isinstance(tree.get(section), dict):
            tree[section] = dict(tree[section])
            for key in keys:
                if key in tree[section] and tree[section][key] not in ("auto", "never"):
                    tree[section][key] = absolute(tree[section][key])
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        name = model["path"]
        # A hub id looks like a relative path; it is one only if it says so or such a folder is there.
        if name.startswith((".", "/", "~")) or (folder / name).exists():
            tree["model"] = {**model, "path": absolute(name)}
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("tasks"), list):
        data["tasks"] = [
            {
                key: [absolute(v) for v in value] if key in ("train", "valid", "test") and isinstance(value, list) else value
                for key, value in task.items()
            }
            if isinstance(task, dict)
            else task
            for task in data["tasks"]
        ]
    if isinstance(tree.get("deepspeed"), str):
        file = Path(absolute(tree["deepspeed"]))
        if not file.is_file():
            raise UserError("no such DeepSpeed file", f"{source}: deepspeed = {tree['deepspeed']!r}", f"looked for {file}")
        tree["deepspeed"] = _read_json(file)
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError("must have the form a.b=value", f"--set {override}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    node: Any = tree
    for position, key in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, key, override)
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise UserError(f"{'.'.join(parents[:position])} has no parts", f"--set {override}")
    if isinstance(node, list):
        index = node.index(_item(node, last, override))
        node[index] = value
    elif isinstance(node, dict):
        # Another kind means other keys: those of the old kind go.
        if last == "kind" and node.get("kind") != value:
            node.clear()
        node[last] = value
    else:
        raise UserError(f"{'.'.join(parents)} has no parts", f"--set {override}")


def _item(items: list[Any], key: str, override: str) -> Any:
    """An item of a list by its number or by its `name`."""
    if key.isdigit() and int(key) < len(items):
        return items[int(key)]
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if key in names:
        return items[names.index(key)]
    raise UserError(f"no item {key!r}; there are {len(items)}: {', '.join(map(str, names))}", f"--set {override}")


def _explain(error: ValidationError, source: str) -> UserError:
    """pydantic's findings -> one message in the user's terms. All findings are listed, the first one first."""
    lines = []
    for finding in _relevant(error.errors()):
        # A union's branch adds its own name to the location; users know only their keys.
        location = [part for part in finding["loc"] if not _is_branch(part)]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or "the config"
        match finding["type"]:
            case "extra_forbidden":
                known = _fields_at(location[:-1], finding["loc"])
                lines.append(f"unknown key {path}: {suggestion(str(location[-1]), known)}")
            case "missing":
                lines.append(f"{path} is missing")
            case "union_tag_invalid":
                context = finding["ctx"]
                kinds = [name.strip().strip("'") for name in str(context["expected_tags"]).split(",")]
                lines.append(f'{path}.kind is "{context["tag"]}": {suggestion(str(context["tag"]), kinds)}')
            case "union_tag_not_found":
                lines.append(f"{path}.kind is missing")
            case "value_error":
                lines.append(f"{path}: {finding['ctx']['error']}")
            case "literal_error" if isinstance(finding["input"], str):
                allowed = [name.strip("' ") for name in finding["ctx"]["expected"].replace(" or ", ", ").split(",")]
                lines.append(f'{path} is "{finding["input"]}": {suggestion(finding["input"], allowed)}')
            case _:
                lines.append(f"{path} is {_short(finding['input'])}: {finding['msg'][0].lower()}{finding['msg'][1:]}")
    return UserError("\n".join(dict.fromkeys(lines)), source)


def _relevant(findings: list[Any]) -> list[Any]:
    """Without the branches of a union that the user did not mean: words where no word was given, or the other way round."""

    def meant(finding: Any) -> bool:
        is_word = isinstance(finding["input"], str)
        others = [other for other in findings if other is not finding and other["loc"][: len(finding["loc"]) - 1] == finding["loc"][:-1]]
        if not others or finding["type"] not in ("literal_error", "model_type", "float_type", "int_type", "dict_type"):
            return True
        return is_word == (finding["type"] == "literal_error")

    return [finding for finding in findings if meant(finding)]


# Names that pydantic adds to a location for the branch of a union that it tried.
_BRANCHES = {
    *ADAPTERS,
    *BALANCERS,
    "MarkersConfig",
    "bool",
    "int",
    "float",
    "str",
    "nullable",
    "constrained-int",
    "constrained-float",
    "literal['auto']",
    "list[str]",
}


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (part in _BRANCHES or "[" in part)


def _fields_at(location: list[Any], raw: tuple[Any, ...]) -> list[str]:
    """Names of the keys allowed at a place of the config."""
    models: list[type[BaseModel]] = [Config]
    for part in location:
        if isinstance(part, int):
            continue
        models = [inner for model in models if part in model.model_fields for inner in _models_in(model.model_fields[part].annotation)]
    kinds = [m for m in models if "kind" in m.model_fields and set(get_args(m.model_fields["kind"].annotation)) & set(map(str, raw))]
    return [name for model in (kinds or models) for name in model.model_fields] + (["extends"] if not location else [])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
