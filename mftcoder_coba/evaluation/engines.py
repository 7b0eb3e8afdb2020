"""What makes the answers: transformers' own decoding, or vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.generation import Complete, Decoding
from mftcoder_coba.evaluation.loading import FoundModel
from mftcoder_coba.evaluation.prompts import Prompter
from mftcoder_coba.models import CgcLoraModel
from mftcoder_coba.models.cgc_lora.model import PEFT_TYPE

Engine = Literal["auto", "transformers", "vllm"]


def choose_engine(wanted: Engine, found: FoundModel) -> Literal["transformers", "vllm"]:
    """auto: vLLM where it is installed, there is a GPU and the model is not in 4 bits.

    Raises:
        UserError: vLLM is wanted and cannot be used.
    """
    able = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available() and not found.quantised
    if wanted == "vllm" and not able:
        why = "the base model is in 4 bits" if found.quantised else "it needs a GPU and the package vllm"
        raise UserError(f"vLLM cannot be used here: {why}", "--engine vllm", "choose --engine transformers")
    return "vllm" if able and wanted != "transformers" else "transformers"


def longest_prompt(model_config: Any, decoding: Decoding) -> int | None:
    """Tokens of a prompt at most, so that an answer still fits into the model's positions; None: no limit is known."""
    positions = getattr(model_config, "max_position_embeddings", None)
    return None if positions is None else positions - decoding.max_new_tokens


def by_transformers(model: nn.Module, prompter: Prompter, decoding: Decoding, task: str) -> Complete:
    """Decoding with `model.generate`. task: whose experts are met, where the model has some."""
    device = next(model.parameters()).device
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(inner.generation_config, "eos_token_id", None)
    ends = sorted({*prompter.end_ids, *(own if isinstance(own, list) else [] if own is None else [own])})
    pad = prompter.tokenizer.pad_token_id if prompter.tokenizer.pad_token_id is not None else ends[0]
    # All is said here, so that no default of the model's own generation_config.json joins in.
    settings = {
        "max_new_tokens": decoding.max_new_tokens,
        "do_sample": decoding.temperature > 0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": ends,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if decoding.temperature > 0:
        settings |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if prompter.end_text:
        settings |= {"stop_strings": [prompter.end_text], "tokenizer": prompter.tokenizer}
    if isinstance(model, CgcLoraModel):
        settings["task"] = task

    def complete(prompts: list[list[int]], seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        try:
            with torch.no_grad():
                new = model.generate(input_ids=ids, attention_mask=mask, **settings)[:, longest:].tolist()
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU's memory does not suffice for {len(prompts)} prompts", "--generation-rows", "give a smaller number") from error
        return [_up_to_the_end(row, ends) for row in new]

    return complete


def _up_to_the_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Without the first end token and what follows it."""
    stop = next((place for place, number in enumerate(ids) if number in ends), len(ids))
    return list(ids[:stop])


class Vllm:
    """vLLM with the model in its memory, and adapters by task."""

    def __init__(self, found: FoundModel, prompter: Prompter, decoding: Decoding):
        from vllm import LLM

        self._found, self._prompter, self._decoding = found, prompter, decoding
        section = found.config.model
        adapter = {"enable_lora": True, "max_lora_rank": self._largest_rank()} if found.kind else {}
        self._model = LLM(
            model=section.path,
            dtype=section.dtype,
            trust_remote_code=section.trust_remote_code,
            seed=decoding.seed,
            generation_config="vllm",
            **adapter,
        )

    def for_task(self, task: str) -> Complete:
        """Each row has a seed of its own, so answers depend neither on the batch nor on how vLLM puts rows together."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        folder = self._adapter_of(task)
        request = LoRARequest(folder.name, 1 + self._found.config.data.task_names.index(task), str(folder)) if folder else None

        def complete(prompts: list[list[int]], seed: int) -> list[list[int]]:
            settings = [
                SamplingParams(
                    max_tokens=self._decoding.max_new_tokens,
                    temperature=self._decoding.temperature,
                    top_p=self._decoding.top_p,
                    seed=seed * 4096 + row,
                    stop_token_ids=self._prompter.end_ids,
                    stop=[self._prompter.end_text] if self._prompter.end_text else None,
                )
                for row in range(len(prompts))
            ]
            results = self._model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, lora_request=request, use_tqdm=False)
            return [_up_to_the_end(result.outputs[0].token_ids, self._prompter.end_ids) for result in results]

        return complete

    def _adapter_of(self, task: str) -> Path | None:
        """A plain LoRA adapter: the run's own, or the one that was exported for the task."""
        if self._found.kind != PEFT_TYPE:
            return self._found.folder if self._found.kind else None
        folder = self._found.folder / "tasks" / task
        if not folder.is_dir():
            fix = "choose --engine transformers, or write it with the command export"
            raise UserError(f"vLLM needs the plain adapter of the task {task}", str(folder), fix)
        return folder

    def _largest_rank(self) -> int:
        """vLLM's own steps: the smallest of 8, 16, 32, ... that holds every adapter."""
        from mftcoder_coba.models.exported import adapter_config

        tasks = self._found.config.data.task_names
        folders = {folder for task in tasks if (folder := self._adapter_of(task))} if self._found.kind == PEFT_TYPE else {self._found.folder}
        rank = max(int(adapter_config(folder)["r"]) for folder in folders)
        return max(8, 1 << (rank - 1).bit_length())
