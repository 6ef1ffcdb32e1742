"""DenseASPPHead: what every head owes, the paper's equations written out, its size, CAR on it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.decode_heads.dense_aspp_head import DenseASPPHead

from ...testers import HeadTester

RATES = (3, 6, 12, 18, 24)


class TestWithBottleneck(HeadTester):
    head = dict(type='DenseASPPHead', in_index=1, reduced_channels=16)
    stride = 8


class TestPaperForm(HeadTester):
    head = dict(type='DenseASPPHead', in_index=1, dilations=(1, 2, 4), channels=None)
    stride = 8


def build(**kwargs) -> DenseASPPHead:
    options = dict(in_channels=16, num_classes=4, norm_cfg=dict(type='BN'))
    return MODELS.build(dict(dict(type='DenseASPPHead', **options), **kwargs))


def with_noise(head: nn.Module) -> nn.Module:
    """In float64 and eval mode, with weights and statistics of norms that are no ones and zeros."""
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return head.double().eval()


# --- the paper, written out ------------------------------------------------------------------


def normed(x: Tensor, norm: nn.BatchNorm2d | None) -> Tensor:
    if norm is None:
        return x
    column = [t[:, None, None] for t in (norm.running_mean, norm.running_var)]
    scale, shift = norm.weight[:, None, None], norm.bias[:, None, None]
    return (x - column[0]) / (column[1] + norm.eps).sqrt() * scale + shift


def convolved(x: Tensor, conv: nn.Conv2d, rate: int = 1) -> Tensor:
    """Every tap of the kernel by itself, on a map with zeros around."""
    k, (h, w) = conv.weight.shape[-1], x.shape[-2:]
    around = k // 2 * rate
    x = F.pad(x, [around] * 4)
    out = 0.0
    for i in range(k):
        for j in range(k):
            moved = x[..., i * rate : i * rate + h, j * rate : j * rate + w]
            out = out + torch.einsum('oc,nchw->nohw', conv.weight[:, :, i, j], moved)
    return out if conv.bias is None else out + conv.bias[:, None, None]


def naive(head: DenseASPPHead, x: Tensor, rates: tuple[int, ...]) -> Tensor:
    """y_l = H_l([y_0 ... y_(l-1)]), equation 3, y_0 the input; the classifier on all of them."""
    if isinstance(head.entry, nn.ReLU):
        y = [x.clamp_min(0)]
    else:
        y = [normed(convolved(x, head.entry.conv), head.entry.norm).clamp_min(0)]
    for i, (branch, rate) in enumerate(zip(head.branches, rates)):
        reduce, dilated, _ = branch
        z = torch.cat(y, 1)
        z = z if i == 0 else normed(z, reduce.norm).clamp_min(0)
        z = convolved(z, reduce.conv)
        y.append(convolved(normed(z, dilated.norm).clamp_min(0), dilated.conv, rate))
    z = torch.cat(y, 1)
    if head.bottleneck is not None:
        z = normed(convolved(z, head.bottleneck.conv), head.bottleneck.norm).clamp_min(0)
    return convolved(z, head.conv_seg)


@pytest.mark.stack
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(channels=6),
        dict(reduced_channels=24, bottleneck_channels=5, branch_channels=7),
        dict(norm_cfg=None, channels=6, act_cfg=dict(type='ReLU', inplace=True)),
    ],
)
def test_equation_3(options: dict) -> None:
    head = with_noise(build(**options))
    x = torch.randn(2, 16, 27, 31, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(head([x]), naive(head, x, RATES))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ('rates', 'field'), [((6, 12, 18, 24), 121), ((3, 6, 12, 18, 24), 127), ((2,), 5)]
)
def test_receptive_field(rates: tuple[int, ...], field: int) -> None:
    """Equations 4 and 5: 1 + 2 sum(d). The paper rounds it to 122 and 128."""
    head = build(in_channels=8, dilations=rates, branch_channels=2).double().eval()
    with torch.no_grad():
        for conv in (m for m in head.modules() if isinstance(m, nn.Conv2d)):
            conv.weight.abs_()
    x = torch.rand(1, 8, 1, 181, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(head([x])[..., 90].sum(), x)
    seen = gradient.abs().sum((0, 1, 2)).nonzero().flatten()
    assert (seen.min().item(), seen.max().item()) == (90 - field // 2, 90 + field // 2)


# --- cost ------------------------------------------------------------------------------------


def test_parameters_of_equation_9() -> None:
    """Section 3.3: DenseNet-121 has 512 channels, the output 832; weights of convolutions."""
    c, k, layers = 512, 3, 5
    with torch.device('meta'):
        head = build(in_channels=c, num_classes=19)
    weights = sum(m.weight.numel() for m in head.branches.modules() if isinstance(m, nn.Conv2d))
    assert weights == c * c * (15 + layers + 2 * k * k) * layers // 32 == 1556480
    assert head.channels == head.conv_seg.in_channels == 832
    assert [b[1].conv.dilation for b in head.branches] == [(r, r) for r in RATES]
    assert all(m.bias is None for m in head.branches.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize('channels', [None, 96])
def test_counts(channels: int | None) -> None:
    c, reduced, mid, out, classes, h, w = 80, 40, 24, 12, 7, 9, 5
    head = build(
        in_channels=c,
        num_classes=classes,
        channels=channels,
        reduced_channels=reduced,
        bottleneck_channels=mid,
        branch_channels=out,
    )
    inputs = [reduced + i * out for i in range(5)]
    convs = c * reduced + sum(i * mid + 9 * mid * out for i in inputs)
    norms = reduced + sum(inputs[1:]) + 5 * mid
    last = reduced + 5 * out
    if channels:
        convs, norms, last = convs + last * channels, norms + channels, channels
    convs += last * classes
    found = count_call(head, [torch.empty(1, c, h, w)])
    assert found.flops == convs * h * w
    assert found.params == convs + 2 * norms + classes


# --- with the rest ---------------------------------------------------------------------------


def car_model(**kwargs) -> nn.Module:
    head = dict(in_index=-1, in_channels=16, num_classes=4, norm_cfg=dict(type='BN'), **kwargs)
    backbone = dict(type='TinyPyramid', channels=(8, 16), strides=(4, 8))
    return MODELS.build(
        dict(
            type='CAREncoderDecoder',
            backbone=backbone,
            decode_head=dict(type='DenseASPPHead', **head),
            car=dict(channels=8),
        )
    )


def test_car_replaces_the_bottleneck() -> None:
    assert car_model(channels=12).car_layers == ('decode_head.bottleneck',)
    with pytest.raises(ValueError, match=r'resizing and sums: cat\.'):
        car_model()


def test_dropout_of_the_branches() -> None:
    ratios = [branch[2].p for branch in build().branches]
    assert ratios == [0.1] * 5
    head = build(dropout_ratio=0, branch_dropout_ratio=1.0, channels=None).train()
    x = torch.randn(2, 16, 8, 8)
    feature = head._forward_feature([x])
    # Whole branches are dropped, the input is not.
    assert torch.equal(feature[:, :16], x.relu())
    assert not feature[:, 16:].any()
    assert build(dropout_ratio=0.3, branch_dropout_ratio=0).branches[0][2].p == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(dilations=()), r'dilations must be positive.*got \(\)'),
        (dict(dilations=(3, 0)), r'dilations .*got \(3, 0\)'),
        (
            dict(in_channels=4),
            r'branch_channels .*got \(0,\) for an input of 4 channels',
        ),
        (dict(reduced_channels=0), 'reduced_channels must be positive'),
        (dict(bottleneck_channels=-1), 'bottleneck_channels must be positive'),
        (dict(channels=0), r'channels must be positive.*decode_head\.channels'),
        (dict(branch_dropout_ratio=1.5), 'branch_dropout_ratio is from 0 to 1, but got 1.5'),
        (
            dict(in_channels=[8, 8], in_index=[0, 1], input_transform='multiple_select'),
            "'resize_concat', but got 'multiple_select'",
        ),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**copy.deepcopy(options))
