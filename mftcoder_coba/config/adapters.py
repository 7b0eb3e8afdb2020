"""The `adapter` section: one class for each kind."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from mftcoder_coba.config.section import Positive, SafeName, Section


class LowRankConfig(Section):
    """What all adapters have in common."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="PEFT's target_modules: module names, a pattern, or all linear layers but the output one"
    )


class LoraConfig(LowRankConfig):
    kind: Literal["lora", "qlora"] = Field(description="qlora: LoRA on a base model that is quantised to 4-bit NormalFloat by bitsandbytes")

    @property
    def quantised(self) -> bool:
        return self.kind == "qlora"


class ExpertsConfig(LowRankConfig):
    """Low-rank experts that a gate mixes for each task. What the papers leave open (expert counts, their ranks, scaling) is our choice."""

    scaling: Literal["rank", "expert_rank"] = Field(
        "rank", description="of what the experts add: alpha / rank, or alpha / (the mean rank of one expert)"
    )
    task_embedding: Positive = Field(16, description="width of a task's learned embedding, from which its gate is computed")
    quantised: bool = Field(False, description="on a base model that is quantised to 4-bit NormalFloat, as qlora is")
    initial_adapter: str | None = Field(
        None, description="a folder of such an adapter (a run's export) to begin with; all that it holds is kept, its clusters with their ranks"
    )
    trained: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description='clusters, or "CLUSTER/TASK" for what belongs to a task alone; all else stays as it is. null: all that is named here'
    )

    def _check_rank(self, experts: int, of: str = "") -> None:
        if self.initial_adapter is None and self.rank < experts:  # else ranks are stored already
            raise ValueError(f"`rank` is {self.rank}, to be shared by {experts} experts{of}: set it to at least {experts}, or have fewer experts")


class CgcLoraConfig(ExpertsConfig):
    """CGC-LoRA, arXiv 2402.01684: each cluster of tasks has experts that are common to its tasks, and experts of each task."""

    kind: Literal["cgc_lora"]
    clusters: dict[SafeName, Annotated[list[SafeName], Field(min_length=1)]] = Field(min_length=1, description="cluster -> names of its tasks")
    common_experts: Annotated[int, Field(ge=0)] = Field(2, description="experts that all tasks of a cluster see")
    task_experts: Annotated[int, Field(ge=0)] = Field(2, description="experts that one task alone sees")
    budget: Literal["cluster", "task"] = Field(
        "cluster",
        description="`rank` is that of all experts of a cluster together, as many parameters as a LoRA of it; or of those that one task sees",
    )

    @model_validator(mode="after")
    def _tasks_have_one_cluster(self) -> CgcLoraConfig:
        names = [task for tasks in self.clusters.values() for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`clusters` names {', '.join(twice)} twice: a task belongs to one cluster")
        if self.common_experts + self.task_experts == 0:
            raise ValueError("`common_experts` and `task_experts` are both 0: a task would have no expert")
        for cluster, tasks in self.clusters.items():
            self._check_rank(self.common_experts + self.task_experts * (len(tasks) if self.budget == "cluster" else 1), f" of the cluster {cluster}")
        return self


class MoeLoraConfig(ExpertsConfig):
    """MOELoRA, arXiv 2310.18339: all tasks share all experts, each with a gate of its own."""

    kind: Literal["moe_lora"]
    experts: Positive = 8

    @model_validator(mode="after")
    def _experts_have_ranks(self) -> MoeLoraConfig:
        self._check_rank(self.experts)
        return self


AdapterConfig = Annotated[LoraConfig | CgcLoraConfig | MoeLoraConfig, Field(discriminator="kind")]
# Each adapter's section by its kind.
ADAPTERS: dict[str, type[Section]] = {
    kind: section for section in get_args(get_args(AdapterConfig)[0]) for kind in get_args(section.model_fields["kind"].annotation)
}
