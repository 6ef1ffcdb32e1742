"""SemanticFPNHead and USFPNHead: the fact of each branch by itself, mmseg's FPN, formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis.counting import count_call
from mmseg_fusion.models.decode_heads import SemanticFPNHead, USFPNHead
from tests.engine.small import runner
from tests.testers import HeadTester
from tests.testers.toys import level_size, toy_features, toy_samples

LEVELS, STRIDES = (8, 16, 32, 64), (4, 8, 16, 32)
ALL = [0, 1, 2, 3]


class TestSemanticFPNHead(HeadTester):
    head = dict(type='SemanticFPNHead', in_index=ALL)
    stride = 4


class TestSemanticFPNHeadOfFPN(HeadTester):
    head = dict(type='SemanticFPNHead', in_index=ALL, pyramid=dict(type='FPN', num_outs=4))
    stride = 4
    # A neck with a config of its own.
    plain_convolutions = ('pyramid.*',)


class TestUSFPNHead(HeadTester):
    head = dict(type='USFPNHead', in_index=ALL)
    stride = 4


class TestUSFPNHeadOfStride2(HeadTester):
    head = dict(type='USFPNHead', in_index=ALL, output_stride=2)

    def check_outputs(self, outputs, size, batch):
        super().check_outputs(outputs, size, batch)
        # Twice the finest level, of which the image's side is no multiple.
        assert outputs[0].shape[2:] == tuple(2 * n for n in level_size(size, 4))


# --- written out ---------------------------------------------------------------------------------


def moved_norms(module: nn.Module) -> nn.Module:
    """The module with batch norms that do something in evaluation mode too."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for statistic in (m.weight, m.running_var):
                    statistic.uniform_(0.5, 1.5)
                for statistic in (m.bias, m.running_mean):
                    statistic.uniform_(-0.5, 0.5)
    return module


def naive_conv(x: Tensor, module: ConvModule) -> Tensor:
    """Convolution by its definition, a sum over the kernel's places of shifted maps, then norm and
    ReLU where the module has them."""
    weight, bias = module.conv.weight, module.conv.bias
    height, width = x.shape[2:]
    pad = weight.shape[-1] // 2
    padded = F.pad(x, (pad, pad, pad, pad))
    out = sum(
        torch.einsum('oc,nchw->nohw', weight[..., i, j], padded[..., i : i + height, j : j + width])
        for i in range(weight.shape[2])
        for j in range(weight.shape[3])
    )
    if bias is not None:
        out = out + bias.view(-1, 1, 1)
    if module.with_norm:
        norm = module.norm
        if norm.training:
            mean, variance = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
        else:
            mean, variance = norm.running_mean, norm.running_var
        mean, variance, scale, shift = (
            v.view(-1, 1, 1) for v in (mean, variance, norm.weight, norm.bias)
        )
        out = (out - mean) / (variance + norm.eps).sqrt() * scale + shift
    return out.clamp(min=0) if module.with_activation else out


def bilinear(x: Tensor, size, align_corners: bool = False) -> Tensor:
    return F.interpolate(x, tuple(size), mode='bilinear', align_corners=align_corners)


def naive_semantic_fpn(head: SemanticFPNHead, inputs: list[Tensor], stride: int = 4) -> Tensor:
    """What the classifier sees, as the fact sheet puts it: every branch goes up by itself."""
    pyramid = [naive_conv(x, conv) for x, conv in zip(inputs, head.pyramid.lateral_convs)]
    for i in (2, 1, 0):
        pyramid[i] = pyramid[i] + F.interpolate(pyramid[i + 1], pyramid[i].shape[2:])
    finest, total = pyramid[0].shape[2:], 0
    for i, y in enumerate(pyramid):
        blocks = list(head.branches[i])
        for step in range(max(1, i)):
            y = naive_conv(y, blocks.pop(0))
            if i > 0:
                y = bilinear(y, pyramid[i - 1 - step].shape[2:], head.align_corners)
        if stride == 2:
            y = naive_conv(y, blocks.pop(0))
            y = bilinear(y, [2 * n for n in finest], head.align_corners)
        assert not blocks, f'branch {i} has more convolutions than the paper'
        total = total + y
    return total if head.fuse_conv is None else naive_conv(total, head.fuse_conv)


def build(kind: str = 'SemanticFPNHead', **changes) -> SemanticFPNHead:
    cfg = dict(type=kind, in_channels=list(LEVELS), channels=6, num_classes=5, dropout_ratio=0)
    head = MODELS.build(copy.deepcopy({**cfg, 'norm_cfg': dict(type='BN'), **changes}))
    head.init_weights()
    return moved_norms(head).double()


def double(size, batch=2) -> list[Tensor]:
    return [x.double() for x in toy_features(LEVELS, STRIDES, size, batch)]


@pytest.mark.stack
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('size', [(64, 64), (77, 109)], ids=['64x64', '77x109'])
@pytest.mark.parametrize(
    ('changes', 'stride'),
    [
        (dict(), 4),
        (dict(align_corners=True), 4),
        (dict(extra_upsampling=True), 2),
        (dict(kind='USFPNHead'), 4),
        (dict(kind='USFPNHead', output_stride=2), 2),
    ],
    ids=['SFPN', 'align_corners', 'SFPN OS2', 'U-SFPN', 'U-SFPN OS2'],
)
def test_each_branch_by_itself(changes, stride, size, training):
    head, inputs = build(**changes).train(training), double(size)
    wanted = [*(x.requires_grad_() for x in inputs), *head.parameters()]
    found = head(inputs)
    weight, bias = head.conv_seg.weight[..., 0, 0], head.conv_seg.bias
    feature = naive_semantic_fpn(head, inputs, stride)
    expected = torch.einsum('kc,nchw->nkhw', weight, feature) + bias.view(-1, 1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    seed = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad((found * seed).sum(), wanted),
        torch.autograd.grad((expected * seed).sum(), wanted),
    )
    for f, e in pairs:
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize('size', [(64, 64), (64, 128)], ids=['64x64', '64x128'])
@pytest.mark.parametrize('align_corners', [False, True])
def test_is_mmsegs_neck_and_head(size, align_corners):
    """At powers of two, where mmseg's fixed factor of 2 meets the next level's size."""
    ours = build(pyramid=dict(type='FPN', num_outs=4), align_corners=align_corners).train()
    neck = MODELS.build(dict(type='FPN', in_channels=list(LEVELS), out_channels=6, num_outs=4))
    head = MODELS.build(
        dict(
            type='FPNHead',
            in_channels=[6] * 4,
            in_index=ALL,
            feature_strides=list(STRIDES),
            channels=6,
            num_classes=5,
            dropout_ratio=0,
            norm_cfg=dict(type='BN'),
            align_corners=align_corners,
        )
    )
    neck, head = neck.double().train(), head.double().train()
    # A branch of mmseg has the upsampling between its convolutions.
    names = {'conv_seg': 'conv_seg'}
    for i in range(4):
        for k in range(max(1, i)):
            names[f'branches.{i}.{k}'] = f'scale_heads.{i}.{2 * k if i else k}'
    theirs = {f'pyramid.{name}': p for name, p in neck.named_parameters()}
    modules = dict(head.named_modules())
    for mine, other in names.items():
        modules[other].load_state_dict(ours.get_submodule(mine).state_dict(), strict=True)
        theirs.update((f'{mine}.{n}', p) for n, p in modules[other].named_parameters())
    neck.load_state_dict(ours.pyramid.state_dict(), strict=True)
    mine = dict(ours.named_parameters())
    assert set(mine) == set(theirs)

    inputs = [x.requires_grad_() for x in double(size)]
    found, expected = ours(inputs), head(neck(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    seed = torch.randn_like(found)
    grads = torch.autograd.grad((found * seed).sum(), [*inputs, *mine.values()])
    wanted = [*inputs, *(theirs[name] for name in mine)]
    for f, e in zip(grads, torch.autograd.grad((expected * seed).sum(), wanted)):
        torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-9)


def test_levels_of_one_size():
    """A dilated backbone: nothing to upsample between its last levels."""
    head = build().eval()
    sizes = [(12, 15), (6, 8), (6, 8), (6, 8)]
    inputs = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(LEVELS, sizes)]
    expected = head.conv_seg(naive_semantic_fpn(head, inputs))
    torch.testing.assert_close(head(inputs), expected, rtol=1e-9, atol=1e-10)


# --- counts --------------------------------------------------------------------------------------

BLOCKS = {4: (1, 1, 2, 3), 2: (2, 2, 3, 4)}


@pytest.mark.parametrize('stride', [4, 2])
@pytest.mark.parametrize('kind', ['SemanticFPNHead', 'USFPNHead'])
def test_parameters_by_formula(kind, stride):
    c, kernel = 6, 9 if kind == 'USFPNHead' else 1
    own = dict(output_stride=stride) if kernel == 9 else dict(extra_upsampling=stride == 2)
    head = build(kind, **own)
    expected = sum(kernel * n * c + c for n in LEVELS)
    expected += sum(BLOCKS[stride]) * (9 * c * c + 2 * c) + c * 5 + 5
    if kernel == 9:
        expected += c * c + 2 * c
    assert sum(p.numel() for p in head.parameters()) == expected


@pytest.mark.parametrize('stride', [4, 2])
def test_multiply_adds_by_formula(stride):
    """Convolutions run before the upsampling: the last one of a branch at the coarser size."""
    c, (h, w) = 6, (32, 48)
    pixels = [h * w // 4**i for i in range(4)]
    found = count_call(build('USFPNHead', output_stride=stride), double((4 * h, 4 * w), 1)).flops
    expected = sum(9 * n * c * p for n, p in zip(LEVELS, pixels))
    for i in range(4):
        places = [pixels[i - step] for step in range(max(1, i))]
        if stride == 2:
            places.append(pixels[0])
        assert len(places) == BLOCKS[stride][i]
        expected += 9 * c * c * sum(places)
    logits = pixels[0] * (4 if stride == 2 else 1)
    assert found == expected + (c * c + c * 5) * logits


def test_widths_of_the_paper():
    wide = dict(in_channels=[256, 512, 1024, 2048], num_classes=59, norm_cfg=dict(type='BN'))
    for head in (SemanticFPNHead(**wide), USFPNHead(**wide)):
        side = 3 if isinstance(head, USFPNHead) else 1
        assert [tuple(m.conv.weight.shape) for m in head.pyramid.lateral_convs] == [
            (256, n, side, side) for n in wide['in_channels']
        ]
        blocks = [m for branch in head.branches for m in branch]
        assert {tuple(m.conv.weight.shape) for m in blocks} == {(256, 256, 3, 3)}
        assert len(blocks) == 7


# --- options, compilers, hooks -------------------------------------------------------------------


def test_each_option_adds_what_it_names():
    plain = {n: tuple(p.shape) for n, p in build().named_parameters()}
    wide = {n: tuple(p.shape) for n, p in build(lateral_kernel_size=3).named_parameters()}
    changed = {n for n in plain if plain[n] != wide[n]}
    assert set(wide) == set(plain)
    assert changed == {f'pyramid.lateral_convs.{i}.conv.weight' for i in ALL}
    more = {n for n, _ in build(extra_upsampling=True).named_parameters()} - set(plain)
    assert {n.rpartition('.')[0] for n in more} == {
        f'branches.{i}.{max(1, i)}.{part}' for i in ALL for part in ('conv', 'bn')
    }
    more = {n for n, _ in build(fuse_conv=True).named_parameters()} - set(plain)
    assert more == {'fuse_conv.conv.weight', 'fuse_conv.bn.weight', 'fuse_conv.bn.bias'}
    ultra = build('USFPNHead').named_parameters()
    same = build(lateral_kernel_size=3, fuse_conv=True).named_parameters()
    assert [(n, p.shape) for n, p in ultra] == [(n, p.shape) for n, p in same]


def test_fewer_levels():
    head = build(in_channels=[16, 64], in_index=[1, 3]).train()
    inputs = double((64, 64))
    assert head(inputs).shape == (2, 5, 8, 8)
    loss = head.loss(inputs, toy_samples(5, (64, 64)), Config())['loss_ce']
    assert all(g.any() for g in torch.autograd.grad(loss, list(head.parameters())))


def test_the_kind_of_convolution_is_passed_on():
    class MarkedConv(nn.Conv2d):
        pass

    MODELS.register_module('MarkedConv', module=MarkedConv)
    try:
        head = build('USFPNHead', conv_cfg=dict(type='MarkedConv'), output_stride=2)
    finally:
        MODELS.module_dict.pop('MarkedConv')
    plain = {n for n, m in head.named_modules() if type(m) is nn.Conv2d}
    assert plain == {'conv_seg'}


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    head, inputs = build('USFPNHead', output_stride=2).eval(), double((77, 109), 1)
    compiled = torch.compile(head, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(inputs), head(inputs))


@pytest.mark.filterwarnings('ignore')
def test_the_scale_equalizer_finds_sums_only(tmp_path):
    head = dict(
        type='SemanticFPNHead',
        in_channels=[4, 8, 16, 32],
        channels=6,
        num_classes=8,
        norm_cfg=dict(type='BN'),
    )
    made = runner(tmp_path, head=head, hook={})
    with pytest.raises(RuntimeError, match=r'searched: decode_head \(SemanticFPNHead\)\. Rem'):
        made.train()


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['SemanticFPNHead', 'USFPNHead'])
def test_one_level_is_no_pyramid(kind):
    with pytest.raises(ValueError, match=rf'{kind}: in_channels must list .* got 64'):
        MODELS.build(dict(type=kind, in_channels=64, num_classes=5))


def test_wrong_output_stride():
    with pytest.raises(ValueError, match=r'USFPNHead: output_stride must be 4 or 2, got 8'):
        build('USFPNHead', output_stride=8)
