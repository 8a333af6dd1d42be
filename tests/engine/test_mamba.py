"""The Mamba-2 mixer: transformers' on one rank, one rank's on several (see `mamba_ranks`); documents, decoding, checkpoints."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mamba_ranks as ranks_script
import pytest
import torch
from mamba_ranks import CASES, DOCUMENTS, HIDDEN, draw, layer, load, mesh, packed, randomise, sizes

from megatron_prism.engine import mamba
from megatron_prism.engine.mamba_share import ScannedPart

HF_BOUND = 1e-5
"""largest difference over largest value, fp32"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank's checkpoints and results."""
    folder = tmp_path_factory.mktemp("mamba")
    ranks_script.write_expected(folder)
    return folder


def hugging_face(name: str, groups: int) -> tuple[Any, torch.nn.Module]:
    """(module of the norm, mixer) of transformers."""
    if name == "granite":
        from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

        config = granite.GraniteMoeHybridConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            layer_types=["mamba"],
            mamba_n_heads=8,
            mamba_d_head=4,
            mamba_d_state=4,
            mamba_n_groups=groups,
            mamba_expand=2,
            mamba_chunk_size=5,
            rms_norm_eps=1e-5,
        )
        return granite.GraniteMoeHybridRMSNorm(HIDDEN, 1e-5), granite.GraniteMoeHybridMambaLayer(config, 0)
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

    config = nemotron.NemotronHConfig(
        hidden_size=HIDDEN,
        layers_block_type=["mamba"],
        mamba_num_heads=8,
        mamba_head_dim=4,
        ssm_state_size=4,
        n_groups=groups,
        chunk_size=5,
        time_step_min=0.05,
        layer_norm_epsilon=1e-5,
    )
    return nemotron.NemotronHRMSNorm(HIDDEN, 1e-5), nemotron.NemotronHMamba2Mixer(config, 0)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", ["granite", "nemotron"])
def test_outputs_and_gradients_are_those_of_transformers(name, groups):
    norm, mixer = hugging_face(name, groups)
    ours = layer(sizes(groups, groups, time_step_limit=tuple(map(float, mixer.time_step_limit))), mesh(1))
    randomise(ours)
    pairs = {**dict(mixer.named_parameters(prefix="mixer")), **dict(norm.named_parameters(prefix="norm"))}
    with torch.no_grad():
        for key, parameter in pairs.items():
            parameter.copy_(ours.get_parameter(key))
    assert pairs.keys() == dict(ours.named_parameters()).keys()
    mine, theirs = draw(5).requires_grad_(), draw(5).requires_grad_()
    output = ours(mine)
    expected = theirs + mixer(norm(theirs).transpose(0, 1)).transpose(0, 1)
    output.backward(draw(6))
    expected.backward(draw(6))
    compared = {"output": (output, expected), "input": (mine.grad, theirs.grad)}
    compared |= {key: (ours.get_parameter(key).grad, parameter.grad) for key, parameter in pairs.items()}
    wrong = {key: ((a - b).abs().max() / b.abs().max()).item() for key, (a, b) in compared.items()}
    assert max(wrong.values()) < HF_BOUND, wrong


@pytest.mark.timeout(600)
def test_every_layout_gives_one_ranks_outputs_and_gradients_and_its_checkpoint_comes_back_bit_for_bit(run_ranks, folder):
    """Planted faults are inside: a mixer that forgets to sum B's and C's gradient, their weight's, or the norm's squares is seen."""
    run_ranks(Path(ranks_script.__file__), 4, str(folder), timeout=500)
    place = mesh(1)
    for name, groups in CASES.items():
        before, *after = (load(layer(sizes(*groups), place), place, folder / which) for which in (name, f"{name}_tp2", f"{name}_tp4"))
        for module in after:
            for (key, one), other in zip(before.named_parameters(), module.parameters(), strict=True):
                assert torch.equal(one, other), (name, key)


@pytest.mark.parametrize("name", CASES)
def test_packed_documents_are_separate_documents(folder, name):
    place = mesh(1)
    module = load(layer(sizes(*CASES[name]), place), place, folder / name)
    hidden = draw(7)[:, :1]
    spans = itertools.pairwise(DOCUMENTS)
    with torch.no_grad():
        expected = torch.cat([module(hidden[start:stop]) for start, stop in spans])
        found = module(hidden, packed_seq_params=packed(DOCUMENTS))
        unaware = module(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (unaware - expected).abs().max() > 1e-2


def test_padding_after_the_last_document_is_a_document_of_its_own():
    place = mesh(1)
    module, hidden = layer(sizes(1, 1), place), draw(7)[:, :1]
    with torch.no_grad():
        short, long = (module(hidden, packed_seq_params=packed(ends)) for ends in ((0, 5, 9), (0, 5, 9, 12)))
    assert torch.equal(short, long)


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_equals_the_full_forward_pass(folder, name):
    expected = torch.load(folder / f"{name}.pt")
    torch.testing.assert_close(expected["decoded output"], expected["output"], rtol=1e-5, atol=1e-5)


def test_a_new_prompt_starts_from_nothing():
    module = layer(sizes(1, 1), mesh(1)).eval()
    first, second = ranks_script.decoded(module, draw(5)), ranks_script.decoded(module, draw(5))
    assert torch.equal(first, second)


def test_start_values_are_those_of_mamba_2():
    mixer = layer(replace(sizes(1, 1), num_heads=64, head_dim=2), mesh(1)).mixer
    decays, steps = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= decays.min() < 3 and 14 < decays.max() <= 16
    assert 1e-3 * 0.999 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 1e-1 * 1.001
    assert abs(steps.log().mean().item() - math.log(1e-2)) < 0.6  # log-uniform: the middle of the range in logarithms
    assert torch.equal(mixer.D, torch.ones(64))


def test_numbers_of_heads_stay_fp32_and_cut_parameters_are_marked():
    """The gradient norm counts an element once: those that are cut on every rank, the others on the first."""
    mixer = layer(sizes(1, 1), mesh(1)).mixer
    assert {name for name, parameter in mixer.named_parameters() if getattr(parameter, "keep_fp32", False)} == {"A_log", "D", "dt_bias"}
    assert all(getattr(parameter, "tensor_model_parallel", False) for parameter in mixer.parameters())


@pytest.mark.parametrize("groups", [1, 2])
def test_parts_of_the_heads_make_the_whole_through_every_module(monkeypatch, groups):
    """Two context-parallel ranks, each told that its tokens are all there are. DDP fetches a module's weights when that module is called."""
    mixer = layer(sizes(groups, groups), mesh(1)).mixer
    expected = mixer(draw(5))[0]
    called, scanned = set(), []
    for name, module in mixer.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    for rank in (0, 1):
        mixer.scanned_parts, mixer.cp_group = [ScannedPart(mixer.share, 2, part) for part in (0, 1)], SimpleNamespace(rank=lambda rank=rank: rank)
        monkeypatch.setattr(mamba, "to_channels", lambda parts, packed, group, rank=rank: parts[rank])
        monkeypatch.setattr(mamba, "to_tokens", lambda y_sbd, packed, group: (scanned.append(y_sbd), torch.cat([y_sbd, y_sbd], dim=-1))[1])
        mixer(draw(5))
    monkeypatch.setattr(mamba, "to_tokens", lambda y_sbd, packed, group: torch.cat(scanned, dim=-1))
    torch.testing.assert_close(mixer(draw(5))[0], expected, rtol=1e-5, atol=1e-6)
    assert called == {name for name, module in mixer.named_modules() if name == "" or list(module.parameters(recurse=False))}
