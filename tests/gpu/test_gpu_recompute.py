"""What recomputed layers keep, on a GPU at true width: equal losses and gradients, less memory, attention's core once."""

import json

import pytest
import torch
from recompute_options import OPTIONS

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, parallel, recompute
from megatron_prism.engine.documents import documents
from megatron_prism.engine.model import BuildOptions, build, to_precision
from megatron_prism.planning.layout import make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH = 16384
"""tokens. The hybrid's mixer, whose backward pass takes more memory than all that is kept, comes last: what the others keep is there meanwhile"""


@pytest.mark.parametrize(
    ("name", "layers", "pattern"), [("llama-3.1-8b", 4, None), ("nemotron-h-8b-base-8k", 6, "*-*-M-"), ("mistral-7b-v0.1", 3, None)]
)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_gradients_are_equal_and_memory_falls(tmp_path, name, layers, pattern, packed):
    config = {**families.published(name), "num_hidden_layers": layers, "vocab_size": 1024}
    if pattern is not None:
        config["hybrid_override_pattern"] = pattern
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, shape = families.load(tmp_path)
    place = device.setup("cuda")
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(shape, ParallelConfig(), 1, LENGTH, global_batch=1, micro_batch=1), seed=1)
    tokens = torch.randint(0, 1024, (1, LENGTH), device=place, generator=torch.Generator(place).manual_seed(0))
    positions = torch.arange(LENGTH, device=place).unsqueeze(0)
    lengths = (5000, 11384)
    rows = {"packed_seq_params": documents(torch.tensor([0, 5000, LENGTH], dtype=torch.int32, device=place), lengths)} if packed else {}
    losses, apart, peaks, times = {}, {}, {}, {}
    weights, expected = list[torch.Tensor](), list[torch.Tensor]()
    for case, options in OPTIONS.items():
        (chunk,) = build(shape, mesh, BuildOptions(precision="bf16", **options), place)
        weights = weights or [weight.detach().clone() for weight in chunk.parameters()]
        with torch.no_grad():
            for weight, value in zip(chunk.parameters(), weights, strict=True):
                weight.copy_(value)
        model = to_precision(chunk, chunk.config)
        for _ in range(3):  # the first compiles and makes room for gradients, as DDP does
            model.zero_grad(set_to_none=False)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before = torch.cuda.memory_allocated()
            start.record()
            loss = model(tokens, positions, None, labels=tokens.roll(-1), **rows).mean()
            loss.backward()
            end.record()
            torch.cuda.synchronize()
            peaks[case], times[case] = (torch.cuda.max_memory_allocated() - before) / 2**20, start.elapsed_time(end)
        losses[case] = loss.item()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        expected = expected or gradients
        differences = [(found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30) for found, wanted in zip(gradients, expected, strict=True)]
        apart[case] = torch.stack(differences).max().item()  # on the device: a billion numbers take a minute on the host
        del model, chunk, loss, gradients
    print(name, {case: (round(peaks[case]), round(times[case], 1), f"{apart[case]:.1e}") for case in OPTIONS})
    for case in OPTIONS:
        assert losses[case] == losses["nothing recomputed"]
        assert apart[case] <= 1e-2
    assert peaks["offloaded"] < peaks["recomputed"] < peaks["attention kept"] < peaks["nothing recomputed"]
    assert peaks["attention kept, offloaded"] < peaks["attention kept"]
    assert LENGTH * shape.hidden_size * 2 > recompute.MIN_BYTES
