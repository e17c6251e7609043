"""The strong oracle: a grid whose training is chosen for each pair on the validation split.

A weak grid makes every method look good. So every candidate (start, learning rate, weight decay, scale, steps) trains
the whole grid once; each pair then takes the candidate with its best validation score, and is trained by it again with
every seed of the oracle. What is compared with is the mean over these seeds; how well one of them agrees with the
others is the ceiling of any method. The choice is not on the oracle's bill: the oracle was dearer than it looks.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from hyma_mllm.search.methods import Found, Search

Make = Callable[..., Search]
"""(changes of the search configuration, scale of the logits or None) -> a search."""

Unit = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""(name, work) -> what the work gave, now or in an earlier run."""


@dataclass(frozen=True)
class Candidate:
    """One way to train a pair.

    Attributes:
        lr, weight_decay: of AdamW.
        warm_start: `none`, or the closed form it starts from.
        scale: of the logits; None leaves the configuration's.
        steps: as a multiple of the grid's steps.
    """

    lr: float
    weight_decay: float = 0.01
    warm_start: Literal["none", "ridge", "whitened", "consensus", "words"] = "none"
    scale: float | None = None
    steps: float = 1.0

    @property
    def name(self) -> str:
        """For the table and the file names."""
        parts = [self.warm_start, f"lr{self.lr:g}", f"wd{self.weight_decay:g}", f"x{self.steps:g}"]
        return "-".join([*parts, f"scale{self.scale:g}"] if self.scale else parts)


VLM_CANDIDATES = (
    Candidate(3e-3),
    Candidate(3e-3, steps=2.0),
    Candidate(3e-3, 0.5, scale=15.0),
    Candidate(3e-4, warm_start="whitened", steps=0.1),
    Candidate(1e-3, warm_start="whitened", steps=0.5),
    Candidate(1e-3, 0.5, warm_start="whitened"),
    Candidate(1e-3, warm_start="whitened", scale=15.0),
    Candidate(3e-4, warm_start="consensus", steps=0.1),
    Candidate(1e-3, warm_start="consensus", steps=0.5),
    Candidate(1e-3, 0.5, warm_start="consensus"),
)
QUICK_VLM_CANDIDATES = (VLM_CANDIDATES[0], VLM_CANDIDATES[3], VLM_CANDIDATES[7])
MLLM_CANDIDATES = (
    Candidate(1e-2),
    Candidate(1.5e-2, warm_start="words"),
    Candidate(2e-3),
    Candidate(5e-3, warm_start="words"),
    Candidate(1e-2, 0.1),
)
QUICK_MLLM_CANDIDATES = MLLM_CANDIDATES[:2]
CANDIDATES = {
    ("vlm", False): VLM_CANDIDATES,
    ("vlm", True): QUICK_VLM_CANDIDATES,
    ("mllm", False): MLLM_CANDIDATES,
    ("mllm", True): QUICK_MLLM_CANDIDATES,
}
"""(case, quick?) -> what the oracle chooses from; the first is the plain grid, whose cost is the unit of all costs."""


@dataclass
class Oracle:
    """What the strong grid came to.

    Attributes:
        scores: [seeds, pairs] test score, percent.
        chosen: [pairs] name of each pair's candidate.
        flops, seconds: of the plain grid, the first candidate, over all pairs.
        own_flops, own_seconds: of one seed's training as chosen, the mean over seeds.
        steps: optimiser steps of one pair as chosen, the mean over pairs.
    """

    scores: list[list[float]]
    chosen: list[str]
    flops: float
    seconds: float
    own_flops: float
    own_seconds: float
    steps: float


def validation(found: Found) -> list[float]:
    """The validation score of every pair."""
    headline = next(iter(found.ranking.scores))
    return found.ranking.details[f"validation {headline}"]


def strong_oracle(
    make: Make, connector: str, candidates: Sequence[Candidate], seeds: Sequence[int], unit: Unit
) -> Oracle:
    """Choose, then train with every seed.

    Args:
        make: builds the search of a candidate.
        connector: family.
        candidates: to choose from.
        seeds: of the final trainings; the choice uses a seed that none of them has.
        unit: keeps what is finished.
    """
    # With one candidate there is nothing to choose, and the first seed's training says what it costs.
    spare = max(seeds) + 101 if len(candidates) > 1 else seeds[0]
    tried = {}
    for candidate in candidates:
        name = f"oracle-choice-{connector}-{candidate.name}"
        tried[candidate] = unit(name, partial(trained, make, connector, candidate, spare, None))
    plain = tried[candidates[0]]
    pairs = len(plain["validation"])
    best = [max(candidates, key=lambda one: tried[one]["validation"][pair]) for pair in range(pairs)]
    runs = []
    for seed in seeds:
        parts = {}
        for candidate in dict.fromkeys(best):
            members = [pair for pair in range(pairs) if best[pair] == candidate]
            if seed == spare:
                parts[candidate] = tried[candidate]
                continue
            name = f"oracle-{connector}-{seed}-{candidate.name}-{'.'.join(map(str, members))}"
            work = partial(trained, make, connector, candidate, seed, members)
            parts[candidate] = unit(name, work)
        runs.append(parts)
    return Oracle(
        scores=[[parts[best[pair]]["test"][pair] for pair in range(pairs)] for parts in runs],
        chosen=[candidate.name for candidate in best],
        flops=plain["flops"],
        seconds=plain["seconds"],
        own_flops=sum(part["flops"] for parts in runs for part in parts.values()) / len(seeds),
        own_seconds=sum(part["seconds"] for parts in runs for part in parts.values()) / len(seeds),
        steps=sum(runs[0][candidate]["steps"] for candidate in best) / pairs,
    )


def trained(
    make: Make, connector: str, candidate: Candidate, seed: int, members: Sequence[int] | None
) -> dict[str, Any]:
    """Scores and bill of these pairs (None: all), each trained alone by a candidate."""
    search = make({"warm_start": candidate.warm_start}, candidate.scale)
    config, spec = search.config, search.config.spec(connector)
    network = search.network("grid", spec, seed)
    pairs = search.pairs(search.everything() if members is None else members, seed)
    optimiser = replace(config.rival_optimiser, lr=candidate.lr, weight_decay=candidate.weight_decay)
    plan = search.plan(
        "grid", connector, seed, network, pairs, round(config.grid_steps * candidate.steps), optimiser=optimiser
    )
    outcome = search.trainer(plan, network).fit()
    found = search.score("grid", connector, seed, network, outcome)
    bill = found.ledger.phases["training"]
    # A closed form is billed for all pairs; these members' share of it is theirs.
    start = search.paid("grid", spec)
    share = 1.0 if members is None else len(members) / len(search.task.grid)
    return {
        "test": next(iter(found.ranking.scores.values())),
        "validation": validation(found),
        "flops": bill.flops - (1 - share) * start.flops,
        "seconds": bill.seconds - (1 - share) * start.seconds,
        "steps": outcome.step,
        "candidate": asdict(candidate),
    }
