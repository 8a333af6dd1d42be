"""What imports what: only downwards, nothing heavy before a stage runs, and torch left as it was."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = ("cli", "config", "artifact", "errors", "data_prep", "launch", "stages", "planning", "status")
"""Parts that answer before torch is there: the command line, its errors, `--dry-run`, data preparation."""

OPTIONAL = ("lm_eval",)
"""what a module of ours may need that not every environment has"""
HEAVY = ("torch", "transformers", "megatron.core", "nemo_run")


def _modules(*parts: str) -> list[str]:
    """Every module of ours in these parts of the package."""
    package = ROOT / "megatron_prism"
    files = [file for part in parts for file in ([package / f"{part}.py"] if (package / f"{part}.py").exists() else (package / part).rglob("*.py"))]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return sorted(name for name in names if not name.endswith("__main__"))


def _python(code: str, timeout: float = 120) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_light_parts_import_nothing_heavy() -> None:
    modules = [*_modules(*LIGHT), "megatron_prism.kernels"]
    assert {"megatron_prism.cli", "megatron_prism.data_prep.sampler", "megatron_prism.launch.job", "megatron_prism.stages.train"} <= set(modules)
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    found = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    if found:
        print(name, "imports", *found)
        break
"""
    assert _python(code) == ""


def test_importing_every_module_leaves_torch_as_it_was() -> None:
    """The CPU layer is installed by a stage's entry point, never by an import."""
    parts = sorted(
        {path.stem for path in (ROOT / "megatron_prism").iterdir() if path.name not in ("__pycache__", "__main__.py", "py.typed")} - {"__init__"}
    )
    code = f"""
import importlib, torch, torch.cuda, torch.nn, torch.optim
import torch._dynamo  # wraps torch.manual_seed itself when it is first imported
places = {{"torch": torch, "torch.cuda": torch.cuda, "torch.cuda.random": torch.cuda.random, "torch.Tensor": torch.Tensor,
           "torch.nn.Module": torch.nn.Module, "torch.optim.Optimizer": torch.optim.Optimizer}}
before = {{place: dict(vars(owner)) for place, owner in places.items()}}
for name in {_modules(*parts)!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in {OPTIONAL!r}:
            raise
for place, owner in places.items():
    now = vars(owner)
    for key, value in before[place].items():
        if callable(value) and now.get(key) is not value:
            print(place, key)
"""
    assert _python(code, timeout=240) == ""


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([linter, "--no-cache", "--no-logo"], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_rules_of_import_direction_hold_and_can_fail(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    kept = _lint(ROOT)
    assert kept.returncode == 0, kept.stdout

    for part in ("megatron_prism", "kernels", "data_prep", "launch", "pyproject.toml"):
        copy = shutil.copy if part.endswith(".toml") else shutil.copytree
        copy(ROOT / part, tmp_path / part, **({} if part.endswith(".toml") else {"symlinks": True}))  # type: ignore[operator]
    planted = {
        "data_prep/planted.py": ("import megatron_prism.engine\n", "data_prep -> "),
        "megatron_prism/families/planted.py": ("from megatron_prism.launch import job\n", "families -> "),
        "megatron_prism/planning/planted.py": ("from megatron_prism.engine import device\n", "planning is not allowed to import"),
        "megatron_prism/generate/planted.py": ("from megatron.core import parallel_state\n", "generate is not allowed to import megatron"),
    }
    for place, (line, _) in planted.items():
        (tmp_path / place).write_text(line)
    broken = _lint(tmp_path)
    assert broken.returncode == 1
    for place in planted:
        module = "megatron_prism." + place.removeprefix("megatron_prism/").removesuffix(".py").replace("/", ".")
        assert f"{module} -> " in broken.stdout, f"{module} went unnoticed:\n{broken.stdout}"


def test_the_top_folders_are_links_and_kernels_imports_nothing() -> None:
    for name in ("kernels", "launch", "data_prep"):
        link = ROOT / "megatron_prism" / name
        assert link.is_symlink() and link.readlink() == Path(f"../{name}"), "relative, so that a clone works anywhere"
    lines = (ROOT / "kernels/__init__.py").read_text().splitlines()
    assert not [line for line in lines if line.startswith(("import ", "from "))]
