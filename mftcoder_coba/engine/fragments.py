"""Where the ZeRO stages keep what is trained: the layouts of DeepSpeed's optimizers, seen as slices of named parameters.

Each optimizer steps a few *flats*: float32 tensors, which are the keys of Adam's states; these have their shape. In stage 0 a flat is
a whole parameter. In the others it is 1-D and holds this rank's part of many, one after another, cut where ranks meet, and padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from mftcoder_coba.errors import UserError


@dataclass(frozen=True)
class Fragment:
    """A slice of a flattened parameter that this rank's optimizer steps.

    name: of the parameter in the module. shape: of the whole parameter. start, numel: the slice, in elements of the
    flattened parameter. flat: the tensor that holds it. offset: of its first element in `flat`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int

    def within(self, tensor: Tensor) -> Tensor:
        """[numel] A view of the fragment in `flat` or in a state of its shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Layout:
    """What this rank's optimizer steps.

    adam: the torch optimizer within DeepSpeed's. shapes: of all trained parameters, by name, the same on every rank.
    flats: the keys of Adam's states. fragments: what they hold, without padding.
    replicated: every rank holds everything, and not a part of its own.
    """

    adam: torch.optim.Optimizer
    shapes: dict[str, tuple[int, ...]]
    flats: list[Tensor]
    fragments: list[Fragment]
    replicated: bool


def layout_of(optimizer: Any, module: nn.Module) -> Layout:
    """The layout of `optimizer`, as DeepSpeed made it for `module`.

    Raises:
        UserError: DeepSpeed was told to use an optimizer whose states could not be saved.
    """
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters() if p.requires_grad}
    # Kinds that derive from these keep their states elsewhere or in another order.
    if type(optimizer) is DeepSpeedZeroOptimizer:
        flats = optimizer.single_partition_of_fp32_groups
        fragments = _cut_groups(optimizer.bit16_groups, optimizer.bit16_groups_flat, flats, optimizer.real_dp_process_group, names)
    elif type(optimizer) is BF16_Optimizer:
        flats = optimizer.fp32_groups_flat_partition
        fragments = _cut_groups(optimizer.bf16_groups, optimizer.bf16_groups_flat, flats, optimizer.real_dp_process_group, names)
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        flats = optimizer.fp32_partitioned_groups_flat
        fragments = _cut_parameters(optimizer.fp16_groups, flats, names)
    elif type(optimizer) is FP16_UnfusedOptimizer:
        return _whole_parameters(optimizer.optimizer, optimizer.fp16_groups, optimizer.fp32_groups, names, shapes)
    elif isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
        return _whole_parameters(optimizer, groups, groups, names, shapes)
    else:
        raise UserError(
            f"makes DeepSpeed use {type(optimizer).__name__}, whose states cannot be saved",
            "deepspeed",
            "ZeRO stages 0 to 3 with or without CPU offload can; remove keys that choose another optimizer",
        )
    return Layout(optimizer.optimizer, shapes, flats, list(fragments), replicated=False)


def _whole_parameters(adam: torch.optim.Optimizer, groups: list, masters: list, names: dict[int, str], shapes: dict[str, tuple[int, ...]]) -> Layout:
    """Stage 0: every rank steps every parameter."""
    flats = [flat for group in masters for flat in group]
    parameters = [parameter for group in groups for parameter in group]
    fragments = [Fragment(names[id(p)], tuple(p.shape), 0, p.numel(), flat, 0) for p, flat in zip(parameters, flats, strict=True)]
    return Layout(adam, shapes, flats, fragments, replicated=True)


def _cut_groups(groups: list, wholes: list[Tensor], flats: list[Tensor], process_groups: list, names: dict[int, str]) -> Iterator[Fragment]:
    """Stages 1 and 2: ranks share out each group of parameters, flattened as a whole.

    The working weights are views of that whole; where they begin in it, in whatever order, is where their masters begin.
    """
    for parameters, whole, flat, process_group in zip(groups, wholes, flats, process_groups, strict=True):
        _check_all_ranks(process_group)
        start = dist.get_rank(process_group) * flat.numel()
        for parameter in parameters:
            first = parameter.data.storage_offset() - whole.storage_offset()
            begin, end = max(first, start), min(first + parameter.numel(), start + flat.numel())
            if begin < end:
                yield Fragment(names[id(parameter)], tuple(parameter.shape), begin - first, end - begin, flat, begin - start)


def _cut_parameters(groups: list, flats: list[Tensor], names: dict[int, str]) -> Iterator[Fragment]:
    """Stage 3: ranks share out each parameter; a flat holds this rank's parts of a group, each padded to the same length on all ranks."""
    for parameters, flat in zip(groups, flats, strict=True):
        offset = 0
        for parameter in parameters:
            _check_all_ranks(parameter.ds_process_group)
            length = parameter.partition_numel()
            start = dist.get_rank(parameter.ds_process_group) * length
            numel = min(length, math.prod(parameter.ds_shape) - start)
            if numel > 0:
                yield Fragment(names[id(parameter)], tuple(parameter.ds_shape), start, numel, flat, offset)
            offset += length


def _check_all_ranks(process_group: Any) -> None:
    if dist.get_world_size(process_group) != dist.get_world_size():
        raise UserError(
            f"makes DeepSpeed share out parameters over {dist.get_world_size(process_group)} of {dist.get_world_size()} ranks; "
            "such states cannot be saved",
            "deepspeed",
            "remove keys such as mics_shard_size and tensor_parallel",
        )


def update_working_weights(optimizer: Any) -> None:
    """Makes the weights that the model computes with follow new flats and states. Collective."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()  # whole parameters of before are given up
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # small ones that are always whole are gathered anew
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        # DeepSpeed keeps views of the states beside its parameters; those of before are stale.
        optimizer._hp_optimizer_states_linked = False
        if optimizer.optimizer.state:
            optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.data.copy_(master.data)
