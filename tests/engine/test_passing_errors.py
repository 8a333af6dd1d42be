"""Errors that may be gone at the next start: status 1 and no last word for the launcher; after one on NCCL the process groups are left alone."""

import errno
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_prism import cli
from megatron_prism.engine import parallel
from megatron_prism.engine.saving import reporting
from megatron_prism.errors import ERROR_FILE, MachineError, UserError


@pytest.mark.parametrize(("number", "passes"), [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOSPC, False), (errno.EACCES, False)])
def test_a_write_that_failed_for_now_is_told_from_one_that_somebody_has_to_mend(tmp_path: Path, number: int, passes: bool) -> None:
    with pytest.raises(UserError, match="could not be written") as raised, reporting(tmp_path / "file"):
        raise OSError(number, "refused", str(tmp_path / "file"))
    assert isinstance(raised.value, MachineError) == passes


@pytest.mark.parametrize(("kind", "status", "final"), [(MachineError, 1, False), (UserError, 2, True)])
def test_only_an_error_for_people_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[UserError], status: int, final: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("the disk says no")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["prism", "doctor"])
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status and (tmp_path / "error").exists() == final


@pytest.mark.parametrize(("backend", "left"), [("nccl", True), ("gloo", False)])
def test_groups_are_left_alone_after_an_error_on_nccl(monkeypatch: pytest.MonkeyPatch, backend: str, left: bool) -> None:
    parallel.start(torch.device("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(dist, "get_backend", lambda: backend)
        with pytest.raises(ValueError, match="fault"), parallel.ending():
            raise ValueError("fault")
    assert dist.is_initialized() == left
    parallel.stop()
