"""Model weights between Hugging Face folders, Megatron-LM checkpoints and our checkpoint folders, one tensor at a time, in one process.

    CHECKPOINT/hf/        config.json, tokenizer and the rest of the Hugging Face folder, byte for byte; weights.json: the types that its weights had
    CHECKPOINT/sharded/   torch_dist: megatron-core's own global names, the vocabulary unpadded

Owns: applying a family's rules in both directions, and choosing types. Both directions are strict: nothing is left unread, nothing unfilled.
The artifact around the folders (config, provenance, COMPLETE) is the caller's. Peak memory: one shard's mapped pages and about one tensor.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_prism import artifact, families
from megatron_prism.engine import gguf_file, hf, run_folder, sharded
from megatron_prism.errors import UserError
from megatron_prism.families.family import Family, Layered, numbered
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.families.rules import Drop, Tied

HF, SHARDED, STATE, SOURCE_TYPES = "hf", "sharded", "state.json", "weights.json"
ITERATION_FILE = "latest_checkpointed_iteration.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MASTERS = "optimizer.state.param."
"""prefix of a training checkpoint's fp32 master weights, which have the model's own shapes"""
STATEFUL_MODULES = {
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "M": ("mixer.in_proj", "mixer.out_proj"),
}
"""megatron-core's linear layers, by the symbol of their layer, ask a checkpoint for an `_extra_state` each, empty outside FP8"""


@dataclass(frozen=True)
class Source:
    """A model to import: its names and types, and one megatron-core tensor after the other, in sections (see `Rule.sections`)."""

    family: Family
    model: ModelConfig
    hf_dir: Path
    """folder with config.json and tokenizer"""
    sections: Callable[[Layered], list[Tensor]]
    dtypes: dict[str, torch.dtype]
    """Hugging Face name -> type"""


def import_hf(source: Path, output: Path, *, tp: int = 1, pp: int = 1, dtype: str | None = None, like: Path | None = None) -> Path:
    """Write `output`/hf and `output`/sharded from a Hugging Face folder, a .gguf file, or a Megatron-LM torch_dist checkpoint.

    tp, pp: how stored tensors are cut and spread over files; any other layout can load them. dtype: float32, bfloat16, float16, or None: as in the
    source. like: Hugging Face folder with config and tokenizer, needed for a Megatron-LM checkpoint. Errors: UserError naming file and tensor.
    """
    wanted = to_dtype(dtype)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".gguf-") as scratch:
        if source.suffix == ".gguf":
            opened = open_hf(gguf_file.to_hf(source, Path(scratch), wanted, like))
        elif is_megatron(source):
            opened = _open_megatron(source, like)
        else:
            opened = open_hf(source)
        write_checkpoint(opened, output, tp, pp, wanted)
    return output


def write_checkpoint(source: Source, output: Path, tp: int, pp: int, dtype: torch.dtype | None = None) -> None:
    """Write `output`/hf and `output`/sharded: a source's weights, in this type (None: as they come), with its config and tokenizer."""
    shutil.rmtree(output / HF, ignore_errors=True)
    hf.carry_files(source.hf_dir, output / HF, leave=[SOURCE_TYPES])
    artifact.write_atomic(output / HF / SOURCE_TYPES, _record_dtypes(source.dtypes))
    sharded.write_streaming(output / SHARDED, _pieces(source, pp, dtype), tp)


def export_hf(checkpoint: Path, output: Path, dtype: str | None = None, max_shard_bytes: int = hf.MAX_SHARD_BYTES) -> Path:
    """Write a Hugging Face folder from a checkpoint of any layout, or from a run (its newest complete checkpoint).

    Weights that were trained in bf16 are taken from their fp32 masters. dtype: None gives each tensor the type that it had in the Hugging Face
    model. config.json stays as it was, byte for byte, unless a type given here differs from the one it declares, or transformers 4.57 would misread
    it (`families.export_config`); it is written last, and without it nothing loads the folder.
    Errors: UserError for a checkpoint that is half-written, lacks a tensor, or has one of another shape.
    """
    return write_hf(run_folder.resolve(checkpoint), output, dtype, max_shard_bytes)


def write_hf(folder: Path, output: Path, dtype: str | None = None, max_shard_bytes: int = hf.MAX_SHARD_BYTES) -> Path:
    """`export_hf` of one checkpoint folder, whether its COMPLETE mark is there yet or not."""
    wanted = to_dtype(dtype)
    family, model = families.load(folder / HF)
    names = MegatronNames(sharded.Reader(folder / SHARDED), family, model)
    asked = export_dtypes(folder, wanted)
    plan = []
    for entry in family.rules(model):
        stored = names.dtype(entry)
        as_stored = entry.rule.keep_fp32 and wanted != torch.float32
        plan += [hf.Planned(part.name, part.shape, stored if as_stored else asked(part.name, stored)) for part in entry.parts(model)]
    write_hf_folder(folder / HF, output, plan, _hf_tensors(names, family, model), wanted, max_shard_bytes)
    return output


def write_hf_folder(
    like: Path,
    output: Path,
    plan: Sequence[hf.Planned],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES,
) -> None:
    """Write planned tensors beside the config and tokenizer of `like`. dtype: for config.json to name; None: what it names already."""
    (output / "config.json").unlink(missing_ok=True)
    hf.carry_files(like, output, leave=["config.json", SOURCE_TYPES])
    hf.write_weights(output, plan, tensors, max_shard_bytes)
    temporary = output / ".config.json.tmp"
    shutil.copyfile(like / "config.json", temporary)
    hf.publish_config(temporary)
    if dtype is not None:
        hf.declare_dtype(temporary, dtype)
    temporary.replace(output / "config.json")


def compared_dtype(folder: Path, dtype: str | None) -> torch.dtype | None:
    """The type to round both sides to before comparing an export with its checkpoint: what they have in common."""
    stored = sharded.Reader(folder / SHARDED).dtype("embedding.word_embeddings.weight")
    return to_dtype(dtype) if stored == torch.float32 else stored


# --- from Hugging Face -------------------------------------------------------------------------------------------------------------------------


def open_hf(folder: Path) -> Source:
    """A Hugging Face folder as a source, after comparing all names and shapes with the family's rules.

    Errors: UserError naming tensors that the config asks for and the files lack, or that the files hold and no rule reads.
    """
    family, model = families.load(folder)
    reader = hf.Reader(folder)
    check_names(reader, family, model)

    def sections(entry: Layered) -> list[Tensor]:
        return entry.rule.sections([reader.tensor(part.name) for part in entry.parts(model)], model)

    read = {part.name for entry in family.rules(model) for part in entry.parts(model)}
    return Source(family, model, folder, sections, {name: reader.entries[name].dtype for name in sorted(read)})


def check_names(reader: hf.Reader, family: Family, model: ModelConfig) -> None:
    """Compare a folder's tensors with what the rules read. Errors: UserError by name, for a missing, unknown, misshapen or untied tensor."""
    needed = {part.name: part.shape for entry in family.rules(model) for part in entry.parts(model)}
    missing = sorted(needed.keys() - reader.entries.keys())
    if missing:
        raise UserError(f"{reader.folder} lacks {_some(missing)}, which its config.json asks for")
    for name, shape in needed.items():
        if reader.entries[name].shape != shape:
            raise UserError(f"{reader.folder}: {name} has shape {list(reader.entries[name].shape)}, but config.json says {list(shape)}")
    for alias in (rule for rule in family.weights if isinstance(rule, Tied)):
        _check_tied(reader, alias, model)
    spare = {name for rule in family.weights for name in _unread_names(rule, model)}
    unread = sorted(reader.entries.keys() - needed.keys() - spare)
    if unread:
        raise UserError(
            f"{reader.folder} holds {_some(unread)}, which no rule of family {family.hf_type} reads; its config.json may not fit its weights"
        )


def _check_tied(reader: hf.Reader, alias: Tied, model: ModelConfig) -> None:
    if alias.hf not in reader.entries or not getattr(model, alias.when):
        return
    if not torch.equal(reader.tensor(alias.hf), reader.tensor(alias.same_as)):
        raise UserError(f"{reader.folder}: {alias.hf} differs from {alias.same_as}, but config.json ties them; set tie_word_embeddings to false")


def _unread_names(rule: object, model: ModelConfig) -> list[str]:
    if isinstance(rule, Tied):
        return [rule.hf] if getattr(model, rule.when) else []
    if isinstance(rule, Drop):
        return [rule.hf.replace("{i}", str(layer)) for layer in range(model.num_layers)]
    return []


# --- into and out of torch_dist ----------------------------------------------------------------------------------------------------------------


def _pieces(source: Source, pp: int, dtype: torch.dtype | None) -> Iterator[sharded.Piece | sharded.EmptyObject]:
    """A model as pieces for the writer: layers spread evenly over `pp` stages, the embedding with the first, the rest with the last."""
    model, seen = source.model, -1
    for entry in source.family.rules(model):
        asked = None if entry.rule.keep_fp32 and dtype != torch.float32 else dtype
        sections = [section if asked is None else section.to(asked) for section in source.sections(entry)]
        if entry.layer is None:
            yield sharded.Piece(entry.rule.key, sections, None, entry.rule.tp_axis, 0 if seen < 0 else pp - 1)
            continue
        # layers of one kind are one global tensor with a layer axis; those of a hybrid model are apart, under their numbers
        place, stage = None if model.is_hybrid else (entry.layer, model.num_layers), entry.layer * pp // model.num_layers
        if entry.layer != seen:
            seen = entry.layer
            modules = [module for symbol in model.layer_symbols[seen] for module in STATEFUL_MODULES[symbol]]
            for module in modules:
                key = f"decoder.layers.{module}._extra_state"
                yield sharded.EmptyObject(numbered(key, seen) if model.is_hybrid else key, place, stage)
        yield sharded.Piece(entry.key(model), sections, place, entry.rule.tp_axis, stage)


class MegatronNames:
    """The tensors of a torch_dist checkpoint under a family's rules: layers stacked in one global tensor, or each under its own number."""

    def __init__(self, reader: sharded.Reader, family: Family, model: ModelConfig) -> None:
        """Errors: UserError naming tensors that are missing or of another shape, or model tensors that no rule reads."""
        self.reader, self.model = reader, model
        known = set()
        missing = []
        for entry in family.rules(model):
            key, stacked = self.place(entry)
            known.add(key)
            if key not in reader:
                missing.append(key)
                continue
            self._check_shape(entry, key, stacked)
        if missing:
            raise UserError(f"{reader.folder} lacks {_some(sorted(set(missing)))}, which {family.hf_type} needs")
        unread = sorted(key for key in reader if key.startswith(("embedding.", "decoder.", "output_layer.")) and key not in known)
        if model.share_embeddings_and_output_weights:
            unread = [key for key in unread if key != "output_layer.weight"]
        if unread:
            raise UserError(
                f"{reader.folder} holds {_some(unread)}, which no rule of family {family.hf_type} reads; config.json may not fit the weights"
            )

    def place(self, entry: Layered) -> tuple[str, bool]:
        """(key, whether it has the leading layer axis) of one rule's tensor."""
        key = entry.rule.key
        if entry.layer is None:
            return key, False
        alone = numbered(key, entry.layer)
        if self.model.is_hybrid or (key not in self.reader and alone in self.reader):
            return alone, False
        return key, True

    def dtype(self, entry: Layered) -> torch.dtype:
        """Stored type."""
        return self.reader.dtype(self.place(entry)[0])

    def read(self, entry: Layered) -> Tensor:
        """One rule's tensor of one layer, without vocabulary padding; the fp32 master where one is stored beside a shorter type."""
        key, stacked = self.place(entry)
        if MASTERS + key in self.reader and self.reader.dtype(key) != torch.float32:
            key = MASTERS + key
        index = [entry.layer] if stacked and entry.layer is not None else []
        rows = [slice(0, entry.rule.shape(self.model)[0])] if entry.rule.padded else []
        return self.reader.read(key, *index, *rows)

    def _check_shape(self, entry: Layered, key: str, stacked: bool) -> None:
        wanted, found = entry.rule.shape(self.model), self.reader.shape(key)
        if stacked:
            wanted = (self.model.num_layers, *wanted)
        padding = entry.rule.padded and found[0] >= wanted[0] and found[1:] == wanted[1:]
        if found != wanted and not padding:
            raise UserError(f"{self.reader.folder}: {key} has shape {list(found)}, but config.json says {list(wanted)}")


def _hf_tensors(names: MegatronNames, family: Family, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for entry in family.rules(model):
        tensors = entry.rule.split(names.read(entry), model)
        yield from ((part.name, tensor) for part, tensor in zip(entry.parts(model), tensors, strict=True))


# --- existing Megatron-LM checkpoints ----------------------------------------------------------------------------------------------------------


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a Megatron-LM checkpoint: one iteration's folder, or the folder that holds them."""
    return (folder / ITERATION_FILE).is_file() or sharded.is_sharded(folder) or (folder / "mp_rank_00").is_dir()


def _open_megatron(folder: Path, like: Path | None) -> Source:
    """A Megatron-LM torch_dist checkpoint as a source; optimizer, random states and other extras are left alone."""
    if like is None:
        raise UserError(f"{folder} is a Megatron-LM checkpoint, which holds neither config.json nor tokenizer; give --like HF_DIR of the same model")
    family, model = families.load(like)
    reader = sharded.Reader(_iteration(folder))
    names = MegatronNames(reader, family, model)

    def sections(entry: Layered) -> list[Tensor]:
        return [names.read(entry)]

    entries = [(part.name, entry) for entry in family.rules(model) for part in entry.parts(model)]
    return Source(family, model, like, sections, {name: names.dtype(entry) for name, entry in entries})


def _iteration(folder: Path) -> Path:
    """The folder of the latest iteration. Errors: UserError for one that is not there, or in the old (not torch_dist) format."""
    if (folder / ITERATION_FILE).is_file():
        text = (folder / ITERATION_FILE).read_text(encoding="utf-8").strip()
        folder = folder / ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else text)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, though {ITERATION_FILE} beside it names it")
    if not sharded.is_sharded(folder) and any(folder.glob("mp_rank_*")):
        raise UserError(f"{folder} is in Megatron-LM's old format (mp_rank_*); save it again with --ckpt-format torch_dist")
    return folder


# --- types -------------------------------------------------------------------------------------------------------------------------------------


def to_dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype={name!r} is not known; choose {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def _record_dtypes(dtypes: dict[str, torch.dtype]) -> str:
    """The commonest type of the source's weights, and the tensors that differ from it."""
    kinds = list(dtypes.values())
    common = max(sorted(set(kinds), key=str), key=kinds.count)
    others = {name: _name(dtype) for name, dtype in dtypes.items() if dtype != common}
    return json.dumps({"dtype": _name(common), "others": others}, indent=1) + "\n"


def export_dtypes(folder: Path, wanted: torch.dtype | None) -> Callable[[str, torch.dtype], torch.dtype]:
    """(Hugging Face name, stored type) -> type to export: the one asked for, else the original's, else the one stored."""
    if wanted is not None:
        return lambda name, stored: wanted
    path = folder / HF / SOURCE_TYPES
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        return lambda name, stored: getattr(torch, record["others"].get(name, record["dtype"]))
    declared = hf.declared_dtype(families.read_config(folder / HF))
    return lambda name, stored: declared or stored


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
