"""The command line: it parses, calls, and turns errors into messages and exit codes: 0 success, 2 the user's mistake,
75 a run that stopped on a signal, 1 a failure."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mftcoder_coba.caches import cache_folder, keep_libraries_in
from mftcoder_coba.errors import Interrupted, RunFailure, UserError
from mftcoder_coba.merging import METHODS as MERGING_METHODS

if TYPE_CHECKING:
    from mftcoder_coba.config import Config
    from mftcoder_coba.data import Corpus, TrainSchedule

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
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="go on from a checkpoint although the config now makes another run of it")
    ] = False,
) -> None:
    """Train, or go on; start it with the deepspeed launcher for several processes."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mftcoder_coba.training import train as run_training

    run_dir = run_training(loaded, sys.argv, allow_config_change)
    if run_dir:
        from mftcoder_coba.reporting import print_final_table
        from mftcoder_coba.reporting.report import build_report

        # Without any finite validation there is no best model.
        written = {"adapter" if loaded.adapter else "model": run_dir / "export"} if (run_dir / "export").is_dir() else {}
        try:
            written["report"] = build_report(run_dir)
        except OSError as error:
            print(f"warning: the report could not be written ({error}); later: python -m mftcoder_coba report {run_dir}", file=sys.stderr)
        print_final_table(run_dir, written)


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Read and tokenise the data into the cache, and show what becomes of every sample."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    _prepared(loaded)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    gpus: Annotated[int, typer.Option(min=1, help="processes of the run")] = 1,
) -> None:
    """Show the mixture of the tasks, the steps and the balancer's numbers of a run before it starts."""
    from mftcoder_coba.config import load_config

    loaded = load_config(config, overrides)
    keep_libraries_in(cache_folder(loaded.data.cache_dir))
    from mftcoder_coba import planning
    from mftcoder_coba.balancing import resolve

    planning.accumulation_steps(loaded, gpus)  # what is wrong without data is told before it is read
    corpus, schedule = _prepared(loaded)
    rows = gpus * loaded.validation.balancer_rows_per_rank
    stream = planning.balancer_stream(loaded, corpus.splits["valid"], rows)
    resolved = loaded.model_copy(update={"balancer": resolve(loaded.balancer, stream.coverage if stream else 0)})
    print("\n".join(planning.step_lines(resolved, planning.plan_steps(loaded, schedule, gpus), stream, rows)))


def _prepared(config: Config) -> tuple[Corpus, TrainSchedule]:
    """The tokenised data and its order, after telling about both."""
    from mftcoder_coba import data, planning
    from mftcoder_coba.reporting.data_tables import print_data

    corpus = data.prepare(config.data, config.model.path, config.model.trust_remote_code)
    schedule = planning.training_schedule(config, corpus.splits["train"])
    print_data(planning.accounting(config, corpus, schedule))
    return corpus, schedule


@app.command()
def replay(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CSV", help="a run folder, or a CSV: step,TASK,... with the losses before training at step 0")
    ],
    balancers: Annotated[
        list[str], typer.Option("--balancer", help='a method, a JSON object such as {"kind": "lbtw", "signal": "validation"}, or run: the run\'s own')
    ] = [],  # noqa: B006
    settings: Annotated[list[str], typer.Option("--set", help="KEY=VALUE for those balancers that have the key; may be repeated")] = [],  # noqa: B006
    sweeps: Annotated[list[str], typer.Option("--sweep", help="KEY=VALUE,VALUE,...: a replay for each value; may be repeated")] = [],  # noqa: B006
    coverage: Annotated[int | None, typer.Option(min=1, help="validation mini-batches that cover the validation set, where nothing tells")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for weights.csv and figures; else RUN/replay, or beside the CSV")] = None,
) -> None:
    """Show the weights that balancers would have chosen for recorded validation losses, without training."""
    keep_libraries_in(cache_folder(None))
    from mftcoder_coba.replaying import replay as run_replay

    print("\n".join(run_replay(source, balancers, settings, sweeps, coverage, out)))


@app.command()
def compare(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="the comparison's folder; the same command goes on in it")],
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods", help="a balancer with its defaults; lbtw*, gradnorm*, famo*: on validation losses; single_task: a model per task; else all"
        ),
    ] = [],  # noqa: B006
    plan: Annotated[
        Path | None,
        typer.Option(
            help='a JSON file of methods with settings: {"coba-paired": {"kind": "coba", "slope": "paired"}, '
            '"lora-per-task": {"per_task": true, "adapter": {"kind": "lora", "rank": 4}}, '
            '"full": {"adapter": null, "training": {"learning_rate": 1e-5}, "balancer": {"kind": "uniform"}}}; '
            "what a method does not name is the experiment's"
        ),
    ] = None,
    seeds: Annotated[list[int], typer.Option("--seeds", help="may be repeated; else the experiment's")] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    launcher: Annotated[str, typer.Option(help='what starts each run on several processes, e.g. "deepspeed --num_gpus 2"')] = "",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="keep the best model of each run")] = False,
) -> None:
    """Train with several balancers, adapters and seeds, all else being equal, and write tables and figures."""
    from mftcoder_coba.config import load_config

    keep_libraries_in(cache_folder(load_config(config, overrides).data.cache_dir))
    from mftcoder_coba.comparing import compare as run_comparison

    run_comparison(config, out, methods, plan, seeds, overrides, launcher, keep_models)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="a run folder, or the folder of an adapter")],
    out: Annotated[Path, typer.Option(help="a new folder; without --task, each task has one below it")],
    task: Annotated[str | None, typer.Option(help="one task of an adapter with experts; else all")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="a full model with the adapter merged in, instead of a plain LoRA adapter")] = False,
    base_model: Annotated[str | None, typer.Option(help="a Hugging Face folder or hub id to merge into; else the one that the adapter names")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"] | None, typer.Option(help="of the full model; else the base model's own")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the base model")] = False,
) -> None:
    """Write adapters in the forms that servers load: a plain LoRA adapter for each task, or merged full models."""
    keep_libraries_in(cache_folder(None))
    from mftcoder_coba.models.exporting import export as run_export

    print("\n".join(run_export(source, out, task, merged, base_model, dtype, trust_remote_code)))


@app.command()
def merge(
    base: Annotated[str, typer.Option(help="the model that all were trained from: a Hugging Face folder or hub id")],
    models: Annotated[list[Path], typer.Option("--models", help="a fine-tuned full model, a LoRA adapter, or a run; repeat it for each")],
    out: Annotated[Path, typer.Option(help="a new folder")],
    method: Annotated[Literal[*MERGING_METHODS], typer.Option(help="how each tensor is merged")] = "parameter_selection",
    probabilities: Annotated[
        list[float], typer.Option("--probabilities", help="parameter_selection: of choosing a model, one for each in their order; else equal")
    ] = [],  # noqa: B006
    resample_rounds: Annotated[
        int | None, typer.Option(min=0, help="parameter_selection: draw again, so often, where the chosen model left a parameter unchanged; else 0")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="parameter_selection, dare_*: of the draws; else 0")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare_*: the share of each update that is kept; else 0.2, for dare_* 0.1")] = None,
    weight: Annotated[
        list[float], typer.Option("--weight", help="linear, task_arithmetic, ties, dare_*: one for all, or one for each; else 1/K")
    ] = [],  # noqa: B006
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="of the merged full model; else the models' own")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="adapters: write a LoRA adapter of this rank, instead of a full model")] = None,
) -> None:
    """Merge models that were trained from one base, e.g. in different data orders, into one."""
    from mftcoder_coba.merging import merge as run_merge

    options = {"probabilities": probabilities, "resample_rounds": resample_rounds, "seed": seed, "density": density, "weight": weight}
    print("\n".join(run_merge(base, models, method, out, dtype, rank, **options)))


@app.command()
def orders(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(help="the folder of runs, merges and tables; the same command goes on in it")],
    count: Annotated[int, typer.Option(help="data orders, with a run for each; may be raised later")] = 5,
    methods: Annotated[
        list[str],
        typer.Option("--methods", help="of the command merge, may be repeated; else linear, norm_rescaled_average and parameter_selection"),
    ] = [],  # noqa: B006
    resample_rounds: Annotated[int, typer.Option(help="parameter_selection is also tried with so many; 0: it is not")] = 10,
    selection_seeds: Annotated[int, typer.Option(help="merges of each method that draws")] = 3,
    positions: Annotated[int, typer.Option(help="training samples whose loss is set against their place in the first epoch; 0: none")] = 4000,
    overrides: Overrides = [],  # noqa: B006
    launcher: Annotated[str, typer.Option(help='what starts each run on several processes, e.g. "deepspeed --num_gpus 2"')] = "",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="keep the merged models; those of the runs always stay")] = False,
) -> None:
    """Train models in several data orders, merge them, and measure what merging and the order do."""
    from mftcoder_coba.config import load_config

    keep_libraries_in(cache_folder(load_config(config, overrides).data.cache_dir))
    from mftcoder_coba.orders import orders as run_orders

    run_orders(config, out, count, methods, resample_rounds, selection_seeds, positions, overrides, launcher, keep_models)


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a run folder; or with --config the folder of an adapter or of a full model")],
    config: Annotated[
        Path | None, typer.Option(help="the experiment whose data is used, and whose adapter section says of 4 bits; else the run's")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    tasks: Annotated[list[str], typer.Option("--task", help="may be repeated; else all tasks of the experiment")] = [],  # noqa: B006
    split: Annotated[Literal["valid", "test", "train"] | None, typer.Option(help="else test where each task has test files, or valid")] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the results")] = None,
    model: Annotated[str | None, typer.Option(help="an adapter's base model, a Hugging Face folder or hub id; else the experiment's")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="rows of one forward pass; else training.micro_batch_rows")] = None,
) -> None:
    """Measure the exact loss and perplexity of each task, by the task's name."""
    from mftcoder_coba.evaluation import evaluate as run_evaluation

    run_evaluation(source, config, overrides, tasks, split, out, model, batch_rows)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, e.g. runs/demo; several are compared side by side")],
    out: Annotated[Path | None, typer.Option(help="folder for report.html and its figures; needed for several runs; else RUN/report")] = None,
) -> None:
    """Build report.html and its figures from one run folder, or from several side by side."""
    keep_libraries_in(cache_folder(None))
    from mftcoder_coba.reporting.report import build_report

    print(build_report(*runs, out=out))


def main() -> None:
    """Runs a command. All ranks of a run meet the same mistake; one of them tells it."""
    # The deepspeed launcher puts this before the command's name; the environment says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    try:
        app(args=arguments)
    except (UserError, RunFailure, Interrupted) as error:
        if int(os.environ.get("RANK", 0)) == getattr(error, "told_by", 0):
            print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
