"""One step, validation, early stopping, checkpoints, and the loop on one page (`trainer`)."""

from mftcoder_coba.training.trainer import train

__all__ = ["train"]
