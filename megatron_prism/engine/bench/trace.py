"""One step under torch's profiler: communication and what of it nothing hides, idle time of the device, and where the host waits for it.

From a Chrome trace: kernels with their times and streams, runtime calls and operators with their threads. The figures are those of one profiled step
of rank 0; profiling slows the host, so idle time is an upper bound.
"""

import gzip
import json
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

STEP = "prism bench step"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
RUNTIME = {"cuda_runtime", "cuda_driver"}
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize",
         "cuEventSynchronize"}  # fmt: skip
TOP = 12
STEPS = {"cuda": 3, "cpu": 2}
"""that `profile` takes: the other ranks take as many"""

Interval = tuple[float, float]


def profile(step: Callable[[], None], device: torch.device, keep: Path | None) -> dict[str, Any]:
    """Take `STEPS`, profile the second. keep: a .json.gz file to write the Chrome trace to. On a CPU nothing but that file is made of it."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
        with torch.profiler.profile(activities=kinds, schedule=schedule, acc_events=False) as profiler:
            step()
            _wait(on_gpu)
            profiler.step()
            with torch.profiler.record_function(STEP):
                step()
            _wait(on_gpu)
        profiler.export_chrome_trace(str(path))
        return {**summarize(read(path)), "waiting_lines": waiting_lines(step)} if on_gpu else {}


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def summarize(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the step that is marked in a trace."""
    whole = [event for event in events if event.get("ph") == "X"]
    begin, end = _span(next(event for event in whole if event["name"] == STEP and event.get("cat") == "user_annotation"))
    device = [event for event in whole if event.get("cat") in ON_DEVICE and event["ts"] >= begin]
    communication = [_span(event) for event in device if is_communication(event["name"])]
    compute = [_span(event) for event in device if not is_communication(event["name"])]
    everything = union([*communication, *compute])
    spanned = everything[-1][1] - everything[0][0] if everything else 0.0
    return {
        "communication_ms": length(union(communication)) / 1e3,
        "exposed_communication_ms": (length(everything) - length(union(compute))) / 1e3,
        "device_busy_ms": length(everything) / 1e3,
        "device_idle_ms": (spanned - length(everything)) / 1e3,
        "kernels": len(device),
        "top_kernels": top_kernels(device),
        "host_synchronisations": synchronisations(event for event in whole if begin <= event["ts"] <= end),
    }


def is_communication(name: str) -> bool:
    """Whether a kernel exchanges data between ranks."""
    return name.lower().startswith("nccl")


def top_kernels(device: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels that took longest, all calls of a name together."""
    total: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in device:
        total[event["name"]] += event["dur"] / 1e3
        calls[event["name"]] += 1
    return [{"name": name, "ms": total[name], "calls": calls[name]} for name in sorted(total, key=lambda name: -total[name])[:TOP]]


def synchronisations(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How often the host waited for the device: by call, and by the operators around each wait, outermost first."""
    waits, operators = [], defaultdict(list)
    for event in events:
        if event.get("cat") in RUNTIME and event["name"] in WAITS:
            waits.append(event)
        elif event.get("cat") == "cpu_op":
            operators[event["tid"]].append(event)
    around = Counter(" > ".join(_around(wait, operators[wait["tid"]])) or "outside of any operator" for wait in waits)
    return {"count": len(waits), "calls": dict(Counter(wait["name"] for wait in waits)), "operators": dict(around.most_common(TOP))}


def _around(wait: dict[str, Any], operators: Sequence[dict[str, Any]]) -> list[str]:
    begin, end = _span(wait)
    found = [operator for operator in operators if operator["ts"] <= begin and operator["ts"] + operator["dur"] >= end]
    return [operator["name"] for operator in sorted(found, key=lambda operator: operator["ts"])]


def waiting_lines(step: Callable[[], None]) -> dict[str, int]:
    """The Python lines that torch sees waiting for the device in one more step (waits of other libraries are not among them)."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    lines = Counter(f"{short(warning.filename)}:{warning.lineno}" for warning in said if "synchronizing" in str(warning.message))
    return dict(lines.most_common(TOP))


def short(filename: str) -> str:
    """A file's path from its package on."""
    parts = Path(filename).parts
    start = max((place for place, part in enumerate(parts) if part in ("site-packages", "dist-packages", "site")), default=len(parts) - 4)
    return "/".join(parts[max(start + 1, 0) :])


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals merged where they overlap, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def length(merged: Iterable[Interval]) -> float:
    """Of merged intervals together."""
    return sum(end - begin for begin, end in merged)


def _span(event: dict[str, Any]) -> Interval:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])
