"""The examples of RL: accepted as they stand, true to the paper where they say so."""

import re
from pathlib import Path

from megatron_prism.config import load_recipe
from megatron_prism.evals.registry import load_task
from megatron_prism.rl.prompt_files import read_prompts
from megatron_prism.rl.prompts import check_sources
from megatron_prism.rl.recipe import RLConfig
from megatron_prism.stages import prompts

ROOT = Path(__file__).resolve().parents[2]
TINY, GRANITE = ROOT / "examples/tiny/rl.toml", ROOT / "examples/granite_3_3_8b/rl.toml"


def test_the_tiny_recipe_is_accepted_and_asks_no_question_of_the_evaluation():
    cfg = load_recipe(TINY, ["model.checkpoint=unset", "output=unset"], RLConfig)
    check_sources(cfg.prompts)
    assert cfg.device == "cpu" and cfg.reward.format == "off"


def test_the_tiny_prompts_are_made_by_chain_sum_and_no_question_of_the_evaluation():
    cfg = load_recipe(ROOT / "examples/tiny/prompts.toml", [], prompts.Config)
    asked = {line.question: line.graded for path in cfg.files for line in read_prompts(ROOT / path)}
    task = load_task("chain_sum")
    made = {question.text: question for question in task.training_questions(500_000, len(asked))}
    assert set(asked) == set(made) and not set(asked) & {question.text for question in task.questions()}
    assert all(asked[text].entry["answer"] == made[text].entry["answer"] for text in asked)
    assert cfg.solvability is not None and cfg.solvability.band("sums").at_most == cfg.solvability.samples - 1


def test_the_granite_recipe_has_the_papers_constants():
    cfg = load_recipe(GRANITE, [], RLConfig)
    assert (cfg.prompts.prompts_per_step, cfg.rollout.responses_per_prompt, cfg.rollout.context, cfg.steps) == (64, 16, 16_384, 1000)
    assert (cfg.optimizer.lr, cfg.schedule.kind, cfg.objective.kl_coefficient, cfg.objective.importance_cap) == (5e-7, "linear", 0.05, 2.0)
    assert cfg.objective.reference == "soft" and cfg.objective.updates_per_batch == 1 and cfg.reward.format == "required"
    assert len(re.findall(r"# .*Table 21", GRANITE.read_text())) >= 9, "each number says where it stands"
