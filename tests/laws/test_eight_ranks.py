"""Law 3 on eight real ranks, where three cuts meet that four ranks cannot hold.

All cuts: python tests/benchmarks/eight_h200.py --device cpu --output OUT --only 'law 3, dense' 'law 3, hybrid'
"""

import pytest
from eight_ranks import BOUNDS, GROUPS, MODELS, RANKS, SETTINGS, differences, every_cut
from training import VOCAB_SIZE

from megatron_prism import families
from megatron_prism.config import load_recipe
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.planning.layout import make_plan

SEVERAL_CUTS = {"dense": ["tp=2 pp=2 cp=2 dp=1", "tp=2 pp=2x2 cp=1 dp=2"], "hybrid": ["tp=2 pp=1 cp=2 dp=2"]}


def test_every_way_to_cut_a_model_over_eight_ranks_is_there_and_allowed():
    assert len(every_cut()) == 20
    needed = {"output": "o", "steps": 1, "global_batch": 8, "model.checkpoint": "c", "data.blend": "b", "data.seq_len": SETTINGS["data__seq_len"]}
    for group, layouts in GROUPS.items():
        config = {**MODELS[group], "vocab_size": VOCAB_SIZE}
        model = families.find(config).model_config(config)
        for name, keys in layouts.items():
            cfg = load_recipe(None, [f"{key}={value}" for key, value in {**needed, **keys}.items()], TrainConfig)
            plan = make_plan(model, cfg.parallel, RANKS, cfg.data.seq_len, cfg.global_batch, cfg.micro_batch)
            assert name.endswith(f"cp={plan.cp} dp={plan.dp}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", SEVERAL_CUTS)
def test_three_cuts_at_once_give_the_curve_of_one_rank(tmp_path, group):
    found, error = differences(group, tmp_path, "cpu", SEVERAL_CUTS[group], timeout=400)
    assert error is None
    assert set(found) == set(SEVERAL_CUTS[group])
    first, worst = BOUNDS[group]
    assert all(pair[0] < first and pair[1] < worst for pair in found.values()), found
