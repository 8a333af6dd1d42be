"""Recipes: what is given is checked strictly, what is wrong is said with a way out, what is resolved reads back as itself."""

from pathlib import Path
from typing import Literal

import pytest
import tomli_w
from pydantic import Field, model_validator

from megatron_prism.config import (
    Block,
    Fraction,
    ParallelConfig,
    Positive,
    as_overrides,
    config_hash,
    load_recipe,
    merge,
    to_toml,
    validate,
)
from megatron_prism.errors import UserError


class Source(Block):
    """One source."""

    name: str
    """what to call it"""
    weight: float = 1.0
    """share of the samples"""
    path: Path | None = None
    """where it is"""


class Train(Block):
    """Steps."""

    steps: Positive = 100
    """optimizer steps to take"""
    save_interval: Positive | None = 50
    """steps between checkpoints"""
    warmup: Fraction = 0.1
    """share of the steps that warm up"""
    kind: Literal["cosine", "linear"] = "cosine"
    """shape of the decay"""


class Recipe(Block):
    """A recipe for these tests."""

    output: Path
    """folder to write"""
    seed: int = 0
    train: Train = Train()
    parallel: ParallelConfig = ParallelConfig()
    source: tuple[Source, ...] = ()
    named: dict[str, Source] | None = None

    @model_validator(mode="after")
    def _interval_within_steps(self) -> "Recipe":
        if self.train.save_interval and self.train.save_interval > self.train.steps:
            raise ValueError(
                f"train.save_interval={self.train.save_interval} must not exceed train.steps={self.train.steps}; try train.save_interval=none"
            )
        return self


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def _refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_recipe(_recipe(folder, text), overrides, Recipe)
    return str(refused.value).replace(str(folder), "")


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, 'output = "a"\n[train]\nsteps = 10\nsave_interval = 5\n[[source]]\nname = "x"\n')
    config = load_recipe(recipe, ["train.steps=20", "output=b/c", "source.0.weight=2", "train.save_interval=none"], Recipe)
    assert (config.output, config.train.steps, config.train.save_interval, config.train.warmup) == (Path("b/c"), 20, None, 0.1)
    assert config.source == (Source(name="x", weight=2.0),)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("1e-4", 1e-4),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"2"', "2"),
        ("some text", "some text"),
        ("none", None),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_an_override_is_a_toml_value_or_else_text(text: str, value: object) -> None:
    assert merge(None, [f"block.key={text}"]) == {"block": {"key": value}}


def test_the_text_none_is_off_in_a_recipe_too(tmp_path: Path) -> None:
    assert load_recipe(_recipe(tmp_path, 'output = "a"\n[train]\nsave_interval = "none"\n'), [], Recipe).train.save_interval is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output = 'a'\nsede = 3", "/recipe.toml: unknown key sede; did you mean seed?"),
        ("output = 'a'\n[train]\nstpes = 3", "/recipe.toml: unknown key train.stpes; did you mean train.steps?"),
        ("output = 'a'\nwarmup = 0.5", "/recipe.toml: unknown key warmup; did you mean train.warmup?"),
        ("output = 'a'\n[parallel]\nquux = 3", "/recipe.toml: unknown key parallel.quux; known here: cp, cp_comm_type, "),
        ("output = 'a'\n[[source]]\nnome = 'x'\nname = 'x'", "/recipe.toml: unknown key source.0.nome; did you mean source.0.name?"),
        ("seed = 1", "/recipe.toml: output is missing; it has no default (folder to write)"),
        ("output = 'a'\n[train]\nsteps = '9'", '/recipe.toml: train.steps="9": input should be a valid integer (optimizer steps to take)'),
        ("output = 'a'\n[train]\nsteps = 1.5", "/recipe.toml: train.steps=1.5: input should be a valid integer"),
        ("output = 'a'\n[train]\nsteps = true", "/recipe.toml: train.steps=true: input should be a valid integer"),
        ("output = 'a'\n[train]\nsteps = 0", "/recipe.toml: train.steps=0: input should be greater than 0"),
        ("output = 'a'\n[train]\nkind = 'cubic'", "/recipe.toml: train.kind=\"cubic\": input should be 'cosine' or 'linear' (shape of the decay)"),
        ("output = 'a'\ntrain = 3", "/recipe.toml: train=3: "),
        ("output = 'a'\n[train]\nsteps = 10", "/recipe.toml: train.save_interval=50 must not exceed train.steps=10; try train.save_interval=none"),
        ("output = ", "/recipe.toml is not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_with_key_value_and_way_out(tmp_path: Path, text: str, message: str) -> None:
    assert _refusal(tmp_path, text).startswith(message)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    lines = _refusal(tmp_path, "sede = 1\n[train]\nsteps = -1\nwarmup = 2\n", "parallel.tp=x").splitlines()
    assert len(lines) == 5 and all(line.startswith("/recipe.toml: ") for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "must read key=value"),
        ("=3", "must read key=value"),
        ("seed.deep=3", "seed is a value, not a block"),
        ("seed.deep.deeper=3", "no block"),
        ("source.3.name=x", "'3' must be an index from 0 to 0"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str, message: str) -> None:
    assert message in _refusal(tmp_path, "output = 'a'\nseed = 1\n[[source]]\nname = 'x'\n", override)


def test_missing_recipes_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.toml does not exist"):
        load_recipe(tmp_path / "gone.toml", [], Recipe)
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path, [], Recipe)


FULL = Recipe(
    output=Path("runs/x"),
    train=Train(steps=7, save_interval=None, warmup=0.25),
    source=(Source(name="a", path=Path("p")), Source(name='quo"ted', weight=0.1)),
    named={"n": Source(name="b")},
)


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    text = to_toml(FULL)
    assert 'save_interval = "none"' in text, "off where on is the default must be spelled out"
    assert load_recipe(_recipe(tmp_path, text), [], Recipe) == FULL
    assert config_hash(load_recipe(_recipe(tmp_path, text), [], Recipe)) == config_hash(FULL)


def test_tables_and_overrides_say_the_same(tmp_path: Path) -> None:
    long = [{"name": "line\nbreak " * 20, "path": 'quo"ted', "arguments": {"a key": [1, 2.5, True]}}] * 2
    table = {"output": "a b", "seed": 3, "train": {"steps": 70, "warmup": 0.5, "save_interval": None}, "source": [{"name": "x"}], "models": long}
    assert merge(None, as_overrides(table)) == table
    assert merge(_recipe(tmp_path, tomli_w.dumps({"output": "z"})), as_overrides(table)) == table


def test_the_hash_tells_configs_apart_and_not_how_they_were_written(tmp_path: Path) -> None:
    spelled = load_recipe(_recipe(tmp_path, "output = 'a'\nseed = 0\n[train]\nsteps = 100\n"), [], Recipe)
    assert config_hash(spelled) == config_hash(validate({"output": "a"}, Recipe, "test"))
    assert config_hash(spelled) != config_hash(validate({"output": "a", "seed": 1}, Recipe, "test"))


def test_a_key_that_is_a_matter_of_the_machine_is_no_part_of_the_request() -> None:
    class Machine(Block):
        output: Path
        workers: int | None = Field(default=None, exclude=True)

    one, two = Machine(output=Path("a"), workers=1), Machine(output=Path("a"), workers=2)
    assert config_hash(one) == config_hash(two) and to_toml(one) == to_toml(two) == 'output = "a"\n'


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FULL.train.steps = 3  # type: ignore[misc]
