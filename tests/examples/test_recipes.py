"""Every model's recipes: the paper's figures, and layouts that the planner confirms byte by byte."""

import re
from pathlib import Path

import pytest

from megatron_prism import families
from megatron_prism.planning import choices, cost
from megatron_prism.stages.plan import plan_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMOLLM3 = "smollm3_3b"
LAYOUT = re.compile(r"^# 8 x (80|141) GB: +(as written|[^:]*): ([\d.]+) GiB(?: \(not: (.*)\))?$", re.MULTILINE)
HOURS = re.compile(r"are ([\d.e+]+) model FLOPs: about (\d+) hours of 8 GPUs at 400 TFLOP/s each")


def published_model(folder: str) -> str:
    """The name that the folder's README plans with."""
    found = re.search(r"--model (\S+)", (EXAMPLES / folder / "README.md").read_text())
    assert found is not None, folder
    return found[1]


def named(choice: choices.Choice) -> str:
    """A layout that does not fit, as the recipes' first lines name it."""
    cut = " ".join(f"{name}={size}" for name, size in (("cp", choice.plan.cp), ("tp", choice.plan.tp)) if size > 1) or "dp alone"
    again = f" + full recompute{' but attention' if choice.keep_attention else ''}" if choice.recompute else ""
    return f"{cut}{again} {choice.need.total / 2**30:.1f}"


FOLDERS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md") if "--model" in path.read_text())
RECIPES = [(folder, path.name) for folder in FOLDERS for path in sorted((EXAMPLES / folder).glob("train*.toml"))]
PAPER = [(folder, name) for folder, name in RECIPES if folder != SMOLLM3]


def test_every_published_model_has_its_recipes():
    assert sorted(published_model(folder) for folder in FOLDERS) == sorted(families.PUBLISHED)
    names = {folder: [name for other, name in RECIPES if other == folder] for folder in FOLDERS}
    assert names.pop(SMOLLM3) == ["train.toml"]
    assert all(found == ["train.toml", "train_16k.toml", "train_32k.toml"] for found in names.values())


@pytest.mark.parametrize(("folder", "name"), PAPER)
def test_the_schedule_is_the_papers(folder, name):
    """PRISM, Table 16; 16k and 32k with the same tokens a step."""
    cfg, _, _ = plan_recipe(EXAMPLES / folder / name, [], published_model(folder), gpus=8)
    seq_len = {"train.toml": 8192, "train_16k.toml": 16384, "train_32k.toml": 32768}[name]
    assert (cfg.steps, cfg.data.seq_len, cfg.global_batch * cfg.data.seq_len) == (25_000, seq_len, 1_048_576)
    optimizer, schedule = cfg.optimizer, cfg.schedule
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (5e-5, (0.9, 0.95), 1e-10, 0.1)
    assert (schedule.kind, schedule.warmup_steps, schedule.decay_steps, schedule.final_lr_fraction) == ("cosine", 500, None, 0.1)
    assert (cfg.micro_batch, cfg.precision) == (1, "bf16")


def test_smollm3_is_the_handbooks():
    """alignment-handbook, recipes/smollm3/sft/mid.yaml: 128 sequences of 32,768, 3 % warm-up, a twentieth of the run between saves."""
    cfg, _, _ = plan_recipe(EXAMPLES / SMOLLM3 / "train.toml", [], published_model(SMOLLM3), gpus=64)
    assert (cfg.data.seq_len, cfg.global_batch) == (32768, 128)
    assert cfg.data.packing is not None and cfg.data.packing.over_length == "truncate"
    assert (cfg.optimizer.lr, cfg.optimizer.clip_grad, cfg.schedule.kind, cfg.schedule.final_lr_fraction) == (2e-5, 0.2, "cosine", 0.1)
    assert cfg.schedule.warmup_steps == round(0.03 * cfg.steps)
    assert cfg.checkpoint.save_interval == round(0.05 * cfg.steps)
    assert cfg.steps * cfg.global_batch * cfg.data.seq_len == pytest.approx(5 * 35e9, rel=1e-3)


@pytest.mark.parametrize(("folder", "name"), RECIPES)
def test_each_layout_needs_what_stands_beside_it_and_is_the_one_that_the_planner_takes(folder, name):
    path = EXAMPLES / folder / name
    layouts = LAYOUT.findall(path.read_text())
    assert [size for size, *_ in layouts] == ["80", "141"]
    for size, words, gib, too_large in layouts:
        cfg, model, plan = plan_recipe(path, [] if words == "as written" else words.split(), published_model(folder), gpus=8)
        need = cost.memory(model, plan, cfg.data.seq_len, cfg.training)
        assert f"{need.total / 2**30:.1f}" == gib
        assert need.total / 2**30 <= 0.9 * float(size)
        found = choices.choices(model, 8, cfg.data.seq_len, cfg.global_batch * cfg.data.seq_len, cfg.training)
        best = choices.recommended(found, float(size))
        assert best is not None
        assert (plan, cfg.recompute, cfg.keep_attention) == (best.plan, best.recompute, best.keep_attention)
        quicker = [named(choice) for choice in found[: found.index(best)] if choice.plan.pp == 1]
        assert too_large == ", ".join(quicker[-3:])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_readme_has_the_recipes_flops_hours_and_commands(folder):
    text = (EXAMPLES / folder / "README.md").read_text()
    cfg, model, _ = plan_recipe(EXAMPLES / folder / "train.toml", [], published_model(folder), gpus=8)
    flops = cost.flops_per_token(model, cfg.data.seq_len) * cfg.steps * cfg.global_batch * cfg.data.seq_len
    assert HOURS.findall(text) == [(f"{flops:.2e}", f"{flops / (8 * 400e12) / 3600:.0f}")]
    assert f"-m megatron_prism train examples/{folder}/train.toml" in text
    assert f"prism convert import HF_DIR {cfg.model.checkpoint} " in text
    assert f"output={cfg.data.blend} " in text
