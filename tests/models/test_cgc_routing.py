"""Which token meets which experts: packed rows, gradient checkpointing, nested and failing calls, generation."""

import pytest
import torch
from experts import TASKS, assert_near, experts_config, experts_model, gradients, loss_of, plain_lora, randomise, token_ids
from tiny_models import tiny_model
from torch import nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.models import add_adapter
from mftcoder_coba.objective import MultiTaskObjective

ARCHITECTURES = ["llama", "qwen2", "phi", "gpt_neox"]
IDS = token_ids()
# Numbers of TASKS, one for each row: the second and the third are of one cluster, the first is of another.
ROWS = torch.tensor([[0], [1], [2]]).expand_as(IDS)


def document(task, length, seed):
    """ids, positions, labels, tasks of one document, [length] each. The first three tokens are not supervised; the last one is, by some label,
    for else nothing would depend on it."""
    ids = token_ids(1, length, seed)[0]
    labels = ids.roll(-1)
    labels[:3] = -100
    return ids, torch.arange(length), labels, torch.full_like(ids, task)


def joined(documents, length):
    """A row of documents, with padding behind them."""
    padding = length - sum(len(document[0]) for document in documents)
    tail = (torch.full((padding,), 7), torch.arange(padding), torch.full((padding,), -100), torch.full((padding,), -1))
    return [torch.cat(parts) for parts in zip(*documents, tail, strict=True)]


def batch_of(rows):
    ids, positions, labels, tasks = (torch.stack(values) for values in zip(*rows, strict=True))
    return ids, positions, labels, tasks, (labels >= 0).float()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-6)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_of_three_tasks_equals_three_rows(architecture, dtype, tolerance):
    """Attention over another length, and sums over other numbers of tokens, round otherwise: about 1e-6 in gradients of float32. In float64 the
    gates, the loss and some architectures' norms are float32 all the same."""
    documents = [document(0, 9, 1), document(1, 7, 2), document(2, 8, 3)]
    packed, apart = batch_of([joined(documents, 28)]), batch_of([joined([one], 12) for one in documents])
    factors = torch.tensor([0.3, 0.05, 0.2], dtype=torch.float64)
    results = []
    for batch in (packed, apart):
        model = experts_model(architecture=architecture).to(dtype)
        objective = MultiTaskObjective(model, 3)
        ids, positions, _, tasks, _ = batch
        hidden = objective.hidden_states(ids, positions, tasks)[tasks >= 0].detach()
        loss, sums = objective(*batch, factors)
        loss.backward()
        results.append((hidden, loss.detach(), sums, gradients(model)))
    (hidden, loss, sums, grads), (*expected, expected_grads) = results
    for actual, one in zip((hidden, loss, sums), expected, strict=True):
        assert_near(actual, one, tolerance)
    assert len(grads) == len(expected_grads) == len(model.adapter_names())
    for name, gradient in grads.items():
        assert_near(gradient, expected_grads[name], tolerance)


def test_rows_that_mix_tasks_differ_from_rows_of_one_task():
    """The test above can fail: the wrong task numbers give other hidden states."""
    objective = MultiTaskObjective(experts_model(), 3)
    ids, positions, _, tasks, _ = batch_of([joined([document(0, 9, 1), document(1, 7, 2)], 16)])
    right, wrong = objective.hidden_states(ids, positions, tasks), objective.hidden_states(ids, positions, torch.zeros_like(tasks))
    assert torch.equal(right[:, :9], wrong[:, :9]) and (right[:, 9:] - wrong[:, 9:]).abs().max() > 1e-2


def test_a_task_by_name_and_by_number_give_the_same():
    model = experts_model()
    with model.tokens_of(ROWS):
        together = model(IDS).logits
    for row, task in enumerate(TASKS):
        assert_near(together[row], model(IDS[row : row + 1], task=task).logits[0])


def checkpointed(architecture="llama", dropout=0.0, checkpointing=True):
    base = tiny_model(architecture)
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return experts_model(experts_config(dropout=dropout), base=base).train()


def counted_calls(model):
    """The number of times that the first adapted layer computed."""
    calls = []
    model.base_model.get_submodule(model.layer_names[0]).register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointing_gives_the_same_gradients(architecture, dropout):
    found = []
    for checkpointing in (False, True):
        model = checkpointed(architecture, dropout, checkpointing)
        calls = counted_calls(model)
        torch.manual_seed(3)
        with model.tokens_of(ROWS):
            loss = loss_of(model, IDS)
        loss.backward()
        assert len(calls) == (2 if checkpointing else 1)
        found.append(gradients(model))
    assert len(found[0]) == len(model.adapter_names()) and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_survives_a_forward_pass_of_other_tasks_before_the_backward_pass(dropout):
    found = []
    for disturbed in (False, True):
        model = checkpointed(dropout=dropout)
        torch.manual_seed(3)
        with model.tokens_of(ROWS):
            loss = loss_of(model, IDS)
        if disturbed:
            with model.tokens_of(ROWS.flip(0)[:, :6]):
                model(IDS[:, :6])
            with model.task("math"):
                loss.backward()  # within a context of another task
        else:
            loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_two_micro_batches_of_other_tasks_may_be_under_way_at_once():
    def losses(model):
        for ids, tasks in ((IDS, ROWS), (IDS.flip(0)[:2], torch.full_like(IDS[:2], 1))):
            with model.tokens_of(tasks):
                yield loss_of(model, ids)

    apart, together = checkpointed(), checkpointed()
    for loss in losses(apart):
        loss.backward()
    sum(losses(together)).backward()
    for name, gradient in gradients(apart).items():
        assert_near(gradients(together)[name], gradient)


def test_a_graph_that_is_kept_has_several_backward_passes():
    """As a balancer asks for that needs each task's gradient."""
    model, plain = checkpointed(), checkpointed(checkpointing=False)
    found = []
    for one in (model, plain):
        with one.tokens_of(ROWS):
            losses = [loss_of(one, IDS, chosen) for chosen in (slice(0, 1), slice(1, 3))]
            total = losses[0] + losses[1]
        parameters = [one.get_parameter(name) for name in one.adapter_names()]
        found.append([torch.autograd.grad(total, parameters, retain_graph=True) for _ in range(3)])
    for ours, expected in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_without_a_task_it_says_how_to_name_one():
    model = experts_model()
    with pytest.raises(UserError, match="which task it is has to be said") as error:
        model(IDS)
    assert "task=" in error.value.fix


def test_an_unknown_task_is_an_error_that_lists_the_known_ones():
    model = experts_model()
    for call in (lambda: model(IDS, task="maths"), lambda: model.generate(IDS, task="maths"), lambda: model.task("maths").__enter__()):
        with pytest.raises(UserError) as error:
            call()
        assert all(task in str(error.value) for task in [*TASKS, "maths"])


class Broken(nn.Module):
    def forward(self, *_, **__):
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("context", [lambda model: model.task("math"), lambda model: model.tokens_of(ROWS)], ids=["task", "tokens_of"])
def test_a_failed_pass_leaves_no_task_behind(context):
    model = experts_model()
    whole, model.base_model.model.layers[1] = model.base_model.model.layers[1], Broken()
    with pytest.raises(ArithmeticError), context(model):
        model(IDS)
    model.base_model.model.layers[1] = whole
    with pytest.raises(UserError, match="which task"):
        model(IDS)


def test_a_failed_recomputation_leaves_the_task_of_the_context():
    model = checkpointed()
    with model.task("math"):
        expected = model(IDS).logits.detach()
        with model.task("c"):
            loss = loss_of(model, IDS)
        handle = model.base_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: Broken()())
        with pytest.raises(ArithmeticError):
            loss.backward()
        handle.remove()
        assert torch.equal(model(IDS).logits, expected)


def test_contexts_nest():
    model = experts_model()
    alone = {task: model(IDS, task=task).logits for task in TASKS}
    with model.tokens_of(ROWS):
        mixed = model(IDS).logits
        with model.task("c"):
            assert torch.equal(model(IDS).logits, alone["c"])
            assert torch.equal(model(IDS, task="a.b").logits, alone["a.b"])
            with pytest.raises(UserError), model.task("nobody"):
                pass
            assert torch.equal(model(IDS).logits, alone["c"])
            with model.tokens_of(torch.zeros_like(IDS)):
                assert_near(model(IDS).logits, alone["math"])
        assert torch.equal(model(IDS).logits, mixed)


def test_a_layer_that_is_given_other_tokens_than_the_batch_is_named():
    model = experts_model()
    layer = model.base_model.model.layers[1].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :5],))
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj is given 15 tokens of a batch of 36") as error, model.tokens_of(ROWS):
        model(IDS)
    assert error.value.where == "adapter.target_modules"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_a_cache_gives_the_tokens_of_the_merged_lora_of_the_task(architecture):
    model = experts_model(architecture=architecture).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    found = set()
    for task in TASKS:
        ours = model.generate(IDS, attention_mask=torch.ones_like(IDS), task=task, **settings)
        merged = plain_lora(model, task, architecture).merge_and_unload().eval()
        expected = merged.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
        assert torch.equal(ours, expected) and ours.shape == (3, 24)
        found.add(tuple(ours.flatten().tolist()))
    assert len(found) == len(TASKS)


def test_generation_within_a_context_needs_no_name():
    model = experts_model().eval()
    with model.task("c"):
        within = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(within, model.generate(IDS, task="c", max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_tasks_are_numbered_as_the_caller_lists_them():
    reordered = add_adapter(tiny_model("llama"), experts_config(), TASKS[::-1])
    model = experts_model()
    randomise(reordered)
    reordered.load_tensors({name: model.get_parameter(name).detach() for name in model.adapter_names()})
    with model.tokens_of(ROWS), reordered.tokens_of(2 - ROWS):
        assert torch.equal(model(IDS).logits, reordered(IDS).logits)
