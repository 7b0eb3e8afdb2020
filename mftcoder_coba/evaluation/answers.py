"""Answers of the model, and what they are worth: metrics of texts for the experiment's tasks, pass@k for files of code problems."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.code import libraries_folder
from mftcoder_coba.evaluation.code.passing import figures, judge
from mftcoder_coba.evaluation.code.problems import Problem
from mftcoder_coba.evaluation.engines import Vllm, by_transformers, choose_engine, longest_prompt
from mftcoder_coba.evaluation.generation import generate
from mftcoder_coba.evaluation.loading import FoundModel
from mftcoder_coba.evaluation.prompts import Prompter
from mftcoder_coba.evaluation.text_metrics import METRICS
from mftcoder_coba.evaluation.wanted import Wanted


@dataclass(frozen=True)
class CodeFile:
    """A file of problems, of which those are left that can run here."""

    name: str
    problems: list[Problem]


class Answering:
    """A loaded model that answers, by transformers or vLLM.

    Attributes:
        notes: what was left out, for people.
    """

    def __init__(self, model: nn.Module, found: FoundModel, wanted: Wanted):
        self._found, self._wanted = found, wanted
        self.notes: list[str] = []
        self._prompter = Prompter(found.config)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._longest = longest_prompt(inner.config, wanted.decoding)
        self.engine = choose_engine(wanted.engine, found)
        self._made_by = {"model": _identity(found), "engine": self.engine}
        self._vllm = None
        if self.engine == "vllm":
            model.to("cpu")
            gc.collect()
            torch.cuda.empty_cache()
            self._vllm = Vllm(found, self._prompter, wanted.decoding)
        self._model = model

    def tasks(self, metrics: Mapping[str, Sequence[str]], split: str) -> dict[str, dict[str, Any]]:
        """Task -> {"answers", METRIC: from 0 to 100, ...}; of each prompt's first answer."""
        results: dict[str, dict[str, Any]] = {}
        for task, names in metrics.items():
            samples = self._prompter.samples(task, split, self._wanted.limit)
            if not samples:
                raise UserError("no sample can be asked for", f"data.tasks[].{split} ({task})", "choose other tasks with --metric TASK=NAME")
            texts = [answers[0].strip() for answers in self._answers(task, [sample.prompt for sample in samples], task)]
            references = [[text.strip() for text in sample.references] for sample in samples]
            results[task] = {"answers": len(samples)} | {name: METRICS[name](texts, references) for name in names}
        return results

    def code(self, files: Sequence[CodeFile]) -> dict[str, dict[str, Any]]:
        """Name of a file -> language -> figures of `passing.figures`. Each program's fate is written beside the generations."""
        results = {}
        libraries = libraries_folder(self._found.config.data.cache_dir)
        for file in files:
            prompts = [self._prompter.of_code(problem.prompt, self._wanted.code_prompt == "chat") for problem in file.problems]
            answers = self._answers(f"code-{file.name}", prompts, self._wanted.code_as)
            cut = {problem.name: [problem.language.cut(text) for text in texts] for problem, texts in zip(file.problems, answers, strict=True)}
            verdicts = judge(file.problems, cut, libraries, self._wanted.namespaces)
            lines = "".join(json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts)
            (self._wanted.generations / f"code-{file.name}.verdicts.jsonl").write_text(lines, encoding="utf-8")
            results[file.name] = figures(file.problems, verdicts, self._wanted.ks)
        return results

    def _answers(self, name: str, prompts: list[list[int]], task: str) -> list[list[str]]:
        """To a prompt that leaves no room for an answer the answer is empty."""
        fitting = [place for place, prompt in enumerate(prompts) if self._longest is None or len(prompt) <= self._longest]
        if len(fitting) < len(prompts):
            self.notes.append(
                f"{name}: {len(prompts) - len(fitting)} of {len(prompts)} prompts are too long for the model; their answers count as empty"
            )
        decoding = self._wanted.decoding
        complete = self._vllm.for_task(task) if self._vllm else by_transformers(self._model, self._prompter, decoding, task)
        asked = [prompts[place] for place in fitting]
        made_by = self._made_by | {"task": task, "asked": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}
        found = generate(asked, complete, self._prompter.text, decoding, made_by, self._wanted.generations / f"{name}.jsonl")
        answers = [[""] * decoding.samples for _ in prompts]
        for place, texts in zip(fitting, found, strict=True):
            answers[place] = texts
        return answers


def _identity(found: FoundModel) -> str:
    """Of the model, without reading its weights: names, sizes and times of its files, its base and its form."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found.folder.iterdir() if file.is_file())
    section = found.config.model
    return hashlib.sha256(json.dumps([files, section.path if found.kind else "", section.dtype, found.quantised]).encode()).hexdigest()[:16]
