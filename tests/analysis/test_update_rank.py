"""The rank of an update: a planted one is found, and the iteration for large matrices gives what a full decomposition gives."""

import subprocess
import sys

import pytest
import torch

from megatron_prism.analysis import rank


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_rank(count: int, rows: int, columns: int) -> torch.Tensor:
    """A matrix with `count` singular values, all of them 0.01."""
    left, right = (torch.linalg.qr(random(size, count, seed=size).double())[0] for size in (rows, columns))
    return (0.01 * left @ right.T).float()


def scaled(update: torch.Tensor) -> torch.Tensor:
    found = rank.scaled_change(torch.zeros_like(update), update)
    assert found is not None and float(found.abs().max()) == 1.0
    return found


@pytest.mark.parametrize("shape", [(40, 64), (300, 520), (520, 300)])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_a_planted_low_rank_update_has_its_rank(count, shape):
    update = scaled(of_rank(count, *shape))
    assert rank.stable_rank(update) == pytest.approx(count, rel=1e-4)
    assert rank.effective_rank(update) == pytest.approx(count, rel=1e-3)


def test_the_iteration_finds_the_largest_singular_value_of_any_spectrum():
    flat = random(400, 600)
    steep = (random(400, 400) * torch.logspace(0, -6, 400)) @ random(400, 600, seed=1)
    for matrix in (flat, steep, flat.T.contiguous()):
        assert rank.largest_singular_value(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix.double())[0]), rel=1e-4)


def test_updates_too_small_to_square_in_fp32_have_their_rank():
    assert rank.stable_rank(scaled(of_rank(3, 300, 400) * 1e-25)) == pytest.approx(3, rel=1e-4)


def test_no_update_and_no_matrix_have_no_rank():
    assert rank.scaled_change(random(8, 8), random(8, 8)) is None
    for shape in ((8,), (8, 1)):
        assert rank.scaled_change(torch.zeros(shape), torch.ones(shape)) is None
    assert rank.as_matrix(torch.zeros(8, 1, 4)).shape == (8, 4)


def test_an_update_is_scaled_by_its_largest_element_of_either_sign_and_the_weights_stay():
    old, new = random(rank.ROWS + 3, 5), random(rank.ROWS + 3, 5, seed=1)
    new[7, 2] = -40.0
    before, after = old.bfloat16(), new.clone()
    change = after - before.float()
    assert torch.equal(rank.scaled_change(before, after), change / change.abs().max())
    assert torch.equal(before, old.bfloat16()) and torch.equal(after, new)


TAKEN = """
import sys
from pathlib import Path
import torch
from megatron_prism.analysis import rank

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

dtype = getattr(torch, sys.argv[1])
old, new = torch.zeros(4096, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
rank.stable_rank(torch.randn(300, 300))  # what the libraries keep for themselves
start = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
assert abs(rank.stable_rank(rank.scaled_change(old, new)) - 1) < 1e-4
print(resident("VmHWM") - start)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_takes_one_fp32_update_of_memory(dtype: str) -> None:
    """In a process of its own: one that has worked before takes memory that it kept."""
    done = subprocess.run([sys.executable, "-c", TAKEN, dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.9 * 4096**2 * 4 < int(done.stdout) < 1.25 * 4096**2 * 4
