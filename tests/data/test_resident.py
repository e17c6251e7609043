"""Features in memory and features on disk: one choice for all models, the same bits, sums over chunks."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hyma_mllm.data import resident
from hyma_mllm.data.resident import MappedFeatures, fit_memory, free_memory, standardised_models
from hyma_mllm.data.sharded_rows import ShardedRows
from hyma_mllm.data.standardise import Power, Standardiser

ROWS = 60
CPU = torch.device("cpu")


def raw_rows(width: int, dtype: torch.dtype = torch.float32) -> ShardedRows:
    made = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width)) + 2
    return ShardedRows(made.to(dtype).split(11))


@pytest.fixture
def train() -> Tensor:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("power", "unit"), [("signed_sqrt", True), ("none", False)])
def test_both_forms_have_the_bits_of_the_whole_tensor(
    train: Tensor, dtype: torch.dtype, power: Power, unit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "CHUNK_ROWS", 7)
    raw = raw_rows(5, dtype)
    whole = raw[:].float()
    fitted = Standardiser.fit(whole[train], power, centre=True, unit=unit)
    wanted = fitted(whole)
    (loaded,) = standardised_models([raw], train, CPU, True, power, True, unit)
    (mapped,) = standardised_models([raw], train, CPU, False, power, True, unit)
    assert isinstance(loaded.rows, Tensor) and isinstance(mapped.rows, MappedFeatures)
    index = torch.tensor([3, 59, 0, 11, 10, 3])
    assert torch.equal(loaded.rows, wanted) and torch.equal(mapped.rows[index], wanted[index])
    assert len(mapped.rows) == ROWS and mapped.rows[index].dtype == torch.float32
    for model in (loaded, mapped):
        assert torch.equal(model.standardiser.mean, fitted.mean) and torch.equal(model.standardiser.scale, fitted.scale)
        assert torch.equal(model.mean, F.normalize(whole[train], dim=1).mean(0))


def test_sums_cross_chunks(train: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_rows(5)
    (once,) = standardised_models([raw], train, CPU, False, "signed_sqrt", True, True)
    monkeypatch.setattr(resident, "FIT_ROWS", 9)
    (chunked,) = standardised_models([raw], train, CPU, False, "signed_sqrt", True, True)
    torch.testing.assert_close(chunked.standardiser.mean, once.standardiser.mean, rtol=1e-6, atol=1e-7)
    exact = F.normalize(raw[train].double(), dim=1).mean(0)
    torch.testing.assert_close(chunked.mean.double(), exact, rtol=1e-6, atol=1e-7)


def test_all_models_are_counted_together_and_a_control_once(caplog: pytest.LogCaptureFixture) -> None:
    one, other = raw_rows(5), raw_rows(7)
    needed = ROWS * (5 + 7) * 4
    with caplog.at_level(logging.INFO, logger="hyma_mllm"):
        assert fit_memory([one, other, one], CPU, needed)
        assert not fit_memory([one, other], CPU, needed - 1)
    assert "features of 2 models take 0.0 MB" in caplog.messages[0] and "loaded there" in caplog.messages[0]
    assert "stay memory-mapped on disk" in caplog.messages[1]


def test_a_control_shares_its_models_rows(train: Tensor) -> None:
    raw = raw_rows(5)
    one, control = standardised_models([raw, raw], train, CPU, True, "none", True, True)
    assert one.rows is control.rows


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory(CPU) < 2**46
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2**46))
    assert free_memory(CPU) == 0
