"""Numbers of a run before it starts.

steps       rows and steps, the balancer's mini-batches       mixture   what the first epoch is made of
empty_model the model from its config, without weights        passes    FLOPs and kept tensors of a micro-batch
memory      bytes of a GPU by kind                            traffic   bytes that a GPU sends
cluster     all of these for a number of GPUs                 showing   the lines of `plan`

The first two are all that a run needs, and all that is imported here; the others load models and DeepSpeed.
"""

from mftcoder_coba.planning.mixture import Mixture, TaskMixture, accounting, mixture
from mftcoder_coba.planning.steps import StepPlan, accumulation_steps, balancer_stream, plan_steps, step_lines, training_schedule

__all__ = [
    "Mixture",
    "StepPlan",
    "TaskMixture",
    "accounting",
    "accumulation_steps",
    "balancer_stream",
    "mixture",
    "plan_steps",
    "step_lines",
    "training_schedule",
]
