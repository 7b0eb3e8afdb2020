"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "pyarrow", "sentencepiece", "numpy", "flash-attn", "bitsandbytes")


@functools.cache
def versions() -> dict[str, str]:
    """Installed ones only."""
    found = {"python": platform.python_version(), "mftcoder_coba": _version("mftcoder-coba")} | {name: _version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
