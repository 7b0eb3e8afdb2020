"""A config of ours from an MFTCoder experiment: its training config (mftcoder_accelerate) and its data folders.

    python -m data_tools.convert_mftcoder --config lora_train_config.json --out configs/mine.json \
        --data_paths "[/data/code,/data/math]" --pretrained_model_path /models/base --output_dir /runs/mine

Values such as "$DATA_PATHS" are taken from the option of the key or from the environment. What is trained differently here, and
what has no counterpart, is listed. A folder whose lines are of several formats is written again beside the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.common import run
from data_tools.mftcoder_data import Task, find_tasks, write_mixed
from data_tools.mftcoder_experiment import experiment, refuse_impossible
from data_tools.mftcoder_keys import DEFAULTS, DIFFERENT, HARMLESS, LAUNCHER, OTHER_TYPES, known_keys, sentence
from mftcoder_coba.config import load_config
from mftcoder_coba.errors import UserError, suggestion

# The keys that MFTCoder's own command line can replace, and which of them a conversion cannot do without.
OPTIONS = ("data_paths", "pretrained_model_path", "output_dir", "tb_dir", "model_type")
NEEDED = ("data_paths", "pretrained_model_path")
PLACEHOLDER = re.compile(r"\$\{?(\w+)\}?")
WIDEST_LINE = 140
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "an object", type(None): "null"}


@dataclass
class Conversion:
    tree: dict[str, Any]
    tasks: list[Task]
    notes: list[str]
    different: list[tuple[str, Any, str]]
    harmless: list[tuple[str, Any, str]]


def read_config(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The experiment's keys, with `options` over them and without placeholders.

    Raises:
        UserError: no JSON object, an unknown key, a value of another type, or a value that is given nowhere.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}", str(path)) from None
    if not isinstance(given, dict):
        raise UserError("must be a JSON object { ... }", str(path))
    unknown = [key for key in given if key not in known_keys()]
    if unknown:
        lines = "\n".join(f"unknown key {key}: {suggestion(key, known_keys())}" for key in unknown)
        raise UserError(lines, str(path), "MFTCoder itself takes no such key: correct or remove it")
    given |= {key: value for key, value in options.items() if value is not None}
    for key in given:
        _check_type(key, given[key], path)
    return _without_placeholders(given, path)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _check_type(key: str, value: Any, path: Path) -> None:
    if key in DEFAULTS:
        allowed = (type(DEFAULTS[key]), *OTHER_TYPES.get(key, ()))
    elif key in OPTIONS:
        allowed = (str, type(None), *OTHER_TYPES.get(key, ()))
    else:
        return
    if type(value) is int and float in allowed:
        return
    if type(value) not in allowed or (type(value) is float and not math.isfinite(value)):
        kinds = " or ".join(TYPE_NAMES[kind] for kind in allowed if not (kind is int and float in allowed))
        raise UserError(f"{key} is {json.dumps(value)[:60]}, not {kinds}", str(path))


def _without_placeholders(given: dict[str, Any], path: Path) -> dict[str, Any]:
    missing = {key: "" for key in NEEDED if not given.get(key)}
    settings = dict(given)
    for key in OPTIONS:
        value = given.get(key)
        if not isinstance(value, str):
            continue
        unset = [name for name in PLACEHOLDER.findall(value) if not os.environ.get(name)]
        if not unset:
            settings[key] = PLACEHOLDER.sub(lambda match: os.environ[match[1]], value)
        elif key in NEEDED:
            missing[key] = value
        else:
            del settings[key]
    if missing:
        found = ", ".join(f"{key} ({value or 'missing'})" for key, value in missing.items())
        raise UserError(f"no value for {found}", str(path), f"give {' and '.join('--' + key for key in missing)}, or set these environment variables")
    return settings


def convert(path: Path, options: dict[str, Any], out: Path, gpus: int = 8, zero_stage: int = 2) -> Conversion:
    """The experiment in our terms. Reads all data, writes nothing.

    Args:
        path: MFTCoder's JSON.
        options: what MFTCoder would take on its command line, by key.
        out: where the result will be.
        gpus: processes of MFTCoder's launcher.

    Raises:
        UserError: something that has no counterpart here and cannot be left out, or that is wrong already.
    """
    given = read_config(path, options)
    settings = DEFAULTS | given
    refuse_impossible(settings, path)
    notes: list[str] = []
    tasks = find_tasks(settings["data_paths"], mixed_folder(out), notes)
    tree = experiment(settings, tasks, out.stem, gpus, notes, path) | {"deepspeed": {"zero_optimization": {"stage": zero_stage}}}
    # What concerns CoBa alone is no difference to the other modes.
    relevant = [key for key in DIFFERENT if key in settings and (settings["weighted_loss_mode"] == "coba" or not key.startswith("coba_"))]
    different = [(key, settings[key], text) for key in relevant if (text := sentence(DIFFERENT, key, settings[key]))]
    harmless = [(key, given[key], text) for key in HARMLESS if key in given and (text := sentence(HARMLESS, key, given[key]))]
    return Conversion(tree, tasks, notes, different, harmless)


def mixed_folder(out: Path) -> Path:
    """Where the data of tasks of several formats is written."""
    return out.with_name(out.stem + "_data")


def pretty(value: Any, indent: int = 0) -> str:
    """JSON with every object or list on one line that fits there; the outermost never."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or (indent and indent + len(line) <= WIDEST_LINE):
        return line
    inner = " " * (indent + 2)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {pretty(part, indent + 2)}" for key, part in value.items()]
    else:
        parts = [pretty(part, indent + 2) for part in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{' ' * indent}{closing}"


def publish(conversion: Conversion, out: Path, source: Path, force: bool) -> None:
    """Writes the config, and before it the data of tasks of several formats, unless the config does not load.

    Raises:
        UserError: the config does not load, something else is in its place, or a line cannot be read.
    """
    text = pretty(conversion.tree) + "\n"
    if out.is_dir():
        raise UserError("is a folder", str(out), "name the file to write as --out")
    if out.exists() and not force and out.read_bytes() != text.encode():
        raise UserError("there is another file here; it is not overwritten", str(out), "choose another --out, or give --force")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{out.stem}.", suffix=".json", dir=out.parent)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", str(out)) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        try:
            load_config(aside)
        except UserError as error:
            raise UserError(error.what, f"{source}, in our terms", error.fix) from None
        write_mixed(conversion.tasks, mixed_folder(out))
        os.replace(aside, out)
    finally:
        Path(aside).unlink(missing_ok=True)


def show(conversion: Conversion, out: Path, gpus: int, zero_stage: int) -> None:
    """Prints the tasks, the notes and what is not as it was."""
    console = Console(highlight=False, soft_wrap=False)
    table = Table(box=box.SIMPLE_HEAD, title="Tasks", title_justify="left")
    for name, side in {"task": "left", "lines": "right", "format": "left", "data": "left"}.items():
        table.add_column(name, justify=side, overflow="fold")
    for task in conversion.tasks:
        table.add_row(Text(task.name), f"{sum(task.formats.values()):,}", task.format, Text(task.train))
    console.print(table)
    for note in conversion.notes:
        console.print(Text(f"note: {note}"))
    for title, rows in {"Converted, but not the same": conversion.different, "Without a counterpart, harmless": conversion.harmless}.items():
        if rows:
            table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
            for name in ("key", "value", "what becomes of it"):
                table.add_column(name, overflow="fold", max_width=24 if name == "value" else None)
            for key, value, text in rows:
                table.add_row(key, Text(json.dumps(value, ensure_ascii=False)), Text(text))
            console.print(table)
    console.print(Text(LAUNCHER.format(gpus=gpus, stage=zero_stage)))
    console.print(Text(f"config: {out}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_tools.convert_mftcoder", description="Take over an MFTCoder experiment.")
    parser.add_argument("--config", type=Path, required=True, help="MFTCoder's training config, a JSON file")
    parser.add_argument("--out", type=Path, required=True, help="the config to write")
    for key in OPTIONS:
        parser.add_argument(f"--{key}", help="as on MFTCoder's command line: replaces the key of the config")
    parser.add_argument("--micro_batch_size", type=int, help="replaces both batch sizes per device, as on MFTCoder's command line")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="processes of MFTCoder's launcher (default: %(default)s)")
    parser.add_argument("--zero-stage", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage of MFTCoder's launcher (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite another file")
    arguments = parser.parse_args()
    for name, value in {"--gpus": arguments.gpus, "--micro_batch_size": arguments.micro_batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{value} is not a positive number", name)
    options = {key: getattr(arguments, key) for key in OPTIONS}
    options |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), arguments.micro_batch_size)
    out = arguments.out.expanduser().absolute()
    conversion = convert(arguments.config, options, out, arguments.gpus, arguments.zero_stage)
    publish(conversion, out, arguments.config, arguments.force)
    show(conversion, out, arguments.gpus, arguments.zero_stage)


if __name__ == "__main__":
    run(main)
