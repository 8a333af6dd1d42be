"""What `prism bench` measures: its recipe, resolved into cases, each a model and a training recipe that has passed the checks of `prism train`.

Owns: shared keys and the cases that change them, cutting a model to its first layers, random tokens. No torch.
Refuses: what a training recipe refuses, keys of a training run that have no meaning here, and cases that one process cannot hold together.
"""

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from megatron_prism import families
from megatron_prism.config import Block, ParallelConfig, Positive, PositiveFloat, validate
from megatron_prism.data_prep import shards
from megatron_prism.data_prep.blend import Blend, BlendSource, write_blend
from megatron_prism.data_prep.manifest import BLOCK_BYTES, BlockHasher, Manifest, Shard, file_sha256, write_manifest
from megatron_prism.engine import recipe
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.errors import UserError
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning.layout import ParallelPlan, make_plan

Baseline = Literal[
    "bare_megatron_core", "transformers", "transformers_autocast", "transformers_liger", "transformers_liger_autocast", "without_cuda_graphs"
]
SEQ_LEN = 8192
OWNED = {"output": "output", "model": "model (and vocab_size)", "steps": "steps"}
"""keys of a training recipe that the case itself sets -> what to set instead"""
GRAPHS_WARMUP = 4
"""fewest steps of warm-up with CUDA graphs: two are eager, the third captures, memory is read, and the fourth is taken in turns with the others"""
SEQUENCES = 64
"""of random tokens; the run begins again after the last"""


class CaseConfig(Block):
    """What is measured, and how."""

    name: str | None = None
    """of the case in the results; none: the model's"""
    model: str | None = None
    """published name, or folder with a config.json; NAME:LAYERS takes its first layers. Weights are random"""
    vocab_size: Positive | None = None
    """cut the vocabulary to this size; none: the model's own"""
    micro_batches: Positive | None = None
    """micro-batches of each data-parallel rank in a step; none: 1, or what train.global_batch makes"""
    train: dict[str, Any] = Field(default_factory=dict)
    """keys of a training recipe (prism train --keys); data.seq_len is 8192 unless set, tokens are random without data.blend"""
    baselines: Literal["available"] | list[Baseline] = Field(default_factory=list)
    """what to measure beside ours, in turns: bare_megatron_core, transformers[_liger][_autocast], without_cuda_graphs; available: all that can run"""
    warmup: Positive = 5
    """steps of each side before its clock starts; the last of several in turns with the others; with train.cuda_graphs at least 4"""
    steps: Positive = 10
    """timed steps of each side"""
    rounds: Positive = 5
    """turns that the timed steps are spread over, the sides taking them one after the other"""
    resident: Literal["auto"] | bool = "auto"
    """both sides in memory, so that they can take turns; false: one after the other; auto: where they fit"""
    trace: bool = True
    """profile one more step on a GPU: communication, idle time, host synchronisations"""
    profile: bool = False
    """write the profile of that step, of rank 0, into OUTPUT/traces"""


class Config(CaseConfig):
    """A benchmark: one case, or several over shared keys."""

    output: Path
    """folder of the results"""
    cases: list[dict[str, Any]] = Field(default_factory=list)
    """tables of the keys above that differ in each case; none: one case"""
    only: list[str] | None = None
    """names of the cases to measure; none: all"""
    minutes: PositiveFloat | None = None
    """begin no further case when so many are over; none: no limit"""

    @field_validator("train", "cases", mode="after")
    @classmethod
    def _off_in_words(cls, value: Any) -> Any:
        return _replaced(value, None, "none")  # TOML, in which the resolved recipe is kept, has no null

    @model_validator(mode="after")
    def _cases_are_whole(self) -> "Config":
        names = [name for name, _ in self.each()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cases need names of their own; {', '.join(twice)} is there more than once: set name")
        return self

    def each(self) -> list[tuple[str, CaseConfig]]:
        """The cases in full, by name. Errors: UserError."""
        shared = self.model_dump(mode="json", include=set(CaseConfig.model_fields))
        found = []
        for number, changes in enumerate(self.cases or [{}]):
            where = f"cases.{number}" if self.cases else "recipe"
            case = validate(_over(shared, _replaced(changes, "none", None)), CaseConfig, where)
            if case.model is None:
                raise UserError(f"{where} has no model; published models: {', '.join(families.PUBLISHED)}")
            found.append((case.name or case.model, case))
        unknown = sorted(set(self.only or []) - {name for name, _ in found})
        if unknown:
            raise UserError(f"only={unknown}: no cases of these names; there are {', '.join(name for name, _ in found)}")
        return [(name, case) for name, case in found if self.only is None or name in self.only]

    def fewest_ranks(self) -> int:
        """The fewest that every case's tp * pp * cp divides. Errors: UserError."""
        layouts = [_replaced(case.train.get("parallel", {}), "none", None) for _, case in self.each()]
        return math.lcm(*(validate(layout, ParallelConfig, where="train.parallel").model_ranks for layout in layouts))


@dataclass(frozen=True)
class Case:
    """One case, checked: what to build and how to measure it."""

    name: str
    options: CaseConfig
    hf_config: Path
    """folder with the config.json of the model as it is measured"""
    model: ModelConfig
    train: TrainConfig
    plan: ParallelPlan

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.train.global_batch * self.train.data.seq_len


def resolve(cfg: Config, world_size: int, folder: Path) -> list[Case]:
    """Check every case for this many ranks. folder: where model configs and random tokens are written, a place of this process alone.

    Errors: UserError naming the case.
    """
    cases = []
    for number, (name, options) in enumerate(cfg.each()):
        try:
            cases.append(_resolve(name, options, world_size, folder / str(number)))
        except UserError as error:
            raise UserError(f"case {name}: {error}") from None
    for key in ("device", "deterministic"):
        values = {getattr(case.train, key) for case in cases}
        if len(values) > 1:
            raise UserError(f"the cases of one run share train.{key}, which a process cannot change; got {sorted(map(str, values))}: run them apart")
    return cases


def planned(options: CaseConfig, world_size: int) -> tuple[ModelConfig, TrainConfig, ParallelPlan]:
    """Model, training recipe and layout of a case, checked as `resolve` checks them, with nothing written. Errors: UserError."""
    assert options.model is not None
    config = model_config(options.model, options.vocab_size)
    model = families.find(config).model_config(config)
    train = _train_config(options, Path("unset"), world_size)
    plan = make_plan(model, train.parallel, world_size, train.data.seq_len, train.global_batch, train.micro_batch)
    recipe.check_model(train, model, plan)
    return model, train, plan


def _resolve(name: str, options: CaseConfig, world_size: int, folder: Path) -> Case:
    assert options.model is not None
    config = model_config(options.model, options.vocab_size)
    folder.mkdir(parents=True)
    train = _train_config(options, folder, world_size)
    config["max_position_embeddings"] = max(config.get("max_position_embeddings", 0), train.data.seq_len)  # what it costs, at any length
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not options.train.get("data", {}).get("blend"):
        blend = random_blend(folder / "random", int(config["vocab_size"]), train.data.seq_len)
        train = train.model_copy(update={"data": train.data.model_copy(update={"blend": blend})})
    model, plan = recipe.check(train, world_size)
    return Case(name, options, folder, model, train, plan)


def _train_config(options: CaseConfig, folder: Path, world_size: int) -> TrainConfig:
    """The recipe that the case would be trained by."""
    for key in OWNED.keys() & options.train.keys():
        raise UserError(f"train.{key} has no meaning in a benchmark; set {OWNED[key]}")
    if "global_batch" in options.train and options.micro_batches is not None:
        raise UserError("micro_batches and train.global_batch say the same; set one of them")
    start = {"hf_config": str(folder), "tokenizer": str(folder)}
    needed = {"output": "unset", "steps": 1, "global_batch": 1, "data": {"seq_len": SEQ_LEN, "blend": "random"}, "model": start}
    train = validate(_over(needed, _replaced(options.train, "none", None)), TrainConfig, where="train")
    if train.cuda_graphs and options.warmup < GRAPHS_WARMUP:
        raise UserError(
            f"warmup={options.warmup} with train.cuda_graphs=true would time steps without a graph, or the one that captures it, and read the peak "
            f"of memory before it; set warmup={GRAPHS_WARMUP} or more"
        )
    if "global_batch" in options.train:
        return train
    dp = max(world_size // train.parallel.model_ranks, 1)
    return train.model_copy(update={"global_batch": dp * train.micro_batch * (options.micro_batches or 1)})


def model_config(model: str, vocab_size: int | None) -> dict[str, Any]:
    """The config.json of NAME or NAME:LAYERS, with another vocabulary where asked for. Errors: UserError with near names."""
    name, colon, layers = model.rpartition(":") if ":" in model else (model, "", "")
    if colon and not (layers.isdigit() and int(layers)):
        raise UserError(f"model={model} must read NAME or NAME:LAYERS, with a positive number of layers")
    config = _published_or_folder(name)
    if colon:
        config = first_layers(config, int(layers))
    config = {key: value for key, value in config.items() if key != "auto_map"}
    return config if vocab_size is None else _other_vocabulary(config, vocab_size)


def _other_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
    """With the special tokens that it still has."""
    ids = {key: None for key, value in config.items() if key.endswith("_token_id") and isinstance(value, int) and value >= size}
    return {**config, **ids, "vocab_size": size}


def _published_or_folder(name: str) -> dict[str, Any]:
    if name in families.PUBLISHED:
        return families.published(name)
    path = Path(name)
    if (path / "config.json").is_file():
        return families.read_config(path)
    near = difflib.get_close_matches(name.lower(), families.PUBLISHED, n=2, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"published models: {', '.join(families.PUBLISHED)}"
    raise UserError(f"model {name!r} is neither a published model nor a folder with a config.json; {known}")


def first_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config.json with fewer layers; lists and patterns with an entry for each layer are cut too."""
    whole = config["num_hidden_layers"]
    if layers > whole:
        raise UserError(f"the model has {whole} layers, {layers} were asked for; take at most {whole}")
    cut = {
        key: value[:layers]
        for key, value in config.items()
        if (isinstance(value, list) or (isinstance(value, str) and "pattern" in key)) and len(value) == whole
    }
    return {**config, **cut, "num_hidden_layers": layers}


def random_blend(folder: Path, vocab_size: int, seq_len: int) -> Path:
    """Shards of seeded random tokens as `prism prep` would leave them, and a blend of them: blend.toml."""
    split = folder / "random" / "train"
    split.mkdir(parents=True)
    dtype = shards.token_dtype(vocab_size)
    tokens = np.random.default_rng(0).integers(1, vocab_size, (SEQUENCES, seq_len + 1)).astype(dtype)
    tokens[:, -1] = 0  # end of document
    prefix = split / "shard_00000"
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    prefix.with_suffix(".idx").write_bytes(shards.index_bytes(np.full(SEQUENCES, seq_len + 1, np.int32), dtype))
    hasher = BlockHasher(BLOCK_BYTES)
    hasher.update(tokens.tobytes())
    index = prefix.with_suffix(".idx")
    shard = Shard(prefix.name, SEQUENCES, tokens.size, tokens.nbytes, index.stat().st_size, file_sha256(index), hasher.blocks())
    write_manifest(Manifest(split, "random", "train", "0" * 64, vocab_size, 0, dtype, 0, (shard,)))
    return write_blend(folder / "blend.toml", Blend(1, (BlendSource("random", "random", 1.0, split),)))


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested tables with some keys changed."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _over(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """Nested tables and lists with one value for another."""
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old else value
