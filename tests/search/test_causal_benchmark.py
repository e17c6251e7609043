"""What the benchmark of the causal step makes of its measurements."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest

SECONDS = {"search": 2.0, "search, small": 3.0, "llava": 6.0, "llava, no tower": 5.0}
PEAKS = {"search": 900, "search, small": 400, "llava": 880, "llava, no tower": 860}


class Silent:
    """A progress bar that nobody sees."""

    def update(self) -> None:
        """One more."""


@pytest.fixture
def causal(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("causal_step")


@pytest.fixture
def measured(causal: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every contestant has the numbers above; the loss of the plain loop differs by `gap`."""
    facts = {"gap": 0.0, "vocabulary": 262_144.0, "round": 1.0}

    def found(script: str, case: Mapping[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        variant = case["variant"]
        return {
            "seconds": SECONDS[variant] * facts["round"],
            "peak_bytes": PEAKS[variant],
            "step_bytes": PEAKS[variant] // 2,
            "losses": [4.0, 3.0, 2.0 + (facts["gap"] if variant.startswith("llava") else 0.0)],
            "vocabulary": facts["vocabulary"],
        }

    def timed(script: str, case: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        result = found(script, case)
        facts["round"] += case["variant"] == "llava, no tower"  # the last of a round; later rounds are slower
        return result

    monkeypatch.setattr(causal.measure, "for_time", timed)
    monkeypatch.setattr(causal.measure, "for_peak", found)
    return facts


def rivals(causal: ModuleType, precision: str) -> list[Any]:
    kind = "recipe" if precision == "bf16" else "exact"
    return [causal.Case("gemma3-270m", variant, 16, precision) for variant in causal.VARIANTS[kind]]


def test_ratios_are_of_the_best_times_and_of_the_peaks(causal: ModuleType, measured: dict[str, float]) -> None:
    whole, slim, bare = causal.compare(rivals(causal, "bf16"), 2, 1.0, Silent())
    assert (whole["speedup"], bare["speedup"], slim["memory_ratio"]) == (3.0, 2.5, 2.2)
    assert causal.verdicts(whole) == [("speed-up 3", True)]
    assert causal.verdicts(slim) == [("peak ratio 2", True)]
    assert causal.verdicts(bare) == []


def test_memory_is_judged_with_the_large_vocabulary_only(causal: ModuleType, measured: dict[str, float]) -> None:
    measured["vocabulary"] = 49_152
    assert causal.verdicts(causal.compare(rivals(causal, "bf16"), 1, 1.0, Silent())[1]) == []


@pytest.mark.parametrize(("gap", "same"), [(5e-4, True), (2e-3, False)])
def test_losses_must_agree_in_float32(causal: ModuleType, measured: dict[str, float], gap: float, same: bool) -> None:
    measured["gap"] = gap
    (row,) = causal.compare(rivals(causal, "fp32"), 1, 1.0, Silent())
    assert causal.verdicts(row) == [("speed-up 3", True), ("same loss to 0.001", same)]
    assert row["met"] is same
    # 16 bits round two orders of the same sums apart; the gap is shown and not judged.
    assert causal.compare(rivals(causal, "bf16"), 1, 1.0, Silent())[0]["met"]


def test_the_step_is_the_recipes(causal: ModuleType) -> None:
    own, *exact = causal.cases("smollm2-135m", causal.recipe().search.batch)
    assert {case.precision for case in own} == {causal.recipe().llm.precision()}
    assert all(case.batch == causal.recipe().search.batch for case in own)
    assert [case.variant for case in own] == list(causal.VARIANTS["recipe"])
    assert [case.precision for cases in exact for case in cases] == ["fp32"] * 2 * len(exact)
