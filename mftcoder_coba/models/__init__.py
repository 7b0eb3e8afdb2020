"""The model: loading, attention, adapters, and export in the formats that other tools load."""

from mftcoder_coba.models.adapters import add_adapter, count_parameters
from mftcoder_coba.models.attention import choose_attention
from mftcoder_coba.models.export import recover_export, write_export
from mftcoder_coba.models.loading import load_model
from mftcoder_coba.models.quantisation import check_adapter

__all__ = ["add_adapter", "check_adapter", "choose_attention", "count_parameters", "load_model", "recover_export", "write_export"]
