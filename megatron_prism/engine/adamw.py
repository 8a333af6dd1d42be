"""AdamW as megatron-core's distributed optimizer calls it, over this rank's ranges of the weights.

Owns: where the fp32 master weights and the moments of a range are, and their types. Stands where megatron-core expects the "precision-aware" form of
TransformerEngine's FusedAdam: gradients of any type lie beside a weight, as its `decoupled_grad`, and the weights that are updated are the model's.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_prism.config import OptimizerConfig
from megatron_prism.engine.fp8_params import Fp8Weights
from megatron_prism.kernels.adamw import Hyperparameters, adamw, join, split

MASTER = "master_param"


class AdamW:
    """param_groups: megatron-core's, each with `params` (flat ranges), `lr`, `weight_decay`, and from the first step on `step`.

    state[weight]: exp_avg, exp_avg_sq, and for a bf16 weight its master: fp32, or the int16 half that the weight lacks. An fp32 weight is its own
    master. gradient_scale: what the next step's gradients count times, one number on the device; NaN: the step changes nothing. fp8: weights that the
    model keeps in FP8; their fp32 masters stand among `params`, and after every step they are made of them.
    """

    def __init__(self, param_groups: list[dict[str, Any]], config: OptimizerConfig, fp8: Fp8Weights) -> None:
        self.param_groups = param_groups
        self.config = config
        self.fp8 = fp8
        self.moments = torch.bfloat16 if config.moments == "bf16" else torch.float32
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.gradient_scale: Tensor | None = None
        for group in param_groups:
            group.setdefault("step", 0)

    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            settings = Hyperparameters(group["lr"], self.config.betas, self.config.eps, group["weight_decay"], group["step"])
            for weight in group["params"]:
                gradient: Tensor | None = getattr(weight, "decoupled_grad", None)  # beside the weight, of any type
                if gradient is not None:
                    state = self._state(weight)
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    adamw(weight, gradient, *moments, settings, master=state.get(MASTER), gradient_scale=self.gradient_scale)
        self.fp8.quantise()

    def uncount(self) -> None:
        """Forget that the last step was counted: it changed nothing."""
        for group in self.param_groups:
            group["step"] -= 1

    def owned(self) -> list[Tensor]:
        """The ranges of the model's weights that this rank updates, as they lie in the model."""
        masters = {id(one.master) for one in self.fp8.owned}
        plain = [weight for group in self.param_groups for weight in group["params"] if id(weight) not in masters]
        return plain + [one.data for one in self.fp8.owned]

    def states(self) -> list[Tensor]:
        """What is held beside them: masters and moments, and the scales of FP8 weights."""
        return [tensor for state in self.state.values() for tensor in state.values()] + [one.master for one in self.fp8.owned] + self.fp8.inverses

    def initialize(self) -> None:
        """Make the state of every weight."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._state(weight)

    def forget(self) -> None:
        """As before the first step."""
        self.state.clear()
        for group in self.param_groups:
            group["step"] = 0

    def values(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight's master and moments in fp32: `param`, `exp_avg`, `exp_avg_sq`.

        What is kept in fp32 is given as it is, the rest as copies in host memory: small states are chosen where the device has no room.
        """
        state = self._state(weight)
        master = state.get(MASTER, weight)
        held = {"param": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        wide = {name: tensor.float().cpu() for name, tensor in held.items() if tensor.dtype == torch.bfloat16}
        return held | wide | ({"param": join(weight, master).cpu()} if master.dtype == torch.int16 else {})

    @torch.no_grad()
    def put(self, weight: Tensor, values: dict[str, Tensor]) -> None:
        """Take over what `values` gave; a bf16 weight follows its master."""
        state = self._state(weight)
        state["exp_avg"].copy_(values["exp_avg"])
        state["exp_avg_sq"].copy_(values["exp_avg_sq"])
        master = state.get(MASTER)
        upper, lower = split(values["param"]) if master is not None and master.dtype == torch.int16 else (values["param"], values["param"])
        weight.copy_(upper)
        if master is not None:
            master.copy_(lower)

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        if weight not in self.state:
            self.state[weight] = {name: torch.zeros_like(weight, dtype=self.moments) for name in ("exp_avg", "exp_avg_sq")}
            if weight.dtype == torch.bfloat16:
                self.state[weight][MASTER] = torch.zeros_like(weight, dtype=torch.int16) if self.config.split_master else weight.float()
        return self.state[weight]
