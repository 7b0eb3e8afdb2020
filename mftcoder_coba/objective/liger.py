"""The output layer's loss by Liger's fused Triton kernels, in the place of `linear_cross_entropy`.

Read in liger-kernel 0.8.5 (`ops/fused_linear_cross_entropy.py`): with `reduction="none"` the token losses come back in float32, and the backward
pass forms the logits a second time, multiplies each token's gradient by the token's factor, and only then adds the tokens up in the gradient of
the weight. So factors per token are right. Releases before 0.8.5 are refused: such that scale the sum afterwards exist, and a weighted loss
would be wrong with them without a word. Two differences from the reference remain. The logits are computed twice, in exchange for fewer
passes over them in memory; and in bfloat16 a token's factor is rounded to 8 bits (at most 0.4 % off, the same for all tokens of a task), where
the reference multiplies in float32.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from mftcoder_coba.errors import UserError
from mftcoder_coba.objective.linear_cross_entropy import OutputTransform

OLDEST = (0, 8, 5)


def check_liger(device: torch.device) -> None:
    """Raises UserError where Liger's loss cannot run."""
    where, fix = 'model.output_loss = "liger"', 'use "torch"'
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("the package liger-kernel is not installed", where, f"{fix}, or install requirements-gpu.txt")
    version = importlib.metadata.version("liger-kernel")
    if tuple(int(number) for number in version.split(".")[:3] if number.isdigit()) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise UserError(
            f"liger-kernel {version} does not weigh single tokens correctly; {needed} does", where, f"{fix}, or install requirements-gpu.txt"
        )
    if device.type != "cuda":
        raise UserError("its kernels need a GPU, and there is none", where, fix)


def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor, transform: OutputTransform
) -> tuple[Tensor, Tensor]:
    """Weighted loss and token losses; arguments as of `linear_cross_entropy`, at least one token.

    Returns:
        sum of factors x token losses (scalar float32, differentiable), and the token losses ([tokens] float32, detached).
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if transform.scale != 1.0:  # scale (W h + b) = W (scale h) + scale b
        hidden, bias = hidden * transform.scale, None if bias is None else bias * transform.scale
    losses = liger_fused_linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", softcap=transform.cap, accum_dtype=torch.float32)
    return (losses * factors).sum(), losses.detach()
