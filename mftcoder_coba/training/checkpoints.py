"""Checkpoints of a run: written aside, published by one rename, pruned, found again.

checkpoints/step-000100/engine/...    DeepSpeed's part, one file set per rank
checkpoints/step-000100/state.json    everything else that advances, as plain values
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from mftcoder_coba.engine import Engine
from mftcoder_coba.errors import UserError

STATE_FILE = "state.json"
_NAME = re.compile(r"^step-(\d{6,})$")


class Checkpoints:
    """The checkpoint folder of one run.

    Args:
        keep: newest ones to keep; the best one is kept beside them.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, engine: Engine, step: int, state: dict[str, Any], best_step: int | None) -> Path:
        """Writes the checkpoint of `step`; to be called on every rank with the same arguments."""
        processes = engine.processes
        target = self.folder / f"step-{step:06d}"
        aside = self.folder / f"{target.name}.partial"
        if processes.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        processes.barrier()
        engine.save(aside)
        processes.barrier()
        if processes.is_main:
            with open(aside / STATE_FILE, "w", encoding="utf-8") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.rename(aside, target)
            self._prune(best_step)
        processes.barrier()
        return target

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.match(path.name) for path in self.folder.iterdir() if (path / STATE_FILE).is_file())
        return sorted(int(match[1]) for match in found if match)

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `checkpoint.resume` means: "auto", "never" or a path.

        Raises:
            UserError: a path that is no complete checkpoint.
        """
        if resume == "never":
            return None
        if resume == "auto":
            steps = self.steps()
            return self.folder / f"step-{steps[-1]:06d}" if steps else None
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise UserError(
                f"is not a complete checkpoint: it has no {STATE_FILE}",
                f"checkpoint.resume = {resume}",
                'give a checkpoints/step-... folder, "auto" or "never"',
            )
        return path

    @staticmethod
    def read_state(checkpoint: Path) -> dict[str, Any]:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))

    def _prune(self, best_step: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best_step:
                shutil.rmtree(self.folder / f"step-{step:06d}", ignore_errors=True)
