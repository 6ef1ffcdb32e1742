"""Fusion tracing: every decode head of the installed mmseg, and heads nobody has seen."""

from __future__ import annotations

import contextlib

import mmseg.models.decode_heads as mmseg_heads
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import cc_head, psa_head
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.fusions import FusionTracer, measure_branches, trace, trace_fusions

BN = dict(type='BN')
LEVELS = (8, 16, 24, 32)
SIZES = ((32, 33), (16, 17), (8, 9), (4, 5))
COMMON = dict(channels=4, num_classes=3, norm_cfg=BN)
LAST = dict(in_channels=32, in_index=3, **COMMON)
ALL = dict(in_channels=list(LEVELS), in_index=[0, 1, 2, 3], **COMMON)


def pyramid(channels=LEVELS, sizes=SIZES, batch=1):
    return [torch.randn(batch, c, *s) for c, s in zip(channels, sizes)]


def flat():
    return pyramid(sizes=(SIZES[2],) * 4)


def coarse_and(features):
    return lambda: (features(), torch.randn(1, 3, *SIZES[2]))


# head -> (config, inputs, [(layer, channels of each branch), ...])
CONCATENATING = {
    'ANNHead': (
        dict(
            project_channels=4,
            in_channels=[24, 32],
            in_index=[2, 3],
            **COMMON,
            query_scales=(1,),
            key_pool_scales=(1, 2),
        ),
        flat,
        [
            ('fusion.bottleneck.conv', (32, 32)),
            ('context.bottleneck.conv', (4, 4)),
        ],
    ),
    'APCHead': (
        dict(pool_scales=(1, 2), fusion=True, **LAST),
        pyramid,
        [('bottleneck.conv', (32, 4, 4))],
    ),
    'ASPPHead': (
        dict(dilations=(1, 2, 3), **LAST),
        pyramid,
        [('bottleneck.conv', (4, 4, 4, 4))],
    ),
    'CCHead': (
        dict(in_channels=32, in_index=3, channels=8, num_classes=3, norm_cfg=BN),
        pyramid,
        [('conv_cat.conv', (32, 8))],
    ),
    'DMHead': (
        dict(filter_sizes=(1, 3), **LAST),
        pyramid,
        [('bottleneck.conv', (32, 4, 4))],
    ),
    'DNLHead': (LAST, pyramid, [('conv_cat.conv', (32, 4))]),
    'DPTHead': (
        dict(
            in_channels=(8, 8, 8, 8),
            in_index=[0, 1, 2, 3],
            input_transform='multiple_select',
            embed_dims=8,
            post_process_channels=[4, 4, 4, 4],
            readout_type='project',
            **COMMON,
        ),
        lambda: [[torch.randn(1, 8, 8, 9), torch.randn(1, 8)] for _ in range(4)],
        # The class token is concatenated to every cell: a linear layer, channels last.
        [(f'reassemble_blocks.readout_projects.{i}.0', (8, 8)) for i in range(4)],
    ),
    'DepthwiseSeparableASPPHead': (
        dict(dilations=(1, 2, 3), c1_in_channels=8, c1_channels=2, **LAST),
        pyramid,
        [
            ('bottleneck.conv', (4, 4, 4, 4)),
            ('sep_bottleneck.0.depthwise_conv.conv', (4, 2)),
        ],
    ),
    'DepthwiseSeparableFCNHead': (
        dict(num_convs=2, concat_input=True, **LAST),
        pyramid,
        [('conv_cat.depthwise_conv.conv', (32, 4))],
    ),
    'EMAHead': (
        dict(ema_channels=4, num_bases=4, num_stages=1, **LAST),
        pyramid,
        [('conv_cat.conv', (32, 4))],
    ),
    'EncHead': (
        dict(num_codes=4, use_se_loss=False, add_lateral=True, **ALL),
        pyramid,
        # The last level comes first, then the laterals.
        [('fusion.conv', (4, 4, 4, 4))],
    ),
    'FCNHead': (dict(num_convs=1, **LAST), pyramid, [('conv_cat.conv', (32, 4))]),
    'GCHead': (LAST, pyramid, [('conv_cat.conv', (32, 4))]),
    'ISAHead': (
        dict(isa_channels=4, down_factor=(2, 2), **LAST),
        pyramid,
        [('out_conv.conv', (4, 4))],
    ),
    'LRASPPHead': (
        dict(
            branch_channels=(2, 4),
            in_channels=[8, 16, 32],
            in_index=[0, 1, 3],
            input_transform='multiple_select',
            **COMMON,
        ),
        lambda: pyramid((8, 16, 0, 32), ((56, 56), (54, 54), (1, 1), (51, 51))),
        [('conv_ups.conv_up1.conv', (4, 4)), ('conv_ups.conv_up0.conv', (4, 2))],
    ),
    'LightHamHead': (
        dict(
            ham_channels=4,
            ham_kwargs=dict(MD_R=4, MD_S=1, train_steps=1, eval_steps=1),
            in_channels=[16, 24, 32],
            in_index=[1, 2, 3],
            channels=4,
            num_classes=3,
            norm_cfg=dict(type='GN', num_groups=2),
        ),
        pyramid,
        [('squeeze.conv', (16, 24, 32))],
    ),
    'NLHead': (LAST, pyramid, [('conv_cat.conv', (32, 4))]),
    'OCRHead': (
        dict(ocr_channels=4, **LAST),
        coarse_and(flat),
        [('object_context_block.bottleneck.conv', (4, 4))],
    ),
    'PSAHead': (
        dict(mask_size=(5, 5), psa_type='bi-direction', compact=False, shrink_factor=1, **LAST),
        pyramid,
        [('proj.conv', (4, 4)), ('bottleneck.conv', (32, 32))],
    ),
    'PSPHead': (
        dict(pool_scales=(1, 2), **LAST),
        pyramid,
        [('bottleneck.conv', (32, 4, 4))],
    ),
    'PointHead': (
        dict(
            in_channels=[8, 16],
            in_index=[0, 1],
            num_fcs=2,
            coarse_pred_each_layer=True,
            channels=4,
            num_classes=3,
        ),
        # Fine-grained features of 8 + 16 channels and a coarse prediction at 20 points.
        lambda: (torch.randn(1, 24, 20), torch.randn(1, 3, 20)),
        [('fcs.0.conv', (24, 3)), ('fcs.1.conv', (4, 3)), ('fc_seg', (4, 3))],
    ),
    'SETRMLAHead': (
        dict(
            mla_channels=2,
            up_scale=4,
            in_channels=list(LEVELS),
            in_index=[0, 1, 2, 3],
            channels=8,
            num_classes=3,
            norm_cfg=BN,
        ),
        flat,
        [('conv_seg', (2, 2, 2, 2))],
    ),
    'STDCHead': (dict(num_convs=1, **LAST), pyramid, [('conv_cat.conv', (32, 4))]),
    'SegformerHead': (ALL, pyramid, [('fusion_conv.conv', (4, 4, 4, 4))]),
    'UPerHead': (
        dict(pool_scales=(1, 2), **ALL),
        pyramid,
        [('bottleneck.conv', (32, 4, 4)), ('fpn_bottleneck.conv', (4, 4, 4, 4))],
    ),
    'VPDDepthHead': (
        dict(in_channels=[16, 6, 10, 12], embed_dim=2, feature_dim=16),
        lambda: pyramid((16, 6, 10, 12), ((32, 32), (16, 16), (8, 8), (4, 4))),
        # A concatenation inside a concatenation counts as its parts.
        [('conv_aggregation.0', (16, 6, 10, 12))],
    ),
}
# Their forward concatenates no features along the channels.
OTHERS = {
    'DAHead',
    'DDRHead',
    'FPNHead',
    'IterativeDecodeHead',  # runs a decode head and KernelUpdateHead
    'KernelUpdateHead',
    'KernelUpdator',
    'Mask2FormerHead',
    'MaskFormerHead',
    'PIDHead',
    'SETRUPHead',
    'SegmenterMaskTransformerHead',  # concatenates tokens, not channels
    'SideAdapterCLIPHead',  # concatenates tokens, not channels
}


class StandInMask(nn.Module):
    """PSAMask is a compiled op; its result has as many channels as the map has cells."""

    def __init__(self, psa_type, mask_size):
        super().__init__()

    def forward(self, x):
        n, _, h, w = x.shape
        return x.mean(1, keepdim=True).expand(n, h * w, h, w)


def build(name, config):
    return MODELS.build(dict(type=name, **config))


@pytest.mark.stack
def test_table_covers_every_head_of_mmseg():
    registered = set(mmseg_heads.__all__)
    assert registered <= CONCATENATING.keys() | OTHERS
    assert not CONCATENATING.keys() & OTHERS


@pytest.mark.stack
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(CONCATENATING))
def test_fusions_of_mmseg_heads(name, monkeypatch):
    config, make, expected = CONCATENATING[name]
    monkeypatch.setattr(psa_head, 'PSAMask', StandInMask)
    if name in ('CCHead', 'PointHead') and cc_head.CrissCrossAttention is None:
        # onedl-mmsegmentation has no Python part of its ops without the compiled one, and says so.
        with pytest.raises(RuntimeError, match='install'):
            build(name, config)
        return
    head = build(name, config)
    inputs = make()
    found = trace_fusions(head, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    assert [(f.name, f.channels) for f in found] == expected
    modules = dict(head.named_modules())
    for fusion in found:
        assert fusion.conv is modules[fusion.name]
        assert sum(fusion.channels) == fusion.conv.weight.shape[1] * getattr(
            fusion.conv, 'groups', 1
        )
        assert len(fusion.sizes) == len(fusion.channels)
        assert fusion.equalizable == ('depthwise' not in fusion.name)


def test_sizes_are_those_before_upsampling():
    config, make, _ = CONCATENATING['UPerHead']
    head = build('UPerHead', config)
    ppm, fpn = trace_fusions(head, make())
    assert ppm.sizes == (SIZES[3], (1, 1), (2, 2))
    assert fpn.sizes == SIZES
    assert ppm.normalized
    assert fpn.normalized


def test_resize_concat_of_base_decode_head():
    head = build(
        'FCNHead',
        dict(ALL, input_transform='resize_concat', num_convs=1, concat_input=False),
    )
    (fusion,) = trace_fusions(head, pyramid())
    assert (fusion.name, fusion.channels, fusion.sizes) == ('convs.0.conv', LEVELS, SIZES)


def test_neck():
    neck = build('JPU', dict(in_channels=(8, 16, 32), mid_channels=4, norm_cfg=BN))
    found = trace_fusions(neck, pyramid((8, 16, 32), SIZES[:3]))
    # Depthwise separable convolutions with four dilations take the same concatenation.
    assert [f.channels for f in found] == [(4, 4, 4)] * 4
    assert not any(f.equalizable for f in found)


class AnyHead(nn.Module):
    """Fuses in the ways that heads are written in."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(6, 4, 3, padding=1)
        self.after = ConvModule(6, 4, 1, norm_cfg=BN, order=('norm', 'act', 'conv'))
        self.gated = nn.Conv2d(6, 4, 1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.linear = nn.Linear(6, 4)
        self.tokens = nn.Linear(6, 4)
        self.signal = nn.Conv1d(6, 4, 1)
        self.functional = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.moved = nn.Linear(6, 4)
        self.moved_keywords = nn.Linear(6, 4)
        self.keywords = nn.Conv2d(6, 4, 1)
        self.transposed = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.twice = nn.Conv2d(6, 4, 1)
        self.shared = nn.Conv2d(6, 4, 1)
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 1))
        self.alone = nn.Conv2d(6, 4, 1)
        self.shifted = nn.Conv2d(6, 4, 1)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x, y):
        both = torch.concat([x, y], axis=-3)
        self.plain(self.drop(both))
        self.after(F.interpolate(both, scale_factor=2))
        self.gated(both.mean((2, 3), keepdim=True).sigmoid() * both)
        self.grouped(F.pad(both, (1, 1)))
        self.depthwise(both)
        self.linear(both.flatten(2).transpose(1, 2))
        self.tokens(torch.cat((x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)), -1))
        self.signal(both.flatten(2))
        F.conv2d(both, self.functional)
        self.twice(both)
        self.twice(torch.cat((y, x), 1))
        self.moved(both.movedim(1, -1))
        self.moved_keywords(torch.permute(input=both, dims=(0, 2, 3, 1)))
        self.keywords(torch.cat(tensors=[x, y], dim=1))
        self.transposed(both)
        self.shared(both)
        self.shared(torch.randn_like(both))
        self.normed(both)
        self.shifted((both - 1) / 2)
        # A sum of features, and features side by side: no branches to tell apart.
        self.alone(both + torch.randn_like(both))
        self.alone(torch.cat((both.flip(2), both.flip(3)), 2))
        self.alone(torch.cat((both.flip(2), both.flip(3)), 0))
        return both


def test_any_head_a_user_writes():
    head = AnyHead()
    x, y = torch.randn(1, 2, 6, 6), torch.randn(1, 4, 6, 6)
    found = {f.name: f for f in trace_fusions(head, x, y)}
    names = (
        'plain after.conv gated grouped depthwise linear tokens signal twice moved moved_keywords '
        'keywords transposed shared normed shifted'
    )
    assert {n: f.channels for n, f in found.items()} == dict.fromkeys(names.split(), (2, 4))
    left = {name: f.reason for name, f in found.items() if not f.equalizable}
    # Neither the depthwise nor the transposed one is in front of a batch norm: both are folded.
    assert left.keys() == {'twice', 'shared', 'normed'}
    assert 'split differently' in left['twice']
    assert 'not concatenated' in left['shared']
    assert 'computed' in left['normed']


def test_leaves_no_trace():
    config, make, _ = CONCATENATING['UPerHead']
    head = build('UPerHead', config)
    head.bottleneck.eval()
    before = {k: v.clone() for k, v in head.state_dict().items()}
    flags = [m.training for m in head.modules()]
    inputs = make()
    state = torch.random.get_rng_state()
    trace_fusions(head, inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in head.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in head.modules())
    assert all(p.grad is None for p in head.parameters())


def test_split_returns_the_branches():
    seen = {}
    head = AnyHead()
    x, y = torch.randn(1, 2, 6, 6), torch.randn(1, 4, 6, 6)

    def keep(fusion, value):
        seen[fusion.name] = fusion.split(value)

    with torch.no_grad(), FusionTracer(head, keep):
        head.eval()(x, y)
    assert all(torch.equal(a, b) for a, b in zip(seen['plain'], (x, y)))
    assert torch.equal(seen['linear'][1], y.flatten(2).transpose(1, 2))
    assert torch.equal(seen['tokens'][0], x.permute(0, 2, 3, 1))


def test_module_without_fusion():
    assert trace_fusions(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 5, 5)) == []


class HeadWithoutBatch(BaseDecodeHead):
    def forward(self, inputs):
        x = self._transform_inputs(inputs)
        return self.cls_seg(torch.cat([x[0], F.interpolate(x[1], size=x[0].shape[2:])], 1))


def test_classifier_that_fuses():
    head = HeadWithoutBatch(
        in_channels=[8, 16],
        in_index=[0, 1],
        input_transform='multiple_select',
        channels=24,
        num_classes=3,
    )
    (fusion,) = trace_fusions(head, pyramid())
    assert (fusion.name, fusion.channels, fusion.normalized) == ('conv_seg', (8, 16), False)


FORMS = ('auto', 'dilated', 'shared_taps')


def kernel_sharing_head(implementation):
    return MODELS.build(
        dict(
            type='KSACHead',
            in_channels=[8, 16],
            in_index=[0, 1],
            input_transform='resize_concat',
            dilations=(1, 6, 12),
            implementation=implementation,
            **COMMON,
        )
    )


@pytest.mark.parametrize('implementation', FORMS)
def test_the_shared_kernel_of_ksac_is_seen_however_it_is_computed(implementation):
    head = kernel_sharing_head(implementation)
    found = trace_fusions(head, pyramid()[:2])
    assert {f.name: f.channels for f in found} == {
        'pyramid.conv': (8, 16),
        'point.conv': (8, 16),
        'image_pool.1.conv': (8, 16),
        'bottleneck.conv': (4, 4, 4),
    }
    assert all(f.called and f.equalizable and f.normalized for f in found)
    assert head.pyramid.implementation == implementation


@pytest.mark.parametrize('implementation', FORMS)
def test_the_implementation_is_put_back_after_an_error(implementation):
    head = kernel_sharing_head(implementation)
    with pytest.raises(ValueError, match='expected a feature'):
        trace_fusions(head, pyramid(channels=(8, 17))[:2])
    assert head.pyramid.implementation == implementation


@pytest.mark.parametrize('implementation', FORMS)
def test_branches_in_front_of_the_shared_kernel_are_measured(implementation):
    head, features = kernel_sharing_head(implementation), pyramid(batch=3)[:2]
    _, statistics = measure_branches(head, [features], head)
    first, second = statistics['pyramid.conv'].std
    up = F.interpolate(features[1], size=SIZES[0], mode='bilinear')
    assert first == pytest.approx(float(features[0].std(correction=0)), rel=1e-4)
    assert second == pytest.approx(float(up.std(correction=0)), rel=1e-4)


X, Y = torch.randn(2, 2, 6, 8), torch.randn(2, 4, 6, 8)


def fusions_of(function, layer=None):
    """What a module finds that runs ``layer`` on ``function(x, y, both)``."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer or nn.Conv2d(6, 4, 1)

        def forward(self, x, y):
            return self.layer(function(x, y, torch.cat([x, y], 1)))

    module = Module()
    with torch.no_grad(), FusionTracer(module) as tracer:
        module(X, Y)
        return [(f.name, f.channels) for f in tracer.fusions], [str(x) for x in tracer.lost]


GATE = torch.rand(2, 6, 6, 8)
FOLLOWED = {
    'z * g + z': lambda x, y, z: z * GATE + z,
    'z + g * z': lambda x, y, z: torch.add(z, GATE * z),
    'iadd': lambda x, y, z: (z * GATE).add_(z),
    'z - z * g': lambda x, y, z: z - z * GATE,
    'where': lambda x, y, z: torch.where(GATE > 0.5, z, 0.0),
    'where zeros': lambda x, y, z: torch.where(GATE > 0.5, torch.zeros_like(z), z),
    'Tensor.where': lambda x, y, z: z.where(GATE > 0.5, torch.zeros(())),
    'masked_fill': lambda x, y, z: z.masked_fill(GATE > 0.5, 0),
    'roll': lambda x, y, z: z.roll((1, 2), dims=(2, 3)),
    'torch.roll': lambda x, y, z: torch.roll(z, 1, -1),
    'flip': lambda x, y, z: z.flip(2),
    'flips': lambda x, y, z: z.flip(-1, -2),
    'torch.flip': lambda x, y, z: torch.flip(z, dims=(3,)),
    'normalize': lambda x, y, z: F.normalize(z, dim=1),
    'hstack': lambda x, y, z: torch.hstack([x, y]),
    'scalar': lambda x, y, z: 1 - 2 * z,
}


@pytest.mark.parametrize('name', FOLLOWED)
def test_followed(name):
    found, lost = fusions_of(FOLLOWED[name])
    assert found == [('layer', (2, 4))]
    # hstack stands beside a plain concatenation that nothing takes.
    assert len(lost) == (name == 'hstack')


@pytest.mark.parametrize(
    ('function', 'channels'),
    [
        (lambda x, y, z: torch.stack([x, x, 2 * x], 1).flatten(1, 2), (2, 2, 2)),
        (lambda x, y, z: torch.stack([x, x, x], dim=1).view(2, 6, 6, 8), (2, 2, 2)),
        (lambda x, y, z: torch.stack([x, x, x], -4).reshape(2, -1, 6, 8), (2, 2, 2)),
    ],
)
def test_a_stack_that_is_flattened_is_a_concatenation(function, channels):
    found, _ = fusions_of(function)
    assert found == [('layer', channels)]


NOT_FOLLOWED = {
    'add': lambda x, y, z: z + GATE,
    'einsum': lambda x, y, z: torch.einsum('nchw,dc->ndhw', z, torch.rand(6, 6)),
    '__getitem__': lambda x, y, z: z[:, [0, 2, 4, 1, 3, 5]],
    'flip': lambda x, y, z: z.flip(1),
    'roll': lambda x, y, z: z.roll(1, 1),
    'pixel_shuffle': lambda x, y, z: F.pixel_shuffle(z.repeat(1, 4, 1, 1), 2),
    'where': lambda x, y, z: torch.where(GATE > 0, z, torch.cat([y, x], 1)),
}


@pytest.mark.parametrize('name', NOT_FOLLOWED)
def test_what_is_not_followed_is_told(name):
    found, lost = fusions_of(NOT_FOLLOWED[name])
    assert found == []
    ends = 'repeat' if name == 'pixel_shuffle' else name
    assert f'2 + 4 channels, concatenated inside the model: its trail ends at {ends!r}' in lost


def test_what_is_interleaved_has_no_blocks():
    found, _ = fusions_of(lambda x, y, z: torch.stack([x, x, x], 2).flatten(1, 2))
    assert found == []


def test_concatenations_that_reach_a_layer_are_not_lost():
    head = AnyHead()
    with torch.no_grad(), FusionTracer(head) as tracer:
        head.eval()(torch.randn(1, 2, 6, 6), torch.randn(1, 4, 6, 6))
        assert tracer.lost == []


# reason -> a layer and what is done with it; each says what was seen.
class Kernel(nn.Module):
    """Convolves with a parameter that is not called weight, beside one that is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.kernel = nn.Parameter(torch.randn(4, 6, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.kernel)


class Tied(nn.Module):
    """Runs a convolution's weight the other way round."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        return F.conv_transpose2d(x, self.conv.weight)


@pytest.mark.parametrize(
    ('layer', 'name', 'reason'),
    [
        (Kernel(), 'layer', 'it uses layer.kernel, and only a parameter that is called weight'),
        (Tied(), 'layer.conv', 'its weight is used by conv_transpose2d, which reads it the other'),
        (
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 1)),
            'layer',
            'computed, or at least none of its parameters',
        ),
        (
            nn.Sequential(nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6)),
            'layer.0',
            'depthwise: it mixes no channels, and the batch or instance norm that its output goes',
        ),
        (nn.Sequential(nn.Conv2d(6, 6, 1, groups=6), nn.GroupNorm(1, 6)), 'layer.0', ''),
        (nn.Sequential(nn.Conv2d(6, 6, 1, groups=6), nn.ReLU(), nn.BatchNorm2d(6)), 'layer.0', ''),
        (nn.Conv2d(6, 6, 1, groups=6), 'layer', ''),
        (nn.Conv2d(6, 12, 1, groups=6), 'layer', ''),
        (nn.ConvTranspose2d(6, 4, 1), 'layer', ''),
    ],
)
def test_every_reason_was_observed(layer, name, reason):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, y):
            return self.layer(torch.cat([x, y], 1))

    (fusion,) = trace_fusions(Module(), X, Y)
    assert fusion.name == name
    assert (reason in fusion.reason) if reason else (fusion.reason == '')
    assert fusion.equalizable == (not reason)


class Fails(nn.Module):
    """A layer that raises within itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        raise ValueError('not today')


class GoesOn(nn.Module):
    """Tries a layer, and goes on without it where that raises."""

    def __init__(self):
        super().__init__()
        self.tried = Fails()
        self.fusion = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 1))
        self.plain = nn.Conv2d(6, 4, 1)

    def forward(self, x, y):
        with contextlib.suppress(ValueError):
            self.tried(x)
        both = torch.cat([x, y], 1)
        return self.fusion(both) + self.plain(both)


@pytest.mark.parametrize('hooks', [trace._EVEN_IF_IT_RAISES, {}], ids=['own', 'torch 2.0'])
def test_an_error_that_the_model_catches(monkeypatch, hooks):
    monkeypatch.setattr(trace, '_EVEN_IF_IT_RAISES', hooks)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = GoesOn(), GoesOn()

        def forward(self, x, y):
            return self.first(x, y) + self.second(x, y)

    fusions = trace_fusions(Outer(), X, Y)
    names = ['first.fusion', 'first.plain', 'second.fusion', 'second.plain']
    assert [fusion.name for fusion in fusions] == names
    assert [fusion.equalizable for fusion in fusions] == [False, True, False, True]
    # Nothing of what raised is left behind.
    tracer = FusionTracer(outer := Outer())
    with tracer, torch.no_grad():
        outer(X, Y)
        assert tracer._inside == []
        assert tracer._running == []
