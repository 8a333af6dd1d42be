"""Settings of generation backends, as blocks of a recipe. Light: no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_prism.config import Block, NonNegative, Positive


class BackendConfig(Block):
    """What runs the model that writes."""

    backend: Literal["transformers", "vllm"] = "transformers"
    """transformers: in this process, for small models and any machine; vllm: a server process of its own, for everything large"""
    batch_size: Positive = 32
    """completions at a time; for vllm the most that a server works on (256 is usual)"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of weights and activations"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """of the transformers backend; auto: CUDA where there is a device. vllm runs where it was built for"""
    on_too_long: Literal["refuse", "shorten", "truncate_left"] = "refuse"
    """a prompt that leaves no room for max_new_tokens: stop with an error, write less after it, or drop its first tokens (counted)"""
    max_model_len: Positive | None = None
    """tokens of prompt and completion together; none: as many as the model has positions. A lower number saves vllm memory"""
    python: Path | None = None
    """vllm: the Python of the environment that vllm is installed in; none: $PRISM_VLLM_PYTHON"""
    servers: Positive = 1
    """vllm: server processes, each with a copy of the model; requests are spread over them"""
    tensor_parallel: Positive = 1
    """vllm: GPUs that one server spreads the model over"""
    gpus: tuple[str, ...] | None = None
    """vllm: the GPUs of the servers of this machine, named as in CUDA_VISIBLE_DEVICES; none: the first of those that this process sees"""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """vllm: share of each GPU's memory that weights and cache may fill"""
    start_timeout_seconds: Positive = 1800
    """vllm: a server that does not answer by then is given up"""
    stall_seconds: Positive = 600
    """vllm: a server with work that answers nothing and whose engine writes no token for so long is started again"""
    max_restarts: NonNegative = 3
    """vllm: how often in a row, with no work done in between, a server that died is started again before the run ends"""
    log: Path | None = None
    """vllm: folder of the servers' logs; none: a temporary folder, named in every error"""
    server_flags: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """vllm: further flags of `vllm serve`, such as {max-num-batched-tokens = 16384}; true is a flag without a value"""
