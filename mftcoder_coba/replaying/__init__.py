"""What would another balancer have done? Recorded validation losses in, the weights that it would have chosen out.

A recording (a run folder, or a CSV of losses) is fed to balancers that look at nothing but validation losses, as the training
loop would have fed it. Nothing is trained, so the losses stay those of the recorded run: in a run of its own, other weights
would have led to other losses. What a replay answers exactly is how a method, or one of its settings, reads given losses.

    recordings   a run folder or a CSV -> losses, slots, v(0)
    variants     what the user names, sets and sweeps -> balancer configs
    feeding      pure: recording and balancer -> weights; who was held back when
    showing      the table and its sentences, weights.csv, the figure
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mftcoder_coba.errors import UserError
from mftcoder_coba.replaying.feeding import Replay, Span, held_back, replay_variant
from mftcoder_coba.replaying.recordings import read_recording
from mftcoder_coba.replaying.showing import lines, write_csv, write_figures
from mftcoder_coba.replaying.variants import variants

__all__ = ["Replay", "Span", "held_back", "read_recording", "replay", "replay_variant", "variants"]


def replay(
    source: Path,
    balancers: Sequence[str] = (),
    settings: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    coverage: int | None = None,
    out: Path | None = None,
) -> list[str]:
    """Replays a recording, writes weights.csv and figures, and returns the lines to print.

    Args:
        source: a run folder, or a CSV with the columns step, TASK..., TASK.slot...
        balancers: names of methods, JSON objects of the config's `balancer` section, or "run" for the run's own; none: "run".
        settings: KEY=VALUE for every one of these that has the key.
        sweeps: KEY=VALUE,VALUE,... as well: one replay for each value, or combination of values.
        coverage: M, where the recording does not say it.
        out: the folder for weights.csv and figures; None: `replay/` in the run folder, `NAME-replay/` beside NAME.csv.

    Raises:
        UserError: the recording has no such losses or is broken, or a balancer is unknown or looks at other signals.
    """
    recording = read_recording(source)
    replays = [replay_variant(recording, variant, coverage) for variant in variants(recording, balancers, settings, sweeps)]
    out = out or (source / "replay" if source.is_dir() else source.with_name(f"{source.stem}-replay"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = [write_csv(replays, out / "weights.csv"), *write_figures(replays, out)]
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", str(error.filename or out), "choose another folder with --out") from None
    return [*lines(replays), *(f"written: {file}" for file in files)]
