"""The cutting of flat ranges into boxes, against a brute-force cover."""

import math
import random

import torch

from megatron_prism.engine.optimizer_state import boxes


def test_boxes_cover_a_flat_range_exactly_once_in_order():
    draw = random.Random(3)
    for _ in range(400):
        shape = [draw.randint(1, 6) for _ in range(draw.randint(1, 4))]
        start, stop = sorted(draw.randint(0, math.prod(shape)) for _ in range(2))
        flat = torch.arange(math.prod(shape)).view(shape)
        found = [flat[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten() for offset, size in boxes(shape, start, stop)]
        covered = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
        assert covered.tolist() == list(range(start, stop)), (shape, start, stop)


def test_a_range_of_a_matrix_is_at_most_three_boxes():
    assert list(boxes((5, 10), 7, 43)) == [((0, 7), (1, 3)), ((1, 0), (3, 10)), ((4, 0), (1, 3))]
    assert list(boxes((5, 10), 10, 40)) == [((1, 0), (3, 10))]
    assert list(boxes((5, 10), 12, 17)) == [((1, 2), (1, 5))]
    assert list(boxes((5, 10), 20, 20)) == []
