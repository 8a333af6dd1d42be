"""A reference takes the policy's place and gives it back bit for bit, follows it in fp32, and is saved beside a checkpoint."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from policy_cases import OPTIONS, grpo, noisy, open_engine, sequences, with_rows
from tiny_models import write_tiny
from torch import Tensor

from megatron_prism import artifact
from megatron_prism.config import OptimizerConfig
from megatron_prism.engine import checkpoint, parallel
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.model import BuildOptions, Precision
from megatron_prism.engine.policy import PolicyReport, log_probabilities, policy_step
from megatron_prism.engine.reference_model import LOWER, REFERENCE, Reference
from megatron_prism.engine.saving import Background
from megatron_prism.engine.step import Engine
from megatron_prism.errors import UserError
from megatron_prism.rl.settings import ObjectiveConfig
from megatron_prism.stages import convert

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A hybrid, some of whose weights stay fp32 in a bf16 model; tied."""
    root = tmp_path_factory.mktemp("reference")
    write_tiny("granite_hybrid", root / "hf")
    yield convert.run(convert.Config(direction="import", source=root / "hf", output=root / "checkpoint"))
    parallel.stop()


def engine_of(imported: Path, precision: Precision) -> Engine:
    """Split masters: the weights are the upper halves of what the optimizer updates."""
    split = OptimizerConfig(lr=1e-3, split_master=precision == "bf16")
    return open_engine(imported, BuildOptions(precision=precision), split)


def step(engine: Engine) -> PolicyReport:
    batch = sequences(97)
    logp = log_probabilities(engine, batch, OPTIONS)
    batch = with_rows(batch, old=logp, generator=logp, reference=noisy(logp))
    return policy_step(engine, batch, grpo(ObjectiveConfig()), OPTIONS, 1e-2, 0.1)


def logp(engine: Engine) -> np.ndarray:
    return np.concatenate(log_probabilities(engine, sequences(97), OPTIONS))


def weights(engine: Engine) -> list[Tensor]:
    return [weight.detach().clone() for chunk in engine.model for weight in chunk.parameters()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_reference_stands_in_for_the_policy_and_training_goes_on_as_without_it(imported, precision, on_host):
    engine, alone = engine_of(imported, precision), engine_of(imported, precision)
    reference, at_first = Reference(engine, on_host), logp(engine)
    for _ in range(2):
        assert step(engine) == step(alone)
        with reference.in_place(engine):
            assert np.array_equal(logp(engine), at_first)
        assert same(weights(engine), weights(alone)) and not np.array_equal(logp(engine), at_first)


def test_the_policy_comes_back_after_an_error_too(imported):
    engine = engine_of(imported, "fp32")
    reference = Reference(engine)
    step(engine)
    before = weights(engine)
    with pytest.raises(KeyError), reference.in_place(engine):
        raise KeyError
    assert same(weights(engine), before)


def test_a_soft_update_is_the_formula_and_a_whole_one_is_the_policy(imported):
    engine = engine_of(imported, "fp32")
    reference, before = Reference(engine), weights(engine)
    step(engine)
    policy = weights(engine)
    reference.move_towards(engine, 0.0)
    with reference.in_place(engine):
        assert same(weights(engine), before)
    reference.move_towards(engine, 0.3)
    with reference.in_place(engine):
        for found, old, new in zip(weights(engine), before, policy, strict=True):
            torch.testing.assert_close(found.double(), 0.3 * new.double() + 0.7 * old.double(), rtol=1e-6, atol=1e-7)
    reference.move_towards(engine, 1.0)
    with reference.in_place(engine):
        assert same(weights(engine), policy)


def test_a_bf16_reference_follows_by_steps_smaller_than_bf16_can_hold(imported):
    """40 steps of 3 % each are 70 % of the way; rounded to bf16 after each, most weights would never leave."""
    engine = engine_of(imported, "bf16")
    reference, truth = Reference(engine), [weight.float() for weight in weights(engine)]
    step(engine)
    policy = [weight.float() for weight in weights(engine)]
    rounded = [weight.bfloat16() for weight in truth]
    for _ in range(40):
        reference.move_towards(engine, 0.03)
        truth = [old.lerp(new, 0.03) for old, new in zip(truth, policy, strict=True)]
        rounded = [old.float().lerp(new, 0.03).bfloat16() for old, new in zip(rounded, policy, strict=True)]
    with reference.in_place(engine):
        found = weights(engine)
    assert same([weight.float() for weight in found], [value.to(weight.dtype).float() for value, weight in zip(truth, found, strict=True)])
    assert not same(rounded, [value.bfloat16() for value in truth]), "the test could not see it"


@pytest.mark.parametrize("background", [None, Background()])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_saved_reference_goes_on_bit_for_bit_and_leaves_the_policy_alone(imported, tmp_path, precision, background):
    engine = engine_of(imported, precision)
    reference = Reference(engine)
    step(engine)
    reference.move_towards(engine, 0.3)
    policy = weights(engine)
    beside = partial(reference.save, engine)
    saved = checkpoint.save(engine, tmp_path / "run", Progress(step=1), imported / "hf", OptimizerConfig(lr=1e-3), [], beside, background)
    if background is not None:
        background.wait()
    artifact.verify(saved)
    artifact.require(saved, "checkpoint")
    assert (saved / REFERENCE).is_dir() and (saved / LOWER).is_dir() == (precision == "bf16") and same(weights(engine), policy)

    resumed = engine_of(imported, precision)
    other = Reference(resumed, on_host=True)
    checkpoint.load_all(resumed, saved)
    other.load(resumed, saved)
    assert same(weights(resumed), policy)
    for each, its in ((engine, reference), (resumed, other)):
        its.move_towards(each, 0.1)
    with reference.in_place(engine), other.in_place(resumed):
        assert same(weights(resumed), weights(engine))


def test_a_checkpoint_without_a_reference_is_refused_by_name(imported):
    engine = engine_of(imported, "fp32")
    with pytest.raises(UserError, match=r"checkpoint holds no reference model.*go on without one"):
        Reference(engine).load(engine, imported)
