"""Vision tokens of pictures: stored where they fit the disk budget, computed as they are asked for where not.

Tokens take far more room than pooled features (16 tokens of width 1280 in fp16 are 41 kB a picture), so which towers
are stored is decided, and can be said, before anything is computed: see `TokenLibrary.plan`.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from hyma_mllm.data.collection import Part
from hyma_mllm.data.embedding import EmbeddingConfig, StoreTarget, embed
from hyma_mllm.data.features import FeatureStore
from hyma_mllm.data.library import Bill, CostFile, measured_flops, plain_card, store_path
from hyma_mllm.data.manifest import MANIFEST_FILE, DtypeName
from hyma_mllm.data.pictures import checked_picture
from hyma_mllm.data.rows import Row
from hyma_mllm.data.token_codes import TokenDtype, as_features, decode, encode, row_bytes, row_entries
from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.cards import ModelCard, base_id
from hyma_mllm.zoo.vision_tokens import VisionTower, load_tower

logger = logging.getLogger(__name__)

SHARD_BYTES = 64_000_000
"""A shard is held in memory while it fills, and a kill loses it."""

STATISTICS_ROWS = 256
"""Pictures whose tokens are held in float64 at once."""

LEAST_DEVIATION = 0.1
"""Least standard deviation of a channel, as a share of the median one. Last grids of CNNs have channels that hardly any
picture excites (EfficientNet-Lite0: 0.001 against a largest entry of 6)."""


@dataclass
class TokenConfig:
    """How vision tokens are computed and stored.

    Attributes:
        disk_gb: room for stored tokens in GB (1e9 bytes); towers are stored in the order in which they are listed while
            it lasts, and those that do not fit are run again for every batch.
        memory_mb: memory in MB (1e6 bytes), for each tower that is not stored, for the tokens of the pictures that were
            asked for last.
        storage_dtype: precision on disk and in that memory: `fp32`, `fp16` or `bf16`; `int8` or `fp8` take half the
            room of 16 bits, with a scale for every 64 channels (docs/cluster.md says what they change).
        compute_dtype: precision of the forward pass, `fp32` or `bf16` (autocast).
        batch_size: pictures of one forward pass.
        workers: threads that read and decode ahead of the forward pass; 0 decodes between the passes.
    """

    disk_gb: float = 8.0
    memory_mb: float = 256.0
    storage_dtype: TokenDtype = "fp16"
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 32
    workers: int = 2

    def __post_init__(self) -> None:
        if self.disk_gb < 0 or self.memory_mb < 0 or self.batch_size < 1:
            raise HymaError(
                f"tokens.disk_gb is {self.disk_gb}, tokens.memory_mb {self.memory_mb} and tokens.batch_size "
                f"{self.batch_size}; the first two must not be negative, the last at least 1."
            )


@dataclass(frozen=True)
class TokenPlan:
    """What becomes of one tower's tokens.

    Attributes:
        tower: its id.
        pictures: how many.
        tokens, width: of one picture.
        bytes: what storing them takes.
        stored: whether they are stored, or computed as they are asked for.
    """

    tower: str
    pictures: int
    tokens: int
    width: int
    bytes: int
    stored: bool

    def __str__(self) -> str:
        where = "stored" if self.stored else "over the disk budget, so computed as they are asked for"
        shape = f"{self.pictures} pictures x {self.tokens} tokens x {self.width}"
        return f"{self.tower}: {shape}, {self.bytes / 1e6:.1f} MB, {where}"


class TokenSource(Protocol):
    """The tokens of one tower over all pictures.

    Attributes:
        card: the tower.
    """

    card: ModelCard

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Tokens [rows, tokens, width] float32 on the CPU, of pictures by number (int64 [rows], any order, repeats)."""
        ...


class StoredTokens:
    """Tokens in feature stores, parts one after another; rows are read from memory-mapped files.

    Attributes:
        card: the tower.
    """

    def __init__(self, card: ModelCard, stores: Sequence[FeatureStore]) -> None:
        self.card = card
        self._stores = tuple(stores)
        self._starts = torch.tensor([0, *(len(store) for store in stores)]).cumsum(0)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Tensor) -> Tensor:
        index = _checked(rows, len(self))
        tokens, width = self.card.tokens or 0, self.card.width
        found = torch.empty(len(index), tokens, width)
        owner = torch.searchsorted(self._starts, index, right=True) - 1
        for number in sorted(set(owner.tolist())):
            here = (owner == number).nonzero()[:, 0]
            store = self._stores[number]
            form = cast(TokenDtype, store.manifest.dtype)
            found[here] = decode(store[index[here] - self._starts[number]], form, tokens, width)
        return found


class ComputedTokens:
    """Tokens computed as they are asked for; those of the last pictures are kept.

    Attributes:
        card: the tower.
    """

    def __init__(self, tower: VisionTower, pictures: Sequence[Row], config: TokenConfig, bill: Bill) -> None:
        self.card = tower.card
        self._tower, self._pictures, self._config, self._bill = tower, pictures, config, bill
        self._kept: OrderedDict[int, Tensor] = OrderedDict()
        self._room = int(config.memory_mb * 1e6 / _picture_bytes(tower.card, config))
        self._flops = 0.0

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, rows: Tensor) -> Tensor:
        index = _checked(rows, len(self)).tolist()
        fresh = {number: self._kept.pop(number) for number in dict.fromkeys(index) if number in self._kept}
        missing = [number for number in dict.fromkeys(index) if number not in fresh]
        for at in range(0, len(missing), self._config.batch_size):
            batch = missing[at : at + self._config.batch_size]
            fresh.update(zip(batch, self._compute(batch), strict=True))
        found = self._decoded(torch.stack([fresh[number] for number in index])) if index else self._nothing()
        self._kept.update(fresh)
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)
        return found

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.card.tokens or 0, self.card.width)

    def _decoded(self, rows: Tensor) -> Tensor:
        return decode(rows, self._config.storage_dtype, self.card.tokens or 0, self.card.width)

    def _compute(self, batch: Sequence[int]) -> Tensor:
        """[batch, entries of a stored row] in the storage dtype on the CPU, and its cost on the bill."""
        began = time.perf_counter()
        if self._config.workers:
            with ThreadPoolExecutor(self._config.workers, thread_name_prefix="load") as pool:
                pixels = torch.stack(list(pool.map(self._load, batch)))
        else:
            pixels = torch.stack([self._load(number) for number in batch])
        if not self._flops:
            self._flops = measured_flops(lambda: self._tower.tokens(pixels[:1]))
        device = next(self._tower.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self._config.compute_dtype == "bf16"):
            exact = self._tower.tokens(pixels).to("cpu", torch.float32)
        stored = encode(exact, self._config.storage_dtype)
        # Codes are always finite, whatever they were made of.
        bad = ~torch.isfinite(exact).flatten(1).all(1) | ~torch.isfinite(stored).all(1)
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise HymaError(
                f"The tokens of {self._pictures[batch[row]].key} by {self.card.id} are not finite in "
                f"{self._config.storage_dtype}; set tokens.storage_dtype to bf16 or fp32, or remove that picture."
            )
        self._bill.seconds += time.perf_counter() - began
        self._bill.flops += self._flops * len(batch)
        self._bill.items += len(batch)
        return stored

    def _load(self, number: int) -> Tensor:
        return self._tower.preprocess(checked_picture(self._pictures[number].key, self._pictures[number].image))


class TokenLibrary:
    """Computes and stores what is missing and fits, reads what is there.

    Args:
        config: budget, precision, batches.
        accelerator: of a launch whose processes share the work; None for a process by itself.

    Attributes:
        bill: what all tokens have cost: stored ones whenever they were computed, the others as they are asked for.
    """

    def __init__(self, config: TokenConfig, accelerator: Accelerator | None = None) -> None:
        self.config = config
        self.accelerator = accelerator
        self.bill = Bill()
        self._device = accelerator.device if accelerator else torch.device("cpu")

    def plan(self, cards: Sequence[ModelCard], parts: Sequence[Part]) -> list[TokenPlan]:
        """What will be stored and what it takes, per card; nothing is computed.

        Towers take from the budget in order; one that is stored already stays so, whatever the budget. A control has
        its tower's plan.
        """
        left = self.config.disk_gb * 1e9
        plans: dict[str, TokenPlan] = {}
        for card in map(plain_card, cards):
            if card.id in plans:
                continue
            pictures = sum(len(part.rows) for part in parts)
            needed = pictures * _picture_bytes(card, self.config)
            there = all((self._target(card, part).path / MANIFEST_FILE).exists() for part in parts)
            stored = there or needed <= left
            left -= needed if stored else 0
            plans[card.id] = TokenPlan(card.id, pictures, card.tokens or 0, card.width, needed, stored)
        return [plans[base_id(card.id)] for card in cards]

    def tokens(self, cards: Sequence[ModelCard], parts: Sequence[Part]) -> list[TokenSource]:
        """The tokens of all pictures, per card, parts one after another; a control has its tower's own object.

        Args:
            cards: the vision towers.
            parts: one row a picture.

        Raises:
            HymaError: a tower or a picture that cannot be read, a full disk, or a store of something else.
        """
        sources: dict[str, TokenSource] = {}
        for card, plan in zip(map(plain_card, cards), self.plan(cards, parts), strict=True):
            if card.id in sources:
                continue
            logger.info("tokens of %s", plan)
            if plan.stored:
                sources[card.id] = self._stored(card, parts)
            else:
                pictures = [row for part in parts for row in part.rows]
                sources[card.id] = ComputedTokens(load_tower(card, self._device), pictures, self.config, self.bill)
        return [sources[base_id(card.id)] for card in cards]

    def _stored(self, card: ModelCard, parts: Sequence[Part]) -> StoredTokens:
        tower: list[VisionTower] = []
        stores = [self._embedded(card, part, tower) for part in parts]
        return StoredTokens(card, stores)

    def _embedded(self, card: ModelCard, part: Part, loaded: list[VisionTower]) -> FeatureStore:
        """The store of one part; `loaded` keeps the tower for the next one."""
        target = self._target(card, part)
        cost = CostFile(target.path)
        if not (target.path / MANIFEST_FILE).exists() and not loaded:
            loaded.append(load_tower(card, self._device))

        def load(number: int) -> Tensor:
            return loaded[0].preprocess(checked_picture(part.rows[number].key, part.rows[number].image))

        def forward(pixels: list[Tensor]) -> Mapping[str, Tensor]:
            stacked = torch.stack(pixels)
            if not cost.known:
                cost.measure(lambda: loaded[0].tokens(stacked[:1]))
            return {card.id: as_features(loaded[0].tokens(stacked), self.config.storage_dtype)}

        label = f"tokens of {card.id} on {part.source.name}"
        keys = [row.key for row in part.rows]
        config, targets = self._embedding(card), {card.id: target}
        store = embed(keys, load, forward, targets, part.fingerprint, config, label, self.accelerator)[card.id]
        self.bill.seconds += store.manifest.seconds
        self.bill.flops += cost.flops_per_item * len(store)
        self.bill.items += len(store)
        return store

    def _embedding(self, card: ModelCard) -> EmbeddingConfig:
        rows = max(1, SHARD_BYTES // _picture_bytes(card, self.config))
        return EmbeddingConfig(
            batch_size=self.config.batch_size,
            shard_rows=min(rows, EmbeddingConfig.shard_rows),
            compute_dtype=self.config.compute_dtype,
            # Codes are bytes to it, and it casts to what the store says.
            storage_dtype=cast(DtypeName, self.config.storage_dtype),
            workers=self.config.workers,
        )

    def _target(self, card: ModelCard, part: Part) -> StoreTarget:
        path: Path = store_path(part.fingerprint, card, "tokens", self._embedding(card))
        entries = row_entries(self.config.storage_dtype, card.tokens or 0, card.width)
        return StoreTarget(path, card.id, card.revision, "tokens", entries, unit_norm=False)


def channel_statistics(source: TokenSource, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over the tokens of some pictures, streamed in float64.

    Batches are merged by the update of Chan, Golub and LeVeque (1979), which loses no digits to a large mean. The
    deviation of a nearly constant channel is raised to `LEAST_DEVIATION` of the median one, so that dividing by it
    cannot blow up what other pictures show there; where it would still be 0 it is 1.

    Args:
        source: the tokens.
        rows: int64 [n] picture numbers, at least one; the training ones.

    Returns:
        (mean [width], standard deviation [width], all above 0), float64 on the CPU.

    Raises:
        ValueError: if there is no row.
    """
    if len(rows) == 0:
        raise ValueError("cannot take the statistics of no rows")
    count = 0
    mean = squares = torch.zeros(source.card.width, dtype=torch.float64)
    for at in range(0, len(rows), STATISTICS_ROWS):
        batch = source[rows[at : at + STATISTICS_ROWS]].flatten(0, 1).double()
        both = count + len(batch)
        shift = batch.mean(0) - mean
        squares = squares + ((batch - batch.mean(0)) ** 2).sum(0) + shift**2 * count * len(batch) / both
        mean = mean + shift * len(batch) / both
        count = both
    deviation = (squares / count).sqrt()
    median = deviation.median()
    raised = deviation.clamp_min(LEAST_DEVIATION * float(median))
    return mean, torch.where(raised > 0, raised, 1.0)


def _picture_bytes(card: ModelCard, config: TokenConfig) -> int:
    """Bytes of one picture's tokens in the storage dtype."""
    return row_bytes(config.storage_dtype, card.tokens or 0, card.width)


def _checked(rows: Tensor, pictures: int) -> Tensor:
    """The picture numbers on the CPU."""
    index = rows.to("cpu", torch.int64)
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= pictures):
        raise IndexError(f"pictures {int(index.min())} to {int(index.max())} of {pictures}")
    return index
