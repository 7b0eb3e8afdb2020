"""Rendered text -> token ids, such that no token lies on both sides of a border between segments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from transformers import AddedToken, PreTrainedTokenizerBase

from mftcoder_coba.data.formats import BadSample
from mftcoder_coba.errors import UserError

NOTHING = np.zeros(0, np.int32)
LEADS = ("\n", ".", "x", "e", "\ue000")  # what joins with a text differs between tokenizers and texts
CHUNK_CHARACTERS = 2**20  # for one call of the tokenizer, whose own results take some 100 bytes a token


class Segment(NamedTuple):
    text: str
    supervised: bool


Encoded = tuple[np.ndarray, np.ndarray]  # token ids int32 [length], supervised bool [length]


class Reader:
    """Rendered documents -> tokens, each segment by itself, as it reads behind what comes before.

    SentencePiece-style tokenizers put a word mark before the first letter of whatever they are given. There, a segment that
    goes on with a text is read behind a short lead, whose tokens are then taken off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        end, letter = self.ids([tokenizer.eos_token, "x"])
        if end.tolist() != [tokenizer.eos_token_id]:
            what = f"the tokenizer does not read its end-of-sequence token {tokenizer.eos_token!r} as one token"
            raise UserError(what, "model.path", 'set "split_special_tokens": false in its tokenizer_config.json')
        first = tokenizer.convert_ids_to_tokens(letter.tolist()[:1])
        self._marks_words = bool(first and first[0][:1] in ("▁", "Ġ"))
        added = tokenizer.added_tokens_decoder
        self._added = [token.content for token in added.values()]
        self._borders = {token.content: number for number, token in added.items() if tokenizer.is_fast and _stands_alone(token)}
        leads = [*LEADS, *self._added] if self._marks_words else []
        self._lead_ids = {lead: ids for lead, ids in zip(leads, self.ids(leads), strict=True) if len(ids) and tokenizer.unk_token_id not in ids}
        if self._marks_words and not any(lead in self._lead_ids for lead in LEADS):
            raise UserError("the tokenizer cannot read a text piece by piece, so no mask can be made", "model.path", "use another tokenizer")

    def starts_with_bos(self) -> bool:
        """Whether the tokenizer itself puts its beginning-of-sequence token before plain text."""
        with self._as_it_comes():
            ids = self._tokenizer.backend_tokenizer.encode("x").ids if self._tokenizer.is_fast else self._tokenizer("x")["input_ids"]
        return bool(ids) and ids[0] == self._tokenizer.bos_token_id

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [length] for each text. Special tokens that a text spells are read as such; none are added."""
        with self._as_it_comes():
            return list(self._ids(texts))

    def encode(self, documents: list[list[Segment]]) -> list[Encoded | BadSample]:
        """Tokens and mask of each document, whose first segment is not supervised."""
        with self._as_it_comes():
            return list(self._encode(documents))

    @contextmanager
    def _as_it_comes(self) -> Iterator[None]:
        """Without truncation and padding, which a tokenizer.json or an earlier call may have set; they are put back afterwards."""
        if not self._tokenizer.is_fast:
            yield
            return
        backend = self._tokenizer.backend_tokenizer
        truncation, padding, spelled_out = backend.truncation, backend.padding, backend.encode_special_tokens
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        try:
            yield
        finally:
            backend.encode_special_tokens = spelled_out
            if truncation is not None:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)

    def _ids(self, texts: list[str]) -> Iterator[np.ndarray]:
        for chunk in _chunks(texts):
            if self._tokenizer.is_fast:
                encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
                lists = (encoding.ids for encoding in encodings)
            else:
                lists = self._tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
            for ids in lists:
                yield np.fromiter(ids, np.int32, len(ids))

    def _encode(self, documents: list[list[Segment]]) -> Iterator[Encoded | BadSample]:
        head, head_ids = self._shared_head([document[0].text for document in documents if document])
        texts, leads = [], []
        for document in documents:
            before = ""
            for index, segment in enumerate(document):
                texts.append(segment.text if index else segment.text[len(head) :])
                leads.append(self._leads(before))
                before = segment.text or before
        pieces = self._ids([choices[0] + text for choices, text in zip(leads, texts, strict=True)])
        cut = (self._without_lead(*piece) for piece in zip(pieces, leads, texts, strict=True))
        for document in documents:
            ids = [head_ids if document else NOTHING, *(next(cut) for _ in document)]
            if any(piece is None for piece in ids):
                yield BadSample("the tokenizer makes one token of the end of one turn and the start of the next, so no mask fits")
                continue
            mask = np.zeros(sum(map(len, ids)), np.bool_)
            start = len(ids[0])
            for piece, segment in zip(ids[1:], document, strict=True):
                mask[start : start + len(piece)] = segment.supervised
                start += len(piece)
            yield np.concatenate(ids), mask

    def _leads(self, before: str) -> list[str]:
        """What may stand for the text before a segment: its last special token, behind which some tokenizers begin a word."""
        if not before or not self._marks_words:
            return [""]
        special = max((token for token in self._added if before.endswith(token)), key=len, default="")
        return [lead for lead in (special, *LEADS) if lead in self._lead_ids]

    def _without_lead(self, ids: np.ndarray, leads: list[str], text: str) -> np.ndarray | None:
        """`ids` are those of `leads[0] + text` -> those of the text alone; None if every lead joins with it."""
        for lead in leads:
            if not lead:
                return ids
            if lead != leads[0]:
                ids = next(self._ids([lead + text]))
            expected = self._lead_ids[lead]
            if np.array_equal(ids[: len(expected)], expected):
                return ids[len(expected) :]
        return None

    def _shared_head(self, texts: list[str]) -> tuple[str, np.ndarray]:
        """What all texts begin with, up to behind a special token, and its tokens: a system turn that all have is read once.

        The tokenizer finds special tokens first, from left to right, and reads the pieces between them one by one. So what
        follows one of them becomes the same tokens with and without what is before, unless another can take its place.
        """
        common = os.path.commonprefix(texts) if len(texts) > 1 and not self._marks_words else ""
        borders = [token for token in self._borders if token in common and sum(token in other for other in self._added) == 1]
        end, border = max(((common.rfind(token) + len(token), token) for token in borders), default=(0, ""))
        if not end:
            return "", NOTHING
        head = next(self._ids([common[:end]]))
        return (common[:end], head) if head[-1:].tolist() == [self._borders[border]] else ("", NOTHING)


def _stands_alone(token: AddedToken) -> bool:
    """A special token that takes no blanks in and needs no word border, nor is one for the text behind it."""
    reaches_out = token.lstrip or token.rstrip or token.single_word or token.normalized
    return token.special and not reaches_out and token.content.endswith((">", "|", "]", "}"))


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    chunk, size = [], 0
    for text in texts:
        if chunk and size + len(text) > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk
