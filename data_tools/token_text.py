"""Token ids -> text for people: in colour for terminals and pages, with marks where there is no colour."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text
from rich.theme import Theme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder puts for bytes that are no text
LONGEST = 32  # tokens that are waited for until they are text together
LEARNED, CONTEXT, SEPARATOR = "+ ", "  ", "¦"
SIGNS = {"\n": "↵\n", "\t": "⇥"}

# Two shades each, so that neighbours can be told apart; the greys and greens can be read on black and on white.
TERMINAL = Theme(
    {
        "learned0": "bold color(28)",
        "learned1": "bold color(34)",
        "context0": "color(246)",
        "context1": "color(242)",
        "special_learned": "bold reverse color(28)",
        "special_context": "reverse color(242)",
        "note": "color(67)",
        "border": "bold color(67)",
        "head": "bold",
    }
)
PAGE = Theme(
    {
        "learned0": "#0b4a1b on #c9f0d2",
        "learned1": "#0b4a1b on #a5dfb3",
        "context0": "#5a5a5a on #f4f4f4",
        "context1": "#5a5a5a on #e7e7e7",
        "special_learned": "bold #ffffff on #1c7a37",
        "special_context": "bold #ffffff on #6b6b6b",
        "note": "#1d5f9e",
        "border": "bold #1d5f9e",
        "head": "bold",
    }
)
PAGE_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tokens</title>
<style>
{stylesheet}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; color: {foreground}; background: {background}; }}
pre {{ margin: 0; font: 0.875rem/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<pre><code style="font-family:inherit">{code}</code></pre>
</body>
</html>
"""


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that are text together: nearly always one."""

    text: str
    ids: tuple[int, ...]
    special: bool = False


class TokenReader:
    """Takes token ids apart into pieces of text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)
        # Decoders drop the blank of a first word; behind this one they do not.
        self._before: list[int] = list(tokenizer("x", add_special_tokens=False)["input_ids"])
        self._text = cache(self._decoded)

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """All tokens, in order. Bytes that are no text stand as U+FFFD."""
        pieces: list[Piece] = []
        waiting: tuple[int, ...] = ()
        for token in ids:
            if token in self._special:
                pieces += self._taken(waiting, last=True)
                pieces.append(Piece(self._tokenizer.convert_ids_to_tokens(token), (token,), True))
                waiting = ()
            else:
                waiting += (token,)
                taken = list(self._taken(waiting))
                pieces += taken
                waiting = waiting[sum(len(piece.ids) for piece in taken) :]
        return pieces + list(self._taken(waiting, last=True))

    def _taken(self, waiting: tuple[int, ...], last: bool = False) -> Iterator[Piece]:
        """Pieces at the start of the tokens; those that may become text with the next ones stay behind, unless these are the last."""
        while waiting:
            text, size = self._text(waiting), len(waiting)
            if text.endswith(BROKEN):
                if not last and size < LONGEST:
                    return
            elif BROKEN in text:
                # What the new token left as it was could not be mended: broken bytes, or a real U+FFFD.
                size = max((size for size in range(1, size) if text.startswith(self._text(waiting[:size]))), default=size)
            yield Piece(self._text(waiting[:size]) or self._tokenizer.convert_ids_to_tokens(waiting[0]), waiting[:size])
            waiting = waiting[size:]

    def _decoded(self, ids: tuple[int, ...]) -> str:
        before, text = (
            self._tokenizer.decode([*self._before, *part], skip_special_tokens=False, clean_up_tokenization_spaces=False) for part in ((), ids)
        )
        return text[len(before) :]


def runs_of(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """bool [length] -> start and end of each run of equal values."""
    borders = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return zip(borders[:-1], borders[1:], strict=True)


def visible(pieces: list[Piece]) -> list[str]:
    """Texts of consecutive pieces with everything in them that is not seen otherwise: line breaks, tabs, control characters, and blanks
    at the ends of lines and beside special tokens."""
    joined = "".join("\n" if piece.special else piece.text for piece in pieces)
    characters = iter(re.sub("(?m)^ +| +$", lambda blanks: "·" * len(blanks[0]), joined))
    texts = ["".join(map(_sign, islice(characters, 1 if piece.special else len(piece.text)))) for piece in pieces]
    return [piece.text if piece.special else text for piece, text in zip(pieces, texts, strict=True)]


def _sign(character: str) -> str:
    if character in SIGNS or character.isprintable():
        return SIGNS.get(character, character)
    return character.encode("unicode_escape").decode("ascii")


class Writer:
    """Writes documents to a console.

    Args:
        coloured: show by style what is learned and where tokens end; else by marks.
        ids: put its number behind each token.
        max_tokens: of a run of learned or of context tokens; of longer ones, head and tail are written. 0: all.
    """

    def __init__(self, console: Console, coloured: bool, ids: bool = False, max_tokens: int = 600):
        self._console, self._coloured, self._ids, self._max_tokens = console, coloured, ids, max_tokens

    def legend(self) -> None:
        special, note = Text("special token", self._style("special_context")), Text("⟨n⟩", self._style("note"))
        if self._coloured:
            two = [[Text(word, f"{kind}{shade}") for shade, word in enumerate(words)] for kind, words in _LEGEND.items()]
            how: list[str | Text] = [*two[0], " ", *two[1], ", the shade changes with each token; ", special]
        else:
            how = [f'"{LEARNED}" learned, "{CONTEXT}" context; {SEPARATOR} between tokens; «', special, "»"]
        ids = "[n] token id; " if self._ids else ""
        self._print(Text.assemble(*how, f"; ↵ line break; ⇥ tab; · blank at an end; {ids}", note, " n tokens that are text only together"))

    def head(self, line: str) -> None:
        self._print(Text("\n").append(line, self._style("head")))

    def border(self, line: str) -> None:
        self._print(Text(f"── {line}", self._style("border")))

    def tokens(self, reader: TokenReader, ids: np.ndarray, learned: np.ndarray) -> None:
        """A document, ids int [length], learned bool [length], neither empty."""
        whole = Text()
        for start, end in runs_of(learned):
            pieces = reader.pieces(ids[start:end].tolist())
            head, left_out, tail = _shortened(pieces, self._max_tokens)
            text = self._drawn(head, bool(learned[start]))
            if left_out:
                self._on_new_line(text).append(f"... {left_out:,} more {'token' if left_out == 1 else 'tokens'} ...\n", self._style("note"))
                text.append_text(self._drawn(tail, bool(learned[start])))
            whole.append_text(text if self._coloured else self._prefixed(text, LEARNED if learned[start] else CONTEXT))
        self._console.print(self._on_new_line(whole), end="", soft_wrap=True)

    def _drawn(self, pieces: list[Piece], learned: bool) -> Text:
        text = Text()
        for number, (piece, shown) in enumerate(zip(pieces, visible(pieces), strict=True)):
            kind = "learned" if learned else "context"
            style = f"special_{kind}" if piece.special else f"{kind}{number % 2}"
            if piece.special and not self._coloured:
                shown = f"«{shown}»"
            note = f"⟨{len(piece.ids)}⟩" if len(piece.ids) > 1 else ""
            note += f"[{' '.join(map(str, piece.ids))}]" if self._ids else ""
            # What belongs to a token stands before the line break that it ends with.
            text.append(shown.removesuffix("\n"), self._style(style)).append(note, self._style("note"))
            if not self._coloured and number + 1 < len(pieces):
                text.append(SEPARATOR)
            if shown.endswith("\n"):
                text.append("\n")
        return text

    def _style(self, name: str) -> str:
        return name if self._coloured else ""

    def _prefixed(self, text: Text, prefix: str) -> Text:
        return Text("").join(Text(prefix).append_text(line).append("\n") for line in text.split("\n"))

    def _on_new_line(self, text: Text) -> Text:
        return text if text.plain.endswith("\n") else text.append("\n")

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


_LEGEND = {"learned": ("lear", "ned"), "context": ("con", "text")}


def _shortened(pieces: list[Piece], max_tokens: int) -> tuple[list[Piece], int, list[Piece]]:
    """(head, number of tokens left out, tail)"""
    ends = np.cumsum([len(piece.ids) for piece in pieces])
    if not max_tokens or ends[-1] <= max_tokens:
        return pieces, 0, []
    head = max(1, int(np.searchsorted(ends, (max_tokens + 1) // 2, side="right")))
    tail = int(np.searchsorted(ends, ends[-1] - max_tokens // 2)) + 1
    if tail <= head:
        return pieces, 0, []
    return pieces[:head], int(ends[tail - 1] - ends[head - 1]), pieces[tail:]
