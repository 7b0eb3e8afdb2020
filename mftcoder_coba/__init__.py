"""mftcoder-coba: fine-tuning one large language model on many tasks at once, so that all tasks converge together."""

__version__ = "0.1.0"
