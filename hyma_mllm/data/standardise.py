"""Standardised features: what connectors read and predict, in place of the raw output of a frozen encoder."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Power = Literal["none", "signed_sqrt"]
Scale = Literal["one", "each"]

NORM_FLOOR = 1e-6
"""Norms below it are not divided by: what is left of a constant feature after centring is rounding noise."""

LIFT = 10.0
"""Most that a channel is scaled up beyond the mean channel: what hardly varies may be noise."""

FIT_ROWS = 65536
"""Rows that are held in float64 at once while fitting."""


@dataclass
class StandardiseConfig:
    """How the features of a store are standardised before they meet a connector.

    Attributes:
        image_power: what each entry of an image feature goes through, `none` or `signed_sqrt` (sign(x) * sqrt(|x|)).
        centre: subtract the mean feature of the training split (images and texts).
        image_scale: divide image features by one RMS (`one`), or each channel by its own (`each`), which keeps a few
            large channels from drowning the rest, and changes the space in which retrieval is judged.
        text_scale: the same of text features.
    """

    image_power: Power = "signed_sqrt"
    centre: bool = True
    image_scale: Scale = "one"
    text_scale: Scale = "each"


class Standardiser(nn.Module):
    """x -> L2-normalise -> power -> minus mean -> times a constant scale -> L2-normalise (only if `unit`).

    Images use `unit=True`: the signed square root tames the few large entries of a feature (Perronnin, Sanchez and
    Mensink 2010, section 3.1), and the result lies on the sphere where InfoNCE compares. Texts use `unit=False` without
    a power: that is an affine map of the L2-normalised feature, so that `folded` can hide it in a connector.

    Attributes:
        mean: buffer [width] float32, mean over the training rows after the power; zeros when not centred.
        scale: buffer [width] float32, makes the entries of the training rows have unit RMS: all channels together
            (`one`; 1 when `unit`, which it would not change) or each (`each`, lifted at most `LIFT` times the mean).
        flags: buffer [2] bool, (signed square root?, unit?), so that a state dict says everything.
        signed_sqrt, unit: the flags as Python booleans.
    """

    mean: Tensor
    scale: Tensor
    flags: Tensor

    def __init__(self, width: int, power: Power = "none", unit: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("flags", torch.tensor([power == "signed_sqrt", unit]))
        self.signed_sqrt, self.unit = power == "signed_sqrt", unit
        self.register_load_state_dict_pre_hook(_one_scale_for_all)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_read_flags)  # type: ignore[no-untyped-call]

    @classmethod
    def fit(
        cls,
        features: Tensor | Iterable[Tensor],
        power: Power = "none",
        centre: bool = True,
        unit: bool = True,
        scale: Scale = "one",
    ) -> "Standardiser":
        """Fit mean and scale on training features; sums are taken in float64.

        Args:
            features: [rows, width], floating, at least one row; or chunks of it, so that they are never held together
                (chunks of `FIT_ROWS` rows give the bits of the whole).
            power: what each entry goes through after the L2 normalisation.
            centre: subtract the mean.
            unit: L2-normalise at the end.
            scale: of all channels together, or of each.

        Returns:
            The fitted module, on the device of `features`.

        Raises:
            ValueError: if there is no row.
        """
        standardiser, rows = None, 0
        for chunk in torch.split(features, FIT_ROWS) if isinstance(features, Tensor) else features:
            if standardiser is None:
                standardiser = cls(chunk.shape[1], power, unit).to(chunk.device)
                total = torch.zeros(chunk.shape[1], dtype=torch.float64, device=chunk.device)
                squares = torch.zeros_like(total)
            shaped = standardiser._shape(chunk.double())
            total += shaped.sum(0)
            squares += shaped.square().sum(0)
            rows += len(chunk)
        if standardiser is None or not rows:
            raise ValueError("cannot fit a standardiser on no rows")
        mean = total / rows if centre else torch.zeros_like(total)
        # mean (x - m)^2 = mean x^2 - m (2 mean x - m), over rows, then over entries
        spread = (squares / rows - mean * (2 * total / rows - mean)).clamp_min(0)
        rms = float(spread.mean().sqrt())
        standardiser.mean.copy_(mean)
        if rms > NORM_FLOOR and scale == "each":
            standardiser.scale.copy_(1 / spread.sqrt().clamp_min(rms / LIFT))
        elif rms > NORM_FLOOR and not unit:
            standardiser.scale.fill_(1 / rms)
        return standardiser

    def forward(self, x: Tensor) -> Tensor:
        """Standardise features.

        Args:
            x: [..., width], floating.

        Returns:
            [..., width] in the wider dtype of `x` and the buffers; never NaN for finite input (a zero row stays
            finite).
        """
        x = (self._shape(x) - self.mean) * self.scale
        return F.normalize(x, dim=-1, eps=NORM_FLOOR) if self.unit else x

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The Linear that does on L2-normalised features what the given one does on standardised features.

        W (s * (x - m)) + b = (W * s) x + (b - (W * s) m), s scaling the columns of W.

        Args:
            weight: [out, width], of the connector's first Linear.
            bias: [out].

        Returns:
            Weight [out, width] and bias [out] in the given dtypes; computed in float64.

        Raises:
            ValueError: if this standardiser is not affine (it has a power or a final normalisation).
        """
        if self.signed_sqrt or self.unit:
            raise ValueError("only a standardiser without power and without final normalisation folds into a Linear")
        scaled = weight.double() * self.scale.double()
        shifted = bias.double() - scaled @ self.mean.double()
        return scaled.to(weight.dtype), shifted.to(bias.dtype)

    def _shape(self, x: Tensor) -> Tensor:
        """L2 normalisation and power, [..., width]."""
        x = F.normalize(x, dim=-1)
        if not self.signed_sqrt:
            return x
        # The clamp keeps the gradient at 0 finite; sign(0) = 0 keeps the value.
        return x.sign() * x.abs().clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _one_scale_for_all(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Files written before channels had scales of their own hold one number."""
    key = f"{prefix}scale"
    if key in state and state[key].dim() == 0:
        state[key] = state[key].expand(module.get_buffer("scale").shape)


def _read_flags(module: nn.Module, incompatible_keys: Any) -> None:
    """Bring the Python flags in line with the loaded buffers."""
    assert isinstance(module, Standardiser)
    module.signed_sqrt, module.unit = (bool(flag) for flag in module.flags.tolist())
