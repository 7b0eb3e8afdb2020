"""Self-contained HTML pages: templates that extend `base.html`, pictures inside, written whole or not at all."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def write_page(file: Path, template: Path, filters: dict[str, Callable[..., Any]] | None = None, **values: Any) -> Path:
    """Renders `template` with `values` into `file`, which is returned. It may extend or import the templates in this folder."""
    folders = [template.parent, Path(__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters or {})
    write_text(file, environment.get_template(template.name).render(values))
    return file


def write_text(file: Path, text: str) -> None:
    """Replaces a file by one rename: nobody sees half of it."""
    aside = file.with_name(f".{file.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)


def png_uri(content: bytes | memoryview) -> str:
    """A PNG file's bytes as the address of an image in a page."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
