"""Law 3: the loss curve and the gradient norms of every layout are those of one rank; and law 8: planted faults turn that red.

fp32, 5 steps from one checkpoint. Bound: 1e-5 relative; differences of summation order alone were measured at up to 3.3e-6 (gradient norm).
Documents are short and the token after each end is masked, so that micro-batches differ in their number of counted tokens.
"""

from pathlib import Path

import pytest
from training import from_random, largest_difference, run_cases

BOUND = 1e-5
TP = {"parallel.tp": 2}
SP = {"parallel.tp": 2, "parallel.sp": "true"}
PP = {"parallel.pp": 2}
VPP = {"parallel.pp": 2, "parallel.vpp": 2}

TWO_RANKS = {
    "tp": TP,
    "tp_sp": SP,
    "pp": PP,
    "pp_vpp": VPP,
    "dp": {},
    "dp_micro_batch_2": {"micro_batch": 2},
    "recompute": {**SP, "recompute": "full", "keep_attention": "true", "offload_activations": "true"},
}
FOUR_RANKS = {"tp_sp_pp": {**SP, **PP}, "tp_sp_dp": SP, "pp_dp": PP, "pp_vpp_dp": VPP, "tp_sp_pp_vpp": {**SP, **VPP}, "dp": {}}
FAULTS = {
    "no_sequence_parallel_reduction": SP,
    "no_embedding_reduction": PP,
    "mean_of_micro_batch_means": {},
    "padded_rows_in_softmax": TP,
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]], dict[str, list[dict[str, float]]]]:
    """One-rank curves, tied and untied, and the checkpoints they start from."""
    root = tmp_path_factory.mktemp("laws")
    starts = {f"start_tied_{tied}": {"set": {**from_random(root, tie_word_embeddings=tied), "steps": 1}} for tied in (True, False)}
    run_cases(root, 1, starts)
    loads = {name: {"model.checkpoint": str(next(root.glob(f"runs_1_0/{name}")))} for name in starts}
    curves = run_cases(root, 1, {name: {"set": load} for name, load in loads.items()})
    return root, loads, curves


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"])
def test_loss_and_gradient_norm_are_equal_for_every_parallel_plan(one_rank, ranks, layouts):
    root, loads, curves = one_rank
    cases = {
        f"{name} {start}": {"set": {**layout, **load}}
        for name, layout in layouts.items()
        for start, load in loads.items()
        if "True" in start or (ranks == 2 and name in ("tp", "pp"))
    }
    found = run_cases(root, ranks, cases)
    differences = {name: largest_difference(lines, curves[name.split(" ")[1]]) for name, lines in found.items()}
    assert max(differences.values()) < BOUND, differences


@pytest.mark.slow
def test_planted_faults_break_the_equality(one_rank):
    root, loads, curves = one_rank
    start = "start_tied_True"
    found = run_cases(root, 2, {fault: {"set": {**layout, **loads[start]}, "fault": fault} for fault, layout in FAULTS.items()})
    differences = {name: largest_difference(lines, curves[start]) for name, lines in found.items()}
    assert min(differences.values()) > 10 * BOUND, differences
