"""Which experts there are, of which ranks, and which task sees which."""

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from mftcoder_coba.config import CgcLoraConfig, MoeLoraConfig
from mftcoder_coba.errors import UserError
from mftcoder_coba.models.cgc_lora import Structure, structure_of
from mftcoder_coba.models.cgc_lora.structure import shared_out


def asked(clusters, **changes):
    return CgcLoraConfig(**{"kind": "cgc_lora", "clusters": clusters} | changes)


@st.composite
def configs(draw):
    """A config whose rank is enough, and its tasks in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    clusters = {f"k.{number}": [f"t{number}.{task}" for task in range(size)] for number, size in enumerate(sizes)}
    common, own = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    assume(common + own)
    rank = draw(st.integers(common + own * max(sizes), 40))
    config = asked(
        clusters,
        common_experts=common,
        task_experts=own,
        rank=rank,
        alpha=draw(st.floats(0.5, 64)),
        scaling=draw(st.sampled_from(["rank", "expert_rank"])),
        budget=draw(st.sampled_from(["cluster", "task"])),
        task_embedding=draw(st.integers(1, 32)),
    )
    return config, draw(st.permutations([task for tasks in clusters.values() for task in tasks]))


@given(configs())
def test_ranks_of_experts_sum_to_the_budget_and_differ_by_one_at_most(drawn):
    config, tasks = drawn
    for cluster in structure_of(config, tasks).clusters:
        all_ranks = [*cluster.common, *(rank for ranks in cluster.tasks.values() for rank in ranks)]
        assert min(all_ranks) >= 1 and max(all_ranks) - min(all_ranks) <= 1
        if config.budget == "cluster":
            assert sum(all_ranks) == config.rank
        for task in cluster.tasks:
            assert len(cluster.visible(task)) == config.common_experts + config.task_experts
            assert config.budget == "cluster" or sum(cluster.visible(task)) == config.rank


@given(configs())
def test_ranks_of_tasks_in_a_cluster_differ_by_as_little_as_ranks_of_experts_allow(drawn):
    config, tasks = drawn
    for cluster in structure_of(config, tasks).clusters:
        totals = [sum(ranks) for ranks in cluster.tasks.values()]
        assert max(totals) - min(totals) <= 1


@given(configs())
def test_groups_partition_the_columns(drawn):
    config, tasks = drawn
    structure = structure_of(config, tasks)
    columns = [column for group in structure.groups for column in range(group.first, group.first + group.rank)]
    assert columns == list(range(len(columns)))
    assert all(group.ranks for group in structure.groups)
    assert len({group.name for group in structure.groups}) == len(structure.groups)


@given(configs())
def test_a_column_is_seen_by_its_own_task_or_by_all_tasks_of_its_cluster(drawn):
    config, tasks = drawn
    structure = structure_of(config, tasks)
    for task in structure.tasks:
        cluster, columns = structure.cluster_of(task), structure.columns(task)
        hidden = len(cluster.visible(task))
        for group in structure.groups:
            places = columns[group.first : group.first + group.rank]
            sees = group.cluster == cluster.name and group.task in (None, task)
            assert all((place < hidden) == sees for place in places)
        # Each expert has as many columns as its rank, in the order of the gates: common ones first.
        assert [place for place in columns if place < hidden] == [i for i, rank in enumerate(cluster.visible(task)) for _ in range(rank)]
        assert len(structure.expert_names(task)) == hidden == len(set(structure.expert_names(task)))


@given(configs())
def test_tasks_of_different_clusters_share_no_group(drawn):
    config, tasks = drawn
    structure = structure_of(config, tasks)
    seen = {task: {group.name for group in structure.visible_groups(task)} for task in structure.tasks}
    for one in structure.tasks:
        for other in structure.tasks:
            same = structure.cluster_of(one) is structure.cluster_of(other)
            shared = {structure.cluster_of(one).name} if same and config.common_experts else set()
            assert one == other or seen[one] & seen[other] == shared


@given(configs())
def test_a_structure_survives_json(drawn):
    structure = structure_of(*drawn)
    again = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    assert again == structure and again.groups == structure.groups and again.tasks == structure.tasks


@given(configs(), st.lists(st.sampled_from(["new.1", "new.2", "new.3"]), unique=True, min_size=1))
def test_an_extension_keeps_what_was_there_and_repeats_itself(drawn, more):
    config, tasks = drawn
    assume(config.rank >= config.common_experts + config.task_experts * len(more))  # else the new cluster is refused
    earlier = structure_of(config, tasks)
    first = earlier.clusters[0]
    added = {first.name: [*first.tasks, more[0]], **({"another": more[1:]} if len(more) > 1 else {})}
    config = config.model_copy(update={"clusters": added})
    grown = structure_of(config, more, earlier)
    for cluster, before in zip(grown.clusters, earlier.clusters, strict=False):
        assert (cluster.name, cluster.scaling, cluster.common) == (before.name, before.scaling, before.common)
        assert list(cluster.tasks.items())[: len(before.tasks)] == list(before.tasks.items())
    assert grown.clusters[0].tasks[more[0]] == list(first.tasks.values())[-1]
    assert structure_of(config, more, grown) == grown


@given(st.integers(1, 200), st.integers(1, 64))
def test_a_rank_is_shared_out_evenly_larger_parts_first_or_refused(rank, experts):
    if rank < experts:
        with pytest.raises(UserError, match=f"{experts} experts share a rank of {rank}"):
            shared_out(rank, experts)
        return
    ranks = shared_out(rank, experts)
    assert sum(ranks) == rank and len(ranks) == experts and ranks == sorted(ranks, reverse=True) and ranks[0] - ranks[-1] <= 1


def test_sixteen_over_six_experts():
    structure = structure_of(asked({"c": ["x", "y"]}, rank=16), ["x", "y"])
    assert structure.to_dict()["clusters"][0] | {"scaling": None} == {
        "name": "c",
        "scaling": None,
        "common": (3, 3),
        "tasks": {"x": (3, 2), "y": (3, 2)},
    }
    assert structure.columns("y") == [0] * 3 + [1] * 3 + [4] * 5 + [2] * 3 + [3] * 2
    assert structure.expert_names("y") == ["c 1", "c 2", "y 1", "y 2"]


def test_moelora_is_one_cluster_of_common_experts():
    structure = structure_of(MoeLoraConfig(kind="moe_lora", experts=5, rank=12), ["x", "y"])
    assert [(group.name, group.ranks) for group in structure.groups] == [("all", (3, 3, 2, 2, 2))]
    assert structure.columns("x") == structure.columns("y")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"clusters": {"a": ["x", "y"], "b": ["y"]}}, "names y twice: a task belongs to one cluster"),
        ({"clusters": {"a": ["x", "x"]}}, "names x twice"),
        ({"clusters": {}}, "at least 1 item"),
        ({"clusters": {"a": []}}, "at least 1 item"),
        ({"clusters": {"a/b": ["x"]}}, "should match pattern"),
        ({"clusters": {"a": ["x:y"]}}, "should match pattern"),
        ({"common_experts": 0, "task_experts": 0}, "a task would have no expert"),
        ({"common_experts": -1}, "greater than or equal to 0"),
        ({"budget": "all"}, "'cluster' or 'task'"),
        ({"scaling": "alpha"}, "'rank' or 'expert_rank'"),
        ({"trained": []}, "at least 1 item"),
        ({"clusters": {"a": ["x", "y"]}, "rank": 5}, "`rank` is 5, to be shared by 6 experts of the cluster a: set it to at least 6"),
        ({"rank": 3, "budget": "task"}, "`rank` is 3, to be shared by 4 experts"),
        ({"experts": 4}, "Extra inputs are not permitted"),
    ],
)
def test_mistakes_within_the_section_end_at_validation(changes, words):
    with pytest.raises(ValidationError, match=words):
        asked(**{"clusters": {"a": ["x"]}} | changes)
