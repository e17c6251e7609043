"""RMS norms of a frozen LLM in fewer passes over memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, arXiv 1910.07467, equation 4) with a frozen gain.

    In float32 and rounded once. Autograd would keep what each operation read, and pass over it again one by one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, gain, scale)
        return wide.mul_(scale).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With n = x * scale and g = gradient * gain: scale * (g - n * mean(g * n))."""
        x, gain, scale = ctx.saved_tensors
        normed = x.to(torch.float32, copy=True).mul_(scale)
        pulled = gradient * gain
        along = torch.linalg.vecdot(pulled, normed).div_(x.shape[-1])[..., None]
        return pulled.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), None, None


class FrozenRMSNorm(nn.Module):
    """An RMS norm whose gain does not train.

    Attributes:
        weight: [width], the published one.
        offset: what the gain is above the weight: 0, or 1 in Gemma.
        eps: added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, offset: float, eps: float) -> None:
        super().__init__()
        self.weight, self.offset, self.eps = weight, offset, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same, in the same dtype."""
        found: Tensor = _RMSNorm.apply(x, self.weight.float() + self.offset, self.eps)
        return found


def lean_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Put `FrozenRMSNorm` in the place of every norm that says the same, in place; all others stay as they are."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            found = _lean(module)
            if found is not None:
                setattr(parent, name, found)
    return model


@torch.no_grad()
def _lean(module: nn.Module) -> FrozenRMSNorm | None:
    """The same norm in our way; None if it is no RMS norm, or one that says something else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if (
        not type(module).__name__.endswith("RMSNorm")
        or not isinstance(eps, float)
        or not isinstance(weight, nn.Parameter)
    ):
        return None
    if weight.ndim != 1 or len(list(module.parameters())) != 1 or weight.is_meta:
        return None
    draws = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    draws[2:] *= eps**0.5  # eps counts here
    probe = draws.to(weight)
    said = module(probe).float()
    for offset in (0.0, 1.0):
        lean = FrozenRMSNorm(weight, offset, eps)
        # 16 bits may have been rounded twice, before and behind the gain.
        if (lean(probe).float() - said).norm() <= 2 * torch.finfo(weight.dtype).eps * said.norm():
            return lean
    return None
