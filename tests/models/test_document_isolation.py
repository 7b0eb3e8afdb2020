"""Packed documents do not see each other: their logits are those of each document alone."""

import pytest
import torch
from tiny_models import tiny_model

from mftcoder_coba.objective import MultiTaskObjective

LENGTHS = [7, 1, 13, 5]


def packed(documents):
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    return ids, positions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi", "gpt_neox"])
def test_packed_logits_equal_those_of_each_document_alone(architecture, attention):
    model = tiny_model(architecture, attention).eval()
    objective = MultiTaskObjective(model, 1).eval()
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(64, (length,), generator=generator) for length in LENGTHS]
    row = packed(documents)
    other = packed(documents[::-1])  # a batch of two rows with other borders
    ids, positions = torch.cat([row[0], other[0]]), torch.cat([row[1], other[1]])
    with torch.no_grad():
        together = model.get_output_embeddings()(objective.hidden_states(ids, positions))
        alone = [model(document[None]).logits[0] for document in documents]
    torch.testing.assert_close(together[0], torch.cat(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1], torch.cat(alone[::-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_positions_that_do_not_restart_would_leak(architecture):
    """The test above can fail: without restarting positions the second document sees the first."""
    model = tiny_model(architecture).eval()
    objective = MultiTaskObjective(model, 1).eval()
    first, second, other = torch.arange(5), torch.arange(6), torch.arange(20, 25)
    with torch.no_grad():
        hidden = [objective.hidden_states(torch.cat([head, second])[None], torch.arange(11)[None])[0, 5:] for head in (first, other)]
        isolated = [objective.hidden_states(*packed([head, second]))[0, 5:] for head in (first, other)]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3
    torch.testing.assert_close(isolated[0], isolated[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen2", "phi", "gpt_neox"])
def test_the_output_layer_check_accepts_known_architectures(architecture):
    objective = MultiTaskObjective(tiny_model(architecture), 1)
    objective.check_output_layer(torch.arange(12)[None], torch.arange(12)[None])
