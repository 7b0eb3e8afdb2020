"""What is looked at on every machine before a run starts: the processes tell each other, and one message names the machine that differs."""

from mftcoder_coba.preflight.checking import check_nodes

__all__ = ["check_nodes"]
