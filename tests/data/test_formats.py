import json
from functools import partial

import pytest

from mftcoder_coba.config import FIELD_PAIRS, FORMAT_FIELDS
from mftcoder_coba.data.formats import PARSERS, BadSample, Message, choose_format, parse_line
from mftcoder_coba.errors import UserError

S, U, A = (partial(Message, role) for role in ("system", "user", "assistant"))


def parse(record, name, fields=None) -> list[Message]:
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_line(line, choose_format(name, fields or {}))


def turns(*pairs, speaker="role", said="content") -> list[dict]:
    return [{speaker: role, said: content} for role, content in pairs]


def test_there_is_a_parser_for_every_format_of_the_config_and_no_other():
    assert set(PARSERS) == set(FORMAT_FIELDS)


CHAT = [
    ("system", "You are कोडर."),
    ("human", "素数とは? 🧮"),
    ("bot", ""),
    ("user", ""),
    ("assistant", "x\n\ty\u2028é"),
    ("human", "Q"),
    ("gpt", "🏳️‍🌈"),
]
CHAT_MESSAGES = [S("You are कोडर."), U("素数とは? 🧮"), A(""), U(""), A("x\n\ty\u2028é"), U("Q"), A("🏳️‍🌈")]


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_mftcoder_reads_rounds_system_empty_turns_and_any_script(ensure_ascii):
    line = json.dumps({"id": 3, "chat_rounds": turns(*CHAT)}, ensure_ascii=ensure_ascii).encode()
    assert parse(line, "mftcoder") == CHAT_MESSAGES


def test_messages_reads_text_and_lists_of_text_parts():
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2+2? 🤔"}]
    record = {"messages": turns(("developer", "s"), ("user", parts), ("assistant", "4"), ("user", ""), ("assistant", ""))}
    assert parse(record, "messages") == [S("s"), U("What is 2+2? 🤔"), A("4"), U(""), A("")]
    assert parse({"messages": turns(("system", "s"), ("user", "u"), ("assistant", "a"))}, "messages") == [S("s"), U("u"), A("a")]


def test_messages_of_a_table_may_hold_nulls_where_there_is_no_tool_call():
    record = {"messages": [{"role": "user", "content": "u", "weight": 0}, {"role": "assistant", "content": "a", "tool_calls": None, "weight": 1}]}
    assert parse(record, "messages") == [U("u"), A("a")]


def test_sharegpt_reads_its_names_of_roles_and_a_system_turn_inside_or_beside():
    spoken = [("human", "1"), ("gpt", "2"), ("user", ""), ("chatgpt", "4"), ("human", "五"), ("bot", "6"), ("human", "7"), ("assistant", "")]
    expected = [U("1"), A("2"), U(""), A("4"), U("五"), A("6"), U("7"), A("")]
    record = {"conversations": turns(*spoken, speaker="from", said="value")}
    assert parse(record, "sharegpt") == parse(record | {"system": None}, "sharegpt") == parse(record | {"system": ""}, "sharegpt") == expected
    assert parse(record | {"system": "s"}, "sharegpt") == [S("s"), *expected]
    inside = {"conversations": turns(("system", "s"), *spoken, speaker="from", said="value")}
    assert parse(inside, "sharegpt") == [S("s"), *expected]
    with pytest.raises(BadSample, match=r'"system" and conversations\[0\] both'):
        parse(inside | {"system": "t"}, "sharegpt")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, [U("Dis"), A("réponse")]),
        ({"input": None, "system": None, "history": None}, [U("Dis"), A("réponse")]),
        ({"input": "", "system": "", "history": []}, [U("Dis"), A("réponse")]),
        ({"input": "数"}, [U("Dis\n数"), A("réponse")]),
        ({"instruction": "", "input": "数"}, [U("数"), A("réponse")]),
        ({"output": ""}, [U("Dis"), A("")]),
        ({"system": "s", "history": [["a", "b"], ["", "d"]], "input": "i"}, [S("s"), U("a"), A("b"), U(""), A("d"), U("Dis\ni"), A("réponse")]),
    ],
)
def test_alpaca_joins_input_to_instruction_behind_system_and_history(extra, expected):
    assert parse({"instruction": "Dis", "output": "réponse"} | extra, "alpaca") == expected


def test_prompt_answer_reads_two_fields_and_a_system_turn():
    assert parse({"prompt": "p", "answer": "", "more": 1}, "prompt_answer") == [U("p"), A("")]
    assert parse({"prompt": "", "answer": "答 🙂", "system": "s"}, "prompt_answer") == [S("s"), U(""), A("答 🙂")]


def test_text_is_one_message_of_all_of_it():
    assert parse({"text": " def f():\n\treturn 'ф' # 🐍\n"}, "text") == [Message("text", " def f():\n\treturn 'ф' # 🐍\n")]


@pytest.mark.parametrize("name", FIELD_PAIRS)
def test_a_pair_of_names_is_prompt_answer_with_these_fields(name):
    prompt, answer = name.split("_")
    chosen = choose_format(name, {})
    assert (chosen.name, chosen.names) == ("prompt_answer", {"prompt": prompt, "answer": answer, "system": "system"})
    assert parse({answer: "a", prompt: "p", "system": "s"}, name) == [S("s"), U("p"), A("a")]


@pytest.mark.parametrize(
    ("name", "fields", "record", "expected"),
    [
        (
            "prompt_answer",
            {"prompt": "question", "answer": "solution"},
            {"question": "q", "solution": "s", "prompt": 1, "answer": 2},
            [U("q"), A("s")],
        ),
        ("prompt_answer", {"prompt": "answer", "answer": "prompt"}, {"answer": "q", "prompt": "s"}, [U("q"), A("s")]),
        ("mftcoder", {"chat_rounds": "对话"}, {"对话": turns(("human", "u"), ("bot", "a"))}, [U("u"), A("a")]),
        ("messages", {"messages": "data"}, {"data": turns(("user", "u"), ("assistant", "a")), "messages": 1}, [U("u"), A("a")]),
        (
            "sharegpt",
            {"system": "persona", "conversations": "c"},
            {"persona": "s", "system": 1, "c": turns(("human", "u"), ("gpt", "a"), speaker="from", said="value")},
            [S("s"), U("u"), A("a")],
        ),
        (
            "alpaca",
            {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": "h"},
            {"i": "I", "x": "X", "o": "O", "s": "S", "h": [["U", "A"]]},
            [S("S"), U("U"), A("A"), U("I\nX"), A("O")],
        ),
        ("text", {"text": "content"}, {"content": "c", "text": "t"}, [Message("text", "c")]),
        # The name of an optional field that is taken for another one is not read twice.
        ("alpaca", {"instruction": "input"}, {"input": "I", "output": "O"}, [U("I"), A("O")]),
        ("prompt_answer", {"prompt": "system"}, {"system": "p", "answer": "a"}, [U("p"), A("a")]),
    ],
)
def test_renamed_fields_are_read_and_their_old_names_are_not(name, fields, record, expected):
    assert parse(record, name, fields) == expected


@pytest.mark.parametrize(
    ("name", "fields", "twice"),
    [
        ("prompt_answer", {"prompt": "x", "answer": "x"}, "x"),
        ("prompt_answer", {"prompt": "answer"}, "answer"),
        ("alpaca", {"input": "output"}, "output"),
    ],
)
def test_two_fields_of_one_name_are_a_mistake_of_the_config(name, fields, twice):
    with pytest.raises(UserError, match=repr(twice)) as error:
        choose_format(name, fields, "data.tasks[3].fields")
    assert error.value.where == "data.tasks[3].fields"


@pytest.mark.parametrize(
    "roles", ["", "u", "a", "u u a", "u s a", "u a u", "s", "s a", "s s u a", "u a a", "u a s", "u a s u a"], ids=lambda roles: roles or "none"
)
@pytest.mark.parametrize("name", ["mftcoder", "messages", "sharegpt"])
def test_turns_that_do_not_alternate_from_user_to_assistant_are_refused(name, roles):
    speaker, said = ("from", "value") if name == "sharegpt" else ("role", "content")
    names = {"s": "system", "u": "user", "a": "assistant"}
    rounds = turns(*((names[role], "x") for role in roles.split()), speaker=speaker, said=said)
    with pytest.raises(BadSample, match=rf"{FORMAT_FIELDS[name][0]}.*(is due|must end with|a list of turns)"):
        parse({FORMAT_FIELDS[name][0]: rounds}, name)


@pytest.mark.parametrize(
    ("name", "role"),
    [("mftcoder", "function"), ("messages", "tool"), ("messages", "function"), ("sharegpt", "function_call"), ("sharegpt", "observation")],
)
def test_turns_of_tools_are_refused_by_name(name, role):
    key = FORMAT_FIELDS[name][0]
    speaker, said = ("from", "value") if name == "sharegpt" else ("role", "content")
    with pytest.raises(BadSample, match=rf"{key}\[1\]\.{speaker} is '{role}': tool turns are not supported"):
        parse({key: turns(("user", "x"), (role, "x"), speaker=speaker, said=said)}, name)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, r"messages\[1\] calls a tool: tool turns are not supported"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, r"messages\[1\] calls a tool"),
        ({"role": "assistant", "content": "a", "weight": 0}, r"messages\[1\]\.weight is 0"),
        ({"role": "assistant", "content": None}, r"messages\[1\]\.content must be text, not null"),
        ({"role": "assistant", "content": []}, r"messages\[1\]\.content must be text, not an empty list"),
        ({"role": "assistant", "content": ["a"]}, r"messages\[1\]\.content\[0\] must be an object with type and text, not text"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}, r"content\[0\] is of type 'image_url': only text"),
        ({"role": "assistant", "content": [{"type": "text"}]}, r"content\[0\] has no key \"text\"; it has 'type'"),
        ({"role": "assistant", "content": [{"type": "text", "text": 1}]}, r"content\[0\]\.text must be text, not a number"),
        ({"role": "human", "content": "a"}, r"messages\[1\]\.role is 'human': allowed: assistant, developer, system, user"),
    ],
)
def test_what_messages_cannot_take_over_is_said(turn, reason):
    with pytest.raises(BadSample, match=reason):
        parse({"messages": [{"role": "user", "content": "u"}, turn]}, "messages")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"chat_rounds": [', "not JSON"),
        (b'{"chat_rounds": NaN}', "NaN is no JSON value"),
        (b'{"chat_rounds": [], "other": -Infinity}', "-Infinity is no JSON value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b"[1]", "not a list"),
        (b"null", "not null"),
        (b"\xff\xfe", "not UTF-8 text: byte 0xff at position 1"),
        (b"\xef\xbb\xbf{}", "a byte order mark that is not at the file's start at column 1"),
        (b"{}", 'the line has no key "chat_rounds"; it has none'),
        (b'{"\\ud800": 1}', r"""no key "chat_rounds"; it has '\\ud800'"""),
        (b'{"chat_rounds": {}}', "not an empty object"),
        (b'{"chat_rounds": null}', '"chat_rounds" must be a list of turns, not null'),
        (b'{"chat_rounds": 1e999}', "not a number"),
        (b'{"chat_rounds": [[[1]]]}', r"chat_rounds\[0\] must be an object with role and content, not a list"),
        (b'{"chat_rounds": [{"role": "human"}]}', r"""chat_rounds\[0\] has no key "content"; it has 'role'"""),
        (b'{"chat_rounds": [{"from": "human", "value": "x"}]}', r"""chat_rounds\[0\] has no key "role"; it has 'from', 'value'"""),
        (b'{"chat_rounds": [{"role": 1, "content": "x"}]}', r"chat_rounds\[0\]\.role must be text, not a number"),
        (b'{"chat_rounds": [{"role": [], "content": "x"}]}', r"chat_rounds\[0\]\.role must be text, not an empty list"),
        (b'{"chat_rounds": [{"role": "human", "content": ["x"]}]}', "content must be text, not a list"),
        (b'{"chat_rounds": [{"role": "humann", "content": "x"}]}', 'did you mean "human"'),
        (b'{"chat_rounds": [{"role": "human", "content": "\\ud800"}]}', r"content holds half a character \(lone surrogate '\\ud800'\)"),
        (b'{"chat_rounds": [{"role": "human", "content": "a\\u0000"}]}', "content holds a null character"),
        (b'{"chat_rounds": [{"role": "human", "content": "a\0"}]}', "not JSON"),
        (b'{"id": 1, "chat_rounds": [], "id": 2}', "the key 'id' is twice in one object"),
        (b'{"chat_rounds": [{"role": "human", "content": "a", "content": "b"}]}', "the key 'content' is twice"),
    ],
)
def test_a_bad_line_says_what_is_wrong(text, reason):
    with pytest.raises(BadSample, match=reason):
        parse(text, "mftcoder")


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("question_answer", {"question": "q", "response": "a"}, r"""the line has no key "answer"; it has 'question', 'response'"""),
        ("question_answer", {"question": None, "answer": "a"}, '"question" must be text, not null'),
        ("question_answer", {"question": "q", "answer": "a", "system": {}}, '"system" must be text, not an empty object'),
        ("alpaca", {"instruction": "i"}, 'the line has no key "output"'),
        ("alpaca", {"instruction": "i", "output": None}, '"output" must be text, not null'),
        ("alpaca", {"instruction": "i", "output": "o", "input": 3}, '"input" must be text, not a number'),
        ("alpaca", {"instruction": "i", "output": "o", "history": "h"}, r'"history" must be a list of pairs \[user, assistant\], not text'),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["u", "a"], ["u"]]}, r"history\[1\] must be a pair .* not a list of 1"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["u", None]]}, r"history\[0\]\[1\] must be text, not null"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]\.value must be text, not null"),
        ("text", {"text": ""}, '"text" is empty text'),
        ("text", {"text": None}, '"text" must be text, not null'),
        ("text", {"content": "c"}, """the line has no key "text"; it has 'content'"""),
    ],
)
def test_a_field_that_is_wrong_is_named(name, record, reason):
    with pytest.raises(BadSample, match=reason):
        parse(record, name)


def test_reasons_name_fields_as_the_file_does():
    with pytest.raises(BadSample, match='"solution" must be text, not a number'):
        parse({"question": "q", "solution": 3}, "prompt_answer", {"prompt": "question", "answer": "solution"})
    with pytest.raises(BadSample, match=r"talk\[0\]\.content must be text"):
        parse({"talk": [{"role": "human", "content": 1}]}, "mftcoder", {"chat_rounds": "talk"})
    with pytest.raises(BadSample, match=r"past\[0\]\[0\] holds a null character"):
        parse({"instruction": "i", "output": "o", "past": [["\0", "a"]]}, "alpaca", {"history": "past"})
