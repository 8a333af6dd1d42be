"""A job is torchrun's command line, and its processes' environment."""

import sys
from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.launch.job import Job, environment, outcome_of, prism_arguments, rank_status, torchrun_argv

JOB = Job("train", Path("midtrain.toml"), ("train.steps=20",), ranks=4)


def test_one_node_is_a_standalone_torchrun_of_our_own_command() -> None:
    expected = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node", "4"]
    assert torchrun_argv(JOB) == [*expected, "-m", "megatron_prism", "train", "midtrain.toml", "train.steps=20"]


def test_a_stage_of_ones_own_goes_through_its_own_command() -> None:
    assert prism_arguments(Job("lab.clean", None, ("output=runs/x",))) == ["stage", "lab.clean", "output=runs/x"]


def test_ranks_spread_evenly_over_nodes_or_are_refused() -> None:
    assert Job("train", ranks=16, nodes=2).ranks_per_node == 8
    for ranks, nodes in ((7, 2), (0, 1), (2, 0)):
        with pytest.raises(UserError, match=f"ranks={ranks} must be a positive multiple of nodes={nodes}"):
            Job("train", ranks=ranks, nodes=nodes)


def test_cores_are_shared_out_among_the_ranks_unless_threads_are_set() -> None:
    assert environment(JOB, base={"HOME": "/root"}, cores=10) == {"HOME": "/root", "OMP_NUM_THREADS": "2", "PYTHONSAFEPATH": "1"}
    assert environment(JOB, base={}, cores=2)["OMP_NUM_THREADS"] == "1"
    assert environment(JOB, base={"OMP_NUM_THREADS": "3"}, cores=64)["OMP_NUM_THREADS"] == "3"
    assert environment(Job("train", env={"OMP_NUM_THREADS": "5"}), base={"OMP_NUM_THREADS": "3"}, cores=64)["OMP_NUM_THREADS"] == "5"


def test_the_status_of_the_rank_that_failed_first_is_found_in_torchruns_report() -> None:
    report = "  exitcode  : -15 (pid: 12)\nRoot Cause (first observed failure):\n[0]:\n  exitcode  : -9 (pid: 11)\n"
    assert rank_status(report, 1) == -9
    assert rank_status("no report", 1) == 1
    assert rank_status(report, 0) == 0, "a status of success is never read out of old text"
    assert outcome_of(-9).status == 137 and "SIGKILL" in outcome_of(-9).message
