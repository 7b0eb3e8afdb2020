"""Lengths -> rows. Pure and deterministic.

A plan is two arrays: `order`, the document numbers in the sequence in which they are laid down, and `starts`, where in
`order` each row begins. Row j is `order[starts[j] : starts[j + 1]]`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

WINDOW_DOCUMENTS = 512

Plan = tuple[np.ndarray, np.ndarray]  # order int32 [documents], starts int64 [rows + 1]


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = WINDOW_DOCUMENTS) -> Plan:
    """Fills rows best-fit from a moving window over the documents.

    A row takes documents in their order while they leave room for at least half a mean document; the rest is filled with
    the longest documents that fit, out of the next `window` ones. So the mixture of tasks stays that of the order, and a
    row's first document is always the oldest one left: none is overtaken by more than `window` documents.

    Args:
        lengths: tokens of each document, 1..capacity.
        capacity: tokens of a row.
        window: how many documents ahead of the oldest one a row may choose from.

    Raises:
        ValueError: a document is empty or longer than a row.
    """
    sizes = np.asarray(lengths, np.int64).tolist()
    if sizes and not 1 <= min(sizes) <= max(sizes) <= capacity:
        raise ValueError(f"lengths go from {min(sizes)} to {max(sizes)}; a row holds 1 to {capacity} tokens")
    spare = sum(sizes) // (2 * len(sizes)) if sizes else 0
    waiting: list[deque[int]] = [deque() for _ in range(capacity + 1)]  # documents in the window, by length
    lengths_waiting = 0  # bit n is set if a document of n tokens is waiting: the longest that fits is one shift away
    placed = bytearray(len(sizes))
    order: list[int] = []
    starts = [0]
    oldest = entered = 0
    while len(order) < len(sizes):
        room, in_order = capacity, True
        while room:
            while oldest < len(sizes) and placed[oldest]:
                oldest += 1
            while entered < min(oldest + window, len(sizes)):
                waiting[sizes[entered]].append(entered)
                lengths_waiting |= 1 << sizes[entered]
                entered += 1
            size = sizes[oldest] if oldest < len(sizes) else 0
            in_order = in_order and bool(size) and (room == capacity or size == room or size + spare <= room)
            if not in_order:
                size = (lengths_waiting & ((2 << room) - 1)).bit_length() - 1
                if size < 0:
                    break
            # Documents of one length wait in their order, so the oldest document of all is the first of its length.
            document = waiting[size].popleft()
            if not waiting[size]:
                lengths_waiting ^= 1 << size
            placed[document] = 1
            order.append(document)
            room -= size
        starts.append(len(order))
    return np.array(order, np.int32), np.array(starts, np.int64)


def one_per_row(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = 1) -> Plan:
    """Each document is a row of its own, in order; batches pad it dynamically."""
    return np.arange(len(lengths), dtype=np.int32), np.arange(len(lengths) + 1, dtype=np.int64)


PACKERS: dict[str, Callable[..., Plan]] = {"best_fit": pack, "none": one_per_row}
