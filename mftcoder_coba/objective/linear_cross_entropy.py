"""Cross entropy of a linear output layer without ever holding all logits.

torch's own chunked `linear_cross_entropy` reduces inside and takes no factor per token, which a weighted multi-task
loss needs; hence this one. The factors are known before the forward pass, so each chunk's gradient is formed while its
logits are there, and nothing of size tokens x vocabulary outlives its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at one time: 2^25 float32 values are 128 MiB, enough rows to keep a matrix product efficient.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class OutputTransform:
    """What a model does to its logits after the output layer: `z -> cap tanh(scale z / cap)`.

    scale: Cohere's `logit_scale`, one over Granite's `logits_scaling`. cap: Gemma's `final_logit_softcapping`; None: no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place. logits: [tokens, vocabulary] float32."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def backward_(self, gradient: Tensor, transformed: Tensor) -> Tensor:
        """Gradient with respect to the output of `apply_` -> to its input, in place."""
        if self.cap is not None:
            gradient.mul_(1.0 - (transformed / self.cap).square_())
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factors: Tensor | None,
    transform: OutputTransform,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, token losses and normalisers of a linear output layer.

    Args:
        hidden: [tokens, width] last hidden states of supervised tokens only.
        weight: [vocabulary, width] of the output layer; bias: [vocabulary] or None.
        labels: [tokens] int64, the token to predict.
        factors: [tokens] float32, each token's factor in the loss; None: no loss is wanted.

    Returns:
        sum of factors x token losses (scalar, float32, differentiable; 0 without factors); the token losses ([tokens]
        float32, negative log-likelihood in nats, detached); and each token's log of the sum of its exponential logits
        ([tokens] float32, detached), from which its probabilities can be formed again chunk by chunk.
    """
    chunk_tokens = max(1, chunk_elements // weight.shape[0])
    if factors is None or not torch.is_grad_enabled():
        token_losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(token_losses)
        with torch.no_grad():
            for start in range(0, len(labels), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                token_losses[part], _, normalisers[part] = _chunk_losses(hidden[part], weight, bias, labels[part], transform)
        loss = hidden.new_zeros((), dtype=torch.float32) if factors is None else (token_losses * factors).sum()
        return loss, token_losses, normalisers
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, factors, transform, chunk_tokens)


def _chunk_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, transform: OutputTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses, transformed logits and their log-normaliser of one chunk."""
    logits = transform.apply_(F.linear(hidden, weight, bias).float())
    normaliser = torch.logsumexp(logits, dim=-1)
    return normaliser - logits.gather(1, labels[:, None])[:, 0], logits, normaliser


def logits_gradient_(logits: Tensor, normaliser: Tensor, labels: Tensor, factors: Tensor, transform: OutputTransform, first: int = 0) -> Tensor:
    """Gradient of the sum of factors x token losses with respect to the output layer's own logits, before the transform.

    Args:
        logits: [tokens, columns] float32, transformed; of the vocabulary's entries from `first` on. May be overwritten.
        normaliser, labels, factors: [tokens].
    """
    # factor x (softmax - one-hot), written over the logits unless the cap still needs them
    gradient = torch.sub(logits, normaliser[:, None], out=logits if transform.cap is None else None).exp_()
    columns = labels - first
    inside = (columns >= 0) & (columns < logits.shape[1])
    gradient.scatter_add_(1, columns.clamp(0, logits.shape[1] - 1)[:, None], -inside.to(gradient.dtype)[:, None])
    gradient.mul_(factors[:, None])
    return transform.backward_(gradient, logits)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, factors, transform, chunk_tokens):
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(losses)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are added up in float32: a sum of many bfloat16 terms would lose the small ones.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h, y = hidden[part], labels[part]
            losses[part], logits, normalisers[part] = _chunk_losses(h, weight, bias, y, transform)
            gradient = logits_gradient_(logits, normalisers[part], y, factors[part], transform).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ weight
            if weight_gradient is not None:
                if weight.dtype == torch.float32:
                    weight_gradient.addmm_(gradient.t(), h)
                else:
                    weight_gradient += gradient.t() @ h
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0, dtype=torch.float32)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.mark_non_differentiable(losses, normalisers)
        return (losses * factors).sum(), losses, normalisers

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if hidden_gradient is None else hidden_gradient * loss_gradient.to(hidden_gradient.dtype),
            None if weight_gradient is None else (weight_gradient * loss_gradient).to(weight_dtype),
            None if bias_gradient is None else (bias_gradient * loss_gradient).to(bias_dtype),
            None,
            None,
            None,
            None,
        )
