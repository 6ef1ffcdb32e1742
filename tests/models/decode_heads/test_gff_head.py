"""GFFHead: its parts in order, its counts, the released form, and what it begins from."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader, load_checkpoint, save_checkpoint
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis import count_call
from mmseg_fusion.engine.hooks import ScaleEqualizerHook
from mmseg_fusion.models.decode_heads import GFFHead
from mmseg_fusion.models.segmentors import merge_car

from ...configs.files import BASE, plain
from ...engine.small import LEVELS, config, runner
from ...testers import HeadTester
from ...testers.toys import segmentor_config, toy_samples
from ...tools.running import TOOLS, load_tool
from ..necks.test_gated_fully_fusion import (
    bilinear,
    features,
    naive,
    norm_relu,
    pointwise,
    randomized,
)

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden' / 'gff_head.npz'
BN = dict(type='BN')
PSP = dict(type='PSPHead', channels=12, pool_scales=(1, 2))
ASPP = dict(type='ASPPHead', channels=12, dilations=(1, 2))
RELEASED = dict(
    neck=dict(channels=8, update='sequential', gate='channel', gate_input='raw', num_convs=0),
    context=ASPP,
    fuse_context=True,
    dfp='dilated',
    num_convs=2,
    kernel_size=3,
    align_corners=True,
)


class _Head(HeadTester):
    stride = 4
    # Below, and as one graph.
    compiled = False


class TestGFFHead(_Head):
    head = dict(type='GFFHead', in_index=[0, 1, 2, 3], context=PSP)
    plain_convolutions = ('neck.gates.*',)


class TestGFFHeadWithDFP(_Head):
    strides = (4, 8, 8, 8)
    head = dict(type='GFFHead', in_index=[0, 1, 2, 3], context=PSP, dfp='conv')
    plain_convolutions = ('neck.gates.*',)


class TestReleased(_Head):
    head = dict(type='GFFHead', in_index=[0, 2], **RELEASED)
    plain_convolutions = ('neck.gates.*',)

    def check_align_corners(self) -> None:
        # It is on here: the check turns it on where it is off.
        self.head, before = dict(self.head, align_corners=False), self.head
        try:
            super().check_align_corners()
        finally:
            self.head = before


class TestFPNOverTheContext(_Head):
    head = dict(type='GFFHead', in_index=[0, 1, 2, 3], context=PSP, neck=dict(fusion='fpn'))


class TestWithoutConvolutions(_Head):
    head = dict(type='GFFHead', in_index=[0, 1, 2, 3], context=PSP, num_convs=0)
    plain_convolutions = ('neck.gates.*',)

    def check_channels(self) -> None:
        # Its classifier sees the concatenation: the context, and four levels.
        head = self.build(channels=24)
        assert head.conv_seg.in_channels == 12 + 4 * 24
        self.outputs(head, self.inputs(self.image_sizes[0]))


# --- the whole head, written out -----------------------------------------------------------------

INS, SIZES = [3, 4, 5, 6], [(12, 16), (6, 8), (6, 8), (6, 8)]


def small(**options) -> GFFHead:
    return GFFHead(
        **{**dict(in_channels=INS, channels=8, context=PSP, num_classes=5, norm_cfg=BN), **options}
    )


def whole_context(head: GFFHead, cfg: dict, inputs: list[Tensor], channels: int) -> Tensor:
    """What a whole head of mmseg with the context's weights would classify."""
    whole = MODELS.build(
        dict(cfg, in_channels=channels, in_index=len(inputs) - 1, num_classes=5, norm_cfg=BN)
    )
    whole.align_corners = head.align_corners
    for module in whole.modules():
        if hasattr(module, 'align_corners'):
            module.align_corners = head.align_corners
    missing, unexpected = (
        whole.double().eval().load_state_dict(head.context.state_dict(), strict=False)
    )
    assert missing == ['conv_seg.weight', 'conv_seg.bias']
    assert not unexpected
    return whole._forward_feature(inputs)


@pytest.mark.stack
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('fuse_context', [False, True])
@pytest.mark.parametrize('dfp', [None, 'conv'])
def test_paper_form_written_out(dfp: str | None, fuse_context: bool, align_corners: bool) -> None:
    options = dict(dfp=dfp, fuse_context=fuse_context, align_corners=align_corners)
    head = randomized(small(**options))
    inputs = features(SIZES, INS)

    def up(*parts: Tensor) -> Tensor:
        return torch.cat([bilinear(p, SIZES[0], align_corners) for p in parts], 1)

    y0 = whole_context(head, PSP, inputs, 6)
    fused = naive(head.neck, [*inputs, y0] if fuse_context else inputs)
    if dfp is None:
        stack = up(*fused) if fuse_context else up(y0, *fused)
    else:
        ys, parts = [], [y0, *fused[::-1]]
        for i, layer in enumerate(head.pyramid.layers):
            ys.append(norm_relu(layer, pointwise(layer.conv, up(*parts[: i + 1]))))
        assert len(ys) == len(head.pyramid.layers) == len(fused) + 1
        stack = up(*ys)
    expected = pointwise(
        head.conv_seg, norm_relu(head.final[0], pointwise(head.final[0].conv, stack))
    )
    with torch.no_grad():
        torch.testing.assert_close(head(inputs), expected, rtol=1e-9, atol=1e-10)


def test_released_form_written_out() -> None:
    """From the fact sheet alone: mod2, mod5 and ASPP; random weights, float64, eval mode."""
    released = copy.deepcopy(RELEASED)
    released['context'].update(in_channels=7, in_index=2)
    head = randomized(small(in_channels=[3, 6], channels=10, **released))
    inputs = features([(19, 17), (5, 5), (5, 5)], [3, 6, 7])
    # The third one is the backbone's last level, which the context alone sees.
    raw = [inputs[0], inputs[1], whole_context(head, ASPP, inputs, 7)]
    w = head.state_dict()

    def conv(name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, w[f'{name}.weight'], w.get(f'{name}.bias'), **options)

    def relu(name: str, x: Tensor) -> Tensor:
        scale, shift, mean, var = (
            w[f'{name}.{k}'].view(-1, 1, 1)
            for k in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return F.relu((x - mean) / (var + 1e-5).sqrt() * scale + shift)

    def at(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode='bilinear', align_corners=True)

    m2, m5, a = (
        relu(f'neck.reduce.{i}.bn', conv(f'neck.reduce.{i}.conv', x)) for i, x in enumerate(raw)
    )
    g2, g5, ga = (torch.sigmoid(conv(f'neck.gates.{i}.0', x)) for i, x in enumerate(raw))
    assert g2.shape[1] == g5.shape[1] == ga.shape[1] == 8
    unfused = a
    m2 = (1 + g2) * m2 + (1 - g2) * (at(g5 * m5, m2) + at(ga * a, m2))
    m5 = (1 + g5) * m5 + (1 - g5) * (at(g2 * m2, m5) + at(ga * a, m5))
    a = (1 + ga) * a + (1 - ga) * (at(g2 * m2, a) + at(g5 * m5, a))

    # Up first: all blocks see cells of the finest level.
    a, m5, unfused = (at(x, m2) for x in (a, m5, unfused))

    def d(i: int, x: Tensor) -> Tensor:
        name, rate = f'pyramid.layers.{i}', 3 * (i + 1)
        x = conv(f'{name}.0.conv', relu(f'{name}.0.bn', x))
        return conv(f'{name}.1.conv', relu(f'{name}.1.bn', x), padding=rate, dilation=rate)

    y1 = d(0, a)
    y2 = d(1, torch.cat([y1, m5], 1))
    y3 = d(2, torch.cat([y1, y2, m2], 1))
    x = torch.cat([y1, unfused, y2, y3], 1)
    for i in (0, 1):
        x = relu(f'final.{i}.bn', conv(f'final.{i}.conv', x, padding=1))
    expected = conv('conv_seg', x)
    # Every weight has had its part.
    used = {k for k in w if not k.startswith('context.') and 'num_batches' not in k}
    parts = ('neck.reduce.', 'neck.gates.', 'pyramid.layers.', 'final.', 'conv_seg.')
    assert all(k.startswith(parts) for k in used)
    with torch.no_grad():
        torch.testing.assert_close(head(inputs), expected, rtol=1e-9, atol=1e-10)


# --- golden vectors of the released head ---------------------------------------------------------

#: Of the largest value.
TOLERANCE = 5e-5


@pytest.fixture(scope='module')
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as data:
        return {k: torch.from_numpy(data[k]) for k in data.files}


def released_head(
    golden: dict[str, Tensor], dtype: torch.dtype = torch.float32, **neck: str
) -> GFFHead:
    """The head of the WiderResNet-38 configs with the golden weights, on ASPP's output as given."""
    cfg = plain(BASE / 'models/gff_wrn38-d8.py')['model']['decode_head']
    # As it comes: a context without a layer.
    context = dict(type='FCNHead', in_channels=256, channels=256, num_convs=0, concat_input=False)
    cfg.update(context=dict(context, in_index=2), norm_cfg=BN, neck=dict(cfg['neck'], **neck))
    head = MODELS.build(cfg)
    names = dict(load_tool(TOOLS / 'model_converters' / 'gff_wrn38.py').layers())
    state = {}
    for key, value in golden.items():
        if key.startswith('w/'):
            layer, _, kind = key[2:].rpartition('.')
            scale = golden.get(f'scale/{key[2:]}')
            value = value if scale is None else value.float() * scale
            state[f'{names[f"gff_head.{layer}"]}.{kind}'] = value
    # Their classifier has no bias.
    state['conv_seg.bias'] = torch.zeros(19)
    found = head.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(k.endswith('num_batches_tracked') for k in found.missing_keys)
    return head.to(dtype).eval()


def released_inputs(golden: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [golden[k].to(dtype).requires_grad_() for k in ('m2', 'm5', 'aspp')]


def assert_golden(found: Tensor, expected: Tensor) -> None:
    error = (found.detach() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f'{float(error):.1e} of the largest value'


def test_golden_released_head(golden: dict[str, Tensor]) -> None:
    """Logits, what is in between, and the gradients of the three inputs."""
    head, inputs, seen = released_head(golden), released_inputs(golden), {}
    watched = dict(neck=head.neck)
    for i, (level, rate) in enumerate(zip(('m2', 'm5', 'aspp'), (3, 6, 9))):
        watched[f'gate_{level}'] = head.neck.gates[i]
        watched[f'dense_{rate}'] = head.pyramid.layers[i]
    for name, module in watched.items():
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y}))
    out = head(inputs)
    fused, _ = seen.pop('neck')
    seen.update(zip(('gff_m2', 'gff_m5', 'gff_aspp'), fused))
    assert {f'mid/{k}' for k in seen} == {k for k in golden if k.startswith('mid/')}
    for name, value in seen.items():
        assert_golden(value, golden[f'mid/{name}'])
    assert_golden(out, golden['out_eval'])
    (out * golden['R']).sum().backward()
    for name, x in zip(('m2', 'm5', 'aspp'), inputs):
        assert_golden(x.grad, golden[f'grad_{name}'])


def test_golden_released_head_with_batch_statistics(golden: dict[str, Tensor]) -> None:
    out = released_head(golden).train()(released_inputs(golden))
    assert_golden(out, golden['out_train_bnbatch'])


def test_golden_released_head_with_the_papers_update(golden: dict[str, Tensor]) -> None:
    double = torch.float64
    head = released_head(golden, double, update='simultaneous')
    out = head(released_inputs(golden, double))
    assert_golden(out, golden['out_eval_f64_simultaneous_update'])


def test_context_of_another_level_and_several_levels() -> None:
    """``in_index`` of the context counts the backbone's levels, whatever is fused."""
    context = dict(type='UPerHead', in_channels=[4, 6], in_index=[1, 3], pool_scales=(1, 2))
    head = small(in_channels=[3, 5], in_index=[0, 2], context=context).eval()
    inputs = [x.float() for x in features(SIZES, INS)]
    seen = []
    head.context.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        assert head(inputs).shape == (2, 5, 12, 16)
    ((given, y0),) = seen
    assert all(x is e for x, e in zip(given, inputs))
    # Channels are the head's where the context names none.
    assert y0.shape == (2, 8, 6, 8)


@pytest.mark.parametrize(
    ('fusion', 'levels'), [('gff', 4), ('add', 4), ('concat', 4), ('fpn', 5), ('gated_fpn', 5)]
)
def test_fpn_runs_over_five_levels(fusion: str, levels: int) -> None:
    assert len(small(neck=dict(fusion=fusion)).neck.reduce) == levels
    for fuse_context in (False, True):
        head = small(neck=dict(fusion=fusion), fuse_context=fuse_context)
        assert len(head.neck.reduce) == 4 + fuse_context


@MODELS.register_module()
class UnfusedNeck(nn.Module):
    """Another neck with the interface of ``GatedFullyFusion``."""

    def __init__(self, in_channels, channels, width=6, **kwargs):
        super().__init__()
        self.channels, self.asked = width, (in_channels, channels, kwargs)
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 1) for c in in_channels)

    def forward(self, inputs, with_reduced=False):
        outs = tuple(conv(x) for conv, x in zip(self.convs, inputs))
        return (outs, outs) if with_reduced else outs


def test_another_neck() -> None:
    head = small(neck=dict(type='UnfusedNeck', width=7), dfp='conv', align_corners=True)
    in_channels, channels, rest = head.neck.asked
    assert (list(in_channels), channels) == (INS, 8)
    assert rest == dict(align_corners=True, conv_cfg=None, norm_cfg=BN, act_cfg=dict(type='ReLU'))
    assert head([x.float() for x in features(SIZES, INS)]).shape == (2, 5, 12, 16)
    assert head.final[0].conv.in_channels == 5 * 7


# --- counts --------------------------------------------------------------------------------------


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_released_head_has_the_parameters_of_the_released_code() -> None:
    released = copy.deepcopy(RELEASED)
    released['neck'].update(channels=128)
    released['context'].update(channels=256, in_channels=4096, in_index=2)
    head = GFFHead([128, 1024], 256, num_classes=19, norm_cfg=BN, **released)
    # The authors' classifier has no bias.
    assert params(head) - params(head.context) == 2_680_704 + 19


@pytest.mark.parametrize('dfp', [None, 'conv'])
def test_parameters_and_multiply_adds_with_resnet101(dfp: str | None) -> None:
    ins, c, c0, classes = [256, 512, 1024, 2048], 256, 512, 19
    sizes = [(16, 12), (8, 6), (8, 6), (8, 6)]
    area = [h * w for h, w in sizes]
    head = GFFHead(ins, c, num_classes=classes, norm_cfg=BN, dfp=dfp)

    # Convolutions as (inputs, outputs, taps, cells), each with a norm.
    convs = [(2048, c0, 1, scale**2) for scale in (1, 2, 3, 6)]
    convs += [(2048 + 4 * c0, c0, 9, area[-1])]
    context = sum(i * o * k + 2 * o for i, o, k, _ in convs)
    assert params(head.context) == context
    convs += [(i, c, 1, a) for i, a in zip(ins, area)]
    convs += [(c, c, 9, a) for a in area for _ in range(2)]
    outs = [c0] + 4 * [c]
    if dfp:
        convs += [(c0 + i * c, c, 1, area[0]) for i in range(5)]
        outs = 5 * [c]
    convs += [(sum(outs), c, 1, area[0])]
    # The gates and the classifier have biases and no norm.
    biased = [(i, 1, a) for i, a in zip(ins, area)] + [(c, classes, area[0])]
    found = count_call(head, [torch.zeros(1, i, *s) for i, s in zip(ins, sizes)])
    assert found.params == sum(i * o * k + 2 * o for i, o, k, _ in convs) + sum(
        i * o + o for i, o, _ in biased
    )
    assert found.flops == sum(i * o * k * a for i, o, k, a in convs) + sum(
        i * o * a for i, o, a in biased
    )


# --- from a trained PSPNet -----------------------------------------------------------------------

CHANNELS = (8, 16, 32, 64)
HEAD = dict(channels=12, num_classes=5, norm_cfg=BN)
GFF = dict(type='GFFHead', in_channels=list(CHANNELS), in_index=[0, 1, 2, 3])
CONTEXTS = {'PSPHead': PSP, 'ASPPHead': ASPP}


def segmentor(head: dict, norm: str = 'BN') -> nn.Module:
    auxiliary = dict(type='FCNHead', in_channels=32, in_index=2, num_convs=1, **HEAD)
    cfg = segmentor_config({**HEAD, **head, 'norm_cfg': dict(type=norm)}).model
    cfg.auxiliary_head = dict(auxiliary, concat_input=False)
    return MODELS.build(cfg)


def plain_model(kind: str, norm: str = 'BN') -> nn.Module:
    """A segmentor with a head of the context's type, whose weights are no initial ones."""
    torch.manual_seed(1)
    head = {k: v for k, v in CONTEXTS[kind].items() if k != 'channels'}
    model = segmentor(dict(head, in_channels=64, in_index=3), norm)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.uniform_(0.1, 1)
            else:
                value.fill_(7)
    return model


@pytest.fixture
def log(caplog):
    """What mmengine's current logger is told: it is outside of the tree of loggers."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.stack
@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
@pytest.mark.parametrize('kind', CONTEXTS)
def test_begins_from_a_trained_head_of_the_contexts_type(
    tmp_path: Path, log, kind: str, norm: str, prefix: str
) -> None:
    source = plain_model(kind, norm)
    state = {prefix + k: v for k, v in source.state_dict().items()}
    save_checkpoint(dict(state_dict=state), str(tmp_path / 'plain.pth'))
    model = segmentor(dict(GFF, context=CONTEXTS[kind], dfp='conv'))
    before = copy.deepcopy(model.state_dict())
    load_checkpoint(model, str(tmp_path / 'plain.pth'), strict=False, logger='current')

    trained, fresh = source.state_dict(), []
    for key, value in model.state_dict().items():
        from_key = key.replace('decode_head.context.', 'decode_head.')
        if from_key in trained and not key.startswith('decode_head.conv_seg.'):
            assert torch.equal(value, trained[from_key]), key
        else:
            assert torch.equal(value, before[key]), key
            fresh.append(key)
    parts = ('neck.', 'pyramid.', 'final.', 'conv_seg.')
    assert {k.split('.')[1] + '.' for k in fresh} == set(parts)
    assert all(k.startswith(tuple(f'decode_head.{p}' for p in parts)) for k in fresh)
    for other in ('backbone', 'auxiliary_head'):
        copied = getattr(model, other).state_dict()
        assert all(
            torch.equal(v, copied[k]) for k, v in getattr(source, other).state_dict().items()
        )
    assert f'the weights of a {kind} go to decode_head.context' in log.text
    assert 'unexpected key' not in log.text
    assert 'size mismatch' not in log.text
    assert 'decode_head.conv_seg.weight' in log.text  # as missing


def test_old_checkpoints_without_counters(log) -> None:
    state = {
        k: v
        for k, v in plain_model('PSPHead').decode_head.state_dict().items()
        if 'num_batches' not in k
    }
    head = MODELS.build({**HEAD, **GFF, 'context': PSP})
    head.load_state_dict(state, strict=False)
    for key, value in head.context.state_dict().items():
        assert 'num_batches' in key or torch.equal(value, state[key])
    assert 'go to context' in log.text


def test_the_heads_state_is_not_changed_for_the_caller() -> None:
    source = plain_model('PSPHead')
    state = source.state_dict()
    kept = dict(state)
    segmentor(dict(GFF, context=PSP)).load_state_dict(state, strict=False)
    assert list(state) == list(kept)
    assert all(state[k] is v for k, v in kept.items())


@pytest.mark.parametrize(
    'options',
    [
        dict(context=PSP),
        dict(context=ASPP, dfp='conv'),
        dict(RELEASED),
        # The last level itself: a context without any weight.
        dict(context=dict(type='FCNHead', channels=64, num_convs=0, concat_input=False)),
    ],
    ids=['psp', 'aspp', 'released', 'no weights'],
)
def test_own_checkpoint_loads_strictly_and_whole(tmp_path: Path, log, options: dict) -> None:
    model, other = (segmentor(dict(GFF, **options)) for _ in range(2))
    save_checkpoint(dict(state_dict=model.state_dict()), str(tmp_path / 'own.pth'))
    load_checkpoint(other, str(tmp_path / 'own.pth'), strict=True)
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())
    assert 'go to' not in log.text


def test_another_head_gives_nothing(log) -> None:
    """A part of the context's names is no head of its type."""
    source = plain_model('ASPPHead').decode_head
    head = MODELS.build({**HEAD, **GFF, 'context': PSP})
    before = copy.deepcopy(head.context.state_dict())
    head.load_state_dict(
        {k: v for k, v in source.state_dict().items() if not k.startswith('conv_seg')}, strict=False
    )
    assert all(torch.equal(v, before[k]) for k, v in head.context.state_dict().items())
    assert 'go to' not in log.text


# --- with the hook and with CAR ------------------------------------------------------------------

SMALL = dict(
    type='GFFHead',
    in_channels=list(LEVELS),
    in_index=[0, 1, 2, 3],
    channels=6,
    context=dict(type='PSPHead', channels=7, pool_scales=(1, 2)),
    num_classes=8,
    norm_cfg=BN,
)
DILATED = dict(
    neck=dict(channels=5, update='sequential', gate='channel', gate_input='raw', num_convs=0),
    fuse_context=True,
    dfp='dilated',
)
#: Options of the head, and its concatenations: those in front of, and that of final.0.
FUSED = {
    'gff': (dict(), {}, (7, 6, 6, 6, 6)),
    'dfp': (
        dict(dfp='conv'),
        {f'pyramid.layers.{i}.conv': (7, *[6] * i) for i in range(1, 5)},
        (6,) * 5,
    ),
    'dilated': (
        DILATED,
        {f'pyramid.layers.{i}.0.conv': (5,) * (i + 1) for i in range(1, 5)},
        (5,) * 6,
    ),
    'concat': (
        dict(neck=dict(fusion='concat')),
        {f'neck.mix.{i}.conv': (6,) * 4 for i in range(4)},
        (7, 6, 6, 6, 6),
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mode', ['fold', 'module'])
@pytest.mark.parametrize('name', FUSED)
def test_scale_equalizer_hook(tmp_path: Path, name: str, mode: str) -> None:
    options, inner, last = FUSED[name]
    head = dict(SMALL, **options)
    made = runner(tmp_path, head=head, hook=dict(mode=mode), max_iters=1)
    made.train()
    hook = next(h for h in made.hooks if isinstance(h, ScaleEqualizerHook))
    found = {entry['name']: tuple(entry['channels']) for entry in hook.record['layers']}
    expected = {'context.bottleneck.conv': (32, 7, 7), **inner, 'final.0.conv': last}
    assert found == {f'decode_head.{k}': v for k, v in expected.items()}
    assert not [entry for entry in hook.record['layers'] if entry.get('reason')]
    state = CheckpointLoader.load_checkpoint(str(tmp_path / 'iter_1.pth'))
    assert state['meta']['scale_equalizer']['mode'] == mode
    fresh = MODELS.build(config(tmp_path, head=head).model)
    fresh.load_state_dict(state['state_dict'], strict=True)
    x = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        ours, theirs = made.model.eval()(x), fresh.eval()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('num_convs', [1, 2])
@pytest.mark.parametrize('dfp', [None, 'conv', 'dilated'])
def test_class_aware_regularization(dfp: str | None, num_convs: int) -> None:
    options = DILATED if dfp == 'dilated' else dict(dfp=dfp)
    head = {**HEAD, **GFF, 'context': PSP, 'num_convs': num_convs, **options}
    cfg = dict(segmentor_config(head).model.to_dict(), type='CAREncoderDecoder', car=dict())
    model = MODELS.build(cfg)
    assert list(model.car_layers) == [f'decode_head.final.{num_convs - 1}']
    size = (33, 47)
    log = model.loss(torch.randn(2, 3, *size), toy_samples(5, size))
    kinds = ('intra_c2p', 'inter_c2c', 'inter_c2p')
    assert {f'decode.loss_car_{kind}' for kind in kinds} <= set(log)
    model.parse_losses(log)[0].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(merge_car(model)(x), expected, rtol=1e-4, atol=1e-4)


# --- in a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FUSED)
def test_compiles_as_one_graph(name: str) -> None:
    head = GFFHead(**{k: v for k, v in dict(SMALL, **FUSED[name][0]).items() if k != 'type'}).eval()
    inputs = [torch.randn(1, c, *s) for c, s in zip(LEVELS, SIZES)]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(head, backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(inputs), head(inputs), rtol=1e-4, atol=1e-5)


def test_initial_weights() -> None:
    """The classifier that is replaced is initialized like the one that it replaces."""
    for num_convs in (0, 1):
        head = small(num_convs=num_convs, channels=64)
        head.init_weights()
        assert 0.008 < head.conv_seg.weight.std() < 0.012
        assert not head.conv_seg.bias.any()
        norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((m.weight == 1).all() for m in norms)


def test_auxiliary_losses_train_everything() -> None:
    size = (33, 47)
    model = segmentor(dict(GFF, context=PSP, dfp='conv'))
    log = model.loss(torch.randn(2, 3, *size), toy_samples(5, size))
    assert {'decode.loss_ce', 'aux.loss_ce'} <= set(log)
    model.parse_losses(log)[0].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_channels=64), 'GFFHead: in_channels must list the channels.*got 64'),
        (dict(in_index=3), 'GFFHead: in_index must list one level for each of the 4 .*got 3'),
        (dict(in_index=[0, 1]), r'GFFHead: in_index must list .* got \[0, 1\]'),
        (dict(input_transform='resize_concat'), 'GFFHead takes .*: remove input_transform'),
        (dict(neck='gff'), "GFFHead: neck must be a dict .*got 'gff'"),
        (dict(dfp=False), 'GFFHead: dfp must be None .*got False'),
        (dict(num_convs=-1), 'num_convs must not be negative.*num_convs=-1'),
        (dict(kernel_size=2), 'kernel_size odd, got .*kernel_size=2'),
        (dict(kernel_size=-1), 'kernel_size odd, got .*kernel_size=-1'),
        (dict(fuse_context='yes'), "fuse_context must be 'auto', True or False, got 'yes'"),
        (dict(dfp='dilated'), "dfp='dilated' begins with the fused context: set fuse_context"),
        (dict(dfp='dense'), "one of .*'dilated'.*got 'dense'"),
        (dict(context='PSPHead'), "GFFHead: context must be the config .*got 'PSPHead'"),
        (dict(neck=dict(fusion='mean')), "GatedFullyFusion: fusion must be one of .*got 'mean'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_context_of_several_outputs() -> None:
    with pytest.raises(ValueError, match='GFFHead: context: DAHead has losses of its own'):
        small(context=dict(type='DAHead', pam_channels=4))
