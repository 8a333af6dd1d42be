"""Workers have the faster malloc where it is installed, another that was asked for stays first, and without it nothing is asked of the loader."""

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_prism.data_prep import allocator, processes

linux = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
needs_mimalloc = pytest.mark.skipif(allocator._mimalloc() is None, reason="cmeel-mimalloc is not installed")


def start(_):
    processes.begin()


def loaded_allocators():
    return "libmimalloc" in Path("/proc/self/maps").read_text()


@linux
@needs_mimalloc
def test_a_worker_has_mimalloc_and_its_parent_has_not(monkeypatch):
    monkeypatch.delenv(allocator.PRELOAD, raising=False)
    assert allocator.what_is_missing() is None
    with processes.pool(1, start, None) as pool:
        assert pool.submit(loaded_allocators).result(60)
    assert not loaded_allocators() and allocator.PRELOAD not in os.environ


@linux
@needs_mimalloc
def test_what_the_environment_preloads_already_comes_first(monkeypatch):
    monkeypatch.setenv(allocator.PRELOAD, "/elsewhere/libjemalloc.so.2")
    first, second = allocator.environment()[allocator.PRELOAD].split(":")
    assert (first, second) == ("/elsewhere/libjemalloc.so.2", allocator._mimalloc())


@linux
def test_without_the_package_the_c_library_s_own_malloc_works(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.delenv(allocator.PRELOAD, raising=False)
    assert allocator.environment() == {} and "pip install 'megatron-prism[fast-malloc]'" in (allocator.what_is_missing() or "")
    with processes.pool(1, start, None) as pool:
        assert not pool.submit(loaded_allocators).result(60)


def test_a_package_without_its_library_is_none(monkeypatch, tmp_path):
    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    assert allocator.environment() == {}


@linux
@pytest.mark.parametrize("name", ["my environment", "a:b"])
def test_a_path_that_the_loader_would_cut_is_not_given_to_it(monkeypatch, tmp_path, name):
    library = tmp_path / name / "libmimalloc.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(allocator, "_mimalloc", lambda: str(library))
    monkeypatch.delenv(allocator.PRELOAD, raising=False)
    assert allocator.environment() == {} and "a space or a colon" in (allocator.what_is_missing() or "")
