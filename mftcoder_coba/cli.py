"""The command line: it parses, calls, and turns errors into messages and exit codes (0 success, 2 the user's mistake, 1 a failure)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mftcoder_coba.errors import RunFailure, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune one large language model on many tasks, so that all converge together.",
)

ConfigFile = Annotated[Path, typer.Option("--config", help="the experiment's JSON file")]
Overrides = Annotated[list[str], typer.Option("--set", help="override a key, e.g. training.learning_rate=1e-5; may be repeated")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 typer reads it, nobody changes it
) -> None:
    """Train; start it with the deepspeed launcher for several processes."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mftcoder_coba.training import train as run_training

    run_dir = run_training(loaded, sys.argv)
    if run_dir:
        from mftcoder_coba.reporting import print_final_table
        from mftcoder_coba.reporting.report import build_report

        page = build_report(run_dir)
        print_final_table(run_dir, {"adapter" if loaded.adapter else "model": run_dir / "export", "report": page})


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Read and tokenise the data into the cache, and show what becomes of every sample."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    from mftcoder_coba import data

    corpus = data.prepare(loaded.data, loaded.model.path, loaded.model.trust_remote_code)
    for splits in corpus.accounting.values():
        for part in splits.values():
            print("\n".join(part.lines()))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run folder, e.g. runs/demo")]) -> None:
    """Build report/report.html and its figures from a run folder."""
    from mftcoder_coba.reporting.report import build_report

    print(build_report(run))


def main() -> None:
    """Runs a command. All ranks of a run meet the same mistake; one of them tells it."""
    # The deepspeed launcher puts this before the command's name; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    try:
        app(args=arguments)
    except (UserError, RunFailure) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
