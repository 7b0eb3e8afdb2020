"""Names and plan files -> methods."""

import json
import re

import pytest

from mftcoder_coba.balancing import METHODS
from mftcoder_coba.comparing import SINGLE_TASK, Method, built_in, choose_methods
from mftcoder_coba.errors import UserError

PLAN = {"same": {}, "full": {"adapter": None}, "own": {"adapter": None, "balancer": {"kind": "uniform"}}}


@pytest.fixture
def chosen(make_experiment, tmp_path):
    """choose_methods() from a plan's text or tree and names, over an experiment with the balancer `random`."""

    def choose(plan=None, names=(), **changes):
        file = tmp_path / "methods.json"
        if plan is not None:
            file.write_text(plan if isinstance(plan, str) else json.dumps(plan))
        base = make_experiment(**{"balancer": {"kind": "random"}} | changes)
        return choose_methods(base, names, None if plan is None else file)

    return choose


def test_every_balancer_but_fixed_is_known_by_name_and_starred_where_it_may_look_at_validation_losses():
    known = built_in()
    assert {name for name in known if not name.endswith("*")} == set(METHODS) - {"fixed"} | {SINGLE_TASK}
    assert {name for name in known if name.endswith("*")} == {"lbtw*", "gradnorm*", "famo*"}
    assert known["lbtw*"] == Method({"kind": "lbtw", "signal": "validation"})
    assert known[SINGLE_TASK].per_task and not known["coba"].per_task


def test_without_names_everything_is_compared(chosen):
    assert chosen() == built_in()


def test_plan_and_names_keep_their_order(chosen):
    methods = chosen({"STL": "single_task", "sharp": {"kind": "coba", "tau": 9.0}}, ["famo*", "uniform"])
    assert [(name, method.written()) for name, method in methods.items()] == [
        ("STL", None),
        ("sharp", {"kind": "coba", "tau": 9.0}),
        ("famo*", {"kind": "famo", "signal": "validation"}),
        ("uniform", {"kind": "uniform"}),
    ]


def test_an_unknown_name_is_refused_with_a_suggestion(chosen):
    with pytest.raises(UserError, match='did you mean "coba"') as error:
        chosen(names=["cobra"])
    assert error.value.where == "--methods cobra"


def test_fixed_needs_a_plan(chosen):
    with pytest.raises(UserError, match="needs settings of its own"):
        chosen(names=["fixed"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": {"kind": "coba"}, "a": {"kind": "famo"}}', "a is given twice"),
        ('{"../a": {"kind": "coba"}}', "becomes a folder"),
        ('{"a": {"tau": 2}}', "unknown key tau: .*\n.*\n.*keys of a balancer stand beside its `kind`"),
        ('{"a": {"adaptor": null}}', 'unknown key adaptor: did you mean "adapter"'),
        ('{"a": {"kind": "coba", "adapter": null}}', 'has no adapter\n.*: a\n.*under "balancer"'),
        ('{"a": {"balancer": {"tau": 2}}}', "must be an object with `kind`"),
        ('{"a": {"balancer": {"kind": "coba"}, "per_task": true}}', "nothing to balance"),
        ('{"a": {"per_task": 1}}', "is 1: it must be true or false\n.*a.per_task"),
        ('{"a": {"training": {"learning_rate": 1e-4, "epochs": 9}}}', "a learning_rate and nothing else"),
        ('{"a": {"training": 1e-4}}', "a learning_rate and nothing else"),
        ('{"a": 3}', "with `kind`"),
        ('{"a": "cobra"}', 'did you mean "coba"'),
    ],
)
def test_a_broken_plan_is_refused(chosen, text, message):
    with pytest.raises(UserError) as error:
        chosen(text)
    assert re.search(message, str(error.value))


def test_a_name_for_two_methods_is_refused(chosen):
    with pytest.raises(UserError, match="stands for two methods"):
        chosen({"coba": {"kind": "coba", "tau": 9.0}}, ["coba"])


def test_a_method_without_a_balancer_has_that_of_the_experiment_as_it_was_given(chosen):
    methods = chosen(PLAN)
    assert methods["same"] == Method({"kind": "random"})
    assert methods["full"] == Method({"kind": "random"}, {"adapter": None})
    assert methods["own"] == Method({"kind": "uniform"}, {"adapter": None})


def test_single_task_is_a_model_per_task_without_other_changes(chosen):
    methods = chosen({"a": {"per_task": True}, "b": "single_task", "c": {"per_task": True, "adapter": {"kind": "lora"}}, "d": {"per_task": False}})
    assert methods["a"] == methods["b"] != methods["c"] and methods["c"].per_task
    assert not methods["d"].per_task


def test_an_adapter_is_laid_over_the_experiments_and_replaces_one_of_another_kind(chosen):
    base = {
        "adapter": {"kind": "lora", "rank": 8, "alpha": 4.0},
        "training": {"learning_rate": 1.0, "epochs": 3},
        "balancer": {"kind": "coba", "tau": 9},
    }
    plan = {
        "rank": {"adapter": {"rank": 2}},
        "moe": {"adapter": {"kind": "moe_lora", "experts": 3}},
        "full": {"adapter": None},
        "rate": {"training": {"learning_rate": 0.5}},
        "coba": {"kind": "coba"},
    }
    trees = {name: method.over(base) for name, method in chosen(plan).items()}
    assert trees["rank"]["adapter"] == {"kind": "lora", "rank": 2, "alpha": 4.0}
    assert trees["moe"]["adapter"] == {"kind": "moe_lora", "experts": 3}
    assert trees["full"]["adapter"] is None and trees["rate"]["adapter"] == base["adapter"]
    assert trees["rate"]["training"] == {"learning_rate": 0.5, "epochs": 3}
    assert trees["coba"]["balancer"] == {"kind": "coba"}  # a balancer comes with its defaults


def test_an_order_takes_the_place_of_the_experiments(chosen):
    base = {"run": {"seed": 5, "data_order_seed": None}, "balancer": {"kind": "coba"}}
    methods = chosen({"one": {"data_order_seed": 1}, "own": {"data_order_seed": None}, "same": {}})
    assert {name: method.over(base)["run"] for name, method in methods.items()} == {
        "one": {"seed": 5, "data_order_seed": 1},
        "own": {"seed": 5, "data_order_seed": None},
        "same": {"seed": 5, "data_order_seed": None},
    }
    assert methods["one"].written() == {"balancer": {"kind": "random"}, "data_order_seed": 1} and base["run"]["data_order_seed"] is None


def test_an_adapter_to_begin_with_is_found_beside_the_plan(chosen, tmp_path):
    method = chosen({"a": {"adapter": {"kind": "moe_lora", "initial_adapter": "../first/export"}}})["a"]
    assert method.changes["adapter"]["initial_adapter"] == str(tmp_path.parent / "first" / "export")


def test_what_is_written_down_tells_methods_apart_and_reads_back(chosen):
    plan = PLAN | {
        "alone": {"per_task": True},
        "alone-lora": {"per_task": True, "adapter": {"kind": "lora"}},
        "coba": {"kind": "coba"},
        "order": {"data_order_seed": 3},
    }
    written = {name: method.written() for name, method in chosen(plan).items()}
    assert len({json.dumps(tree) for tree in written.values()}) == len(plan)
    again = chosen({name: "single_task" if tree is None else tree for name, tree in written.items()}, balancer={"kind": "uniform"})
    assert {name: method.written() for name, method in again.items()} == written
