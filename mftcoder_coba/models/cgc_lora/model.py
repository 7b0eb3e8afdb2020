"""A causal language model with low-rank experts on its linear layers, in the manner of PEFT's models.

A folder of it holds

    adapter_config.json          peft_type "CGC_LORA", the base model, the adapted layers, the structure
    adapter_model.safetensors    the adapter's tensors alone, by their names in the model
    tasks/TASK/                  the same for one task as a plain PEFT LoRA adapter, which any LoRA server loads
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mftcoder_coba.config.section import Positive, SafeName, Section
from mftcoder_coba.errors import UserError
from mftcoder_coba.models.cgc_lora.gates import TaskGates
from mftcoder_coba.models.cgc_lora.layer import ExpertsLinear, Routing, tensor_names
from mftcoder_coba.models.cgc_lora.per_task import task_tensors, write_task_adapter
from mftcoder_coba.models.cgc_lora.structure import Structure

PEFT_TYPE = "CGC_LORA"
CONFIG_FILE, TENSORS_FILE, TASKS_FOLDER = "adapter_config.json", "adapter_model.safetensors", "tasks"


class CgcLoraModel(nn.Module):
    """Wraps `base_model`, whose linear layers are replaced in place; only the experts and gates require gradients.

    Args:
        base_model: a Hugging Face causal language model.
        structure: which experts there are.
        layers: name -> (in features, out features, device of new tensors) of the linear layers to adapt, in the order of depth.
        tasks: the names that task numbers in a batch stand for; None: all tasks in the structure's order.
    """

    def __init__(
        self,
        base_model: nn.Module,
        structure: Structure,
        layers: dict[str, tuple[int, int, torch.device]],
        dropout: float = 0.0,
        tasks: Sequence[str] | None = None,
    ):
        super().__init__()
        self.base_model, self.structure = base_model, structure
        self.numbered = list(structure.tasks if tasks is None else tasks)
        self.layer_names = list(layers)
        self._routing = Routing()
        base_model.requires_grad_(False)
        for index, (name, (in_features, out_features, device)) in enumerate(layers.items()):
            old = base_model.get_submodule(name)
            layer = ExpertsLinear(old, in_features, out_features, structure.groups, dropout, self._routing, name, index, device)
            base_model.set_submodule(name, layer)
        self.gates = TaskGates(structure, len(layers), next(iter(layers.values()))[2])
        if base_model.is_activation_checkpointing:
            kwargs = {"use_reentrant": False, "context_fn": self._routing.for_checkpointing}
            base_model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)

    @property
    def config(self) -> Any:
        return self.base_model.config

    def get_base_model(self) -> nn.Module:
        """The model that computes, with the experts in it."""
        return self.base_model

    @contextlib.contextmanager
    def tokens_of(self, task_ids: Tensor) -> Iterator[None]:
        """Within it, each token meets its task's experts. task_ids: of any shape, a number of a task for each token, -1 for padding."""
        table = self.gates(self.numbered)
        flat = task_ids.reshape(-1)
        with self._routing.set((table, torch.where(flat < 0, len(self.numbered), flat))):
            yield

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Within it, all tokens are of this task.

        Raises:
            UserError: an unknown task; the known ones are listed.
        """
        self.structure.cluster_of(name)
        with self._routing.set((self.gates([name]), 0)):
            yield

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """As the base model's. `task` may be left out within `task` or `tokens_of`."""
        with contextlib.nullcontext() if task is None else self.task(task):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """As the base model's, for one task."""
        with contextlib.nullcontext() if task is None else self.task(task):
            return self.base_model.generate(*args, **kwargs)

    def adapter_names(self) -> list[str]:
        """Names in the model of all parameters of the adapter, trained or not."""
        return [name for name, _ in self._adapter_parameters()]

    def common_parameters(self, cluster: str) -> list[nn.Parameter]:
        """The experts that all tasks of a cluster see."""
        return self._named(set(tensor_names(cluster)))

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """What belongs to a task alone: its own experts and its gate."""
        group = f"{self.structure.cluster_of(task).name}:{task}"
        return self._named(set(tensor_names(group)) | {f"gates.{name}" for name in self.gates.names_of(task)})

    def _named(self, wanted: set[str]) -> list[nn.Parameter]:
        """Of the adapter's parameters those of these names: whole ones of gates, own ones in each layer."""
        return [
            p for name, p in self._adapter_parameters() if name in wanted or (not name.startswith("gates.") and name.rpartition(".")[2] in wanted)
        ]

    def _adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.gates.named_parameters(prefix="gates"):
            yield name, parameter
        for layer in self.layer_names:
            # The base layer's own parameters are below it.
            for name, parameter in self.base_model.get_submodule(layer).named_parameters(prefix=f"base_model.{layer}", recurse=False):
                yield name, parameter

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, safe_serialization: bool = True) -> None:
        """Writes the adapter, and each task's plain LoRA adapter.

        Args:
            state_dict: the adapter's whole tensors by their names in the model; None: read from the model, which is not partitioned.

        Raises:
            ValueError: a tensor is missing or empty; or pickles are asked for.
        """
        if not safe_serialization:
            raise ValueError("adapters are saved as safetensors only")
        folder, state = Path(folder), dict(self._adapter_parameters()) if state_dict is None else state_dict
        tensors = {name: state[name].detach().to("cpu").contiguous() for name in self.adapter_names() if name in state and state[name].numel()}
        missing = [name for name in self.adapter_names() if name not in tensors]
        if missing:
            raise ValueError(f"the adapter's state lacks {len(missing)} tensors, such as {missing[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        base = self.config._name_or_path
        config = {"peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "layers": self.layer_names}
        (folder / CONFIG_FILE).write_text(json.dumps(config | self.structure.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
        for task in self.structure.tasks:
            plain = task_tensors(self.structure, self.layer_names, tensors, task)
            write_task_adapter(folder / TASKS_FOLDER / task, plain, self.layer_names, self.base_model, base)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Fills the parameters that are named; every one of them has to be there.

        Raises:
            UserError: one has another shape, so that it is of another base model; nothing is filled.
        """
        own = dict(self._adapter_parameters())
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                what = f"the adapter does not fit the base model: {name} is {list(tensor.shape)} in its file, {list(own[name].shape)} here"
                raise UserError(what, TENSORS_FILE, "give the model that the adapter was trained on")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    @classmethod
    def load(cls, base_model: nn.Module, folder: str | Path, tasks: Sequence[str] | None = None) -> CgcLoraModel:
        """A saved adapter on a fresh base model, which is changed in place. tasks: as for the class.

        Raises:
            UserError: the folder holds no such adapter, or one of another base model, which stays as it was.
        """
        folder = Path(folder)
        structure, names, tensors = read_adapter(folder)
        first = tensor_names(structure.groups[0].name)
        layers = {}
        for name in names:
            down, up = (tensors[f"base_model.{name}.{tensor}"] for tensor in first)
            layers[name] = (down.shape[1], up.shape[0], _device_of_fitting(base_model, name, down.shape[1], up.shape[0], folder))
        model = cls(base_model, structure, layers, tasks=tasks)
        model.load_tensors(tensors)
        return model.eval()


def _device_of_fitting(base_model: nn.Module, name: str, in_features: int, out_features: int, folder: Path) -> torch.device:
    """Of the linear layer of this name. Raises UserError where the model has none of this size, or one with experts already."""
    where, fix = str(folder), "give the model that the adapter was trained on"
    try:
        layer = base_model.get_submodule(name)
    except AttributeError:
        raise UserError(f"the adapter does not fit the base model, which has no layer {name}", where, fix) from None
    if isinstance(layer, ExpertsLinear):
        raise UserError("the base model has an adapter with experts already", where, "load the base model anew for each adapter")
    # Linear layers, also quantised ones; those of other quantisations; GPT-2's transposed ones.
    pairs = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf"))
    size = next((tuple(getattr(layer, side) for side in pair) for pair in pairs if all(hasattr(layer, side) for side in pair)), None)
    if size is None:
        raise UserError(f"the adapter does not fit the base model, where {name} is {type(layer).__name__}, no linear layer", where, fix)
    if size != (in_features, out_features):
        what = f"the adapter does not fit the base model: {name} is {size[0]} -> {size[1]} there, {in_features} -> {out_features} in the adapter"
        raise UserError(what, where, fix)
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


class _StoredCluster(Section):
    name: SafeName
    scaling: float = Field(gt=0)
    common: list[Positive]
    tasks: dict[SafeName, list[Positive]] = Field(min_length=1)


class _StoredConfig(Section):
    """What a sound adapter_config.json holds; names become folders, so they may not lead elsewhere."""

    model_config = ConfigDict(extra="ignore")

    layers: list[str] = Field(min_length=1)
    task_embedding: Positive
    clusters: list[_StoredCluster] = Field(min_length=1)


def read_adapter(folder: Path) -> tuple[Structure, list[str], dict[str, Tensor]]:
    """The structure, the adapted layers' names and the tensors of a saved adapter.

    Raises:
        UserError: it holds none, or a damaged one.
    """
    where, fix = str(folder), "give the folder `export` of a run with cgc_lora or moe_lora"
    try:
        tree = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if tree.get("peft_type") != PEFT_TYPE:
            raise UserError(f"holds an adapter of the type {tree.get('peft_type')}, not {PEFT_TYPE}", where, fix)
        _StoredConfig.model_validate(tree)
        structure, names = Structure.from_dict(tree), list(tree["layers"])
        tensors = load_file(folder / TENSORS_FILE)
        expected = _shapes(structure, names, tensors)
    except OSError as error:
        raise UserError(f"the adapter cannot be read: {error.strerror or error}: {error.filename or folder}", where, fix) from None
    except ValidationError as error:
        (first, *_) = error.errors()
        what = f"the adapter is damaged: {CONFIG_FILE} has {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(what, where, "copy the folder again") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the adapter is damaged: {type(error).__name__}: {error}", where, "copy the folder again") from None
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        what = f"{odd[0]} is {found.get(odd[0], 'not there')}, not {expected.get(odd[0], 'expected')}"
        raise UserError(f"{TENSORS_FILE} does not fit {CONFIG_FILE}: {what}", where, "copy the folder again")
    return structure, names, tensors


def _shapes(structure: Structure, layers: Sequence[str], tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Of the tensors that an adapter of this structure has, the widths of each layer being those of its first tensors.

    Raises:
        ValueError: a task is named twice or sees no expert.
        KeyError: a layer has no tensors.
    """
    if len(set(structure.tasks)) < len(structure.tasks) or any(not structure.visible_groups(task) for task in structure.tasks):
        raise ValueError("a task is named twice, or sees no expert")
    gates = TaskGates(structure, len(layers), torch.device("meta"))
    shapes = {f"gates.{name}": list(parameter.shape) for name, parameter in gates.named_parameters()}
    for layer in layers:
        down, up = (f"base_model.{layer}.{name}" for name in tensor_names(structure.groups[0].name))
        in_features, out_features = tensors[down].shape[-1], tensors[up].shape[0]
        for group in structure.groups:
            down, up = (f"base_model.{layer}.{name}" for name in tensor_names(group.name))
            shapes |= {down: [group.rank, in_features], up: [out_features, group.rank]}
    return shapes
