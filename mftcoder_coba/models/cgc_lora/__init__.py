"""CGC-LoRA (arXiv 2402.01684) and MOELoRA (arXiv 2310.18339): one frozen base model, and low-rank experts that are mixed for each task.

For a task t of a cluster with n_c common experts and n_s experts of each task

    h = W0 x + s sum_i g_t[i] B_i A_i x,   g_t = softmax(W_t e_t) over the n_c + n_s experts that t sees

Number and rank of experts and the scaling are left open by the papers; ours: the ranks of a cluster's experts sum to `rank`
(they differ by 1 at most where it cannot be divided), s = alpha / rank. MOELoRA is one cluster of all tasks without own experts.

structure   which experts there are, who sees which: pure          gates    softmax(W_t e_t) of all layers
layer       a linear layer with experts; which token has which task    model    all of it, saved and loaded
per_task    a task's part as a plain LoRA adapter
"""

from __future__ import annotations

from mftcoder_coba.models.cgc_lora.model import CgcLoraModel, read_adapter
from mftcoder_coba.models.cgc_lora.structure import Cluster, Group, Structure, structure_of

__all__ = ["CgcLoraModel", "Cluster", "Group", "Structure", "read_adapter", "structure_of"]
