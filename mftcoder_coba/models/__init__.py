"""The model: loading, attention, adapters, and export in the formats that other tools load."""

from mftcoder_coba.models.adapters import adapter_names, add_adapter, check_adapter, count_parameters
from mftcoder_coba.models.attention import choose_attention, document_borders
from mftcoder_coba.models.cgc_lora import CgcLoraModel
from mftcoder_coba.models.export import recover_export, write_export
from mftcoder_coba.models.loading import check_sizes, load_model

__all__ = [
    "CgcLoraModel",
    "adapter_names",
    "add_adapter",
    "check_adapter",
    "check_sizes",
    "choose_attention",
    "count_parameters",
    "document_borders",
    "load_model",
    "recover_export",
    "write_export",
]
