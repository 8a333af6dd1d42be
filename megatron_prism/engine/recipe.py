"""The recipe of a training run, and everything about it that can be checked before torch is imported; its blocks are `recipe_blocks`'."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_prism import artifact, families
from megatron_prism.config import (
    Block,
    Fp8Config,
    Fraction,
    NonNegative,
    OptimizerConfig,
    ParallelConfig,
    Positive,
    PositiveFloat,
    read_toml,
)
from megatron_prism.differences import differences
from megatron_prism.engine import run_folder
from megatron_prism.engine.bad_steps import BadStepsSection
from megatron_prism.engine.log_settings import LogConfig, check_log
from megatron_prism.engine.metrics import METRICS
from megatron_prism.engine.recipe_blocks import (
    CheckpointSection,
    DataSection,
    EvaluationSection,
    ExportSection,
    ModelSection,
    ValidationSection,
)
from megatron_prism.engine.schedule import ScheduleConfig
from megatron_prism.engine.watchdog_settings import WatchdogSection
from megatron_prism.errors import UserError
from megatron_prism.families.components import Trainable
from megatron_prism.families.extension import Extension, extended
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.planning import layout
from megatron_prism.planning.context_parallel import check_packing
from megatron_prism.planning.fp8 import check_fp8
from megatron_prism.planning.training import Training

EXTENSION_KEYS = dict.fromkeys(
    ("rope", "sliding_window"), "what a model's lengths are made for is changed by another stage: prism extend RECIPE.toml"
)
"""what a recipe of `prism extend` may have and one of `prism train` may not, and what to say then"""


class TrainConfig(Block):
    """A training run."""

    stage: ClassVar[str] = "train"
    elsewhere: ClassVar[dict[str, str]] = EXTENSION_KEYS

    output: Path
    """folder of the run"""
    model: ModelSection
    """what is trained, such as model.checkpoint=RUN"""
    data: DataSection
    steps: Positive
    """optimizer steps in all"""
    global_batch: Positive
    """sequences per step, whatever the number of ranks"""
    micro_batch: Positive = 1
    """sequences in one forward pass of one rank"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: weights and activations in bf16; master weights, gradients and moments in fp32 unless `optimizer` says otherwise"""
    fp8: Fp8Config | None = None
    """FP8 matrix products beside bf16; `fp8.recipe=tensorwise` turns it on"""
    recompute: Literal["selective", "full"] | None = None
    """activations recomputed in the backward pass: selective: attention's; full: every layer's, or the first `recompute_layers`"""
    recompute_layers: Positive | None = None
    """with recompute=full: how many layers of each pipeline stage (chunk, with vpp) are recomputed; none: all"""
    keep_attention: bool = False
    """with recompute=full: attention's output is kept beside a layer's input, and its core, most of the work of long sequences, runs once"""
    offload_activations: bool = False
    """with recompute=full: what layers keep waits in host memory for the backward pass"""
    deterministic: bool = False
    """only kernels whose sums have a fixed order, so that equal runs are equal bit for bit on GPUs too; slower"""
    cuda_graphs: bool = Field(default=False, exclude=True)
    """a micro-batch's forward and backward pass is recorded once and replayed whole: for models whose kernels the host starts too slowly"""
    trainable: Trainable = "all"
    """all weights, or `attention`: its projections alone; the others keep their values and take no gradient and no optimizer state"""
    max_position_embeddings: Positive | None = None
    """raise the largest length that config.json names, for a data.seq_len beyond it; rotary embeddings stay as they are (else: prism extend)"""
    hidden_dropout: Fraction = 0.0
    """dropout on the embedding and on each residual branch"""
    seed: NonNegative = 1234
    """of random weights and dropout; the order of samples follows the blend's own seed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch sees a device, the CPU elsewhere"""
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: TransformerEngine's on CUDA where installed, ours elsewhere"""
    attention_backend: Literal["auto", "flash", "fused"] = "auto"
    """of TransformerEngine's layers: flash: FlashAttention-4; fused: TransformerEngine's choice, cuDNN; auto: flash where installed, on Hopper"""
    time_limit_minutes: PositiveFloat | None = None
    """save and stop after this long; start the same command again to go on"""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection | None = None
    export: ExportSection | None = None
    evaluation: EvaluationSection | None = None
    bad_steps: BadStepsSection = BadStepsSection()
    watchdog: WatchdogSection | None = Field(default=WatchdogSection(), exclude=True)
    """what ends a run that hangs; none: nothing does before its process groups give up"""
    check_memory: bool = Field(default=False, exclude=True)
    """compare weights, master weights and moments with what the last update wrote, before each update and save: docs/chaos.md"""
    gc_interval: Positive | None = Field(default=100, exclude=True)
    """steps between collections of Python's garbage, on all ranks at once, as after each save; none: each rank's Python collects when it likes"""
    straggler_percent: PositiveFloat | None = Field(default=30, exclude=True)
    """a rank that takes so much more time for its own work than its peers is named in the log; none: nobody looks"""
    log: LogConfig = Field(default_factory=LogConfig)

    def extension(self, model: ModelConfig) -> Extension:
        """What becomes of the lengths that the start, `model`, was made for."""
        window: Literal["keep"] | None = None if model.sliding_window is None else "keep"
        return Extension(self.data.seq_len, self.max_position_embeddings or model.max_position_embeddings, sliding_window=window)

    @property
    def training(self) -> Training:
        """What of it planning wants to know."""
        return Training(
            self.precision == "bf16",
            self.recompute,
            self.recompute_layers,
            self.optimizer,
            self.fp8,
            self.keep_attention,
            self.offload_activations,
            self.trainable,
            self.cuda_graphs,
        )

    @model_validator(mode="after")
    def _precisions_go_together(self) -> "TrainConfig":
        if self.precision != "bf16" and self.fp8 is not None:
            raise ValueError(f"fp8 works beside bf16, precision={self.precision} is set; use precision=bf16, or fp8=none")
        if self.fp8 is not None and self.fp8.params and self.trainable != "all":
            raise ValueError(
                f"fp8.params=true with trainable={self.trainable}: frozen weights would be in FP8 alone, with no master to save them from; "
                "leave fp8.params false, or use trainable=all"
            )
        if self.precision != "bf16" and self.optimizer.has_small_types:
            raise ValueError(
                f"optimizer.gradients, moments and split_master are for bf16 weights, precision={self.precision} is set; leave them at their defaults"
            )
        if self.recompute_layers is not None and self.recompute != "full":
            raise ValueError(f"recompute_layers={self.recompute_layers} counts fully recomputed layers; set recompute=full")
        for key in ("keep_attention", "offload_activations"):
            if getattr(self, key) and self.recompute != "full":
                raise ValueError(f"{key}=true is about layers that are recomputed, recompute={self.recompute} is set; set recompute=full")
        if self.keep_attention and self.fp8 is not None and self.fp8.recipe == "delayed":
            raise ValueError(
                "keep_attention=true with fp8.recipe=delayed: TransformerEngine sets scales aside for a second run of attention's core, which never "
                "comes, and memory grows with every step; use fp8.recipe=tensorwise or blockwise, or keep_attention=false"
            )
        if self.offload_activations and self.recompute_layers is not None:
            raise ValueError(
                f"offload_activations=true with recompute_layers={self.recompute_layers}: layers that are not recomputed keep too much to be "
                "copied in time; recompute all, or offload nothing"
            )
        return self

    @model_validator(mode="after")
    def _overlap_has_what_it_needs(self) -> "TrainConfig":
        if not self.parallel.tp_comm_overlap:
            return self
        if self.parallel.tp == 1 or not self.parallel.sp:
            raise ValueError(
                f"parallel.tp_comm_overlap=true needs tokens that tensor-parallel ranks exchange: parallel.tp={self.parallel.tp} and "
                f"parallel.sp={self.parallel.sp} are set; set tp to 2 or more and sp=true"
            )
        if self.layers == "local" or self.device == "cpu":
            raise ValueError(
                f"parallel.tp_comm_overlap=true is TransformerEngine's, on CUDA; layers={self.layers} and device={self.device} are set; set it "
                "to false"
            )
        return self

    @model_validator(mode="after")
    def _flash_attention_can_run(self) -> "TrainConfig":
        wrong = {"precision": self.precision == "fp32", "layers": self.layers == "local", "device": self.device == "cpu"}
        found = [f"{key}={getattr(self, key)}" for key, is_wrong in wrong.items() if is_wrong]
        found += [f"parallel.cp={self.parallel.cp}"] if self.parallel.cp > 1 else []
        if self.attention_backend == "flash" and found:
            raise ValueError(
                f"attention_backend=flash with {', '.join(found)}: FlashAttention-4 runs in TransformerEngine's layers, on CUDA, in bf16, without "
                "context parallelism; use attention_backend=auto, which takes it where it can run"
            )
        return self

    @model_validator(mode="after")
    def _graphs_can_be_captured(self) -> "TrainConfig":
        if not self.cuda_graphs:
            return self
        parallel, exchanges = self.parallel, "exchanges inside a graph are not proved"
        rules: list[tuple[bool, str, str]] = [
            (self.device == "cpu", f"device={self.device}: graphs are CUDA's", "device=cuda"),
            (parallel.model_ranks > 1, f"parallel.pp={parallel.pp}, tp={parallel.tp}, cp={parallel.cp}: {exchanges}", "1 for all three"),
            (self.data.packing is not None, "data.packing: documents end elsewhere in every batch, and a graph repeats one", "data.packing=none"),
            (self.hidden_dropout > 0, f"hidden_dropout={self.hidden_dropout}: its random numbers are not taken into a graph", "0"),
            (self.recompute is not None, f"recompute={self.recompute}: it puts random states back, which a graph cannot", "recompute=none"),
        ]
        for is_broken, rule, fix in rules:
            if is_broken:
                raise ValueError(f"cuda_graphs=true with {rule}; use {fix}, or cuda_graphs=false")
        return self

    @model_validator(mode="after")
    def _packing_fits_the_layout(self) -> "TrainConfig":
        packing, cp = self.data.packing, self.parallel.cp
        if packing is None:
            return self
        if self.micro_batch > 1:
            raise ValueError(
                f"micro_batch={self.micro_batch} must be 1 with data.packing: packed documents lie in one row; a larger data.seq_len does the same"
            )
        if cp > 1 and packing.pad_multiple % (2 * cp):
            raise ValueError(f"data.packing.pad_multiple={packing.pad_multiple} must be a multiple of 2 * parallel.cp = {2 * cp}; try {2 * cp}")
        return self

    @model_validator(mode="after")
    def _checkpoints_are_there(self) -> "TrainConfig":
        save = self.checkpoint.save_interval
        self.bad_steps.check_checkpoints(save, self.checkpoint.keep_last)
        if self.bad_steps.on_nan == "skip" and self.fp8 is not None and self.fp8.recipe == "delayed":
            raise ValueError("bad_steps.on_nan=skip with fp8.recipe=delayed: scales remember the step that was left out; use tensorwise or blockwise")
        for name, section, why in (
            ("export", self.export, "exports are made from checkpoints"),
            ("evaluation", self.evaluation, "checkpoints answer"),
        ):
            interval = section.interval if section is not None else None
            if interval is not None and (save is None or interval % save):
                raise ValueError(f"{name}.interval={interval} must be a multiple of checkpoint.save_interval={save}: {why}")
        return self


def parents(cfg: TrainConfig) -> list[Path]:
    """The artifacts that a run is made from: the blend's prep output, and the checkpoint that it starts from."""
    blend = cfg.data.blend if cfg.data.blend.is_dir() else cfg.data.blend.parent
    found = [blend] if artifact.is_complete(blend) else []
    if cfg.model.checkpoint is not None:
        found.append(run_folder.resolve(cfg.model.checkpoint))
    return found


def check_start(cfg: TrainConfig) -> None:
    """Errors: UserError where the checkpoint that is to be trained is not made yet, with the way to a plan of the run without it."""
    if cfg.model.checkpoint is not None and not cfg.model.checkpoint.exists():
        raise UserError(
            f"model.checkpoint={cfg.model.checkpoint} does not exist; run the stage that makes it. "
            "prism plan RECIPE --model MODEL shows sizes without it"
        )


def model_files(cfg: TrainConfig) -> Path:
    """The folder with the config.json (and, for a checkpoint, the tokenizer) of the model to train. Errors: UserError where it holds none."""
    if cfg.model.hf_config is not None:
        folder = cfg.model.hf_config.parent if cfg.model.hf_config.name == "config.json" else cfg.model.hf_config
        if not (folder / "config.json").is_file():
            raise UserError(f"model.hf_config={cfg.model.hf_config}: for random weights give the folder that holds config.json; this holds none")
        return folder
    assert cfg.model.checkpoint is not None
    return run_folder.resolve(cfg.model.checkpoint) / "hf"


def check_model(cfg: TrainConfig, model: ModelConfig, plan: layout.ParallelPlan) -> None:
    """Settings that this model cannot be trained with under its plan. Errors: UserError."""
    ours = cfg.layers == "local" or cfg.device == "cpu"
    if ours and cfg.parallel.cp_comm_type is not None:
        raise UserError(
            f"parallel.cp_comm_type={cfg.parallel.cp_comm_type} is for TransformerEngine's layers; ours (layers=local, device=cpu) gather: drop it"
        )
    if cfg.data.packing is not None and not ours:
        check_packing(plan.cp_comm_type)
    if cfg.fp8 is not None:
        check_fp8(model, plan, cfg.data.seq_len, cfg.fp8)
    if cfg.cuda_graphs and cfg.fp8 is not None and cfg.fp8.recipe == "delayed" and plan.dp > 1:
        raise UserError(
            f"cuda_graphs=true with fp8.recipe=delayed on {plan.dp} data-parallel ranks: they agree on scales inside the pass, and exchanges inside "
            "a graph are not proved; use tensorwise or blockwise, or cuda_graphs=false"
        )
    if cfg.fp8 is not None and model.is_hybrid and cfg.recompute == "full":
        raise UserError(
            "fp8 with recompute=full: a hybrid's layers would be computed again in bf16, and their gradients with them; drop one of the two"
        )
    if cfg.parallel.tp_comm_overlap and model.is_hybrid:
        raise UserError("parallel.tp_comm_overlap=true: TransformerEngine has no such buffers for Mamba's projections; leave it false for hybrids")
    if cfg.recompute_layers is not None and model.is_hybrid:
        raise UserError(f"recompute_layers={cfg.recompute_layers}: a hybrid model recomputes every layer with recompute=full; drop recompute_layers")


def trained_config(cfg: TrainConfig) -> tuple[dict[str, Any], ModelConfig]:
    """config.json of the model that is trained, and its shape: those of its start, but for lengths and rotary embeddings that the recipe changes.

    Errors: UserError where the start forbids the change, or is too short for data.seq_len.
    """
    source = model_files(cfg)
    family, model = families.load(source)
    config = families.read_config(source)
    changed = extended(config, model, cfg.extension(model))
    return changed, model if changed == config else family.model_config(changed)


CONFIG_JSON = "hf/config.json"


def check_continuation(cfg: TrainConfig, config: dict[str, Any]) -> None:
    """What is taken up with its optimizer state must be the same model, of which the same weights were trained. Errors: UserError."""
    folder = run_folder.newest(cfg.output)
    if folder is not None and run_folder.damage(folder, CONFIG_JSON) is not None:
        return  # the start compares every file, and says so or takes another
    changed = differences(families.read_config(folder / "hf"), config) if folder is not None else []
    if changed:
        raise UserError(f"{cfg.output} trains another model: config.json {'; '.join(changed)}; restore the recipe, or choose another output")
    if folder is None and cfg.model.load == "all" and cfg.model.checkpoint is not None:
        folder = run_folder.resolve(cfg.model.checkpoint)
    if folder is None or not (folder / artifact.CONFIG).is_file():
        return
    before = read_toml(folder / artifact.CONFIG).get("trainable", "all")
    if before != cfg.trainable:
        raise UserError(
            f"trainable={cfg.trainable}: {folder} was trained with trainable={before}, and has optimizer states of those weights alone; "
            "use the same, or start from its weights in another output (model.load=weights)"
        )


def check(cfg: TrainConfig, world_size: int) -> tuple[ModelConfig, layout.ParallelPlan]:
    """Everything that can be known to be wrong before torch is imported. Errors: UserError."""
    config, model = trained_config(cfg)
    check_continuation(cfg, config)
    plan = layout.make_plan(model, cfg.parallel, world_size, cfg.data.seq_len, cfg.global_batch, cfg.micro_batch)
    check_model(cfg, model, plan)
    check_log(cfg.log, begins=not (cfg.output / METRICS).exists())
    blend = cfg.data.blend / "blend.toml" if cfg.data.blend.is_dir() else cfg.data.blend
    if not blend.is_file():
        raise UserError(f"data.blend={cfg.data.blend}: {blend} does not exist; run `prism prep`, or give a blend.toml")
    return model, plan
