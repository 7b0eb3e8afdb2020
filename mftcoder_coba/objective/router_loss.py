"""The auxiliary loss of a mixture-of-experts model's router, over the tokens of a whole optimizer step.

For E experts of which each token takes some, transformers' `load_balancing_loss_func` (arXiv 2101.03961, equations 4 to 6) is

    A = E sum_e f_e P_e

f_e: expert choices that fell on e, P_e: the router's mean probability of e, both per token and averaged over layers. f_e is a count and has
no gradient. A is not a sum over tokens. Each micro-batch m has its own A_m over its T_m tokens that are no padding (prompts count, since the
router sees them), and a step with T such tokens adds to the loss L

    coefficient x sum_m (T_m / T) A_m

T is counted before the first forward pass, as the N_k are. With one micro-batch on one rank this is transformers' own loss. Otherwise it differs
from A of the whole step by the covariance of f and P between micro-batches alone; padding and uneven micro-batches do not change it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mftcoder_coba.errors import UserError

FUNCTION = "load_balancing_loss_func"
PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class RouterLoss:
    """function: the architecture's own A. coefficient: its factor in the step's loss."""

    function: Callable[..., Tensor]
    num_experts: int
    experts_per_token: int
    coefficient: float

    def token_sum(self, router_logits: tuple[Tensor, ...], real: Tensor) -> Tensor:
        """T_m A_m (scalar float32, differentiable; 0 without any token).

        Args:
            router_logits: for each layer [tokens, experts], or [rows, length, experts].
            real: [rows, length] bool, False on padding.
        """
        count = real.sum()
        # Without tokens A would be 0 / 0: then all count, with the factor 0.
        mask = (real | (count == 0)).reshape(1, -1)
        logits = tuple(layer.reshape(-1, layer.shape[-1]).float() for layer in router_logits)
        return self.function(logits, self.num_experts, self.experts_per_token, mask) * count


def router_loss(causal_lm: nn.Module, coefficient: float | Literal["auto"]) -> RouterLoss | None:
    """The router's loss of this architecture; None where it has none, or the coefficient is 0.

    Args:
        coefficient: "auto": the model's own (`router_aux_loss_coef` of its config).

    Raises:
        UserError: a number is given for a model without such a loss; or its loss is of a kind that is not known here.
    """
    if coefficient == 0:
        return None
    where = f"training.router_loss_coefficient = {coefficient!r}"
    function = getattr(sys.modules[type(causal_lm).__module__], FUNCTION, None)
    experts = getattr(causal_lm, "num_experts", None)
    if function is None or not experts:
        if coefficient == "auto":
            return None
        raise UserError(f"{type(causal_lm).__name__} has no auxiliary loss of a router", where, 'use "auto" or 0')
    per_token = getattr(causal_lm, "num_experts_per_tok", None)
    if list(inspect.signature(function).parameters) != PARAMETERS or per_token is None:
        what = f"the auxiliary loss of {type(causal_lm).__name__}'s router is of a kind that is not known here"
        raise UserError(what, where, "set it to 0 to train without")
    if coefficient == "auto":
        own = getattr(causal_lm, "router_aux_loss_coef", None)
        if own is None:
            raise UserError(f"{type(causal_lm).__name__} does not say what its coefficient is", where, "give a number; 0 trains without")
        if own == 0:
            return None
        coefficient = own
    return RouterLoss(function, int(experts), int(per_token), float(coefficient))
