"""Hidden states out of the trainer's modules: transformers' own, at every layer of every kind of family, and looking changes nothing."""

from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny

from megatron_prism import families
from megatron_prism.analysis.hidden_states import open_transformers
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import hidden_states, run_folder, verify
from megatron_prism.engine.padded_batches import padded_batches, sum_of_real
from megatron_prism.planning.layout import ParallelPlan, make_plan
from megatron_prism.stages import convert

pytestmark = pytest.mark.usefixtures("leave_groups")
LENGTHS = (3, 17, 1, 9, 30)
BOUND = 1e-4
"""relative to a layer's largest value: law 2's; sums in another order differ by about 1e-6"""


def alone(folder: Path) -> ParallelPlan:
    """A model on this rank alone."""
    _, shape = families.load(run_folder.hf_files(folder))
    return make_plan(shape, ParallelConfig(), 1, seq_len=1, global_batch=1, micro_batch=1)


def inputs(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def of_engine(folder: Path, ids: list[list[int]], batch_tokens: int = 64) -> torch.Tensor:
    with hidden_states.open_engine(folder, alone(folder), "fp32", "cpu") as model:
        found = model.pooled(ids, batch_tokens, lambda count: None)
    assert found is not None
    return found


def of_transformers(folder: Path, ids: list[list[int]], batch_tokens: int = 64) -> torch.Tensor:
    with open_transformers(folder, "fp32", "cpu") as model:
        found = model.pooled(ids, batch_tokens, lambda count: None)
    assert found is not None
    return found


def assert_alike(one: torch.Tensor, other: torch.Tensor, bound: float = BOUND) -> None:
    assert one.shape == other.shape
    for point, (a, b) in enumerate(zip(one, other, strict=True)):
        assert (a - b).abs().max() <= bound * b.abs().max(), f"point {point}"


@pytest.mark.parametrize("name", ["mistral", "granite", "granite_hybrid", "smollm3", "nemotron_h"])
def test_states_are_those_that_transformers_gives_each_input_alone(tmp_path, name):
    """One input at a time, without padding, `output_hidden_states` on: a way to them that is none of ours."""
    folder = write_tiny(name, tmp_path / "hf")
    model = verify.transformers_model(folder)
    ids = inputs(model.config.vocab_size)
    with torch.no_grad():
        each = [model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states for row in ids]
    expected = torch.stack([torch.stack([state[0].mean(dim=0) for state in states]) for states in each], dim=1)
    _, shape = families.load(folder)
    assert len(expected) == hidden_states.num_points(shape)
    assert_alike(of_transformers(folder, ids), expected)
    assert_alike(of_engine(folder, ids), expected)


@pytest.mark.parametrize("name", ["granite", "granite_hybrid"])
def test_a_checkpoint_of_any_layout_has_the_states_of_its_folder(tmp_path, name):
    folder = write_tiny(name, tmp_path / "hf")
    checkpoint = convert.run(convert.Config(direction="import", source=folder, output=tmp_path / "checkpoint", tp=2, pp=2))
    ids = inputs(97)
    expected = of_engine(folder, ids)
    assert torch.equal(of_engine(checkpoint, ids), expected), "the same weights, in one and the same order"
    assert_alike(of_transformers(checkpoint, ids), expected)


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_what_stands_beside_an_input_in_its_batch_changes_rounding_alone(tmp_path, name):
    folder = write_tiny(name, tmp_path / "hf")
    ids = inputs(97)
    together, apart = of_engine(folder, ids, batch_tokens=1000), of_engine(folder, ids, batch_tokens=1)
    assert_alike(together, apart, bound=3e-6)
    assert_alike(of_transformers(folder, ids, batch_tokens=1000), apart)


@pytest.mark.parametrize("name", ["granite", "granite_hybrid"])
def test_looking_changes_no_logit_and_leaves_no_hook(tmp_path, name):
    folder = write_tiny(name, tmp_path / "hf")
    _, shape = families.load(folder)
    ids_bs, positions_bs = torch.randint(0, 97, (2, 24)), torch.arange(24).expand(2, 24)
    with hidden_states.open_engine(folder, alone(folder), "fp32", "cpu") as model, torch.no_grad():
        before = model.chunk(ids_bs, positions_bs, None)
        seen: list[int] = []
        with hidden_states.listening(model.chunk, shape, lambda point, hidden: seen.append(point)):
            during = model.chunk(ids_bs, positions_bs, None)
        hidden_states.final_states(model.chunk, ids_bs)
        after = model.chunk(ids_bs, positions_bs, None)
        hooks = [hook for layer in model.chunk.decoder.layers for hook in (*layer._forward_hooks, *layer._forward_pre_hooks)]
    assert torch.equal(before, during) and torch.equal(before, after) and not hooks
    assert seen == list(range(hidden_states.num_points(shape) - 1))


def test_bf16_keeps_the_weights_that_training_keeps(tmp_path):
    folder = write_tiny("granite_hybrid", tmp_path / "hf")
    ids = inputs(97)
    with hidden_states.open_engine(folder, alone(folder), "bf16", "cpu") as model:
        types = {str(weight.dtype): name for name, weight in model.chunk.named_parameters()}
        short = model.pooled(ids, 64, lambda count: None)
    assert set(types) == {"torch.bfloat16", "torch.float32"} and types["torch.float32"].endswith(("A_log", "D", "dt_bias"))
    assert_alike(short, of_engine(folder, ids), bound=0.1)


def test_batches_hold_every_input_once_and_pad_as_little_as_their_size_allows():
    ids = [[7] * length for length in (5, 40, 2, 8, 8, 1)]
    batches = padded_batches(ids, 24, multiple=8)
    assert [batch.places for batch in batches] == [(1,), (3, 4, 0), (2, 5)]
    assert [tuple(batch.ids.shape) for batch in batches] == [(1, 40), (3, 8), (2, 8)]
    assert batches[1].lengths.tolist() == [8, 8, 5] and batches[1].ids[2].tolist() == [7] * 5 + [0] * 3


def test_padding_takes_no_part_in_a_sum_even_where_it_is_no_number():
    hidden = torch.tensor([[[1.0], [2.0], [float("nan")]], [[1.0], [float("inf")], [5.0]]])
    assert sum_of_real(hidden, torch.tensor([2, 1])).tolist() == [[3.0], [1.0]]
    assert sum_of_real(hidden[:, :1], torch.tensor([2, 1]), first=1).tolist() == [[1.0], [0.0]], "a part of the sequence that begins with token 1"
