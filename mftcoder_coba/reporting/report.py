"""`report.html`: one self-contained page about a run, or about several side by side, and its figures as PNG files beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mftcoder_coba.errors import UserError
from mftcoder_coba.reporting import comparison_figures, run_figures
from mftcoder_coba.reporting.comparison import ABSENT, Comparison, compare, flat
from mftcoder_coba.reporting.comparison import sentences as comparison_sentences
from mftcoder_coba.reporting.data_tables import DataTable, data_tables
from mftcoder_coba.reporting.figures import Chart, png, style_of
from mftcoder_coba.reporting.pages import png_uri, write_page
from mftcoder_coba.reporting.records import RESTORE, Run, read_run
from mftcoder_coba.reporting.summary import best_step, sentences, task_summaries

# The page lists so many single events of a run; all of them are in its metrics.jsonl.
EVENTS_SHOWN = 300


def build_report(*run_dirs: Path, out: Path | None = None) -> Path:
    """Writes `report.html` and one PNG per figure; what a run has not recorded is left out. Files of an earlier report go.

    Args:
        run_dirs: one run folder or more. Several are compared at the top of the page, and each has a section of its own.
        out: the folder to write to; None: `report/` in the run folder, if it is only one.

    Returns:
        the path of the page. It needs no network, no script and no other file.

    Raises:
        UserError: a folder is no run folder or is given twice, a file of it is broken, or there is nowhere to write to.
    """
    if out is None and len(run_dirs) != 1:
        raise UserError("a report of several runs needs a folder of its own", "--out", "name one, such as --out runs/comparison")
    runs = [read_run(folder) for folder in run_dirs]
    folder = out if out is not None else run_dirs[0] / "report"
    comparison = compare(runs)
    sections = [_section(run, label, comparison.tasks) for run, label in zip(runs, comparison.labels, strict=True)]
    _make_folder(folder)
    for number, section in enumerate(sections, start=1):
        suffix = f"-{number:02}-{section['run'].folder.resolve().name}" if len(runs) > 1 else ""
        section["charts"] = _draw(run_figures.CHARTS, section["run"], folder, suffix, order=comparison.tasks)
    compared = _compared(comparison, folder) if len(runs) > 1 else None
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    filters = {"plain": _plain, "fixed": _fixed, "setting": _setting, "lowest": _lowest}
    return write_page(folder / "report.html", Path(__file__).with_name("page.html"), filters, title=title, compared=compared, sections=sections)


def _make_folder(folder: Path) -> None:
    """Makes the folder, and removes the figures of an earlier report from it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of the report cannot be made: {error.strerror}", str(folder), "choose another with --out") from None
    if not (folder / "report.html").exists():
        return  # what lies here is not ours
    for chart in (*comparison_figures.CHARTS, *run_figures.CHARTS):
        for file in (folder / f"{chart.name}.png", *folder.glob(f"{chart.name}-[0-9][0-9]-*.png")):
            file.unlink(missing_ok=True)


def _section(run: Run, label: str, order: Sequence[str]) -> dict[str, Any]:
    """What the page shows of one run, but for its figures."""
    return {
        "run": run,
        "label": label,
        "sentences": sentences(run),
        "best": best_step(run),
        "rows": task_summaries(run),
        "styles": {task: style_of(order, task) for task in run.tasks},
        "events": _events(run),
        "data_tables": _data_tables(run),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
        "settings": [(name.replace(".", " "), value) for name, value in flat(run.environment).items()],
    }


def _compared(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """What the page shows of all runs together."""
    rows = comparison.rows()
    measures = {"loss": "loss_best", "ratio": "ratio", "perplexity": "perplexity"}
    return {
        "sentences": comparison_sentences(comparison),
        "rows": rows,
        "styles": {label: style_of(comparison.labels, label) for label in comparison.labels},
        "tasks": comparison.tasks,
        "common": comparison.common_tasks,
        # measure -> task -> a value for each run, NaN where a run does not have the task
        "values": {
            name: {task: [getattr(row.tasks[task], field) if task in row.tasks else math.nan for row in rows] for task in comparison.tasks}
            for name, field in measures.items()
        },
        "differences": comparison.differences(),
        "charts": _draw(comparison_figures.CHARTS, comparison, folder),
    }


def _draw(charts: Sequence[Chart], subject: Run | Comparison, folder: Path, suffix: str = "", **options: Any) -> list[dict[str, str]]:
    """Draws what there is to show. Each figure comes in two widths; the wide one is also the file."""
    drawn = []
    for chart in charts:
        figure = chart.draw(subject, **options)
        if figure is None:
            continue
        wide = png(figure)
        (folder / f"{chart.name}{suffix}.png").write_bytes(wide)
        narrow = png(chart.draw(subject, narrow=True, **options))
        drawn.append({"name": chart.name, "title": chart.title, "caption": chart.caption, "wide": png_uri(wide), "narrow": png_uri(narrow)})
    return drawn


def _data_tables(run: Run) -> list[DataTable]:
    try:
        return data_tables(run.accounting)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"is not the accounting that a run writes ({type(error).__name__}: {error})"
        raise UserError(what, str(run.folder / "accounting.json"), RESTORE) from error


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


def _setting(value: Any) -> str:
    """A value of a config as it stands there, for it is to be compared, or typed again."""
    if value is ABSENT:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fixed(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _lowest(values: Sequence[float]) -> float | None:
    """The lowest of several; None where there are not two to compare."""
    finite = [value for value in values if math.isfinite(value)]
    return min(finite) if len(finite) > 1 else None
