"""Which experts an adapter has, of which ranks, and which task sees which. Pure.

A cluster of tasks has experts that all its tasks see (common), and experts that one task alone sees (its own). Experts that the same
tasks see are one *group*: they share a pair of tensors. The groups of all clusters, one after another, make the columns [R] of an
adapted layer, R the total rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mftcoder_coba.config import CgcLoraConfig, ExpertsConfig, MoeLoraConfig
from mftcoder_coba.errors import UserError, suggestion

ALL = "all"  # the one cluster of MOELoRA


@dataclass(frozen=True)
class Cluster:
    """common: the rank of each common expert. tasks: task -> the rank of each of its own experts. scaling: s, a factor of all of them."""

    name: str
    scaling: float
    common: tuple[int, ...]
    tasks: dict[str, tuple[int, ...]]

    def visible(self, task: str) -> tuple[int, ...]:
        """Ranks of the experts that the task sees: the common ones, then its own."""
        return self.common + self.tasks[task]


@dataclass(frozen=True)
class Group:
    """Experts that the same tasks see. task: None for those of all tasks of the cluster. first: their first column."""

    cluster: str
    task: str | None
    ranks: tuple[int, ...]
    first: int

    @property
    def name(self) -> str:
        return self.cluster if self.task is None else f"{self.cluster}:{self.task}"

    @property
    def rank(self) -> int:
        return sum(self.ranks)


@dataclass(frozen=True)
class Structure:
    """All clusters of an adapter. task_embedding: width of a task's embedding."""

    clusters: tuple[Cluster, ...]
    task_embedding: int

    @property
    def tasks(self) -> list[str]:
        return [task for cluster in self.clusters for task in cluster.tasks]

    @property
    def groups(self) -> list[Group]:
        """In the order of the columns; without those that have no expert."""
        found: list[Group] = []
        for cluster in self.clusters:
            for task, ranks in [(None, cluster.common), *cluster.tasks.items()]:
                if ranks:
                    found.append(Group(cluster.name, task, ranks, sum(group.rank for group in found)))
        return found

    def cluster_of(self, task: str) -> Cluster:
        """Raises UserError for a task that is not known."""
        for cluster in self.clusters:
            if task in cluster.tasks:
                return cluster
        raise UserError(f"the adapter knows no task of this name; it knows {', '.join(self.tasks)}", f"task {task}")

    def visible_groups(self, task: str) -> list[Group]:
        """The common group, then the task's own; either may be missing."""
        cluster = self.cluster_of(task)
        return [group for group in self.groups if group.cluster == cluster.name and group.task in (None, task)]

    def expert_names(self, task: str) -> list[str]:
        """Of the experts that the task sees, for people."""
        cluster = self.cluster_of(task)
        own = [f"{task} {number}" for number in range(1, len(cluster.tasks[task]) + 1)]
        return [f"{cluster.name} {number}" for number in range(1, len(cluster.common) + 1)] + own

    def columns(self, task: str) -> list[int]:
        """[R] For each column the place of its expert among those that the task sees; their number for columns that it does not see."""
        hidden = len(self.cluster_of(task).visible(task))
        columns, expert = [hidden] * sum(group.rank for group in self.groups), 0
        for group in self.visible_groups(task):
            column = group.first
            for rank in group.ranks:
                columns[column : column + rank] = [expert] * rank
                column, expert = column + rank, expert + 1
        return columns

    def to_dict(self) -> dict[str, Any]:
        return {"task_embedding": self.task_embedding, "clusters": [asdict(cluster) for cluster in self.clusters]}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Structure:
        clusters = [
            Cluster(entry["name"], entry["scaling"], tuple(entry["common"]), {task: tuple(ranks) for task, ranks in entry["tasks"].items()})
            for entry in tree["clusters"]
        ]
        return cls(tuple(clusters), tree["task_embedding"])


def structure_of(config: ExpertsConfig, tasks: Sequence[str], earlier: Structure | None = None) -> Structure:
    """The experts that a config asks for, with what `earlier` holds: its clusters stay as they are, and may get more tasks.

    Args:
        tasks: of the experiment.
        earlier: of `config.initial_adapter`.

    Raises:
        UserError: a rank that cannot be shared out, a task without a cluster, a cluster that was made with other settings.
    """
    asked = clusters_of(config, tasks)
    if earlier is not None and config.task_embedding != earlier.task_embedding:
        raise _other("task_embedding", str(earlier.task_embedding), str(config.task_embedding), config)
    known = {cluster.name: cluster for cluster in earlier.clusters} if earlier else {}
    clusters = {
        **known,
        **{name: _extended(known[name], members, config) if name in known else _new(name, members, config) for name, members in asked.items()},
    }
    structure = Structure(tuple(clusters.values()), config.task_embedding)
    twice = sorted({task for task in structure.tasks if structure.tasks.count(task) > 1})
    if twice:
        raise UserError(
            f"the initial adapter has {', '.join(twice)} in another cluster", "adapter.clusters", "leave a task in the cluster that it has"
        )
    without = [task for task in tasks if task not in structure.tasks]
    if without:
        raise UserError(f"no cluster has the task {', '.join(without)}", "adapter.clusters", "name every task of data.tasks in one cluster")
    strangers = [task for members in asked.values() for task in members if task not in tasks and (earlier is None or task not in earlier.tasks)]
    if strangers:
        what = f"names {', '.join(strangers)}, which no data would train; {suggestion(strangers[0], tasks)}"
        raise UserError(what, "adapter.clusters", "name tasks of data.tasks")
    return structure


def clusters_of(config: ExpertsConfig, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Cluster -> tasks, as the config names them."""
    return config.clusters if isinstance(config, CgcLoraConfig) else {ALL: list(tasks)}


def shared_out(rank: int, experts: int) -> list[int]:
    """A rank as a sum of `experts` ranks that differ by 1 at most, the larger ones first.

    Raises:
        UserError: an expert would have no rank.
    """
    if rank < experts:
        raise UserError(
            f"{experts} experts share a rank of {rank}: some would have none", "adapter.rank", f"set it to at least {experts}, or have fewer experts"
        )
    return [rank // experts + (number < rank % experts) for number in range(experts)]


def _new(name: str, tasks: Sequence[str], config: ExpertsConfig) -> Cluster:
    common, own = _counts(config)
    if isinstance(config, CgcLoraConfig) and config.budget == "cluster":
        ranks = shared_out(config.rank, common + own * len(tasks))
        # Dealt out in turn, so that tasks differ as little as experts do.
        owned = {task: tuple(ranks[common + number :: len(tasks)]) for number, task in enumerate(tasks)}
    else:
        ranks = shared_out(config.rank, common + own)
        owned = {task: tuple(ranks[common:]) for task in tasks}
    return Cluster(name, _scaling(config, len(ranks)), tuple(ranks[:common]), owned)


def _extended(cluster: Cluster, tasks: Sequence[str], config: ExpertsConfig) -> Cluster:
    """The cluster with the tasks that it lacks; their experts are like those of its last task."""
    common, own = _counts(config)
    like = list(cluster.tasks.values())[-1]
    where = f"of cluster {cluster.name}"
    if len(cluster.common) != common:
        raise _other(f"common experts {where}", str(len(cluster.common)), str(common), config)
    if len(like) != own:
        raise _other(f"task experts {where}", str(len(like)), str(own), config)
    # It began with one of its tasks, or with more of them: those that came later left the scaling as it was.
    began = range(1, len(cluster.tasks) + 1) if isinstance(config, CgcLoraConfig) and config.budget == "cluster" else [1]
    possible = dict.fromkeys(_scaling(config, common + own * tasks_then) for tasks_then in began)
    if cluster.scaling not in possible:
        raise _other(f"scaling {where}", f"{cluster.scaling:g}", " or ".join(f"{value:g}" for value in possible), config)
    return replace(cluster, tasks=cluster.tasks | {task: like for task in tasks if task not in cluster.tasks})


def _scaling(config: ExpertsConfig, experts: int) -> float:
    """s of a cluster whose `experts` share the rank."""
    return config.alpha / config.rank * (experts if config.scaling == "expert_rank" else 1)


def _counts(config: ExpertsConfig) -> tuple[int, int]:
    """Common experts of a cluster, and own ones of each task."""
    return (config.experts, 0) if isinstance(config, MoeLoraConfig) else (config.common_experts, config.task_experts)


def _other(what: str, stored: str, asked: str, config: ExpertsConfig) -> UserError:
    return UserError(
        f"{what}: {stored} in the initial adapter, {asked} in the config", f"adapter.initial_adapter = {config.initial_adapter}", "use its settings"
    )
