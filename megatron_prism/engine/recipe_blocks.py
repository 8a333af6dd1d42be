"""The blocks that recipes of training and of RL are made of: what a run starts from, reads, saves, validates, exports and is asked. No torch here."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_prism.config import Block, NonNegative, Positive
from megatron_prism.data_prep.packing import OverLength, PackingOptions


class ModelSection(Block):
    """What to start from: a checkpoint, or random weights of a config.json."""

    checkpoint: Path | None = None
    """checkpoint folder, or a training run (its newest complete step)"""
    load: Literal["weights", "all"] = "weights"
    """weights: a fresh optimizer at step 0; all: optimizer, step and data position too (to branch a decay off a stable run)"""
    hf_config: Path | None = None
    """config.json of a supported family, for random weights"""
    tokenizer: Path | None = None
    """tokenizer folder that goes with hf_config"""

    @model_validator(mode="after")
    def _one_start(self) -> "ModelSection":
        if (self.checkpoint is None) == (self.hf_config is None):
            raise ValueError("give exactly one start: model.checkpoint, or model.hf_config (with model.tokenizer) for random weights")
        if self.hf_config is not None and self.tokenizer is None:
            raise ValueError("model.hf_config needs model.tokenizer, so that checkpoints and exports carry it")
        return self


class PackingSection(Block):
    """Whole documents packed into sequences, each seen by itself alone, in place of documents end to end: docs/packing.md."""

    pad_multiple: Positive = 16
    """a document takes up a multiple of this; must divide data.seq_len, and be a multiple of 2 * parallel.cp under context parallelism"""
    over_length: OverLength = "refuse"
    """documents longer than seq_len: refuse them, truncate them to their first seq_len tokens, or split them into chunks"""
    overlap: NonNegative = 0
    """tokens that a chunk repeats of the chunk before (over_length=split); their loss counts once"""
    window_documents: Positive = 10_000
    """documents that are packed together; more fill better and take longer to find a sample in"""

    def options(self, seq_len: int) -> PackingOptions:
        """For sequences of this length. Errors: UserError for values that do not fit together."""
        return PackingOptions(seq_len, self.pad_multiple, self.over_length, self.overlap)


class DataSection(Block):
    """What to read."""

    blend: Path
    """output of `prism prep`, or a blend.toml"""
    seq_len: Positive
    """tokens per sequence"""
    mask_end_of_document: bool = False
    """leave out the loss of the token after each end of document"""
    loss: Literal["all", "answers"] = "all"
    """whose loss counts: all tokens, or answers alone, of sources that know them (docs/sft.md); `loss` in blend.toml goes before it, for a source"""
    on_change: Literal["refuse", "replan"] = "refuse"
    """when the blend is another than the checkpoint's. replan: go on under its weights and sources from there, every source where it stood"""
    packing: PackingSection | None = None
    """none: documents follow each other, cut every seq_len tokens"""

    @model_validator(mode="after")
    def _packing_fits(self) -> "DataSection":
        if self.packing is not None:
            self.packing.options(self.seq_len)
        return self


class CheckpointSection(Block):
    """When to save, and what to keep."""

    save_interval: Positive | None = None
    """steps between checkpoints; the last step is always saved"""
    keep_last: Positive | None = 2
    """newest checkpoints kept; none: all"""
    keep_every: Positive | None = None
    """steps whose checkpoints are never deleted: multiples of this"""
    async_save: bool = False
    """write in the background: the run waits for a copy to host memory alone (one at a time; as much of it as a rank writes)"""
    on_corrupt: Literal["refuse", "previous"] = "refuse"
    """when the newest checkpoint is damaged. previous: go on from the newest whole one before it, and keep the damaged folder aside"""


class ValidationSection(Block):
    """Loss on the held-out split of the blend."""

    interval: Positive
    """steps between validations; the last step is always validated"""
    batches: Positive = 4
    """global batches read each time, the same ones"""


class ExportSection(Block):
    """Hugging Face exports."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """none: as the run computes (bfloat16 or float32)"""
    interval: Positive | None = None
    """steps between exports into OUTPUT/hf_steps (multiples of checkpoint.save_interval); the last step always goes to OUTPUT/hf"""


class EvaluationSection(Block):
    """Tasks that the model answers while it trains: docs/evaluate.md."""

    interval: Positive
    """steps between evaluations (multiples of checkpoint.save_interval: a checkpoint answers); the last step is always evaluated"""
    tasks: Annotated[list[str], Field(min_length=1)]
    """names of tasks and of suites in the registry, or paths of task files"""
    num_questions: Positive | None = 32
    """the first so many of each task; none: all of them"""
    data_dir: Path | None = None
    """folder with the tasks' data sets, for machines without network"""
    n: Positive | None = None
    """completions per question; none: as the task says"""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0 is greedy; none: as the task says"""
    max_new_tokens: Positive | None = None
    """none: as the task says"""
    batch_size: Positive = 32
    """completions at a time on each rank"""
    chat: bool | None = None
    """ask in the model's chat template, as a user's turn; none: as the task says"""
    without_chat_template: Literal["plain", "refuse"] = "plain"
    """a tokenizer without a chat template on a task that asks in a chat: give the plain prompt, or refuse before training"""
    on_too_long: Literal["refuse", "shorten", "truncate_left"] = "refuse"
    """a prompt that leaves no room for max_new_tokens: refuse before training, write less after it, or drop its first tokens"""
    grading_workers: NonNegative | None = None
    """processes that grade beside the generation; 0: none, the rank itself does; none: half of the cores, shared by the ranks of a machine"""
