"""A checkpoint holds the weights of its step: those that the optimizer's masters round to, also where gathering overlaps with the next step."""

from pathlib import Path

import torch
from training import final_state, from_random, run_cases


def differing_weights(run: Path) -> dict[str, int]:
    """Elements of each stored weight that are not its master's."""
    state = final_state(run)
    weights = {key: value for key, value in state.items() if torch.is_tensor(value) and not key.startswith("optimizer.")}
    return {key: int((weight != state[f"optimizer.state.param.{key}"]).sum()) for key, weight in weights.items()}


def test_saved_weights_are_the_masters_where_gathering_overlaps_with_the_next_step(tmp_path):
    cases = {name: {"fault": name} for name in ("overlap", "overlap_saved_ungathered")}
    curves = run_cases(tmp_path, 2, cases, steps=2, **from_random(tmp_path))
    assert curves["overlap"] and set(differing_weights(tmp_path / "runs_2_0" / "overlap").values()) == {0}
    assert sum(differing_weights(tmp_path / "runs_2_0" / "overlap_saved_ungathered").values()) > 1000  # law 8: the fault is seen
