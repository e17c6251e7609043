"""The stress set: its faults are what they say, its judgement sees what it must, and a stopped table goes on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from rich.console import Console
from torch import Tensor

from hyma_mllm.errors import HymaError


@pytest.fixture
def stability(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("stability")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the precision in a state that all accelerators share."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def setting(stability: ModuleType) -> Any:
    return stability.Setting(
        train=600,
        validation=20,
        gallery=100,
        latent=12,
        noise=0.3,
        image_widths=(24, 16),
        text_widths=(16, 24),
        hidden=16,
        steps={64: 40, 96: 8},
    )


def of_both_sides(stability: ModuleType, setting: Any, fault: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(sound, faulty) of images and of texts."""
    return [(side[0], side[1]) for side in stability.encoders(fault, setting, seed)]


def longest_over_typical(x: Tensor) -> float:
    return float(x.abs().amax() / x.abs().median())


LAWS: dict[str, Callable[[Tensor, Tensor, Tensor], bool]] = {
    # (sound, faulty, what the faulty one would be without the fault)
    "none": lambda sound, faulty, own: torch.equal(faulty, own),
    "heavy tails": lambda sound, faulty, own: (
        longest_over_typical(faulty) > 100 * longest_over_typical(own)
        and torch.equal(faulty[:, 4:], own[:, 4:])
        and torch.equal(faulty.sign(), own.sign())
    ),
    "dominating mean": lambda sound, faulty, own: (
        float(faulty.mean(0).norm()) > 30 * float((faulty - faulty.mean(0)).norm(dim=1).mean())
    ),
    "tiny norms": lambda sound, faulty, own: 1e-7 < float(faulty.norm(dim=1).mean()) < 1e-4,
    "huge norms": lambda sound, faulty, own: 1e6 < float(faulty.norm(dim=1).mean()) < 1e8,
    "rank deficient": lambda sound, faulty, own: int(torch.linalg.matrix_rank(faulty, rtol=1e-4)) == own.shape[1] // 4,
    "duplicate": lambda sound, faulty, own: torch.equal(faulty, sound),
    "constant": lambda sound, faulty, own: bool((faulty == faulty[0]).all()),
    "bf16": lambda sound, faulty, own: torch.equal(faulty, own.bfloat16()) and sound.dtype == torch.bfloat16,
}


def test_every_fault_is_what_it_says(stability: ModuleType, setting: Any) -> None:
    assert set(LAWS) == set(stability.FAULTS)
    plain = of_both_sides(stability, setting, "none")
    for fault, law in LAWS.items():
        for (sound, faulty), (_, own) in zip(of_both_sides(stability, setting, fault), plain, strict=True):
            assert sound.shape[0] == faulty.shape[0] == 720
            assert law(sound, faulty, own), fault
            if fault not in ("none", "duplicate"):
                assert not any(LAWS[other](sound, faulty, own) for other in ("none", "duplicate")), fault


def test_a_seed_draws_the_same_features_twice_and_another_others(stability: ModuleType, setting: Any) -> None:
    one, again, other = (of_both_sides(stability, setting, "heavy tails", seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for x, y in zip(one, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not any(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_before_trains_on_unit_rows_and_after_on_our_standardised_ones(stability: ModuleType, setting: Any) -> None:
    arms = stability.arms()
    case = stability.Case("dominating mean", 64, "before", 0)
    rows = torch.arange(setting.train)
    images, texts = stability.encoders(case.fault, setting, case.seed)
    published = stability.stress_task(case, setting, arms["before"], torch.device("cpu")).task
    for raw, found in zip([*images, *texts], [*published.images, *published.texts], strict=True):
        torch.testing.assert_close(found[rows], raw[rows] / raw[rows].norm(dim=1, keepdim=True))
    ours = stability.stress_task(case, setting, arms["after"], torch.device("cpu")).task
    for found in ours.texts:
        assert float(found[rows].mean(0).abs().max()) < 1e-2
        assert float(found[rows].square().mean()) == pytest.approx(1.0, abs=1e-2)
    assert [len(part) for part in (ours.train, ours.validation, ours.test)] == [600, 20, 100]


def test_sound_encoders_are_learnt_by_our_defaults(stability: ModuleType, setting: Any) -> None:
    result = stability.run_once(stability.Case("none", 64, "after", 0), setting, "cpu")
    assert len(result.scores) == 4
    assert min(result.scores) > 30  # R@10 in a gallery of 100: chance is 10
    assert not result.collapsed
    assert (result.non_finite, result.skipped, result.escaped, result.error) == (0, 0, 0, "")


@pytest.mark.parametrize("arm", ["before", "after"])
def test_pairs_of_a_constant_encoder_are_at_chance_and_the_last_pair_is_judged(
    stability: ModuleType, setting: Any, arm: str
) -> None:
    result = stability.run_once(stability.Case("constant", 64, arm, 0), setting, "cpu")
    assert len(result.scores) == 4
    assert all(abs(score - 10) < 8 for score in result.scores[1:])
    assert result.collapsed == (result.scores[0] <= 30)
    assert (result.non_finite, result.escaped) == (0, 0)


def test_bf16_is_trained_in_mixed_precision_and_the_next_run_is_not(stability: ModuleType, setting: Any) -> None:
    mixed = stability.run_once(stability.Case("bf16", 96, "after", 0), setting, "cpu")
    assert AcceleratorState().mixed_precision == "bf16"
    plain = stability.run_once(stability.Case("none", 96, "after", 0), setting, "cpu")
    assert AcceleratorState().mixed_precision == "no"
    assert mixed.scores == pytest.approx(plain.scores, abs=10)


def test_a_closed_form_refuses_features_that_are_not_finite(
    stability: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stability.FAULTS, "none", lambda sound, own, g: own * torch.nan)
    result = stability.run_once(stability.Case("none", 64, "after", 0), setting, "cpu")
    assert "are not all finite" in result.error
    assert result.collapsed and result.escaped == 0


@pytest.mark.parametrize("arm", ["before", "no closed form"])
def test_features_that_are_not_finite_are_seen_and_never_trained_on(
    stability: ModuleType, setting: Any, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stability.FAULTS, "none", lambda sound, own, g: own * torch.nan)
    result = stability.run_once(stability.Case("none", 64, arm, 0), setting, "cpu")
    assert result.non_finite >= 3
    assert result.skipped >= result.non_finite  # one pair a step
    assert result.escaped == 0
    assert result.error
    assert result.collapsed


@pytest.mark.parametrize(
    ("scores", "fault", "wanted"),
    [
        ([6.1, 30.0, 30.0, 30.0], "none", False),
        ([6.0, 30.0, 30.0, 30.0], "none", True),
        ([30.0, 30.0, 30.0, 2.0], "heavy tails", True),
        ([30.0, 2.0, 2.0, 2.0], "constant", False),
        ([2.0, 2.0, 2.0, 2.0], "constant", True),
        ([30.0, float("nan"), 30.0, 30.0], "none", True),
        ([float("nan"), 2.0, 2.0, 2.0], "constant", True),
        ([], "none", True),
    ],
)
def test_three_times_chance_or_less_is_a_collapse(
    stability: ModuleType, scores: list[float], fault: str, wanted: bool
) -> None:
    assert stability.collapsed(scores, fault, 2.0) is wanted


def drawn(stability: ModuleType, scores: list[float], **changes: Any) -> Any:
    fault = changes.pop("fault", "none")
    plain = stability.Result(scores, stability.collapsed(scores, fault, 2.0), 0, 0, 0, "", 60.0)
    return replace(plain, **changes)


def test_a_stopped_table_goes_on_and_runs_nothing_twice(
    stability: ModuleType, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [stability.Case("none", 64, arm, seed) for arm in ("before", "after") for seed in range(3)]
    ran: list[str] = []

    def run_once(case: Any, setting: Any, device: str) -> Any:
        if len(ran) == 2:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(case.key)
        return drawn(stability, [30.0] * 4)

    monkeypatch.setattr(stability, "run_once", run_once)
    out = tmp_path / "stability.json"
    with pytest.raises(KeyboardInterrupt):
        stability.sweep(cases, setting, out, "cpu")
    assert list(json.loads(out.read_text())["runs"]) == [case.key for case in cases[:2]]
    table = stability.sweep(cases, setting, out, "cpu")
    assert ran == [cases[0].key, cases[1].key, "stopped", *(case.key for case in cases[2:])]
    assert table == json.loads(out.read_text())
    assert set(table["runs"]) == {case.key for case in cases}
    assert table["machine"]["torch"] == torch.__version__


def test_runs_of_another_configuration_are_not_mixed_in(stability: ModuleType, setting: Any, tmp_path: Path) -> None:
    out = tmp_path / "stability.json"
    stability.sweep([], setting, out, "cpu")
    assert not out.exists()
    case = stability.Case("none", 96, "after", 0)
    stability.sweep([case], setting, out, "cpu")
    with pytest.raises(HymaError, match=r"holds runs with other setting; remove it, or set --out"):
        stability.sweep([case], replace(setting, noise=0.5), out, "cpu")


def text_of(tables: list[Any]) -> str:
    console = Console(width=200)
    with console.capture() as found:
        for table in tables:
            console.print(table)
    return found.get()


def line_with(text: str, start: str) -> list[str]:
    """The cells of the first line whose first cell is this."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return next(line for line in lines if line and line[0] == start)


def test_the_tables_count_each_fault_batch_and_arm(stability: ModuleType) -> None:
    runs: dict[Any, Any] = {}
    for batch in (256, 1024):
        for arm in ("before", "after"):
            for seed in range(4):
                good = arm == "after" or (batch == 1024 and seed)
                runs[stability.Case("none", batch, arm, seed)] = drawn(
                    stability, [40.0 if good else 2.0, 30.0, 30.0, 20.0]
                )
    for seed in range(4):
        runs[stability.Case("none", 256, "before", seed)] = drawn(
            stability, [], error="HymaError: x", non_finite=7, skipped=9
        )
    table = {
        "config": {"setting": {"steps": {"256": 96, "1024": 64}}},
        "runs": {case.key: vars(run) for case, run in runs.items()},
    }
    text = text_of(stability.shown(table, list(runs)))
    assert "collapsed runs of 4" in text
    assert "256 x 96 steps" in text
    assert "1,024 x 64 steps" in text
    assert line_with(text, "none") == ["none", "4 -> 0", "1 -> 0"]
    scores = text[text.index("mean final") :]
    assert line_with(scores, "none") == ["none", "30.5 -> 40.0", "30.0 -> 30.0", "30.0 -> 30.0", "20.0 -> 20.0"]
    assert line_with(text, "before") == ["before", "8", "5", "28", "36", "0", "4", "8.0"]
    assert line_with(text, "after") == ["after", "8", "0", "0", "0", "0", "0", "8.0"]
