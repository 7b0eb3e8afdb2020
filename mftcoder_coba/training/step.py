"""One optimizer step of the multi-task objective (DESIGN: L = sum_k w_k S_k / N_k over the global batch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mftcoder_coba.balancing import Balancer
from mftcoder_coba.data import Batch
from mftcoder_coba.engine import Engine
from mftcoder_coba.errors import RunFailure


class WeightMismatchError(RunFailure):
    """Ranks computed different task weights; they would train different models."""


@dataclass(frozen=True)
class StepOutcome:
    """What one step did, the same on every rank.

    losses: [K] S_k / N_k, NaN for tasks absent from the global batch. denominators: [K] N_k. tokens: [K] supervised tokens.
    total_tokens: all tokens but padding. weights: [K] used. loss: L. skipped: loss or gradient were not finite, nothing changed.
    router_loss: of a mixture-of-experts model, before its coefficient (`objective.router_loss`); not in `loss`. None: the model has none.
    """

    loss: float
    losses: np.ndarray
    denominators: np.ndarray
    tokens: np.ndarray
    total_tokens: int
    weights: np.ndarray
    grad_norm: float
    skipped: bool
    router_loss: float | None = None


@dataclass(frozen=True)
class TaskLosses:
    """Measured over a global batch, the same on every rank.

    losses: [K] S_k / N_k, NaN for absent tasks. denominators: [K] N_k. tokens: [K] supervised tokens.
    """

    losses: np.ndarray
    denominators: np.ndarray
    tokens: np.ndarray


def inputs_of(engine: Engine, batch: Batch) -> tuple[torch.Tensor, ...]:
    """A micro-batch on the device: what the objective takes before the factors."""
    tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.task_ids, batch.loss_weights)
    return tuple(tensor.to(engine.device, non_blocking=True) for tensor in tensors)


def forward(engine: Engine, batch: Batch, task_factors: torch.Tensor | None, step_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(this micro-batch's part of L, its sums S_k); with `step_tokens` the router's loss, too: see `MultiTaskObjective.forward`."""
    return engine.forward(*inputs_of(engine, batch), task_factors, step_tokens)


def train_step(engine: Engine, balancer: Balancer, micro_batches: list[Batch], learning_rate: float) -> StepOutcome:
    """Trains on this rank's `accumulation_steps` micro-batches of the step.

    Three small all-reduces: the counts before the first backward; then sums and weight fingerprints before the last.

    Raises:
        WeightMismatchError: before the optimizer moves.
    """
    processes, device = engine.processes, engine.device
    tasks = len(micro_batches[0].denominators)
    routed = engine.module.router_loss is not None

    counts = np.concatenate(
        [sum(b.denominators for b in micro_batches), sum(b.tokens for b in micro_batches), [sum(b.total_tokens for b in micro_batches)]]
    )
    counts = processes.all_reduce_sum(torch.from_numpy(counts.astype(np.float64)).to(device)).cpu().numpy()
    denominators, tokens, total_tokens = counts[:tasks], counts[tasks : 2 * tasks], int(counts[-1])

    weights = balancer.weights(denominators)
    present = denominators > 0
    factors = np.divide(weights, denominators, out=np.zeros(tasks), where=present)
    task_factors = torch.from_numpy(factors).to(device)

    sums = torch.zeros(tasks + int(routed), dtype=torch.float64, device=device)
    for number, batch in enumerate(micro_batches[:-1], start=1):
        processes.watch.mark(f"micro-batch {number} of {len(micro_batches)}")
        loss, part = forward(engine, batch, task_factors, total_tokens)
        sums += part
        engine.backward(loss)
        engine.accumulate()
    processes.watch.mark(f"micro-batch {len(micro_batches)} of {len(micro_batches)}")
    loss, part = forward(engine, micro_batches[-1], task_factors, total_tokens)
    proof = torch.zeros(processes.world_size, dtype=torch.float64, device=device)
    proof[processes.rank] = _fingerprint(weights)
    totals = processes.all_reduce_sum(torch.cat([sums + part, proof]))
    # A loss that is not finite on any rank makes every rank's gradient NaN, which no ZeRO stage lets through to the
    # optimizer. Decided on the device: reading it here would leave a GPU idle before its backward pass.
    finite = torch.isfinite(totals[: len(sums)]).all()
    engine.backward(loss * torch.where(finite, 1.0, torch.nan).to(loss.dtype))

    processes.watch.mark("optimizer")
    host = totals.cpu().numpy()
    _check_fingerprints(host[len(sums) :])
    result = engine.step(learning_rate)
    losses = np.divide(host[:tasks], denominators, out=np.full(tasks, np.nan), where=present)
    return StepOutcome(
        loss=float((weights * np.where(present, losses, 0.0)).sum()),
        losses=losses,
        denominators=denominators,
        tokens=tokens.astype(np.int64),
        total_tokens=total_tokens,
        weights=weights,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        router_loss=float(host[tasks]) / max(total_tokens, 1) if routed else None,
    )


def losses_of(engine: Engine, batches: Iterable[Batch]) -> TaskLosses:
    """Measures over the batches of all ranks, and trains nothing.

    Every rank gives the same number of batches, at least one. One all-reduce. Dropout is as the engine has it.
    """
    parts = []
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            engine.processes.watch.mark(f"measuring losses, batch {number}")
            counts = torch.from_numpy(np.stack([batch.denominators, batch.tokens.astype(np.float64)])).to(engine.device)
            parts.append(torch.cat([forward(engine, batch, None)[1][None], counts]))
    sums, denominators, tokens = engine.processes.all_reduce_sum(torch.stack(parts).sum(0)).cpu().numpy()
    losses = np.divide(sums, denominators, out=np.full(len(sums), np.nan), where=denominators > 0)
    return TaskLosses(losses, denominators, tokens.astype(np.int64))


def _fingerprint(weights: np.ndarray) -> float:
    """48 bits of a hash of the weights' bytes, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(weights.astype(np.float64).tobytes(), digest_size=6).digest()))


def _check_fingerprints(fingerprints: np.ndarray) -> None:
    """fingerprints: [world size], one of each rank."""
    values, counts = np.unique(fingerprints, return_counts=True)
    if len(values) == 1:
        return
    # The majority is taken to be right; where there is none, rank 0.
    right = values[counts.argmax()] if counts.max() > len(fingerprints) // 2 else fingerprints[0]
    wrong = ", ".join(str(rank) for rank in np.flatnonzero(fingerprints != right))
    raise WeightMismatchError(
        f"the task weights of rank {wrong} differ from those of the other ranks. "
        "They are computed from all-reduced sums and must be equal to the bit: look for a faulty machine or different package versions on it."
    )
