"""A matrix as a product of two thin ones: pure, a tensor in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of a rank, as B A: the truncated singular value decomposition (Eckart and Young, 1936), shared evenly by both factors.

    With M = U S V^T: B = U_r S_r^(1/2), A = S_r^(1/2) V_r^T, the error ||M - B A||_F is the root of the sum of the squares of the singular
    values that were left out.

    U or V, whichever is smaller, are the eigenvectors of M M^T or M^T M in float64, and the other factor is M's projection on them. That
    takes a fraction of the time of an SVD, has no random part, and an error above that of the best matrix of at most 1e-8 ||M||_F.

    Args:
        matrix: [out, in], finite.
        rank: at least 1; what it has above min(out, in) stays zero.

    Returns:
        A [rank, in] and B [out, rank], float32.
    """
    exact = matrix.double()
    if exact.shape[0] > exact.shape[1]:
        transposed_down, transposed_up = factorise(matrix.T, rank)
        return transposed_up.T.contiguous(), transposed_down.T.contiguous()
    basis = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:].flip(1)  # [out, <= rank]; the largest first
    down = basis.T @ exact
    share = torch.linalg.vector_norm(down, dim=1).sqrt()  # roots of the singular values
    down /= share.clamp_min(torch.finfo(share.dtype).tiny)[:, None]  # where it is zero, so is the row
    up = basis * share
    missing = rank - share.numel()
    down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
    return down.float().contiguous(), up.float().contiguous()


def squared_norm(tensor: Tensor) -> float:
    """Of Frobenius, summed in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square().item()
