"""Which balancer, which adapter is best on these tasks, and why? Ordinary runs that differ in these alone, and tables of what they came to.

methods   names and plan file -> methods: what each changes in the experiment
runs      pure: base config, methods, seeds -> configs and steps of all runs
folder    what the comparison was made from, so that nothing else gets into its tables
running   runs as subprocesses of `train`; which are finished
results   run folders -> numbers        tables, layouts    numbers -> means over seeds, marked
curves    run folders -> curves         figures   curves -> figures        showing   files and page
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mftcoder_coba.comparing.folder import claim, lock
from mftcoder_coba.comparing.methods import SINGLE_TASK, Method, Methods, built_in, choose_methods
from mftcoder_coba.comparing.results import Outcome, Value, values_of
from mftcoder_coba.comparing.running import command_of, drop_models, is_finished, last_recorded_step, run_to_end
from mftcoder_coba.comparing.runs import PlannedRun, check_methods, plan_runs
from mftcoder_coba.comparing.showing import Comparison, write_page, write_tables
from mftcoder_coba.comparing.tables import build_tables
from mftcoder_coba.config import Config, load_config
from mftcoder_coba.data import prepare
from mftcoder_coba.errors import RunFailure, UserError

__all__ = [
    "SINGLE_TASK",
    "Method",
    "Methods",
    "Outcome",
    "PlannedRun",
    "Value",
    "build_tables",
    "built_in",
    "check_all_finished",
    "choose_methods",
    "compare",
    "plan_runs",
    "trained",
    "values_of",
]


def compare(
    config: Path,
    out: Path,
    methods: Sequence[str] = (),
    plan: Path | None = None,
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    launcher: str = "",
    keep_models: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains every method with every seed, one run after another, and writes tables, figures and a page.

    What is finished is not run again; a run that was killed goes on from its last checkpoint; one that fails does not stop the others.
    Tables are written anew after each run, figures and the page at the end.

    Args:
        config: the experiment; its seed and its patience are replaced in every run, and what the method changes.
        out: the folder of the comparison.
        methods: built-in names, see `methods.built_in`; with neither these nor a plan, all of them.
        plan: a JSON file of methods with settings, see `methods.choose_methods`.
        seeds: none: that of the experiment.
        overrides: `a.b=value`, as for `train`.
        launcher: what starts the runs on several processes, such as "deepspeed --num_gpus 2"; "": one process.
        keep_models: keep `export/`, the best model, in each run folder. Checkpoints of finished runs always go.
        say: takes each line that tells how it goes.

    Returns:
        the path of the page.

    Raises:
        UserError: what the user gave is wrong; nothing was run.
        RunFailure: some run did not finish; all that there is was written.
    """
    base = load_config(config, overrides)
    with trained(config, base, choose_methods(base, methods, plan), seeds, out, launcher, keep_models, say) as (comparison, finished):
        page = write_page(comparison, finished)
    for name in ("compare.md", "compare.csv", "figures", page.name):
        say(f"written: {comparison.out / name}")
    check_all_finished(comparison)
    return page


@contextmanager
def trained(
    config: Path, base: Config, methods: Methods, seeds: Sequence[int], out: Path, launcher: str, keep_models: bool, say: Callable[[str], None]
) -> Iterator[tuple[Comparison, list[PlannedRun]]]:
    """Trains every method with every seed as `compare` does, and writes its tables. The folder stays locked for the block.

    Args:
        config: the file that `base` was read from, for people.

    Yields:
        what was asked for, with the runs that failed; and the finished runs.

    Raises:
        UserError: see `compare`.
    """
    out = out.absolute()
    check_methods(base, methods)
    _check_seeds(seeds)
    command_of(launcher, config)
    corpus = prepare(base.data, base.model.path, base.model.trust_remote_code)
    runs = plan_runs(base, methods, list(dict.fromkeys(seeds)) or [base.run.seed], out, corpus, alone=not launcher)
    with lock(out):
        claim(out, base, methods, launcher, corpus, runs)
        comparison = Comparison(out, str(config), base.model_dump(), methods, corpus.tasks, runs, {})
        yield comparison, _run_all(comparison, launcher, keep_models, say)


def check_all_finished(comparison: Comparison) -> None:
    """Raises RunFailure where some run did not finish."""
    if comparison.failed:
        names = ", ".join(comparison.failed)
        raise RunFailure(
            f"{len(comparison.failed)} of {len(comparison.runs)} runs did not finish: {names}. The tables leave them out. What they said is in "
            f"{comparison.out / 'logs'}; the same command tries them again."
        )


def _check_seeds(seeds: Sequence[int]) -> None:
    wrong = [seed for seed in seeds if not 0 <= seed < 2**32]
    if wrong:
        raise UserError(f"a seed is 0 or more and below 2^32; found {wrong[0]}", "--seeds")


def _run_all(comparison: Comparison, launcher: str, keep_models: bool, say: Callable[[str], None]) -> list[PlannedRun]:
    """The runs that are finished at the end; what went wrong with the others is put into `comparison.failed`."""
    finished: list[PlannedRun] = []
    for number, run in enumerate(comparison.runs, start=1):
        head = f"run {number}/{len(comparison.runs)} {run.name}"
        try:
            problem = _run_one(comparison.out, run, launcher, keep_models, head, say)
        except UserError as error:  # a file in its folder is broken
            problem = str(error)
        if problem:
            comparison.failed[run.name] = problem
            say(f"{head}: FAILED: {problem}")
            continue
        finished.append(run)
        write_tables(comparison, finished)
    return finished


def _run_one(out: Path, run: PlannedRun, launcher: str, keep_models: bool, head: str, say: Callable[[str], None]) -> str:
    """What went wrong, or ""."""
    if is_finished(run.folder, run.total_steps):
        say(f"{head}: finished before")
        drop_models(run, keep_export=True)  # a model that an earlier call kept stays
        return ""
    log, step = out / "logs" / f"{run.name}.log", last_recorded_step(run.folder)
    say(f"{head}: {run.total_steps} steps" + (f", goes on; it stopped at step {step}" if step else "") + f"; log: {log}")
    started = time.monotonic()
    problem = run_to_end(run, command_of(launcher, out / "configs" / f"{run.name}.json"), log)
    if not problem:
        drop_models(run, keep_models)
        say(f"{head}: done in {time.monotonic() - started:.0f} s")
    return problem
