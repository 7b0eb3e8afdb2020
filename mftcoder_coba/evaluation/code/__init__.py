"""Pass@k of code that a model has written.

problems     the files of HumanEval and HumanEval-X
languages    a problem and a completion -> a program
sandbox      where the programs run; `inside` is its inner side
passing      programs -> passed or not -> pass@k
"""

from __future__ import annotations

from pathlib import Path

from mftcoder_coba.caches import cache_folder

__all__ = ["libraries_folder"]


def libraries_folder(cache_dir: str | None) -> Path:
    """Where `data_tools.code_libraries` puts what HumanEval-X's programs use. cache_dir: the config's `data.cache_dir`."""
    return cache_folder(cache_dir) / "code_libraries"
