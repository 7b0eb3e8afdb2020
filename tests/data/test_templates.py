import pickle

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mftcoder_coba.config import MarkersConfig
from mftcoder_coba.data.formats import BadSample, Message
from mftcoder_coba.data.templates import Segment, choose, fingerprint, load_tokenizer
from mftcoder_coba.errors import UserError

CHATML = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_PROMPT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
FUSSY = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + NO_PROMPT
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
SHOUTING = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
WITHOUT_REASONING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
# Reasoning stays in the last turn alone, which gets an empty one where it has none.
LAST_REASONING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] | trim }}{% endif %}",
)
TALK = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "why?"), Message("assistant", "\n\nso 😀")]


def byte_level(chat_template=None, eos="<|end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a token for two line ends, which may join across a border."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|start|>", "<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(["assistant user system\n\n\n\n yes why so"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=chat_template)


def pieces(template, messages, tokenizer) -> list[tuple[str, bool]]:
    """Decoded runs of equal mask: what a person would underline."""
    ids, mask = template.encode(messages)
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b].tolist()), bool(mask[a])) for a, b in zip(borders[:-1], borders[1:], strict=True)]


def test_a_chat_template_supervises_every_answer_with_its_end_token_and_nothing_else():
    tokenizer = byte_level(CHATML)
    template = choose("auto", tokenizer)
    assert template.name == "tokenizer"
    assert pieces(template, TALK, tokenizer) == [
        ("<|start|>system\nBe kind.<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n", False),
        ("yes<|end|>", True),
        ("\n<|start|>user\nwhy?<|end|>\n<|start|>assistant\n", False),
        ("\n\nso 😀<|end|>", True),
    ]


def test_a_token_never_joins_prompt_and_answer():
    tokenizer = byte_level(CHATML)
    assert "ĊĊ" in tokenizer.get_vocab()
    ids, mask = choose("auto", tokenizer).encode([Message("user", "a"), Message("assistant", "\nb")])
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    first = int(np.argmax(mask))
    assert ids[first - 1] == newline and ids[first] == newline


def test_a_given_system_turn_replaces_the_default_one():
    tokenizer = byte_level(CHATML)
    found = pieces(choose("auto", tokenizer), [Message("system", "Be brief."), *TALK[:2]], tokenizer)
    assert found[0][0].startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user")


def test_an_empty_answer_is_its_end_token():
    tokenizer = byte_level(CHATML)
    ids, mask = choose("auto", tokenizer).encode([Message("user", "a"), Message("assistant", "")])
    assert ids[mask].tolist() == [tokenizer.eos_token_id] and mask[-1]


@pytest.mark.parametrize("answer", ["yes", "", "s", "[assistant]"])
def test_a_role_header_is_not_supervised_where_the_template_has_no_generation_prompt(answer):
    tokenizer = byte_level(NO_PROMPT)
    rendered = choose("auto", tokenizer).render([Message("user", "hi"), Message("assistant", answer)])
    assert rendered == [Segment("[user] hi<|end|>[assistant] ", False), Segment(f"{answer}<|end|>", True)]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_a_way_out():
    template = choose("auto", byte_level(FORGETFUL))
    with pytest.raises(UserError, match="rewrites earlier turns") as error:
        template.encode(TALK)
    assert "mftcoder" in error.value.fix


def test_a_conversation_that_the_template_refuses_is_a_bad_sample():
    with pytest.raises(BadSample, match="no system turns"):
        choose("auto", byte_level(FUSSY)).encode([Message("system", "x"), *TALK])


def test_role_markers_with_a_byte_level_tokenizer():
    tokenizer = byte_level()
    template = choose("auto", tokenizer)
    assert template.name == "mftcoder"
    assert pieces(template, [Message("system", "sys"), *TALK], tokenizer) == [
        ("<s>system\nsys\n<s>human\nhi\n<s>bot\n", False),
        ("yes<|end|>", True),
        ("\n<s>human\nwhy?\n<s>bot\n", False),
        ("\n\nso 😀<|end|>", True),
    ]


def test_role_markers_with_a_sentencepiece_tokenizer_token_by_token(shared):
    tokenizer = load_tokenizer(str(shared / "models" / "stories260k"))
    ids, mask = choose("auto", tokenizer).encode([Message("user", "Hi\n"), Message("assistant", "the cat")])
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    newline = "<0x0A>"
    assert tokens == ["<s>", "h", "u", "m", "an", newline, "H", "i", newline, "<s>", "b", "ot", newline, "t", "he", "▁c", "at", "</s>"]
    assert mask.tolist() == [False] * 13 + [True] * 5


def test_a_chat_template_on_a_sentencepiece_tokenizer(shared):
    tokenizer = load_tokenizer(str(shared / "models" / "stories260k"))
    turn = "'<s>ask ' + m.content + ' tell' if m.role == 'user' else ' ' + m.content + '</s>'"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {turn} }}}}{{% endfor %}}"
    template = choose("auto", tokenizer)
    assert template.render(TALK[:2]) == [Segment("<s>ask hi tell", False), Segment(" yes</s>", True)]
    ids, mask = template.encode(TALK)
    marked = ["".join(tokenizer.convert_ids_to_tokens(ids[mask == flag].tolist())) for flag in (False, True)]
    emoji = "".join(f"<0x{byte:02X}>" for byte in "😀".encode())
    assert marked == ["<s>ask▁hi▁tell<s>ask▁why?▁tell", f"▁yes</s>▁<0x0A><0x0A>so▁{emoji}</s>"]


def test_a_template_that_refuses_the_shortest_talk_can_still_be_used():
    needs_system = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    tokenizer = byte_level(needs_system)
    template = choose("auto", tokenizer)
    assert pieces(template, [Message("system", "s"), *TALK[:2]], tokenizer)[1] == ("yes<|end|>", True)
    with pytest.raises(BadSample, match="system first"):
        template.encode(TALK)


@pytest.mark.parametrize("answer", ["日本語 😀", " leading", "", "\n\nlines\n", "a  b\t"])
def test_sentencepiece_masks_cover_exactly_the_answer(shared, answer):
    tokenizer = load_tokenizer(str(shared / "models" / "stories260k"))
    ids, mask = choose("mftcoder", tokenizer).encode([Message("user", "q"), Message("assistant", answer), *TALK])
    prompt = tokenizer("<s>human\nq\n<s>bot\n", add_special_tokens=False)["input_ids"]
    first = int(np.argmax(mask))
    end = first + int(np.argmin(mask[first:]))
    assert ids[:first].tolist() == prompt
    assert ids[end - 1] == tokenizer.eos_token_id
    # The unsupervised start is given so that the decoder does not strip a leading blank.
    assert tokenizer.decode(ids[: end - 1].tolist()).removeprefix(tokenizer.decode(prompt)) == answer


def test_a_batch_is_tokenised_as_its_documents_are_alone(shared):
    for tokenizer in (byte_level(CHATML), load_tokenizer(str(shared / "models" / "stories260k"))):
        template = choose("auto", tokenizer)
        talks = [TALK, TALK[:2], [Message("user", ""), Message("assistant", "x")]]
        for (ids, mask), talk in zip(template.encode_batch(talks), talks, strict=True):
            alone = template.encode(talk)
            assert ids.dtype == np.int32 and mask.dtype == np.bool_
            assert np.array_equal(ids, alone[0]) and np.array_equal(mask, alone[1])


def test_a_tokenizer_without_what_the_template_needs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        choose("auto", byte_level(CHATML, eos=None))
    with pytest.raises(UserError, match="no chat template"):
        choose("tokenizer", byte_level())
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))


def test_the_fingerprint_follows_vocabulary_and_template():
    assert fingerprint(byte_level()) == fingerprint(byte_level())
    other = byte_level()
    other.add_tokens(["new"])
    assert len({fingerprint(byte_level()), fingerprint(byte_level(CHATML)), fingerprint(other)}) == 3


def marked(prepend_scheme="first") -> PreTrainedTokenizerFast:
    """A SentencePiece-style tokenizer whose word mark and line ends join with what follows."""
    words = ["▁y", "▁yes", "\n\n", "es", "yes"]
    merges = [("e", "s"), ("y", "es"), ("▁", "yes"), ("\n", "\n")]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz<>:\n.▁"))
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_start_token(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return tokenizer


def tokens_of(tokenizer, encoded) -> list[tuple[str, bool]]:
    return list(zip(tokenizer.convert_ids_to_tokens(encoded[0].tolist()), encoded[1].tolist(), strict=True))


@pytest.mark.parametrize(
    ("marker", "answer", "supervised"),
    [("bot: ", "yes", ["yes", "</s>"]), ("bot:\n", "\nyes", ["\n", "yes", "</s>"]), ("bot", " yes", ["▁yes", "</s>"])],
)
def test_a_sentencepiece_prompt_has_the_tokens_that_it_has_alone(marker, answer, supervised):
    tokenizer = marked()
    ids, mask = choose(MarkersConfig(system="", user="", assistant=marker), tokenizer).encode([Message("user", "ab"), Message("assistant", answer)])
    assert ids[~mask].tolist() == tokenizer(f"ab\n{marker}", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[mask].tolist()) == supervised


def test_behind_a_special_token_a_word_is_marked_as_the_tokenizer_does_it():
    for scheme, first in (("always", "▁yes"), ("first", "yes")):
        tokenizer = marked(scheme)
        markers = MarkersConfig(system="", user="", assistant="<s>")
        ids, mask = choose(markers, tokenizer).encode([Message("user", "ab"), Message("assistant", "yes")])
        assert tokenizer.convert_ids_to_tokens(ids[mask].tolist()) == [first, "</s>"]
        assert ids.tolist() == tokenizer("ab\n<s>yes</s>", add_special_tokens=False)["input_ids"]


def test_markers_of_ones_own_stand_before_each_turn_and_end_each_answer():
    markers = MarkersConfig(system="Rules: ", user="Ask: ", assistant="Say: ", end="###")
    template = choose(markers, byte_level(CHATML))
    assert template.name == "markers"
    assert template.render([Message("system", "be kind"), *TALK]) == [
        Segment("Rules: be kind\nAsk: hi\nSay: ", False),
        Segment("yes###", True),
        Segment("\nAsk: why?\nSay: ", False),
        Segment("\n\nso 😀###", True),
    ]


def test_without_an_end_marker_answers_end_with_the_end_of_sequence_token():
    tokenizer = byte_level()
    markers = MarkersConfig(system="S:", user="U:", assistant="A:")
    ids, mask = choose(markers, tokenizer).encode(TALK)
    assert tokenizer.decode(ids[mask].tolist()) == "yes<|end|>\n\nso 😀<|end|>"
    assert choose(MarkersConfig(system="<s>system\n", user="<s>human\n", assistant="<s>bot\n"), tokenizer).render(TALK) == choose(
        "mftcoder", tokenizer
    ).render(TALK)


def test_no_blank_line_follows_an_end_marker_that_ends_a_line():
    template = choose(MarkersConfig(system="S:", user="U:", assistant="A:", end="\n\n"), byte_level())
    assert [segment.text for segment in template.render(TALK)][1:3] == ["yes\n\n", "U:why?\nA:"]


def test_the_identity_tells_templates_apart_and_agrees_for_equal_ones():
    def identity(template, **options):
        return choose(template, byte_level(**options)).identity

    markers = [MarkersConfig(system="S", user="U", assistant=a, end=end) for a, end in (("A", None), ("A", "."), ("B", "."))]
    assert (
        len({identity("mftcoder"), identity("auto", chat_template=CHATML), identity("auto", chat_template=NO_PROMPT), *map(identity, markers)}) == 6
    )
    assert identity("auto") == identity("mftcoder") and identity(markers[1]) == identity(markers[1])
    assert identity(markers[0], eos="<|start|>") != identity(markers[0])


@pytest.mark.parametrize("template", ["tokenizer", "mftcoder", MarkersConfig(system="S", user="U", assistant="A", end=".")])
def test_plain_text_is_supervised_whole_with_an_end_token_under_every_template(template):
    tokenizer = byte_level(CHATML)
    assert choose(template, tokenizer).render([Message("text", "why so\n")]) == [Segment("why so\n<|end|>", True)]
    assert pieces(choose(template, tokenizer), [Message("text", "why so\n")], tokenizer) == [("why so\n<|end|>", True)]


def test_plain_text_begins_as_the_tokenizer_begins_it():
    tokenizer = byte_level()
    tokenizer.bos_token = "<|start|>"
    assert choose("auto", tokenizer).encode([Message("text", "so")])[1].all()
    template = choose("auto", with_start_token(tokenizer))
    assert template.render([Message("text", "so")]) == [Segment("<|start|>", False), Segment("so<|end|>", True)]
    ids, mask = template.encode([Message("text", "so")])
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_plain_text_keeps_the_word_mark_behind_the_start_token():
    tokenizer = with_start_token(marked())
    ids, mask = choose("auto", tokenizer).encode([Message("text", "yes")])
    assert tokens_of(tokenizer, (ids, mask)) == [("<s>", False), ("▁yes", True), ("</s>", True)]
    assert ids[:-1].tolist() == tokenizer("yes")["input_ids"]


def test_a_batch_holds_what_each_conversation_gives_alone_errors_as_values():
    tokenizer = byte_level(FUSSY.replace(NO_PROMPT, FORGETFUL + "{% if messages | length > 3 %} {% endif %}"))
    template = choose("auto", tokenizer)
    talks = [TALK[:2], [Message("system", "s"), *TALK[:2]], TALK, [Message("text", "plain")], [Message("user", "q"), Message("assistant", "")]]
    results = template.encode_batch(talks)
    assert [type(result).__name__ for result in results] == ["tuple", "BadSample", "UserError", "tuple", "tuple"]
    for talk, result in zip(talks, results, strict=True):
        if isinstance(result, Exception):
            with pytest.raises(type(result)) as error:
                template.encode(talk)
            assert str(error.value) == str(result)
        else:
            assert all(np.array_equal(a, b) for a, b in zip(template.encode(talk), result, strict=True))
    assert template.encode_batch([]) == []


def test_segments_become_the_tokens_that_the_tokenizer_makes_of_them():
    # What two prompts share may end before, in or behind a special token, a longer twin of it, or one that takes blanks in.
    rng = np.random.default_rng(0)
    tokenizer = byte_level(CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|start|>yes", AddedToken("<|x|>", lstrip=True, rstrip=True), "\n<|end|>s"]})
    words = ["<|start|>", "<|end|>", "<|x|>", " ", "\n", "yes", "s", "é", "<|"]
    template = choose("auto", tokenizer)
    for _ in range(300):
        shared, *texts = ("".join(rng.choice(words, 4)) for _ in range(5))
        talks = [[Message("user", shared + texts[n]), Message("assistant", texts[n + 1])] for n in (0, 2)]
        for talk, (ids, mask) in zip(talks, template.encode_batch(talks), strict=True):
            segments = template.render(talk)
            expected = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
            assert ids.tolist() == sum(expected, [])
            assert mask.tolist() == [segment.supervised for segment, part in zip(segments, expected, strict=True) for _ in part]


def test_truncation_and_padding_of_the_tokenizer_change_nothing_and_stay():
    tokenizer = byte_level(CHATML)
    expected = choose("auto", tokenizer).encode(TALK)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=64)
    before = backend.truncation, backend.padding
    template = choose("auto", tokenizer)
    for result in template.encode_batch([TALK, TALK[:2], TALK])[::2]:
        assert all(np.array_equal(a, b) for a, b in zip(result, expected, strict=True))
    assert (backend.truncation, backend.padding) == before


def test_a_template_crosses_process_borders():
    template = choose("auto", byte_level(CHATML))
    assert np.array_equal(pickle.loads(pickle.dumps(template)).encode(TALK)[0], template.encode(TALK)[0])


def test_a_template_that_trims_is_masked_as_it_writes():
    tokenizer = byte_level(TRIMMING)
    assert pieces(choose("auto", tokenizer), TALK, tokenizer)[1::2] == [("yes<|end|>", True), ("so 😀<|end|>", True)]
    assert pieces(choose("auto", tokenizer), [Message("user", "a"), Message("assistant", " \n")], tokenizer)[1:] == [("<|end|>", True)]


@pytest.mark.parametrize(("chat_template", "answer"), [(SHOUTING, "yes"), (WITHOUT_REASONING, "<think>hm</think>yes")])
def test_a_template_that_changes_what_an_answer_says_is_refused(chat_template, answer):
    with pytest.raises(BadSample, match="changes or drops text of an assistant turn"):
        choose("auto", byte_level(chat_template)).encode([Message("user", "hi"), Message("assistant", answer)])


def test_a_template_that_drops_reasoning_leaves_answers_without_it_alone():
    tokenizer = byte_level(WITHOUT_REASONING)
    assert pieces(choose("auto", tokenizer), TALK, tokenizer)[1::2] == [("yes<|end|>", True), ("\n\nso 😀<|end|>", True)]


def test_a_template_that_keeps_reasoning_in_the_last_turn_alone_takes_single_rounds():
    tokenizer = byte_level(LAST_REASONING)
    template = choose("auto", tokenizer)
    for answer, written in (("yes", "<think>\n\n</think>\n\nyes<|end|>"), ("<think>hm</think>yes", "<think>hm</think>yes<|end|>")):
        assert pieces(template, [Message("user", "hi"), Message("assistant", answer)], tokenizer)[1:] == [(written, True)]
        with pytest.raises(UserError, match="rewrites earlier turns"):
            template.encode([Message("user", "hi"), Message("assistant", answer), *TALK])


def test_an_answer_may_begin_in_a_generation_prompt_that_opens_the_reasoning():
    opened = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}")
    tokenizer = byte_level(opened)
    found = pieces(choose("auto", tokenizer), [Message("user", "hi"), Message("assistant", "<think>\nhm</think>so")], tokenizer)
    assert found[0][0].endswith("assistant\n<think>\n") and found[1:] == [("hm</think>so<|end|>", True)]


def test_a_chat_template_that_is_not_valid_is_the_users_to_mend():
    with pytest.raises(UserError, match="chat template cannot be used"):
        choose("auto", byte_level("{% for m in messages %}"))


def test_a_tokenizer_that_spells_out_its_end_token_is_refused():
    tokenizer = byte_level()
    tokenizer.split_special_tokens = True
    with pytest.raises(UserError, match="does not read its end-of-sequence token") as error:
        choose("auto", tokenizer)
    assert "split_special_tokens" in error.value.fix


def test_a_tokenizer_without_a_fast_engine_gives_the_same_masks():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    ids, mask = choose("mftcoder", tokenizer).encode(TALK)
    # Its ids are bytes, moved by three special tokens; the end token is 1.
    assert bytes((ids[~mask] - 3).tolist()).decode() == "<s>human\nhi\n<s>bot\n\n<s>human\nwhy?\n<s>bot\n"
    assert ids[mask].tolist() == [byte + 3 for byte in b"yes"] + [1] + [byte + 3 for byte in "\n\nso 😀".encode()] + [1]
    assert choose("mftcoder", tokenizer).encode([Message("text", "a")])[0].tolist() == [100, 1]
