"""BiFPN against a graph that is written out, level by level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.necks import BiFPN

from ...testers import NeckTester

SIX = [(17, 23), (9, 12), (5, 6), (3, 3), (2, 2), (1, 1)]


class TestBiFPN(NeckTester):
    neck = dict(type='BiFPN', channels=8, num_repeats=2)
    takes_conv_cfg = False
    out_channels = (8,) * 8
    out_strides = (4, 8, 16, 32, 64, 128, 256, 512)


class TestBiFPNSoftmax(NeckTester):
    neck = dict(type='BiFPN', channels=8, num_repeats=1, num_levels=5, fusion='softmax')
    takes_conv_cfg = False
    out_channels = (8,) * 5
    out_strides = (4, 8, 16, 32, 64)


class TestBiFPNSum(NeckTester):
    neck = dict(type='BiFPN', channels=8, num_repeats=1, num_levels=4, fusion='sum')
    takes_conv_cfg = False
    out_channels = (8,) * 4
    out_strides = (4, 8, 16, 32)


def randomized(neck: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in [*neck.named_parameters(), *neck.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if 'var' in name or 'weights' in name else value.normal_()
    return neck


def features(sizes, channels) -> list[Tensor]:
    return [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes)]


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - scale * norm.running_mean
    return x * scale[:, None, None] + shift[:, None, None]


def naive_node(node: nn.Module, weigh, *inputs: Tensor) -> Tensor:
    x = sum(w * x for w, x in zip(weigh(node.weights), inputs))
    x = x * torch.sigmoid(x)
    x = torch.stack(
        [
            F.conv2d(x[:, i : i + 1], node.depthwise.weight[i : i + 1], padding=1)[:, 0]
            for i in range(x.shape[1])
        ],
        1,
    )
    x = torch.einsum('oc,nchw->nohw', node.pointwise.weight[:, :, 0, 0], x)
    return batch_norm(node.norm, x + node.pointwise.bias[:, None, None])


def nearest(x: Tensor, size) -> Tensor:
    """Each cell takes the one of the smaller map that its corner lies in."""
    rows = (torch.arange(size[0]) * (x.shape[2] / size[0])).long()
    columns = (torch.arange(size[1]) * (x.shape[3] / size[1])).long()
    return x[:, :, rows][:, :, :, columns]


def pooled(x: Tensor, kernel: int, pad: int, reduce) -> Tensor:
    """Windows of a ceiled half size, without what lies outside."""
    h, w = x.shape[2:]
    return torch.stack(
        [
            torch.stack(
                [
                    reduce(
                        x[
                            :,
                            :,
                            max(2 * i - pad, 0) : 2 * i - pad + kernel,
                            max(2 * j - pad, 0) : 2 * j - pad + kernel,
                        ]
                    )
                    for j in range(-(-w // 2))
                ],
                -1,
            )
            for i in range(-(-h // 2))
        ],
        -2,
    )


@pytest.mark.parametrize('fusion', ['fast', 'softmax'])
def test_six_levels_written_out(fusion: str) -> None:
    """Node order, edges, resampling and weights of one repeat on P2 to P7."""
    neck = BiFPN([4, 6, 8, 10], 5, 1, num_levels=6, fusion=fusion)
    neck = randomized(neck).double().eval()
    inputs = features(SIX, neck.in_channels)

    def lateral(layer: nn.Module, x: Tensor) -> Tensor:
        return batch_norm(
            layer.norm, torch.einsum('oc,nchw->nohw', layer.conv.weight[:, :, 0, 0], x)
        )

    def weigh(w: Tensor) -> Tensor:
        if fusion == 'softmax':
            return w.exp() / w.exp().sum()
        return w.clamp(min=0) / (w.clamp(min=0).sum() + 1e-4)

    def mean(x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def largest(x: Tensor) -> Tensor:
        return x.amax((2, 3))

    p2, p3, p4, p5 = (lateral(layer, x) for layer, x in zip(neck.laterals, inputs))
    p6 = lateral(neck.extras[0], pooled(p5, 2, 0, mean))
    p7 = lateral(neck.extras[1], pooled(p6, 2, 0, mean))
    assert [tuple(p.shape[2:]) for p in (p2, p3, p4, p5, p6, p7)] == SIX

    def node(which: nn.Module, *xs: Tensor) -> Tensor:
        return naive_node(which, weigh, *xs)

    down, up = neck.layers[0].top_down, neck.layers[0].bottom_up
    t6 = node(down[4], p6, nearest(p7, SIX[4]))
    t5 = node(down[3], p5, nearest(t6, SIX[3]))
    t4 = node(down[2], p4, nearest(t5, SIX[2]))
    t3 = node(down[1], p3, nearest(t4, SIX[1]))
    o2 = node(down[0], p2, nearest(t3, SIX[0]))
    o3 = node(up[0], p3, t3, pooled(o2, 3, 1, largest))
    o4 = node(up[1], p4, t4, pooled(o3, 3, 1, largest))
    o5 = node(up[2], p5, t5, pooled(o4, 3, 1, largest))
    o6 = node(up[3], p6, t6, pooled(o5, 3, 1, largest))
    o7 = node(up[4], p7, pooled(o6, 3, 1, largest))
    with torch.no_grad():
        for found, expected in zip(neck(inputs), (o2, o3, o4, o5, o6, o7)):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_eight_levels_have_fourteen_nodes_per_repeat() -> None:
    layer = BiFPN([4, 4, 4, 4], 4, 3).layers[0]
    inputs = [len(n.weights) for n in [*layer.top_down, *layer.bottom_up]]
    assert inputs == [2] * 7 + [3] * 6 + [2]


def test_weights_of_one_node() -> None:
    node = BiFPN([2, 2], 2, 1, num_levels=2).layers[0].top_down[0]
    with torch.no_grad():
        node.weights.copy_(torch.tensor([3.0, -1.0]))
    torch.testing.assert_close(node.fusion_weights(), torch.tensor([3 / 3.0001, 0.0]))


@pytest.mark.stack
@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
@pytest.mark.parametrize('size', [(1, 1), (2, 3)])
def test_a_batch_of_one_on_levels_of_one_cell(norm: str, size: tuple[int, int]) -> None:
    neck = BiFPN([3, 3], 4, 2, num_levels=5, norm_cfg=dict(type=norm)).train()
    if norm == 'SyncBN':
        # On older torch it insists on a GPU: what matters here is that the lone cell never
        # reaches it.
        for module in neck.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.forward = lambda x, m=module: F.batch_norm(
                    x, m.running_mean, m.running_var, m.weight, m.bias, True
                )
    inputs = [torch.randn(1, 3, *size), torch.randn(1, 3, -(-size[0] // 2), -(-size[1] // 2))]
    before = neck.extras[-1].norm.running_mean.clone()
    outs = neck(inputs)
    assert tuple(outs[-1].shape[2:]) == (1, 1)
    sum(x.sum() for x in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
    # One value has no variance: the statistics are used, and stay.
    assert torch.equal(neck.extras[-1].norm.running_mean, before)


def test_parameters_and_multiply_adds() -> None:
    ins, c, repeats, levels = [4, 6, 8, 10], 5, 3, 8
    neck = BiFPN(ins, c, repeats).eval()
    nodes = 2 * (levels - 1)
    edges = 2 * (levels - 1) + 3 * (levels - 2) + 2
    node = 9 * c + c * c + c + 2 * c
    lateral = sum(i * c + 2 * c for i in ins) + 4 * (c * c + 2 * c)
    params = lateral + repeats * (nodes * node + edges)
    assert sum(p.numel() for p in neck.parameters()) == params
    sizes = [(64, 48), (32, 24), (16, 12), (8, 6), (4, 3), (2, 2), (1, 1), (1, 1)]
    area = [h * w for h, w in sizes]
    flops = sum(i * c * a for i, a in zip(ins, area)) + c * c * sum(area[4:])
    flops += repeats * (9 * c + c * c) * (sum(area[:-1]) + sum(area[1:]))
    found = count_call(neck, [torch.randn(1, i, *s) for i, s in zip(ins, sizes)])
    assert (found.params, found.flops) == (params, flops)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_levels=3), r'num_levels=3 with in_channels=\[4, 4, 4, 4\]'),
        (dict(num_repeats=0), 'num_repeats must be at least 1, got 0'),
        (dict(fusion='mean'), "one of .*'fast'.*got 'mean'"),
        (dict(in_channels=[]), 'at least the number of in_channels'),
        (dict(in_channels=64), 'must list the channels of the levels.*got 64'),
        (dict(num_outs=9), 'num_outs must be between 1 and num_levels=8, got 9'),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiFPN(**{**dict(in_channels=[4] * 4, channels=4, num_repeats=1), **options})


@pytest.mark.parametrize('num_outs', [1, 2, 5])
def test_fewer_levels_out_leave_nothing_unused(num_outs: int) -> None:
    neck = BiFPN([4, 4, 4], 4, 2, num_levels=5, num_outs=num_outs)
    whole = BiFPN([4, 4, 4], 4, 2, num_levels=5)
    left_out = whole.load_state_dict(neck.state_dict(), strict=False).missing_keys
    assert all(key.startswith('layers.1.bottom_up.') for key in left_out)
    inputs = [torch.randn(2, 4, 16 >> i, 16 >> i) for i in range(3)]
    outs = neck(inputs)
    assert len(outs) == num_outs
    sum(x.square().sum() for x in outs).backward()
    assert all(p.grad is not None for p in neck.parameters())
    # The statistics have moved.
    whole.load_state_dict(neck.state_dict(), strict=False)
    with torch.no_grad():
        for a, b in zip(neck.eval()(inputs), whole.eval()(inputs)):
            torch.testing.assert_close(a, b)


def test_wrong_number_of_levels() -> None:
    with pytest.raises(ValueError, match=r'expected 2 levels .*got 3; set the out_indices'):
        BiFPN([4, 4], 4, 1)([torch.randn(1, 4, 4, 4)] * 3)
