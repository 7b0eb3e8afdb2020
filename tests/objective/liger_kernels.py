"""Run as a program where triton and liger-kernel are installed: Liger's own kernels on the CPU, in Triton's interpreter, against the reference."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from mftcoder_coba.objective import OutputTransform, linear_cross_entropy
from mftcoder_coba.objective.liger import liger_cross_entropy


def largest_difference(bias: bool, frozen: bool, scale: float) -> float:
    """Of loss, token losses and gradients, relative to the reference's norm."""
    torch.manual_seed(0)
    hidden, weight, values = torch.randn(37, 32, requires_grad=True), torch.randn(90, 32), torch.randn(90) if bias else None
    trained = [hidden, *(() if frozen else (tensor.requires_grad_() for tensor in (weight, values) if tensor is not None))]
    given = (hidden, weight, values, torch.randint(90, (37,)), torch.rand(37), OutputTransform(scale=scale))
    results = []
    for function in (liger_cross_entropy, linear_cross_entropy):
        loss, losses, *_ = function(*given)
        results.append([loss.detach(), losses, *torch.autograd.grad(3.0 * loss, trained)])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


if __name__ == "__main__":
    for bias in (False, True):
        for frozen in (False, True):
            for scale in (1.0, 0.25):
                print(largest_difference(bias, frozen, scale))
