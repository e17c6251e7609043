"""The features of all models over all rows: each picture once per image encoder, each text once per text encoder."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hyma_mllm.data.collection import Part
from hyma_mllm.data.embedding import EmbeddingConfig, StoreTarget, embed
from hyma_mllm.data.features import FeatureStore, check_aligned
from hyma_mllm.data.manifest import FeatureKind
from hyma_mllm.data.pictures import checked_picture
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.paths import cache_dir
from hyma_mllm.zoo.cards import ModelCard, base_id
from hyma_mllm.zoo.text import load_text_encoder
from hyma_mllm.zoo.vision import VisionEncoder, load_image_encoder, share_weights

logger = logging.getLogger(__name__)


@dataclass
class Bill:
    """What the embedding of a run's features has cost, whenever it was paid.

    Attributes:
        seconds: wall-clock time.
        flops: forward passes.
        items: pictures and texts embedded.
    """

    seconds: float = 0.0
    flops: float = 0.0
    items: int = 0


def store_path(fingerprint: str, card: ModelCard, kind: FeatureKind, config: EmbeddingConfig) -> Path:
    """Where the features of one model over one source are kept."""
    slug = "".join(letter if letter.isalnum() or letter in "-.+@" else "_" for letter in base_id(card.id))
    precision = f"{config.compute_dtype}-{config.storage_dtype}"
    return cache_dir() / "features" / fingerprint / f"{slug}-{card.revision[:12]}-{kind}-{precision}"


class Library:
    """Embeds what is missing and reads what is there.

    Args:
        config: batches, shards, precision.
        accelerator: of a launch whose processes share the work; None for a process by itself.

    Attributes:
        config, accelerator: as given.
        bill: what the features that were asked for have cost.
        device: where models run.
    """

    def __init__(self, config: EmbeddingConfig, accelerator: Accelerator | None = None) -> None:
        self.config = config
        self.accelerator = accelerator
        self.bill = Bill()
        self.device = accelerator.device if accelerator else torch.device("cpu")

    def images(self, cards: Sequence[ModelCard], parts: Sequence[Part]) -> list[ShardedRows]:
        """Pooled features of all pictures, per card [pictures, width] memory-mapped, parts one after another."""
        found: dict[str, list[FeatureStore]] = {}
        unique = list({base_id(card.id): card for card in cards}.values())
        for group in share_weights([plain_card(card) for card in unique]):
            encoder: list[VisionEncoder] = []
            for part in parts:
                for name, store in self._images_of(group, part, encoder).items():
                    found.setdefault(name, []).append(store)
        return self._joined(cards, found)

    def texts(
        self, cards: Sequence[ModelCard], items: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    ) -> list[ShardedRows]:
        """Features of all texts, per card [texts, width] memory-mapped.

        Args:
            cards: the text encoders.
            items: (fingerprint, [(key, text)]) per source.
        """
        found: dict[str, list[FeatureStore]] = {}
        for card in {base_id(card.id): plain_card(card) for card in cards}.values():
            for fingerprint, texts in items:
                found.setdefault(card.id, []).append(self._texts_of(card, fingerprint, texts))
        return self._joined(cards, found)

    def _images_of(self, group: list[ModelCard], part: Part, encoder: list[VisionEncoder]) -> dict[str, FeatureStore]:
        """The stores of cards that share one forward pass; `encoder` keeps the loaded model for the next part."""
        targets = {card.id: self._target(card, "image", part.fingerprint) for card in group}
        cost = CostFile(targets[group[0].id].path)

        def model() -> VisionEncoder:
            if not encoder:
                encoder.append(load_image_encoder(*group, device=self.device))
            return encoder[0]

        def load(number: int) -> Tensor:
            return model().transform(checked_picture(part.rows[number].key, part.rows[number].image))

        def forward(pixels: list[Tensor]) -> Mapping[str, Tensor]:
            stacked = torch.stack(pixels).to(self.device)
            if not cost.known:
                cost.measure(lambda: model().pooled(stacked[:1]))
            return model().pooled(stacked)

        if not all((target.path / "manifest.json").exists() for target in targets.values()):
            # Threads that decode must not race to load the encoder.
            model()
        label = f"{'+'.join(base_id(card.id) for card in group)} on {part.source.name}"
        stores = embed(
            [row.key for row in part.rows],
            load,
            forward,
            targets,
            part.fingerprint,
            self.config,
            label,
            self.accelerator,
        )
        self._charge(list(stores.values()), cost)
        return stores

    def _texts_of(self, card: ModelCard, fingerprint: str, texts: Sequence[tuple[str, str]]) -> FeatureStore:
        target = self._target(card, "text", fingerprint)
        cost = CostFile(target.path)
        encoder = None if (target.path / "manifest.json").exists() else load_text_encoder(card, device=self.device)

        def forward(batch: list[str]) -> Mapping[str, Tensor]:
            assert encoder is not None
            if not cost.known:
                cost.measure(lambda: encoder.encode(batch[:1]))
            return {card.id: encoder.encode(batch, batch_size=len(batch))}

        keys = [key for key, _ in texts]
        stores = embed(
            keys,
            lambda number: texts[number][1],
            forward,
            {card.id: target},
            fingerprint,
            self.config,
            f"{card.id}, {len(keys)} texts",
            self.accelerator,
        )
        self._charge(list(stores.values()), cost)
        return stores[card.id]

    def _target(self, card: ModelCard, kind: FeatureKind, fingerprint: str) -> StoreTarget:
        path = store_path(fingerprint, card, kind, self.config)
        return StoreTarget(path, card.id, card.revision, kind, card.width, unit_norm=False)

    def _charge(self, stores: Sequence[FeatureStore], cost: "CostFile") -> None:
        """Put stores that one forward pass filled on the bill: their seconds add up, their items are the same."""
        self.bill.seconds += sum(store.manifest.seconds for store in stores)
        self.bill.flops += cost.flops_per_item * len(stores[0])
        self.bill.items += len(stores[0])

    @staticmethod
    def _joined(cards: Sequence[ModelCard], found: Mapping[str, Sequence[FeatureStore]]) -> list[ShardedRows]:
        """The rows of all sources per card, none read; a control has its model's own object."""
        first = next(iter(found.values()))
        for stores in found.values():
            for one, other in zip(first, stores, strict=True):
                check_aligned([one, other])
        joined = {name: ShardedRows.joined(store.rows for store in stores) for name, stores in found.items()}
        return [joined[base_id(card.id)] for card in cards]


def plain_card(card: ModelCard) -> ModelCard:
    """The card without a control's `#n`."""
    return replace(card, id=base_id(card.id))


class CostFile:
    """FLOPs per item of a store, measured on one item when it is first embedded and kept beside the store."""

    def __init__(self, store: Path) -> None:
        self._path = store.with_name(f"{store.name}.cost.json")
        self.flops_per_item = 0.0
        try:
            self.flops_per_item = float(json.loads(self._path.read_text())["flops_per_item"])
            self.known = True
        except (FileNotFoundError, ValueError):
            self.known = False

    def measure(self, forward: Callable[[], object]) -> None:
        """Count the operations of one forward pass of one item."""
        self.flops_per_item = measured_flops(forward)
        self.known = True
        # In place: a temporary file that a kill leaves here would stay for good, and half a file is measured again.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"flops_per_item": self.flops_per_item}))


def measured_flops(forward: Callable[[], object]) -> float:
    """Floating point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())
