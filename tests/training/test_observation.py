"""What is measured around a step, and that nothing else is paid for; without DeepSpeed, whose part tests/engine has."""

import contextlib

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from toy import tree

from mftcoder_coba.config import validate
from mftcoder_coba.data import TaskData
from mftcoder_coba.engine.watch import Watch
from mftcoder_coba.errors import UserError
from mftcoder_coba.objective import MultiTaskObjective
from mftcoder_coba.training.assembly import check_signals
from mftcoder_coba.training.observation import Observer
from mftcoder_coba.training.step import losses_of
from mftcoder_coba.training.validation import Validation

# What a step takes beside its own passes: forward passes of the engine, copies of the output layer, passes whose hidden states are kept.
COSTS = {
    (): (0, 0, 0),
    ("train_losses",): (0, 0, 0),
    ("train_losses_after",): (1, 0, 0),
    ("validation_losses",): (1, 0, 0),
    ("validation_losses_before",): (1, 0, 0),
    ("validation_losses_before", "validation_losses"): (2, 0, 0),
    ("output_gradient_norms",): (0, 1, 1),
    ("validation_losses", "validation_output_gradient_norms"): (1, 0, 1),
    ("output_gradient_products",): (1, 1, 2),
    ("output_gradient_products", "output_gradient_norms", "validation_output_gradient_norms", "validation_losses"): (1, 1, 2),
    ("full_gradient_products",): (1, 0, 0),
}


class Alone:
    world_size, rank = 1, 0
    watch = Watch(0, 1, lambda value: [value])

    def all_reduce_sum(self, values):
        return values

    def reduce_scatter_sum(self, values):
        return values


class PlainEngine:
    """One process and plain gradient descent."""

    device, processes = torch.device("cpu"), Alone()

    def __init__(self, module):
        self.module, self.passes = module.train(), 0

    def forward(self, *inputs):
        self.passes += 1
        return self.module(*inputs)

    @contextlib.contextmanager
    def evaluating(self):
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train()

    def gathered(self, parameters):
        return contextlib.nullcontext()


class Stream:
    def mini_batch(self, observation):
        return [[(0, 2)], [(1, 2)]], np.array([observation, observation])


class World:
    """Two tasks of three samples each: the step's batch holds the first two, the validation mini-batch the third."""

    def __init__(self, wanted=()):
        generator = np.random.default_rng(0)
        samples = [[(generator.integers(0, 64, length).astype(np.int32), np.arange(length) > 1) for length in (6, 9, 7)] for _ in range(2)]
        self.data = [TaskData.from_samples(task) for task in samples]
        model = tiny_model("llama_tied", attention_dropout=0.5, attention="eager")
        self.engine = PlainEngine(MultiTaskObjective(model, 2))
        self.validation = Validation(self.engine, self.data, 24, "best_fit", rows_per_batch=2, pad_token_id=0)
        self.batches = list(self.validation.batches([[(0, 0), (1, 0)], [(0, 1), (1, 1)]]))
        self.observer = Observer(self.engine, frozenset(wanted), self.validation, Stream(), 1, lambda: torch.manual_seed(5))
        self.kept, self.copies = [], []
        output_loss, layer, collecting = self.output_loss, self.output_loss.layer, self.output_loss.collecting

        def noted(copy=False):
            self.copies.extend([1] if copy else [])
            return layer(copy)

        @contextlib.contextmanager
        def counted():
            with collecting() as passes:
                yield passes
            self.kept.extend(passes)

        output_loss.layer, output_loss.collecting = noted, counted

    @property
    def output_loss(self):
        return self.engine.module.output_loss

    def stay(self):
        """A step that moves nothing."""
        torch.manual_seed(5)
        return losses_of(self.engine, self.batches)

    def move(self):
        measured = self.stay()
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.mul_(1.5)
        return measured


def losses(world):
    """[K] losses of the validation mini-batch."""
    return world.validation.losses(Stream().mini_batch(0)[0]).losses


@pytest.mark.parametrize("wanted", COSTS, ids=lambda wanted: "+".join(wanted) or "nothing")
def test_only_what_is_declared_is_paid_for(wanted):
    world = World(wanted)
    signals, seconds = world.observer.around(1, world.batches, world.move)
    assert (world.engine.passes - 1, len(world.copies), len(world.kept)) == COSTS[wanted]
    for name in wanted:
        assert np.isfinite(getattr(signals, name)).all(), name
    assert seconds > 0 and np.isfinite(signals.train_losses).all()
    if not any(name.startswith("validation") or "products" in name for name in wanted):
        assert signals.validation_losses is None and signals.slots is None


def test_losses_and_slots_are_those_of_the_mini_batch_before_and_after_the_step():
    world = World(("validation_losses_before", "validation_losses"))
    before = losses(world)
    signals, _ = world.observer.around(3, world.batches, world.move)
    assert signals.validation_losses_before.tolist() == before.tolist() != signals.validation_losses.tolist()
    assert signals.validation_losses.tolist() == losses(world).tolist()
    assert signals.step == 3 and signals.slots.tolist() == [2, 2]


def test_the_batch_is_measured_again_with_the_masks_of_the_step():
    world = World(("train_losses_after",))
    signals, _ = world.observer.around(1, world.batches, world.stay)
    assert signals.train_losses_after.tolist() == signals.train_losses.tolist()
    assert (losses_of(world.engine, world.batches).losses != signals.train_losses).all()  # other masks give other losses
    signals, _ = world.observer.around(2, world.batches, world.move)
    assert (signals.train_losses_after != signals.train_losses).all()


def test_output_gradients_of_the_batch_are_of_the_layer_before_the_step():
    moved, still = World(("output_gradient_norms",)), World(("output_gradient_norms",))
    ours, _ = moved.observer.around(1, moved.batches, moved.move)
    theirs, _ = still.observer.around(1, still.batches, still.stay)
    assert ours.output_gradient_norms.tolist() == theirs.output_gradient_norms.tolist()


def test_a_frozen_output_layer_is_not_copied():
    world = World(("output_gradient_norms", "output_gradient_products"))
    for parameter in world.output_loss.external_parameters:
        parameter.requires_grad_(False)
    signals, _ = world.observer.around(1, world.batches, world.stay)
    assert not world.copies and (signals.output_gradient_norms > 0).all()


def metaweighting(gradients, stage):
    changed = tree() | {"balancer": {"kind": "metaweighting", "gradients": gradients}, "deepspeed": {"zero_optimization": {"stage": stage}}}
    return validate(changed, "test")


def test_gradients_of_all_parameters_need_whole_parameters():
    with pytest.raises(UserError) as error:
        check_signals(metaweighting("all", 3))
    assert "balancer.gradients" in error.value.where and "output_layer" in error.value.fix
    for gradients, stage in (("all", 2), ("all", 0), ("output_layer", 3)):
        check_signals(metaweighting(gradients, stage))
