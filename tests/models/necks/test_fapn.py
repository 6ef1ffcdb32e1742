"""FaPN against the pyramid written out, level by level and pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.necks.fapn import FaPN

from ...testers import NeckTester
from ..layers.test_deform_conv import naive

AHEAD_OF_THE_OFFSETS = 'alignments.*.compare.*'


class TestFaPN(NeckTester):
    neck = dict(type='FaPN', channels=16)
    out_channels = (16,) * 4
    out_strides = (4, 8, 16, 32)
    # The convolution behind it starts at zero.
    zero_gradients = (AHEAD_OF_THE_OFFSETS,)


class TestFaPNLearned(NeckTester):
    """With offsets that are no longer zero: every parameter has a gradient that is not 0."""

    neck = dict(type='FaPN', channels=8, deformable_groups=4, num_outs=2, norm_cfg=dict(type='BN'))
    out_channels = (8,) * 2
    out_strides = (4, 8)
    # The graph is the same as above.
    compiled = False
    # Offsets in bfloat16 are some hundredths of a cell off.
    autocast_error = 0.06

    def build(self, **changes: Any) -> nn.Module:
        neck = super().build(**changes)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for alignment in neck.alignments:
                for p in alignment.offset_mask.parameters():
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        return neck


SIZES = [(9, 12), (5, 6), (3, 3), (1, 2)]


def randomized(neck: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in [*neck.named_parameters(), *neck.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if 'var' in name else value.normal_(0, 0.4)
    return neck.double().eval()


def features(channels, sizes=SIZES) -> list[Tensor]:
    return [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes)]


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    y = torch.einsum('oc,nchw->nohw', conv.weight[:, :, 0, 0], x)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear between the centres of the cells, the border's value outside of them."""
    for dim, side in ((2, size[0]), (3, size[1])):
        centre = (torch.arange(side).double() + 0.5) * x.shape[dim] / side - 0.5
        centre = centre.clamp(0, x.shape[dim] - 1)
        low = centre.floor().long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        share = (centre - low).view([-1 if d == dim else 1 for d in range(4)])
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    return x


@pytest.mark.parametrize('norm', [None, 'BN'])
@pytest.mark.parametrize('sizes', [SIZES, [(4, 5)] * 4])
def test_four_levels_written_out(norm: str | None, sizes: list) -> None:
    torch.manual_seed(0)
    norm_cfg = norm and dict(type=norm)
    neck = randomized(FaPN([5, 6, 7, 9], 4, deformable_groups=2, norm_cfg=norm_cfg))
    inputs = features(neck.in_channels, sizes)

    def module(conv_module: nn.Module, x: Tensor) -> Tensor:
        conv = conv_module.conv
        if conv.kernel_size == (1, 1):
            y = pointwise(conv, x)
        else:
            y = F.conv2d(x, conv.weight, conv.bias, padding=1)
        return batch_norm(conv_module.norm, y) if norm else y

    def level(i: int, above: Tensor) -> Tensor:
        c = inputs[i]
        selection, alignment = neck.laterals[i], neck.alignments[i]
        mean = c.sum((2, 3), keepdim=True) / (sizes[i][0] * sizes[i][1])
        importance = 1 / (1 + (-pointwise(selection.importance, mean)).exp())
        selected = pointwise(selection.project, c * (1 + importance))
        above = enlarged(above, sizes[i])
        both = module(alignment.compare, torch.cat((selected, above + above), 1))
        conv = alignment.offset_mask
        maps = F.conv2d(both, conv.weight, conv.bias, padding=1)
        # Two groups of nine taps: 36 channels of offsets, 18 of the mask.
        aligned = naive(
            above,
            maps[:, :36],
            1 / (1 + (-maps[:, 36:]).exp()),
            alignment.deform.weight,
            alignment.deform.bias,
            padding=(1, 1),
        )
        return selected + aligned.clamp(min=0)

    with torch.no_grad():
        p5 = module(neck.laterals[3], inputs[3])
        p4 = level(2, p5)
        p3 = level(1, p4)
        p2 = level(0, p3)
        expected = [module(out, p) for out, p in zip(neck.outputs, (p2, p3, p4))] + [p5]
        found = neck(inputs)
    assert [tuple(f.shape[2:]) for f in found] == sizes
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


@pytest.mark.stack
def test_starts_without_displacement() -> None:
    """Before the first step the alignment is half of an ordinary convolution, then ReLU."""
    torch.manual_seed(0)
    neck = MODELS.build(dict(type='FaPN', in_channels=[3, 4], channels=8)).double()
    neck.init_weights()
    low, high = features([3, 4], [(5, 7), (3, 4)])
    selected, above = neck.laterals[0](low), enlarged(neck.laterals[1](high), (5, 7))
    deform = neck.alignments[0].deform
    aligned = (F.conv2d(above, 0.5 * deform.weight, deform.bias, padding=1)).relu()
    torch.testing.assert_close(neck([low, high])[0], neck.outputs[0](selected + aligned))


def test_offsets_move_what_is_above() -> None:
    """An offset of one column everywhere, and a kernel of its centre: the level above, shifted."""
    neck = FaPN([2, 2], 2, num_outs=1, deformable_groups=1).double()
    alignment = neck.alignments[0]
    with torch.no_grad():
        alignment.deform.weight.zero_()
        alignment.deform.weight[:, :, 1, 1] = torch.eye(2)
        # Of the pairs (y, x) of nine taps, x; and a mask of 1.
        alignment.offset_mask.bias[1:18:2] = 1
        alignment.offset_mask.bias[18:] = 100
    above = torch.rand(1, 2, 4, 5, dtype=torch.float64)
    moved = alignment(torch.randn(1, 2, 4, 5, dtype=torch.float64), above)
    torch.testing.assert_close(moved[..., :-1], above[..., 1:])
    assert not moved[..., -1].any()


@pytest.mark.parametrize('num_outs', [1, 2, 3])
def test_fewer_levels_out_leave_nothing_unused(num_outs: int) -> None:
    neck = FaPN([3, 4, 5], 8, num_outs=num_outs)
    whole = FaPN([3, 4, 5], 8)
    left_out = whole.load_state_dict(neck.state_dict(), strict=False).missing_keys
    assert len(left_out) == 2 * (2 - len(neck.outputs))
    inputs = [torch.randn(1, c, 9 >> i, 9 >> i) for i, c in enumerate((3, 4, 5))]
    outs = neck(inputs)
    assert len(outs) == num_outs
    sum(x.square().sum() for x in outs).backward()
    assert all(p.grad is not None for p in neck.parameters())
    with torch.no_grad():
        for a, b in zip(outs, whole(inputs)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize('norm_cfg', [None, dict(type='BN')])
def test_parameters_and_multiply_adds(norm_cfg: dict | None) -> None:
    ins, c, groups = [5, 6, 7, 9], 8, 4
    neck = FaPN(ins, c, deformable_groups=groups, norm_cfg=norm_cfg).eval()
    area = [math.prod(size) for size in SIZES]
    offsets = 27 * groups
    # A bias, or a norm's scale and shift.
    extra = c if norm_cfg is None else 2 * c
    lower, top = ins[:-1], ins[-1]
    params = top * c + extra
    params += sum(i * i + i * c for i in lower)
    params += 3 * (2 * c * c + (0 if norm_cfg is None else 2 * c))
    params += 3 * (9 * c * offsets + offsets + 9 * c * c + c)
    params += 3 * (9 * c * c + extra)
    flops = top * c * area[3]
    for i, pixels in zip(lower, area):
        flops += i * i + i * c * pixels
        flops += (2 * c * c + 9 * c * offsets + 9 * c * c + 9 * c * c) * pixels
    found = count_call(neck, [torch.randn(1, i, *s) for i, s in zip(ins, SIZES)])
    assert (found.params, found.flops, found.uncounted) == (params, flops, ())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_channels=64), 'must list the channels of two levels or more.*got 64'),
        (dict(in_channels=[4]), r'two levels or more.*got \[4\]'),
        (dict(num_outs=3), 'num_outs must be between 1 and the 2 levels.*got 3'),
        (dict(num_outs=0), 'num_outs must be between 1 and the 2 levels.*got 0'),
        (dict(deformable_groups=3), 'divisor of channels=8, got 3; change model.neck.deform'),
        (dict(implementation='mmcv'), "one of .*'pytorch'.*got 'mmcv'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaPN(**{**dict(in_channels=[4, 4], channels=8), **options})


def test_wrong_number_of_levels() -> None:
    with pytest.raises(ValueError, match=r'expected 2 levels .*got 3; set the out_indices'):
        FaPN([4, 4], 8)([torch.randn(1, 4, 4, 4)] * 3)
