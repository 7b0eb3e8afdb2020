"""The `balancer` section: one class for each method."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from mftcoder_coba.config.section import Positive, Section

# What a method looks at: training losses, or those of validation mini-batches (the CoBa paper's starred versions).
Signal = Literal["train", "validation"]


class CobaConfig(Section):
    """CoBa, arXiv 2410.06741. M is the number of mini-batches that cover the validation set."""

    kind: Literal["coba"]
    tau: Annotated[float, Field(gt=0)] = 5.0
    window: Annotated[int, Field(ge=2)] | Literal["auto"] = Field("auto", description="N, in observations; auto: 2 M")
    warmup: Positive | Literal["auto"] = Field("auto", description="W, in observations; auto: M")
    update_interval: Positive = Field(1, description="steps between two observations")
    slope: Literal["ols", "paired"] = "ols"
    df_history: Literal["warmup", "all"] = Field(
        "warmup", description="where the divergence factor's sum starts: at W, or at 1 as printed in the paper"
    )
    variant: Literal["paper", "mftcoder"] = Field("paper", description="mftcoder: the formula of MFTCoder's repository, to match old runs")
    scores: Annotated[list[Literal["rcs", "acs", "df"]], Field(min_length=1)] = Field(
        ["rcs", "acs", "df"], description="which parts take part, for ablations: rcs alone, acs alone, both at equal parts, or blended by df"
    )

    @model_validator(mode="after")
    def _scores_and_variant(self) -> CobaConfig:
        if len(set(self.scores)) < len(self.scores):
            raise ValueError("`scores` names a part twice")
        if "df" in self.scores and len(self.scores) < 3:
            raise ValueError('`scores` has "df" without both "rcs" and "acs", which it blends')
        if self.variant == "mftcoder" and (self.slope != "ols" or len(self.scores) < 3):
            raise ValueError('"variant": "mftcoder" has plain slopes and all scores')
        return self


class UniformConfig(Section):
    kind: Literal["uniform"]


class ProportionalConfig(Section):
    kind: Literal["proportional"]


class FixedConfig(Section):
    kind: Literal["fixed"]
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1, description="a number for each task; they are scaled to sum to 1")


class RandomConfig(Section):
    """Random loss weighting, arXiv 2111.10603: softmax of standard normal numbers, new ones each step."""

    kind: Literal["random"]
    seed: int = Field(0, ge=0, lt=2**32)


class LbtwConfig(Section):
    """Loss-balanced task weighting (AAAI 2019): (loss / loss at the start) ^ b."""

    kind: Literal["lbtw"]
    exponent: Annotated[float, Field(gt=0)] = Field(0.5, description="b")
    signal: Signal = "train"


class DwaConfig(Section):
    """Dynamic weight average, arXiv 1803.10704: softmax of (mean loss of a window / that of the window before) / T."""

    kind: Literal["dwa"]
    temperature: Annotated[float, Field(gt=0)] = Field(2.0, description="T")
    window: Positive = Field(10, description="steps whose mean loss is compared")


class UncertaintyConfig(Section):
    """Uncertainty weighting, arXiv 1705.07115: each task's log-variance is learned with a rate of its own."""

    kind: Literal["uncertainty"]
    learning_rate: Annotated[float, Field(gt=0)] = 0.025


class GradNormConfig(Section):
    """GradNorm, arXiv 1711.02257, on the output layer: each task's weighted gradient norm follows its training rate."""

    kind: Literal["gradnorm"]
    alpha: Annotated[float, Field(ge=0)] = Field(1.5, description="how strongly a task that is behind is pulled; 0: equal norms")
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.025, description="of the task weights, by Adam")
    signal: Signal = "train"


class FamoConfig(Section):
    """FAMO, arXiv 2306.03792."""

    kind: Literal["famo"]
    learning_rate: Annotated[float, Field(gt=0)] = 0.025
    decay: Annotated[float, Field(ge=0)] = Field(0.01, description="weight decay of the task logits")
    signal: Signal = "train"


class MetaWeightingConfig(Section):
    """MetaWeighting (Findings of ACL 2022): weights follow the gradient of the validation losses with respect to them."""

    kind: Literal["metaweighting"]
    learning_rate: Annotated[float, Field(gt=0)] = Field(0.025, description="of the task logits, by Adam")
    gradients: Literal["output_layer", "all"] = Field(
        "output_layer", description="of which parameters; all: exact, with a backward pass for each task, for small models"
    )


BalancerConfig = Annotated[
    CobaConfig
    | UniformConfig
    | ProportionalConfig
    | FixedConfig
    | RandomConfig
    | LbtwConfig
    | DwaConfig
    | UncertaintyConfig
    | GradNormConfig
    | FamoConfig
    | MetaWeightingConfig,
    Field(discriminator="kind"),
]
# Each method's section by its kind.
_SECTIONS = get_args(get_args(BalancerConfig)[0])
BALANCERS: dict[str, type[Section]] = {get_args(section.model_fields["kind"].annotation)[0]: section for section in _SECTIONS}
