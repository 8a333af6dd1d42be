"""The stand-in for NCCL of ranks that share a GPU (tests/shared_gpu.py) exchanges what gloo itself does: tried where gloo can do everything."""

from pathlib import Path

from training import from_random, run_cases

SHARED = Path(__file__).parent / "shared_gpu_runs.py"
LAYOUTS = {
    "tp_sp": {"parallel.tp": 2, "parallel.sp": "true"},
    "pp": {"parallel.pp": 2},
    "dp": {},
    "cp": {"parallel.cp": 2},
}


def test_exchanges_through_copies_in_host_memory_change_no_bit_of_a_run(tmp_path, monkeypatch):
    cases = {name: {"set": layout, "fault": "overlap" if name == "dp" else None} for name, layout in LAYOUTS.items()}
    common = {"steps": 2, "global_batch": 4, **from_random(tmp_path, num_hidden_layers=2)}
    plain = run_cases(tmp_path, 2, cases, **common)
    monkeypatch.setenv("SHARED_GPU_HOST_TOO", "1")
    moved = run_cases(tmp_path, 2, cases, script=SHARED, **common)
    for name in LAYOUTS:
        assert [(line["loss"], line["grad_norm"]) for line in moved[name]] == [(line["loss"], line["grad_norm"]) for line in plain[name]], name
