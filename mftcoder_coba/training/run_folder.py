"""The run folder: what is where, and who may write."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mftcoder_coba.config import Config
from mftcoder_coba.engine import Processes
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import recover_export
from mftcoder_coba.training.stopping import BestStep

PROBE_BYTES = 1 << 16  # more than all that is written before the first step


class RunFolder:
    """Paths of a run. Only rank 0 writes its JSON files."""

    def __init__(self, config: Config):
        self.path = Path(config.run.dir).absolute() / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.resume = config.checkpoint.resume

    def claim(self, processes: Processes, resuming: bool) -> None:
        """Makes the folder, proves that it can be written, before the model is loaded, and puts right what a killed run left in it.

        Raises:
            UserError: it cannot be written, or it holds another run that would be overwritten.
        """
        problem = self._problem(resuming) if processes.is_main else ""
        if processes.any(bool(problem)):
            raise UserError(
                problem or "the run folder cannot be used",
                str(self.path),
                'choose another run.name or run.dir, make room there, or let checkpoint.resume be "auto"',
            )

    def _problem(self, resuming: bool) -> str:
        """Why the folder cannot be had, or nothing."""
        try:
            _prove_writable(self.path)
            self._held = FileLock(self.path / ".lock")  # keeps other runs out until this process ends, however it ends
            self._held.acquire(blocking=False)
            if not resuming and self.resume == "never" and (self.path / "metrics.jsonl").exists():
                return 'the run folder already holds a run, and checkpoint.resume is "never"'
            _prove_writable(self.checkpoints)
            recover_export(self.export)
        except Timeout:
            return "another run is writing to this run folder"
        except OSError as error:
            return f"the run folder cannot be written: {error.strerror or error}: {error.filename or self.path}"
        return ""

    def write_json(self, name: str, tree: dict[str, Any]) -> None:
        """Replaces a file by one rename: neither a reader nor a crash ever sees half of it.

        Raises:
            OSError: it cannot be written; the older one is as it was, and nothing else is left.
        """
        aside = self.path / f".{name}.new"
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path / name)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def write_best(self, best: BestStep, ratios: dict[str, float]) -> None:
        self.write_json("best.json", {"step": best.step, "criterion": best.config.criterion, "value": best.value, "values": ratios})


def _prove_writable(folder: Path) -> None:
    """Makes the folder, and writes to it.

    Raises:
        OSError: that is not possible, or there is no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
