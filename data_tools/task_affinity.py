"""How much the tasks of an experiment pull the base model the same way, and which of them may share the experts of a cluster.

    python -m data_tools.task_affinity --config configs/demo.json [--samples 64] [--clusters 2] [--out FOLDER]

The affinity of two tasks is the cosine of the gradients of their losses with respect to a fresh LoRA on the base model, over a few training samples
(`data_tools.task_gradients`). What sampling noise does to it, and how clusters are found, says `data_tools.task_clusters`. Printed, and written to
the folder as `affinity.json` and `affinity.png`. The clusters are in the form that `adapter.clusters` of a config takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_tools.common import experiment_parser, run, whole_number, write_json
from data_tools.task_clusters import LEAST_SELF, Clusters, Matrix, cosines, propose, without_noise
from mftcoder_coba.caches import cache_folder, keep_libraries_in
from mftcoder_coba.config import Config, load_config
from mftcoder_coba.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 64
LONGEST_NAME = 32


@dataclass(frozen=True)
class Affinity:
    """What was measured of K tasks, and what follows from it.

    Attributes:
        samples, tokens: [K] training samples used, and supervised tokens in them. exhausted: [K] whether there are no more samples.
        cosine: [K, K] of the gradients. own: [K] of the gradients of each task's halves. corrected: [K, K], see `task_clusters`.
    """

    tasks: tuple[str, ...]
    samples: tuple[int, ...]
    tokens: tuple[int, ...]
    exhausted: tuple[bool, ...]
    cosine: Matrix
    own: NDArray[np.float64]
    corrected: Matrix
    clusters: Clusters

    @property
    def order(self) -> list[int]:
        """Tasks by cluster."""
        return sorted(range(len(self.tasks)), key=lambda task: (self.clusters.labels[task], task))

    @property
    def unclear(self) -> list[int]:
        """Tasks whose halves agree too little."""
        return [task for task, own in enumerate(self.own) if own < LEAST_SELF]


def measure(config: Config, samples: int, clusters: int | None, say: Callable[[str], None]) -> Affinity:
    """Loads data and model, takes the gradients and proposes clusters.

    Args:
        samples: of each task, at most; 2 or more.
        clusters: how many; None: as many as separate best.
        say: is told of each task when it is measured.

    Raises:
        UserError: more clusters than tasks; or the data, the model or their fit is at fault.
    """
    tasks = config.data.task_names
    if clusters is not None and clusters > len(tasks):
        raise UserError(f"the experiment has {len(tasks)} tasks: 1 to {len(tasks)} clusters", f"--clusters {clusters}")
    import torch

    from data_tools.task_gradients import batches_of, chosen_samples, half_gradients, inner_products, load_objective
    from mftcoder_coba.data import prepare

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = prepare(config.data, config.model.path, config.model.trust_remote_code)
    chosen = chosen_samples(corpus, samples, config.run.seed)
    objective, parameters = load_objective(config, corpus, device)
    gradients, tokens = torch.empty(len(tasks), 2, sum(parameter.numel() for parameter in parameters)), []
    for task, (name, halves) in enumerate(zip(tasks, chosen, strict=True)):
        batches = [batches_of(config, corpus, task, half) for half in halves]
        gradients[task] = half_gradients(objective, parameters, batches, task, device)
        tokens.append(int(sum(batch.tokens[task] for half in batches for batch in half)))
        if not (torch.isfinite(gradients[task]).all() and gradients[task].any(1).all()):
            what = f"the gradient of {name} is 0 or not finite"
            raise UserError(what, "model.path", 'try "dtype": "float32", and look for damaged weights')
        say(f"{name}: {sum(map(len, halves))} of {len(corpus.splits['train'][task]):,} samples, {tokens[-1]:,} supervised tokens")
    cosine, own = cosines(inner_products(gradients))
    corrected = without_noise(cosine, own)
    counts = tuple(len(first) + len(second) for first, second in chosen)
    exhausted = tuple(count == len(data) for count, data in zip(counts, corpus.splits["train"], strict=True))
    return Affinity(tuple(tasks), counts, tuple(tokens), exhausted, cosine, own, corrected, propose(corrected, clusters))


def lines_of(affinity: Affinity) -> Iterator[str]:
    """The matrix, tasks by cluster, and what follows."""
    order, names = affinity.order, affinity.tasks
    width = max(len(_short(name)) for name in names)
    yield "affinity, the cosine of the tasks' gradients; self, that of the two halves of a task's samples"
    yield " " * (width + 4) + "".join(f"{number:6d}" for number in range(1, len(order) + 1)) + "    self"
    for number, task in enumerate(order, start=1):
        values = "".join(f"{affinity.cosine[task, other]:z6.2f}" for other in order)
        yield f"{number:3d} {_short(names[task]):{width}}{values}  {affinity.own[task]:z6.2f}"
    if affinity.unclear:
        worst = ", ".join(names[task] for task in affinity.unclear)
        exhausted = all(affinity.exhausted[task] for task in affinity.unclear)
        fix = "they have no more samples" if exhausted else "raise --samples"
        yield f"too little agreement to tell (self below {LEAST_SELF}), so their clusters are uncertain: {worst}; {fix}"
    count = len(set(affinity.clusters.labels))
    yield f"{count} cluster{'s' * (count > 1)}, by affinities without sampling noise: {affinity.clusters.reason}"
    yield "to paste into `adapter`:"
    yield f'"clusters": {json.dumps(affinity.clusters.named(names), ensure_ascii=False)}'


def json_of(affinity: Affinity, config: Config) -> dict[str, Any]:
    """Tasks in the order of the config. `cosine` is as measured, `affinity` without noise."""
    return {
        "model": config.model.path,
        "seed": config.run.seed,
        "tasks": list(affinity.tasks),
        "samples": list(affinity.samples),
        "supervised_tokens": list(affinity.tokens),
        "cosine": affinity.cosine.tolist(),
        "self": affinity.own.tolist(),
        "affinity": affinity.corrected.tolist(),
        "uncertain": [affinity.tasks[task] for task in affinity.unclear],
        "silhouettes": {str(count): value for count, value in affinity.clusters.silhouettes.items()},
        "reason": affinity.clusters.reason,
        "clusters": affinity.clusters.named(affinity.tasks),
    }


def draw(affinity: Affinity) -> Figure:
    """A heat map of the cosines, tasks by cluster, with a frame around each cluster; `self` in a column beside it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from mftcoder_coba.reporting.figures import DPI

    order, labels = affinity.order, np.array(affinity.clusters.labels)
    names, tasks = [_short(affinity.tasks[task]) for task in order], len(order)
    side, margin = 0.46 * tasks, 0.085 * max(map(len, names))
    figure = Figure(figsize=(max(side + 0.9 + margin, 5.5), side + 1.2 + 0.75 * margin), dpi=DPI, layout="constrained", facecolor="white")
    whole, own = figure.subplots(1, 2, width_ratios=[tasks, 1])
    for axes, values in ((whole, affinity.cosine[np.ix_(order, order)]), (own, affinity.own[order][:, None])):
        axes.imshow(values, cmap="RdBu_r", vmin=-1.0, vmax=1.0, aspect="equal")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.65 else "black"
            axes.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=8, color=colour, in_layout=False)
    whole.set_anchor("NE")  # close to the other, where the sheet is wider than both
    own.set_anchor("NW")
    whole.set_xticks(range(tasks), names, rotation=45, ha="right", rotation_mode="anchor")
    whole.set_yticks(range(tasks), names)
    own.set_xticks([0], ["self"])
    own.set_yticks([])
    for label in sorted(set(labels)):
        places = np.flatnonzero(labels[order] == label)
        size = len(places)
        whole.add_patch(Rectangle((places[0] - 0.5, places[0] - 0.5), size, size, fill=False, edgecolor="black", linewidth=2.0, clip_on=False))
    figure.suptitle("Cosine of the tasks' gradients, framed by cluster", fontsize=10)
    return figure


def _short(name: str) -> str:
    from mftcoder_coba.reporting.figures import shortened

    return shortened(name, LONGEST_NAME)


def write(affinity: Affinity, config: Config, folder: Path) -> None:
    """Writes `affinity.json` and `affinity.png`; earlier ones are replaced.

    Raises:
        UserError: they cannot be written.
    """
    from mftcoder_coba.reporting.figures import png

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "affinity.json", json_of(affinity, config))
        (folder / "affinity.png").write_bytes(png(draw(affinity)))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", f"--out {folder}") from None


def main() -> None:
    description = "Show how much the gradients of an experiment's tasks agree on the base model, and propose clusters of tasks."
    parser = experiment_parser("task_affinity", description)
    parser.add_argument("--samples", type=whole_number(2), default=SAMPLES, metavar="N", help="of each task, at most (default: %(default)s)")
    parser.add_argument("--clusters", type=whole_number(1), metavar="N", help="propose so many (default: as many as separate best)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for affinity.json and affinity.png (default: NAME-affinity beside the run's folder)"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    keep_libraries_in(cache_folder(config.data.cache_dir))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    affinity = measure(config, arguments.samples, arguments.clusters, lambda line: print(line, flush=True))
    folder = arguments.out or Path(config.run.dir) / f"{config.run.name}-affinity"
    print(*lines_of(affinity), sep="\n")
    write(affinity, config, folder)
    print(f"written: {folder / 'affinity.json'}, {folder / 'affinity.png'}")


if __name__ == "__main__":
    run(main)
