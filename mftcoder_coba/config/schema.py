"""What an experiment's JSON may hold: every key, its type, its default and what it means."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mftcoder_coba.config.adapters import AdapterConfig, CgcLoraConfig
from mftcoder_coba.config.balancers import BalancerConfig, CobaConfig, FixedConfig
from mftcoder_coba.config.section import Positive, SafeName, Section


class RunConfig(Section):
    name: SafeName = Field(description="the run's folder inside `dir`")
    dir: str = Field("runs", description="where run folders live")
    seed: int = Field(1234, ge=0, lt=2**32, description="of initial adapter values, dropout, the data order and the validation stream")
    data_order_seed: int | None = Field(None, ge=0, lt=2**32, description="of the data order alone; null: `seed`")
    hang_timeout_minutes: Annotated[float, Field(gt=0)] = Field(
        30.0, description="the run ends when no rank has got on for so long; longer than a step, a checkpoint or a validation batch ever takes"
    )

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_order_seed is None else self.data_order_seed


class ModelConfig(Section):
    path: str = Field(min_length=1, description="a Hugging Face folder, or a hub id")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    output_loss: Literal["torch", "liger"] = Field("torch", description="liger: fused kernels for the output layer's loss, on a GPU")
    gradient_checkpointing: bool = False
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


# The formats of samples and the fields that each of them reads.
FORMAT_FIELDS = {
    "mftcoder": ("chat_rounds",),
    "messages": ("messages",),
    "sharegpt": ("conversations", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_answer": ("prompt", "answer", "system"),
    "text": ("text",),
}
# MFTCoder's pairs of field names: short for `prompt_answer` with these two as prompt and answer.
FIELD_PAIRS = {
    f"{prompt}_{answer}": {"prompt": prompt, "answer": answer}
    for prompt, answer in (
        ("prompt", "response"),
        ("input", "output"),
        ("instruction", "output"),
        ("instruction", "response"),
        ("question", "response"),
        ("question", "answer"),
        ("query", "response"),
        ("query", "answer"),
    )
}
FormatName = Literal[tuple(FORMAT_FIELDS | FIELD_PAIRS)]
MetricName = Literal["span_f1", "exact_match", "bleu"]


class TaskConfig(Section):
    name: SafeName
    train: list[str] = Field(min_length=1, description="files (.jsonl, .jsonl.gz, .parquet), folders or globs")
    valid: list[str] = Field([], description="empty: `data.valid_fraction` of `train`, chosen by hash")
    test: list[str] = []
    format: FormatName = "mftcoder"
    fields: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {}, description='where the files name a field of the format otherwise: {"prompt": "question", "answer": "solution"}'
    )
    metrics: list[MetricName] = Field([], description="of generated answers, measured by `evaluate`")
    share: Annotated[float, Field(gt=0)] | Literal["temperature"] | None = Field(
        None, description='part of the sampled data; null: proportional to size; "temperature": proportional to size ^ (1 / data.temperature)'
    )

    @model_validator(mode="after")
    def _known_fields(self) -> TaskConfig:
        known = FORMAT_FIELDS.get(self.format, ())
        unknown = [name for name in self.fields if name not in known]
        if unknown:
            allowed = ", ".join(known) or 'none: use "format": "prompt_answer"'
            raise ValueError(f"`fields` names {', '.join(unknown)}; fields of the format {self.format}: {allowed}")
        return self


class MarkersConfig(Section):
    """Role markers of one's own: the text in front of each turn, and what ends an answer."""

    system: str
    user: str
    assistant: str = Field(min_length=1)
    end: Annotated[str, Field(min_length=1)] | None = Field(None, description="after an answer, supervised; null: the end-of-sequence token")


class DataConfig(Section):
    tasks: list[TaskConfig] = Field(min_length=1)
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    sequence_length: Annotated[int, Field(ge=8)] = Field(2048, description="tokens of a row at most")
    packing: Literal["best_fit", "none"] = "best_fit"
    too_long: Literal["drop", "truncate", "split"] = Field(
        "drop",
        description="what happens to a sample of more than `sequence_length` tokens: truncate keeps its start, or else its first answer; "
        "split makes documents of it, each at most so long",
    )
    temperature: Annotated[float, Field(ge=1)] = Field(2.0, description='of `"share": "temperature"`; 1 is proportional to size, more is more even')
    template: Literal["auto", "tokenizer", "mftcoder"] | MarkersConfig = Field(
        "auto", description="auto: the tokenizer's chat template if it has one, else `mftcoder`; or role markers of one's own"
    )
    on_error: Literal["stop", "skip"] = Field("stop", description="what happens at a line that cannot be read")
    cache_dir: str | None = Field(None, description="null: ~/.cache/mftcoder_coba")

    @model_validator(mode="after")
    def _names_and_shares(self) -> DataConfig:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tasks have the name {', '.join(twice)}: give each task a name of its own")
        if len({type(task.share) for task in self.tasks}) > 1:
            found = ", ".join(f"{task.name}: {json.dumps(task.share)}" for task in self.tasks)
            raise ValueError(f'`share` must be a number for all tasks, "temperature" for all, or null for all (proportional to size); here {found}')
        return self

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]


class TrainingConfig(Section):
    epochs: Annotated[float, Field(gt=0)] | None = Field(3, description="passes over the training data; null: `max_steps` alone decides")
    max_steps: Positive | None = Field(None, description="an upper bound on optimizer steps")
    global_batch_rows: Positive = Field(description="rows of one optimizer step, over all ranks")
    micro_batch_rows: Positive = Field(description="rows of one forward pass on one rank")
    learning_rate: Annotated[float, Field(gt=0)]
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = Field(0.03, description="below 1: a part of all steps; else a number of steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")
    reduction: Literal["token", "sample"] = Field(
        "token", description="a task's loss: mean over its tokens, or over its samples of their token means"
    )
    router_loss_coefficient: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="of the router's auxiliary loss in mixture-of-experts models; auto: the model's own; 0: none"
    )

    @model_validator(mode="after")
    def _bounds(self) -> TrainingConfig:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("both `epochs` and `max_steps` are null: the run would never end; give one of them")
        if self.global_batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"global_batch_rows ({self.global_batch_rows}) is not a multiple of micro_batch_rows ({self.micro_batch_rows}): "
                f"choose global_batch_rows = micro_batch_rows x ranks x accumulation steps"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate ({self.min_learning_rate:g}) is above learning_rate ({self.learning_rate:g})")
        return self


class EarlyStoppingConfig(Section):
    criterion: Annotated[str, Field(pattern=r"^(mean_ratio|worst_ratio|task:.+)$")] = Field(
        "mean_ratio", description="mean_ratio, worst_ratio, or task:NAME; the best step is where it is lowest"
    )
    patience: Positive | None = Field(5, description="validations without a new best before the run stops; null: never")


class ValidationConfig(Section):
    every_steps: Positive = 100
    balancer_rows_per_rank: Positive = Field(1, description="rows of the balancer's validation mini-batch on each rank")
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()


class CheckpointConfig(Section):
    every_steps: Positive = 100
    keep: Positive = Field(2, description="newest checkpoints to keep, beside the best one")
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: the newest in the run folder; never; or a path: one of this run's to go back to, or another's to begin at",
    )


class TrackingConfig(Section):
    log_every_steps: Positive = 10
    tensorboard: bool = True
    wandb: str | None = Field(None, description="a Weights & Biases project; needs the wandb package")


class Config(Section):
    """One experiment."""

    run: RunConfig
    model: ModelConfig
    adapter: AdapterConfig | None = Field(None, description="null: full-parameter training")
    data: DataConfig
    balancer: BalancerConfig = CobaConfig(kind="coba")
    training: TrainingConfig
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: dict[str, Any] = Field({"zero_optimization": {"stage": 2}}, description="a path, or DeepSpeed's own keys")

    @field_validator("balancer", mode="before")
    @classmethod
    def _balancer_is_coba_unless_named(cls, value: Any) -> Any:
        return {"kind": "coba", **value} if isinstance(value, dict) else value

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        stage = value.get("zero_optimization", {}).get("stage", 0) if isinstance(value.get("zero_optimization", {}), dict) else None
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_optimization.stage is {stage!r}; allowed: 0, 1, 2, 3")
        return value

    @model_validator(mode="after")
    def _across_sections(self) -> Config:
        names = self.data.task_names
        if isinstance(self.balancer, FixedConfig) and set(self.balancer.weights) != set(names):
            missing, unknown = sorted(set(names) - set(self.balancer.weights)), sorted(set(self.balancer.weights) - set(names))
            raise ValueError(f"balancer.weights must name every task once; missing: {missing or 'none'}, unknown: {unknown or 'none'}")
        if isinstance(self.adapter, CgcLoraConfig) and self.adapter.initial_adapter is None:
            clustered = {task for tasks in self.adapter.clusters.values() for task in tasks}
            missing, unknown = sorted(set(names) - clustered), sorted(clustered - set(names))
            if missing or unknown:
                raise ValueError(f"adapter.clusters must name every task once; missing: {missing or 'none'}, not in data.tasks: {unknown or 'none'}")
        criterion = self.validation.early_stopping.criterion
        if criterion.startswith("task:") and criterion[5:] not in names:
            raise ValueError(f"validation.early_stopping.criterion names the task {criterion[5:]!r}; tasks: {', '.join(names)}")
        return self

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)
