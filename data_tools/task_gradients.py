"""Gradients of the tasks' losses with respect to a fresh LoRA on the base model, of two halves of a few training samples each.

One factor of a fresh LoRA is zero, so only that one has a gradient: the gradient of the whole weight matrices, seen through the other, random one.
One process, without DeepSpeed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mftcoder_coba.config import Config, LoraConfig
from mftcoder_coba.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mftcoder_coba.data import Batch, Corpus
    from mftcoder_coba.objective import MultiTaskObjective

PRODUCT_COLUMNS = 2**20  # of gradients that are in float64 at one time


def adapter_of(config: Config) -> LoraConfig:
    """The plain LoRA, of the rank and on the layers of the experiment's adapter where it has one. Its scale cancels in cosines."""
    given = config.adapter
    if given is None:
        return LoraConfig(kind="lora", dropout=0.0)
    return LoraConfig(kind="qlora" if given.quantised else "lora", rank=given.rank, target_modules=given.target_modules, dropout=0.0)


def load_objective(config: Config, corpus: Corpus, device: torch.device) -> tuple[MultiTaskObjective, list[nn.Parameter]]:
    """(the base model with the LoRA, as in training; the parameters that have a gradient, which alone require one).

    Raises:
        UserError: the model cannot be loaded, or does not fit the tokens or the adapter.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mftcoder_coba.data import load_tokenizer
    from mftcoder_coba.models import add_adapter, check_adapter, check_sizes, choose_attention, load_model
    from mftcoder_coba.objective import MultiTaskObjective

    adapter = adapter_of(config)
    check_adapter(adapter, corpus.tasks, {})
    attention = choose_attention(config.model.attention, device, config.model.dtype)
    disable_progress_bar()
    torch.manual_seed(config.run.seed)
    if adapter.quantised:
        model = add_adapter(load_model(config.model, attention, device), adapter)
    else:
        model = add_adapter(load_model(config.model, attention), adapter).to(device)
    check_sizes(model, load_tokenizer(config.model.path, config.model.trust_remote_code), config)
    objective = MultiTaskObjective(model, len(corpus.tasks))
    ids = torch.from_numpy(np.array(corpus.splits["train"][0].sample(0)[0][:32], np.int64))[None].to(device)
    objective.check_output_layer(ids, torch.arange(ids.shape[1], device=device)[None])
    objective.train()  # gradients are checkpointed only then
    parameters = []
    for parameter in objective.parameters():
        if parameter.requires_grad and parameter.detach().any():  # its partner is zero, so its gradient is
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameters.append(parameter)
    return objective, parameters


def chosen_samples(corpus: Corpus, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Of each task, the numbers of at most `count` training samples in two halves, longest first.

    They follow from the seed, the task's name and its number of samples: other tasks of the experiment do not change them.

    Raises:
        UserError: a task has one sample only.
    """
    halves = []
    for index, (name, data) in enumerate(zip(corpus.tasks, corpus.splits["train"], strict=True)):
        if len(data) < 2:
            raise UserError(f"{name} has one training sample; two at least tell its gradient from noise", f"data.tasks[{index}].train")
        order = np.random.default_rng((seed, zlib.crc32(name.encode()))).choice(len(data), min(count, len(data)), replace=False)
        longest_first = [sorted(part.tolist(), key=lambda sample: -int(data.lengths[sample])) for part in (order[::2], order[1::2])]
        halves.append((longest_first[0], longest_first[1]))
    return halves


def batches_of(config: Config, corpus: Corpus, task: int, samples: Sequence[int]) -> list[Batch]:
    """One sample a row, `training.micro_batch_rows` rows a batch."""
    from mftcoder_coba.data import collate

    rows, data = config.training.micro_batch_rows, corpus.splits["train"]
    return [
        collate(
            [[(task, sample)] for sample in samples[start : start + rows]],
            data,
            len(corpus.tasks),
            corpus.pad_token_id,
            config.training.reduction,
            max_length=config.data.sequence_length,
            isolate=False,
        )
        for start in range(0, len(samples), rows)
    ]


def half_gradients(
    objective: MultiTaskObjective, parameters: Sequence[nn.Parameter], halves: Sequence[Sequence[Batch]], task: int, device: torch.device
) -> torch.Tensor:
    """[2, n] float32 on the CPU: what each half adds to the gradient of the task's mean loss; the parameters flattened, one after the other."""
    import torch

    denominator = sum(batch.denominators[task] for half in halves for batch in half)
    factors = torch.zeros(objective.output_loss.num_tasks, dtype=torch.float64, device=device)
    factors[task] = 1.0 / denominator
    total = torch.zeros(len(halves), sum(parameter.numel() for parameter in parameters), dtype=torch.float32, device=device)
    for half, batches in enumerate(halves):
        for batch in batches:
            tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.task_ids, batch.loss_weights)
            loss, _ = objective(*(tensor.to(device) for tensor in tensors), factors)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            start = 0
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[half, start : start + parameter.numel()] += gradient.flatten()
                start += parameter.numel()
    return total.cpu()


def inner_products(gradients: torch.Tensor) -> NDArray[np.float64]:
    """[K, 2, n] -> [K, 2, K, 2], in float64."""
    import torch

    tasks, halves, size = gradients.shape
    flat = gradients.view(tasks * halves, size)
    products = torch.zeros(tasks * halves, tasks * halves, dtype=torch.float64)
    for start in range(0, size, PRODUCT_COLUMNS):
        part = flat[:, start : start + PRODUCT_COLUMNS].double()
        products += part @ part.t()
    return products.view(tasks, halves, tasks, halves).numpy()
