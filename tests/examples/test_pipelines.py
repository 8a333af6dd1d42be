"""The whole of PRISM for each of the paper's seven models: every recipe is read, every number of nodes, GPUs and hours has its reason."""

import math
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from megatron_prism import families
from megatron_prism.cli import app
from megatron_prism.families.extension import extended
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.launch.plan import Step, load_plan
from megatron_prism.planning import cost, layout

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "granite_3_3_8b": "granite-3.3-8b-base",
    "granite_4_0_micro": "granite-4.0-micro-base",
    "granite_4_0_h_micro": "granite-4.0-h-micro-base",
    "llama_3_1_8b": "llama-3.1-8b",
    "mistral_7b": "mistral-7b-v0.1",
    "mistral_small_24b": "mistral-small-24b-base-2501",
    "nemotron_h_8b": "nemotron-h-8b-base-8k",
}
STAGES = ["base", "data", "midtrain", "rl", "evaluate", "analyze", "merged", "long_data", "extended", "long_context"]
FLOPS_PER_SECOND = 400e12
every_model = pytest.mark.parametrize("folder", MODELS)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PRISM_CLUSTER", raising=False)


def _path(folder: str) -> Path:
    return Path("examples", folder, "pipeline.toml")


@cache
def _steps(folder: str) -> dict[str, Step]:
    return {step.name: step for step in load_plan(_path(folder))}


def _shape(folder: str) -> ModelConfig:
    config = families.published(MODELS[folder])
    return families.find(config).model_config(config)


def _written(folder: str, stage: str) -> str:
    """The text of one stage."""
    found = re.search(rf'\[\[stage\]\]\nname = "{stage}"\n(.*?)(?=\n\[\[stage\]\]|\Z)', _path(folder).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@every_model
def test_the_chain_is_the_whole_of_prism_and_rl_starts_from_the_mid_trained_model(folder: str) -> None:
    steps = _steps(folder)
    assert [name for name in steps if name != "prompts"] == STAGES
    assert ("prompts" in steps) == (folder == "granite_3_3_8b"), "one model's filter gives the prompts of all"
    output = {name: str(step.output) for name, step in steps.items()}
    assert str(steps["midtrain"].config.model.checkpoint) == output["base"]
    assert str(steps["rl"].config.model.checkpoint) == output["midtrain"]
    assert str(steps["extended"].config.model.checkpoint) == output["merged"]
    assert [(str(model.path), model.weight) for model in steps["merged"].config.models] == [(output["base"], 0.15), (output["midtrain"], 0.85)]
    assert {*steps["rl"].after} == ({"midtrain", "prompts"} if "prompts" in steps else {"midtrain"})
    assert "rl" in steps["analyze"].after and "rl" in steps["evaluate"].after and "rl" not in steps["merged"].after
    paper = _steps("granite_3_3_8b")["rl"].config
    rl = steps["rl"].config
    assert (rl.prompts, rl.rollout, rl.objective, rl.optimizer, rl.schedule) == (
        paper.prompts,
        paper.rollout,
        paper.objective,
        paper.optimizer,
        paper.schedule,
    )


@every_model
@pytest.mark.parametrize("stage", ["midtrain", "extended"])
def test_trainings_fit_gpus_of_80_gb_and_their_hours_follow_from_their_flops(folder: str, stage: str) -> None:
    step, shape = _steps(folder)[stage], _shape(folder)
    cfg = step.config
    if stage == "extended":
        config = families.published(MODELS[folder])
        longer = extended(config, shape, cfg.extension(shape))
        assert longer["max_position_embeddings"] == 131_072
        shape = families.find(longer).model_config(longer)
    plan = layout.make_plan(shape, cfg.parallel, step.job.ranks, cfg.data.seq_len, cfg.global_batch, cfg.micro_batch)
    need = cost.memory(shape, plan, cfg.data.seq_len, cfg.training)
    assert need.fits(80) and f"{need.total / 2**30:.1f} GiB of each GPU" in _written(folder, stage)
    twice = 4 / 3 if cfg.recompute == "full" else 1
    flops = twice * cost.flops_per_token(shape, cfg.data.seq_len) * cfg.steps * cfg.global_batch * cfg.data.seq_len
    hours = flops / (step.job.ranks * FLOPS_PER_SECOND) / 3600
    assert re.search(rf"hours = {math.ceil(1.25 * hours)} +# {hours:.1f} ", _written(folder, stage)), (hours, _written(folder, stage))
    assert step.job.hours == math.ceil(1.25 * hours)


@every_model
def test_rl_leaves_the_sleeping_servers_their_half_of_each_gpu(folder: str) -> None:
    """Weights, gradients, optimizer and the reference stay while vLLM generates; its own weights fit its share."""
    step, shape = _steps(folder)["rl"], _shape(folder)
    cfg = step.config
    plan = layout.make_plan(shape, cfg.parallel, step.job.ranks, cfg.buffer_tokens, step.job.ranks // cfg.parallel.model_ranks, 1)
    parameters = cost.num_parameters(shape)
    resident = parameters / plan.tp * (2 + 4 + 2 + 12 / plan.dp)
    share = cfg.generation.gpu_memory_utilization * 80e9
    assert resident < 80e9 - share and 2 * parameters / cfg.generation.tensor_parallel < 0.9 * share
    assert cfg.generation.servers * cfg.generation.tensor_parallel == step.job.gpus_per_node == 8
    if folder == "nemotron_h_8b":
        assert _steps(folder)["midtrain"].config.max_position_embeddings >= cfg.rollout.context > shape.max_position_embeddings
    else:
        assert shape.max_position_embeddings >= cfg.rollout.context


@every_model
def test_every_number_of_nodes_gpus_and_hours_is_there_and_hours_have_their_reason(folder: str) -> None:
    for name, step in _steps(folder).items():
        assert step.job.hours is not None and re.search(r"hours = \d+ +# \S", _written(folder, name)), name
        needs_gpus = name in ("midtrain", "prompts", "rl", "evaluate", "extended", "long_context")
        assert (step.job.gpus_per_node == 8) == needs_gpus, name
        assert step.job.nodes == (4 if name in ("data", "midtrain", "rl", "long_data", "extended") else 1), name


@every_model
def test_what_prism_run_and_prism_launch_show_of_it(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    app(["run", str(_path(folder)), "--dry-run"], prog_name="prism", standalone_mode=False)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(_steps(folder))
    app(["launch", "slurm", str(_path(folder)), "--account", "lab", "--print"], prog_name="prism", standalone_mode=False)
    shown = capsys.readouterr().out
    scripts = re.findall(r"^# ----- .*?\n(#!/bin/bash\n.*?)^# -----$", shown, re.MULTILINE | re.DOTALL)
    assert len(scripts) == len(_steps(folder))
    subprocess.run(["bash", "-n"], input="\n".join(scripts), text=True, check=True)
    assert f"#SBATCH --job-name={folder}-midtrain\n#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in shown
    assert shown.count("#SBATCH --account=lab") == len(scripts)
