"""What processes of `test_library.py` do that have not imported mergekit yet."""

from __future__ import annotations

import sys

from mftcoder_coba.merging import merge


def merge_with_each(models: str, out: str, methods: list[str]) -> None:
    """Prints for each method whether mergekit is imported after it."""
    for method in methods:
        merge(f"{models}/base", [f"{models}/model0", f"{models}/model1"], method, f"{out}/{method}")
        print("mergekit" in sys.modules)
