"""GatedFullyFusion against equations 2 to 5, written out level by level."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.layers import levels
from mmseg_fusion.models.necks import GatedFullyFusion, gated_fully_fusion

from ...testers import NeckTester
from ...testers.toys import segmentor_config, toy_samples

BN = dict(type='BN')
#: Every way of fusing.
VARIANTS = {
    'gff': dict(),
    'sequential': dict(update='sequential'),
    'gff, channel': dict(gate='channel'),
    'gff, reduced': dict(gate_input='reduced'),
    'released': dict(update='sequential', gate='channel', gate_input='raw'),
    'concat': dict(fusion='concat'),
    'add': dict(fusion='add'),
    'fpn': dict(fusion='fpn'),
    'gated_fpn': dict(fusion='gated_fpn'),
    'gated_fpn, channel': dict(fusion='gated_fpn', gate='channel'),
}
PAPER_SIZES = [(16, 12), (8, 6), (8, 6), (8, 6)]


class _Neck(NeckTester):
    out_channels = (8,) * 4
    out_strides = (4, 8, 16, 32)
    # Below, and as one graph.
    compiled = False


class TestGFF(_Neck):
    neck = dict(type='GatedFullyFusion', channels=8)
    plain_convolutions = ('gates.*',)


class TestGFFAtStride8(_Neck):
    neck = dict(type='GatedFullyFusion', channels=8, align_corners=True)
    plain_convolutions = ('gates.*',)
    strides = out_strides = (4, 8, 8, 8)


class TestConcat(_Neck):
    neck = dict(type='GatedFullyFusion', channels=8, fusion='concat')


class TestAdd(_Neck):
    neck = dict(type='GatedFullyFusion', channels=8, fusion='add')


class TestFPN(_Neck):
    neck = dict(type='GatedFullyFusion', channels=8, fusion='fpn')


class TestGatedFPN(_Neck):
    neck = dict(type='GatedFullyFusion', channels=8, fusion='gated_fpn')
    plain_convolutions = ('gates.*',)


class TestReleased(_Neck):
    plain_convolutions = ('gates.*',)
    neck = dict(
        type='GatedFullyFusion',
        channels=8,
        update='sequential',
        gate='channel',
        gate_input='raw',
        num_convs=0,
        align_corners=True,
    )


# --- the paper, written out ----------------------------------------------------------------------


def interpolation_matrix(out: int, size: int, align_corners: bool) -> Tensor:
    """Row i: the weights of the two cells that cell i of the output lies between."""
    matrix = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        if align_corners:
            at = i * (size - 1) / (out - 1) if out > 1 else 0.0
        else:
            at = max((i + 0.5) * size / out - 0.5, 0.0)
        low = min(int(at), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, high] += at - low
    return matrix


def bilinear(x: Tensor, size, align_corners: bool = False) -> Tensor:
    rows = interpolation_matrix(size[0], x.shape[2], align_corners)
    columns = interpolation_matrix(size[1], x.shape[3], align_corners)
    return torch.einsum('ih,nchw,jw->ncij', rows, x, columns)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - scale * norm.running_mean
    return x * scale[:, None, None] + shift[:, None, None]


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    x = torch.einsum('oc,nchw->nohw', conv.weight[:, :, 0, 0], x)
    return x if conv.bias is None else x + conv.bias[:, None, None]


def norm_relu(layer: nn.Module, x: Tensor) -> Tensor:
    return batch_norm(layer.bn, x).clamp(min=0)


def reduced(neck: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [norm_relu(m, pointwise(m.conv, x)) for m, x in zip(neck.reduce, inputs)]


def gate_maps(neck: nn.Module, inputs: list[Tensor], levels: list[Tensor]) -> list[Tensor]:
    seen = inputs if neck.gate_input == 'raw' else levels
    return [1 / (1 + (-pointwise(m[0], x)).exp()) for m, x in zip(neck.gates, seen)]


def naive(neck: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Equations 2 to 5 as they stand: one sum per level, every sender resized for it."""
    xs = reduced(neck, inputs)
    count = len(xs)

    def at(x: Tensor, level: int) -> Tensor:
        return bilinear(x, xs[level].shape[2:], neck.align_corners)

    out: list = [None] * count
    if neck.fusion == 'concat':
        for lv in range(count):
            stack = torch.cat([at(xs[i], lv) for i in range(count)], 1)
            out[lv] = norm_relu(neck.mix[lv], pointwise(neck.mix[lv].conv, stack))
    elif neck.fusion == 'add':
        for lv in range(count):
            out[lv] = sum(at(xs[i], lv) for i in range(count))
    elif neck.fusion == 'fpn':
        out[-1] = xs[-1]
        for lv in range(count - 2, -1, -1):
            out[lv] = at(out[lv + 1], lv) + xs[lv]
    elif neck.fusion == 'gated_fpn':
        g = gate_maps(neck, inputs, xs)
        out[-1] = (1 + g[-1]) * xs[-1]
        for lv in range(count - 2, -1, -1):
            sent = at(g[lv + 1] * out[lv + 1], lv)
            out[lv] = (1 + g[lv]) * xs[lv] + (1 - g[lv]) * sent
    else:
        g, state = gate_maps(neck, inputs, xs), list(xs)
        for lv in range(count):
            received = sum(at(g[i] * state[i], lv) for i in range(count) if i != lv)
            out[lv] = (1 + g[lv]) * xs[lv] + (1 - g[lv]) * received
            if neck.update == 'sequential':
                state[lv] = out[lv]
    for lv in range(count):
        for layer in neck.refine[lv]:
            out[lv] = norm_relu(layer, F.conv2d(out[lv], layer.conv.weight, padding=1))
    return out


def randomized(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with parameters and statistics that hide nothing."""
    module.double().eval()
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point():
                continue
            if 'running_var' in name:
                value.uniform_(0.5, 1.5)
            elif value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
            else:
                value.normal_()
    return module


def features(sizes, channels, **kwargs) -> list[Tensor]:
    return [torch.randn(2, c, *s, dtype=torch.float64, **kwargs) for c, s in zip(channels, sizes)]


def gradients(outs, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() + x.square().mean()
        for x in outs
    )
    return torch.autograd.grad(total, leaves)


def check_against_paper(neck: nn.Module, sizes) -> None:
    neck = randomized(neck)
    inputs = features(sizes, neck.in_channels, requires_grad=True)
    leaves = [*inputs, *neck.parameters()]
    found, expected = neck(inputs), naive(neck, inputs)
    assert [x.shape[2:] for x in found] == [torch.Size(s) for s in sizes]
    close = dict(rtol=1e-9, atol=1e-10)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, **close)
    for f, e in zip(gradients(found, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(f, e, **close)


def test_the_naive_resize_is_bilinear() -> None:
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    for size in [(9, 13), (4, 7), (1, 5), (2, 3), (5, 1)]:
        for align_corners in (False, True):
            expected = F.interpolate(x, size, mode='bilinear', align_corners=align_corners)
            torch.testing.assert_close(bilinear(x, size, align_corners), expected)


# Few sides, so that levels of equal sizes come often; in no order.
SIZES = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 5, 6]), st.sampled_from([1, 3, 4, 6])),
    min_size=2,
    max_size=5,
)


@pytest.mark.parametrize('name', VARIANTS)
@settings(max_examples=15)
@given(sizes=SIZES, align_corners=st.booleans())
def test_equations_at_any_sizes(name: str, sizes: list, align_corners: bool) -> None:
    channels = [3 + i for i in range(len(sizes))]
    neck = GatedFullyFusion(channels, 4, **VARIANTS[name], num_convs=1, align_corners=align_corners)
    check_against_paper(neck, sizes)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize(
    'sizes',
    [
        PAPER_SIZES,
        [(4, 5)] * 3,
        [(3, 4), (9, 7), (3, 4), (9, 7)],
        [(17, 23), (9, 12), (5, 6), (3, 3), (2, 2)],
    ],
    ids=['strides 4, 8, 8, 8', 'equal', 'not monotone', 'pyramid'],
)
def test_equations_and_two_refining_convolutions(name: str, sizes: list) -> None:
    check_against_paper(GatedFullyFusion([3, 4, 5, 6, 7][: len(sizes)], 4, **VARIANTS[name]), sizes)


def test_equation_5_pixel_by_pixel() -> None:
    """One loop per sum and per pixel, on three levels of two sizes."""
    neck = randomized(GatedFullyFusion([2, 3, 4], 2, num_convs=0))
    sizes = [(4, 6), (2, 3), (2, 3)]
    inputs = features(sizes, neck.in_channels)
    xs = reduced(neck, inputs)
    g = gate_maps(neck, inputs, xs)
    assert all(m.shape[1] == 1 for m in g)

    def sample(x: Tensor, n: int, c: int, row: float, column: float) -> float:
        """The value between the four nearest cells."""
        total = 0.0
        row, column = max(row, 0), max(column, 0)
        for y in (int(row), int(row) + 1):
            for z in (int(column), int(column) + 1):
                weight = (1 - abs(row - y)) * (1 - abs(column - z))
                inside = x[n, c, min(y, x.shape[2] - 1), min(z, x.shape[3] - 1)]
                total += weight * inside.item()
        return total

    with torch.no_grad():
        outs = neck(inputs)
        for lv, (h, w) in enumerate(sizes):
            for n, c, y, z in torch.cartesian_prod(*map(torch.arange, (2, 2, h, w))).tolist():
                received = 0.0
                for i, size in enumerate(sizes):
                    if i == lv:
                        continue
                    at = ((y + 0.5) * size[0] / h - 0.5, (z + 0.5) * size[1] / w - 0.5)
                    received += sample(g[i] * xs[i], n, c, *at)
                gate, own = g[lv][n, 0, y, z].item(), xs[lv][n, c, y, z].item()
                expected = (1 + gate) * own + (1 - gate) * received
                assert outs[lv][n, c, y, z].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('gate', ['map', 'channel'])
@pytest.mark.parametrize('align_corners', [False, True])
def test_three_levels_as_the_authors_update_them(gate: str, align_corners: bool) -> None:
    """Fused mod2 feeds mod5, both feed ASPP; a product is resized, not its factors."""
    options = dict(gate=gate, gate_input='raw', num_convs=0, align_corners=align_corners)
    neck = randomized(GatedFullyFusion([3, 5, 4], 4, update='sequential', **options))
    inputs = features([(12, 16), (3, 4), (3, 4)], neck.in_channels)
    m2, m5, a = reduced(neck, inputs)
    g2, g5, ga = (torch.sigmoid(pointwise(m[0], x)) for m, x in zip(neck.gates, inputs))

    def up(x: Tensor) -> Tensor:
        return bilinear(x, (12, 16), align_corners)

    def down(x: Tensor) -> Tensor:
        return bilinear(x, (3, 4), align_corners)

    m2 = m2 + g2 * m2 + (1 - g2) * (up(g5 * m5) + up(ga * a))
    m5 = m5 + g5 * m5 + (1 - g5) * (down(g2 * m2) + ga * a)
    a = a + ga * a + (1 - ga) * (down(g2 * m2) + g5 * m5)
    with torch.no_grad():
        found = neck(inputs)
        for f, e in zip(found, (m2, m5, a)):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
        twin = copy.deepcopy(neck)
        twin.update = 'simultaneous'
        other = twin(inputs)
    # The first level is updated from unfused ones in both.
    torch.testing.assert_close(found[0], other[0])
    for f, o in zip(found[1:], other[1:]):
        assert (f - o).norm() > 0.01 * f.norm()


# --- gates ---------------------------------------------------------------------------------------


def with_gates(states, **options) -> GatedFullyFusion:
    """Three levels whose gates are open (1) or shut (0) everywhere."""
    neck = randomized(GatedFullyFusion([3, 4, 5], 4, num_convs=0, **options))
    with torch.no_grad():
        for gate, state in zip(neck.gates, states):
            gate[0].weight.zero_()
            gate[0].bias.fill_(1e4 if state else -1e4)
    return neck


@pytest.mark.stack
@pytest.mark.parametrize('update', ['simultaneous', 'sequential'])
@pytest.mark.parametrize('gate', ['map', 'channel'])
def test_gates_that_are_open_or_shut(update: str, gate: str) -> None:
    inputs = features([(8, 6), (4, 3), (5, 5)], [3, 4, 5])
    options = dict(update=update, gate=gate)
    with torch.no_grad():
        for states, factor in (((0, 0, 0), 1), ((1, 1, 1), 2)):
            neck = with_gates(states, **options)
            for found, x in zip(neck(inputs), reduced(neck, inputs)):
                torch.testing.assert_close(found, factor * x)
        # An open gate sends and does not receive; a shut one receives and does not send.
        neck = with_gates((0, 1, 0), **options)
        x0, x1, x2 = reduced(neck, inputs)
        sent = 2 * x1 if update == 'sequential' else x1
        expected = (x0 + bilinear(x1, (8, 6)), 2 * x1, x2 + bilinear(sent, (5, 5)))
        for f, e in zip(neck(inputs), expected):
            torch.testing.assert_close(f, e)


def test_open_and_shut_gates_of_gated_fpn() -> None:
    inputs = features([(8, 6), (4, 3), (5, 5)], [3, 4, 5])
    with torch.no_grad():
        neck = with_gates((0, 0, 1), fusion='gated_fpn')
        x0, x1, x2 = reduced(neck, inputs)
        expected = (x0, x1 + bilinear(2 * x2, (4, 3)), 2 * x2)
        for f, e in zip(neck(inputs), expected):
            torch.testing.assert_close(f, e)


@pytest.mark.parametrize('name', [n for n, v in VARIANTS.items() if v.get('fusion') != 'concat'])
def test_number_and_size_of_gates(name: str) -> None:
    neck = GatedFullyFusion([3, 4, 5], 4, **VARIANTS[name])
    if neck.fusion not in gated_fully_fusion.GATED:
        assert neck.gates is None
        assert not [n for n, _ in neck.named_parameters() if 'gate' in n]
        return
    options = VARIANTS[name]
    ins = [4, 4, 4] if options.get('gate_input') == 'reduced' else [3, 4, 5]
    maps = 4 if options.get('gate') == 'channel' else 1
    assert [tuple(g[0].weight.shape) for g in neck.gates] == [(maps, i, 1, 1) for i in ins]
    assert all(g[0].bias is not None for g in neck.gates)
    calls: list[tuple[int, torch.Size, float, float]] = []
    for i, gate in enumerate(neck.gates):
        gate.register_forward_hook(
            lambda m, x, y, i=i: calls.append((i, y.shape, y.min().item(), y.max().item()))
        )
    outs = neck([torch.randn(2, c, *s) for c, s in zip([3, 4, 5], [(8, 8), (4, 4), (4, 4)])])
    assert [c[0] for c in calls] == [0, 1, 2]
    assert [c[1] for c in calls] == [(2, maps, 8, 8), (2, maps, 4, 4), (2, maps, 4, 4)]
    assert all(0 < low <= high < 1 for *_, low, high in calls)
    sum((x * torch.randn_like(x)).sum() for x in outs).backward()
    for gate in neck.gates:
        assert all(p.grad.any() for p in gate.parameters())


# --- cost ----------------------------------------------------------------------------------------


@pytest.fixture
def resizes(monkeypatch) -> list:
    """Every resize: from which size to which."""
    seen = []
    original = levels.resize

    def spy(x, size, *args, **kwargs):
        seen.append((tuple(x.shape[2:]), tuple(size)))
        return original(x, size, *args, **kwargs)

    monkeypatch.setattr(levels, 'resize', spy)
    return seen


@pytest.mark.parametrize(
    ('name', 'sizes', 'expected'),
    [
        ('gff', PAPER_SIZES, 2),
        ('gff', [(8, 6)] * 4, 0),
        # Each size from each other one.
        ('gff', [(16, 12), (8, 6), (4, 3), (2, 2)], 12),
        ('gff', [(16, 12), (8, 6), (16, 12), (8, 6)], 2),
        ('add', PAPER_SIZES, 2),
        # Three to the size of level 1, and level 1 once for the three that share their stack.
        ('concat', PAPER_SIZES, 4),
        ('fpn', PAPER_SIZES, 1),
        ('gated_fpn', PAPER_SIZES, 1),
        # One for each level: its senders of another size are summed first.
        ('sequential', PAPER_SIZES, 2),
        ('sequential', [(8, 6)] * 4, 0),
        ('concat', [(8, 6)] * 4, 0),
        ('fpn', [(8, 6)] * 4, 0),
    ],
)
def test_number_of_resizes(resizes: list, name: str, sizes: list, expected: int) -> None:
    neck = GatedFullyFusion([3, 4, 5, 6], 4, **VARIANTS[name]).eval()
    neck([x.float() for x in features(sizes, neck.in_channels)])
    assert len(resizes) == expected
    assert all(before != after for before, after in resizes)


@pytest.mark.parametrize('name', VARIANTS)
def test_parameters_and_multiply_adds(name: str) -> None:
    ins, c, convs = [3, 4, 5, 6], 8, 2
    options = VARIANTS[name]
    neck = GatedFullyFusion(ins, c, num_convs=convs, **options)
    area = [h * w for h, w in PAPER_SIZES]
    params = sum(i * c + 2 * c for i in ins) + 4 * convs * (9 * c * c + 2 * c)
    flops = sum(i * c * a for i, a in zip(ins, area)) + convs * 9 * c * c * sum(area)
    if neck.gates is not None:
        maps = c if options.get('gate') == 'channel' else 1
        seen = [c] * 4 if options.get('gate_input') == 'reduced' else ins
        params += sum(i * maps + maps for i in seen)
        flops += sum(i * maps * a for i, a in zip(seen, area))
    if neck.fusion == 'concat':
        params += 4 * (4 * c * c + 2 * c)
        flops += 4 * c * c * sum(area)
    found = count_call(neck, [torch.randn(1, i, *s) for i, s in zip(ins, PAPER_SIZES)])
    assert (found.params, found.flops) == (params, flops)


# --- in a model ----------------------------------------------------------------------------------

LEVELS = (8, 16, 32, 64)


def segmentor(head: dict, **options) -> nn.Module:
    neck = dict(type='GatedFullyFusion', in_channels=list(LEVELS), channels=8, **options)
    common = dict(channels=8, num_classes=5, norm_cfg=BN)
    return MODELS.build(segmentor_config({**common, **head}, neck=neck).model)


def unused_after_a_step(model: nn.Module) -> set[str]:
    size = (33, 47)
    samples = toy_samples(5, size)
    log = model.loss(torch.randn(2, 3, *size), samples)
    loss, _ = model.parse_losses(log)
    assert loss.isfinite()
    loss.backward()
    model.eval()
    with torch.no_grad():
        found = model.predict(torch.randn(2, 3, *size), samples)
    assert [tuple(x.seg_logits.data.shape) for x in found] == [(5, *size)] * 2
    assert all(x.seg_logits.data.isfinite().all() for x in found)
    return {n for n, p in model.named_parameters() if p.grad is None}


@pytest.mark.stack
@pytest.mark.parametrize('name', VARIANTS)
def test_under_uper_head(name: str) -> None:
    uper = dict(type='UPerHead', in_channels=[8] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2))
    assert not unused_after_a_step(segmentor(uper, **VARIANTS[name]))


@pytest.mark.parametrize('in_index', [0, 3])
@pytest.mark.parametrize('name', ['gff', 'sequential', 'add'])
def test_under_a_head_of_one_level(name: str, in_index: int) -> None:
    """What the head leaves out has refined levels that nobody reads, and nothing else unused."""
    fcn = dict(type='FCNHead', in_channels=8, in_index=in_index, num_convs=1)
    model = segmentor(fcn, **VARIANTS[name])
    ignored = tuple(f'neck.refine.{i}.' for i in range(4) if i != in_index)
    expected = {n for n, _ in model.named_parameters() if n.startswith(ignored)}
    assert unused_after_a_step(model) == expected != set()
    assert not unused_after_a_step(segmentor(fcn, **VARIANTS[name], num_convs=0))


@pytest.mark.parametrize('fusion', ['fpn', 'gated_fpn'])
def test_one_level_of_a_top_down_path(fusion: str) -> None:
    finest = dict(type='FCNHead', in_channels=8, in_index=0, num_convs=1)
    assert not unused_after_a_step(segmentor(finest, fusion=fusion, num_convs=0))
    # Nothing goes up: the last level sees itself alone.
    coarsest = segmentor(dict(finest, in_index=3), fusion=fusion, num_convs=0)
    parts = ('neck.reduce.', 'neck.gates.')
    below = tuple(f'{part}{i}.' for part in parts for i in range(3))
    expected = {n for n, _ in coarsest.named_parameters() if n.startswith(below)}
    assert unused_after_a_step(coarsest) == expected != set()


@pytest.mark.parametrize('name', ['gff', 'released', 'concat', 'add', 'fpn', 'gated_fpn'])
def test_compiles_as_one_graph(name: str) -> None:
    neck = GatedFullyFusion([3, 4, 5, 6], 4, **VARIANTS[name]).eval()
    inputs = [x.float() for x in features(PAPER_SIZES, neck.in_channels)]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(neck, backend='eager', fullgraph=True)
        for found, expected in zip(compiled(inputs), neck(inputs)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_reduced_levels_are_returned_when_asked_for() -> None:
    neck = randomized(GatedFullyFusion([3, 4], 4))
    inputs = features([(6, 4), (3, 2)], [3, 4])
    with torch.no_grad():
        outs, levels = neck(inputs, with_reduced=True)
        for found, expected in zip(outs, neck(inputs)):
            assert torch.equal(found, expected)
        for found, expected in zip(levels, reduced(neck, inputs)):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('name', VARIANTS)
def test_without_norm_nothing_is_overwritten(name: str) -> None:
    """An activation in place must not touch what is needed once more."""
    neck = GatedFullyFusion([3, 4, 5], 4, **VARIANTS[name], norm_cfg=None, num_convs=0).double()
    inputs = features([(6, 4), (3, 2), (3, 2)], [3, 4, 5])
    with torch.no_grad():
        _, levels = neck(inputs, with_reduced=True)
    for x, layer, found in zip(inputs, neck.reduce, levels):
        torch.testing.assert_close(found, pointwise(layer.conv, x).clamp(min=0))


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_channels=64), 'two levels or more, finest first, got 64'),
        (dict(in_channels=[64]), r'two levels or more, finest first, got \[64\]'),
        (dict(fusion='mean'), "fusion must be one of .*'gated_fpn'.*got 'mean'"),
        (dict(update='late'), "update must be one of .*'sequential'.*got 'late'"),
        (dict(gate='pixel'), "gate must be one of .*'channel'.*got 'pixel'"),
        (dict(gate_input='fused'), "gate_input must be one of .*'raw'.*got 'fused'"),
        (dict(num_convs=-1), 'num_convs must not be negative, got -1'),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedFullyFusion(**{**dict(in_channels=[4, 4], channels=4), **options})


def test_wrong_number_of_levels() -> None:
    message = r'expected 2 levels \(in_channels=\[4, 4\]\), got 3; set the out_indices'
    with pytest.raises(ValueError, match=message):
        GatedFullyFusion([4, 4], 4)([torch.randn(1, 4, 4, 4)] * 3)
