"""The contrastive search's task: stored features of all models, drawn as batches and scored on held-out concepts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hyma_mllm import connectors
from hyma_mllm.connectors import ConnectorGroup, ConnectorSpec
from hyma_mllm.data.resident import FeatureRows
from hyma_mllm.metrics.retrieval import RANKING_SCORE, recall_at
from hyma_mllm.metrics.zero_shot import accuracy, class_embeddings
from hyma_mllm.pairs import PairGrid
from hyma_mllm.search import flops
from hyma_mllm.search.pair_loss import ConnectorSource, Scored
from hyma_mllm.search.samplers import generator

EVALUATION_PAIRS = 8
"""Pairs mapped at once while scoring: bounds memory, changes no value."""


def captions_of(first_caption: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The captions of some pictures, picture by picture.

    Args:
        first_caption: [all pictures + 1] int64, see `VLMTask`.
        pictures: [pictures] int64 row numbers.

    Returns:
        Row numbers of their captions [captions], and the position in `pictures` that each belongs to [captions].
    """
    count = first_caption[pictures + 1] - first_caption[pictures]
    owner = torch.repeat_interleave(torch.arange(len(pictures)), count)
    within = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    return first_caption[pictures][owner] + within, owner


@dataclass
class Batch:
    """Some pictures, each with one of its captions.

    Attributes:
        pictures: [batch] int64 row numbers of the image features, distinct.
        captions: [batch] int64 row numbers of the text features.
    """

    pictures: Tensor
    captions: Tensor


@dataclass
class ZeroShotSet:
    """Held-out pictures to be classified.

    Attributes:
        name: of the class set.
        pictures: [pictures] int64 row numbers of the image features.
        labels: [pictures] int64 class numbers.
        templates: prompts per class.
        prompts: per text encoder, standardised features [classes * templates, width], class by class.
    """

    name: str
    pictures: Tensor
    labels: Tensor
    templates: int
    prompts: list[Tensor]


@dataclass
class VLMTask:
    """Everything a contrastive search reads; nothing here is trained.

    Attributes:
        grid: the pairs.
        images: per image encoder, standardised unit rows [pictures, width], in memory or on disk.
        texts: per text encoder, standardised rows [captions, width], likewise; captions of one picture stand together.
        first_caption: [pictures + 1] int64; captions of picture p are rows first_caption[p] to first_caption[p + 1].
        train, validation, test: [pictures of the split] int64 row numbers.
        caption_group: [captions] int64; captions that say the same share a number, so that each is a hit for all.
        zero_shot: class sets over test pictures.
        tiled: whether the loss recomputes its logits in the backward pass, which the bill counts.
    """

    grid: PairGrid
    images: Sequence[FeatureRows]
    texts: Sequence[FeatureRows]
    first_caption: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor
    caption_group: Tensor
    zero_shot: list[ZeroShotSet] = field(default_factory=list)
    tiled: bool = True

    def batch(self, pictures: Tensor, seed: int, number: int) -> Batch:
        """These pictures, each with one caption drawn by (seed, number)."""
        first, last = self.first_caption[pictures], self.first_caption[pictures + 1]
        share = torch.rand(len(pictures), generator=generator(seed, 3, number), dtype=torch.float64)
        return Batch(pictures, first + (share * (last - first)).long())

    def share(self, batch: Batch, part: slice) -> Batch:
        """The pictures of a batch that one process works on."""
        return Batch(batch.pictures[part], batch.captions[part])

    def visit_groups(self) -> None:
        """Any pairs may share a visit."""

    def losses(self, groups: list[ConnectorGroup], spec: ConnectorSpec, objective: nn.Module, batch: Batch) -> Tensor:
        """Loss of each pair, [pairs] in the order the pairs were asked for, float32."""
        images = {
            v: self.images[v][batch.pictures] for v in {self.grid.pair(int(k)).vision for g in groups for k in g.pairs}
        }
        texts = {
            t: self.texts[t][batch.captions] for t in {self.grid.pair(int(k)).text for g in groups for k in g.pairs}
        }
        # Equal captions of two pictures are no negatives of each other, and a batch has no picture twice.
        same = self.caption_group[batch.captions]
        parts, positions = [], []
        for group in groups:
            pairs = [self.grid.pair(int(index)) for index in group.pairs]
            mapped = connectors.apply(spec, group.params, torch.stack([texts[p.text] for p in pairs]))
            target = torch.stack([images[p.vision] for p in pairs])
            parts.append(objective(target, mapped, same.to(target.device)))
            positions.append(group.positions)
        order = torch.argsort(torch.cat(positions))
        joined = torch.cat(parts)
        return joined[order.to(joined.device)]

    def validate(self, source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        """Retrieval on the validation split."""
        scores = self.scores(source, spec, self.validation)
        return Scored({"retrieval": scores.pop("retrieval")}, scores, self.scoring_flops(spec, self.validation))

    def evaluate(self, source: ConnectorSource, spec: ConnectorSpec) -> Scored:
        """Retrieval and zero-shot classification on the test split."""
        details = self.scores(source, spec, self.test)
        scores = {"retrieval": details.pop("retrieval")} | self.classify(source, spec)
        validation = self.validate(source, spec)
        details["validation retrieval"] = validation.scores["retrieval"]
        return Scored(scores, details, self.scoring_flops(spec, self.test) + validation.flops)

    @torch.no_grad()
    def scores(self, source: ConnectorSource, spec: ConnectorSpec, pictures: Tensor) -> dict[str, list[float]]:
        """Retrieval scores of every pair over these pictures, in percent; `retrieval` is the mean of both R@10."""
        captions, owner = captions_of(self.first_caption, pictures)
        table: dict[str, list[float]] = {}
        for vision, text, params in self._each(source):
            mapped = self._map(spec, params, self.texts[text][captions])
            found = recall_at(
                self.images[vision][pictures],
                mapped,
                owner.to(mapped.device),
                caption_group=self.caption_group[captions],
            )
            found["retrieval"] = found.pop(RANKING_SCORE)
            for name, value in found.items():
                table.setdefault(name, []).append(value)
        return table

    @torch.no_grad()
    def classify(self, source: ConnectorSource, spec: ConnectorSpec) -> dict[str, list[float]]:
        """Zero-shot top-1 accuracy of every pair on every class set, in percent."""
        table: dict[str, list[float]] = {f"zero-shot/{task.name}": [] for task in self.zero_shot}
        for vision, text, params in self._each(source):
            for task in self.zero_shot:
                classes = class_embeddings(self._map(spec, params, task.prompts[text]), task.templates)
                found = accuracy(self.images[vision][task.pictures], classes, task.labels.to(classes.device))
                table[f"zero-shot/{task.name}"].append(found["top-1"])
        return table

    def visit_flops(self, spec: ConnectorSpec, pairs: Sequence[int], batch: int) -> float:
        """Analytic forward and backward FLOPs of the task loss of one visit, without the hypernetwork."""
        total = 0.0
        for index in pairs:
            shape = self.grid.shape(index)
            total += flops.connector_step_flops(spec, shape, batch)
            total += flops.similarity_step_flops(batch, shape[1], self.tiled)
        return total

    def scoring_flops(self, spec: ConnectorSpec, pictures: Tensor) -> float:
        """Analytic FLOPs of `scores` over these pictures."""
        captions, _ = captions_of(self.first_caption, pictures)
        total = 0.0
        for index in range(len(self.grid)):
            shape = self.grid.shape(index)
            total += 2.0 * len(captions) * (spec.parameters(*shape) + len(pictures) * shape[1])
        return total

    def _each(self, source: ConnectorSource) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(vision, text, one pair's params) of the whole grid in index order."""
        for start in range(0, len(self.grid), EVALUATION_PAIRS):
            found: dict[int, dict[str, Tensor]] = {}
            chunk = range(start, min(start + EVALUATION_PAIRS, len(self.grid)))
            for group in source(chunk):
                for row, index in enumerate(group.pairs.tolist()):
                    found[index] = {name: value[row : row + 1] for name, value in group.params.items()}
            for index in chunk:
                pair = self.grid.pair(index)
                yield pair.vision, pair.text, found[index]

    @staticmethod
    def _map(spec: ConnectorSpec, params: dict[str, Tensor], texts: Tensor) -> Tensor:
        """Unit rows [texts, width] in the image space."""
        return nn.functional.normalize(connectors.apply(spec, params, texts[None])[0].float(), dim=-1)
