"""Who competes in `fidelity.py`: HYMA, its rivals, and HYMA with one thing changed."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hyma_mllm.search.closed_form import ClosedFormConfig
from hyma_mllm.search.config import Method, PolishConfig
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.search.stability import StabilityConfig

if TYPE_CHECKING:
    from benchmarks.orders import Order
else:
    from orders import Order


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
        order: what it orders the pairs by.
        families: of connectors that it can make; none for all.
        trained_as: label of the contestant whose training this only reads in another way; none for its own.
        scaled: whether a fresh connector of an MLLM writes vectors as long as the LLM's own embeddings.
    """

    label: str
    method: Method
    search: dict[str, Any] = field(default_factory=dict)
    hypernetwork: dict[str, Any] = field(default_factory=dict)
    trains: bool = True
    rows: float = 1.0
    order: Order = "own"
    families: tuple[str, ...] = ()
    trained_as: str = ""
    scaled: bool = True


POLISH = PolishConfig(top=2, steps=50, optimiser=OptimiserConfig(lr=5e-4))
HYMA = Contestant("hyma", "hyma")
"""As the recipe of the case has it."""
POLISHED = Contestant("hyma, best pairs polished", "hyma", {"polish": POLISH})
WHITENED_START = Contestant("hyma, whitened start", "hyma", {"closed_form": ClosedFormConfig("whitened")})
NO_CLOSED_FORM = Contestant(
    "hyma, no closed form", "hyma", {"optimiser": OptimiserConfig(lr=3e-3)}, {"preset": "default"}
)
_CYCLIC: dict[str, Any] = {"sampler": "cyclic", "pairs_per_visit": 9}
"""A third of the pairs a step in a fixed order, as the authors take 9 of 27."""

VLM = (
    HYMA,
    POLISHED,
    WHITENED_START,
    NO_CLOSED_FORM,
    Contestant(
        "hyma as published",
        "hyma",
        {**_CYCLIC, "optimiser": OptimiserConfig(lr=3e-3)},
        {"preset": "hyma"},
    ),
    Contestant(
        "Hyper-Align as published",
        "hyma",
        {**_CYCLIC, "optimiser": OptimiserConfig(lr=3e-3)},
        {"preset": "hyper-align"},
        families=("linear",),
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

STEP_A_VISIT = Contestant("hyma, a step a visit", "hyma", {"sampler": "round", "pairs_per_visit": 3})
MLLM_POLISH = PolishConfig(top=1, steps=20, optimiser=OptimiserConfig(lr=5e-3))
RANDOM_START = Contestant("hyma, no closed form", "hyma", {}, {"preset": "default"})
MLLM = (
    HYMA,
    STEP_A_VISIT,
    RANDOM_START,
    Contestant("hyma as published", "hyma", {"sampler": "cyclic", "pairs_per_visit": 3}, {"preset": "hyma"}),
    Contestant("constrained grid", "constrained-grid"),
    Contestant("constrained grid, words start", "constrained-grid", {"warm_start": "words"}),
    Contestant("words", "words", trains=False),
    Contestant("successive halving", "halving"),
    Contestant("random", "random"),
)

LANDMARKS = {"vlm": POLISH, "mllm": MLLM_POLISH}
"""How a landmark is trained on alone."""

CONTESTANTS = {"vlm": VLM, "mllm": MLLM}


def _changed(
    label: str, base: Contestant, search: dict[str, Any] | None = None, hypernetwork: dict[str, Any] | None = None
) -> Contestant:
    """HYMA as `base` has it, with one thing changed."""
    return Contestant(label, "hyma", {**base.search, **(search or {})}, {**base.hypernetwork, **(hypernetwork or {})})


def _read(base: Contestant, order: Order) -> Contestant:
    """HYMA as `base` has it, its pairs ordered by something else that its training left behind."""
    return replace(base, label=f"{base.label}, by {order}", order=order, trained_as=base.label)


_STABLE = {"stability": StabilityConfig(threshold=0.95, times=2), "evaluate_every": 5}

ABLATIONS = {
    "vlm": (
        HYMA,
        WHITENED_START,
        _changed("ridge start", HYMA, {"closed_form": ClosedFormConfig("ridge")}),
        _changed("all of the way from the start", HYMA, {"blend": [1.0]}),
        POLISHED,
        replace(HYMA, label="order with a prior", order="prior"),
        replace(HYMA, label="order calibrated by landmarks", order="landmarks"),
        NO_CLOSED_FORM,
        replace(NO_CLOSED_FORM, label="no closed form, with a prior", order="prior"),
        replace(
            _changed("no closed form, ranks of checkpoints averaged", NO_CLOSED_FORM, {"evaluate_every": 5}),
            order="checkpoints",
        ),
        replace(NO_CLOSED_FORM, label="no closed form, calibrated by landmarks", order="landmarks"),
        _changed("no closed form, a row per pair", NO_CLOSED_FORM, {}, {"condition": "pair"}),
        _changed("no closed form, base per shape", NO_CLOSED_FORM, {}, {"base": "shape"}),
        _changed("no closed form, dense head", NO_CLOSED_FORM, {}, {"head": "dense"}),
        _changed("no closed form, chunked head", NO_CLOSED_FORM, {}, {"head": "chunked"}),
        _changed("no closed form, all pairs a step", NO_CLOSED_FORM, {"sampler": "fair"}),
        _changed("no closed form, cyclic steps of 9", NO_CLOSED_FORM, _CYCLIC),
        _changed("no closed form, stops when stable", NO_CLOSED_FORM, _STABLE),
        _changed("no closed form, polished", NO_CLOSED_FORM, {"polish": POLISH}),
    ),
    "mllm": (
        HYMA,
        RANDOM_START,
        STEP_A_VISIT,
        _changed("a step a visit, stops when stable", STEP_A_VISIT, _STABLE | {"evaluate_every": 15}),
        _changed("a row per pair", HYMA, {}, {"condition": "pair"}),
        replace(RANDOM_START, label="no closed form, unscaled", scaled=False),
        _changed("rate of 3e-3", HYMA, {"optimiser": OptimiserConfig(lr=3e-3)}),
        _changed("rank 32", HYMA, {}, {"rank": 32}),
        _changed("best pair polished", HYMA, {"polish": MLLM_POLISH}),
        replace(HYMA, label="order calibrated by landmarks", order="landmarks"),
        replace(_changed("ranks of checkpoints averaged", HYMA, {"evaluate_every": 8}), order="checkpoints"),
        _read(HYMA, "gain over blind"),
        _read(HYMA, "loss"),
        _read(HYMA, "loss gain"),
    ),
}
"""HYMA as it is, and with one thing changed."""
