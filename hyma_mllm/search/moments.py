"""Means and covariances of the training features, of all models and pairs at once, in one pass over the rows.

Every picture counts once: a picture with n captions gives each of them the weight 1 / n. Sums are taken in float64
about a pilot mean (that of the first chunk), which keeps a large common offset of the rows from drowning what varies.
Products within a chunk may be taken in float32, which halves their time, of rows in units of their first spread.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyma_mllm.errors import HymaError
from hyma_mllm.search.flops import upper_blocks
from hyma_mllm.search.task import VLMTask, captions_of

CHUNK_PICTURES = 1024
"""Pictures whose features are held in float64 at once, of all models together."""

CONSTANT = 1e-12
"""A model varies if its variance is above this share of its mean square: less is the rounding of float32 features."""


@dataclass
class ModelMoments:
    """What one model's training rows say on their own; float64.

    Attributes:
        mean: [width].
        covariance: [width, width] about the mean; empty [0, 0] where nobody asked for it.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def constant(self) -> bool:
        """Whether the rows are all the same, as far as float32 can tell; needs the covariance."""
        return bool(self.covariance.trace() <= CONSTANT * self.mean.square().sum())

    def ridge(self, strength: float) -> Tensor:
        """`strength` mean eigenvalues of the covariance."""
        return strength * self.covariance.diagonal().mean()

    def factor(self, strength: float) -> Tensor | None:
        """Cholesky factor of C + ridge * I; None for a model that does not vary."""
        if self.constant:
            return None
        lifted = self.covariance.clone()
        lifted.diagonal().add_(self.ridge(strength))
        factor: Tensor = torch.linalg.cholesky(lifted)
        return factor


def solved(right: Tensor, factor: Tensor | None) -> Tensor:
    """(C + ridge * I)^-1 `right`; zero for a model that does not vary."""
    return torch.zeros_like(right) if factor is None else torch.cholesky_solve(right, factor)


@dataclass
class Moments:
    """What the closed forms need of the training rows.

    Attributes:
        texts, images: per model number; the models that the pairs touch.
        cross: per pair index, covariance [d_text, d_image] float64 of text and image features; where it was asked for.
        rows: [pictures] int64 row numbers of the training pictures that have captions.
        captions: that were read.
        products: float64, or float32 where products of rows within a chunk were and may be computed so.
    """

    texts: dict[int, ModelMoments]
    images: dict[int, ModelMoments]
    cross: dict[int, Tensor]
    rows: Tensor
    captions: int
    products: torch.dtype


def training_moments(
    task: VLMTask,
    pairs: Sequence[int],
    image_covariances: bool,
    crosses: bool = True,
    products: torch.dtype = torch.float64,
) -> Moments:
    """One pass over the training pictures and their captions; each model's rows are read once, whatever its pairs.

    Args:
        task: features, in memory or memory-mapped.
        pairs: indices in the grid.
        image_covariances: also take the covariance of every image model.
        crosses: also take the covariance of every pair.
        products: float32 computes the models' own covariances to about 1e-7 of their trace.

    Raises:
        HymaError: if no training picture has a caption, or a model's features are not finite.
    """
    counts = task.first_caption[1:] - task.first_caption[:-1]
    pictures = task.train[counts[task.train] > 0]
    if not len(pictures):
        raise HymaError(
            "No training picture has a caption, so no connector can be computed from them; add data with captions."
        )
    wanted = [task.grid.pair(index) for index in dict.fromkeys(pairs)]
    images = {pair.vision: _Sums(image_covariances, products) for pair in wanted}
    texts = {pair.text: _Sums(True, products) for pair in wanted}
    cross: dict[int, Tensor] = {}
    for chunk in torch.split(pictures, CHUNK_PICTURES):
        captions, owner = captions_of(task.first_caption, chunk)
        ones, shares = torch.ones(len(chunk), dtype=torch.float64), 1 / counts[chunk][owner].double()
        seen = {v: sums.add(task.images[v][chunk], ones) for v, sums in images.items()}
        said = {t: _per_picture(sums.add(task.texts[t][captions], shares), owner, chunk) for t, sums in texts.items()}
        for pair in wanted if crosses else ():
            product = said[pair.text].T @ seen[pair.vision]
            cross[pair.index] = cross[pair.index].add_(product) if pair.index in cross else product
    captions_read = int(counts[pictures].sum())
    for pair in wanted if crosses else ():
        shift = torch.outer(texts[pair.text].total, images[pair.vision].total) / len(pictures)
        cross[pair.index] = (cross[pair.index] - shift) / len(pictures)
    return Moments(
        {t: sums.moments(len(pictures), task.grid.text_ids[t]) for t, sums in texts.items()},
        {v: sums.moments(len(pictures), task.grid.vision_ids[v]) for v, sums in images.items()},
        cross,
        pictures,
        captions_read,
        products,
    )


def centred_rows(task: VLMTask, found: Moments) -> Iterator[list[Tensor]]:
    """The training rows again, less their means: of the image models, then the text models of `found`.

    Yields:
        Per chunk of training pictures, [pictures, width] of each model, in the precision of the products but centred
        in float64, so that no mean drowns them; a text row is the mean of the picture's captions.
    """
    counts = task.first_caption[1:] - task.first_caption[:-1]
    for chunk in torch.split(found.rows, CHUNK_PICTURES):
        captions, owner = captions_of(task.first_caption, chunk)
        rows = [_wide(task.images[v][chunk]) - model.mean for v, model in found.images.items()]
        for t, model in found.texts.items():
            said = _wide(task.texts[t][captions]) - model.mean
            shares = (1 / counts[chunk][owner].double()).to(said.device)
            rows.append(_per_picture(said * shares[:, None], owner, chunk))
        yield [x.to(found.products) for x in rows]


def add_upper(square: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right, which is symmetric, to the upper part of `square` [width, width]; `mirrored` fills the rest."""
    for first, last in upper_blocks(len(square)):
        square[first:last, first:] += left[:, first:last].T @ right[:, first:]


def mirrored(square: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of `square`."""
    return square.triu() + square.triu(1).T


class _Sums:
    """Running sums of one model's weighted rows about a pilot mean."""

    def __init__(self, squares: bool, products: torch.dtype) -> None:
        self.squares, self.products = squares, products
        self.pilot = self.total = self.square = torch.zeros(0)
        self.unit = torch.ones(())

    def add(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Count rows [n, width] with weights [n]; returns the rows less the pilot, times their weights, float64."""
        wide = _wide(rows)
        weights = weights.to(wide.device)[:, None]
        if not len(self.pilot):
            width = wide.shape[1]
            self.pilot = (wide * weights).sum(0) / weights.sum()
            self.total = torch.zeros_like(self.pilot)
            self.square = wide.new_zeros((width, width) if self.squares else (0, 0))
            # float32 has no room for squares of 1e-20 or 1e20.
            spread = (wide - self.pilot).square().mean().sqrt()
            self.unit = torch.where(spread > 0, spread, 1.0)
        wide = wide - self.pilot
        weighted = wide * weights
        self.total += weighted.sum(0)
        if self.squares:
            add_upper(self.square, *((x / self.unit).to(self.products) for x in (weighted, wide)))
        return weighted

    def moments(self, count: int, name: str) -> ModelMoments:
        """The moments, for a total weight of `count`."""
        shift = self.total / count
        mean = self.pilot + shift
        covariance = self.square
        if self.squares:
            covariance = mirrored(self.square) * (self.unit.square() / count) - torch.outer(shift, shift)
        if not _finite((mean, covariance)):
            raise HymaError(f"The training features of {name} are not all finite; embed them again, or drop the model.")
        return ModelMoments(mean, covariance)


def _wide(rows: Tensor) -> Tensor:
    return rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)  # mps has no float64


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _per_picture(captions: Tensor, owner: Tensor, pictures: Tensor) -> Tensor:
    """Sums [pictures, width] of the rows [captions, width] of each picture."""
    sums = captions.new_zeros(len(pictures), captions.shape[1])
    return sums.index_add_(0, owner.to(captions.device), captions)
