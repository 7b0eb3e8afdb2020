"""Messages -> token ids and the mask of supervised tokens.

A template renders a conversation into segments of text, each supervised or not. Supervised is what the model has to
produce: every assistant turn including its end token, and nothing else. The segments are then turned into tokens such
that no token lies on both sides of a supervised border.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate, chain
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mftcoder_coba.data.formats import BadSample, Message
from mftcoder_coba.errors import UserError


class Segment(NamedTuple):
    text: str
    supervised: bool


Encoded = tuple[np.ndarray, np.ndarray]  # token ids int32 [length], supervised bool [length]


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A Hugging Face folder or hub id -> its tokenizer.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"no tokenizer can be loaded: {reason[0] if reason else type(error).__name__}", f"model.path = {path}") from None


def choose(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template `name`; `auto` is the tokenizer's own chat template if it has one, else MFTCoder's role markers.

    Raises:
        UserError: the tokenizer has no end-of-sequence token, or no chat template where one is asked for.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", "model.path", 'set "eos_token" in its tokenizer_config.json')
    if name == "auto":
        name = "tokenizer" if tokenizer.chat_template else "mftcoder"
    if name == "tokenizer" and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", 'data.template = "tokenizer"', 'use "auto" or "mftcoder"')
    return Template(name, tokenizer)


class Template:
    """A way to write conversations for one tokenizer.

    Attributes:
        name: the template's resolved name, a key of `RENDERERS`.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self._tokenizer = tokenizer
        self._renderer = RENDERERS[name](tokenizer)
        # SentencePiece-style tokenizers put a word mark before the first letter of whatever they are given. Cut into
        # segments, a text would get marks that it does not have as a whole, so there the whole is tokenised.
        start = tokenizer.tokenize("x", add_special_tokens=False)
        self._whole_text = bool(tokenizer.is_fast and start and start[0][0] in "▁Ġ")

    def render(self, messages: list[Message]) -> list[Segment]:
        """The conversation as text. What follows the last supervised segment is left out: nothing can be learned from it.

        Raises:
            BadSample: the template refuses this conversation.
            UserError: the template cannot be trained with turn by turn.
        """
        return self._renderer.render(messages)

    def tokenise(self, documents: list[list[Segment]]) -> list[Encoded]:
        """Rendered documents -> tokens, one batch for the tokenizer."""
        documents = [[segment for segment in document if segment.text] for document in documents]
        return self._tokenise_whole(documents) if self._whole_text else self._tokenise_segments(documents)

    def encode(self, messages: list[Message]) -> Encoded:
        """One conversation -> (token ids int32 [length], supervised bool [length]). Raises what `render` raises."""
        return self.tokenise([self.render(messages)])[0]

    def _ids(self, texts: list[str], **options: Any) -> Any:
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)

    def _tokenise_segments(self, documents: list[list[Segment]]) -> list[Encoded]:
        texts = [segment.text for document in documents for segment in document]
        pieces = iter(self._ids(texts)["input_ids"] if texts else [])
        encoded = []
        for document in documents:
            ids = [next(pieces) for _ in document]
            flags = np.repeat([segment.supervised for segment in document], [len(piece) for piece in ids]).astype(np.bool_)
            encoded.append((np.fromiter(chain.from_iterable(ids), np.int32, len(flags)), flags))
        return encoded

    def _tokenise_whole(self, documents: list[list[Segment]]) -> list[Encoded]:
        if not documents:
            return []
        batch = self._ids(["".join(segment.text for segment in document) for document in documents], return_offsets_mapping=True)
        return [
            (np.asarray(ids, np.int32), _inside_supervised(np.asarray(offsets, np.int64).reshape(-1, 2), document))
            for ids, offsets, document in zip(batch["input_ids"], batch["offset_mapping"], documents, strict=True)
        ]


def _inside_supervised(offsets: np.ndarray, document: list[Segment]) -> np.ndarray:
    """offsets int64 [length, 2] in characters -> bool [length]: tokens whose text is supervised from first to last character."""
    ends = np.fromiter(accumulate(len(segment.text) for segment in document), np.int64, len(document))
    flags = np.array([segment.supervised for segment in document] + [False])
    first = np.searchsorted(ends, offsets[:, 0], side="right")
    last = np.searchsorted(ends, np.maximum(offsets[:, 0], offsets[:, 1] - 1), side="right")
    return flags[first] & (first == last)


class ChatTemplate:
    """The tokenizer's own chat template, rendered up to each assistant turn and with it; the difference is what is supervised."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        special = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)}
        self._ends = tuple(special)
        probe = [Message("system", "x"), Message("user", "x")]
        self._has_generation_prompt = any(self._prompts(messages) for messages in (probe, probe[1:]))

    def render(self, messages: list[Message]) -> list[Segment]:
        segments, done = [], ""
        for count, message in enumerate(messages, start=1):
            if message.role != "assistant":
                continue
            prompt, full = self._text(messages[: count - 1], prompt=True), self._text(messages[:count])
            prompted = self._has_generation_prompt and full.startswith(prompt)
            if not prompted:
                prompt = self._text(messages[: count - 1])
            if not prompt.startswith(done) or not full.startswith(prompt):
                raise UserError(
                    "the tokenizer's chat template rewrites earlier turns when a turn is added, so no mask fits all turns",
                    fix='use "data.template": "mftcoder", a tokenizer with another chat template, or samples of one round',
                )
            start = len(prompt) + (0 if prompted else self._header_length(messages[:count], full, len(prompt)))
            # What the template writes after the end token (a line end, mostly) is not the model's to produce.
            stripped = full.rstrip()
            end = max(start, len(stripped)) if stripped.endswith(self._ends) else len(full)
            segments += [Segment(full[len(done) : start], False), Segment(full[start:end], True)]
            done = full[:end]
        return segments

    def _prompts(self, messages: list[Message]) -> bool:
        try:
            return self._text(messages, prompt=True) != self._text(messages)
        except BadSample:  # a template may refuse a system turn, or its absence
            return False

    def _text(self, messages: list[Message], prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateError as error:
            raise BadSample(f"the tokenizer's chat template refuses it: {error}") from None

    def _header_length(self, messages: list[Message], full: str, start: int) -> int:
        """Characters of the role header from `start` on, for a template whose generation prompt does not hold it."""
        probe = "\ue000"
        header, found, _ = self._text([*messages[:-1], Message("assistant", probe)])[start:].partition(probe)
        if not found or not full.startswith(header, start):
            raise BadSample("the tokenizer's chat template changes the text of an assistant turn")
        return len(header) if header.strip() else 0  # a mere blank is the first thing that the model writes


class RoleMarkers:
    """MFTCoder's format: each turn after its marker on a line of its own, each answer followed by the end-of-sequence token."""

    MARKERS = {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n"}

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._end = tokenizer.eos_token

    def render(self, messages: list[Message]) -> list[Segment]:
        segments, before = [], ""
        for message in messages:
            marker = self.MARKERS[message.role]
            if message.role == "assistant":
                segments += [Segment(before + marker, False), Segment(message.content + self._end, True)]
                before = "\n"
            else:
                before += marker + message.content + ("" if message.content.endswith("\n") else "\n")
        return segments


RENDERERS: dict[str, type[ChatTemplate] | type[RoleMarkers]] = {"tokenizer": ChatTemplate, "mftcoder": RoleMarkers}


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    if tokenizer.is_fast:
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    parts = [rules, json.dumps(tokenizer.chat_template), json.dumps([tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token])]
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()
