"""`prism doctor` tells a machine that can carry a run from one that cannot: each trial turns red when what it tries is broken."""

import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from prism_command import prism

from megatron_prism import doctor
from megatron_prism.doctor import CHECKS, Asked, Finding, checks, compute, folder, worker


def states(found: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in found}


def test_every_check_has_a_function_and_a_limit() -> None:
    assert worker.FUNCTIONS.keys() == CHECKS.keys()


# --- the command -------------------------------------------------------------------------------------------------------------------------------


def test_the_command_reports_in_json_leaves_nothing_behind_and_ends_with_0(tmp_path: Path) -> None:
    done = prism("doctor", "--path", tmp_path, "--json", *(word for name in ("software", "disk", "folder", "limits") for word in ("--only", name)))
    report = json.loads(done.stdout)
    assert [one["check"] for one in report["checks"]] == ["software", "disk", "folder", "limits"]
    names = {finding["name"] for one in report["checks"] for finding in one["findings"]}
    assert names >= {"python", "torch", "megatron-core", "disk", "atomic rename", "fsync", "mapped files", "file locks", "open files", "free space"}
    assert (done.returncode, report["ok"]) == (0, True), done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_red_finding_ends_with_1_and_shows_its_fix() -> None:
    done = prism("doctor", "--only", "vllm", env={"PRISM_VLLM_PYTHON": "/nowhere/python"})
    assert done.returncode == 1
    assert "red     vllm" in done.stdout and "/nowhere/python" in done.stdout and "fix: unset PRISM_VLLM_PYTHON" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "dsk"], "did you mean disk"),
        (["--ranks", "1"], "needs 2 ranks"),
        (["--device", "tpu"], "auto, cpu or cuda"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_2(words: list[str], said: str) -> None:
    done = prism("doctor", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_the_engine_trains_and_ranks_sum_on_this_machine(tmp_path: Path) -> None:
    done = prism("doctor", "--path", tmp_path, "--device", "cpu", "--json", "--only", "ranks", "--only", "step", timeout=280)
    found = {finding["name"]: finding for one in json.loads(done.stdout)["checks"] for finding in one["findings"]}
    assert done.returncode == 0, done.stdout
    assert found.keys() == {"all-reduce of 2 ranks", "clocks of the ranks", "training step"}
    assert "gloo" in found["all-reduce of 2 ranks"]["detail"]


def test_a_folder_that_is_not_there_is_red_in_every_check_that_needs_it(tmp_path: Path) -> None:
    asked = Asked(str(tmp_path / "nowhere"))
    found = states([*folder.disk(asked), *folder.semantics(asked), *checks.limits(asked)])
    assert [found[name] for name in ("disk", "folder", "free space")] == ["red", "red", "red"]


# --- nothing hangs -----------------------------------------------------------------------------------------------------------------------------


def replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Run `code` in place of Python, as a check's process."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(program))


def test_a_check_that_hangs_is_ended_with_its_children_and_is_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"import subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\nopen({str(child)!r}, 'w').write(str(child.pid))\ntime.sleep(600)"
    replaced(monkeypatch, tmp_path, code)
    start = time.monotonic()
    found = doctor.run_check("disk", Asked(str(tmp_path)), 3).findings
    assert time.monotonic() - start < 15
    assert found[0].state == "red" and "not done after 3 seconds" in found[0].detail
    time.sleep(0.2)
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize("code", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "raise RuntimeError('broken')", "print('no json')"])
def test_a_check_that_dies_or_says_nonsense_is_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    replaced(monkeypatch, tmp_path, code)
    assert [finding.state for finding in doctor.run_check("disk", Asked(str(tmp_path)), 30).findings] == ["red"]


# --- software ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "state"), [("0.16.0", "red"), ("0.16.1", "green"), ("0.19.2", "green"), ("0.20.0", "red")])
def test_megatron_core_outside_of_its_range_is_red_with_the_install_command(version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = metadata.version
    monkeypatch.setattr(checks.metadata, "version", lambda name: version if name == "megatron-core" else original(name))
    found = next(finding for finding in checks.software(Asked(".")) if finding.name == "megatron-core")
    assert found.state == state
    assert ("pip install 'megatron-core" in found.fix) == (state == "red")


def test_a_package_that_is_missing_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    original = metadata.version

    def version(name: str) -> str:
        if name == "psutil":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(checks.metadata, "version", version)
    assert states(checks.software(Asked(".")))["psutil"] == "red"


def test_missing_gpu_packages_are_yellow_beside_a_gpu_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\n")

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.metadata, "version", version)
    assert set(states(checks.gpu_packages(Asked("."))).values()) == {"green"}
    monkeypatch.setattr(checks, "DRIVER", driver)
    assert checks._driver() == "580.95.05"
    assert states(checks.gpu_packages(Asked(".")))["transformer-engine"] == "yellow"


def test_cuda_that_was_asked_for_and_is_not_there_is_red() -> None:
    assert checks._without_gpu(Asked(".", device="cuda"), None, None).state == "red"
    assert checks._without_gpu(Asked("."), "580.95", None).state == "yellow"
    assert checks._without_gpu(Asked("."), None, None).state == "green"


def test_few_open_files_are_yellow_then_red() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = {}
    try:
        for limit in (128, 512):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            found[limit] = checks._open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found[128].state, found[512].state) == ("red", "yellow")
    assert found[128].fix.startswith("ulimit -n")


# --- the folder --------------------------------------------------------------------------------------------------------------------------------


def test_a_rename_that_is_not_atomic_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def copy(self: Path, target: Path) -> None:
        target.write_bytes(b"")
        time.sleep(0.01)
        target.write_bytes(self.read_bytes())

    assert folder._renames(tmp_path) is None
    monkeypatch.setattr(Path, "replace", copy)
    assert "a part of a file" in str(folder._renames(tmp_path))


def test_locks_that_do_not_exclude_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder._locks(tmp_path) is None
    monkeypatch.setattr(folder.fcntl, "flock", lambda file, operation: None)
    assert "another process took a lock" in str(folder._locks(tmp_path))


def test_a_map_that_others_do_not_see_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder._maps(tmp_path) is None
    original = folder.mmap.mmap
    monkeypatch.setattr(folder.mmap, "mmap", lambda descriptor, size: original(descriptor, size, access=folder.mmap.ACCESS_COPY))
    assert "does not see" in str(folder._maps(tmp_path))


def test_a_folder_whose_clock_is_off_is_yellow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder._clock(tmp_path).state == "green"
    now = time.time()
    monkeypatch.setattr(folder.time, "time", lambda: now + 90)
    assert folder._clock(tmp_path).state == "yellow"


def test_a_disk_that_refuses_writes_is_red_and_a_slow_one_yellow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "WRITTEN_BYTES", 1 << 20)
    monkeypatch.setattr(folder, "SLOW_MB_PER_SECOND", 1e9)
    assert folder.disk(Asked(str(tmp_path)))[0].state == "yellow"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = folder.disk(Asked(str(tmp_path)))[0]
    assert found.state == "red" and "No space left" in found.detail
    assert list(tmp_path.iterdir()) == []


# --- ranks and the step ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "state"), [([4.57, 4.55], "green"), ([4.57, float("nan")], "red"), ([float("inf"), 4.0], "red"), ([4.57], "red"), ([9.0, 8.0], "red")]
)
def test_losses_are_judged(losses: list[float], state: str) -> None:
    assert compute.judged(losses, 1.0).state == state


def test_an_all_reduce_whose_rank_dies_is_red_and_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'the link is down' >&2\nexit $6\n")  # the sixth word is the rank: 0 does well, 1 fails
    program.chmod(0o755)
    monkeypatch.setattr(compute.sys, "executable", str(program))
    found = compute.ranks(Asked("."))
    assert found[0].state == "red" and "rank 1 ended with status 1: the link is down" in found[0].detail


def test_ranks_that_wait_for_ever_are_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 4\n")
    program.chmod(0o755)
    monkeypatch.setattr(compute.sys, "executable", str(program))
    monkeypatch.setattr(compute, "RANK_SECONDS", 0.5)
    found = compute.ranks(Asked("."))
    assert found[0].state == "red" and "rank 0 was not done after 0.5 seconds" in found[0].detail
