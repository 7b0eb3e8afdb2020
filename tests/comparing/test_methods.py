"""Names and plan files -> methods."""

import json

import pytest

from mftcoder_coba.balancing import METHODS
from mftcoder_coba.comparing import SINGLE_TASK, built_in, choose_methods
from mftcoder_coba.errors import UserError


def test_every_balancer_but_fixed_is_known_by_name_and_starred_where_it_may_look_at_validation_losses():
    known = built_in()
    assert {name for name in known if not name.endswith("*")} == set(METHODS) - {"fixed"} | {SINGLE_TASK}
    assert {name for name in known if name.endswith("*")} == {"lbtw*", "gradnorm*", "famo*"}
    assert known["lbtw*"] == {"kind": "lbtw", "signal": "validation"}
    assert known[SINGLE_TASK] is None


def test_without_names_everything_is_compared():
    assert choose_methods([], None) == built_in()


def test_plan_and_names_keep_their_order(tmp_path):
    plan = tmp_path / "methods.json"
    plan.write_text(json.dumps({"STL": "single_task", "sharp": {"kind": "coba", "tau": 9.0}}))
    chosen = choose_methods(["famo*", "uniform"], plan)
    assert list(chosen.items()) == [
        ("STL", None),
        ("sharp", {"kind": "coba", "tau": 9.0}),
        ("famo*", {"kind": "famo", "signal": "validation"}),
        ("uniform", {"kind": "uniform"}),
    ]


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match='did you mean "coba"') as error:
        choose_methods(["cobra"], None)
    assert error.value.where == "--methods cobra"


def test_fixed_needs_a_plan():
    with pytest.raises(UserError, match="needs settings of its own"):
        choose_methods(["fixed"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": {"kind": "coba"}, "a": {"kind": "famo"}}', "a is given twice"),
        ('{"../a": {"kind": "coba"}}', "becomes a folder"),
        ('{"a": {"tau": 2}}', "with `kind`"),
        ('{"a": 3}', "with `kind`"),
        ('{"a": "cobra"}', 'did you mean "coba"'),
    ],
)
def test_a_broken_plan_is_refused(tmp_path, text, message):
    plan = tmp_path / "methods.json"
    plan.write_text(text)
    with pytest.raises(UserError, match=message):
        choose_methods([], plan)


def test_a_name_for_two_methods_is_refused(tmp_path):
    plan = tmp_path / "methods.json"
    plan.write_text('{"coba": {"kind": "coba", "tau": 9.0}}')
    with pytest.raises(UserError, match="stands for two methods"):
        choose_methods(["coba"], plan)
