"""Tasks and clusters that are added to a saved adapter, and what is trained then."""

import pytest
import torch
from experts import CLUSTERS, TASKS, assert_near, experts_config, experts_model, loss_of, randomise, token_ids
from tiny_models import tiny_model

from mftcoder_coba.config import MoeLoraConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models import add_adapter, check_adapter

IDS = token_ids()
NEW_TASK = {"code.v1": ["a.b", "c", "new.task"]}
NEW_CLUSTER = {"law": ["case", "statute"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model whose adapter is in the folder, and the folder."""
    model, folder = experts_model(), tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model, str(folder)


def grown(saved, clusters, tasks, **changes):
    return experts_model(experts_config(clusters, initial_adapter=saved[1], **changes), tasks)


def trainable(model):
    return {name for name in model.adapter_names() if model.get_parameter(name).requires_grad}


def names_of(model, cluster, *tasks):
    """With tasks: what belongs to each of them alone. Else what all tasks of the cluster see."""
    chosen = {id(p) for part in (map(model.own_parameters, tasks) if tasks else [model.common_parameters(cluster)]) for p in part}
    assert chosen
    return {name for name in model.adapter_names() if id(model.get_parameter(name)) in chosen}


@pytest.mark.parametrize(
    "clusters, tasks, added",
    [(NEW_TASK, ["new.task"], ["new.task"]), (NEW_CLUSTER, ["case", "statute"], ["case", "statute"]), (CLUSTERS, TASKS, [])],
    ids=["task", "cluster", "nothing"],
)
def test_earlier_tensors_stay_bit_for_bit_and_earlier_tasks_give_the_same_logits(saved, clusters, tasks, added):
    """More columns may change the order in which a product adds up, so that logits are compared within rounding."""
    earlier = saved[0]
    model = grown(saved, clusters, [*tasks])
    assert sorted(model.structure.tasks) == sorted([*TASKS, *added])
    for name in earlier.adapter_names():
        assert torch.equal(model.get_parameter(name), earlier.get_parameter(name)), name
    for task in TASKS:
        assert_near(model(IDS, task=task).logits, earlier(IDS, task=task).logits)
    base = tiny_model("llama")(IDS).logits
    for task in added:
        # Its own experts begin at zero; the common ones of an earlier cluster help it at once.
        assert torch.equal(model(IDS, task=task).logits, base) == (clusters is NEW_CLUSTER)


@pytest.mark.parametrize("clusters, tasks, trained", [(NEW_TASK, ["new.task"], ["code.v1/new.task"]), (NEW_CLUSTER, ["case", "statute"], None)])
def test_training_what_was_added_changes_no_earlier_tensor_and_no_earlier_task(saved, clusters, tasks, trained):
    model = grown(saved, clusters, tasks, trained=trained)
    before = {task: model(IDS, task=task).logits for task in TASKS}
    start = {name: model.get_parameter(name).detach().clone() for name in model.adapter_names()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with model.tokens_of(torch.arange(3)[:, None].expand_as(IDS) % len(tasks)):
            loss_of(model, IDS).backward()
        optimizer.step()
    moved = {name for name in model.adapter_names() if not torch.equal(model.get_parameter(name), start[name])}
    assert moved == trainable(model) == set(start) - set(saved[0].adapter_names())
    for task in TASKS:
        assert torch.equal(model(IDS, task=task).logits, before[task])


@pytest.mark.parametrize(
    "clusters, tasks, trained, expected",
    [
        (CLUSTERS, TASKS, None, [("code.v1",), ("code.v1", "a.b", "c"), ("qa",), ("qa", "math")]),
        (CLUSTERS, ["math"], ["qa"], [("qa",), ("qa", "math")]),
        (CLUSTERS, ["a.b"], ["code.v1"], [("code.v1",), ("code.v1", "a.b")]),  # weight decay alone would move what is of c
        (CLUSTERS, ["a.b"], ["code.v1/a.b"], [("code.v1", "a.b")]),
        (CLUSTERS, ["c", "math"], ["qa", "code.v1/c"], [("qa",), ("qa", "math"), ("code.v1", "c")]),
        ({"qa": ["math"]}, ["math"], None, [("qa",), ("qa", "math")]),
        (NEW_CLUSTER, ["case", "statute"], None, [("law",), ("law", "case", "statute")]),
        (NEW_TASK, ["new.task"], ["code.v1/new.task"], [("code.v1", "new.task")]),
    ],
)
def test_exactly_what_is_named_is_trained(saved, clusters, tasks, trained, expected):
    model = grown(saved, clusters, tasks, trained=trained)
    assert trainable(model) == set().union(*(names_of(model, *one) for one in expected))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name not in model.adapter_names())


def test_a_task_of_moelora_can_be_added(tmp_path):
    def config(**changes):
        return MoeLoraConfig(kind="moe_lora", experts=4, rank=8, dropout=0.0, **changes)

    earlier = add_adapter(tiny_model("llama"), config(), ["x", "y"])
    randomise(earlier)
    earlier.save_pretrained(tmp_path)
    model = add_adapter(tiny_model("llama"), config(initial_adapter=str(tmp_path), trained=["all/z"]), ["z"])
    assert trainable(model) == {"gates.embedding:z", "gates.gate:z"}
    for task in ("x", "y"):
        assert torch.equal(model(IDS, task=task).logits, earlier(IDS, task=task).logits)
    assert torch.equal(model.gates.of("z"), torch.full((14, 4), 0.25))


@pytest.mark.parametrize(
    "changes, tasks, words",
    [
        ({"clusters": {"code.v1": ["c"]}}, ["c", "poems"], ["poems", "adapter.clusters"]),
        ({"clusters": {"code.v1": ["c"], "qa": ["math", "maht"]}}, ["c", "math"], ["maht", "math", "adapter.clusters"]),
        ({"trained": ["code"]}, TASKS, ["code", "code.v1", "adapter.trained"]),
        ({"trained": ["qa/c"]}, TASKS, ["qa/c", "adapter.trained"]),
        ({"trained": ["qa"]}, TASKS, ["a.b, c", "adapter.trained"]),
        ({"trained": ["qa", "code.v1/c"]}, TASKS, ["a.b", "adapter.trained"]),
        ({"clusters": {"g": ["x"]}, "common_experts": 1, "task_experts": 0, "trained": ["g/x"]}, ["x"], ["g/x", "no parameters", "adapter.trained"]),
    ],
)
def test_mistakes_of_a_fresh_adapter_are_told(changes, tasks, words):
    with pytest.raises(UserError) as error:
        add_adapter(tiny_model("llama"), experts_config(**changes), tasks)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"common_experts": 1}, ["common experts of cluster code.v1: 2", "1 in the config"]),
        ({"task_experts": 3}, ["task experts of cluster code.v1: 2", "3 in the config"]),
        ({"task_embedding": 8}, ["task_embedding: 16", "8 in the config"]),
        ({"alpha": 32.0}, ["scaling of cluster code.v1: 1.5", "2 in the config"]),
        ({"rank": 32}, ["scaling of cluster code.v1: 1.5", "0.75 in the config"]),
        ({"scaling": "expert_rank"}, ["scaling of cluster code.v1: 1.5", "6 or 9 in the config"]),
        ({"clusters": {"qa": ["math", "c"]}}, ["c in another cluster", "adapter.clusters"]),
        ({"clusters": {"code.v1": ["a.b", "c"]}}, ["math", "adapter.trained"]),
        ({"target_modules": ["q_proj", "v_proj"]}, ["14 layers", "for 4", "target_modules"]),
        ({"trained": ["law"]}, ["law", "code.v1"]),
    ],
)
def test_an_initial_adapter_of_other_settings_is_refused(saved, changes, words):
    with pytest.raises(UserError) as error:
        add_adapter(tiny_model("llama"), experts_config(initial_adapter=saved[1], **changes), TASKS)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("budget", ["cluster", "task"])
def test_scaling_over_the_expert_rank_is_compared_with_that_of_the_initial_adapter(tmp_path, budget):
    settings = {"scaling": "expert_rank", "budget": budget}
    first = experts_model(experts_config(**settings))
    first.save_pretrained(tmp_path / "first")
    second = experts_model(experts_config(NEW_TASK, initial_adapter=str(tmp_path / "first"), **settings), ["new.task"])
    second.save_pretrained(tmp_path / "second")
    third = {"code.v1": ["one.more"]}
    again = experts_model(experts_config(third, initial_adapter=str(tmp_path / "second"), **settings), ["one.more"])
    assert again.structure.clusters[0].scaling == first.structure.clusters[0].scaling
    for changes in ({"alpha": 25.0}, {"scaling": "rank"}):
        with pytest.raises(UserError, match="scaling of cluster code.v1"):
            grown((None, str(tmp_path / "second")), third, ["one.more"], **settings | changes)


def test_what_can_be_seen_without_the_model_is_told_before_it_is_loaded(saved):
    check_adapter(experts_config(initial_adapter=saved[1]), TASKS, {})
    with pytest.raises(UserError, match="poems"):
        check_adapter(experts_config(), [*TASKS, "poems"], {})
    with pytest.raises(UserError, match="common experts"):
        check_adapter(experts_config(initial_adapter=saved[1], common_experts=3), TASKS, {})
    with pytest.raises(UserError, match="cannot be read"):
        check_adapter(experts_config(initial_adapter=saved[1] + "/nothing"), TASKS, {})
