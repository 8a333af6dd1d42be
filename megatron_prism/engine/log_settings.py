"""The block of a recipe that says where the figures of a run go beside `metrics.jsonl`. Checked before torch is imported."""

import importlib.util
import os
from typing import Annotated

from pydantic import Field

from megatron_prism.config import Block, Positive
from megatron_prism.engine import prometheus
from megatron_prism.errors import UserError


class LogConfig(Block):
    """Where the metrics of a run go beside `metrics.jsonl`."""

    interval: Positive = 10
    """steps between two lines"""
    tensorboard: bool = False
    """write TensorBoard events into OUTPUT/tensorboard"""
    wandb: str | None = None
    """Weights & Biases project, or ENTITY/PROJECT; a run that is started again goes on in the same W&B run"""
    mlflow: str | None = None
    """MLflow experiment; a run that is started again goes on in the same MLflow run"""
    prometheus: Annotated[int, Field(strict=True, ge=0, le=65535)] | None = None
    """port of 127.0.0.1 at which a Prometheus server of this machine finds the newest figures; 0: a free one, which is told (docs/status.md)"""


def check_log(config: LogConfig, begins: bool) -> None:
    """Refuse a tracker whose package is not installed, and a run that begins with a port that is taken, before any work. Errors: UserError."""
    for asked, package in ((config.tensorboard, "tensorboard"), (config.wandb, "wandb"), (config.mlflow, "mlflow")):
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"log.{package} is set, but the package {package} is not installed; pip install {package}, or drop the key")
    if config.prometheus is None:
        return
    if importlib.util.find_spec("prometheus_client") is None:
        raise UserError("log.prometheus is set, but the package prometheus_client is not installed; pip install prometheus_client, or drop the key")
    if begins and os.environ.get("RANK", "0") == "0":
        prometheus.check_port(config.prometheus)
