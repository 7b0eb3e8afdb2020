"""The only room that knows DeepSpeed: processes, collectives, the ZeRO engine."""

from mftcoder_coba.engine.deepspeed_config import build_deepspeed_config
from mftcoder_coba.engine.distributed import Processes, launched_local_rank, launched_world_size
from mftcoder_coba.engine.engine import Engine, StepResult

__all__ = ["Engine", "Processes", "StepResult", "build_deepspeed_config", "launched_local_rank", "launched_world_size"]
