"""The three ways to have the package - an editable install, a wheel, a clone on PYTHONPATH - give one program, its linked folders included.

In each of them the PyPI package `kernels`, which transformers imports, is never shadowed by our folder of that name. A stand-in plays that package.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("megatron_prism", "kernels", "data_prep", "launch", "pyproject.toml", "README.md", "LICENSE")

PROBE = """
from pathlib import Path
from megatron_prism.config import Block

class Config(Block):
    output: Path

def parents(cfg): return []
def dry_run(cfg): pass

def run(cfg):
    import importlib, kernels
    for name in ("megatron_prism.kernels", "megatron_prism.data_prep.sampler", "megatron_prism.launch.job"):
        print(importlib.import_module(name).__file__)
    print("kernels is", kernels.__doc__)
"""


def _run(*command: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240) -> str:
    """Run a command outside the influence of this environment's PYTHONPATH; its standard output."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**base, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as a clone has it, links kept, without what builds leave behind."""
    folder = tmp_path_factory.mktemp("clone")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh virtual environment that sees our dependencies, has a package `kernels`, and lacks megatron-prism."""
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    interpreter = tmp_path / "venv/bin/python"
    site = Path(_run(interpreter, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    # A path line alone: the .pth files over there, our own editable install among them, are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text('"""the package from PyPI"""\n')
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/__init__.py").touch()
    (tmp_path / "probe/stage.py").write_text(PROBE)
    return interpreter


def _install(python: Path, *what: object) -> None:
    _run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", *what, cwd=python.parent
    )


def _probe(python: Path, cwd: Path, tmp_path: Path, path: str = "", safe: str = "1") -> list[str]:
    """What a stage of one's own finds when the `prism` module is started in `cwd`."""
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(tmp_path)])), "PYTHONSAFEPATH": safe}
    return _run(python, "-m", "megatron_prism", "stage", "probe.stage", "output=x", cwd=cwd, env=env).splitlines()


def _assert_ours_and_theirs(lines: list[str], home: Path) -> None:
    assert all(Path(line).resolve().is_relative_to(home.resolve()) for line in lines[:3]), lines
    assert lines[3] == "kernels is the package from PyPI"


def test_an_editable_install_has_the_linked_folders(clone: Path, python: Path, tmp_path: Path) -> None:
    _install(python, "-e", clone)
    _assert_ours_and_theirs(_probe(python, tmp_path, tmp_path), clone)
    _assert_ours_and_theirs(_probe(python, clone, tmp_path), clone)
    assert _run(python.with_name("prism"), "version", cwd=tmp_path).strip()


def test_a_wheel_has_the_linked_folders_under_our_name_alone(clone: Path, python: Path, tmp_path: Path) -> None:
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path / "dist", clone, cwd=tmp_path)
    [wheel] = (tmp_path / "dist").glob("megatron_prism-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"megatron_prism", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    ours = {str(path.relative_to(clone)) for part in ("kernels", "data_prep", "launch") for path in (clone / part).rglob("*.py")}
    assert {f"megatron_prism/{name}" for name in ours} <= names
    assert "megatron_prism/families/published/llama-3.1-8b.json" in names
    assert "megatron_prism/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)

    _install(python, wheel)
    _assert_ours_and_theirs(_probe(python, tmp_path, tmp_path), python.parents[1])
    assert _run(python.with_name("prism"), "version", cwd=tmp_path).strip()


@pytest.mark.parametrize("safe", ["1", ""])
def test_a_clone_on_the_path_needs_no_install(clone: Path, python: Path, tmp_path: Path, safe: str) -> None:
    _assert_ours_and_theirs(_probe(python, tmp_path, tmp_path, path=str(clone), safe=safe), clone)
    _assert_ours_and_theirs(_probe(python, clone, tmp_path, path=str(clone), safe=safe), clone)


def test_started_from_the_root_the_way_our_launchers_do_kernels_is_the_package_from_pypi(clone: Path, python: Path, tmp_path: Path) -> None:
    from megatron_prism.launch.job import Job, environment

    variables = {key: value for key, value in environment(Job("train"), base={}).items() if key.startswith("PYTHON")}
    assert variables == {"PYTHONSAFEPATH": "1"}
    script = "import sys, kernels; print(kernels.__doc__)"
    assert _run(python, "-c", script, cwd=clone, env=variables).strip() == "the package from PyPI"
    assert _run(python, "-c", script, cwd=clone).strip() != "the package from PyPI", "without it our folder would win: the reason for the variable"
