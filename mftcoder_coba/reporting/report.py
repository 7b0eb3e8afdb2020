"""`report/report.html`: one self-contained page about a run, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from mftcoder_coba.reporting.data_tables import data_tables
from mftcoder_coba.reporting.figures import CHARTS, DPI, style_of
from mftcoder_coba.reporting.records import Run, read_run
from mftcoder_coba.reporting.summary import best_step, sentences, task_summaries

# The page lists so many single events; all of them are in metrics.jsonl.
EVENTS_SHOWN = 300


def build_report(run_dir: Path) -> Path:
    """Writes `report/report.html` and one PNG per figure into a run folder; what the run has not recorded is left out.

    Returns:
        the path of the page. It needs no network, no script and no other file.

    Raises:
        UserError: `run_dir` is no run folder, or one of its files is broken.
    """
    run = read_run(run_dir)
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    html = (
        _environment()
        .get_template("page.html")
        .render(
            run=run,
            sentences=sentences(run),
            best=best_step(run),
            rows=task_summaries(run),
            style=lambda task: style_of(run.tasks, task),
            charts=_draw(run, folder),
            events=_events(run),
            data_tables=data_tables(run.accounting),
            config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
            settings=_flat(run.environment),
        )
    )
    page = folder / "report.html"
    draft = page.with_name(page.name + ".tmp")
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, page)
    return page


def _draw(run: Run, folder: Path) -> list[dict[str, str]]:
    """Draws what there is to show. Each figure comes in two widths; the wide one is also the file."""
    drawn = []
    for chart in CHARTS:
        figure, file = chart.draw(run), folder / f"{chart.name}.png"
        if figure is None:
            file.unlink(missing_ok=True)  # of an earlier run in this folder
            continue
        wide = _png(figure)
        file.write_bytes(wide)
        narrow = _png(chart.draw(run, narrow=True))
        drawn.append({"name": chart.name, "title": chart.title, "caption": chart.caption, "wide": _data_uri(wide), "narrow": _data_uri(narrow)})
    return drawn


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _events(run: Run) -> dict[str, Any]:
    """All names with count, first and last step, and the events one by one."""
    names: dict[str, dict[str, Any]] = {}
    singles = []
    for event in run.metrics.events:
        name = str(event.get("name", ""))
        entry = names.setdefault(name, {"name": name, "count": 0, "first": event["step"]})
        entry.update(count=entry["count"] + 1, last=event["step"])
        details = [str(event["why"])] if event.get("why") else []
        details += [f"{key}: {_plain(value)}" for key, value in event.items() if key not in ("kind", "step", "name", "why")]
        singles.append({"step": event["step"], "name": name, "details": "; ".join(details)})
    return {"names": list(names.values()), "singles": singles[:EVENTS_SHOWN], "hidden": max(len(singles) - EVENTS_SHOWN, 0)}


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested objects under their joined names."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix} {key}".strip()
        leaves.extend(_flat(value, name) if isinstance(value, dict) else [(name, value)])
    return leaves


def _plain(value: Any) -> str:
    """A value of a JSON file as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "–"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _fixed(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(plain=_plain, fixed=_fixed)
    return environment
