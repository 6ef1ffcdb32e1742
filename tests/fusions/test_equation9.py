"""Equation 9: the folded convolution is the convolution behind explicit equalizers.

The reference is the sum written out, in float64 numpy: no convolution of torch's, no code of the
package's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmseg_fusion.fusions import fold_scale_equalizer


@dataclass
class Case:
    """A convolution, the branches it fuses and their statistics."""

    channels: list[int]
    mean: list[float]
    std: list[float]
    kernel: tuple[int, int]
    stride: int
    dilation: int
    padding: int
    groups: int
    seed: int

    def conv(self) -> nn.Conv2d:
        torch.manual_seed(self.seed)
        return nn.Conv2d(
            sum(self.channels),
            2 * self.groups,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        ).double()

    def feature(self) -> np.ndarray:
        """(2, C, h, w), large enough for an output that no padding reaches."""
        h, w = (2 * self.padding + self.dilation * (k - 1) + 3 for k in self.kernel)
        x = np.random.RandomState(self.seed).randn(2, sum(self.channels), h, w)
        return x * self.per_channel(self.std) + self.per_channel(self.mean)

    def per_channel(self, values: list[float]) -> np.ndarray:
        return np.repeat(values, self.channels)[:, None, None]

    def equalized(self) -> np.ndarray:
        return (self.feature() - self.per_channel(self.mean)) / self.per_channel(self.std)

    def folded(self) -> nn.Conv2d:
        conv = self.conv()
        fold_scale_equalizer(conv, self.channels, self.mean, self.std)
        return conv

    def inner(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Outputs whose window lies inside the image."""
        slices = []
        for n, k in zip(size, self.kernel):
            reach = self.dilation * (k - 1)
            starts = np.arange(0, n + 2 * self.padding - reach, self.stride) - self.padding
            inside = np.flatnonzero((starts >= 0) & (starts + reach < n))
            slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
        return slices[0], slices[1]


def convolve(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """Sums over the window, as the definition of a convolution with bias says."""
    w, b = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    (s, _), (d, _), (p, _) = conv.stride, conv.dilation, conv.padding
    x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    (out, per_group, kh, kw), (height, width) = w.shape, x.shape[2:]
    rows = range(0, height - d * (kh - 1), s)
    columns = range(0, width - d * (kw - 1), s)
    y = np.empty((x.shape[0], out, len(rows), len(columns)))
    for o in range(out):
        first = o // (out // conv.groups) * per_group
        mine = x[:, first : first + per_group]
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                window = mine[:, :, r : r + d * (kh - 1) + 1 : d, c : c + d * (kw - 1) + 1 : d]
                y[:, o, i, j] = (window * w[o]).sum((1, 2, 3)) + b[o]
    return y


finite = st.floats(-5, 5, allow_nan=False, allow_infinity=False)
positive = st.floats(0.05, 20, allow_nan=False)


@st.composite
def cases(draw: st.DrawFn, padded: bool) -> Case:
    branches = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(branches)]
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return Case(
        channels=channels,
        mean=draw(st.lists(finite, min_size=branches, max_size=branches)),
        std=draw(st.lists(positive, min_size=branches, max_size=branches)),
        kernel=kernel,
        stride=draw(st.integers(1, 2)),
        dilation=draw(st.integers(1, 2)),
        padding=draw(st.integers(1, 2)) if padded else 0,
        groups=groups,
        seed=draw(st.integers(0, 10**6)),
    )


@given(case=cases(padded=False))
def test_folded_equals_explicit_without_padding(case: Case) -> None:
    expected = convolve(case.equalized(), case.conv())
    found = convolve(case.feature(), case.folded())
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(case=cases(padded=True))
def test_folded_equals_explicit_where_no_padding_is_seen(case: Case) -> None:
    expected = convolve(case.equalized(), case.conv())
    found = convolve(case.feature(), case.folded())
    rows, columns = case.inner(case.feature().shape[2:])
    inner = (slice(None), slice(None), rows, columns)
    assert found[inner].size
    np.testing.assert_allclose(found[inner], expected[inner], rtol=1e-9, atol=1e-9)


def test_border_differs_by_what_the_padding_stands_for() -> None:
    """0 is the pad value of the raw feature in one form and of the equalized one in the other."""
    case = Case([2, 1], [1.0, -2.0], [0.5, 4.0], (3, 3), 1, 1, 1, 1, seed=0)
    explicit = convolve(case.equalized(), case.conv())
    folded = convolve(case.feature(), case.folded())
    assert np.abs(folded - explicit)[..., 0, :].max() > 0.1
    # Padded with the branch's mean, the raw feature gives the explicit form everywhere.
    padded = np.pad(case.feature(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    border = np.ones(padded.shape[2:], bool)
    border[1:-1, 1:-1] = False
    padded = np.where(border, case.per_channel(case.mean), padded)
    conv = case.folded()
    conv.padding = (0, 0)
    np.testing.assert_allclose(convolve(padded, conv), explicit, rtol=1e-9, atol=1e-9)


@given(case=cases(padded=False))
def test_without_the_bias_only_a_constant_per_channel_is_missing(case: Case) -> None:
    """What batch norm takes out: the recommended form for convolutions that it follows."""
    conv = case.conv()
    fold_scale_equalizer(conv, case.channels, case.mean, case.std, bias=False)
    missing = convolve(case.feature(), conv) - convolve(case.equalized(), case.conv())
    constant = missing[:1, :, :1, :1]
    np.testing.assert_allclose(missing, np.broadcast_to(constant, missing.shape), atol=1e-7)


@settings(max_examples=50)
@given(case=cases(padded=False))
def test_gradient_of_the_weight_is_the_equalized_input(case: Case) -> None:
    """Proposition 3.1 behind an equalizer: dy / dw_i = (x_i - mu_i) / sigma_i."""
    conv = case.conv()
    x = torch.from_numpy(case.equalized())
    conv(x)[0, 0, 0, 0].backward()
    (d, _), per_group = conv.dilation, conv.weight.shape[1]
    kh, kw = conv.kernel_size
    window = case.equalized()[0, :per_group, : d * (kh - 1) + 1 : d, : d * (kw - 1) + 1 : d]
    np.testing.assert_allclose(conv.weight.grad[0].numpy(), window, rtol=1e-12)
    assert not conv.weight.grad[1:].any()


@given(
    channels=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_folded_linear_layer_equals_explicit(channels: list[int], data: st.DataObject) -> None:
    size = len(channels)
    mean = np.array(data.draw(st.lists(finite, min_size=size, max_size=size)))
    std = np.array(data.draw(st.lists(positive, min_size=size, max_size=size)))
    torch.manual_seed(size)
    layer = nn.Linear(sum(channels), 3).double()
    weight, bias = (p.detach().numpy().copy() for p in (layer.weight, layer.bias))
    x = np.random.RandomState(size).randn(5, sum(channels)) * 3 + 1
    equalized = (x - np.repeat(mean, channels)) / np.repeat(std, channels)
    fold_scale_equalizer(layer, channels, mean.tolist(), std.tolist())
    found = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, equalized @ weight.T + bias, rtol=1e-9, atol=1e-9)


def test_reference_is_a_convolution() -> None:
    """The sums above against torch, so that the tests do not compare two errors."""
    case = Case([2, 4], [0.0, 0.0], [1.0, 1.0], (3, 2), 2, 2, 1, 2, seed=1)
    conv = case.conv()
    expected = conv(torch.from_numpy(case.feature())).detach().numpy()
    assert convolve(case.feature(), conv) == pytest.approx(expected, abs=1e-12)
