"""Lengths -> rows. Pure and deterministic.

A plan is two arrays: `order`, the document numbers in the sequence in which they are laid down, and `starts`, where in
`order` each row begins. Row j is `order[starts[j] : starts[j + 1]]`.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

WINDOW_ROWS = 32
BLOCK = 1 << 16

Plan = tuple[np.ndarray, np.ndarray]  # order int32 [documents], starts int64 [rows + 1]


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, window: int | None = None) -> Plan:
    """Fills rows best-fit from a moving window over the documents.

    A row takes documents in their order while they leave room for at least half a mean document; the rest is filled with
    the longest documents that fit, out of the next `window` ones. So the mixture of tasks stays that of the order, and a
    row's first document is always the oldest one left: none is overtaken by more than `window` documents.

    Args:
        lengths: tokens of each document, 1..capacity.
        capacity: tokens of a row.
        window: from how many documents, the oldest one first, a row may choose. None: as many as fill `WINDOW_ROWS` rows, so
            that a document comes at most so many rows too early, however long documents are.

    Raises:
        ValueError: a document is empty or longer than a row.
    """
    lengths = np.asarray(lengths)
    documents = len(lengths)
    if documents and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths go from {lengths.min()} to {lengths.max()}; a row holds 1 to {capacity} tokens")
    tokens = int(lengths.sum(dtype=np.int64))
    spare = tokens // (2 * documents) if documents else 0
    window = window or max(1, WINDOW_ROWS * capacity * documents // max(1, tokens))
    # Plain integers are fast in a loop and big in memory: only a block of them exists at a time.
    upcoming = chain.from_iterable(lengths[first : first + BLOCK].tolist() for first in range(0, documents, BLOCK))
    in_window = [0] * window  # the length of document n, at n % window
    waiting: list[deque[int]] = [deque() for _ in range(capacity + 1)]  # documents in the window, by length
    lengths_waiting = 0  # bit n is set if a document of n tokens is waiting: the longest that fits is one shift away
    placed = bytearray(documents)
    order, starts = array("i"), array("q", [0])
    oldest = entered = 0
    while len(order) < documents:
        room, in_order = capacity, True
        while room:
            while oldest < documents and placed[oldest]:
                oldest += 1
            while entered < min(oldest + window, documents):
                size = next(upcoming)
                in_window[entered % window] = size
                waiting[size].append(entered)
                lengths_waiting |= 1 << size
                entered += 1
            size = in_window[oldest % window] if oldest < documents else 0
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
    return np.frombuffer(order, np.int32) if order else np.zeros(0, np.int32), np.frombuffer(starts, np.int64)


def one_per_row(lengths: Sequence[int] | np.ndarray, capacity: int, window: int | None = None) -> Plan:
    """Each document is a row of its own, in order; batches pad it dynamically."""
    return np.arange(len(lengths), dtype=np.int32), np.arange(len(lengths) + 1, dtype=np.int64)


PACKERS: dict[str, Callable[..., Plan]] = {"best_fit": pack, "none": one_per_row}
