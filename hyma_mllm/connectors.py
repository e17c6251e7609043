"""Connectors: their shapes, their stacked application over pairs, and the plain module for one pair.

Stacked weights keep nn.Linear's layout and the names of the `nn.Sequential` that the authors release
(`0.weight`, `0.bias`, `2.weight`, ...), so that one pair's slice is the state dict of its plain module.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyma_mllm.errors import HymaError

Activation = Literal["relu", "gelu"]

ConnectorParams = dict[str, Tensor]
"""Stacked weights in nn.Linear layout: `"0.weight"` [pairs, out, in], `"0.bias"` [pairs, out], `"2.weight"`, ..."""


@dataclass(frozen=True)
class LayerShape:
    """One Linear of a connector: its index in the nn.Sequential, and its fans."""

    index: int
    fan_in: int
    fan_out: int


@dataclass
class ConnectorSpec:
    """A family of connectors: a Linear, or an MLP of any depth (HYMA, arXiv 2507.10015, section 3).

    Attributes:
        depth: hidden layers; 0 is a Linear.
        hidden: width of each hidden layer; 0 takes the width of the output (LLaVA's projector).
        activation: between layers; `gelu` is the exact one, by the error function.

    Raises:
        HymaError: for a value that names no connector.
    """

    depth: int = 1
    hidden: int = 1024
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or self.depth < 0:
            raise HymaError(
                f"The connector depth {self.depth} is not a number of hidden layers; write 0, 1, 2 or more."
            )
        if not isinstance(self.hidden, int) or self.hidden < 0:
            raise HymaError(
                f"The connector's hidden width {self.hidden} is negative; write 1024, say, or 0 for the output's width."
            )
        if self.activation not in get_args(Activation):
            raise HymaError(f"The connector activation {self.activation!r} is unknown; write relu or gelu.")

    @classmethod
    def named(cls, name: str, hidden: int = 1024, activation: Activation = "relu") -> Self:
        """The spec of a family's name, `linear`, `mlp1`, `mlp2`, ...; the inverse of `name`.

        Raises:
            HymaError: if the name is none of these.
        """
        match = re.fullmatch(r"mlp([1-9]\d*)", name)
        if match is None and name != "linear":
            raise HymaError(f"The connector {name!r} is unknown; write linear, mlp1 or mlp2 (any number after mlp).")
        return cls(depth=int(match[1]) if match else 0, hidden=hidden, activation=activation)

    @property
    def name(self) -> str:
        """`linear`, or `mlp` and the number of hidden layers."""
        return f"mlp{self.depth}" if self.depth else "linear"

    def layers(self, d_in: int, d_out: int) -> tuple[LayerShape, ...]:
        """The Linear layers from input to output; activations take the odd indices of the nn.Sequential."""
        widths = [d_in, *[self.hidden or d_out] * self.depth, d_out]
        return tuple(LayerShape(2 * n, widths[n], widths[n + 1]) for n in range(self.depth + 1))

    def parameters(self, d_in: int, d_out: int) -> int:
        """Number of weights and biases of one connector of this shape."""
        return sum(layer.fan_out * (layer.fan_in + 1) for layer in self.layers(d_in, d_out))


@dataclass
class ConnectorGroup:
    """Connectors of one shape.

    Attributes:
        positions: [pairs] int64 on CPU, where each stands in the list of pairs that was asked for.
        pairs: [pairs] int64 on CPU, index of each in the PairGrid.
        shape: (d_in, d_out).
        params: stacked over the group's pairs.
    """

    positions: Tensor
    pairs: Tensor
    shape: tuple[int, int]
    params: ConnectorParams


class _StackedAffine(torch.autograd.Function):
    """`x @ weight^T + bias` of every pair: x [pairs, rows, in], weight [pairs, out, in], bias [pairs, out].

    Autograd through `baddbmm` on the transposed weight gives the weight's gradient transposed, and copies it into the
    layout of the weight: a pass over the largest tensor of the step. Here the product yields that layout itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if need_x else None,
            torch.bmm(gradient.transpose(1, 2), x) if need_weight else None,
            gradient.sum(1) if need_bias else None,
        )


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`_StackedAffine` in the dtype that autocast asks for; autocast does not look into a Function by itself."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (part if part.dtype == torch.float64 else part.to(dtype) for part in (x, weight, bias))
    y: Tensor = _StackedAffine.apply(x, weight, bias)
    return y


def apply(spec: ConnectorSpec, params: ConnectorParams, x: Tensor) -> Tensor:
    """The connectors of several pairs, each on its own input, as one batched product a layer.

    Args:
        spec: the family; says the number of layers and the activation.
        params: stacked weights of the pairs.
        x: [pairs, batch, d_in] or [pairs, batch, tokens, d_in], floating, in the weights' dtype unless under autocast.

    Returns:
        The same leading dimensions with d_out last.

    Raises:
        ValueError: if `params` holds other layers than the spec, or `x` other pairs or widths than `params`.
    """
    names = {f"{2 * n}.{kind}" for n in range(spec.depth + 1) for kind in ("weight", "bias")}
    if set(params) != names:
        raise ValueError(f"a {spec.name} connector has {sorted(names)}, not {sorted(params)}")
    pairs, _, d_in = params["0.weight"].shape
    if x.ndim < 3 or x.shape[0] != pairs or x.shape[-1] != d_in:
        raise ValueError(f"connectors of {pairs} pairs read [{pairs}, batch, {d_in}], not {list(x.shape)}")
    y = x.flatten(1, -2)
    for n in range(spec.depth + 1):
        if n:
            # In place: the product is nobody else's, and its backward needs it not.
            y = functional.relu_(y) if spec.activation == "relu" else functional.gelu(y)
        y = _affine(y, params[f"{2 * n}.weight"], params[f"{2 * n}.bias"])
    return y.view(*x.shape[:-1], y.shape[-1])


def initial(spec: ConnectorSpec, shape: tuple[int, int], pairs: int, generator: torch.Generator) -> ConnectorParams:
    """Connectors with the statistics of a new nn.Linear: everything uniform in +-1/sqrt(fan_in).

    That is what `kaiming_uniform_(a=sqrt(5))` (He et al., 2015) amounts to for weights, and torch's rule for biases.

    Returns:
        float32 weights stacked over `pairs`, on the generator's device.
    """
    params: ConnectorParams = {}
    for layer in spec.layers(*shape):
        bound = 1 / math.sqrt(layer.fan_in)
        weight = torch.empty(pairs, layer.fan_out, layer.fan_in, device=generator.device)
        bias = torch.empty(pairs, layer.fan_out, device=generator.device)
        params[f"{layer.index}.weight"] = weight.uniform_(-bound, bound, generator=generator)
        params[f"{layer.index}.bias"] = bias.uniform_(-bound, bound, generator=generator)
    return params


def module(spec: ConnectorSpec, shape: tuple[int, int]) -> nn.Sequential:
    """The plain module of one pair, on which `load_state_dict(select(params, k))` is strict."""
    modules: list[nn.Module] = []
    for layer in spec.layers(*shape):
        if modules:
            modules.append(nn.ReLU() if spec.activation == "relu" else nn.GELU())
        modules.append(nn.Linear(layer.fan_in, layer.fan_out))
    return nn.Sequential(*modules)


def select(params: ConnectorParams, k: int) -> dict[str, Tensor]:
    """The plain state dict of the pair at position `k`: detached copies that own their memory."""
    return {name: stacked[k].detach().clone() for name, stacked in params.items()}


def stack(states: Sequence[Mapping[str, Tensor]]) -> ConnectorParams:
    """Stacked weights of plain state dicts of one shape; the inverse of `select`.

    Raises:
        ValueError: if there are none, or their names differ (other shapes fail in torch.stack).
    """
    if not states or any(set(state) != set(states[0]) for state in states):
        raise ValueError("connectors can only be stacked if there are some, and all have the same names")
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def check_state(spec: ConnectorSpec, shape: tuple[int, int], state: Mapping[str, Tensor]) -> None:
    """Refuse a plain state dict that is no connector of this family and shape.

    Raises:
        ValueError: naming what differs.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in spec.layers(*shape):
        wanted[f"{layer.index}.weight"] = (layer.fan_out, layer.fan_in)
        wanted[f"{layer.index}.bias"] = (layer.fan_out,)
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != wanted:
        raise ValueError(f"a {spec.name} connector from {shape[0]} to {shape[1]} has {wanted}, not {found}")


def folded(state: Mapping[str, Tensor], mean: Tensor, spread: Tensor, scale: float) -> dict[str, Tensor]:
    """The plain state dict that maps raw inputs as `state` maps standardised ones, its output times `scale`.

    scale * f((x - mean) / spread): exact, for the first and the last layer of a connector are affine.

    Args:
        state: one pair's plain state dict, a Linear or an MLP.
        mean: [d_in] subtracted from every input.
        spread: [d_in] that divides what is left.
        scale: of the output.
    """
    found = {name: value.detach().double().clone() for name, value in state.items()}
    last = max(int(name.split(".")[0]) for name in state)
    found["0.weight"] = found["0.weight"] / spread.double()
    found["0.bias"] = found["0.bias"] - found["0.weight"] @ mean.double()
    for kind in ("weight", "bias"):
        found[f"{last}.{kind}"] = found[f"{last}.{kind}"] * scale
    return {name: value.to(state[name].dtype) for name, value in found.items()}
