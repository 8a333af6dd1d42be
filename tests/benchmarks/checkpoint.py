"""What a checkpoint costs a run: the stall of a save, in order and in the background, and a restore, beside the disk's own rate.

    python tests/benchmarks/checkpoint.py [--parameters 0.3e9] [--ranks 2] [--rounds 3] [--folder DIR] [--waiting-only] [--device cuda] [--json FILE]

bf16 weights and fp32 optimizer state, 14 bytes a weight. Each round measures, one after the other, in DIR: the disk (the same bytes, written by as
many processes with fsync at the end, and read back after the page cache was dropped for them), a save that the run waits for, a save in the
background (how long the run stands still, and when it is complete), the comparison with the checksums, and a load. Other work on the machine
changes the figures from round to round: compare within a round, and seconds of a core (of all ranks together). Printed are
medians, and every round. --waiting-only leaves the background out, whose copy takes 14 bytes a weight more of memory. One checkpoint lies on the
disk at a time. --device cuda: a GPU for each rank; --json: medians and rounds as a file.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from own_memory import Peak

BLOCK_BYTES = 1 << 24
NAMES = ("write", "read", "sync", "stall", "background", "check", "load")
BESIDE = {"sync": "write", "stall": "write", "background": "write", "check": "read", "load": "read"}
"""what each is compared with"""


def main() -> None:
    """Start the ranks, print what they measured."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parameters", type=float, default=0.3e9)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--json", type=Path, help="a file for the figures")
    arguments.add_argument("--waiting-only", action="store_true", help="no save in the background")
    options = arguments.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    from multirank import run_ranks

    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        words = [f"--parameters={options.parameters}", f"--rounds={options.rounds}", f"--folder={folder}", f"--device={options.device}"]
        words += ["--waiting-only"] if options.waiting_only else []
        run_ranks(Path(__file__), options.ranks, *words, timeout=3000)
        found = json.loads((Path(folder) / "found.json").read_text())
    show(found, options.ranks)
    if options.json is not None:
        options.json.write_text(json.dumps({**found, "ranks": options.ranks, "gb_per_second": rates(found)}, indent=1))


def rates(found: dict) -> dict[str, float]:
    """Gigabytes a second, of the medians."""
    names = [name for name in NAMES if name in found["rounds"][0]]
    return {name: found["bytes"] / 1e9 / statistics.median(line[name] for line in found["rounds"]) for name in names}


def show(found: dict, ranks: int) -> None:
    """A table of medians, and all rounds."""
    size = found["bytes"]
    print(f"{found['parameters']:,} parameters, {size / 2**30:.2f} GiB a checkpoint, {ranks} ranks, {os.cpu_count()} cores; torch {found['torch']}")
    names = [name for name in NAMES if name in found["rounds"][0]]
    for name in names:
        seconds = [line[name] for line in found["rounds"]]
        middle = statistics.median(seconds)
        cores = [line[f"{name} core"] for line in found["rounds"] if f"{name} core" in line]
        used = f"  {statistics.median(cores):6.2f} s of a core" if cores else " " * 18
        used += f"  +{max(line.get(f'{name} memory', 0.0) for line in found['rounds']):.2f} GiB in rank 0"
        print(f"{name:<11} {middle:7.2f} s  {size / middle / 1e9:6.2f} GB/s{used}   rounds: {'  '.join(f'{value:.2f}' for value in seconds)}")
    for name in (name for name in names if name not in BESIDE.values()):
        beside = BESIDE[name]
        ratios = [line[name] / line[beside] for line in found["rounds"]]
        print(f"{name} / {beside} of the disk: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if "stall" in names:
        print("steps beside a save in the background / alone:", "  ".join(f"{line['slower']:.2f}" for line in found["rounds"]))


def measure(options: argparse.Namespace) -> None:
    """On every rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    engine, parameters, hf = build(options.parameters, options.folder, options.device)
    from megatron_prism.config import OptimizerConfig
    from megatron_prism.engine import checkpoint, integrity
    from megatron_prism.engine.checkpoint import Progress
    from megatron_prism.engine.saving import Background

    run, background, rounds = options.folder / "run", Background(), []
    config = OptimizerConfig(lr=1e-3)

    line: dict[str, float] = {}

    def timed(name: str, work) -> None:
        dist.barrier()
        begun, busy = time.perf_counter(), time.process_time()
        with Peak() as peak:
            work()
        line[f"{name} memory"] = peak.mib / 1024
        used = torch.tensor(time.process_time() - busy, device=engine.device)
        dist.barrier()
        line[name] = time.perf_counter() - begun
        dist.all_reduce(used)
        line[f"{name} core"] = float(used)

    def save(step: int, **how) -> None:
        checkpoint.save(engine, run, Progress(step=step), hf, config, [], **how)

    folder = run / "checkpoints"
    made = folder / ("step_00000002" if options.waiting_only else "step_00000003")

    def save_in_background() -> None:
        shutil.rmtree(folder / "step_00000002", ignore_errors=True) if dist.get_rank() == 0 else None
        alone = work_rate()
        begun = time.perf_counter()
        timed("stall", lambda: save(3, background=background))
        beside = work_rate()
        busy = background.is_busy
        background.wait()
        dist.barrier()
        line["background"], line["slower"] = time.perf_counter() - begun, alone / beside if busy else float("nan")

    save(1, background=None if options.waiting_only else background)  # makes the buffer, and tells the size
    background.wait()
    share = sum(path.stat().st_size for path in folder.rglob(f"__{dist.get_rank()}_*"))
    dist.barrier()
    shutil.rmtree(folder / "step_00000001") if dist.get_rank() == 0 else None
    for _ in range(options.rounds):
        line.clear()
        disk(options.folder / f"disk.{dist.get_rank()}", share, timed)
        timed("sync", lambda: save(2))
        if not options.waiting_only:
            save_in_background()
        drop_cache(made)
        timed("check", lambda: integrity.require_whole(made))
        drop_cache(made)
        timed("load", lambda: checkpoint.load_all(engine, made, checked=True))
        dist.barrier()
        shutil.rmtree(made, ignore_errors=True) if dist.get_rank() == 0 else None
        rounds.append(dict(line))
    total = torch.tensor(share, device=engine.device)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        found = {"parameters": parameters, "bytes": int(total), "torch": torch.__version__, "rounds": rounds}
        (options.folder / "found.json").write_text(json.dumps(found))
    dist.barrier()


def build(count: float, folder: Path, kind: str):
    """An engine of about so many parameters, whose optimizer has state; the number; a folder with its config."""
    import torch.distributed as dist

    from megatron_prism.config import OptimizerConfig, ParallelConfig
    from megatron_prism.engine import device, parallel
    from megatron_prism.engine.model import BuildOptions, build
    from megatron_prism.engine.optimizer import build_optimizer, wrap_model
    from megatron_prism.engine.step import Engine
    from megatron_prism.families.model_config import ModelConfig
    from megatron_prism.planning import cost
    from megatron_prism.planning.layout import make_plan

    hidden = 256 if count < 3e7 else 1024 if count < 0.6e9 else 2048
    layers = max(1, round((count - 32000 * hidden) / (12 * hidden**2)))
    model = ModelConfig(
        family="llama", num_layers=layers, hidden_size=hidden, ffn_hidden_size=8 * hidden // 3, num_attention_heads=16, num_query_groups=16,
        kv_channels=hidden // 16, vocab_size=32000, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    place = device.setup(kind)
    parallel.start(place)
    mesh = parallel.build_mesh(make_plan(model, ParallelConfig(), dist.get_world_size(), 64, dist.get_world_size(), 1), seed=1)
    config = OptimizerConfig(lr=1e-3, gradients="bf16")  # no part of a checkpoint: room for a larger model
    wrapped = wrap_model(build(model, mesh, BuildOptions(precision="bf16"), place), mesh, config, overlap=False)
    engine = Engine(wrapped, build_optimizer(wrapped, config, mesh, bf16=True), mesh, place)
    engine.optimizer.initialize()
    hf = folder / "hf"
    if mesh.rank == 0:
        hf.mkdir()
        (hf / "config.json").write_text("{}")
    dist.barrier()
    return engine, cost.num_parameters(model), hf


def disk(path: Path, count: int, timed) -> None:
    """Time to write so many bytes beside the other ranks, and to read them again from the disk."""
    block = os.urandom(BLOCK_BYTES)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(count // BLOCK_BYTES):
                file.write(block)
            os.fsync(file.fileno())

    def read() -> None:
        buffer = bytearray(BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    timed("write", write)
    drop_cache(path)
    timed("read", read)
    path.unlink()


def drop_cache(path: Path) -> None:
    """Have files read from the disk, not from memory, where the system does as it is asked."""
    import torch.distributed as dist

    dist.barrier()
    for file in [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    dist.barrier()


def work_rate(seconds: float = 1.0) -> float:
    """Matrix products a second: stands for a step's work."""
    import torch

    a, count, begun = torch.randn(384, 384), 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        torch.mm(a, a)
        count += 1
    return count / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
