"""The mixes of examples/blends against the paper's figures."""

from pathlib import Path

import pytest

from megatron_prism.config import load_recipe
from megatron_prism.data_prep.settings import PrepConfig
from megatron_prism.data_prep.sources.recipe import load_source_recipe, recipe_names

BLENDS = Path(__file__).parents[2] / "examples" / "blends"
CHAT = ("wildchat_gpt4", "tulu_3_personas", "ultrachat_200k")
# PRISM Fig. 2: percent of sampled tokens
TABLE = {
    "dclm_edu": (15, 5, 5),
    "chat": (10, 5, 5),
    "nemotron_v1_math": (10, 10, 10),
    "mot_math": (10, 10, 7),
    "megamath_web_pro": (55, 27.5, 20),
    "mot_code": (0, 5, 3),
    "open_code_reasoning_2": (0, 10, 10),
    "refinecode": (0, 13.75, 13.75),
    "stack_v2": (0, 13.75, 13.75),
    "open_thoughts_3_science": (0, 0, 7.75),
    "mot_science": (0, 0, 4.75),
}
DOMAINS = {"math": (25, 75, 0, 0), "mc": (10, 47.5, 42.5, 0), "mcs": (10, 37, 40.5, 12.5)}
# PRISM Table 1 and Table 18: billions of tokens
POOLS = {
    "dclm_edu": 111.46,
    "mot_math": 0.60,
    "nemotron_v1_math": 35.93,
    "megamath_web_pro": 14.73,
    "mot_code": 1.18,
    "open_code_reasoning_2": 1.12,
    "refinecode": 186.44,
    "stack_v2": 432.73,
    "mot_science": 0.42,
    "open_thoughts_3_science": 0.73,
}
LONG_POOLS = {"dclm_edu": 2.51, "nemotron_v1_math": 5.08, "megamath_web_pro": 4.33, "stack_v2": 37.52, "codex_2m_thinking": 3.86}


def weights_of(name):
    return {source.recipe: source for source in load_recipe(BLENDS / f"{name}.toml", [], PrepConfig).source}


@pytest.mark.parametrize("column, name", list(enumerate(DOMAINS)))
def test_a_mix_has_the_papers_weights_and_domain_sums(column, name):
    sources = weights_of(name)
    found = {recipe: source.weight for recipe, source in sources.items() if recipe not in CHAT}
    found["chat"] = sum(sources[part].weight for part in CHAT)
    assert found == pytest.approx({source: row[column] for source, row in TABLE.items() if row[column]})
    assert sum(found.values()) == pytest.approx(100)
    sums = [sum(source.weight for source in sources.values() if source.domain == domain) for domain in ("general", "math", "code", "science")]
    assert sums == pytest.approx(DOMAINS[name])


def test_the_long_pools_weigh_what_they_hold_and_drop_short_documents():
    sources = weights_of("long_context")
    assert {recipe: source.weight for recipe, source in sources.items()} == LONG_POOLS
    assert {source.min_characters for source in sources.values()} == {32768}


def test_pool_sizes_are_the_papers():
    recipes = {name: load_source_recipe(name) for name in recipe_names()}
    assert {name: recipe.pool_tokens_billions for name, recipe in recipes.items() if recipe.pool_tokens_billions} == POOLS
    assert {name: recipe.long_pool_tokens_billions for name, recipe in recipes.items() if recipe.long_pool_tokens_billions} == LONG_POOLS
