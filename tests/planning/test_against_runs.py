import json
from pathlib import Path

import plan_workers
import pytest
from ranks import run_ranks

LORA = {"kind": "lora", "rank": 8}
# Whatever a plan says of these, DeepSpeed does: dtype, stage, checkpointing, adapter, packing.
CASES = [("float32", 2, False, None, "best_fit"), ("bfloat16", 3, True, LORA, "none")]


@pytest.mark.parametrize("dtype, stage, checkpointing, adapter, packing", CASES)
def test_a_plan_is_near_to_what_a_run_holds_and_sends(dtype, stage, checkpointing, adapter, packing, tmp_path):
    architecture, out = tmp_path / "config.json", tmp_path / "measured.json"
    architecture.write_text(json.dumps(plan_workers.STORIES))
    tree = plan_workers.experiment(dtype, stage, 2, checkpointing, adapter, 128, packing)
    run_ranks(str(Path(plan_workers.__file__)), "measure", 2, tree, str(architecture), str(out))
    found, plan = json.loads(out.read_text()), plan_workers.planned(tree, str(architecture), 2)
    assert plan["states"] == pytest.approx(found["states"], rel=0.15)
    assert plan["kept"] == pytest.approx(found["kept"], rel=0.3)
    assert plan["gradients"] == pytest.approx(found["gradients"], rel=0.02)
