"""Peak memory of the loss: supervised tokens in chunks, against full logits.

    PYTHONPATH=. python tests/benchmarks/loss_memory.py

Tiny Llama, vocabulary 50,000, one row of 4,096 tokens, all supervised: the case in which nothing is saved by leaving
unsupervised tokens out. Each variant runs in a process of its own; memory is its peak above that of a pass through the same
model's last hidden states, so that what is compared is the loss with its gradient.
"""

from __future__ import annotations

import resource
import subprocess
import sys

VOCABULARY, LENGTH = 50_000, 4096


def peak_mib(variant: str) -> float:
    return float(subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True, check=True).stdout)


def measure(variant: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mftcoder_coba.objective import MultiTaskObjective

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH
    )
    objective = MultiTaskObjective(LlamaForCausalLM(config), 1)
    ids = torch.randint(VOCABULARY, (1, LENGTH))
    positions, zeros = torch.arange(LENGTH)[None], torch.zeros_like(ids)
    objective.hidden_states(ids, positions).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if variant == "chunked":
        objective(ids, positions, ids, zeros, torch.ones(1, LENGTH), torch.full((1,), 1.0 / LENGTH, dtype=torch.float64))[0].backward()
    elif variant == "full":
        logits = objective.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY).float(), ids.view(-1)).backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        full, chunked = peak_mib("full"), peak_mib("chunked")
        print(f"full logits   {full:8.0f} MiB\nin chunks     {chunked:8.0f} MiB\nratio         {chunked / full:8.3f}")
