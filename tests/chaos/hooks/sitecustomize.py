"""Faults that have to happen inside a rank. Every Python that starts with this folder on PYTHONPATH reads it; only ranks of a chaos run act on it.

CHAOS_FOLDER/fault.json says what happens to which rank: {"number", "kind", "rank", "step", "seed", ...}; it happens once, before that step is taken
(or saved), and FIRED_NUMBER beside it is made at that moment. CHAOS_FOLDER/skew.json gives one rank another clock from its start on.
The framework knows nothing of it: the loop's functions are wrapped when it is imported.
"""

import importlib.abc
import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

LIBFAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
LOOP = "megatron_prism.engine.loop"
SLOW_SECONDS, SLOW_STEPS = 0.25, 15
LEFT_BYTES = 150_000


class AfterImport(importlib.abc.MetaPathFinder):
    """Plants the faults when the training loop has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != LOOP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            plant(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def plant(loop: Any) -> None:
    """Look before every step and every save whether a fault is due."""
    step, save, check_room = loop._step, loop._save, loop.checkpoint.check_room

    def before_step(run: Any) -> Any:
        fault = due(run.progress.step + 1, ("flip", "nan", "hang", "slow"))
        if fault is not None:
            STEP_FAULTS[fault["kind"]](run, fault)
        return step(run)

    def before_save(run: Any) -> Any:
        fault = due(run.progress.step, ("flip before a save",))
        if fault is not None:
            flip(run, fault)
        return save(run)

    def after_check(plan: Any) -> Any:
        needed = check_room(plan)
        if due(int(plan.folder.parent.name.removeprefix("step_")), ("full",)) is not None:
            fill(plan.folder.parents[3])
        return needed

    loop._step, loop._save, loop.checkpoint.check_room = before_step, before_save, after_check


def due(step: int, kinds: tuple[str, ...]) -> dict[str, Any] | None:
    """The fault that happens to this rank now; it is marked as happened."""
    try:
        fault: dict[str, Any] = json.loads((FOLDER / "fault.json").read_text())
    except FileNotFoundError:
        return None
    fired = FOLDER / f"fired_{fault['number']}"
    if fault["kind"] not in kinds or fault["rank"] != RANK or step < fault["step"] or fired.exists():
        return None
    part = fired.with_suffix(".part")
    part.write_text(json.dumps({"step": step - 1, "monotonic": time.monotonic()}))
    part.rename(fired)
    return fault


def flip(run: Any, fault: dict[str, Any]) -> None:
    """One bit of this rank's weights, of any of them alike, or of the moments."""
    import torch

    draw = random.Random(fault["seed"])
    tensors = [weight.data for chunk in run.engine.model for weight in chunk.parameters()]
    if fault["of"] == "moments":
        tensors = [tensor for part in run.engine.optimizer.chained_optimizers for state in part.optimizer.state.values() for tensor in state.values()]
    place = draw.randrange(sum(tensor.numel() for tensor in tensors))
    for tensor in tensors:
        if place < tensor.numel():
            break
        place -= tensor.numel()
    width = 8 * tensor.element_size()
    numbers = tensor.view(-1).view({16: torch.int16, 32: torch.int32}[width])
    bit = fault["bit"] % width
    numbers[place] ^= 1 << bit if bit < width - 1 else -(1 << bit)


def nan(run: Any, fault: dict[str, Any]) -> None:
    """A gradient of this rank, in this step."""
    import torch

    weights = [weight for chunk in run.engine.model for weight in chunk.parameters()]
    weight = random.Random(fault["seed"]).choice(weights)

    def spoil(gradient: Any) -> Any:
        handle.remove()
        return gradient * torch.nan

    handle = weight.register_hook(spoil)


def hang(run: Any, fault: dict[str, Any]) -> None:
    """It never comes to the collective that the others wait in."""
    time.sleep(100_000)


def slow(run: Any, fault: dict[str, Any]) -> None:
    """Every forward pass, for some steps."""
    last = run.progress.step + SLOW_STEPS

    def wait(*_: Any) -> None:
        time.sleep(SLOW_SECONDS)
        if run.progress.step >= last:
            handle.remove()

    handle = run.engine.model[0].register_forward_pre_hook(wait)


def fill(disk: Path) -> None:
    """Somebody else writes until next to nothing is free."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(50_000))
        except OSError:
            file.truncate(max(0, file.tell() - LEFT_BYTES))


def skew(offset: str) -> None:
    """Start this process anew with a wall clock that is off: by libfaketime, which C++ and Python see alike."""
    if "FAKETIME" in os.environ or not LIBFAKETIME.exists():
        return
    ours = {"LD_PRELOAD": str(LIBFAKETIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **ours})


STEP_FAULTS = {"flip": flip, "nan": nan, "hang": hang, "slow": slow}
FOLDER, RANK = Path(os.environ.get("CHAOS_FOLDER", "")), int(os.environ.get("RANK", "-1"))
if os.environ.get("CHAOS_FOLDER") and RANK >= 0:
    if (FOLDER / "skew.json").exists():
        wanted = json.loads((FOLDER / "skew.json").read_text())
        if wanted["rank"] == RANK:
            skew(wanted["offset"])
    sys.meta_path.insert(0, AfterImport())
