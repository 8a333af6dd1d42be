"""The recipe of an RL run: its blocks, and everything about it that can be checked before torch is imported.

What the policy is trained with is a training run's, and its blocks and checks are `engine.recipe`'s; `RLConfig.training` is the training recipe that
the engine is built from. Defaults are PRISM's (arXiv 2603.17074, Table 21) wherever it states one.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megatron_prism import artifact, families
from megatron_prism.config import Block, Fraction, NonNegative, OptimizerConfig, ParallelConfig, Positive, PositiveFloat
from megatron_prism.data_prep.packing import PackingOptions
from megatron_prism.engine import recipe, run_folder
from megatron_prism.engine.log_settings import LogConfig, check_log
from megatron_prism.engine.metrics import METRICS
from megatron_prism.engine.recipe import TrainConfig
from megatron_prism.engine.recipe_blocks import CheckpointSection, EvaluationSection, ExportSection, ModelSection
from megatron_prism.engine.schedule import ScheduleConfig
from megatron_prism.engine.watchdog_settings import WatchdogSection
from megatron_prism.errors import UserError
from megatron_prism.families.components import Trainable
from megatron_prism.families.model_config import ModelConfig
from megatron_prism.generate.settings import BackendConfig
from megatron_prism.planning import layout
from megatron_prism.rl.alarms import AlarmConfig
from megatron_prism.rl.prompts import PromptConfig, check_sources
from megatron_prism.rl.rewards import RewardConfig, check_buffer
from megatron_prism.rl.rollouts import RolloutConfig
from megatron_prism.rl.settings import ObjectiveConfig


class PolicyOptimizer(OptimizerConfig):
    """AdamW. The paper states its rate (Table 21); decay, betas and clipping were not found and are a training run's."""

    lr: PositiveFloat = 5e-7
    """peak learning rate (Table 21: 5e-7)"""
    weight_decay: float = 0.0
    """decoupled; not on norms and biases. Not reported; 0 is the default of open-instruct, which the paper trained with"""


class PolicySchedule(ScheduleConfig):
    """How the learning rate moves over the run: linear decay (Table 21)."""

    kind: Literal["constant", "linear", "cosine", "exponential", "wsd"] = "linear"
    """shape of the decay after warm-up"""
    final_lr_fraction: Fraction = 0.0
    """fraction of the peak at the end of the decay, and after it"""


class SamplesSection(Block):
    """Responses kept to be read: all of a step in OUTPUT/samples, some of them on the page OUTPUT/report.html."""

    interval: Positive | None = 10
    """steps between; the first and the last step are always kept. none: no other"""
    shown_prompts: Positive = 4
    """prompts of each kept step that the page shows, with all their responses"""
    shown_steps: Positive = 20
    """newest kept steps on the page"""


class RLConfig(Block):
    """A run of reinforcement learning with verifiable rewards."""

    stage: ClassVar[str] = "rl"

    output: Path
    """folder of the run"""
    model: ModelSection
    """what is trained, such as model.checkpoint=RUN"""
    prompts: PromptConfig
    rollout: RolloutConfig = RolloutConfig()
    generation: BackendConfig = BackendConfig()
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    steps: Positive = 1000
    """steps in all, each of them a batch of prompts (Table 21: 1,000)"""
    pack_length: Positive | None = None
    """tokens of a buffer that prompts with their responses are packed into, whole, for training; none: rollout.context (Table 21: 16,384 both)"""
    pad_multiple: Positive = 16
    """a packed sequence takes up a multiple of this; a multiple of 2 * parallel.cp under context parallelism"""
    generator_sleeps: bool | None = None
    """while the trainer works, the generator's weights wait in host memory; none: where it can (vllm: generation.server_flags.enable-sleep-mode)"""
    reference_on_host: bool = False
    """the reference waits in host memory, and crosses the bus twice a step; else it takes the memory of one more set of weights"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """of the trainer, as in a training run, and of the generator, unless generation.dtype says otherwise: the same keeps their mismatch small"""
    recompute: Literal["selective", "full"] | None = None
    """activations recomputed in the backward pass: selective: attention's; full: every layer's"""
    deterministic: bool = False
    """only kernels whose sums have a fixed order, so that equal runs are equal bit for bit on GPUs too; slower"""
    trainable: Trainable = "all"
    """all weights, or `attention`: its projections alone"""
    seed: NonNegative = 1234
    """of the responses; the order of prompts follows prompts.seed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where torch sees a device, the CPU elsewhere"""
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: TransformerEngine's on CUDA where installed, ours elsewhere"""
    attention_backend: Literal["auto", "flash", "fused"] = "auto"
    """of TransformerEngine's layers: flash: FlashAttention-4; fused: TransformerEngine's choice, cuDNN; auto: flash where installed, on Hopper"""
    grading_workers: Positive | None = None
    """processes that grade, on the machine of rank 0; none: half of its cores"""
    time_limit_minutes: PositiveFloat | None = None
    """save and stop after this long; start the same command again to go on"""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: PolicyOptimizer = PolicyOptimizer()
    schedule: PolicySchedule = PolicySchedule()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection | None = None
    evaluation: EvaluationSection | None = None
    alarms: AlarmConfig = AlarmConfig()
    samples: SamplesSection = SamplesSection()
    watchdog: WatchdogSection | None = Field(default=WatchdogSection(), exclude=True)
    """what ends a run that hangs; none: nothing does before its process groups give up"""
    log: LogConfig = Field(default_factory=LogConfig)

    @property
    def buffer_tokens(self) -> int:
        """Tokens of a packed buffer."""
        return self.pack_length or self.rollout.context

    @property
    def can_sleep(self) -> bool:
        """Whether the generator can hand its memory over."""
        return self.generation.backend == "transformers" or self.generation.server_flags.get("enable-sleep-mode") is True

    @property
    def packing(self) -> PackingOptions:
        """How prompts with their responses go into buffers."""
        return PackingOptions(self.buffer_tokens, self.pad_multiple)

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leaves room for a response."""
        return self.rollout.context - (self.rollout.max_new_tokens or 1)

    @property
    def training(self) -> TrainConfig:
        """The training recipe that the engine is built from; its data are the responses, so the blend that it names is not read."""
        shared = {name: getattr(self, name) for name in TrainConfig.model_fields if name in RLConfig.model_fields}
        data = {"blend": self.output, "seq_len": self.buffer_tokens, "packing": {"pad_multiple": self.pad_multiple}}
        return TrainConfig.model_validate({**shared, "data": data, "global_batch": self.prompts.prompts_per_step})

    @model_validator(mode="after")
    def _generates_in_the_trainers_precision(self) -> "RLConfig":
        if "dtype" not in self.generation.model_fields_set:
            dtype = "bfloat16" if self.precision == "bf16" else "float32"
            object.__setattr__(self, "generation", self.generation.model_copy(update={"dtype": dtype}))
        return self

    @model_validator(mode="after")
    def _starts_from_a_checkpoint(self) -> "RLConfig":
        if self.model.checkpoint is None or self.model.load != "weights":
            raise ValueError("RL starts from the weights of a checkpoint (prism convert, train, merge): give model.checkpoint, and no other start")
        return self

    @model_validator(mode="after")
    def _settings_fit(self) -> "RLConfig":
        if self.buffer_tokens < self.rollout.context:
            raise ValueError(f"pack_length={self.pack_length} must hold a prompt with its response, rollout.context={self.rollout.context}; raise it")
        if self.reward.overlong is not None and self.rollout.max_new_tokens is None:
            raise ValueError("reward.overlong counts back from rollout.max_new_tokens; give it")
        if self.reward.overlong is not None:
            check_buffer(self.reward.overlong, self.rollout.max_new_tokens or 0)
        if self.generator_sleeps and not self.can_sleep:
            raise ValueError("generator_sleeps=true with vllm needs generation.server_flags={enable-sleep-mode = true}, which GPUs alone have")
        sleeps = self.can_sleep if self.generator_sleeps is None else self.generator_sleeps
        if self.rollout.steps_ahead and self.generation.backend == "vllm" and sleeps:
            raise ValueError(
                "rollout.steps_ahead=1 writes while the trainer works, so servers cannot sleep meanwhile; give them GPUs of their own "
                "(generation.gpus) and set generator_sleeps=false, or steps_ahead=0"
            )
        if self.rollout.steps_ahead and self.generation.backend == "vllm" and self.generation.gpus is None and self.device != "cpu":
            raise ValueError(
                "rollout.steps_ahead=1 needs servers on other GPUs than the trainer's, and generation.gpus=none puts them on the first ones; name "
                'those behind the ranks\', such as generation.gpus=["6", "7"] beside --nproc-per-node 6'
            )
        if self.rollout.steps_ahead and self.objective.importance_cap is None:
            raise ValueError(
                "rollout.steps_ahead=1 trains on what older weights wrote, and with objective.importance_cap=none nothing corrects for it; set a cap "
                "(2 is the paper's), or steps_ahead=0"
            )
        if self.generation.on_too_long == "truncate_left":
            raise ValueError("generation.on_too_long=truncate_left would train on prompts that were not read; prompts that are too long are dropped")
        return self

    @model_validator(mode="after")
    def _is_a_training_run(self) -> "RLConfig":
        assert self.training is not None  # its own rules hold for it
        return self


def parents(cfg: RLConfig) -> list[Path]:
    """The artifacts that a run is made from: the checkpoint that it starts from, and the outputs of `prism prompts` that it asks."""
    assert cfg.model.checkpoint is not None
    folders = dict.fromkeys(source.file.parent for source in cfg.prompts.sources if source.file is not None)
    return [run_folder.resolve(cfg.model.checkpoint), *(folder for folder in folders if (folder / artifact.PROVENANCE).is_file())]


def check(cfg: RLConfig, world_size: int) -> tuple[ModelConfig, layout.ParallelPlan]:
    """Everything that can be known to be wrong before torch is imported. Errors: UserError."""
    training = cfg.training
    _check_lengths(cfg, families.load(recipe.model_files(training))[1].max_position_embeddings)
    config, model = recipe.trained_config(training)
    recipe.check_continuation(training, config)
    dp = max(world_size // cfg.parallel.model_ranks, 1)
    plan = layout.make_plan(model, cfg.parallel, world_size, cfg.buffer_tokens, dp * (cfg.parallel.pp if cfg.parallel.vpp else 1), 1)
    recipe.check_model(training, model, plan)
    check_log(cfg.log, begins=not (cfg.output / METRICS).exists())
    check_sources(cfg.prompts)
    return model, plan


def _check_lengths(cfg: RLConfig, positions: int) -> None:
    read = min(positions, cfg.generation.max_model_len or positions)
    if cfg.rollout.context > read:
        raise UserError(
            f"rollout.context={cfg.rollout.context} exceeds the {read} tokens that the generator reads (max_position_embeddings, or "
            "generation.max_model_len); lower rollout.context, or extend the model first (prism extend)"
        )
    if cfg.buffer_tokens > positions:
        raise UserError(f"pack_length={cfg.buffer_tokens} exceeds the model's largest length, {positions}; lower it")
