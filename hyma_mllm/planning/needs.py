"""What a run needs of disk, memory and GPU, beside what there is: a table, and a refusal that says what would fit.

Needs of one phase are there at the same time; of two phases only the larger counts. Everything is reckoned from
configuration and model cards: no weights are loaded and no picture is read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Generic, Literal, TypeVar

from rich.table import Table

from hyma_mllm.errors import HymaError

C = TypeVar("C")

Place = Literal["cache", "run", "memory", "gpu"]
Phase = Literal["always", "loading", "embedding", "training", "updating", "scoring"]

PLACES: dict[Place, str] = {
    "cache": "free disk of the cache",
    "run": "free disk of the run directory",
    "memory": "free memory for each process",
    "gpu": "free GPU memory for each process",
}
"""Place -> what there is of it."""

OFFERS = 3
"""Settings that a refusal names at most."""


@dataclass(frozen=True)
class Need:
    """Room that something takes.

    Attributes:
        what: in a few words, e.g. `tokens of dinov2-small@8`.
        place: where; memory and GPU are those of one process.
        bytes: how much.
        phase: when.
    """

    what: str
    place: Place
    bytes: float
    phase: Phase = "always"


@dataclass(frozen=True)
class Room:
    """What a machine has left.

    Attributes:
        free: place -> bytes; no `gpu` where none is used.
        one_disk: whether cache and run directory are on one disk.
    """

    free: dict[Place, float]
    one_disk: bool


@dataclass(frozen=True)
class Plan:
    """Needs against room.

    Attributes:
        needs: all of them.
        room: what there is.
    """

    needs: tuple[Need, ...]
    room: Room

    def at(self, place: Place) -> list[Need]:
        """The needs of a place; those of one disk are all the cache's."""
        return [need for need in self.needs if self._merged(need.place) == place]

    def peak(self, place: Place) -> float:
        """Bytes that are needed at once: what is always there, and the largest phase."""
        by_phase: dict[Phase, float] = {}
        for need in self.at(place):
            by_phase[need.phase] = by_phase.get(need.phase, 0.0) + need.bytes
        return by_phase.pop("always", 0.0) + max(by_phase.values(), default=0.0)

    def short(self) -> Place | None:
        """The first place that has too little room."""
        return next((place for place, free in self.room.free.items() if self.peak(place) > free), None)

    def largest(self, place: Place) -> Need:
        """The largest need of a place, of those that stand at its peak."""
        return max((need for need in self.at(place) if self._at_peak(need)), key=lambda need: need.bytes)

    def table(self) -> Table:
        """All needs, place by place, and their peaks beside what is free."""
        lines = Table(title="what the run needs", title_justify="left")
        for name in ("needed", "when", "GB", "of"):
            lines.add_column(name, justify="right" if name == "GB" else "left")
        for place, free in self.room.free.items():
            for need in sorted(self.at(place), key=lambda need: -need.bytes):
                lines.add_row(need.what, need.phase, gigabytes(need.bytes), "")
            lines.add_row("at its peak", "", gigabytes(self.peak(place)), f"{gigabytes(free)} GB {PLACES[place]}")
            lines.add_section()
        return lines

    def _merged(self, place: Place) -> Place:
        return "cache" if place == "run" and self.room.one_disk else place

    def _at_peak(self, need: Need) -> bool:
        place = self._merged(need.place)
        sums = {phase: sum(n.bytes for n in self.at(place) if n.phase == phase) for phase in _phases(self.at(place))}
        return need.phase == "always" or sums[need.phase] == max(sums.values())


@dataclass(frozen=True)
class Change(Generic[C]):
    """A setting that would take less room.

    Attributes:
        key: its name on the command line, e.g. `search.batch`.
        words: the key with its value, as a sentence says it.
        apply: configuration -> the changed one.
    """

    key: str
    words: str
    apply: Callable[[C], C]


def setting(key: str, value: Any) -> Change[Any]:
    """The change of one option, by its dotted name, of a configuration made of dataclasses."""

    def apply(config: Any) -> Any:
        section, _, name = key.rpartition(".")
        if not section:
            return replace(config, **{name: value})
        return replace(config, **{section: replace(getattr(config, section), **{name: value})})

    said = f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower() if value is True else value
    return Change(key, f"{key} {said}", apply)


def halves(size: int, least: int) -> Iterator[int]:
    """Half of a number, a quarter, ..., none below `least`."""
    size //= 2
    while size >= max(least, 1):
        yield size
        size //= 2


def gigabytes(size: float) -> str:
    """Bytes in GB (1e9), with as many digits as matter."""
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:,.0f}"


def refuse_what_cannot_fit(config: C, plan: Callable[[C], Plan], changes: Sequence[Change[C]]) -> Plan:
    """The plan of a configuration, if it fits.

    Args:
        config: what was asked for.
        plan: configuration -> plan.
        changes: settings to try where it does not fit, those that change the result least first.

    Raises:
        HymaError: it does not fit; it names what is short, the largest need, and settings with which it would fit, each
            of them tried.
    """
    found = plan(config)
    place = found.short()
    if place is None:
        return found
    need = found.largest(place)
    offers = what_fits(config, lambda changed: plan(changed).short() is None, changes)
    mend = "it would fit with " + ", or ".join(offers) if offers else "no setting makes it fit; list fewer models"
    raise HymaError(
        f"The run needs {gigabytes(found.peak(place))} GB and there are {gigabytes(found.room.free[place])} GB of "
        f"{PLACES[place]}, most of it for {need.what} ({gigabytes(need.bytes)} GB); {mend}."
    )


def what_fits(config: C, fits: Callable[[C], bool], changes: Sequence[Change[C]]) -> list[str]:
    """Settings with which a configuration fits: single ones, else pairs, else as many as it takes; at most `OFFERS`.

    Args:
        config: the configuration.
        fits: whether a changed one does.
        changes: to be tried; of one option the mildest first.

    Returns:
        In words. Of the same options only the first that fits is told.
    """
    for size in (1, 2):
        found: dict[frozenset[str], str] = {}
        for some in combinations(changes, size):
            keys = frozenset(change.key for change in some)
            if len(keys) == size and keys not in found and fits(_applied(config, some)):
                found[keys] = _words(some)
        if found:
            return list(found.values())[:OFFERS]
    needed: list[Change[C]] = []
    for change in changes:
        needed.append(change)
        if fits(_applied(config, needed)):
            return [_words(_without_what_is_not_needed(config, fits, needed))]
    return []


def _without_what_is_not_needed(config: C, fits: Callable[[C], bool], changes: Sequence[Change[C]]) -> list[Change[C]]:
    """A part of the changes with which it still fits, none of which can be left out; later ones of an option win."""
    needed = list(changes)
    for one in reversed(changes):
        rest = [other for other in needed if other is not one]
        needed = rest if fits(_applied(config, rest)) else needed
    return needed


def _applied(config: C, changes: Sequence[Change[C]]) -> C:
    for change in changes:
        config = change.apply(config)
    return config


def _words(changes: Sequence[Change[C]]) -> str:
    return " and ".join(change.words for change in changes)


def _phases(needs: Sequence[Need]) -> set[Phase]:
    return {need.phase for need in needs if need.phase != "always"}
