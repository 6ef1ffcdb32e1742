"""``mmseg_fusion.equalize`` on modules that know nothing of MMSegmentation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmseg_fusion import equalize
from mmseg_fusion.fusions import trace_fusions


class Fuse(nn.Module):
    """An encoder that fuses, a decoder that fuses without norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(dict(fuse=nn.Conv2d(6, 3, 1)))
        self.decoder = nn.Conv2d(6, 4, 3, padding=1)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x):
        x = self.encoder['fuse'](torch.cat([x, x], 1))
        return self.decoder(self.drop(torch.cat([x, F.avg_pool2d(x, 5, 1, 2)], 1)))


def batches(count=3, size=4):
    return [torch.randn(size, 3, 16, 16) for _ in range(count)]


def test_measures_divides_and_reports():
    model, data = Fuse(), batches()
    before = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    report = equalize(model, data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(b.layer, b.channels, b.done) for b in report.branches] == [('decoder', 3, True)] * 2
    # The reference: all features of all batches at once, in float64.
    with torch.no_grad():
        x = before.encoder['fuse'](torch.cat([torch.cat(data)] * 2, 1))
        parts = [x, F.avg_pool2d(x, 5, 1, 2)]
    means = [p.double().mean().item() for p in parts]
    stds = [p.double().std(correction=0).item() for p in parts]
    assert [b.mean for b in report.branches] == pytest.approx(means, abs=1e-6)
    assert [b.std for b in report.branches] == pytest.approx(stds, rel=1e-5)
    assert [b.after for b in report.branches] == pytest.approx([1.0, 1.0], rel=1e-5)
    with torch.no_grad():
        old = F.conv2d(
            torch.cat([(p - m) / s for p, m, s in zip(parts, means, stds)], 1),
            before.decoder.weight,
            before.decoder.bias,
        )
        new = F.conv2d(torch.cat(parts, 1), model.decoder.weight, model.decoder.bias)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert report.passed_over == ['encoder.fuse']
    assert torch.equal(model.encoder['fuse'].weight, before.encoder['fuse'].weight)
    told = str(report)
    assert f'{stds[0]:.4f}' in told
    assert 'Not asked for: encoder.fuse' in told


def test_layers_by_name_anywhere():
    report = equalize(Fuse(), batches(), layers=['encoder.fuse'])
    assert [plan['name'] for plan in report.layers] == ['encoder.fuse']
    report = equalize(Fuse(), batches(), pretrained=())
    assert [plan['name'] for plan in report.layers] == ['encoder.fuse', 'decoder']
    assert [b.after for b in report.branches] == pytest.approx([1.0] * 4, rel=1e-4)


@pytest.mark.parametrize('mode', ['fold', 'module'])
def test_modes_give_the_same_function(mode):
    torch.manual_seed(1)
    plain, data = Fuse().eval(), batches()
    model = copy.deepcopy(plain)
    report = equalize(model, data, mode=mode)
    other = copy.deepcopy(plain)
    equalize(other, data, mode='fold' if mode == 'module' else 'module')
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert [b.after for b in report.branches] == pytest.approx([1.0] * 2, rel=1e-4)


def test_what_a_batch_may_be():
    for wrap in (lambda x: (x, 'labels'), lambda x: [x], lambda x: dict(x=x)):
        assert equalize(Fuse(), [wrap(x) for x in batches()]).branches
    loader = torch.utils.data.DataLoader(torch.randn(8, 3, 16, 16), batch_size=4)
    assert equalize(Fuse(), loader).branches
    assert equalize(nn.DataParallel(Fuse()), batches()).layers[0]['name'] == 'decoder'
    assert equalize(torch.compile(Fuse()), batches()).layers[0]['name'] == 'decoder'


def test_a_model_of_sums_has_nothing_to_do():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x + x.flip(2))

    model = Sum()
    weight = model.conv.weight.clone()
    report = equalize(model, batches())
    assert report.branches == []
    assert str(report).startswith('Nothing to do')
    assert torch.equal(model.conv.weight, weight)


@pytest.mark.parametrize(
    ('data', 'options', 'error', 'message'),
    [
        (iter(()), {}, TypeError, 'only once'),
        ([], {}, ValueError, 'batches is empty'),
        (batches(1), dict(mode='both'), ValueError, "'fold' or 'module'"),
        (batches(1), dict(layers='decoder'), ValueError, 'list of names'),
        (batches(1), dict(layers=['neck']), ValueError, r"'neck' .*candidates: .*decoder"),
        (batches(1), dict(equalize_mean='yes'), ValueError, 'equalize_mean'),
        ([torch.full((2, 3, 9, 9), torch.nan)], {}, FloatingPointError, 'branch 0 of decoder'),
    ],
)
def test_bad_input_changes_nothing(data, options, error, message):
    model = Fuse()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        equalize(model, data, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_image_where_a_norm_sees_one_value():
    class Pooled(Fuse):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return super().forward(x) * self.norm(x.mean((2, 3), keepdim=True)).sum()

    with pytest.raises(ValueError, match='give more images a batch'):
        equalize(Pooled(), batches(1, size=1))


# --- models of other projects ------------------------------------------------------------------


def smp_model(name, **options):
    smp = pytest.importorskip('segmentation_models_pytorch')
    return getattr(smp, name)('resnet18', encoder_weights=None, classes=3, **options)


def torchvision_model(name, **options):
    segmentation = pytest.importorskip('torchvision.models.segmentation')
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


class HandWrittenFPN(nn.Module):
    """timm's features; sums top-down, and a concatenation of all levels at the end."""

    def __init__(self, features):
        super().__init__()
        self.backbone = features
        channels = features.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for _ in channels
        )
        self.fuse = nn.Conv2d(8 * len(channels), 8, 1)

    def forward(self, x):
        levels = [lateral(f) for lateral, f in zip(self.lateral, self.backbone(x))]
        for i in range(len(levels) - 1, 0, -1):
            up = F.interpolate(levels[i], size=levels[i - 1].shape[2:])
            levels[i - 1] = levels[i - 1] + up
        size = levels[0].shape[2:]
        smooth = [smooth(level) for smooth, level in zip(self.smooth, levels)]
        return self.fuse(torch.cat([F.interpolate(s, size=size) for s in smooth], 1))


def timm_model(name):
    timm = pytest.importorskip('timm')
    return HandWrittenFPN(timm.create_model(name, features_only=True, pretrained=False))


UNET = [
    (f'decoder.blocks.{i}.conv1.0', c)
    for i, c in enumerate([(512, 256), (256, 128), (128, 64), (64, 64)])
]
UNET_PP = [
    (f'decoder.blocks.x_{i}.conv1.0', c)
    for i, c in [
        ('0_0', (512, 256)),
        ('1_1', (256, 128)),
        ('2_2', (128, 64)),
        ('3_3', (64, 64)),
        ('0_1', (256, 128, 128)),
        ('1_2', (128, 64, 64)),
        ('2_3', (64, 64, 64)),
        ('0_2', (128, 64, 64, 64)),
        ('1_3', (64, 64, 64, 64)),
        ('0_3', (64, 64, 64, 64, 64)),
    ]
]
# model -> how to build it, and the fusions that are to be equalized
FOREIGN = {
    'smp.Unet': (lambda: smp_model('Unet'), UNET),
    'smp.UnetPlusPlus': (lambda: smp_model('UnetPlusPlus'), UNET_PP),
    'smp.DeepLabV3Plus': (
        lambda: smp_model('DeepLabV3Plus'),
        # The last one is depthwise, then pointwise, with no norm between them.
        [
            ('decoder.aspp.0.project.0', (256,) * 5),
            ('decoder.block2.0.0', (256, 48)),
            ('decoder.block2.0.1', (256, 48)),
        ],
    ),
    'smp.PAN': (lambda: smp_model('PAN'), []),
    'smp.UPerNet': (
        lambda: smp_model('UPerNet'),
        [
            ('decoder.psp.out_conv.0', (512, 256, 256, 256, 256)),
            ('decoder.fusion_block.0', (256,) * 4),
        ],
    ),
    'smp.Linknet': (lambda: smp_model('Linknet'), []),
    'torchvision.deeplabv3_resnet50': (
        lambda: torchvision_model('deeplabv3_resnet50'),
        [('classifier.0.project.0', (256,) * 5)],
    ),
    'torchvision.lraspp_mobilenet_v3_large': (
        lambda: torchvision_model('lraspp_mobilenet_v3_large'),
        [],
    ),
    'timm.resnet18 + FPN': (lambda: timm_model('resnet18'), [('fuse', (8,) * 5)]),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_models_of_other_projects(name):
    build, expected = FOREIGN[name]
    model = build()
    # PAN pools its last level three times more.
    size = 128 if name == 'smp.PAN' else 64
    data = [torch.randn(2, 3, size, size) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    report = equalize(model, data)
    print(f'\n{name}\n{report}')
    fusions = [(p['name'], tuple(p['channels'])) for p in report.layers if not p['reason']]
    assert fusions == expected
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    allowed = {f'{layer}.{key}' for layer, _ in fusions for key in ('weight', 'bias')}
    assert changed <= allowed
    assert {f'{layer}.weight' for layer, _ in fusions} <= changed
    done = [b.after for b in report.branches if b.done]
    assert done == pytest.approx([1.0] * len(done), rel=0.01)
    if not expected:
        assert str(report).startswith('Nothing to do')
    # The same fusions without a measurement.
    traced = {f.name for f in trace_fusions(model, data[0])}
    assert {layer for layer, _ in fusions} <= traced
