"""The stress set of `stability.py`: matched features of drawn encoders, some of which have a fault."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hyma_mllm.search.samplers import generator

STEPS = {256: 64, 1024: 48, 4096: 24, 16384: 16}
"""Batch -> optimiser steps: the price of a step grows with the square of the batch."""

Fault = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(features of the sound encoder, features of another one [rows, width], random numbers) -> the faulty features."""


@dataclass(frozen=True)
class Setting:
    """The size of the stress set.

    Attributes:
        train, validation, gallery: rows of each split.
        latent: dimensions that pictures and captions share.
        noise: standard deviation of what is an encoder's own, where an entry's signal has about one.
        image_widths, text_widths: of the sound and of the faulty encoder.
        hidden: width of the connectors' hidden layer (`mlp1`).
        steps: batch -> optimiser steps.
    """

    train: int = 20_000
    validation: int = 100
    gallery: int = 500
    latent: int = 32
    noise: float = 0.6
    image_widths: tuple[int, int] = (64, 48)
    text_widths: tuple[int, int] = (48, 64)
    hidden: int = 64
    steps: dict[int, int] = field(default_factory=lambda: dict(STEPS))

    @property
    def chance(self) -> float:
        """R@10 of random scores over the gallery, percent."""
        return 1000 / self.gallery


def heavy_tails(sound: Tensor, own: Tensor, g: torch.Generator) -> Tensor:
    """Four dimensions hundreds of times larger, by the size of a Student-t variable with two degrees of freedom."""
    shape = (len(own), 4)
    t = torch.randn(shape, generator=g) / torch.empty(shape).exponential_(generator=g).sqrt()
    return torch.cat([own[:, :4] * 300 * t.abs(), own[:, 4:]], dim=1)


def dominating_mean(sound: Tensor, own: Tensor, g: torch.Generator) -> Tensor:
    """A mean a hundred times as long as what varies around it."""
    mean = F.normalize(torch.randn(own.shape[1], generator=g), dim=0)
    moved: Tensor = own + 100 * own.norm(dim=1).mean() * mean
    return moved


def rank_deficient(sound: Tensor, own: Tensor, g: torch.Generator) -> Tensor:
    """The projection to random directions, a quarter as many as the encoder is wide."""
    basis = torch.linalg.qr(torch.randn(own.shape[1], own.shape[1] // 4, generator=g)).Q
    projected: Tensor = own @ basis @ basis.T
    return projected


FAULTS: dict[str, Fault] = {
    "none": lambda sound, own, g: own,
    "heavy tails": heavy_tails,
    "dominating mean": dominating_mean,
    "tiny norms": lambda sound, own, g: own * 1e-6,
    "huge norms": lambda sound, own, g: own * 1e6,
    "rank deficient": rank_deficient,
    "duplicate": lambda sound, own, g: sound,
    "constant": lambda sound, own, g: own[:1].expand(len(own), -1),
    "bf16": lambda sound, own, g: own,
}
"""`bf16` stores all features in bfloat16 and trains under mixed precision; see `encoders` here and `run_once` there."""


def view(latent: Tensor, width: int, noise: float, g: torch.Generator) -> Tensor:
    """Features [rows, width] of one encoder: a linear and a bent view of the latent [rows, latent], and noise."""
    straight, bent = (torch.randn(latent.shape[1], width, generator=g) / latent.shape[1] ** 0.5 for _ in range(2))
    own = torch.randn(len(latent), width, generator=g)
    features: Tensor = latent @ straight + torch.tanh(2 * latent @ bent) + noise * own
    return features


def encoders(fault: str, setting: Setting, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Raw features [rows, width] of the sound and the faulty image encoder, and of the sound and the faulty text one.

    Rows are those of training, validation and gallery, one after another; float32, or bfloat16 for that fault.
    """
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(setting.train + setting.validation + setting.gallery, setting.latent, generator=g)
    sides = []
    for number, widths in enumerate((setting.image_widths, setting.text_widths)):
        sound, other = (view(latent, width, setting.noise, g) for width in widths)
        # Numbers of its own: below their faults the encoders are the same.
        faulty = FAULTS[fault](sound, other, generator(seed, number))
        sides.append([x.bfloat16() if fault == "bf16" else x for x in (sound, faulty)])
    return sides[0], sides[1]
