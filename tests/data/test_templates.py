import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mftcoder_coba.data.formats import BadSample, Message
from mftcoder_coba.data.templates import Segment, _inside_supervised, choose, fingerprint, load_tokenizer
from mftcoder_coba.errors import UserError

CHATML = (
    "{% if messages[0].role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_PROMPT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
FUSSY = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + NO_PROMPT
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
        for (ids, mask), talk in zip(template.tokenise([template.render(talk) for talk in talks]), talks, strict=True):
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


def test_where_a_whole_text_is_tokenised_a_token_across_the_border_is_not_supervised():
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    model.train_from_iterator(["\n\n"] * 50 + ["human bot xyz"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    ids, mask = choose("mftcoder", tokenizer).encode([Message("user", "x"), Message("assistant", "\nyz")])
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    border = tokens.index("\n\n")
    assert mask.tolist() == [place > border for place in range(len(tokens))]
    assert "".join(tokens[border + 1 :]) == "yz</s>"


def test_only_tokens_wholly_inside_an_answer_are_supervised():
    document = [Segment("ab", False), Segment("cde", True), Segment("f", False)]
    offsets = np.array([[0, 1], [1, 3], [2, 3], [3, 3], [3, 5], [4, 6], [5, 6], [6, 6]])
    assert _inside_supervised(offsets, document).tolist() == [False, False, True, True, True, False, False, False]
