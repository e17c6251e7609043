"""The training loop: dual mini-batches, fair accumulation, guard, checkpoints, early stop.

One loop trains hypernetworks and banks of independent connectors alike, so that every method pays by the same meter.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.errors import HymaError
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.bank import ConnectorBank
from hyma_mllm.search.checkpoints import Checkpoints
from hyma_mllm.search.engines import engine_for
from hyma_mllm.search.guard import Guard
from hyma_mllm.search.held import HeldConnectors
from hyma_mllm.search.interrupt import SearchInterruptedError, StopRequest, asked_to_stop
from hyma_mllm.search.ledger import Cost, Meter
from hyma_mllm.search.pair_loss import PairLoss, SearchTask
from hyma_mllm.search.placement import IDLE, Placement
from hyma_mllm.search.plan import UNLIMITED, Leg, Outcome, Plan
from hyma_mllm.search.stability import Stability


class Trainer:
    """Runs one `Plan`: whole by `fit`, or leg by leg by `resume`, `run_leg`, `validate` and `checkpoint`.

    Args:
        plan: what to do.
        model: connectors with their objective.
        task: frozen models and their data.
        accelerator: device, processes, precision.
        run: the run directory, for log lines and checkpoints.
        stop: set by a signal.
    """

    def __init__(
        self,
        plan: Plan,
        model: PairLoss,
        task: SearchTask,
        accelerator: Accelerator,
        run: RunDirectory,
        stop: StopRequest,
    ) -> None:
        self.plan, self.task, self.accelerator, self.run, self.stop = plan, task, accelerator, run, stop
        self.spec: ConnectorSpec = model.spec
        self.groups = task.visit_groups()
        # A pair that this process has the models of.
        self.own = [next(pair.index for pair in task.grid.pairs() if plan.placement.here(pair.text))]
        # Where a plan does not divide the pairs, all processes share every batch.
        self.placement = plan.placement
        if plan.placement.owners is None:
            self.placement = Placement(accelerator.num_processes, accelerator.process_index)
        self.engine = engine_for(model, plan.optimiser, accelerator)
        self.source, self.optimiser = self.engine.source, self.engine.optimiser
        self._enter(plan.leg())
        self.guard = Guard(plan.guard, task.grid)
        self.stability = Stability(plan.stability)
        directory = run.path / "checkpoints" / plan.name
        self.checkpoints = Checkpoints(directory, accelerator, plan.identity(), self.engine)
        self.training, self.validation = replace(plan.paid), Cost()
        self.visits = [0] * len(task.grid)
        self.done = 0
        self.ended = False
        self.notes: dict[str, Any] = {}
        """What who runs the legs wants to find again after a resumption; JSON."""

    def fit(self) -> Outcome:
        """Train to the end, or to a settled order; the trained connectors are in the model that was given.

        Raises:
            SearchInterruptedError: a signal came; a checkpoint is on disk.
            HymaError: the training does not stay finite.
        """
        self.resume()
        if not self.ended:
            self.run_leg(self.plan.leg())
        return self.outcome()

    def outcome(self) -> Outcome:
        """What it came to so far; the model that was given is as trained as that."""
        self.engine.refresh()
        seen = sum(self.visits) * self.plan.batches.size
        self.training.samples_per_pair = self.plan.paid.samples_per_pair + seen / len(self.plan.pairs.members)
        return Outcome(self.done, self.training, self.validation, self.guard.skipped, self.visits)

    def run_leg(self, leg: Leg, share: float = 1.0) -> None:
        """Train on, from wherever the training is within the leg.

        Args:
            leg: which pairs, how far, at which rates.
            share: of the leg after which to stop; what is done of it is not done again.

        Raises:
            SearchInterruptedError: a signal came; a checkpoint is on disk.
            HymaError: the training does not stay finite.
        """
        self._enter(leg)
        bank = self.source if leg.held and isinstance(self.source, ConnectorBank) else None
        self.held = None if bank is None else HeldConnectors(bank, leg.pairs.members)
        bar = tqdm(
            total=None if leg.until == UNLIMITED else leg.until,
            initial=self.done,
            desc=self.plan.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        settled = False
        with bar:
            while not settled and not self._over(share):
                with Meter(self.training, self.accelerator.device):
                    losses = self._step(self.done)
                self.done += 1
                self.training.steps = self.done
                bar.update()
                if losses is not None:
                    bar.set_postfix(loss=f"{sum(losses.values()) / len(losses):.3f}", skipped=self.guard.skipped)
                settled = self._milestones(self._over(share))
        self.ended = settled or self._over(1.0)

    def _enter(self, leg: Leg) -> None:
        self.leg, self.held = leg, None
        self.engine.enter(len(self.placement.turns(leg.pairs.visits(0), self.groups)))

    def _elapsed(self) -> float:
        """Seconds of the training so far, where they matter; those of the main process, which all must agree on."""
        if self.leg.to_second is None or self.accelerator.num_processes == 1:
            return self.training.seconds
        told = [self.training.seconds]
        broadcast_object_list(told)
        return told[0]

    def _over(self, share: float) -> bool:
        return self.leg.fraction(self.done, self._elapsed()) >= share

    def _step(self, step: int) -> dict[int, float] | None:
        """One optimiser step; the loss of each visited pair, or None when the guard skipped it."""
        plan, started = self.plan, time.perf_counter()
        rate = plan.optimiser.rate(*self.leg.position(step, self._elapsed()))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        visits = self.leg.pairs.visits(step)
        turns = self.placement.turns(visits, self.groups)
        if not self.engine.keeps_step:
            turns = [(number, weight) for number, weight in turns if number != IDLE]
        self.engine.begin(visits)
        seen: dict[int, float] = {}
        for number, weight in turns:
            pairs = self.own if number == IDLE else visits[number]
            losses = self._visit(pairs, step * len(visits) + max(number, 0), weight / sum(map(len, visits)))
            if weight:
                seen |= dict(zip(visits[number], losses.tolist(), strict=True))
            if self.placement.owners is None and not bool(torch.isfinite(losses).all()):
                self._skip(visits[number], losses)
                return None
        if self.placement.owners is not None:
            seen = self._shared(seen)
            if not all(map(math.isfinite, seen.values())):
                self._skip(list(seen), torch.tensor(list(seen.values())))
                return None
        norm = self.engine.clip(plan.optimiser.clip)
        if not torch.isfinite(norm):
            if not self._loss_scale_fell():
                self._skip(list(seen), torch.tensor(list(seen.values())))
            return None
        self.engine.step()
        if self.held is not None:
            self.held.put_back()
        self.guard.passed()
        self.run.log(
            "step",
            method=plan.logged,
            connector=plan.connector,
            seed=plan.seed,
            step=step + 1,
            lr=rate,
            gradient_norm=round(float(norm), 6),
            seconds=round(time.perf_counter() - started, 4),
            losses={str(pair): round(loss, 5) for pair, loss in seen.items()},
        )
        self.accelerator.log(
            {f"{plan.name}/loss": sum(seen.values()) / len(seen), f"{plan.name}/lr": rate}, step=step + 1
        )
        return seen

    def _visit(self, pairs: list[int], number: int, weight: float) -> Tensor:
        """Forward and backward of one visit; the loss per pair [pairs], in data-parallel work that of all processes.

        A hypernetwork's gradient is of the sum of the pairs' losses times `weight`; a bank's pairs are independent, and
        the plain sum keeps each one's own gradient.
        """
        placement, rows = self.placement, self.plan.batches.batch(number)
        # What a batch draws is drawn for the whole of it: the result does not depend on the number of processes.
        batch = self.task.batch(rows, self.plan.seed, number)
        if placement.shares > 1:
            size = len(rows) // placement.shares
            batch = self.task.share(batch, slice(placement.share * size, (placement.share + 1) * size))
        if isinstance(self.source, ConnectorBank):
            weight = float(placement.groups if weight else 0)
        found = self.engine.visit(pairs, batch, weight).detach().float()
        if placement.owners is None:
            self._count([pairs], len(rows))
            found = self.accelerator.reduce(found, reduction="mean")
        shared: Tensor = found.cpu()
        return shared

    def _count(self, visits: Sequence[Sequence[int]], batch: int) -> None:
        """Put visits of a whole batch on the bill."""
        for pairs in visits:
            self.training.flops += self.task.visit_flops(self.spec, pairs, batch) + self.plan.visit_flops(pairs)
            for pair in pairs:
                self.visits[pair] += 1

    def _shared(self, seen: dict[int, float]) -> dict[int, float]:
        """The losses of all processes' pairs, each the mean over the shares of its batch; they go on the bill."""
        everywhere: dict[int, list[float]] = {}
        for pair, loss in sorted(gather_object(list(seen.items())), key=itemgetter(0)):
            everywhere.setdefault(pair, []).append(loss)
        for pair in everywhere:
            self._count([[pair]], self.plan.batches.size)
        return {pair: math.fsum(shares) / len(shares) for pair, shares in everywhere.items()}

    def _loss_scale_fell(self) -> bool:
        """Under fp16, let the gradient scaler leave the step out and lower its scale; False if that cannot help."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        before = scaler.get_scale()
        self.optimiser.step()  # the scaler skips it: it has seen the overflow while unscaling
        self.engine.discard()
        if before <= 1.0:
            return False
        self._say_skipped(self.guard.overflowed(before, scaler.get_scale()))
        return True

    def _skip(self, pairs: list[int], losses: Tensor) -> None:
        """Leave this step out."""
        self.engine.discard()
        self._say_skipped(self.guard.failed(pairs, losses))

    def _say_skipped(self, reason: str) -> None:
        plan = self.plan
        self.accelerator.print(reason)
        self.run.log(
            "skipped", method=plan.logged, connector=plan.connector, seed=plan.seed, step=self.done + 1, reason=reason
        )

    def _milestones(self, over: bool) -> bool:
        """Validate, checkpoint and obey signals where it is time; True when the order has settled."""
        plan, settled = self.plan, False
        if plan.evaluate_every and (self.done % plan.evaluate_every == 0 or over):
            settled = self.stability.settled(self.done, self.validate())
        if plan.checkpoint_every and self.done % plan.checkpoint_every == 0 and not over:
            self.checkpoint()
        if asked_to_stop(self.stop, self.accelerator) and not over and not settled:
            self.checkpoint()
            of = "" if self.leg.until == UNLIMITED else f" of {self.leg.until}"
            raise SearchInterruptedError(
                f"Stopped by {self.stop.signal or 'a signal'} at step {self.done}{of} of {plan.name}; "
                "the state is saved, run the same command again to go on."
            )
        return settled

    def validate(self) -> list[float]:
        """Score every pair on the validation split, on the bill and in the log; the headline scores [pairs]."""
        plan = self.plan
        with Meter(self.validation, self.accelerator.device):
            self.engine.refresh()
            found = self.task.validate(self.source, self.spec)
        self.validation.flops += found.flops
        headline, scores = next(iter(found.scores.items()))
        self.run.log(
            "evaluation",
            method=plan.logged,
            connector=plan.connector,
            seed=plan.seed,
            step=self.done,
            scores={headline: [round(score, 4) for score in scores]},
        )
        return scores

    def checkpoint(self) -> None:
        """Save everything that a resumption needs, and what the guard rolls back to."""
        self._remember()
        self.checkpoints.save(
            self.done,
            {
                "training": vars(self.training),
                "validation": vars(self.validation),
                "visits": self.visits,
                "guard": self.guard.state_dict(),
                "stability": self.stability.state_dict(),
                "ended": self.ended,
                "notes": self.notes,
            },
        )

    def _remember(self) -> bool:
        """Take this as the last good state; False where only the newest checkpoint has it."""
        restore = self.engine.snapshot()
        self.guard.remember(restore or self.checkpoints.restore)
        return restore is not None

    def resume(self) -> None:
        """Go back to the newest checkpoint, where there is one."""
        progress = self.checkpoints.resume()
        copied = self._remember()
        if progress is None:
            if self.plan.checkpoint_every and not copied:
                self.checkpoint()
            return
        self.done = progress["step"]
        self.training, self.validation = Cost(**progress["training"]), Cost(**progress["validation"])
        self.visits = progress["visits"]
        self.guard.load_state_dict({**progress["guard"], "per_pair": _int_keys(progress["guard"]["per_pair"])})
        self.stability.load_state_dict(progress["stability"])
        self.ended, self.notes = progress.get("ended", False), progress.get("notes", {})
        self.accelerator.print(f"{self.plan.name}: going on from step {self.done}.")
        self.run.log(
            "resumed", method=self.plan.logged, connector=self.plan.connector, seed=self.plan.seed, step=self.done
        )


def _int_keys(table: dict[str, int]) -> dict[int, int]:
    """JSON makes strings of integer keys."""
    return {int(key): value for key, value in table.items()}


def check_processes(accelerator: Accelerator, wanted: int, batch: int) -> None:
    """Refuse to run with another number of processes than was asked for.

    Args:
        accelerator: as it was started.
        wanted: processes; 0 accepts any.
        batch: that all of them share; 0 where they do not.

    Raises:
        HymaError: the launcher started another number, or they cannot share the batch evenly.
    """
    world = accelerator.num_processes
    if wanted and world != wanted:
        raise HymaError(
            f"processes is {wanted} but the launcher started {world}; start with `accelerate launch --multi_gpu "
            f"--num_processes {wanted}`, or set processes to {world}."
        )
    if batch % world:
        raise HymaError(f"search.batch is {batch}, which {world} processes cannot share evenly; make it a multiple.")
