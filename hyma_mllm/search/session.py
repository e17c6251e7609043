"""All trainings of a run, one after another; each finished one is on disk, so a rerun goes on where it stopped."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hyma_mllm.errors import HymaError
from hyma_mllm.hypernetwork.network import Hypernetwork, describe
from hyma_mllm.paths import atomic_path
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.config import CLOSED_FORMS, Method
from hyma_mllm.search.ledger import Cost, Ledger
from hyma_mllm.search.method import Found, all_connectors
from hyma_mllm.search.methods import Search
from hyma_mllm.search.ranking import Ranking


@dataclass(frozen=True)
class Unit:
    """One training: a method, a family of connectors, a seed."""

    method: Method
    connector: str
    seed: int

    @property
    def name(self) -> str:
        """`method-connector-seed`, as in the run directory's file names."""
        return f"{self.method}-{self.connector}-{self.seed}"


FINISHED = ("ranking.json", "ledger.json", "best/config.json", "examples.json", "ranking.png")
"""Files of a finished run, each written whole; the report can be made from them again."""


KEPT: tuple[Method, ...] = ("hyma", "grid", "halving", "mordal", *CLOSED_FORMS)
"""Methods whose connectors are kept, beside those of the method that is handed over."""


def is_finished(run: Path, files: Sequence[str] = FINISHED) -> bool:
    """Whether nothing is left to do in this run directory: all of its `files` are there."""
    return all((run / name).exists() for name in files)


def hold_inputs(run: RunDirectory, inputs: Mapping[str, str]) -> None:
    """Write down what the run reads, or compare it with what the run has read before.

    Args:
        run: the run directory.
        inputs: name of a source or model -> its fingerprint or revision.

    Raises:
        HymaError: a source or a model has changed since the run began; half of it would rank the old one.
    """
    before = run.read_json("inputs.json")
    if before is None:
        run.write_json("inputs.json", dict(inputs))
        return
    changed = [name for name in inputs if before.get(name) != inputs[name]]
    if changed:
        name = changed[0]
        raise HymaError(
            f"{name} has changed since the run {run.path} began (it was {before.get(name)}, it is {inputs[name]}); "
            f"bring the old one back, or set {run.option} to a new directory."
        )


def check_batch(batch: int, training: int) -> None:
    """Refuse a mini-batch that the training split cannot fill.

    Raises:
        HymaError: it is larger than the split.
    """
    if batch > training:
        raise HymaError(
            f"search.batch is {batch} but the training split has {training} rows; set search.batch below that."
        )


def units(search: Search) -> list[Unit]:
    """Every training of the run, HYMA before the rivals that are held to its cost."""
    config = search.config
    return [
        Unit(method, connector, seed)
        for connector in config.connectors
        for seed in config.seeds
        for method in config.ordered_methods()
    ]


def print_sizes(search: Search, say: Callable[[str], None]) -> None:
    """Say how large each hypernetwork is beside the connectors that it stands for."""
    if "hyma" not in search.config.methods:
        return
    for connector in search.config.connectors:
        network = search.network("hyma", search.config.spec(connector), 0)
        assert isinstance(network, Hypernetwork)
        sizes = describe(network)
        say(
            f"{connector}: hypernetwork {sizes['hypernetwork_parameters'] / 1e6:.2f} M parameters, "
            f"{len(network.grid)} connectors {sizes['connector_parameters'] / 1e6:.2f} M, ratio {sizes['ratio']:.3f}"
        )


def run_all(search: Search, embedding: Cost) -> tuple[list[Ranking], list[Ledger]]:
    """Run what has not run yet.

    Args:
        search: the task and how to search it.
        embedding: what the shared features cost.

    Returns:
        Rankings and ledgers of all units, in order.
    """
    rankings, ledgers = [], []
    hyma: dict[tuple[str, int], Ledger] = {}
    for unit in units(search):
        stored = search.run.read_json(f"results/{unit.name}.json")
        ranking, ledger = _stored(stored, unit) if stored is not None else _fresh(search, unit, hyma)
        if unit.method == "hyma":
            hyma[unit.connector, unit.seed] = ledger
        ledger.phases["embedding"] = embedding
        rankings.append(ranking)
        ledgers.append(ledger)
    return rankings, ledgers


def _fresh(search: Search, unit: Unit, hyma: dict[tuple[str, int], Ledger]) -> tuple[Ranking, Ledger]:
    # The trainer leaves at a step whose state it has saved; elsewhere a signal ends the run at once.
    with search.stop.watched():
        found = search.run_method(unit.method, unit.connector, unit.seed, hyma.get((unit.connector, unit.seed)))
    if search.accelerator.is_main_process:
        kept = {*KEPT, search.config.handed_over()}
        if unit.seed == search.config.seeds[0] and unit.method in kept:
            _save_connectors(search, unit, found)
        search.run.write_json(
            f"results/{unit.name}.json", {"ranking": asdict(found.ranking), "ledger": asdict(found.ledger)}
        )
        shutil.rmtree(search.run.path / "checkpoints" / unit.name, ignore_errors=True)
    search.accelerator.wait_for_everyone()
    search.run.log("finished", method=unit.method, connector=unit.connector, seed=unit.seed, steps=found.outcome.step)
    return found.ranking, found.ledger


def _save_connectors(search: Search, unit: Unit, found: Found) -> None:
    """Keep every pair's connector of the first seed, for `hyma export`."""
    assert found.network is not None
    path = search.run.path / "connectors" / f"{unit.name}.safetensors"
    with atomic_path(path) as temporary:
        save_file(all_connectors(found.network, len(search.task.grid)), temporary)


def _stored(stored: dict[str, Any], unit: Unit) -> tuple[Ranking, Ledger]:
    try:
        ledger = stored["ledger"]
        phases = {phase: Cost(**cost) for phase, cost in ledger["phases"].items()}
        return Ranking(**stored["ranking"]), Ledger(**{**ledger, "phases": phases})
    except (KeyError, TypeError) as error:
        raise HymaError(
            f"results/{unit.name}.json of the run directory is not a result ({error}); remove it and run again."
        ) from error
