"""The run folder: what is where, and who may write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mftcoder_coba.config import Config
from mftcoder_coba.engine import Processes
from mftcoder_coba.errors import UserError
from mftcoder_coba.training.stopping import BestStep


class RunFolder:
    """Paths of a run. Only rank 0 writes its JSON files."""

    def __init__(self, config: Config):
        self.path = Path(config.run.dir).absolute() / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.resume = config.checkpoint.resume

    def claim(self, processes: Processes, resuming: bool) -> None:
        """Makes the folder and proves that it can be written, before the model is loaded.

        Raises:
            UserError: it cannot be written, or it holds another run that would be overwritten.
        """
        problem = ""
        if processes.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                probe = self.path / ".writable"
                probe.write_text("")
                probe.unlink()
            except OSError as error:
                problem = f"the run folder cannot be written: {error.strerror}"
            if not problem:
                problem = self._lock()
            if not problem and not resuming and self.resume == "never" and (self.path / "metrics.jsonl").exists():
                problem = 'the run folder already holds a run, and checkpoint.resume is "never"'
        if processes.any(bool(problem)):
            raise UserError(
                problem or "the run folder cannot be used", str(self.path), 'choose another run.name or run.dir, or let checkpoint.resume be "auto"'
            )

    def _lock(self) -> str:
        """Keeps other runs out until this process ends, however it ends; else tells why not."""
        self._held = FileLock(self.path / ".lock")
        try:
            self._held.acquire(blocking=False)
        except Timeout:
            return "another run is writing to this run folder"
        return ""

    def write_json(self, name: str, tree: dict[str, Any]) -> None:
        """Replaces a file by one rename: a reader never sees half of it."""
        aside = self.path / f".{name}.new"
        aside.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, self.path / name)

    def write_best(self, processes: Processes, best: BestStep, ratios: dict[str, float]) -> None:
        if processes.is_main:
            self.write_json("best.json", {"step": best.step, "criterion": best.config.criterion, "value": best.value, "values": ratios})
