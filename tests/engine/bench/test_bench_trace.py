"""The figures of a profiled step, from traces whose answers are known."""

from typing import Any

import pytest

from megatron_prism.engine.bench import trace


def event(name: str, category: str, begin: float, duration: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": duration, "tid": thread}


STEP = event(trace.STEP, "user_annotation", 1000, 1000)


def test_communication_is_exposed_where_no_kernel_runs_beside_it():
    """Microseconds: compute 1100 to 1300 and 1250 to 1400, NCCL 1350 to 1600; 200 of its 250 stand alone; nothing runs from 1600 to 1700."""
    found = trace.summarize([
        STEP,
        event("gemm", "kernel", 1100, 200),
        event("gemm", "kernel", 1250, 150, thread=7),
        event("ncclDevKernel_AllGather", "kernel", 1350, 250, thread=9),
        event("Memcpy HtoD", "gpu_memcpy", 1700, 300),
        event("gemm", "kernel", 0, 900),  # of the step before
    ])  # fmt: skip
    assert found["communication_ms"] == pytest.approx(0.25)
    assert found["exposed_communication_ms"] == pytest.approx(0.2)
    assert found["device_busy_ms"] == pytest.approx(0.8)
    assert found["device_idle_ms"] == pytest.approx(0.1)
    assert found["kernels"] == 4
    assert found["top_kernels"][0] == {"name": "gemm", "ms": pytest.approx(0.35), "calls": 2}


def test_waits_of_the_host_are_counted_once_with_the_operators_around_them():
    """`.item()` is a copy and a wait; asynchronous copies, waits of another thread's operators and waits outside of the step do not count to it."""
    found = trace.summarize([
        STEP,
        event("aten::item", "cpu_op", 1100, 50),
        event("aten::_local_scalar_dense", "cpu_op", 1105, 40),
        event("cudaMemcpyAsync", "cuda_runtime", 1110, 5),
        event("cudaStreamSynchronize", "cuda_runtime", 1120, 10),
        event("aten::mm", "cpu_op", 1150, 100, thread=2),
        event("cudaDeviceSynchronize", "cuda_runtime", 1160, 10),
        event("cudaMemcpy", "cuda_runtime", 1170, 10, thread=2),
        event("cudaDeviceSynchronize", "cuda_runtime", 2500, 10),
    ])["host_synchronisations"]  # fmt: skip
    assert found["count"] == 3
    assert found["calls"] == {"cudaStreamSynchronize": 1, "cudaDeviceSynchronize": 1, "cudaMemcpy": 1}
    assert found["operators"] == {"aten::item > aten::_local_scalar_dense": 1, "outside of any operator": 1, "aten::mm": 1}


def test_intervals_merge_where_they_touch_or_overlap():
    assert trace.union([(5, 7), (0, 2), (1, 3), (3, 4), (5, 6)]) == [(0, 4), (5, 7)]
    assert trace.length([(0, 4), (5, 7)]) == 6
    assert trace.union([]) == []


def test_files_are_named_from_their_package_on():
    assert trace.short("/env/lib/python3.11/site-packages/megatron/core/optimizer/clip_grads.py") == "megatron/core/optimizer/clip_grads.py"
    assert trace.short("/home/me/megatron_prism/engine/step.py") == "megatron_prism/engine/step.py"
