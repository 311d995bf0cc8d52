"""What a network computes in while it trains, and the scale of losses that float16 needs.

Parameters, their gradients, the optimizer and averages are float32 in any precision. ``CTM`` and ``EDMDenoiser`` cast
the preconditioned image to their ``dtype``, and layers cast their weights to the dtype of the image that they meet; the
casts are part of the graph, so gradients arrive in float32. Norm statistics, softmax, embeddings of levels and labels,
preconditioning and losses stay in float32 by the way they are written. So training needs no ``torch.autocast``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ctm_fast.errors import ConfigError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name -> the ``dtype`` of a model in training. fp16 wants a :class:`LossScale`."""


def compute_dtype(name: str) -> torch.dtype:
    """The entry of :data:`PRECISIONS`; ConfigError if there is none."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, got {name!r}")
    return PRECISIONS[name]


def resolve(name: str, device: torch.device) -> str:
    """``name``; for ``auto``, bf16 on GPUs that compute in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


class LossScale:
    """A factor on losses that keeps float16 gradients above the smallest number and below the largest one.

    It halves when a step was not finite, and doubles after ``growth_interval`` finite ones in a row. What
    ``torch.amp.GradScaler`` does, with the flag given and not its own: averages and other ranks need the same flag.
    Nothing here waits for the device.

        scale.scale(loss).backward()
        norm = torch.nn.utils.get_total_norm(gradients)      # not finite wherever a gradient is not
        found_inf = guard.check(step, losses, norm)
        optimizer.grad_scale = scale.value                   # divided by in the optimizer's pass
        ...
        scale.update(found_inf)

    Args:
        start: the first factor; powers of two cost no precision.
    """

    def __init__(self, device: torch.device, *, start: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.growth_interval = growth_interval
        self.value = torch.tensor(start, device=device)
        self._finite = torch.zeros((), dtype=torch.int32, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        return loss * self.value

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Count a step, not finite if ``found_inf`` (float32 scalar) is not zero."""
        torch._amp_update_scale_(self.value, self._finite, found_inf, 2.0, 0.5, self.growth_interval)

    def state_dict(self) -> dict[str, Tensor]:
        """References, not copies."""
        return {"value": self.value, "finite": self._finite}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        self.value.copy_(state["value"])
        self._finite.copy_(state["finite"])
