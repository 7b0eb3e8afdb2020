"""What a model is asked: everything before the last assistant turn of a sample, in the experiment's own template; and the code to continue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mftcoder_coba.config import Config
from mftcoder_coba.config.schema import MarkersConfig
from mftcoder_coba.data import Template, choose, load_tokenizer
from mftcoder_coba.data.corpus import sources_of
from mftcoder_coba.data.files import read_lines
from mftcoder_coba.data.formats import BadSample, Message, parse_line
from mftcoder_coba.data.tokenising import Source, content_hash
from mftcoder_coba.errors import UserError

PROMPTS_AT_ONCE = 1000


@dataclass(frozen=True)
class Sample:
    """Attributes:
    place: `file:line`.
    prompt: token ids.
    references: answers that are right; one or more.
    """

    place: str
    prompt: list[int]
    references: list[str]


class Prompter:
    """The prompts of an experiment.

    Attributes:
        end_ids: tokens that end an answer.
        end_text: a text that ends an answer where the template has one of its own, or None.
    """

    def __init__(self, config: Config):
        self._config = config
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model.path, config.model.trust_remote_code)
        self._template: Template = choose(config.data.template, self.tokenizer)
        last = int(self._template.encode([Message("user", "x"), Message("assistant", "x")])[0][-1])
        special = {self.tokenizer.eos_token_id, *self.tokenizer.all_special_ids}
        special |= {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.end_ids = sorted({self.tokenizer.eos_token_id} | ({last} & special))
        self.end_text = config.data.template.end if isinstance(config.data.template, MarkersConfig) else None

    def samples(self, task: str, split: str, limit: int | None = None) -> list[Sample]:
        """Those of a task's split, in the order of the files; lines that cannot be used are left out, for preparing the data has told of them.

        A JSON line may name further references beside its last assistant turn: {"references": ["...", ...]}.

        Raises:
            UserError: a sample has no prompt.
        """
        chosen = [section for section in self._config.data.tasks if section.name == task]
        (source,) = sources_of(self._config.data.model_copy(update={"tasks": chosen}), [split])
        read: list[tuple[str, list[Message], list[str]]] = []
        for file in source.files:
            for line, text in read_lines(file, source.recipe.format.names.values()):
                if limit is not None and len(read) >= limit:
                    break
                read += self._read(source, f"{file}:{line}", text)
        prompts = [prompt for start in range(0, len(read), PROMPTS_AT_ONCE) for prompt in self._prompts(read[start : start + PROMPTS_AT_ONCE])]
        return [Sample(place, prompt, references) for (place, _, references), prompt in zip(read, prompts, strict=True) if prompt is not None]

    def _read(self, source: Source, place: str, text: bytes) -> list[tuple[str, list[Message], list[str]]]:
        """One line; nothing where it is of another split or cannot be used."""
        try:
            messages = parse_line(text, source.recipe.format)
        except BadSample:
            return []
        if not source.recipe.takes(content_hash(messages)):
            return []
        if messages[0].role == "text":
            raise UserError("plain text has no prompt, so nothing can be generated for it", place, "measure this task without --metric")
        more = json.loads(text).get("references") or []
        if not isinstance(more, list) or not all(isinstance(reference, str) for reference in more):
            raise UserError('"references" must be a list of texts', place)
        return [(place, messages, [messages[-1].content, *more])]

    def _prompts(self, read: Sequence[tuple[str, list[Message], list[str]]]) -> list[list[int] | None]:
        prompts: list[list[int] | None] = []
        for (place, _, _), encoded in zip(read, self._template.encode_batch([messages for _, messages, _ in read]), strict=True):
            if isinstance(encoded, UserError):
                raise UserError(encoded.what, place, encoded.fix)
            prompts.append(None if isinstance(encoded, BadSample) else _before_the_answer(*encoded))
        return prompts

    def of_code(self, text: str, chat: bool) -> list[int]:
        """A text to be continued as it is; or, as a user's turn, to be answered by its continuation."""
        if chat:
            return _before_the_answer(*self._template.encode([Message("user", text), Message("assistant", "x")]))
        return self._template.encode([Message("text", text)])[0][:-1].tolist()  # without the end token

    def text(self, ids: Sequence[int]) -> str:
        """What was generated, up to its end."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.split(self.end_text)[0] if self.end_text else text


def _before_the_answer(ids: np.ndarray, supervised: np.ndarray) -> list[int]:
    """The tokens before the last supervised run."""
    last = int(np.flatnonzero(supervised)[-1])
    before = np.flatnonzero(~supervised[:last])
    return ids[: int(before[-1]) + 1].tolist() if len(before) else []
