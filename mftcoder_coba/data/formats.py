"""A line of a named format -> messages.

A format is a function from one JSON object to a conversation, chosen by name in the config and never guessed. The rule is the
same for all of them: a system turn first or none, then user and assistant in turn, an assistant turn last. Empty text is a
legal turn, null is not. Whatever is wrong with a line is raised as `BadSample` with the reason, in the file's own names; who
reads the file adds its name and the line number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from mftcoder_coba.config import FIELD_PAIRS, FORMAT_FIELDS
from mftcoder_coba.errors import UserError, suggestion

Record = dict[str, Any]  # a JSON object


class Message(NamedTuple):
    role: str  # "system", "user" or "assistant"; "text" for all of a sample of the format `text`
    content: str


class BadSample(ValueError):
    """One line cannot be used; the text says why."""


@dataclass(frozen=True)
class Format:
    """A format and the names that its fields have in the files.

    Attributes:
        name: a key of `FORMAT_FIELDS`.
        names: the format's own field -> its name in the file. An optional field whose name another field took is not here.
    """

    name: str
    names: dict[str, str]


# Fields that may be absent or null.
OPTIONAL = {"system", "input", "history"}


def choose_format(name: str, fields: Mapping[str, str], where: str = "fields") -> Format:
    """The format of a task.

    Args:
        name: `format` in the config: a key of `FORMAT_FIELDS`, or of `FIELD_PAIRS` for `prompt_answer` with these names.
        fields: `fields` in the config: the format's own field -> its name in the file.
        where: the config path of `fields`, for messages.

    Raises:
        UserError: two fields would be read from the same place.
    """
    given = {**FIELD_PAIRS.get(name, {}), **fields}
    name = "prompt_answer" if name in FIELD_PAIRS else name
    taken = list(given.values())
    names = {own: given.get(own, own) for own in FORMAT_FIELDS[name] if own in given or own not in taken}
    lost = [own for own in FORMAT_FIELDS[name] if own not in names and own not in OPTIONAL] + [value for value in taken if taken.count(value) > 1]
    if lost:
        raise UserError(f"two fields of the format {name} would be read from the files' field {lost[0]!r}", where, "give each a field of its own")
    return Format(name, names)


def parse_line(line: bytes, format: Format) -> list[Message]:
    """One line -> its conversation.

    Raises:
        BadSample: the line is not UTF-8, not JSON or not of this format.
    """
    try:
        record = _decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample(f"not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start + 1}") from None
    except json.JSONDecodeError as error:
        reason = "a byte order mark that is not at the file's start" if error.doc.startswith("\ufeff") else error.msg
        raise BadSample(f"not JSON: {reason} at column {error.colno}") from None
    except RecursionError:
        raise BadSample("not usable JSON: nested too deeply") from None
    except BadSample:
        raise
    except ValueError:
        raise BadSample("not usable JSON: a number of thousands of digits") from None
    if not isinstance(record, dict):
        raise BadSample(f"a line must be a JSON object {{ ... }}, not {_kind(record)}")
    return PARSERS[format.name](record, format.names)


def _refuse_constant(name: str) -> NoReturn:
    raise BadSample(f"not JSON: {name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):  # the decoder's own rule is that the last one wins, without a word
        names = [name for name, _ in pairs]
        raise BadSample(f"the key {next(name for name in names if names.count(name) > 1)[:40]!r} is twice in one object")
    return record


# One decoder for all lines: json.loads with an option makes a new one at each call.
_decode = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object).decode

_SAME = {name: name for name in ("system", "user", "assistant")}
_MFTCODER_ROLES = _SAME | {"human": "user", "bot": "assistant", "gpt": "assistant"}
_MESSAGES_ROLES = _SAME | {"developer": "system"}
_SHAREGPT_ROLES = _SAME | {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "function_response", "observation"}


def mftcoder(record: Record, names: dict[str, str]) -> list[Message]:
    """`{"chat_rounds": [{"role": "human", "content": "..."}, {"role": "bot", "content": "..."}]}`.

    Roles: system; human or user; bot, assistant or gpt.
    """
    return _conversation(record, names["chat_rounds"], "role", "content", _MFTCODER_ROLES)


def messages(record: Record, names: dict[str, str]) -> list[Message]:
    """`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`, as OpenAI's API has it.

    Roles: system or developer, which is its newer name; user; assistant. Content is text or a list of parts
    `{"type": "text", "text": "..."}`, which are joined with nothing between them. Refused are other parts, tool turns, tool
    calls, and assistant turns of weight 0, because every assistant turn is supervised.
    """
    return _conversation(record, names["messages"], "role", "content", _MESSAGES_ROLES, _plain_message)


def sharegpt(record: Record, names: dict[str, str]) -> list[Message]:
    """`{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`, and `"system": "..."` or none.

    Roles: system; human or user; gpt, assistant, bot or chatgpt.
    """
    key = names["conversations"]
    conversation = _conversation(record, key, "from", "value", _SHAREGPT_ROLES)
    system = _system(record, names)
    if system and conversation[0].role == "system":
        raise BadSample(f'"{names["system"]}" and {key}[0] both give a system turn')
    return system + conversation


def alpaca(record: Record, names: dict[str, str]) -> list[Message]:
    """`{"instruction": "...", "input": "...", "output": "..."}`; the input, if any, follows the instruction on a line of its own.

    Before them `"system": "..."`, and earlier rounds as `"history": [["user's", "assistant's"], ...]`. All but instruction and
    output may be absent, null or empty.
    """
    system = _system(record, names)
    history = _history(record, names.get("history"))
    question = _text(record, names["instruction"])
    answer = _text(record, names["output"])
    extra = _optional(record, names.get("input"))
    if extra:
        question = f"{question}\n{extra}" if question else extra
    return [*system, *history, Message("user", question), Message("assistant", answer)]


def prompt_answer(record: Record, names: dict[str, str]) -> list[Message]:
    """`{"prompt": "...", "answer": "..."}`, and `"system": "..."` or none."""
    question = Message("user", _text(record, names["prompt"]))
    answer = Message("assistant", _text(record, names["answer"]))
    return [*_system(record, names), question, answer]


def text(record: Record, names: dict[str, str]) -> list[Message]:
    """`{"text": "..."}`, not empty: one message of the role "text"."""
    content = _text(record, names["text"])
    if not content:
        raise BadSample(f'"{names["text"]}" is empty text')
    return [Message("text", content)]


PARSERS: dict[str, Callable[[Record, dict[str, str]], list[Message]]] = {
    parser.__name__: parser for parser in (mftcoder, messages, sharegpt, alpaca, prompt_answer, text)
}


def _conversation(record: Record, key: str, speaker: str, said: str, roles: dict[str, str], simplify: Callable | None = None) -> list[Message]:
    """The turns in `record[key]`, each an object that names its speaker and what is said in the keys of these names."""
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadSample(f'"{key}" must be a list of turns, not {_kind(turns)}' if key in record else _no_key(record, key))
    conversation = []
    for index, turn in enumerate(turns):
        place = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise BadSample(f"{place} must be an object with {speaker} and {said}, not {_kind(turn)}")
        if simplify:
            turn = simplify(turn, place)
        name = turn.get(speaker)
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise BadSample(_unknown_role(_text(turn, speaker, place), f"{place}.{speaker}", roles))
        conversation.append(Message(role, _text(turn, said, place)))
    _check_order(conversation, key)
    return conversation


def _check_order(conversation: list[Message], key: str) -> None:
    first = 1 if conversation[0].role == "system" else 0
    expected = "user"
    for index in range(first, len(conversation)):
        role = conversation[index].role
        if role != expected:
            raise BadSample(f"{key}[{index}] is of role {role} where {expected} is due: turns alternate, only the first may be system")
        expected = "assistant" if expected == "user" else "user"
    if conversation[-1].role != "assistant":
        raise BadSample(f'"{key}" must end with an assistant turn')


def _plain_message(turn: Record, place: str) -> Record:
    """A message whose content is text if it can be."""
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadSample(f"{place} calls a tool: tool turns are not supported")
    if turn.get("weight") == 0 and turn.get("role") == "assistant":
        raise BadSample(f"{place}.weight is 0: every assistant turn is supervised, none can be left out")
    content = turn.get("content")
    if not isinstance(content, list) or not content:
        return turn
    return {**turn, "content": "".join(_text_part(part, f"{place}.content[{index}]") for index, part in enumerate(content))}


def _text_part(part: Any, place: str) -> str:
    if not isinstance(part, dict):
        raise BadSample(f"{place} must be an object with type and text, not {_kind(part)}")
    kind = _text(part, "type", place)
    if kind != "text":
        raise BadSample(f"{place} is of type {kind[:40]!r}: only text is supported")
    return _text(part, "text", place)


def _history(record: Record, key: str | None) -> list[Message]:
    rounds = record.get(key)  # no JSON object has the key None
    if rounds is None:
        return []
    if not isinstance(rounds, list):
        raise BadSample(f'"{key}" must be a list of pairs [user, assistant], not {_kind(rounds)}')
    conversation = []
    for index, pair in enumerate(rounds):
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) and pair else _kind(pair)
            raise BadSample(f"{key}[{index}] must be a pair [user, assistant], not {found}")
        for side, role in enumerate(("user", "assistant")):
            flaw = _flaw(pair[side])
            if flaw:
                raise BadSample(f"{key}[{index}][{side}] {flaw}")
            conversation.append(Message(role, pair[side]))
    return conversation


def _system(record: Record, names: dict[str, str]) -> list[Message]:
    """The turn of a record's own field for it. Tables have "" where there is none."""
    content = _optional(record, names.get("system"))
    return [Message("system", content)] if content else []


def _optional(record: Record, key: str | None) -> str:
    return "" if record.get(key) is None else _text(record, key)  # no JSON object has the key None


def _text(item: Record, key: str, place: str = "") -> str:
    """`item[key]`; `place` is where the item is in the line, "" for the line itself."""
    value = item.get(key)
    flaw = _flaw(value)
    if flaw:
        raise BadSample(_no_key(item, key, place) if key not in item else f"{place}.{key} {flaw}" if place else f'"{key}" {flaw}')
    return value


def _flaw(value: Any) -> str:
    """What keeps a value from being a text that can be tokenised, or ""."""
    if not isinstance(value, str):
        return f"must be text, not {_kind(value)}"
    if "\0" in value:
        return "holds a null character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a character (lone surrogate {ascii(value[error.start])})"
    return ""


def _no_key(item: Record, key: str, place: str = "") -> str:
    return f'{place or "the line"} has no key "{key}"; it has {", ".join(repr(name[:40]) for name in sorted(item)[:8]) or "none"}'


def _unknown_role(role: str, place: str, roles: dict[str, str]) -> str:
    return f"{place} is {role[:40]!r}: {'tool turns are not supported' if role in _TOOL_ROLES else suggestion(role[:40], roles)}"


def _kind(value: Any) -> str:
    if isinstance(value, list | dict | str) and not value:
        return {list: "an empty list", dict: "an empty object", str: "empty text"}[type(value)]
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]
