"""Successive halving inside one training: the better pairs go on from where they are, with their optimiser's state.

Jamieson and Talwalkar (arXiv 1502.07943, section 3): every rung gets the same share of the budget, so that what is
left of the pairs is trained ever longer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.search.budget import Budget
from hyma_mllm.search.method import Setting
from hyma_mllm.search.plan import UNLIMITED, Leg
from hyma_mllm.search.trainer import Trainer

Points = list[tuple[float, float]]
"""(samples seen, validation score) of one pair, as often as it was looked at."""


def survivors(members: Sequence[int], scores: Sequence[float], eta: float) -> list[int]:
    """The best of the members, one in `eta` and rounded up; of equal ones the first in grid order; in grid order.

    Args:
        members: indices of pairs.
        scores: of every pair of the grid.
        eta: above 1.
    """
    count = math.ceil(len(members) / eta - 1e-9)
    return sorted(sorted(members, key=lambda pair: (-scores[pair], pair))[:count])


@dataclass
class Race:
    """A training in which ever fewer pairs go on; its state is in the trainer's notes, and so in every checkpoint.

    Attributes:
        search: what it costs and where it is logged.
        spec: the connector family.
        seed: of the order of pairs.
        trainer: of a bank of all pairs, resumed.
        budget: of the whole race, closed-form starts included.
    """

    search: Setting
    spec: ConnectorSpec
    seed: int
    trainer: Trainer
    budget: Budget

    def __post_init__(self) -> None:
        if not self.trainer.notes:
            self.trainer.notes = {"stage": -1, "rungs": [0] * len(self.search.task.grid), "points": {}}

    @property
    def rungs(self) -> list[int]:
        """Rungs that each pair has ended, [pairs]."""
        found: list[int] = self.trainer.notes["rungs"]
        return found

    @property
    def points(self) -> dict[int, Points]:
        """What was seen of each pair that was trained."""
        return {int(pair): [(n, s) for n, s in points] for pair, points in self.trainer.notes["points"].items()}

    def stage(
        self, number: int, members: Sequence[int], rungs: int, eta: float, looks: int = 1, share: float = 1.0
    ) -> None:
        """Train these pairs, and after each rung the better of them; what a resumed race has done is not done again.

        Args:
            number: of the stage, from 0.
            members: indices of the pairs that begin.
            rungs: how often they are compared.
            eta: one in so many goes on.
            looks: validation scores in each rung; the last one is at its end.
            share: of the whole budget that is spent at the end of the stage.
        """
        notes = self.trainer.notes
        if notes["stage"] > number:
            return
        if notes["stage"] < number:
            notes |= {"stage": number, "rung": 0, "members": list(members), "leg": None}
        while notes["rung"] < rungs:
            if notes["leg"] is None and not self._open_rung(notes, rungs, share):
                notes["rung"] = rungs
                break
            scores = self._run_rung(notes, rungs, looks)
            for pair in notes["members"]:
                notes["rungs"][pair] += 1
            self.search.run.log("rung", method=self.trainer.plan.method, connector=self.spec.name, seed=self.seed,
                                stage=number, rung=notes["rung"], members=notes["members"])  # fmt: skip
            notes |= {"rung": notes["rung"] + 1, "members": survivors(notes["members"], scores, eta), "leg": None}
            if self.search.config.checkpoint_every:
                self.trainer.checkpoint()

    def _run_rung(self, notes: dict[str, Any], rungs: int, looks: int) -> list[float]:
        """Train to the end of the rung, looking on the way; the validation scores at its end, [pairs of the grid]."""
        batch = self.search.config.batch
        leg = self._leg(notes, rungs)
        scores: list[float] = []
        for look in range(notes["look"] + 1, looks + 1):
            before = self.trainer.done
            self.trainer.run_leg(leg, look / looks)
            # Fewer steps than looks: some have nothing new to see.
            if self.trainer.done > before or not scores:
                scores = self.trainer.validate()
                for pair in notes["members"]:
                    seen: list[list[float]] = notes["points"].setdefault(str(pair), [])
                    now = [float(self.trainer.visits[pair] * batch), scores[pair]]
                    if not seen or seen[-1][0] < now[0]:
                        seen.append(now)
            notes["look"] = look
        return scores

    def _open_rung(self, notes: dict[str, Any], rungs: int, share: float) -> bool:
        """Write down the next rung's steps or seconds; False where nothing is left for it."""
        trainer, left = self.trainer, rungs - notes["rung"]
        leg: dict[str, Any] = {"start": trainer.done, "until": UNLIMITED, "from": 0.0, "to": None}
        if self.budget.seconds is not None:
            spent = trainer.training.seconds
            leg |= {"from": spent, "to": spent + (share * self.budget.seconds - spent) / left}
            if leg["to"] <= spent:
                return False
        else:
            steps = self._steps(notes["members"], left, share)
            if not steps:
                return False
            leg["until"] = trainer.done + steps
        notes |= {"leg": leg, "look": 0}
        return True

    def _steps(self, members: Sequence[int], rungs: int, share: float) -> int:
        """Steps of the next of so many rungs; 0 where not even one is left, unless it were the first of all."""
        trainer, network = self.trainer, self.trainer.source
        visits = self.search.pairs(members, self.seed).visits(0)
        price = self.search.visit_price(self.budget, self.spec, network)
        cost = sum(price([pair]) for visit in visits for pair in visit)
        left = self._limit(network) * share - self._spent()
        steps = max(int(left / rungs // cost), min(int(left // cost), 1))
        if steps < 1 and not trainer.done:
            self.search.say_overdrawn(self.spec.name)
            return 1
        return max(steps, 0)

    def _limit(self, network: nn.Module) -> float:
        paid = self.trainer.plan.paid
        return self.search.purse(self.budget, paid) + (paid.flops if self.budget.flops is not None else 0.0)

    def _spent(self) -> float:
        return self.trainer.training.flops if self.budget.flops is not None else float(sum(self.trainer.visits))

    def _leg(self, notes: dict[str, Any], rungs: int) -> Leg:
        leg = notes["leg"]
        return Leg(
            self.search.pairs(notes["members"], self.seed),
            leg["start"],
            leg["until"],
            begin=notes["rung"] / rungs,
            end=(notes["rung"] + 1) / rungs,
            from_second=leg["from"],
            to_second=leg["to"],
            held=True,
        )
