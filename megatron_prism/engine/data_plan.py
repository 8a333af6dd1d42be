"""What a recipe's run will take of its data, known before torch is imported: the plans it goes on under, the table, the limits on epochs."""

from typing import Any

from megatron_prism.data_prep import budgets, learnt
from megatron_prism.data_prep.blend import Blend, load_blend
from megatron_prism.data_prep.history import go_on, recorded
from megatron_prism.data_prep.manifest import Manifest
from megatron_prism.data_prep.packed_sampler import PackedSource
from megatron_prism.engine import bad_steps, run_folder
from megatron_prism.engine.recipe import TrainConfig


def check(cfg: TrainConfig) -> budgets.Budget:
    """What the run takes of each source. Errors: UserError for data that changed since the run's checkpoint, and for a source read too often."""
    blend = load_blend(cfg.data.blend)
    manifests = blend.manifests()
    learnt.check(blend.sources, manifests, cfg.data.loss)
    if cfg.validation:
        held_out = [source for source in blend.sources if source.validation is not None]
        learnt.check(held_out, blend.manifests("validation"), cfg.data.loss)
    records, steps, samples = _plans(cfg, blend, manifests)
    sizes, bounds = _sizes(cfg, blend, manifests)
    num_samples = samples + (cfg.steps - steps) * cfg.global_batch
    packed = cfg.data.packing is not None
    budget = budgets.count(blend, sizes, records, samples, num_samples, cfg.data.seq_len, packed, bounds)
    budgets.check_epochs(budget, cfg.global_batch, steps)
    return budget


def describe(cfg: TrainConfig) -> str:
    """The table of the run's sources, and what of them counts in the loss. Errors: as for `check`."""
    table, blend = budgets.describe(check(cfg)), load_blend(cfg.data.blend)
    loss = learnt.describe(blend.sources, blend.manifests(), cfg.data.loss)
    return table if loss is None else f"{table}\n{loss}"


def _sizes(cfg: TrainConfig, blend: Blend, manifests: list[Manifest]) -> tuple[list[int], list[str]]:
    """Tokens of each source, or the places of an epoch's buffers; and the names of those for which this is a bound from below.

    What has a limit is counted whatever its size: a million documents take seconds.
    """
    section = cfg.data.packing
    if section is None:
        return [manifest.num_tokens for manifest in manifests], []
    sizes, bounds = [], []
    for source, manifest in zip(blend.sources, manifests, strict=True):
        options = section.options(cfg.data.seq_len)
        packed = PackedSource(manifest.document_lengths(), options, section.window_documents, blend.seed, source.name)
        counted = packed.is_soon_counted or source.max_epochs is not None
        sizes.append((packed.buffers_in_epoch if counted else packed.fewest_buffers) * cfg.data.seq_len)
        bounds += [] if counted else [source.name]
    return sizes, bounds


def _plans(cfg: TrainConfig, blend: Blend, manifests: list[Manifest]) -> tuple[list[dict[str, Any]], int, int]:
    """The plans of the run, and the steps and samples that are behind it.

    Options that only the training loop knows are taken as unchanged here: it compares them itself when the run starts.
    """
    sources = learnt.records(blend.sources, manifests, cfg.data.loss)
    now = {"seed": blend.seed, "seq_len": cfg.data.seq_len, "mask_end_of_document": cfg.data.mask_end_of_document, "sources": sources}
    checkpoint = run_folder.newest(cfg.output)
    if checkpoint is None and cfg.model.checkpoint is not None and cfg.model.load == "all":
        checkpoint = run_folder.resolve(cfg.model.checkpoint)
    if checkpoint is None:
        return recorded(now), 0, 0
    progress = run_folder.read_state(checkpoint)["progress"]
    progress["data"] = bad_steps.amended(cfg.output, progress["step"], progress["data"])
    records = go_on(progress["data"], {**progress["data"], **now}, progress["samples"], cfg.data.on_change).records
    return records, progress["step"], progress["samples"]
