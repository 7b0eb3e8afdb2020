"""What is written for GPUs, held against what the suite tests on CPUs. Each check takes a device, gives a figure, and fails or is skipped by an
exception; on the CPU the same functions run in the suite, as far as the libraries can."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_models import tiny_model

from mftcoder_coba.config import LoraConfig, ModelConfig
from mftcoder_coba.models import add_adapter, load_model
from mftcoder_coba.objective import MultiTaskObjective, OutputTransform, linear_cross_entropy

# Wide enough for every kernel's blocks: heads of 64, layers of multiples of 64.
WIDE = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512, "head_dim": 64}
LENGTHS = [[100, 1, 91, 64], [256], [3, 200, 53]]  # documents of each row, the last of them as padding
BFLOAT16_ERROR = 0.05  # of gradients, relative to those in float32; 8 bits through some layers


class CheckFailed(Exception):
    """What was found, and what was expected."""


class Skipped(Exception):
    """Why the check cannot run here."""


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"the package {package} is not installed")


def expect(found: float, at_most: float, what: str) -> str:
    if not found <= at_most:
        raise CheckFailed(f"{what}: {found:.2g}, expected at most {at_most:.2g}")
    return f"{what} {found:.1e} (at most {at_most:.0e})"


def batch(device: torch.device) -> tuple[Tensor, ...]:
    """Packed rows of two tasks, as `MultiTaskObjective` takes them; the last document of each row is padding."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    ids = torch.randint(WIDE["vocab_size"], positions.shape, generator=torch.Generator().manual_seed(0))
    tasks = (torch.arange(len(LENGTHS))[:, None] % 2).expand_as(ids).clone()
    labels = ids.roll(-1, 1)
    for row, lengths in enumerate(LENGTHS):
        tasks[row, sum(lengths[:-1]) :] = -1 if len(lengths) > 1 else 0
        labels[row, torch.tensor(lengths).cumsum(0) - 1] = -100
    labels[tasks < 0] = -100
    return tuple(values.to(device) for values in (ids, positions, labels, tasks, (labels >= 0).float()))


def gradients(model: nn.Module, device: torch.device, kernel: str = "torch", router: float = 0.0) -> Tensor:
    """All gradients of a weighted loss as one float32 vector on the CPU."""
    objective = MultiTaskObjective(model.to(device).train(), 2, kernel, router)
    objective.zero_grad()
    given = batch(device)
    factors = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device) / 100
    objective(*given, factors, int((given[3] >= 0).sum()))[0].backward()
    return torch.cat([parameter.grad.float().flatten().cpu() for parameter in model.parameters() if parameter.grad is not None])


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def bfloat16_training(device: torch.device) -> str:
    """Gradients in bfloat16 on the device against float32 on the CPU."""
    expected = gradients(tiny_model("llama", **WIDE), torch.device("cpu"))
    found = gradients(tiny_model("llama", **WIDE).bfloat16(), device)
    return expect(difference(found, expected), BFLOAT16_ERROR, "gradients")


def flash_attention(device: torch.device) -> str:
    """Packed rows through flash-attn's variable-length kernel in bfloat16, against SDPA in float32; isolation of documents."""
    needs("flash_attn")
    return compare_flash(tiny_model("llama", "flash_attention_2", torch.bfloat16, **WIDE), device)


def compare_flash(model: nn.Module, device: torch.device) -> str:
    """model: as `tiny_model` gives it, with any attention."""
    expected = gradients(tiny_model("llama", **WIDE), device)
    text = expect(difference(gradients(model, device), expected), BFLOAT16_ERROR, "gradients")
    MultiTaskObjective(model, 2).check_isolation(batch(device)[0][:1, :32])
    return text


def liger_loss(device: torch.device) -> str:
    """Liger's loss with a factor for each token against the reference, in float32 and bfloat16."""
    needs("liger_kernel")
    from mftcoder_coba.objective.liger import liger_cross_entropy

    return compare_losses(liger_cross_entropy, device)


def compare_losses(function, device: torch.device) -> str:
    texts = []
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, BFLOAT16_ERROR)):
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(size, 256, generator=generator).to(device, dtype).requires_grad_() for size in (300, 5000))
        labels, factors = torch.randint(5000, (300,), generator=generator).to(device), torch.rand(300, generator=generator).to(device)
        for transform in (OutputTransform(), OutputTransform(scale=0.25, cap=5.0)):
            results = []
            for one in (function, linear_cross_entropy):
                loss, losses, *_ = one(hidden, weight, None, labels, factors, transform)
                results.append(torch.cat([part.float().flatten() for part in (losses, *torch.autograd.grad(3 * loss, (hidden, weight)))]))
            text = expect(difference(*results), limit, f"{str(dtype).removeprefix('torch.')}")
        texts.append(text)
    return "; ".join(texts)


def four_bit_base(device: torch.device) -> str:
    """LoRA on a base quantised by bitsandbytes, against LoRA on a base that holds the same numbers in float32."""
    needs("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    lora = LoraConfig(kind="lora", rank=4, alpha=8.0, dropout=0.0)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        model = add_adapter(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
        return model

    with tempfile.TemporaryDirectory() as folder:
        plain = tiny_model("llama", **WIDE)
        plain.save_pretrained(folder)
        quantised = load_model(ModelConfig(path=folder, dtype="bfloat16"), "sdpa", device)
    for name, layer in quantised.named_modules():
        if isinstance(layer, Linear4bit):
            plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    expected = gradients(adapted(plain), torch.device("cpu"))
    return expect(difference(gradients(adapted(quantised), device), expected), BFLOAT16_ERROR, "gradients")


def experts(device: torch.device) -> str:
    """A mixture of experts with its router's loss, in float32 on the device and on the CPU."""
    wide = {**WIDE, "num_key_value_heads": 2}
    expected, found = (gradients(tiny_model("mixtral", **wide), where, router=0.1) for where in (torch.device("cpu"), device))
    return expect(difference(found, expected), 1e-3, "gradients")
