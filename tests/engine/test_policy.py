"""A policy's log-probabilities and its step on one rank: against transformers, in float64; a step that cannot be taken changes nothing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_steps import gradients, reference_gradients
from megatron.core.process_groups_config import ProcessGroupCollection
from policy_cases import OPTIONS, UNSCORED, grpo, noisy, open_engine, sequences, with_rows
from tiny_models import write_tiny
from torch import Tensor

from megatron_prism import families
from megatron_prism.config import OptimizerConfig, ParallelConfig
from megatron_prism.data_prep.packing import PackingOptions
from megatron_prism.engine import checkpoint, parallel, verify
from megatron_prism.engine.checkpoint import Progress
from megatron_prism.engine.model import BuildOptions
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.policy import Sequence, log_probabilities, policy_step
from megatron_prism.engine.policy_batches import Buffers
from megatron_prism.engine.step import DivergenceError, Engine
from megatron_prism.errors import UserError
from megatron_prism.planning.layout import make_plan
from megatron_prism.rl.settings import ObjectiveConfig
from megatron_prism.stages import convert

MODELS = ("llama", "granite", "granite_hybrid_rope")
"""a softmax over an untied head; multipliers, scaled logits and a tied one; Mamba"""
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-2, clip_grad=None)
TOKEN = grpo(ObjectiveConfig())
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """A model's NAME/hf and NAME/checkpoint, made when first asked for."""
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (root / name).exists():
            write_tiny(name, root / name / "hf")
            convert.run(convert.Config(direction="import", source=root / name / "hf", output=root / name / "checkpoint"))
        return root / name

    yield of
    parallel.stop()


def transformers_logp(model: Any, batch: list[Sequence]) -> Tensor:
    """Log-probabilities of all scored tokens, each sequence run by itself."""
    found = []
    for sequence in batch:
        tokens = torch.from_numpy(sequence.tokens)
        logp_nv = model(tokens.unsqueeze(0), use_cache=False).logits[0].log_softmax(dim=-1)
        of_tokens = logp_nv[:-1].gather(1, tokens[1:].unsqueeze(1)).squeeze(1)
        found.append(of_tokens[torch.from_numpy(sequence.scored[1:])])
    return torch.cat(found)


def scored(batch: list[Sequence], values: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([row[sequence.scored] for sequence, row in zip(batch, values, strict=True)]))


def off_policy(engine: Engine, batch: list[Sequence]) -> list[Sequence]:
    """With old, generator and reference log-probabilities that are not quite the policy's, so that clip, cap and penalty all act."""
    logp = log_probabilities(engine, batch, OPTIONS)
    return with_rows(batch, old=noisy(logp, 1), generator=noisy(logp, 2), reference=noisy(logp, 3))


def weights(engine: Engine) -> list[Tensor]:
    return [weight.detach().clone() for chunk in engine.model for weight in chunk.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_transformers_and_zero_where_not_scored(folder, name):
    engine = open_engine(folder(name) / "checkpoint")
    batch = sequences(97)
    found = log_probabilities(engine, batch, OPTIONS)
    with torch.no_grad():
        expected = transformers_logp(verify.transformers_model(folder(name) / "hf"), batch)
    assert (scored(batch, found) - expected).abs().max() / expected.abs().max() < 1e-6
    assert all((row[~sequence.scored] == 0).all() and row.dtype == np.float32 for sequence, row in zip(batch, found, strict=True))
    assert not found[UNSCORED].any()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_float64_autograd_through_transformers(folder, tmp_path, name):
    """A learning rate of 1e-30 moves no weight, and leaves (1 - beta1) times the gradient in Adam's first moment."""
    engine = open_engine(folder(name) / "checkpoint", optimizer=OPTIMIZER)
    batch = off_policy(engine, sequences(97))
    report = policy_step(engine, batch, TOKEN, OPTIONS, lr=1e-30, weight_decay=0.0)
    checkpoint.save(engine, tmp_path / "run", Progress(step=1), folder(name) / "hf", OPTIMIZER, [])
    model = verify.transformers_model(folder(name) / "hf", attn_implementation="eager").double()
    rows = {row: scored(batch, [sequence.rows[row] for sequence in batch]) for row in batch[0].rows}
    loss_t, metrics = TOKEN(transformers_logp(model, batch), rows, torch.zeros(0))
    loss_t.sum().backward()
    expected, found = reference_gradients(model), gradients(tmp_path / "run")
    assert metrics["clipped_low"] > 0 and metrics["clipped_high"] > 0 and report.sums["clipped_low"] == metrics["clipped_low"]
    assert abs(report.loss - loss_t.double().sum().item()) < 1e-6 * report.sums["size"]
    assert report.grad_norm == pytest.approx(torch.stack([gradient.norm() for gradient in expected.values()]).norm().item(), rel=1e-5)
    assert found.keys() == expected.keys()
    apart = {key: ((found[key] - value).abs().max() / value.abs().max()).item() for key, value in expected.items()}
    assert max(apart.values()) < 1e-5, apart


def test_the_first_update_on_a_batch_is_on_policy_to_the_last_bit(folder):
    """What was computed forward only is what the step computes: every ratio is 1, nothing is clipped, and the policy is the reference."""
    engine = open_engine(folder("granite_hybrid_rope") / "checkpoint")
    batch = sequences(97)
    logp = log_probabilities(engine, batch, OPTIONS)
    report = policy_step(engine, with_rows(batch, old=logp, generator=logp, reference=logp), TOKEN, OPTIONS, 1e-3, 0.1)
    assert report.tokens == report.sums["tokens"] == report.sums["ratio"] == sum(sequence.num_scored for sequence in batch)
    assert report.sums["kl"] == report.sums["mismatch_max"] == report.sums["clipped_low"] == report.sums["clipped_high"] == 0


def no_number(logp_t: Tensor, rows: dict[str, Tensor], segment_t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A finite loss with an infinite slope."""
    return (logp_t - logp_t.detach()).abs().sqrt(), {}


NAMED = {
    "loss": r"loss nan.*NaN first in the backward pass of micro-batch \d: gradient of the output of output_layer.*held sequences 0, 6 of the step",
    "gradient": r"loss 0\.0, gradient norm (nan|inf).* first in the backward pass of micro-batch 0: gradient of the output of output_layer",
}
"""what the objective gives is the first of the backward pass"""


@pytest.mark.parametrize("fault", list(NAMED))
def test_a_step_whose_loss_or_gradient_is_no_number_leaves_everything_as_it_was(folder, fault):
    engine, untouched = open_engine(folder("llama") / "checkpoint"), open_engine(folder("llama") / "checkpoint")
    good = off_policy(engine, sequences(97))
    bad = [replace(good[0], rows={**good[0].rows, "advantage": np.full_like(good[0].rows["advantage"], np.nan)}), *good[1:]]
    before = weights(engine)
    with pytest.raises(DivergenceError, match=NAMED[fault]):
        policy_step(engine, bad if fault == "loss" else good, TOKEN if fault == "loss" else no_number, OPTIONS, 1e-3, 0.1)
    assert all(torch.equal(*pair) for pair in zip(weights(engine), before, strict=True))
    reports = [policy_step(each, good, TOKEN, OPTIONS, 1e-3, 0.1) for each in (engine, untouched)]
    assert reports[0] == reports[1]
    assert all(torch.equal(*pair) for pair in zip(weights(engine), weights(untouched), strict=True))


def test_bf16_log_probabilities_are_near_those_of_fp32_and_a_step_can_be_taken(folder):
    batch = sequences(97)
    exact, rough = (open_engine(folder("granite") / "checkpoint", BuildOptions(precision=precision)) for precision in ("fp32", "bf16"))
    logps = [scored(batch, log_probabilities(engine, batch, OPTIONS)) for engine in (exact, rough)]
    assert 0 < (logps[0] - logps[1]).abs().max() < 0.1
    reports = [policy_step(engine, off_policy(engine, batch), TOKEN, OPTIONS, 1e-3, 0.1) for engine in (exact, rough)]
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=0.1)


def test_what_cannot_be_stepped_is_refused(folder):
    engine = open_engine(folder("llama") / "checkpoint")
    batch = sequences(97)
    with pytest.raises(UserError, match=r"sequence 1 has 40 tokens and a buffer holds 32; raise the buffers' length to 40"):
        log_probabilities(engine, batch, PackingOptions(32, 8))
    with pytest.raises(UserError, match=r"none of the 1 sequences of this step has a scored token.*leave the step out"):
        policy_step(engine, batch[UNSCORED : UNSCORED + 1], TOKEN, OPTIONS, 1e-3, 0.1)
    with pytest.raises(UserError, match=r"hidden_dropout=0.1.*set hidden_dropout=0"):
        policy_step(open_engine(folder("llama") / "checkpoint", BuildOptions(hidden_dropout=0.1)), batch, TOKEN, OPTIONS, 1e-3, 0.1)
    with pytest.raises(UserError, match=r"pad_multiple=6 must be a multiple of 2 \* parallel.cp=4.*try pad_multiple=4"):
        next(Buffers(batch, PackingOptions(48, 6)).of_rank(mesh(folder, {"cp": 2}), torch.device("cpu")))
    with pytest.raises(AssertionError, match="nothing predicts the first token"):
        Sequence(np.arange(3), np.ones(3, bool))
    assert log_probabilities(engine, [], OPTIONS) == []


def mesh(folder: Folders, layout: dict[str, Any], ranks: int = 2, dp_rank: int = 0, cp_rank: int = 0) -> Mesh:
    _, model = families.load(folder("llama") / "hf")
    plan = make_plan(model, ParallelConfig(**layout), ranks, OPTIONS.seq_len, 8, 1)
    return Mesh(plan, groups=ProcessGroupCollection(), rank=0, tp_rank=0, pp_rank=0, dp_rank=dp_rank, cp_rank=cp_rank)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_scored_token_is_in_one_buffer_of_one_rank_with_its_own_values(folder, dp):
    draw = np.random.default_rng(0)
    batch = with_rows(sequences(97), value=[draw.normal(size=len(sequence.tokens)).astype(np.float32) for sequence in sequences(97)])
    buffers = Buffers(batch, OPTIONS)
    ranks = [list(buffers.of_rank(mesh(folder, {}, dp, rank), torch.device("cpu"))) for rank in range(dp)]
    assert {len(held) for held in ranks} == {-(-buffers.packing.num_buffers // dp)}
    held = [each for rank in ranks for each in rank]
    numbers = torch.cat([each.numbers for each in held])
    assert sorted(numbers.tolist()) == list(range(buffers.num_scored))
    values, tokens = np.zeros(buffers.num_scored, np.float32), np.zeros(buffers.num_scored, np.float32)
    for each in held:
        values[each.numbers], tokens[each.numbers] = each.rows[buffers.names.index("value")], each.labels[0, each.places]
        assert each.segments.unique().tolist() == list(range(len(each.segments.unique())))
    for sequence, value, token in zip(batch, buffers.split(values), buffers.split(tokens), strict=True):
        assert np.array_equal(value, sequence.rows["value"] * sequence.scored) and np.array_equal(token, sequence.tokens * sequence.scored)
