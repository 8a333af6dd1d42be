"""Convert: a Hugging Face model becomes a checkpoint (`import`), or a checkpoint becomes a Hugging Face model (`export`). One process, any layout.

prism convert import HF_DIR OUT [--tp 2 --pp 4 --dtype bfloat16 --like HF_DIR --verify]
prism convert export CHECKPOINT OUT [--dtype float32 --verify]
"""

import time
from pathlib import Path
from typing import Literal

from megatron_prism import artifact, families
from megatron_prism.config import Block, Positive
from megatron_prism.engine import run_folder
from megatron_prism.errors import UserError

HF_KIND, CHECKPOINT_KIND = "hf", "checkpoint"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Config(Block):
    """One conversion."""

    direction: Literal["import", "export"]
    """import: Hugging Face -> checkpoint; export: checkpoint -> Hugging Face"""
    source: Path
    """import: a Hugging Face folder, a .gguf file, or a Megatron-LM torch_dist checkpoint; export: a checkpoint folder, or a training run"""
    output: Path
    """folder to write"""
    tp: Positive = 1
    """import: chunks that each tensor is stored in; any tensor-parallel size can load them"""
    pp: Positive = 1
    """import: groups of files that the layers are spread over"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """type of the written weights; none: as in the source (export: as in the original Hugging Face model)"""
    like: Path | None = None
    """import: Hugging Face folder with config and tokenizer, where the source has none"""
    verify: bool = False
    """compare fp32 logits with transformers, and refuse the result when they differ"""


def parents(cfg: Config) -> list[Path]:
    """The finished artifacts that are read: an exported checkpoint, or an imported folder of our own making."""
    if cfg.direction == "export":
        return [run_folder.resolve(cfg.source)]
    return [cfg.source] if artifact.is_complete(cfg.source) else []


def run(cfg: Config) -> Path:
    """Convert, and check if asked to; returns the finished output folder."""
    check(cfg)
    from megatron_prism.engine import weights

    artifact.begin(cfg.output, CHECKPOINT_KIND if cfg.direction == "import" else HF_KIND, cfg, parents(cfg))
    started = time.perf_counter()
    if cfg.direction == "import":
        weights.import_hf(cfg.source, cfg.output, tp=cfg.tp, pp=cfg.pp, dtype=cfg.dtype, like=cfg.like)
    else:
        weights.export_hf(cfg.source, cfg.output, cfg.dtype)
    seconds = time.perf_counter() - started
    written = sum(path.stat().st_size for path in cfg.output.rglob("*") if path.is_file())
    print(f"{cfg.direction}ed {cfg.source} -> {cfg.output}: {written / 1e6:,.1f} MB in {seconds:.1f} s ({written / 1e6 / seconds:,.0f} MB/s)")
    if cfg.verify:
        print(_verify(cfg))
    artifact.complete(cfg.output)
    return cfg.output


def dry_run(cfg: Config) -> None:
    """Print what would be written: parameters, bytes, files."""
    check(cfg)
    config_dir = _config_dir(cfg)
    if config_dir is None:
        print(f"{cfg.direction} {cfg.source} -> {cfg.output}: config and size are inside the .gguf file; --like HF_DIR would tell them here")
        return
    family, model = families.load(config_dir)
    parameters = family.num_parameters(model)
    size = parameters * (BYTES[cfg.dtype] if cfg.dtype else _bytes_per_parameter(config_dir))
    files = cfg.tp * cfg.pp if cfg.direction == "import" else -(-size // 5_000_000_000)
    print(f"{cfg.direction} {cfg.source} -> {cfg.output}: {family.hf_type}, {model.num_layers} layers")
    print(f"parameters {parameters:,}; about {size / 1e9:.2f} GB in {files} weight file{'s' if files > 1 else ''}")


def check(cfg: Config) -> None:
    """Everything that can be said without reading weights. Errors: UserError."""
    if not cfg.source.exists():
        raise UserError(f"{cfg.source} does not exist; give a {'Hugging Face folder' if cfg.direction == 'import' else 'checkpoint folder'}")
    if cfg.output.resolve() == cfg.source.resolve():
        raise UserError(f"source and output are both {cfg.source}; choose another output")
    if cfg.like is not None and not cfg.like.is_dir():
        raise UserError(f"like={cfg.like} does not exist; give a Hugging Face folder with config.json and tokenizer")
    if cfg.direction == "export" and (cfg.tp, cfg.pp) != (1, 1):
        raise UserError(f"tp={cfg.tp} and pp={cfg.pp} are for imports; a Hugging Face folder has no layout")
    parents(cfg)
    config_dir = _config_dir(cfg)
    if config_dir is None:
        return
    _, model = families.load(config_dir)
    if cfg.pp > model.num_layers:
        raise UserError(f"pp={cfg.pp} must be at most the number of layers, {model.num_layers}; try pp={model.num_layers}")


def _config_dir(cfg: Config) -> Path | None:
    """The folder whose config.json tells the model; None when only a .gguf file knows it."""
    if cfg.direction == "export":
        return run_folder.resolve(cfg.source) / "hf"
    if cfg.like is not None:
        return cfg.like
    if cfg.source.suffix == ".gguf":
        return None
    if artifact.is_complete(cfg.source) or (cfg.source / artifact.PROVENANCE).is_file():
        kind = artifact.require(cfg.source)["kind"]
        if kind == CHECKPOINT_KIND:
            raise UserError(f"{cfg.source} is a checkpoint already; train on it, or export it with: prism convert export")
    if any((cfg.source / name).exists() for name in ("metadata.json", "latest_checkpointed_iteration.txt")):
        raise UserError(
            f"{cfg.source} is a Megatron-LM checkpoint, which holds neither config.json nor tokenizer; give --like HF_DIR of the same model"
        )
    return cfg.source


def _bytes_per_parameter(config_dir: Path) -> int:
    config = families.read_config(config_dir)
    return BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)


def _verify(cfg: Config) -> str:
    import tempfile

    from megatron_prism.engine import verify, weights

    if cfg.direction == "export":
        folder = run_folder.resolve(cfg.source)
        return str(verify.verify(folder, cfg.output, weights.compared_dtype(folder, cfg.dtype)))
    through = weights.DTYPES[cfg.dtype] if cfg.dtype else None
    if (cfg.source / "config.json").is_file():
        return str(verify.verify(cfg.output, cfg.source, through))
    with tempfile.TemporaryDirectory(dir=cfg.output, prefix=".verify-") as exported:
        # no Hugging Face folder to compare with: what we would export is the reference
        return str(verify.verify(cfg.output, weights.write_hf(cfg.output, Path(exported)), through))
