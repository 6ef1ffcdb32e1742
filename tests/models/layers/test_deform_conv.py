"""Deformable convolution against loops over every pixel, and against torchvision's operator."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.layers import deform_conv
from mmseg_fusion.models.layers.deform_conv import (
    COMPILED,
    ModulatedDeformConv2d,
    modulated_deform_conv2d,
)

#: What runs on this machine; torchvision's operator only where its build matches torch's.
IMPLEMENTATIONS = ['pytorch', *(['torchvision'] if 'cpu' in COMPILED else [])]


def naive(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Equation 1 of DCNv2, one product at a time."""
    batch, _, out_height, out_width = offset.shape
    outs, ins, kernel_height, kernel_width = weight.shape
    taps = kernel_height * kernel_width
    channels, height, width = x.shape[1:]
    deformable = offset.shape[1] // (2 * taps)
    xs, offsets, weights = x.tolist(), offset.tolist(), weight.tolist()
    masks = None if mask is None else mask.tolist()

    def read(n: int, c: int, v: float, u: float) -> float:
        total = 0.0
        for row in range(math.floor(v), math.floor(v) + 2):
            for column in range(math.floor(u), math.floor(u) + 2):
                if 0 <= row < height and 0 <= column < width:
                    total += (1 - abs(v - row)) * (1 - abs(u - column)) * xs[n][c][row][column]
        return total

    result = torch.zeros(batch, outs, out_height, out_width, dtype=torch.float64)
    for n, i, j in product(range(batch), range(out_height), range(out_width)):
        samples = {}
        for c, a, b in product(range(channels), range(kernel_height), range(kernel_width)):
            tap = (c // (channels // deformable)) * taps + a * kernel_width + b
            v = i * stride[0] - padding[0] + a * dilation[0] + offsets[n][2 * tap][i][j]
            u = j * stride[1] - padding[1] + b * dilation[1] + offsets[n][2 * tap + 1][i][j]
            samples[c, a, b] = read(n, c, v, u) * (1 if masks is None else masks[n][tap][i][j])
        for o in range(outs):
            first = o // (outs // (channels // ins)) * ins
            result[n, o, i, j] = sum(
                weights[o][c][a][b] * samples[first + c, a, b]
                for c, a, b in product(range(ins), range(kernel_height), range(kernel_width))
            )
    return result if bias is None else result + bias.detach().view(-1, 1, 1)


# in, out, groups, deformable groups, kernel, stride, padding, dilation, size
CASES = {
    'plain': (4, 3, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), (5, 6)),
    'deformable groups': (8, 2, 1, 4, (3, 3), (1, 1), (1, 1), (1, 1), (4, 5)),
    'a group per channel': (3, 2, 1, 3, (2, 2), (1, 1), (0, 0), (1, 1), (4, 3)),
    'groups': (6, 4, 2, 3, (3, 3), (1, 1), (1, 1), (1, 1), (3, 4)),
    'all sides differ': (4, 6, 2, 2, (3, 2), (2, 1), (1, 2), (1, 3), (7, 6)),
    'pointwise': (2, 3, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), (3, 3)),
    'one cell': (2, 2, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
}


def arguments(
    case: str, batch: int = 2, spread: float = 1.5, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], tuple]:
    """x, offset, mask, weight and bias; stride, padding and dilation."""
    ins, outs, groups, deformable, kernel, stride, padding, dilation, size = CASES[case]
    out = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(size, kernel, stride, padding, dilation)
    ]
    generator = torch.Generator().manual_seed(len(case))
    taps = math.prod(kernel)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (
            (batch, ins, *size),
            (batch, 2 * deformable * taps, *out),
            (batch, deformable * taps, *out),
            (outs, ins // groups, *kernel),
            (outs,),
        )
    ]
    tensors[1] *= spread
    tensors[2] = tensors[2].sigmoid()
    return [t.to(dtype) for t in tensors], (stride, padding, dilation)


@pytest.mark.stack
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', CASES)
def test_same_as_loops(case: str, implementation: str) -> None:
    tensors, geometry = arguments(case)
    found = modulated_deform_conv2d(*tensors, *geometry, implementation=implementation)
    torch.testing.assert_close(found, naive(*tensors, *geometry), rtol=1e-10, atol=1e-10)
    x, offset, _, weight, _ = tensors
    found = modulated_deform_conv2d(
        x, offset, None, weight, None, *geometry, implementation=implementation
    )
    expected = naive(x, offset, None, weight, None, *geometry)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', ['groups', 'all sides differ', 'one cell'])
def test_gradients(case: str, implementation: str) -> None:
    tensors, geometry = arguments(case)
    tensors = [t[:1] if i < 3 else t for i, t in enumerate(tensors)]

    def function(*args: Tensor) -> Tensor:
        return modulated_deform_conv2d(*args, *geometry, implementation=implementation)

    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize('case', ['groups', 'one cell'])
def test_gradients_of_gradients(case: str) -> None:
    tensors, geometry = arguments(case)
    tensors = [t[:1] if i < 3 else t for i, t in enumerate(tensors)]

    def function(*args: Tensor) -> Tensor:
        return modulated_deform_conv2d(*args, *geometry, implementation='pytorch')

    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def slopes(implementation: str, case: str, whole: bool, frozen: tuple = ()) -> list[Tensor]:
    """Output and gradients; offsets in whole cells, or not."""
    tensors, geometry = arguments(case, spread=3)
    if whole:
        tensors[1] = tensors[1].round()
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    found = modulated_deform_conv2d(*leaves, *geometry, implementation=implementation)
    weights = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view_as(found)
    wanted = [t for t in leaves if t.requires_grad]
    return [found, *torch.autograd.grad((found * weights).sum(), wanted)]


@pytest.mark.skipif(
    'torchvision' not in IMPLEMENTATIONS, reason='needs a torchvision that was built for this torch'
)
@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_same_as_torchvision(case: str, whole: bool) -> None:
    """Also the slope at whole positions, where left and right differ, borders included."""
    ours, theirs = slopes('pytorch', case, whole), slopes('torchvision', case, whole)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_slope_at_a_whole_position_is_the_right_one() -> None:
    """On a map of squares, whose differences to the left and to the right are known."""
    x = (torch.arange(5.0).view(-1, 1) ** 2 + 10 * torch.arange(4.0) ** 2)[None, None]
    offset = torch.zeros(1, 2, 5, 4, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1)
    for implementation in IMPLEMENTATIONS:
        found = modulated_deform_conv2d(x, offset, None, weight, implementation=implementation)
        (slope,) = torch.autograd.grad(found.sum(), offset)
        below, right = F.pad(x, (0, 1, 0, 1))[0, 0, 1:, :-1], F.pad(x, (0, 1))[0, 0, :, 1:]
        torch.testing.assert_close(slope[0], torch.stack((below, right)) - x[0, 0])


@pytest.mark.parametrize('frozen', [(0,), (1, 2), (3, 4), (0, 1, 2)])
def test_frozen_arguments(frozen: tuple[int, ...]) -> None:
    _, *all_slopes = slopes('pytorch', 'groups', False)
    _, *some = slopes('pytorch', 'groups', False, frozen)
    kept = [g for i, g in enumerate(all_slopes) if i not in frozen]
    for a, b in zip(some, kept):
        assert torch.equal(a, b)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_without_displacement_it_is_a_convolution(implementation: str) -> None:
    for case in CASES:
        (x, offset, mask, weight, bias), geometry = arguments(case, dtype=torch.float32)
        stride, padding, dilation = geometry
        found = modulated_deform_conv2d(
            x,
            torch.zeros_like(offset),
            torch.ones_like(mask),
            weight,
            bias,
            *geometry,
            implementation=implementation,
        )
        groups = x.shape[1] // weight.shape[1]
        expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize(('down', 'right'), [(0, 1), (2, 0), (-1, 3), (-4, -2)])
def test_whole_offsets_shift_the_map(down: int, right: int, implementation: str) -> None:
    (x, offset, _, weight, bias), geometry = arguments('plain')
    offset = torch.zeros_like(offset)
    offset[:, 0::2], offset[:, 1::2] = down, right
    found = modulated_deform_conv2d(
        x, offset, None, weight, bias, *geometry, implementation=implementation
    )
    # Zeros all around, wide enough for the shift and the kernel.
    wide = F.pad(x, (6,) * 4)
    expected = F.conv2d(wide, weight, bias)[
        ..., 5 + down : 5 + down + x.shape[2], 5 + right : 5 + right + x.shape[3]
    ]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_outside_of_the_map(implementation: str) -> None:
    """Partial within a cell of the border, nothing beyond, and no slope there."""
    x = torch.full((1, 1, 3, 3), 8.0)
    weight = torch.ones(1, 1, 1, 1)
    positions = [-1e30, -5.0, -1.5, -1.0, -0.75, -0.25, 0.0, 2.0, 2.25, 2.75, 3.0, 3.5, 9.0, 1e30]
    expected = [0, 0, 0, 0, 2, 6, 8, 8, 6, 2, 0, 0, 0, 0]
    for vertical in (True, False):
        for position, value in zip(positions, expected):
            offset = torch.zeros(1, 2, 3, 3)
            offset[:, 0 if vertical else 1] = position
            # The first row, or column, is the one that moves from 0.
            offset.requires_grad_()
            found = modulated_deform_conv2d(x, offset, None, weight, implementation=implementation)
            line = found[0, 0, 0] if vertical else found[0, 0, :, 0]
            assert line.tolist() == [value] * 3
            (slope,) = torch.autograd.grad(line.sum(), offset)
            if position < -1 or position >= 3:
                assert not slope.any()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_an_empty_batch(implementation: str) -> None:
    for case in CASES:
        tensors, geometry = arguments(case, batch=0)
        tensors = [t.requires_grad_() for t in tensors]
        found = modulated_deform_conv2d(*tensors, *geometry, implementation=implementation)
        assert found.shape == (0, tensors[3].shape[0], *tensors[1].shape[2:])
        found.sum().backward()
        assert all(t.grad.shape == t.shape and not t.grad.any() for t in tensors)


@pytest.mark.parametrize('channels_last', [False, True])
def test_any_memory_layout(channels_last: bool) -> None:
    (x, offset, mask, weight, bias), geometry = arguments('groups')
    expected = modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    both = torch.cat((offset, mask), 1).contiguous(memory_format=layout)
    offset, mask = both.split([offset.shape[1], mask.shape[1]], 1)
    x = x.contiguous(memory_format=layout).requires_grad_()
    found = modulated_deform_conv2d(
        x, offset, mask, weight, bias, *geometry, implementation='pytorch'
    )
    torch.testing.assert_close(found, expected)
    found.backward(torch.randn_like(found).contiguous(memory_format=layout))
    assert x.grad.any()


@pytest.mark.parametrize('implementation', ['auto', *IMPLEMENTATIONS])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_computed_in_float32(autocast: bool, implementation: str) -> None:
    """A map of 300 columns, past the whole numbers that bfloat16 has."""
    x = torch.randn(1, 2, 2, 300).bfloat16()
    offset, weight = torch.full((1, 2, 2, 300), 0.25).bfloat16(), torch.randn(3, 2, 1, 1)
    if not autocast:
        weight = weight.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        found = modulated_deform_conv2d(x, offset, None, weight, implementation=implementation)
    assert found.dtype == torch.bfloat16
    expected = naive(x.double(), offset.double(), None, weight.double())
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0.01, atol=1e-3)


def test_backward_within_autocast_is_float32() -> None:
    tensors, geometry = arguments('groups', dtype=torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    found = modulated_deform_conv2d(*leaves, *geometry, implementation='pytorch')
    expected = torch.autograd.grad(found.sum(), leaves, retain_graph=True)
    with torch.autocast('cpu', torch.bfloat16):
        gradients = torch.autograd.grad(found.sum(), leaves)
    for a, b in zip(gradients, expected):
        assert torch.equal(a, b)


def test_compiles_with_its_backward_pass() -> None:
    # One row of the kernel: the graph of a second one is the same again.
    x, offset, mask = torch.randn(2, 4, 5, 6), torch.randn(2, 8, 5, 5), torch.rand(2, 4, 5, 5)
    layer = ModulatedDeformConv2d(4, 2, (1, 2), deformable_groups=2, implementation='pytorch')
    offset.requires_grad_()
    expected = layer(x, offset, mask)
    (slope,) = torch.autograd.grad(expected.square().sum(), offset)
    torch._dynamo.reset()
    found = torch.compile(layer, backend='aot_eager', fullgraph=True)(x, offset, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), offset)[0], slope)


def test_keeps_no_samples_for_the_backward_pass() -> None:
    (x, offset, mask, weight, bias), geometry = arguments('plain')
    leaves = [t.requires_grad_() for t in (x, offset, mask, weight)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        modulated_deform_conv2d(*leaves, bias, *geometry, implementation='pytorch')
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in leaves)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', ['deformable groups', 'groups', 'all sides differ'])
def test_multiply_adds_are_those_of_the_convolution(case: str, implementation: str) -> None:
    (x, offset, mask, weight, _), geometry = arguments(case)
    ins, outs, groups, deformable, kernel = CASES[case][:5]
    layer = ModulatedDeformConv2d(
        ins, outs, kernel, *geometry, groups, deformable, implementation=implementation
    )
    found = count_call(layer, x.float(), offset.float(), mask.float())
    positions = x.shape[0] * offset.shape[2] * offset.shape[3]
    assert found.flops == positions * (ins // groups) * outs * math.prod(kernel)
    assert found.params == weight.numel() + outs
    assert found.uncounted == ()


def test_initial_weights() -> None:
    layer = ModulatedDeformConv2d(64, 32, 3)
    bound = 1 / math.sqrt(64 * 9)
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    torch.testing.assert_close(layer.weight.var(), torch.tensor(bound**2 / 3), rtol=0.05, atol=0)
    assert not layer.bias.any()
    assert ModulatedDeformConv2d(4, 4, 3, bias=False).bias is None
    assert 'deformable_groups=1' in repr(layer)
    assert isinstance(layer, nn.Module)


def test_a_schema_without_a_kernel_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where compat only declares the operator, or where it was built for another device."""
    tensors, geometry = arguments('plain')
    expected = modulated_deform_conv2d(*tensors, *geometry, implementation='pytorch')
    monkeypatch.setattr(deform_conv, 'COMPILED', frozenset({'cuda'}))
    assert torch.equal(modulated_deform_conv2d(*tensors, *geometry), expected)
    with pytest.raises(ImportError, match=r"operator for cpu tensors, found one for \['cuda'\]"):
        modulated_deform_conv2d(*tensors, *geometry, implementation='torchvision')


def test_the_kernel_is_looked_for_not_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.torchvision, 'deform_conv2d', object(), raising=False)
    for there in ({'CPU'}, {'CUDA'}, set()):
        monkeypatch.setattr(
            torch._C, '_dispatch_has_kernel_for_dispatch_key', lambda _, key, t=there: key in t
        )
        assert deform_conv._devices_with_a_kernel() == {key.lower() for key in there}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(implementation='mmcv'), "one of .*'pytorch'.*got 'mmcv'"),
        (dict(offset=torch.zeros(2, 17, 5, 6)), r'offset has 17 channels: expected 2 \* .* \* 9'),
        (dict(offset=torch.zeros(2, 54, 5, 6)), 'a divisor of the 4 channels'),
        (dict(offset=torch.zeros(2, 18, 5, 5)), r'offset of shape \(2, 18, 5, 6\), got \(2, 18, 5'),
        (dict(offset=torch.zeros(1, 18, 5, 6)), r'offset of shape \(2, 18, 5, 6\), got \(1, 18'),
        (dict(mask=torch.zeros(2, 18, 5, 6)), r'mask of shape \(2, 9, 5, 6\), got \(2, 18'),
        (dict(weight=torch.zeros(3, 3, 3, 3)), r'\(3, 3, 3, 3\) does not fit 4 channels'),
        (dict(weight=torch.zeros(3, 2, 3, 3)), 'out_channels divisible by groups'),
        (dict(padding=0, dilation=3), r'\(5, 6\) is smaller than the kernel \(3, 3\)'),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    (x, offset, mask, weight, _), _ = arguments('plain', dtype=torch.float32)
    options = dict(x=x, offset=offset, mask=mask, weight=weight, padding=1)
    with pytest.raises(ValueError, match=message):
        modulated_deform_conv2d(**{**options, **changes})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(groups=3), 'groups must be a divisor of in_channels=8 and out_channels=4, got 3'),
        (dict(deformable_groups=5), 'deformable_groups must be a divisor of in_channels=8, got 5'),
        (dict(implementation='cuda'), "implementation must be one of .*got 'cuda'"),
    ],
)
def test_errors_of_the_layer(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModulatedDeformConv2d(8, 4, 3, **options)


@pytest.mark.gpu
@pytest.mark.parametrize('case', CASES)
def test_on_cuda(case: str) -> None:
    tensors, geometry = arguments(case)
    expected = naive(*tensors, *geometry)
    for implementation in ('pytorch', 'auto'):
        found = modulated_deform_conv2d(
            *[t.cuda() for t in tensors], *geometry, implementation=implementation
        )
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
