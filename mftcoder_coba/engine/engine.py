"""One interface to DeepSpeed for the training loop, the same for ZeRO stages 0 to 3."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from mftcoder_coba.config import TrainingConfig
from mftcoder_coba.engine.distributed import Processes
from mftcoder_coba.engine.fragments import layout_of, update_working_weights
from mftcoder_coba.engine.states import read_states, write_states
from mftcoder_coba.engine.tensor_files import FileDigest
from mftcoder_coba.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global norm of the gradient of L before clipping; skipped: it was not finite, nothing was changed."""

    grad_norm: float
    skipped: bool


@contextlib.contextmanager
def partitioned_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Within it, transformers loads a model in parts under ZeRO-3, so that no rank ever holds all of it."""
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(deepspeed_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


class Engine:
    """A module under DeepSpeed.

    Args:
        module: whose forward returns (loss, ...); its parameters that require gradients are trained.
        deepspeed_config: from `build_deepspeed_config`.
        training: optimizer settings.
        external_parameters: (module, parameters) pairs: parameters that a module uses but another module owns.
    """

    def __init__(
        self,
        module: nn.Module,
        deepspeed_config: dict[str, Any],
        training: TrainingConfig,
        processes: Processes,
        external_parameters: list[tuple[nn.Module, list[nn.Parameter]]],
    ):
        self.processes = processes
        self.zero_stage = deepspeed_config["zero_optimization"]["stage"]
        self.accumulation_steps = deepspeed_config["gradient_accumulation_steps"]
        # DeepSpeed divides by the accumulation steps in backward and averages over ranks when it reduces. L is a sum over
        # all micro-batches of all ranks, so both are undone here, and nowhere else.
        self._loss_scale = float(self.accumulation_steps * processes.world_size)
        if self.zero_stage == 3:
            for user, parameters in external_parameters:
                for parameter in parameters:
                    deepspeed.zero.register_external_parameter(user, parameter)
        # The rate is set at each step. Until then it is 0: DeepSpeed's bfloat16 optimizer of stage 0 takes a step with zero
        # gradients to allocate its states, which must not decay the weights nor count in Adam's bias correction.
        # Stage 0 in float32 is plain torch inside DeepSpeed, which looks at nothing before it steps, and cannot clip what was taken away.
        self._step_is_ours = self.zero_stage == 0 and not deepspeed_config["bf16"]["enabled"]
        self._clipping = deepspeed_config["gradient_clipping"]
        if self._step_is_ours:
            deepspeed_config = deepspeed_config | {"gradient_clipping": 0.0}
        optimizer = torch.optim.AdamW(_parameter_groups(module, training.weight_decay), lr=0.0, betas=tuple(training.betas), fused=True)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config, dist_init_required=False)
        self._engine.train()  # transformers hands out models in evaluation mode, without dropout and gradient checkpointing
        if self.zero_stage == 0:
            optimizer.state.clear()
        self._layout = layout_of(self._engine.optimizer, self._engine.module)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this micro-batch's part of L. One call per micro-batch, `accumulation_steps` per step."""
        self._engine.backward(loss * self._loss_scale)

    def accumulate(self) -> None:
        """To be called after every micro-batch but the step's last, which `step` ends."""
        self._engine.step()

    def step(self, learning_rate: float) -> StepResult:
        """Clips, and applies AdamW with `learning_rate`, unless the gradient norm is not finite: then nothing changes."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._step_is_ours:
            return self._step_without_zero()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        skipped = bool(self._engine.optimizer.overflow)
        return StepResult(norm, skipped)

    def _step_without_zero(self) -> StepResult:
        with_gradient = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient])
        skipped = not torch.isfinite(norm).item()
        if skipped:
            self._engine.zero_grad()  # AdamW leaves parameters without a gradient alone
        elif self._clipping > 0:
            torch.nn.utils.clip_grads_with_norm_(with_gradient, self._clipping, norm)
        self._engine.step()
        return StepResult(norm.item(), skipped)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def gathered(self, parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
        """Within it, these parameters are whole on every rank, also under ZeRO-3. To be entered and left on all ranks."""
        return deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3)

    def save(self, folder: Path) -> dict[str, FileDigest]:
        """Writes this rank's part of what is trained into `folder`/states; `folder` exists.

        The files hold float32 parameters and optimizer states by name (layout: `engine/states.py`), no matter on how many ranks and in
        which ZeRO stage. Working weights in bfloat16 are left out, which are the parameters' rounding; so are frozen parameters and
        buffers, which come from the base model. Not collective: a rank that fails leaves no other one waiting.

        Returns:
            this rank's files, on the disk, by path relative to `folder`.

        Raises:
            OSError: a file could not be written whole.
        """
        return write_states(folder, self._layout, self.processes.rank, self.processes.world_size)

    def load(self, folder: Path) -> None:
        """Goes to the state that `save` wrote on any number of ranks and in any ZeRO stage. Collective.

        Raises:
            UserError: the checkpoint is damaged, or holds other parameters than this engine trains. The same on every rank.
        """
        error = None
        try:
            read_states(folder, self._layout)
        except UserError as found:
            error = found
        except OSError as found:
            error = UserError(f"rank {self.processes.rank} cannot read the checkpoint: {found}", str(folder))
        errors = [found for found in self.processes.gather_objects(error) if found is not None]
        if errors:
            raise errors[0]
        update_working_weights(self._engine.optimizer)

    def gather_state(self, model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Full tensors of `model` (a part of `module`) on the CPU of rank 0, by name; empty elsewhere.

        Args:
            names: of the parameters that are wanted; None: all, and buffers.

        Parameters are gathered one by one, so that memory holds one full parameter more than the result.
        """
        state: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if names is not None and name not in names:
                continue
            with self.gathered([parameter]):
                if self.processes.is_main:
                    state[name] = parameter.detach().to("cpu", copy=True)
        if self.processes.is_main and names is None:
            state.update({name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers() if name in model.state_dict().keys()})
        return state

    def close(self) -> None:
        self._engine.destroy()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
