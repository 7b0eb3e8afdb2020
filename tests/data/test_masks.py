"""Masks, token by token: every kind of template x tokenizer x conversation, against texts and tokens that are written here by hand."""

import io
import json
import re
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTSw3Tokenizer, PreTrainedTokenizerFast

from mftcoder_coba.config import MarkersConfig
from mftcoder_coba.data.formats import BadSample, Message
from mftcoder_coba.data.templates import choose, load_tokenizer

SYSTEM, USER, BOT = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))

# ---------------------------------------------------------------------------------------------------------------------
# Templates, each with what it writes as (text, supervised) parts.

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'system' %}<<{{ m.content }}>>\n{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
MARKERS = MarkersConfig(system="# Rules\n", user="# Question\n", assistant="# Answer\n")
ENDED = MarkersConfig(system="(", user="Q: ", assistant="A: ", end=" <END>")


def chatml(messages):
    if messages[0].role != "system":
        yield "<s>system\nBe kind.</s>\n", False
    for message in messages:
        yield f"<s>{message.role}\n", False
        yield f"{message.content}</s>", message.role == "assistant"
        yield "\n", False


def inst(messages):
    yield "<s>", False
    for message in messages:
        before, after = {"system": ("<<", ">>\n"), "user": ("[INST] ", " [/INST]"), "assistant": (" ", "</s>")}[message.role]
        yield before + message.content + after, message.role == "assistant"


def marked(system, user, assistant, end):
    def parts(messages):
        for message in messages:
            if message.role == "assistant":
                yield assistant, False
                yield message.content + end, True
                yield "\n", False
            else:
                yield {"system": system, "user": user}[message.role] + message.content, False
                yield "" if message.content.endswith("\n") else "\n", False

    return parts


# name -> (data.template, the tokenizer's chat template, parts)
TEMPLATES = {
    "default system turn": ("tokenizer", CHATML, chatml),
    "no generation prompt": ("tokenizer", INST, inst),
    "mftcoder": ("mftcoder", None, marked("<s>system\n", "<s>human\n", "<s>bot\n", "</s>")),
    "markers": (MARKERS, None, marked("# Rules\n", "# Question\n", "# Answer\n", "</s>")),
    "markers with an end": (ENDED, None, marked("(", "Q: ", "A: ", " <END>")),
}

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers.

TEXTS = [
    "# Question Q: human user yes the cat sat\n\n\n\nA: bot assistant system so why? [INST] [/INST]\n",
    "A: yes",
    "  a  b\n",
    "你好，世界。 مرحبا ওহে",
] * 30
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def unigram() -> PreTrainedTokenizerFast:
    """Metaspace, with a word mark before the first letter of every piece between special tokens; unknown letters become bytes."""
    letters = [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:?#/[]<>"]
    words = [(word, -3.0) for word in ("▁yes", "yes", "▁A", ":", "▁so", "▁the", "at")]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *letters, *words]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def sentencepiece_model(folder, **options):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def sentencepiece_folder(folder, legacy):
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(sentencepiece_model(folder)))


IN_PYTHON = "sentencepiece in Python"
KINDS = {
    "byte-level": lambda folder, request: byte_level(),
    "unigram": lambda folder, request: unigram(),
    "sentencepiece": lambda folder, request: sentencepiece_folder(folder, legacy=False),
    "sentencepiece, a mark behind every special token": lambda folder, request: sentencepiece_folder(folder, legacy=True),
    "sentencepiece, no mark": lambda folder, request: no_mark(folder),
    IN_PYTHON: lambda folder, request: GPTSw3Tokenizer(str(sentencepiece_model(folder) / "tokenizer.model"), **SPECIAL),
    "stories260k": lambda folder, request: load_tokenizer(str(request.getfixturevalue("shared") / "models" / "stories260k")),
}
MARKED_BEHIND_SPECIAL = {"unigram", "sentencepiece, a mark behind every special token", IN_PYTHON}
MARKED = {*MARKED_BEHIND_SPECIAL, "sentencepiece", "stories260k"}


def no_mark(folder):
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(sentencepiece_model(folder, add_dummy_prefix=False)))


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory, request):
    made = {}

    def find(kind):
        if kind not in made:
            made[kind] = KINDS[kind](tmp_path_factory.mktemp("tokenizer"), request)
        return made[kind]

    return find


# ---------------------------------------------------------------------------------------------------------------------
# Conversations.

CONVERSATIONS = {
    "one round": [USER("the cat sat"), BOT("yes")],
    "three rounds": [USER("so"), BOT("yes"), USER("why?"), BOT("the cat"), USER("so?"), BOT("yes yes")],
    "a system turn": [SYSTEM("so be it"), USER("so"), BOT("yes"), USER("why?"), BOT("so")],
    "an empty user turn": [USER(""), BOT("yes"), USER(""), BOT("so")],
    "an empty assistant turn": [USER("so"), BOT(""), USER("why?"), BOT("yes"), USER("so"), BOT("")],
    "an empty system turn": [SYSTEM(""), USER("so"), BOT("yes")],
    "Chinese": [USER("你好，世界。"), BOT("世界，你好！"), USER("好"), BOT("好。")],
    "Arabic": [USER("مرحبا بالعالم"), BOT("مَرْحَبًا"), USER("نعم"), BOT("لا")],
    "Bengali": [SYSTEM("ওহে"), USER("ওহে বিশ্ব"), BOT("বিশ্ব ওহে")],
    "emoji with joiners": [USER("👩‍👩‍👧‍👦"), BOT("🏳️‍🌈👍🏽"), USER("e\u0301"), BOT("👩🏽‍💻 yes")],
    "blanks and newlines around": [USER("\n so \n\n"), BOT("\n\n  yes \n"), USER("  "), BOT("\n"), USER("\t"), BOT(" ")],
    "text like the markers": [USER("# Answer\nA: [/INST] yes"), BOT("# Question\nQ: so\nhuman\n"), USER("A:"), BOT("bot\n")],
    "text that spells special tokens": [USER("so</s>\n<s>bot\nyes"), BOT("a</s>b<s>"), USER("<s>"), BOT("</s>")],
    "20,000 characters": [USER("the cat sat. " * 800), BOT("yes, so\n" * 1300), USER("why? 你好" * 50), BOT("x" * 500)],
}


def joined(parts):
    """Neighbours of equal mask as one; what follows the last supervised one is left out."""
    runs = []
    for text, supervised in parts:
        if text and runs and runs[-1][1] == supervised:
            runs[-1][0] += text
        elif text:
            runs.append([text, supervised])
    return runs if runs[-1][1] else runs[:-1]


def spelled(tokenizer, ids) -> list[bytes]:
    """The bytes of each token, word marks as blanks, by the plain rules of each vocabulary and not by its decoder."""
    byte_level, alphabet, texts = "Ġ" in tokenizer.get_vocab(), {letter: byte for byte, letter in _gpt2_bytes()}, []
    for token in tokenizer.convert_ids_to_tokens([int(number) for number in ids]):
        if token in SPECIAL.values():
            texts.append(token.encode())
        elif byte_level:
            texts.append(bytes(alphabet[letter] for letter in token))
        elif match := re.fullmatch("<0x(..)>", token):
            texts.append(bytes([int(match[1], 16)]))
        else:
            texts.append(token.replace("▁", " ").encode())
    return texts


def _gpt2_bytes():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*((byte, chr(byte)) for byte in plain), *((byte, chr(256 + place)) for place, byte in enumerate(others))]


def as_written(kind, runs):
    """Runs as the tokenizer keeps them: with a blank for the word mark at the start of what it marks."""
    text, written = "", []
    for run, supervised in runs:
        written.append(["", supervised])
        for piece in re.split("(<s>|</s>|<unk>)", run):
            starts = kind in MARKED and (not text or kind in MARKED_BEHIND_SPECIAL and text.endswith(("<s>", "</s>")))
            if kind == IN_PYTHON:  # this one composes letters
                piece = unicodedata.normalize("NFC", piece)
            if piece and piece not in SPECIAL.values() and starts and (kind == IN_PYTHON or not piece.startswith(" ")):
                piece = " " + piece
            written[-1][0] += piece
            text += piece
    return written


def runs_of(mask):
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return zip(borders[:-1], borders[1:], strict=True)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_with_its_end_is_supervised_and_nothing_else(kind, template, conversation, tokenizer_of):
    tokenizer, messages = tokenizer_of(kind), CONVERSATIONS[conversation]
    chosen, tokenizer.chat_template, parts = TEMPLATES[template]
    expected = as_written(kind, joined(parts(messages)))
    ids, mask = choose(chosen, tokenizer).encode(messages)
    assert ids.dtype == np.int32 and mask.dtype == np.bool_ and ids.shape == mask.shape
    found = [(b"".join(spelled(tokenizer, ids[start:end])), bool(mask[start])) for start, end in runs_of(mask)]
    assert found == [(text.encode(), supervised) for text, supervised in expected]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_whole_text_unless_one_would_join_two_turns(kind, conversation, tokenizer_of):
    tokenizer, messages = tokenizer_of(kind), CONVERSATIONS[conversation]
    template, tokenizer.chat_template, parts = TEMPLATES["mftcoder"]
    runs = joined(parts(messages))
    borders = np.cumsum([len(text.encode()) for text, _ in as_written(kind, runs)])
    whole = tokenizer("".join(text for text, _ in runs), add_special_tokens=False)["input_ids"]
    ends = np.cumsum([len(text) for text in spelled(tokenizer, whole)])
    ids, mask = choose(template, tokenizer).encode(messages)
    if set(borders) <= set(ends):
        assert ids.tolist() == whole
        assert mask.tolist() == [runs[place][1] for place in np.searchsorted(borders, ends)]
    else:
        assert len(ids) > len(whole)
    assert ids[: int(np.argmax(mask))].tolist() == tokenizer(runs[0][0], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("content", ["yes", " so\n", "", "你好 👩‍👩‍👧‍👦", "a</s>\n<s>b"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_is_supervised_from_its_first_letter_to_the_end_token(kind, content, tokenizer_of):
    tokenizer = tokenizer_of(kind)
    ids, mask = choose("mftcoder", tokenizer).encode([Message("text", content)])
    plain = tokenizer(content, add_special_tokens=False)["input_ids"]
    starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    assert starts == (kind == "stories260k")
    assert ids.tolist() == [tokenizer.bos_token_id] * starts + plain + [tokenizer.eos_token_id]
    assert mask.tolist() == [False] * starts + [True] * (len(plain) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens written out by hand, for vocabularies of a few words. Supervised runs stand after every other bar.


def with_words(words, letters, marked) -> PreTrainedTokenizerFast:
    """BPE that builds each word from its letters, left to right, and knows nothing else."""
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    merges += [("▁" if marked else "Ġ", word) for word in words[:2]]
    if marked:
        letters = [*letters, "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *("".join(pair) for pair in merges)])
    model = models.BPE({token: number for number, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=marked)
    tokenizer = Tokenizer(model)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = metaspace if marked else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


ROLES = ["user", "assistant", "system", "human", "bot"]
WORDS = {
    "bytes": lambda: with_words(["yes", "hi", *ROLES, "ĊĊ"], pre_tokenizers.ByteLevel.alphabet(), marked=False),
    "marks": lambda: with_words(["yes", "hi", *ROLES], "abcdefghijklmnopqrstuvwxyz:.", marked=True),
}
DEFAULT = "<s> system Ċ B e Ġ k i n d . </s> Ċ <s> user Ċ"
ASK = MarkersConfig(system="s:", user="u: ", assistant="a: ", end=".")

BY_HAND = [
    ("bytes", "default system turn", [USER("hi"), BOT("yes")], f"{DEFAULT} hi </s> Ċ <s> assistant Ċ | yes </s>"),
    (
        "bytes",
        "default system turn",
        [USER("hi"), BOT("yes"), USER("yes"), BOT("hi yes")],
        f"{DEFAULT} hi </s> Ċ <s> assistant Ċ | yes </s> | Ċ <s> user Ċ yes </s> Ċ <s> assistant Ċ | hi Ġyes </s>",
    ),
    ("bytes", "default system turn", [SYSTEM("hi"), USER(""), BOT("")], "<s> system Ċ hi </s> Ċ <s> user Ċ </s> Ċ <s> assistant Ċ | </s>"),
    ("bytes", "default system turn", [USER("\n\n"), BOT("\n\n")], f"{DEFAULT}Ċ Ċ </s> Ċ <s> assistant Ċ | ĊĊ </s>"),
    ("bytes", "default system turn", [USER("é"), BOT("ü\n")], f"{DEFAULT} Ã © </s> Ċ <s> assistant Ċ | Ã ¼ Ċ </s>"),
    ("bytes", "mftcoder", [USER("hi"), BOT("yes")], "<s> human Ċ hi Ċ <s> bot Ċ | yes </s>"),
    (
        "bytes",
        "mftcoder",
        [SYSTEM("yes"), USER("hi\n"), BOT("\n"), USER("hi"), BOT("")],
        "<s> system Ċ yes Ċ <s> human Ċ hi Ċ <s> bot Ċ | Ċ </s> | Ċ <s> human Ċ hi Ċ <s> bot Ċ | </s>",
    ),
    ("bytes", "mftcoder", [USER("</s>"), BOT("<s>bot")], "<s> human Ċ </s> Ċ <s> bot Ċ | <s> bot </s>"),
    ("bytes", ASK, [USER("hi"), BOT("yes"), USER("hi"), BOT(" yes")], "u : Ġhi Ċ a : Ġ | yes . | Ċ u : Ġhi Ċ a : Ġ | Ġyes ."),
    ("bytes", "no generation prompt", [USER("hi"), BOT("yes")], "<s> [ I N S T ] Ġhi Ġ [ / I N S T ] | Ġyes </s>"),
    ("bytes", "mftcoder", [Message("text", "hi yes\n")], "| hi Ġyes Ċ </s>"),
    ("marks", "mftcoder", [USER("hi"), BOT("yes")], "<s> human <0x0A> hi <0x0A> <s> bot <0x0A> | yes </s>"),
    (
        "marks",
        "mftcoder",
        [USER("hi yes"), BOT(" yes"), USER("é"), BOT("")],
        "<s> human <0x0A> hi ▁yes <0x0A> <s> bot <0x0A> | ▁yes </s> | <0x0A> <s> human <0x0A> <0xC3> <0xA9> <0x0A> <s> bot <0x0A> | </s>",
    ),
    ("marks", ASK, [USER("hi"), BOT("yes"), USER("yes"), BOT(" hi")], "▁ u : ▁hi <0x0A> a : ▁ | yes . | <0x0A> u : ▁yes <0x0A> a : ▁ | ▁hi ."),
    ("marks", ASK, [SYSTEM("hi"), USER(""), BOT("")], "▁ s : hi <0x0A> u : ▁ <0x0A> a : ▁ | ."),
    ("marks", "mftcoder", [Message("text", "yes hi")], "| ▁yes ▁hi </s>"),
]


@pytest.mark.parametrize(("words", "template", "messages", "tokens"), BY_HAND)
def test_tokens_and_mask_are_those_written_by_hand(words, template, messages, tokens):
    tokenizer = WORDS[words]()
    if isinstance(template, str):
        template, tokenizer.chat_template, _ = TEMPLATES[template]
    ids, mask = choose(template, tokenizer).encode(messages)
    expected = [(token, bool(place % 2)) for place, run in enumerate(tokens.split("|")) for token in run.split()]
    assert list(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), mask.tolist(), strict=True)) == expected


def test_a_text_that_no_lead_keeps_apart_is_refused():
    # Every lead that this tokenizer knows joins with the answer into one token.
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "</s>": 1, "x": 2, "▁": 3, "xx": 4, ":": 5}, [("x", "x")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    template = choose(MarkersConfig(system="", user="", assistant=":"), fast)
    with pytest.raises(BadSample, match="no mask fits"):
        template.encode([USER("x"), BOT("x")])
    assert fast.convert_ids_to_tokens(template.encode([USER("x"), BOT(":")])[0].tolist())[-2:] == [":", "</s>"]
