"""A tiny Llama with random weights and a SentencePiece tokenizer trained on the tasks: everything from zero, for tests and CI.

    python -m data_tools.scratch_model --data data/stdlib [--out FOLDER] [--seed 0] [--vocabulary 2048]

The folder depends on the training texts and the options alone. It is made again only when one of them has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.common import cache_dir, locked, read_mark, replaced_folder, run, write_json
from mftcoder_coba.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

MARK = "scratch.json"
# 4 special tokens, 256 bytes, and room for characters and merges.
SMALLEST_VOCABULARY = 512
CONTEXT_TOKENS = 2048
# SentencePiece's stand-in for a space: text that holds it comes back with spaces, as with every SentencePiece model.
SPACE_MARK = "\u2581"


def read_texts(data: Path) -> list[str]:
    """Every message of `data`/TASK/train.jsonl, in the order of tasks and lines."""
    files = sorted(data.glob("*/train.jsonl"))
    if not files:
        raise UserError("no TASK/train.jsonl in this folder", str(data), "build it: python -m data_tools.build_stdlib_tasks")
    texts = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if not line:
                continue
            try:
                texts += [message["content"] for message in json.loads(line)["chat_rounds"]]
            except (ValueError, KeyError, TypeError):
                raise UserError("not a sample in MFTCoder's chat format", f"{file}:{number}") from None
    return texts


def train_sentencepiece(texts: Sequence[str], vocabulary: int) -> bytes:
    """A serialised BPE model with byte fallback, which changes no character of a text: code lives on its spaces and newlines."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            # Rare characters go to bytes: they are not worth a place in a small vocabulary.
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1_000_000,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        what = f"SentencePiece cannot train {vocabulary} pieces on these texts: {error}"
        raise UserError(what, "--vocabulary", "take a smaller number, or more data") from None
    return model.getvalue()


def save_tokenizer(sentencepiece_model: bytes, folder: Path) -> PreTrainedTokenizerBase:
    """Writes tokenizer.model and the fast tokenizer made from it; returns that one as `AutoTokenizer` loads it."""
    from transformers import AutoTokenizer

    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
    }
    write_json(folder / "tokenizer_config.json", settings)
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(folder)


def check_round_trip(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Raises ValueError for the first text that does not come back exactly."""
    for text in texts:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if back != text.replace(SPACE_MARK, " "):
            raise ValueError(f"the tokenizer does not keep this text: {text!r} became {back!r}")


def random_llama(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """About a million parameters, float32; the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32)


def make(data: Path, out: Path, vocabulary: int, seed: int) -> dict[str, Any]:
    """Makes the folder `out`, unless it is there and its texts and options are these. Returns what `scratch.json` records."""
    texts = read_texts(data)
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    wanted = {"texts_sha256": digest, "vocabulary": vocabulary, "seed": seed}
    with locked(out):
        record = read_mark(out, MARK)
        if record is not None and all(record.get(key) == value for key, value in wanted.items()):
            print(f"already there: {out}")
            return record
        with replaced_folder(out, MARK) as aside:
            tokenizer = save_tokenizer(train_sentencepiece(texts, vocabulary), aside)
            check_round_trip(tokenizer, texts)
            model = random_llama(vocabulary, seed)
            model.save_pretrained(aside)
            record = {**wanted, "texts": len(texts), "parameters": model.num_parameters()}
            write_json(aside / MARK, record)
        return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_tools.scratch_model", description="A tiny random Llama and its tokenizer.")
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="folder with TASK/train.jsonl (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=cache_dir() / "models" / "scratch", help="the folder to make (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="pieces of the tokenizer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args()
    if options.vocabulary < SMALLEST_VOCABULARY:
        raise UserError(f"{options.vocabulary} is below {SMALLEST_VOCABULARY}", "--vocabulary")
    out = options.out.expanduser().absolute()
    record = make(options.data.expanduser(), out, options.vocabulary, options.seed)
    print(f"{record['parameters']:,} parameters, {record['vocabulary']} pieces, trained on {record['texts']} texts")
    print(f"model: {out}")


if __name__ == "__main__":
    run(main)
