"""Messages -> token ids and the mask of supervised tokens.

A template renders a conversation into segments of text, each supervised or not. Supervised is what the model has to
produce: every assistant turn including its end token, and nothing else. Each segment is tokenised by itself, so no token
lies on both sides of a border, and a prompt has the tokens that it has when the model is used. Plain text is the same under
every template: all of it is supervised, and the end token after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mftcoder_coba.config import MarkersConfig
from mftcoder_coba.data.formats import BadSample, Message
from mftcoder_coba.data.reading import Encoded, Reader, Segment
from mftcoder_coba.errors import UserError

MFTCODER = MarkersConfig(system="<s>system\n", user="<s>human\n", assistant="<s>bot\n")


Refusal = BadSample | UserError


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A Hugging Face folder or hub id -> its tokenizer.

    Raises:
        UserError: there is none, or it needs code of its own that was not allowed.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            what = "this tokenizer comes with Python code of its own, which is not run unless you allow it"
            raise UserError(what, f"model.path = {path}", "read that code, then set model.trust_remote_code = true") from None
        reason = str(error).strip().splitlines()
        raise UserError(f"no tokenizer can be loaded: {reason[0] if reason else type(error).__name__}", f"model.path = {path}") from None


def choose(template: str | MarkersConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """`data.template` -> the template; "auto" is the tokenizer's own chat template if it has one, else MFTCoder's role markers.

    Raises:
        UserError: the tokenizer has no end-of-sequence token that it reads as one, or no usable chat template where one is asked for.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", "model.path", 'set "eos_token" in its tokenizer_config.json')
    if template == "auto":
        template = "tokenizer" if tokenizer.chat_template else "mftcoder"
    if template == "tokenizer" and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template", 'data.template = "tokenizer"', 'use "auto" or "mftcoder"')
    if isinstance(template, MarkersConfig):
        return Template("markers", RoleMarkers(tokenizer, template), tokenizer)
    return Template(template, ChatTemplate(tokenizer) if template == "tokenizer" else RoleMarkers(tokenizer, MFTCODER), tokenizer)


class Template:
    """A way to write conversations and plain text for one tokenizer.

    Attributes:
        name: "tokenizer", "mftcoder" or "markers".
        identity: all that decides the text of a conversation; the tokens also depend on the tokenizer's `fingerprint`.
    """

    def __init__(self, name: str, renderer: ChatTemplate | RoleMarkers, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self._renderer = renderer
        self._reader = Reader(tokenizer)
        self._end = tokenizer.eos_token
        self._start = tokenizer.bos_token if self._reader.starts_with_bos() else ""
        self.identity = json.dumps([name, renderer.rules, self._start, self._end])

    def render(self, messages: list[Message]) -> list[Segment]:
        """The conversation as text. What follows the last supervised segment is left out: nothing can be learned from it.

        Raises:
            BadSample: the template refuses this conversation.
            UserError: the template cannot be trained with turn by turn.
        """
        if _is_text(messages):
            start = [Segment(self._start, False)] if self._start else []
            return [*start, Segment(messages[0].content + self._end, True)]
        return _value(self._renderer.render_batch([messages])[0])

    def encode(self, messages: list[Message]) -> Encoded:
        """One conversation -> (token ids int32 [length], supervised bool [length]). Raises what `render` raises."""
        return _value(self.encode_batch([messages])[0])

    def encode_batch(self, conversations: list[list[Message]]) -> list[Encoded | Refusal]:
        """What `encode` returns or raises for each conversation, in their order; one batch for template and tokenizer."""
        results: list[Any] = [None] * len(conversations)
        texts = [place for place, messages in enumerate(conversations) if _is_text(messages)]
        for place, encoded in zip(texts, self._encode_texts([conversations[place][0].content for place in texts]), strict=True):
            results[place] = encoded
        chats = [place for place, messages in enumerate(conversations) if not _is_text(messages)]
        rendered = self._renderer.render_batch([conversations[place] for place in chats])
        encoded = iter(self._reader.encode([document for document in rendered if isinstance(document, list)]))
        for place, document in zip(chats, rendered, strict=True):
            results[place] = next(encoded) if isinstance(document, list) else document
        return results

    def _encode_texts(self, texts: list[str]) -> Iterator[Encoded]:
        # The start token is put before the tokens, not before the text: as part of the text it would cost the first
        # word the mark that it gets where the tokenizer puts the start token there itself.
        start, *rest = self._reader.ids([self._start, *(text + self._end for text in texts)])
        for ids in rest:
            yield np.concatenate([start, ids]), np.arange(len(start) + len(ids)) >= len(start)


def _is_text(messages: list[Message]) -> bool:
    return bool(messages) and messages[0].role == "text"


def _value(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


class Request(NamedTuple):
    """A text that a chat template is asked for."""

    turns: list[dict[str, str]]
    prompt: bool  # with what begins an answer


class ChatTemplate:
    """The tokenizer's own chat template, rendered up to each assistant turn and with it; the difference is what is supervised."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        special = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)}
        self._ends = tuple(special)
        user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "x"}
        try:
            self.rules = tokenizer.get_chat_template()
            probes = [self._texts([Request(turns, True), Request(turns, False)]) for turns in ([user], [system, user])]
        except (ValueError, jinja2.TemplateSyntaxError) as error:
            raise UserError(f"the tokenizer's chat template cannot be used: {error}", "data.template", 'use "mftcoder"') from None
        # A template may refuse a system turn, or its absence.
        self._has_generation_prompt = any(a != b for a, b in probes if isinstance(a, str) and isinstance(b, str))

    def render_batch(self, conversations: list[list[Message]]) -> list[list[Segment] | Refusal]:
        """All conversations go through their turns side by side, so that the template is asked for many texts at once."""
        results: list[Any] = [None] * len(conversations)
        answered: list[tuple[int, Any, Any]] = [(place, self._segments(messages), None) for place, messages in enumerate(conversations)]
        while answered:
            asking = []
            for place, rendering, answer in answered:
                try:
                    asking.append((place, rendering, rendering.throw(answer) if isinstance(answer, BadSample) else rendering.send(answer)))
                except StopIteration as end:
                    results[place] = end.value
                except (BadSample, UserError) as error:
                    results[place] = error
            texts = self._texts([request for _, _, request in asking])
            answered = [(place, rendering, text) for (place, rendering, _), text in zip(asking, texts, strict=True)]
        return results

    def _segments(self, messages: list[Message]) -> Generator[Request, str, list[Segment]]:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        segments, done = [], ""
        for count, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = yield Request(turns[:count], self._has_generation_prompt)
            full = yield Request(turns[: count + 1], False)
            prompted = self._has_generation_prompt and full.startswith(prompt)
            if self._has_generation_prompt and not prompted:
                prompt = yield Request(turns[:count], False)
            if not prompt.startswith(done) or not full.startswith(prompt):
                raise UserError(
                    "the tokenizer's chat template rewrites earlier turns when a turn is added, so no mask fits all turns",
                    fix='use "data.template": "mftcoder", a tokenizer with another chat template, or samples of one round',
                )
            start = len(prompt)
            if not prompted:
                start += yield from self._header_length(turns[:count], full, start)
            # What the template writes after the end token (a line end, mostly) is not the model's to produce.
            stripped = full.rstrip()
            end = max(start, len(stripped)) if stripped.endswith(self._ends) else len(full)
            _require_answer(message.content, full[len(done) : start], full[start:end])
            segments += [Segment(full[len(done) : start], False), Segment(full[start:end], True)]
            done = full[:end]
        return segments

    def _header_length(self, turns: list[dict[str, str]], full: str, start: int) -> Generator[Request, str, int]:
        """Characters of the role header from `start` on, for a template whose generation prompt does not hold it."""
        probe = "\ue000"
        text = yield Request([*turns, {"role": "assistant", "content": probe}], False)
        header, found, _ = text[start:].partition(probe)
        if not found or not full.startswith(header, start):
            raise _changed()
        return len(header) if header.strip() else 0  # a mere blank is the first thing that the model writes

    def _texts(self, requests: list[Request]) -> list[str | BadSample]:
        texts: list[Any] = [None] * len(requests)
        for prompt in (False, True):
            places = [place for place, request in enumerate(requests) if request.prompt == prompt]
            for place, text in zip(places, self._apply([requests[place].turns for place in places], prompt), strict=True):
                texts[place] = text
        return texts

    def _apply(self, chats: list[list[dict[str, str]]], prompt: bool) -> list[str | BadSample]:
        if not chats:
            return []
        try:
            return self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=prompt)
        except jinja2.TemplateSyntaxError:
            raise
        except (jinja2.TemplateError, TypeError) as error:  # Python's own error where a template adds a text to a number
            if len(chats) == 1:
                return [BadSample(f"the tokenizer's chat template refuses it: {error}")]
        return [text for chat in chats for text in self._apply([chat], prompt)]


def _require_answer(answer: str, before: str, text: str) -> None:
    """Raises BadSample if an answer is not in the supervised `text`, blanks aside; the prompt `before` may end with its start."""
    if answer in text:
        return
    answer, before, text = ("".join(part.split()) for part in (answer, before, text))
    if answer not in before[max(0, len(before) - len(answer) + 1) :] + text:
        raise _changed()


def _changed() -> BadSample:
    return BadSample('the tokenizer\'s chat template changes or drops text of an assistant turn; "data.template": "mftcoder" keeps it')


class RoleMarkers:
    """Each turn after its marker, on lines of its own; each answer followed by the end marker."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: MarkersConfig):
        self._markers = {"system": markers.system, "user": markers.user, "assistant": markers.assistant}
        self._end = tokenizer.eos_token if markers.end is None else markers.end
        self.rules = [*self._markers.values(), self._end]

    def render_batch(self, conversations: list[list[Message]]) -> list[list[Segment]]:
        return [self._segments(messages) for messages in conversations]

    def _segments(self, messages: list[Message]) -> list[Segment]:
        segments, before = [], ""
        for message in messages:
            marker = self._markers[message.role]
            if message.role == "assistant":
                segments += [Segment(before + marker, False), Segment(message.content + self._end, True)]
                before = "" if self._end.endswith("\n") else "\n"
            else:
                before += marker + message.content + ("" if message.content.endswith("\n") else "\n")
        return segments


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    if tokenizer.is_fast:
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    parts = [rules, json.dumps(tokenizer.chat_template), json.dumps([tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token])]
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()
