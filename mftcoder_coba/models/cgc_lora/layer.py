"""A linear layer with low-rank experts.

    h = W0 x + B diag(g) A x           g: of the token's task, 0 for experts that it does not see; the scaling is in it

A [R, in] and B [out, R] are all experts of all clusters, so tokens of any tasks go through one pair of products.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.models.cgc_lora.structure import Group


class Routing:
    """What the layers are told of the tokens that they get; one object for all layers of a model.

    table: [layers, tasks + 1, R], see `TaskGates`. tasks: [tokens] int64, row of the table of each token; or a number: that of all tokens.
    """

    def __init__(self) -> None:
        self._now: tuple[Tensor, Tensor | int] | None = None

    def set(self, now: tuple[Tensor, Tensor | int] | None) -> contextlib.AbstractContextManager[None]:
        """Within it, (table, tasks) are `now`. It may be entered again: a graph that is kept can have several backward passes."""
        return _Within(self, now)

    def for_checkpointing(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """`context_fn` of torch's checkpointing: what is computed anew in the backward pass meets the gates of its forward pass."""
        return contextlib.nullcontext(), self.set(self._now)

    def gates(self, layer: int, shape: torch.Size, name: str) -> Tensor:
        """[*shape, R], or [R] for one task.

        Raises:
            UserError: nobody said which task it is; or the layer does not see the batch's tokens, each once.
        """
        if self._now is None:
            raise UserError("which task it is has to be said", "this adapter", 'call with task="NAME", or within `with model.task("NAME"):`')
        table, tasks = self._now
        if isinstance(tasks, int):
            return table[layer, tasks]
        if shape.numel() != tasks.numel():
            what = f"the layer {name} is given {shape.numel()} tokens of a batch of {tasks.numel()}, so that their tasks are not known"
            raise UserError(what, "adapter.target_modules", "leave it out")
        # A look-up of which the backward pass adds up in a fixed order.
        return nn.functional.embedding(tasks, table[layer]).view(*shape, -1)


class _Within:
    """See `Routing.set`."""

    def __init__(self, routing: Routing, now: tuple[Tensor, Tensor | int] | None):
        self._routing, self._inside, self._before = routing, now, []

    def __enter__(self) -> None:
        self._before.append(self._routing._now)
        self._routing._now = self._inside

    def __exit__(self, *exception) -> None:
        self._routing._now = self._before.pop()


class ExpertsLinear(nn.Module):
    """Parameters `A:GROUP` [rank, in] and `B:GROUP` [out, rank] of each group; A starts as PEFT's LoRA does, B at zero.

    Args:
        base_layer: any linear layer, also a quantised one.
        name, index: of the layer, in the model and among those that have experts.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        groups: Sequence[Group],
        dropout: float,
        routing: Routing,
        name: str,
        index: int,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.routing, self.name, self.index = routing, name, index
        self._down, self._up = [], []  # names, in the order of the columns
        for group in groups:
            down, up = tensor_names(group.name)
            self.register_parameter(down, nn.Parameter(torch.empty(group.rank, in_features, device=device)))
            self.register_parameter(up, nn.Parameter(torch.zeros(out_features, group.rank, device=device)))
            nn.init.kaiming_uniform_(self._parameters[down], a=math.sqrt(5))
            self._down.append(down)
            self._up.append(up)

    @property
    def weight(self) -> Tensor:
        """Of the base layer: architectures look at its dtype. One that computes with it passes the experts by, as it would PEFT's LoRA."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """[..., in] -> [..., out]"""
        result = self.base_layer(x, *args, **kwargs)
        gates = self.routing.gates(self.index, x.shape[:-1], self.name)
        down = torch.cat([self._parameters[name] for name in self._down])
        up = torch.cat([self._parameters[name] for name in self._up], dim=1)
        inner = nn.functional.linear(self.dropout(x.to(down.dtype)), down)
        return result + nn.functional.linear(inner * gates.to(inner.dtype), up).to(result.dtype)


def tensor_names(group: str) -> tuple[str, str]:
    """Of a group's A and B in a layer. Torch allows no dots in them; a name never has a slash."""
    safe = group.replace(".", "/")
    return f"A:{safe}", f"B:{safe}"
