"""What a run takes is counted before it runs; too many epochs are refused with weights, and a number of steps, that are then accepted."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prism.data_prep import budgets
from megatron_prism.data_prep.blend import Blend, BlendSource, load_blend, write_blend
from megatron_prism.data_prep.sampler import Sampler
from megatron_prism.errors import UserError

SEQ_LEN, BATCH = 100, 10


def blend(*sources: tuple[float, float | None]) -> Blend:
    """Sources a, b, ... of (weight, max_epochs)."""
    rows = zip("abcdefgh", sources, strict=False)
    return Blend(1, tuple(BlendSource(name, name.upper(), weight, Path(name), max_epochs=limit) for name, (weight, limit) in rows))


def counted(mix: Blend, sizes: list[int], steps: int, records: list | None = None, done: int = 0) -> budgets.Budget:
    found = [{"name": source.name, "weight": source.weight, "digest": "", "tokens": size} for source, size in zip(mix.sources, sizes, strict=True)]
    return budgets.count(mix, sizes, records or [{"first_sample": 0, "sources": found}], done, steps * BATCH, SEQ_LEN)


def reweighed(mix: Blend, weights: dict[str, float]) -> Blend:
    return Blend(1, tuple(replace(source, weight=weights[source.name]) for source in mix.sources if source.name in weights))


def test_the_budget_is_what_the_sampler_serves():
    mix, sizes = blend((3, None), (1, None), (1e-6, None)), [5000, 70, 9]
    budget = counted(mix, sizes, 20)
    sampler = Sampler([np.array([size]) for size in sizes], [3, 1, 1e-6], SEQ_LEN, 1, list("abc"))
    assert [row.total for row in budget.rows] == np.bincount([sampler.sample(index).source for index in range(200)], minlength=3).tolist()
    assert [row.epochs(SEQ_LEN) for row in budget.rows] == [15000 / 5000, 5000 / 70, 0.0]


def test_a_run_within_its_limits_is_let_through_to_the_last_sample():
    budgets.check_epochs(counted(blend((1, 1.0), (1, None)), [SEQ_LEN * BATCH * 5, 10], 10), BATCH)
    with pytest.raises(UserError, match="max_epochs=1 allows"):
        budgets.check_epochs(counted(blend((1, 1.0), (1, None)), [SEQ_LEN * BATCH * 5 - 1, 10], 10), BATCH)


def test_a_source_that_would_be_read_too_often_is_refused_with_the_numbers():
    with pytest.raises(UserError) as refusal:
        budgets.check_epochs(counted(blend((55, 1.0), (45, None)), [30_000, 10**6], 100), BATCH)
    words = str(refusal.value)
    assert "a: 55,000 tokens are 1.833 epochs of its 30,000; max_epochs=1 allows 30,000" in words
    assert "the run of 100 steps" in words and "weight 19.28 for a" in words  # 30 % beside 45 is 19.286
    steps = int(re.search(r"steps=(\d+)", words).group(1))
    budgets.check_epochs(counted(blend((55, 1.0), (45, None)), [30_000, 10**6], steps), BATCH)
    with pytest.raises(UserError):
        budgets.check_epochs(counted(blend((55, 1.0), (45, None)), [30_000, 10**6], steps + 1), BATCH)


@pytest.mark.parametrize("number", range(10))
def test_the_weights_that_are_suggested_fit_and_are_not_timid(number):
    generator = np.random.default_rng(number)
    limits = [None, *(float(generator.uniform(0.3, 3)) if generator.random() < 0.7 else None for _ in range(5))]
    mix = blend(*((float(10 ** generator.uniform(-2, 1)), limit) for limit in limits))
    sizes = [10**7, *generator.integers(2_000, 60_000, 5).tolist()]
    weights = budgets.fitting_weights(counted(mix, sizes, 100))
    assert weights is not None
    fitted = counted(reweighed(mix, weights), [size for source, size in zip(mix.sources, sizes, strict=True) if source.name in weights], 100)
    budgets.check_epochs(fitted, BATCH)
    before = {row.name: row for row in counted(mix, sizes, 100).rows}
    for row in fitted.rows:
        if before[row.name].total > (before[row.name].allowed(SEQ_LEN) or 10**9):
            assert row.total >= 0.95 * row.allowed(SEQ_LEN) - 4, "a source that is cut gets about all that its limit allows"


def test_limits_that_leave_nobody_to_take_the_rest_are_refused_without_a_suggestion_of_weights():
    budget = counted(blend((1, 1.0), (1, 1.0)), [1000, 1000], 10)
    assert budgets.fitting_weights(budget) is None
    with pytest.raises(UserError, match=r"no weights fit; steps=2 at most"):
        budgets.check_epochs(budget, BATCH)


def test_what_earlier_plans_took_counts_against_the_limit():
    first = [{"name": "a", "weight": 1.0, "digest": "", "tokens": 10_000}, {"name": "old", "weight": 1.0, "digest": "", "tokens": 500}]
    mix = blend((1, 1.0), (1, None))
    second = [{"name": "a", "weight": 1.0, "digest": "", "tokens": 10_000}, {"name": "b", "weight": 1.0, "digest": "", "tokens": 10**6}]
    records = [{"first_sample": 0, "sources": first}, {"first_sample": 100, "sources": second}]
    budget = counted(mix, [10_000, 10**6], 20, records, done=100)
    assert {row.name: (row.before, row.total) for row in budget.rows} == {"a": (50, 100), "b": (0, 50), "old": (50, 50)}
    budgets.check_epochs(budget, BATCH)
    with pytest.raises(UserError, match=r"(?s)a: 12,500 tokens are 1\.25 epochs.*steps=20 at most"):
        budgets.check_epochs(counted(mix, [10_000, 10**6], 25, records, done=100), BATCH, steps_done=10)


def test_a_source_that_is_beyond_its_limit_already_must_leave():
    records = [{"first_sample": 0, "sources": [{"name": name, "weight": 1.0, "digest": "", "tokens": 10**4} for name in "ab"]}]
    budget = counted(blend((1, 0.3), (1, None)), [10**4, 10**4], 20, records, done=100)
    with pytest.raises(UserError, match=r"(?s)the run of 20 steps.*a left out; or steps=10 at most"):
        budgets.check_epochs(budget, BATCH, steps_done=10)


def test_the_table_shows_every_source_its_share_and_the_domains():
    mix = blend((55, 4.0), (27.5, None), (17.5, None))
    lines = budgets.describe(counted(mix, [30_000, 1_000_000, 7], 100)).splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["source", "domain", "weight", "share", "tokens it has", "the run takes", "epochs", "limit"]
    assert re.split(r"\s{2,}", lines[1]) == ["a", "A", "55", "55 %", "30,000", "55,000", "1.83", "4"]
    assert re.split(r"\s{2,}", lines[3]) == ["c", "C", "17.5", "17.5 %", "7", "17,500", "2,500"]
    assert lines[4].split(maxsplit=1)[1] == "A 55.0%, B 27.5%, C 17.5%"
    assert "limit" not in budgets.describe(counted(blend((1, None)), [5], 1))


def test_hundreds_of_sources_are_counted_and_fitted():
    names = [f"s{number}" for number in range(300)]
    mix = Blend(
        1, tuple(BlendSource(name, "d", 1.0 + number, Path(name), max_epochs=1.0 if number % 2 else None) for number, name in enumerate(names))
    )
    sizes = [20_000] * 300
    weights = budgets.fitting_weights(counted(mix, sizes, 10_000))
    assert weights is not None
    budgets.check_epochs(counted(reweighed(mix, weights), sizes, 10_000), BATCH)


TWO = '[[source]]\nname = "a"\n{}\ntrain = "a"\n[[source]]\nname = "b"\n{}\ntrain = "b"\n'


def test_token_budgets_are_shares(tmp_path):
    path = tmp_path / "blend.toml"
    path.write_text("seed = 1\n" + TWO.format("tokens = 15_000_000_000", "tokens = 5_000_000_000\nmax_epochs = 1.5"))
    mix = load_blend(path)
    assert [(source.weight, source.tokens, source.max_epochs) for source in mix.sources] == [(15e9, 15 * 10**9, None), (5e9, 5 * 10**9, 1.5)]
    assert [row.total for row in counted(mix, [10**6, 10**6], 40).rows] == [300, 100]
    assert load_blend(write_blend(path, mix)) == mix
    with pytest.raises(UserError, match=r"tokens 4\d+ for b"):
        budgets.check_epochs(counted(mix, [10**6, 6_000], 40), BATCH)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("weight = 1", "tokens = 5", "weight: a; tokens: b"),
        ("weight = 1\ntokens = 5", "weight = 1", "weight: a, b; tokens: a"),
        ("weight = 1", "", "weight: a; neither: b"),
        ("tokens = 0", "tokens = 5", "greater than 0"),
        ("weight = 1\nmax_epochs = 0", "weight = 1", "greater than 0"),
    ],
)
def test_weights_beside_token_budgets_and_senseless_limits_are_refused(tmp_path, first, second, words):
    (tmp_path / "blend.toml").write_text("seed = 1\n" + TWO.format(first, second))
    with pytest.raises(UserError, match=words):
        load_blend(tmp_path / "blend.toml")
