"""Who competes in `fidelity.py`: HYMA, its rivals, and HYMA with one thing changed."""

from dataclasses import dataclass, field
from typing import Any

from hyma_mllm.search.closed_form import ClosedFormConfig
from hyma_mllm.search.config import Method, PolishConfig
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.stability import StabilityConfig


@dataclass(frozen=True)
class Contestant:
    """A method with what is changed of the configuration.

    Attributes:
        label: in tables and file names.
        method: its name in the search.
        search: keys of `search` that differ.
        hypernetwork: keys of `hypernetwork` that differ.
        trains: whether it takes a budget; the others cost what they cost, once.
        rows: share of the training pictures that it sees, drawn at random.
    """

    label: str
    method: Method
    search: dict[str, Any] = field(default_factory=dict)
    hypernetwork: dict[str, Any] = field(default_factory=dict)
    trains: bool = True
    rows: float = 1.0


POLISH = PolishConfig(top=2, steps=50, optimiser=OptimiserConfig(lr=5e-4))
VLM = (
    Contestant("hyma", "hyma"),
    Contestant("hyma, best pairs polished", "hyma", {"polish": POLISH}),
    Contestant("hyma, whitened start", "hyma", {"closed_form": ClosedFormConfig("whitened")}),
    Contestant("hyma, no closed form", "hyma", {"optimiser": OptimiserConfig(lr=3e-3)}, {"preset": "default"}),
    Contestant(
        "hyma as published",
        "hyma",
        # A third of the pairs a step, as the authors take 9 of 27.
        {"sampler": "cyclic", "pairs_per_visit": 9, "optimiser": OptimiserConfig(lr=3e-3)},
        {"preset": "hyma"},
    ),
    Contestant("constrained grid", "constrained-grid"),
    Contestant("constrained grid, a third of the data", "constrained-grid", rows=1 / 3),
    Contestant(
        "one connector per shape",
        "hyma",
        {"optimiser": OptimiserConfig(lr=3e-3)},
        {"preset": "default", "base": "shape", "alpha": 1e-6},
    ),
    Contestant("constrained grid, whitened start", "constrained-grid", {"warm_start": "whitened"}),
    Contestant("constrained grid, consensus start", "constrained-grid", {"warm_start": "consensus"}),
    Contestant("successive halving", "halving"),
    Contestant("Mordal-style", "mordal"),
    Contestant("random", "random"),
    Contestant("ridge", "ridge", trains=False),
    Contestant("whitened", "whitened", trains=False),
    Contestant("consensus", "consensus", trains=False),
    Contestant("CKA", "cka", trains=False),
    Contestant("mutual k-NN", "mutual-knn", trains=False),
    Contestant("CCA", "cca", trains=False),
    Contestant("Gromov-Wasserstein", "gromov-wasserstein", trains=False),
    Contestant("uni-modal", "unimodal", trains=False),
)

MLLM = (
    Contestant("hyma", "hyma"),
    Contestant("hyma, a step a visit", "hyma", {"sampler": "round", "pairs_per_visit": 3}),
    Contestant("hyma, no closed form", "hyma", {}, {"preset": "default"}),
    Contestant("hyma as published", "hyma", {"sampler": "cyclic", "pairs_per_visit": 3}, {"preset": "hyma"}),
    Contestant("constrained grid", "constrained-grid"),
    Contestant("constrained grid, words start", "constrained-grid", {"warm_start": "words"}),
    Contestant("words", "words", trains=False),
    Contestant("successive halving", "halving"),
    Contestant("random", "random"),
)

CONTESTANTS = {"vlm": VLM, "mllm": MLLM}


def _changed(
    label: str, base: Contestant, search: dict[str, Any] | None = None, hypernetwork: dict[str, Any] | None = None
) -> Contestant:
    """HYMA as `base` has it, with one thing changed."""
    return Contestant(label, "hyma", {**base.search, **(search or {})}, {**base.hypernetwork, **(hypernetwork or {})})


_WITH, _WITHOUT = VLM[0], VLM[3]
_STABLE = {"stability": StabilityConfig(threshold=0.95, times=2), "evaluate_every": 5}

ABLATIONS = {
    "vlm": (
        _WITH,
        _changed("whitened start", _WITH, {"closed_form": ClosedFormConfig("whitened")}),
        _changed("ridge start", _WITH, {"closed_form": ClosedFormConfig("ridge")}),
        _changed("all of the way from the start", _WITH, {"blend": [1.0]}),
        _changed("best pairs polished", _WITH, {"polish": POLISH}),
        _WITHOUT,
        _changed("no closed form, a row per pair", _WITHOUT, {}, {"condition": "pair"}),
        _changed("no closed form, base per shape", _WITHOUT, {}, {"base": "shape"}),
        _changed("no closed form, dense head", _WITHOUT, {}, {"head": "dense"}),
        _changed("no closed form, chunked head", _WITHOUT, {}, {"head": "chunked"}),
        _changed("no closed form, all pairs a step", _WITHOUT, {"sampler": "fair"}),
        _changed("no closed form, cyclic steps of 9", _WITHOUT, {"sampler": "cyclic", "pairs_per_visit": 9}),
        _changed("no closed form, stops when stable", _WITHOUT, _STABLE),
        _changed("no closed form, polished", _WITHOUT, {"polish": POLISH}),
    ),
    "mllm": (
        MLLM[0],
        _changed("random start", MLLM[0], {}, {"preset": "default"}),
        _changed("a step a visit", MLLM[0], {"sampler": "round", "pairs_per_visit": 3}),
        _changed("rate of 3e-3", MLLM[0], {"optimiser": OptimiserConfig(lr=3e-3)}),
        _changed("rank 32", MLLM[0], {}, {"rank": 32}),
        _changed("best pair polished", MLLM[0], {"polish": PolishConfig(1, 20, OptimiserConfig(lr=5e-3))}),
    ),
}
"""HYMA as it is, and with one thing changed."""
