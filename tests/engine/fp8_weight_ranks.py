"""Started on two ranks by test_fp8_params: FP8 of masters that are cut over them. fp8_weight_ranks.py FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prism.engine import device, parallel
from megatron_prism.engine.fp8_params import Owned, quantise

CUTS = (0, 1, 700, 1400, 1399)
"""of five weights of 1,400 values each: how many of the first the first rank has"""


def main() -> None:
    """Each rank writes what it made of its ranges, and the inverse scales of all weights."""
    parallel.start(device.setup("cpu"))
    rank = dist.get_rank()
    whole = torch.load(Path(sys.argv[1]) / "whole.pt")
    data, inverses = torch.zeros(whole.shape, dtype=torch.uint8), [torch.zeros(1) for _ in whole]
    ranges = [slice(0, cut) if rank == 0 else slice(cut, None) for cut in CUTS]
    owned = [Owned(index, whole[index, part].clone(), data[index, part]) for index, part in enumerate(ranges) if whole[index, part].numel()]
    quantise(owned, inverses, dist.group.WORLD)
    torch.save((data, torch.cat(inverses)), Path(sys.argv[1]) / f"{rank}.pt")
    parallel.stop()


if __name__ == "__main__":
    main()
