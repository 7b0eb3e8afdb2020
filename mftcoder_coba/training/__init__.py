"""One step, validation, early stopping, checkpoints, and the loop on one page (`trainer`)."""

from mftcoder_coba.training.trainer import TrainingResult, train

__all__ = ["TrainingResult", "train"]
