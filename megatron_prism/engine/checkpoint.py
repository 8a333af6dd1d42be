"""Training checkpoints: everything that a run needs to go on as if it had never stopped, in one folder per step.

    RUN/checkpoints/step_00000100/    an artifact of kind "checkpoint"
      sharded/      torch_dist: weights, optimizer state, random number states; any layout can load it; with checksums of every file
      hf/           config.json and tokenizer of the model, as at import
      state.json    step, samples and tokens consumed, in all and by source; data fingerprint and plans; layout
      COMPLETE      written last, with checksums of the other files; a folder without it is never read

Owns: what a checkpoint is, loading it, and keeping the newest N; `saving` writes, `integrity` compares checksums before a file is used, `run_folder`
finds them. Refuses: damaged files, newer schemas, silently changed data. Called on every rank; files other than `sharded/` are written by rank 0.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from pydantic import BaseModel

from megatron_prism import artifact
from megatron_prism.data_prep.history import Continuation, OnChange, go_on
from megatron_prism.engine import leftovers
from megatron_prism.engine.integrity import require_whole
from megatron_prism.engine.mcore import load_sharded, plan_sharded
from megatron_prism.engine.model import unwrap
from megatron_prism.engine.optimizer import gather
from megatron_prism.engine.optimizer_state import FP8, Fp8WeightState, OptimizerState, by_ranges
from megatron_prism.engine.parallel import Mesh
from megatron_prism.engine.ranks import on_main
from megatron_prism.engine.run_folder import STATE, STATE_SCHEMA_VERSION, complete_steps, read_state, step_folder
from megatron_prism.engine.saving import Background, carry_out, check_room, reporting, save_sharded, warn_of_little_room
from megatron_prism.engine.step import Engine
from megatron_prism.errors import NOT_KNOWN, UserError

logger = logging.getLogger(__name__)
SHARDED = "sharded"
HF = "hf"
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")


@dataclass
class Progress:
    """Where a run stands: what `state.json` holds beside the layout."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """fingerprint of the blend: seed, seq_len, packing, name, weight, digest, tokens of each source; and all plans so far (`data_prep.history`)"""
    consumed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """samples, tokens and epochs taken of every source so far, also of those that left"""


def save(
    engine: Engine,
    run: Path,
    progress: Progress,
    hf: Path,
    config: BaseModel,
    parents: Sequence[Path],
    beside: Callable[[Path], None] | None = None,
    background: Background | None = None,
    after: Callable[[], None] | None = None,
) -> Path:
    """Write the checkpoint of the current step; complete on every rank's disk when it returns, or, in the background, when that was waited for.

    hf: folder with the model's config.json and tokenizer, copied along. A half-written folder of the same step is replaced.
    beside: called on every rank with the folder before it is complete, to put more there; never in the background.
    after: what rank 0 does when the checkpoint is complete. Errors: UserError, the same on every rank, where any rank cannot write its part: the
    folder is removed, others are as they were. Of a save in the background: told by `Background.wait`, which the next save begins with.
    """
    folder = step_folder(run, progress.step)
    if background is not None:
        background.wait()

    def complete() -> None:
        artifact.complete(folder)
        try:
            if after is not None:
                after()
            warn_of_little_room(folder, needed)
        except (OSError, *NOT_KNOWN) as error:  # this one is good, and others may be gone already: to give it up now could leave none
            logger.warning("%s is saved; what follows a save failed: %s", folder, error)

    try:
        on_main(lambda: _begin(folder, engine, progress, hf, config, parents))
        gather_weights(engine)
        plan = plan_sharded(_full_state(engine), folder / SHARDED)
        needed = check_room(plan)
        if beside is not None:
            beside(folder)
        if background is None:
            carry_out(plan, complete)
        else:
            background.start(plan, complete, lambda: remove(folder))
    except UserError:  # every rank's
        on_main(lambda: remove(folder))
        raise
    return folder


def _begin(folder: Path, engine: Engine, progress: Progress, hf: Path, config: BaseModel, parents: Sequence[Path]) -> None:
    """Rank 0's files, all but the mark."""
    leftovers.remove_later(folder.parent.parent)
    with reporting(folder):
        remove(folder)
        artifact.begin(folder, artifact.CHECKPOINT, config, parents)
        shutil.copytree(hf, folder / HF)
        (folder / SHARDED).mkdir()
        artifact.write_atomic(folder / STATE, json.dumps(_state(progress, engine), indent=2) + "\n")


def _full_state(engine: Engine) -> dict[str, Any]:
    """Everything that is sharded: weights, optimizer, random number states."""
    model = _model_state(engine, scales=_has_scales(engine))
    optimizer = {"groups": engine.optimizer.groups(), "state": OptimizerState(engine.optimizer, model, loading=False).tensors}
    fp8 = Fp8WeightState(engine.optimizer, model, loading=False)
    return {**_whole(engine, model), **fp8.entry, "optimizer": optimizer, "rng": _rng_object(engine.mesh)}


def gather_weights(engine: Engine) -> None:
    """Make every rank's copy of the weights that of the ranks which updated them.

    Where that overlaps with the next forward pass (CUDA), a rank has last step's values of all ranges but its own until then.
    """
    gather(engine.model)


def load_weights(engine: Engine, checkpoint: Path) -> None:
    """Load the model alone, from any layout, and take it as the optimizer's new starting point. Errors: UserError for a damaged file."""
    require_whole(checkpoint)
    read_weights(engine, checkpoint / SHARDED)
    engine.optimizer.take_weights()


def write_weights(engine: Engine, folder: Path) -> None:
    """Write what the weights are at this moment, sharded, into a folder made for them."""

    def make() -> None:
        with reporting(folder):
            folder.mkdir(parents=True)

    on_main(make)
    model = _model_state(engine, scales=False)
    save_sharded({**_whole(engine, model), **Fp8WeightState(engine.optimizer, model, loading=False).entry}, folder)


def read_weights(engine: Engine, folder: Path) -> None:
    """Put weights that were written sharded, by any layout, where the model's are; of the optimizer, masters of FP8 weights alone follow."""
    model = _model_state(engine, scales=False)
    fp8 = Fp8WeightState(engine.optimizer, model, loading=True)
    state = load_sharded({**_whole(engine, model), **fp8.entry}, folder)
    _put_weights(engine, state)
    if engine.optimizer.fp8_params:  # on every rank, also one that owns no range of a weight
        fp8.apply(state.get(FP8, {}))
        engine.optimizer.quantise()
        gather_weights(engine)


def load_all(engine: Engine, checkpoint: Path, checked: bool = False) -> Progress:
    """Load model, optimizer, random number states (where the layout is the same) and progress.

    checked: every file was compared with its checksum already, as `integrity.choose` does. Errors: UserError for a damaged file, before any is used.
    """
    if not checked:
        require_whole(checkpoint)
    saved = read_state(checkpoint)
    same_layout = saved["layout"] == _layout(engine.mesh)
    if not same_layout and dist.get_rank() == 0:
        logger.info("%s was saved by another layout (%s): random number states start anew", checkpoint, saved["layout"])
    engine.optimizer.initialize()
    scales = _has_scales(engine) and bool(saved.get("scales"))
    if _has_scales(engine) and not scales and dist.get_rank() == 0:
        logger.info("%s has no FP8 scales of delayed scaling: their history starts anew", checkpoint)
    model = _model_state(engine, scales)
    optimizer = OptimizerState(engine.optimizer, model, loading=True)
    rng = {"rng": _rng_object(engine.mesh)} if same_layout else {}
    state = load_sharded({**_whole(engine, model), "optimizer": {"state": optimizer.tensors}, **rng}, checkpoint / SHARDED)
    _put_weights(engine, state)
    engine.optimizer.load_groups(state["optimizer"]["groups"])
    optimizer.apply(state["optimizer"]["state"])
    engine.optimizer.quantise()
    gather_weights(engine)
    if same_layout:
        _put_rng(state["rng"])
    return Progress(**saved["progress"])


def check_data(progress: Progress, fingerprint: dict[str, Any], on_change: OnChange = "refuse") -> Continuation:
    """The plans that a run goes on under. Errors: UserError naming what changed since the checkpoint, where it must not or nobody asked for it."""
    return go_on(progress.data, fingerprint, progress.samples, on_change)


def prune(run: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last` complete checkpoints and those of steps that `keep_every` divides. Rank 0 works, the others go on."""
    if keep_last is None or dist.get_rank() != 0:
        return
    for folder in complete_steps(run)[:-keep_last]:
        if keep_every is None or int(folder.name.removeprefix("step_")) % keep_every:
            remove(folder)


def gather_hf_files(config: Path, tokenizer: Path, folder: Path) -> None:
    """Put a config.json and a tokenizer's files side by side, as an imported model has them. Rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(tokenizer.iterdir()):
        if file.is_file() and file.suffix in TOKENIZER_SUFFIXES:
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(config / "config.json", folder / "config.json")


def put_config(folder: Path, config: dict[str, Any]) -> None:
    """Make a folder's config.json say this; where it says it already, it stays byte for byte as it is. Rank 0.

    A longer model's tokenizer is told of the length too: vLLM serves the smaller of max_position_embeddings and model_max_length.
    """
    path, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    if before == config:
        return
    artifact.write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    settings = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    length = config.get("max_position_embeddings", 0)
    if 0 < (settings.get("model_max_length") or 0) < length:  # null in some: no limit
        artifact.write_atomic(tokenizer, json.dumps({**settings, "model_max_length": length}, indent=2, ensure_ascii=False) + "\n")


def remove(folder: Path) -> None:
    """Delete a checkpoint: its mark first, so that a crash on the way leaves nothing that looks whole."""
    (folder / artifact.COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _state(progress: Progress, engine: Engine) -> dict[str, Any]:
    found = {"schema_version": STATE_SCHEMA_VERSION, "progress": asdict(progress), "layout": _layout(engine.mesh)}
    return found | ({"scales": True} if _has_scales(engine) else {})


def _layout(mesh: Mesh) -> dict[str, Any]:
    plan = mesh.plan
    return {"tp": plan.tp, "pp": plan.pp, "vpp": plan.vpp, "cp": plan.cp, "dp": plan.dp, "sp": plan.sp}


def _has_scales(engine: Engine) -> bool:
    """Whether layers remember maxima of earlier steps: FP8 with delayed scaling, and nothing else."""
    config = engine.model[0].config
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _chunk_names(engine: Engine) -> list[str]:
    """What each chunk's weights stand under, as in Megatron-LM: "model", or "model0", "model1", ... of an interleaved pipeline."""
    return ["model"] if len(engine.model) == 1 else [f"model{index}" for index in range(len(engine.model))]


def _model_state(engine: Engine, scales: bool) -> dict[str, Any]:
    """Sharded weights of every chunk. scales: and the FP8 layers' scales and maxima, which megatron-core calls their extra state."""
    metadata = {"dp_cp_group": engine.mesh.groups.dp_cp}
    states = {}
    for name, chunk in zip(_chunk_names(engine), engine.model, strict=True):
        state = unwrap(chunk).sharded_state_dict(metadata=metadata)
        states[name] = {key: value for key, value in state.items() if scales or not key.endswith("_extra_state")}
    return states


def _whole(engine: Engine, model_state: dict[str, Any]) -> dict[str, Any]:
    """All but what each rank saves its own ranges of."""
    return {chunk: {key: item for key, item in state.items() if not by_ranges(engine.optimizer, item)} for chunk, state in model_state.items()}


def _put_weights(engine: Engine, state: dict[str, Any]) -> None:
    for name, chunk in zip(_chunk_names(engine), engine.model, strict=True):
        model = unwrap(chunk)
        model.load_state_dict(state[name], strict=False)
        model.clear_padding()


def _rng_object(mesh: Mesh) -> ShardedObject:
    """This rank's random number states, as one object per rank of the mesh."""
    states = {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    plan = mesh.plan
    place = (mesh.pp_rank, mesh.tp_rank, mesh.dp_rank)
    return ShardedObject("rng", states, (plan.pp, plan.tp, plan.dp), place, replica_id=mesh.cp_rank)


def _put_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
