"""Where this program and the libraries in it keep what they make once.

A run writes into two folders: its own, and the cache folder. Libraries have caches of their own in the home folder or in /tmp, and read
where these are from environment variables, most of them when they are imported: so this is called first.
"""

from __future__ import annotations

import os
from pathlib import Path

# Variable -> folder in the cache folder. What is downloaded stays where Hugging Face's other programs share it (HF_HOME).
LIBRARIES = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "torch_inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton/cache",
    "CUDA_CACHE_PATH": "cuda",
    "HF_MODULES_CACHE": "huggingface_modules",  # copies of Python code that comes with a model
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
}


def cache_folder(given: str | None) -> Path:
    """`given` is the config's `data.cache_dir`."""
    return Path(given) if given else Path.home() / ".cache" / "mftcoder_coba"


def keep_libraries_in(folder: Path) -> None:
    """Points the libraries to `folder`/libraries, where nobody has said otherwise; processes started later inherit it."""
    for name, part in LIBRARIES.items():
        os.environ.setdefault(name, str(folder / "libraries" / part))
