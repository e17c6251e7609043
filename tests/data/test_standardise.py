"""Standardised features: against plain formulas in float64, folding, degenerate features, state dict."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hyma_mllm.data import standardise
from hyma_mllm.data.standardise import Power, StandardiseConfig, Standardiser


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) * 7 + 2


def reference(x: Tensor, train: Tensor, power: Power, centre: bool, unit: bool) -> Tensor:
    def shaped(z: Tensor) -> Tensor:
        z = z.double() / z.double().norm(dim=1, keepdim=True)
        return torch.where(z < 0, -((-z).abs() ** 0.5), z.abs() ** 0.5) if power == "signed_sqrt" else z

    mean = shaped(train).mean(0) if centre else torch.zeros(train.shape[1], dtype=torch.float64)
    out = shaped(x) - mean
    if unit:
        return out / out.norm(dim=1, keepdim=True)
    return out / (shaped(train) - mean).square().mean().sqrt()


@pytest.mark.parametrize("power", ["none", "signed_sqrt"])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_equals_the_formula(
    features: Tensor, power: Power, centre: bool, unit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standardise, "FIT_ROWS", 64)  # so that the sums cross chunks
    train, test = features[:250], features[250:]
    out = Standardiser.fit(train, power, centre, unit)(test)
    torch.testing.assert_close(out.double(), reference(test, train, power, centre, unit), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [True, False])
def test_each_channel_is_divided_by_its_own_rms(features: Tensor, unit: bool) -> None:
    features = features * torch.logspace(-4, 0, 16)  # before the L2 norm: the first channels hardly vary
    shaped = torch.nn.functional.normalize(features.double(), dim=1)
    centred = shaped - shaped.mean(0)
    each = centred.square().mean(0).sqrt()
    wanted = centred / each.clamp_min(float(centred.square().mean().sqrt()) / standardise.LIFT)
    wanted = torch.nn.functional.normalize(wanted, dim=1) if unit else wanted
    found = Standardiser.fit(features, unit=unit, scale="each")(features)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    if not unit:
        assert found[:, -1].square().mean() == pytest.approx(1.0, rel=1e-4)
        assert found[:, 0].square().mean() < 0.1


def test_a_scale_of_all_channels_is_read_from_old_files(features: Tensor) -> None:
    fitted = Standardiser.fit(features, unit=False)
    state = fitted.state_dict() | {"scale": fitted.scale[0].clone()}
    other = Standardiser(16)
    other.load_state_dict(state)
    assert torch.equal(other(features), fitted(features))


def test_images_lie_on_the_sphere_and_texts_have_unit_rms(features: Tensor) -> None:
    images = Standardiser.fit(features, StandardiseConfig().image_power, unit=True)(features)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(features)))
    texts = Standardiser.fit(features, unit=False)(features)
    torch.testing.assert_close(texts.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts.square().mean(), torch.ones(()))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans(), st.sampled_from(["one", "each"]))
def test_folding_is_standardising_and_then_the_linear(
    seed: int, outputs: int, centre: bool, scale: standardise.Scale
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 7, generator=generator, dtype=torch.float64) + 0.5
    standardiser = Standardiser.fit(x, centre=centre, unit=False, scale=scale).double()
    linear = torch.nn.Linear(7, outputs).double()
    weight, bias = standardiser.folded(linear.weight, linear.bias)
    unit = torch.nn.functional.normalize(x, dim=1)
    folded = torch.nn.functional.linear(unit, weight, bias)
    torch.testing.assert_close(folded, linear(standardiser(x)), rtol=0, atol=1e-10)


def test_folding_keeps_the_dtype_of_the_connector(features: Tensor) -> None:
    linear = torch.nn.Linear(16, 3)
    standardiser = Standardiser.fit(features, unit=False)
    weight, bias = standardiser.folded(linear.weight, linear.bias)
    assert weight.dtype == bias.dtype == torch.float32
    folded = torch.nn.functional.linear(torch.nn.functional.normalize(features, dim=1), weight, bias)
    torch.testing.assert_close(folded, linear(standardiser(features)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("power", "unit"), [("signed_sqrt", False), ("none", True)])
def test_what_is_not_affine_does_not_fold(features: Tensor, power: Power, unit: bool) -> None:
    with pytest.raises(ValueError, match="folds"):
        Standardiser.fit(features, power, unit=unit).folded(torch.eye(16), torch.zeros(16))


@pytest.mark.parametrize("power", ["none", "signed_sqrt"])
@pytest.mark.parametrize("unit", [True, False])
def test_constant_features_and_zero_rows_stay_finite(power: Power, unit: bool) -> None:
    constant = torch.tensor([[0.3, -0.4, 0.0]]).repeat(9, 1)
    for train in (constant, torch.zeros(4, 3), torch.cat([constant, torch.zeros(1, 3)])):
        standardiser = Standardiser.fit(train, power, unit=unit)
        x = torch.cat([train, torch.zeros(1, 3)]).requires_grad_()
        out = standardiser(x)
        out.sum().backward()
        assert out.isfinite().all()
        assert x.grad is not None and x.grad.isfinite().all()


def test_what_is_left_of_a_constant_feature_is_not_blown_up() -> None:
    constant = torch.tensor([[0.3, -0.4, 0.7]]).repeat(9, 1)
    for unit in (True, False):
        assert Standardiser.fit(constant, unit=unit)(constant).abs().max() < 0.2


@pytest.mark.parametrize("power", ["none", "signed_sqrt"])
@pytest.mark.parametrize("unit", [True, False])
def test_state_dict_round_trip(features: Tensor, power: Power, unit: bool) -> None:
    fitted = Standardiser.fit(features, power, unit=unit)
    other = Standardiser(16, "none" if power == "signed_sqrt" else "signed_sqrt", not unit)
    other.load_state_dict(fitted.state_dict())
    assert (other.signed_sqrt, other.unit) == (power == "signed_sqrt", unit)
    assert torch.equal(other(features), fitted(features))


def test_nothing_to_fit() -> None:
    for nothing in (torch.zeros(0, 4), iter(())):
        with pytest.raises(ValueError, match="cannot fit"):
            Standardiser.fit(nothing)
