"""The RL stage as a user meets it: the paper's constants, dry runs without torch, and recipes that are refused with what to do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_hf import make_tiny_model

from megatron_prism import artifact, stages
from megatron_prism.config import Block, load_recipe
from megatron_prism.errors import UserError
from megatron_prism.rl.prompts import PromptSource
from megatron_prism.rl.recipe import RLConfig, check, parents

DRY_RUN = """
import sys
from megatron_prism.cli import main
sys.argv = ["prism", *{words}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as far as a recipe looks at it, and a prompt file."""
    root = tmp_path_factory.mktemp("rl")
    artifact.begin(root / "start", "checkpoint", Block())
    make_tiny_model(root / "start" / "hf")
    artifact.complete(root / "start")
    line = {"id": "a", "domain": "math", "question": "1 + 1", "grader": "exact", "extraction": "whole", "entry": {"answer": "2"}}
    (root / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    return root


def words(root: Path, **settings: Any) -> list[str]:
    values = {
        "output": str(root / "run"),
        "model.checkpoint": str(root / "start"),
        "rollout.context": 64,
        "prompts.prompts_per_step": 1,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    given = [f"{key}={'none' if value is None else json.dumps(value)}" for key, value in values.items()]
    return [f'prompts.sources=[{{file = "{root / "prompts.jsonl"}"}}]', *given]


def config(root: Path, **settings: Any) -> RLConfig:
    return load_recipe(None, words(root, **settings), RLConfig)


def test_it_is_a_stage_of_many_ranks_like_training():
    assert stages.load("rl").Config is RLConfig
    assert "rl" in stages.PARALLEL_STAGES


def test_the_papers_constants_are_the_defaults(root):
    cfg = load_recipe(None, [word for word in words(root) if not word.startswith(("rollout.context", "prompts.prompts_per_step"))], RLConfig)
    assert (cfg.prompts.prompts_per_step, cfg.rollout.responses_per_prompt, cfg.rollout.context, cfg.steps) == (64, 16, 16_384, 1000)
    assert (cfg.optimizer.lr, cfg.schedule.kind, cfg.schedule.final_lr_fraction) == (5e-7, "linear", 0.0)
    assert (cfg.objective.kl_coefficient, cfg.objective.importance_cap, cfg.objective.reference) == (0.05, 2.0, "soft")
    assert cfg.objective.updates_per_batch == 1 and cfg.buffer_tokens == 16_384 and cfg.reward.format == "required"


def test_a_run_is_made_from_its_checkpoint_and_the_prompt_outputs_that_it_asks(root, tmp_path):
    """So that prompts which were made again are another request; a file of one's own is no artifact."""
    made = artifact.begin(tmp_path / "made", "prompts", Block())
    files = [made / "math.jsonl", made / "code.jsonl", root / "prompts.jsonl"]
    for file in files:
        file.write_text((root / "prompts.jsonl").read_text())
    artifact.complete(made)
    cfg = config(root)
    sources = [PromptSource(file=file) for file in files]
    asked = cfg.model_copy(update={"prompts": cfg.prompts.model_copy(update={"sources": sources})})
    assert parents(asked) == [root / "start", made]
    assert parents(cfg) == [root / "start"]


def run_apart(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, "-c", DRY_RUN.format(words=arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_dry_run_and_the_keys_need_no_torch(root):
    said = run_apart(["rl", *words(root), "--dry-run"])
    assert "1 prompts x 16 = 16 responses, 1,000 steps" in said and "at most 1,024 a step" in said
    assert "reference" in said and "generator" in said and "on the fullest rank" in said and "prompts.jsonl" in said
    assert not (root / "run").exists()
    keys = run_apart(["rl", "--keys"])
    assert all(
        key in keys for key in ("rollout.responses_per_prompt", "alarms.mismatch", "objective.kl_coefficient", "reward.format", "samples.interval")
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model__load": "all"}, "RL starts from the weights of a checkpoint"),
        ({"pack_length": 32}, "pack_length=32 must hold a prompt with its response, rollout.context=64"),
        ({"reward__overlong__weight": 1.0}, "reward.overlong counts back from rollout.max_new_tokens"),
        ({"reward__overlong__weight": 1.0, "rollout__max_new_tokens": 50}, "buffer_tokens=4096 must be at most max_new_tokens=50; try 10"),
        ({"generation__on_too_long": "truncate_left"}, "would train on prompts that were not read"),
        ({"generation__backend": "vllm", "generator_sleeps": True}, "needs generation.server_flags={enable-sleep-mode = true}"),
        ({"rollout__temperature": 0.7}, "must both be 1"),
        ({"rollout__responses_per_prompt": 1}, "rollout.responses_per_prompt"),
        ({"pad_multiple": 24}, "pad_multiple=24 must divide seq_len=64"),
        ({"precision": "fp32", "optimizer__moments": "bf16", "optimizer__betas": [0.9, 0.95]}, "are for bf16 weights"),
        ({"checkpoint__save_interval": 3, "export__interval": 4}, "export.interval=4 must be a multiple"),
        ({"overlap": 1}, "unknown key overlap"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_what_to_do(root, settings, said):
    with pytest.raises(UserError, match=said):
        config(root, **settings)


def test_a_generator_computes_as_the_trainer_does_unless_it_is_told_otherwise(root):
    assert config(root).precision == "bf16" and config(root).generation.dtype == "bfloat16"
    assert config(root, precision="fp32").generation.dtype == "float32"
    assert config(root, generation__backend="vllm").generation.dtype == "bfloat16"
    assert config(root, generation__dtype="float32").generation.dtype == "float32"


def test_a_generator_sleeps_where_it_can(root):
    assert config(root).can_sleep and not config(root, generation__backend="vllm").can_sleep
    assert load_recipe(None, [*words(root, generation__backend="vllm"), "generation.server_flags={enable-sleep-mode = true}"], RLConfig).can_sleep


def test_random_weights_are_no_start(root):
    with pytest.raises(UserError, match="RL starts from the weights of a checkpoint"):
        config(root, model__checkpoint=None, model__hf_config=str(root), model__tokenizer=str(root))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rollout__context": 256, "pack_length": 256}, r"rollout.context=256 exceeds the 128 tokens"),
        ({"pack_length": 256}, "pack_length=256 exceeds the model's largest length, 128"),
        ({"generation__max_model_len": 48}, r"rollout.context=64 exceeds the 48 tokens"),
        ({"parallel__tp": 3}, "parallel.tp=3 must divide"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_torch(root, settings, said):
    with pytest.raises(UserError, match=said):
        check(config(root, **settings), settings.get("parallel__tp", 1))


def test_a_checkpoint_and_prompts_must_be_there(root):
    with pytest.raises(UserError, match="does not exist"):
        check(config(root, model__checkpoint=str(root / "nowhere")), 1)
    cfg = load_recipe(None, [*words(root)[1:], f'prompts.sources=[{{file = "{root / "none.jsonl"}"}}]'], RLConfig)
    with pytest.raises(UserError, match="is no prompt file"):
        check(cfg, 1)


def test_batches_need_not_divide_over_the_ranks(root):
    """Responses are dealt one by one, buffers too, empty ones where there are too few: 1 prompt x 16 on 3 ranks is no error."""
    assert check(config(root), 3)[1].dp == 3
