"""The module that DeepSpeed wraps: a causal language model and the multi-task loss in one forward pass."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.models import document_borders
from mftcoder_coba.objective.liger import liger_cross_entropy
from mftcoder_coba.objective.linear_cross_entropy import OutputTransform, linear_cross_entropy
from mftcoder_coba.objective.router_loss import router_loss

# Relative change of hidden states that rounding alone may make when other documents of the row change.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class MultiTaskObjective(nn.Module):
    """A causal language model, asked for losses instead of logits.

    Only supervised tokens reach the output layer, in chunks, so memory never grows with rows x length x vocabulary.

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one.
        num_tasks: K.
        kernel: of the output layer's loss, where it is trained on; see `objective.liger`.
        router_loss_coefficient: see `objective.router_loss`; 0: no loss of a router.

    Raises:
        UserError: the model's output layer is not a plain linear one; its router's loss is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        kernel: Literal["torch", "liger"] = "torch",
        router_loss_coefficient: float | Literal["auto"] = 0.0,
    ):
        super().__init__()
        self.model = model
        self.output_loss = OutputLoss(_causal_lm(model), num_tasks, kernel)
        self.router_loss = router_loss(_causal_lm(model), router_loss_coefficient)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        task_ids: Tensor,
        loss_weights: Tensor,
        task_factors: Tensor | None,
        step_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch; tensors but `task_factors` are [rows, length], see `data.batches.Batch`.

        Args:
            task_factors: [K] float64, w_k / N_k of this step; None: no loss is wanted.
            step_tokens: tokens of the step's global batch that are no padding; None: the tasks' losses alone are wanted.

        Returns:
            the micro-batch's part of L (scalar float32), and the sums S_k of this micro-batch ([K] float64, detached). For a model with a
            router's loss and with `step_tokens`, its part is in the first, and [K + 1] sums are the second: T_m A_m is the last.
        """
        inputs = (labels, task_ids, loss_weights)
        if self.router_loss is None or step_tokens is None:
            return self.output_loss(*self.supervised(input_ids, position_ids, *inputs), task_factors)
        with self._tasks_told(task_ids):
            hidden, router_logits = self._backbone(input_ids, position_ids, output_router_logits=True)
        loss, sums = self.output_loss(*_supervised(hidden, *inputs), task_factors)
        if not router_logits:  # no layer of this model has experts
            return loss, torch.cat([sums, sums.new_zeros(1)])
        of_router = self.router_loss.token_sum(router_logits, task_ids >= 0)
        loss = loss + of_router * (self.router_loss.coefficient / max(step_tokens, 1))
        return loss, torch.cat([sums, of_router.detach().double().view(1)])

    def supervised(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, task_ids: Tensor, loss_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the supervised tokens alone: last hidden states [tokens, width]; labels, task ids and loss weights [tokens]."""
        return _supervised(self.hidden_states(input_ids, position_ids, task_ids), labels, task_ids, loss_weights)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Last hidden states [rows, length, width]. Documents are kept apart by their restarting positions: see `models.attention`.

        task_ids: needed where an adapter has experts.
        """
        with self._tasks_told(task_ids):
            return self._backbone(input_ids, position_ids)[0]

    def _tasks_told(self, task_ids: Tensor | None) -> contextlib.AbstractContextManager:
        """An adapter with experts wants to know each token's task."""
        return contextlib.nullcontext() if task_ids is None or not hasattr(self.model, "tokens_of") else self.model.tokens_of(task_ids)

    def _backbone(self, input_ids: Tensor, position_ids: Tensor, **wanted: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """(last hidden states [rows, length, width], the routers' logits of each layer where they are wanted)."""
        causal_lm = _causal_lm(self.model)
        rows, length = input_ids.shape
        backbone = getattr(causal_lm, causal_lm.base_model_prefix)
        if "flash" in causal_lm.config._attn_implementation:
            # Its variable-length kernel finds documents in one flat row only.
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
            if _takes_any_keyword(backbone):
                wanted |= document_borders(position_ids)
        output = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False, **wanted)
        return output.last_hidden_state.view(rows, length, -1), getattr(output, "router_logits", None)

    @torch.no_grad()
    def check_output_layer(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Compares the losses computed here with those from the model's own logits, on a few tokens [1, length].

        Raises:
            UserError: they are not finite; or they differ, so this model does something after its output layer that we do not know.
        """
        training = self.model.training
        self.model.eval()
        labels = input_ids.roll(-1, dims=1)[0, :-1]
        task_ids, ones = torch.zeros_like(input_ids), torch.ones(len(labels), device=labels.device)
        hidden = self.hidden_states(input_ids, position_ids, task_ids)[0, :-1]
        _, sums = self.output_loss(hidden, labels, task_ids[0, :-1], ones, None)
        with self._tasks_told(task_ids):
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[0, :-1].float()
        expected = nn.functional.cross_entropy(logits, labels, reduction="sum").double()
        self.model.train(training)
        if not torch.isfinite(expected):
            what = f"the model's loss on the first training sample is {expected.item():g}"
            raise UserError(what, "model.path", "look for damaged weights (NaN or infinite numbers), or try another model.dtype")
        if not torch.isclose(sums.sum(), expected, rtol=2e-2 if hidden.dtype == torch.bfloat16 else 1e-4):
            ours, theirs = sums.sum().item() / len(labels), expected.item() / len(labels)
            raise UserError(
                f"the model's own logits give a loss of {theirs:.4f} a token, its output layer alone {ours:.4f}",
                f"model architecture {type(_causal_lm(self.model)).__name__}",
                "this architecture changes its logits in a way that is not known here; please report it",
            )

    @torch.no_grad()
    def check_isolation(self, input_ids: Tensor) -> None:
        """Compares the hidden states of a document behind two others, on a few tokens [1, length] that stand for each of the three.

        Half of its tokens must not feel the change: rounding may send single ones to other experts.

        Raises:
            UserError: a document sees the one before it in its row.
        """
        training = self.model.training
        self.model.eval()
        causal_lm, length = _causal_lm(self.model), input_ids.shape[1]
        vocabulary = causal_lm.config.get_text_config().vocab_size
        positions = torch.arange(length, device=input_ids.device).repeat(1, 2)
        other = (input_ids + vocabulary // 2) % vocabulary
        rows = torch.cat([torch.cat([before, input_ids], dim=1) for before in (input_ids, other)])
        first, second = self.hidden_states(rows, positions.repeat(2, 1), torch.zeros_like(rows))[:, length:]
        self.model.train(training)
        change = ((first - second).float().norm(dim=-1) / first.float().norm(dim=-1)).median().item()
        if change > ROUNDING[first.dtype]:
            raise UserError(
                f"with attention {causal_lm.config._attn_implementation}, a document sees the one before it in its row: its hidden states change by "
                f"{change:.1%} with it",
                f"model architecture {type(causal_lm).__name__}",
                'this architecture cannot train on packed rows: set data.packing to "none" and model.attention to "sdpa"',
            )


@dataclass(frozen=True)
class OutputTokens:
    """What the output layer was given in one forward pass on this rank; supervised tokens only, detached.

    hidden: [tokens, width]. labels, task_ids: [tokens] int64. loss_weights: [tokens] float32. normalisers: [tokens]
    float32, see `linear_cross_entropy`.
    """

    hidden: Tensor
    labels: Tensor
    task_ids: Tensor
    loss_weights: Tensor
    normalisers: Tensor


@dataclass(frozen=True)
class OutputLayer:
    """weight: [vocabulary, width]. bias: [vocabulary] or None. Both detached."""

    weight: Tensor
    bias: Tensor | None
    transform: OutputTransform


class OutputLoss(nn.Module):
    """The output layer and the loss as one module, so that ZeRO-3 gathers the layer once, however many chunks a rank has.

    The layer belongs to the model. It is not registered here a second time: checkpoints hold it once.
    """

    def __init__(self, causal_lm: nn.Module, num_tasks: int, kernel: Literal["torch", "liger"] = "torch"):
        super().__init__()
        layer = causal_lm.get_output_embeddings()
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise UserError(
                f"the output layer is {type(layer).__name__}, not a plain linear layer",
                f"model architecture {type(causal_lm).__name__}",
                "leave the output layer out of adapter.target_modules",
            )
        self._layer = (layer,)
        self.num_tasks = num_tasks
        self.kernel = kernel
        self.transform = output_transform(causal_lm.config)
        self._collected: list[OutputTokens] | None = None

    @contextlib.contextmanager
    def collecting(self) -> Iterator[list[OutputTokens]]:
        """Every forward pass within it adds its tokens to the list. Nothing is kept otherwise."""
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None

    def layer(self, copy: bool = False) -> OutputLayer:
        """The output layer as it is now; with `copy` it stays so. Under ZeRO-3 the caller has gathered `external_parameters`."""
        weight, bias = (None if values is None else values.detach() for values in (self._layer[0].weight, self._layer[0].bias))
        return OutputLayer(weight.clone() if copy else weight, bias.clone() if copy and bias is not None else bias, self.transform)

    @property
    def trained(self) -> bool:
        """Whether the optimizer moves the output layer."""
        return any(parameter.requires_grad for parameter in self.external_parameters)

    @property
    def external_parameters(self) -> list[nn.Parameter]:
        """Parameters used here but owned by the model."""
        return list(self._layer[0].parameters())

    def forward(self, hidden: Tensor, labels: Tensor, task_ids: Tensor, loss_weights: Tensor, task_factors: Tensor | None) -> tuple[Tensor, Tensor]:
        """All [tokens, ...] of supervised tokens only; returns as `MultiTaskObjective.forward`."""
        layer = self._layer[0]
        factors = None if task_factors is None else (task_factors[task_ids] * loss_weights).float()
        given = (hidden, layer.weight, layer.bias, labels, factors, self.transform)
        # Liger has no normalisers to give, and cannot do without tokens.
        fused = self.kernel == "liger" and factors is not None and torch.is_grad_enabled() and self._collected is None and len(labels) > 0
        if fused:
            loss, token_losses = liger_cross_entropy(*given)
        else:
            loss, token_losses, normalisers = linear_cross_entropy(*given)
            if self._collected is not None:
                self._collected.append(OutputTokens(hidden.detach(), labels, task_ids, loss_weights, normalisers))
        sums = torch.zeros(self.num_tasks, dtype=torch.float64, device=hidden.device)
        sums.index_add_(0, task_ids, token_losses.double() * loss_weights)
        return loss, sums


def output_transform(config) -> OutputTransform:
    """What an architecture's config says of its logits."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale = scale / config.logits_scaling
    return OutputTransform(scale, getattr(config, "final_logit_softcapping", None))


def _causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _supervised(hidden: Tensor, labels: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Of the supervised tokens alone: hidden states [tokens, width]; labels and values [tokens]."""
    supervised = labels.view(-1) >= 0
    return hidden.reshape(-1, hidden.shape[-1])[supervised], *(value.view(-1)[supervised] for value in (labels, *values))


def _takes_any_keyword(module: nn.Module) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(module.forward).parameters.values())
