"""Nodes, GPUs, ranks and what a stage waits for: what a pipeline's entries say of it."""

from pathlib import Path

import pytest

from megatron_prism.errors import UserError
from megatron_prism.launch.plan import Step, load_plan

TRAIN = 'model.checkpoint = "m", data.blend = "b", data.seq_len = 32, steps = 1, global_batch = 12, micro_batch = 2'


def _plan(tmp_path: Path, *stages: str) -> dict[str, Step]:
    path = tmp_path / "pipeline.toml"
    path.write_text('output = "runs"\n' + "".join(f"[[stage]]\n{stage}\n" for stage in stages))
    return {step.name: step for step in load_plan(path)}


def _train(size: str, more: str = "") -> str:
    return f'name = "train"\nset = {{ {TRAIN}{more} }}\n{size}'


def test_a_training_has_a_rank_for_each_gpu_of_each_node(tmp_path: Path) -> None:
    job = _plan(tmp_path, _train("nodes = 3\ngpus = 2\nhours = 1.5"))["train"].job
    assert (job.ranks, job.nodes, job.gpus_per_node, job.hours) == (6, 3, 2, 1.5)
    assert _plan(tmp_path, _train("nodes = 2"))["train"].job.ranks == 2, "without GPUs one a node"


def test_an_evaluation_on_one_node_is_one_process_and_on_several_has_a_rank_for_each_gpu(tmp_path: Path) -> None:
    evaluate = 'name = "evaluate"\nset = { models = [{ name = "a", path = "a" }], tasks.names = ["gcd"] }\n'
    alone, spread = _plan(tmp_path, evaluate + "gpus = 8")["evaluate"], _plan(tmp_path, evaluate + "gpus = 8\nnodes = 2")["evaluate"]
    assert (alone.job.ranks, alone.parallel) == (1, False) and (spread.job.ranks, spread.parallel) == (16, True)


@pytest.mark.parametrize(
    ("size", "more", "message"),
    [
        ("nodes = 2\ngpus = 2", ", parallel.tp = 3", "ranks=4 must be a multiple of parallel.tp*pp*cp = 3*1*1 = 3; try ranks=3"),
        ("nodes = 2\ngpus = 4", "", "global_batch=12 must be a multiple of dp*micro_batch = 8*2, for ranks=8; try ranks=6"),
        ("nodes = 2\ngpus = 4", ", parallel.tp = 2", "global_batch=12 must be a multiple of dp*micro_batch = 4*2, for ranks=8; try ranks=6"),
        ("ranks = 3\ngpus = 4", "", "ranks=3 must be nodes*gpus = 1*4 = 4: one rank a GPU; drop ranks"),
        ("ranks = 3\nnodes = 2", "", "ranks=3 must be a positive multiple of nodes=2"),
        ("nods = 2", "", "unknown key stage.0.nods; did you mean stage.0.nodes?"),
        ("hours = 0", "", "stage.0.hours=0: input should be greater than 0"),
        ('after = ["evaluate"]', "", "'stage:evaluate' names no stage of this pipeline"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_with_a_fix(tmp_path: Path, size: str, more: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        _plan(tmp_path, _train(size, more))
    assert message in str(error.value)


def test_a_stage_waits_for_the_one_before_or_for_what_it_names_and_always_for_what_it_reads(tmp_path: Path) -> None:
    export = 'stage = "convert"\nset = { direction = "export", source = "stage:train" }'
    steps = _plan(
        tmp_path,
        _train(""),
        f'name = "a"\n{export}',
        f'name = "b"\n{export}\nafter = []',
        f'name = "c"\n{export}\nafter = ["b"]',
        f'name = "d"\n{export}',
    )
    assert {name: step.after for name, step in steps.items()} == {
        "train": (),
        "a": ("train",),
        "b": ("train",),
        "c": ("b", "train"),
        "d": ("c", "train"),
    }
