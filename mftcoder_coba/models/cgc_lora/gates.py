"""The tasks' gates: which share of each expert a task takes, in each adapted layer.

    g_t = softmax(W_t e_t)       over the experts that task t sees; e_t: its embedding, one for all layers; W_t: one for each layer

W starts at zero, so that gates start uniform, and e is random, so that W gets a gradient at once. One tensor holds W_t of all layers:
the gates of a forward pass are computed once, before its first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mftcoder_coba.models.cgc_lora.structure import Structure


class TaskGates(nn.Module):
    """The gates of all tasks in all layers. A task that sees one expert only needs none: its gate is 1.

    Parameters of task NAME: `embedding:NAME` [width], `gate:NAME` [layers, experts that it sees, width].
    """

    def __init__(self, structure: Structure, layers: int, device: torch.device | None = None):
        super().__init__()
        self.structure, self.layers = structure, layers
        for task in structure.tasks:
            experts, width = len(structure.cluster_of(task).visible(task)), structure.task_embedding
            columns = torch.tensor(structure.columns(task), device=device)
            self.register_buffer(f"columns:{_safe(task)}", columns, persistent=False)  # made anew from the structure
            if experts > 1:
                self.register_parameter(f"embedding:{_safe(task)}", nn.Parameter(torch.randn(width, device=device)))
                self.register_parameter(f"gate:{_safe(task)}", nn.Parameter(torch.zeros(layers, experts, width, device=device)))

    def forward(self, tasks: Sequence[str]) -> Tensor:
        """What the columns of each layer are multiplied with, for each of `tasks`: [layers, tasks + 1, R] float32, scaling included.

        Columns that a task does not see are 0, as is the last row, that of padding.
        """
        rows = []
        for task in tasks:
            gates = self.of(task) * self.structure.cluster_of(task).scaling
            rows.append(nn.functional.pad(gates, (0, 1))[:, self._buffers[f"columns:{_safe(task)}"]])
        return torch.stack([*rows, torch.zeros_like(rows[0])], dim=1)

    def of(self, task: str) -> Tensor:
        """[layers, experts that the task sees] float32, each row of sum 1."""
        experts = len(self.structure.cluster_of(task).visible(task))
        if experts == 1:
            return torch.ones(self.layers, 1, device=self._buffers[f"columns:{_safe(task)}"].device)
        embedding, gate = self._parameters[f"embedding:{_safe(task)}"], self._parameters[f"gate:{_safe(task)}"]
        return torch.softmax(gate.float() @ embedding.float(), dim=-1)

    def names_of(self, task: str) -> list[str]:
        """Its parameters' names here; none where it sees one expert only."""
        return [name for name in (f"embedding:{_safe(task)}", f"gate:{_safe(task)}") if name in self._parameters]


def _safe(name: str) -> str:
    """Torch does not allow dots in a parameter's name; a task's name never has a slash."""
    return name.replace(".", "/")
