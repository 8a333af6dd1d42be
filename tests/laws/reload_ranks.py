"""Started on N ranks by the round-trip law: for each layout, load an imported checkpoint into real megatron-core models and save it again.

    reload_ranks.py CHECKPOINT OUT 'TPxPP[xVPP] TPxPP ...'     writes OUT/TPxPP/sharded

The layouts run in one launch; model parallelism is initialised anew for each.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prism import families
from megatron_prism.config import ParallelConfig
from megatron_prism.engine import device, mcore, parallel, saving
from megatron_prism.engine.model import BuildOptions, build
from megatron_prism.engine.sharded import Reader
from megatron_prism.planning.layout import make_plan


def reload(checkpoint: Path, output: Path, layout: str, place: torch.device) -> None:
    """Load and save at one layout, in the checkpoint's own precision."""
    _, model = families.load(checkpoint / "hf")
    tp, pp, vpp = (*map(int, layout.split("x")), None, None)[:3]
    stored = Reader(checkpoint / "sharded").dtype("embedding.word_embeddings.weight")
    world = dist.get_world_size()
    config = ParallelConfig(tp=tp, pp=pp, vpp=vpp, sp=tp > 1)
    plan = make_plan(model, config, world, seq_len=8, global_batch=world // (tp * pp) * pp, micro_batch=1)
    precision = "bf16" if stored == torch.bfloat16 else "fp32"
    chunks = build(model, parallel.build_mesh(plan, seed=7), BuildOptions(precision=precision, layers="local"), place)
    states = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
    loaded = mcore.load_sharded(states, checkpoint / "sharded")
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    if dist.get_rank() == 0:
        output.mkdir(parents=True)
    dist.barrier()
    saving.save_sharded({f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}, output)


def main() -> None:
    """Every layout in turn."""
    checkpoint, output, layouts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
    place = device.setup("cpu")
    parallel.start(place)
    for layout in layouts:
        reload(checkpoint, output / layout / "sharded", layout, place)
    parallel.stop()


if __name__ == "__main__":
    main()
