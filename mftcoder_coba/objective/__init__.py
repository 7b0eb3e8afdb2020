"""The multi-task objective: hidden states and labels -> per-task sums, and the weighted loss.

    L = sum_k w_k S_k / N_k                                                   (Eq. 1 of arXiv 2410.06741)

S_k is the sum of token losses of task k over the *global* batch (all micro-batches, all ranks), N_k its denominator.
Every supervised token carries the factor c = w_k / N_k wherever it is, so the gradient is exact for any split into
micro-batches, ranks and rows, and a micro-batch that holds one task only still feels that task's weight. Sums
travel; `training` divides once. What the gradients of single tasks would be at the output layer can be told from the
hidden states of the same pass (`output_gradients`). A mixture-of-experts model's router adds a loss of its own (`router_loss`).
"""

from mftcoder_coba.objective.liger import check_liger
from mftcoder_coba.objective.linear_cross_entropy import OutputTransform, linear_cross_entropy
from mftcoder_coba.objective.multi_task import MultiTaskObjective, OutputLayer, OutputTokens
from mftcoder_coba.objective.output_gradients import TaskTokens, gradient_norms, gradient_products

__all__ = [
    "MultiTaskObjective",
    "OutputLayer",
    "OutputTokens",
    "OutputTransform",
    "TaskTokens",
    "check_liger",
    "gradient_norms",
    "gradient_products",
    "linear_cross_entropy",
]
