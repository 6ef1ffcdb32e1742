"""ContextAugmentedEncoder: written out, its widths, and CAR on its self-attention."""

from __future__ import annotations

import copy

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_fusion.analysis.counting import count_call
from mmseg_fusion.models.decode_heads import ContextAugmentedEncoder
from mmseg_fusion.models.layers import ClassAwareConv
from mmseg_fusion.models.segmentors import merge_car
from tests.testers import HeadTester, segmentor_config
from tests.testers.toys import toy_features, toy_samples

from .test_semantic_fpn_head import moved_norms, naive_conv

LEVELS, STRIDES, SIZE = (8, 16, 32, 64), (4, 8, 16, 32), (96, 96)
TINY = dict(wide_channels=24, attention_channels=12, qk_channels=4)
CAR = ('loss_car_intra_c2p', 'loss_car_inter_c2c', 'loss_car_inter_c2p')


class TestContextAugmentedEncoder(HeadTester):
    head = dict(type='ContextAugmentedEncoder', in_index=3, **TINY)
    stride = 32
    # 3 x 3 cells: on fewer a ReLU may be shut everywhere.
    image_sizes = (SIZE, (33, 47), (50, 31))


def build(**changes) -> ContextAugmentedEncoder:
    cfg = dict(type='ContextAugmentedEncoder', in_channels=64, in_index=3, channels=6, **TINY)
    cfg.update(num_classes=5, dropout_ratio=0, norm_cfg=dict(type='BN'))
    head = MODELS.build(copy.deepcopy({**cfg, **changes}))
    head.init_weights()
    return moved_norms(head).double()


def naive_encoder(head: ContextAugmentedEncoder, x: Tensor) -> Tensor:
    """Wide linear layer, reduction, residual self-attention pixel by pixel, trailing convolution.

    Section 3.2, with the attention of the authors' library.
    """
    x = naive_conv(naive_conv(x, head.wide_conv), head.in_conv)
    parts = head.attention
    projected = [
        naive_conv(x, conv) for conv in (parts.query_key.query, parts.query_key.key, parts.value)
    ]
    images = []
    for image, query, key, value in zip(x, *projected):
        attended = torch.empty_like(value.flatten(1))
        for p in range(attended.shape[1]):
            logits = (query.flatten(1)[:, p, None] * key.flatten(1)).sum(0)
            weights = logits.exp() / logits.exp().sum()
            attended[:, p] = (weights * value.flatten(1)).sum(1)
        images.append(image + attended.view_as(image))
    return naive_conv(torch.stack(images), head.out_conv)


@pytest.mark.stack
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_written_out(training):
    head = build().train(training)
    torch.nn.init.normal_(head.attention.query_key.key.conv.weight, std=0.3)
    inputs = [x.double().requires_grad_() for x in toy_features(LEVELS, STRIDES, (96, 127))]
    wanted = [inputs[3], *head.parameters()]
    found = head(inputs)
    weight, bias = head.conv_seg.weight[..., 0, 0], head.conv_seg.bias
    feature = naive_encoder(head, inputs[3])
    expected = torch.einsum('kc,nchw->nkhw', weight, feature) + bias.view(-1, 1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    seed = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad((found * seed).sum(), wanted),
        torch.autograd.grad((expected * seed).sum(), wanted),
    )
    for f, e in pairs:
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-8)


def test_widths_of_the_paper():
    head = ContextAugmentedEncoder(in_channels=2048, num_classes=59, norm_cfg=dict(type='BN'))
    attention = head.attention
    convs = [
        head.wide_conv.conv,
        head.in_conv.conv,
        attention.query_key.query.conv,
        attention.query_key.key.conv,
        attention.value.conv,
        head.out_conv.conv,
        head.conv_seg,
    ]
    widths = [(2048, 2048), (2048, 512), (512, 64), (512, 64), (512, 512), (512, 256), (256, 59)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convs] == [
        (*pair, (1, 1)) for pair in widths
    ]
    # Biases where no norm follows.
    assert [c.bias is not None for c in convs] == [False, False, True, True, True, False, True]
    norms = sum(2 * c for c in (2048, 512, 256))
    expected = sum(i * o for i, o in widths) + norms + (64 + 64 + 512 + 59)
    assert sum(p.numel() for p in head.parameters()) == expected
    p = 5 * 7
    flops = p * sum(i * o for i, o in widths) + p * p * (64 + 512)
    assert count_call(head.to('meta'), [torch.empty(1, 2048, 5, 7)]).flops == flops


# --- class-aware regularization ------------------------------------------------------------------


def regularized(place: str) -> torch.nn.Module:
    """A segmentor whose encoder CAR regularizes: by itself, or inside HFGDHead."""
    common = dict(num_classes=5, norm_cfg=dict(type='BN'), dropout_ratio=0)
    if place == 'alone':
        head = dict(type='ContextAugmentedEncoder', in_channels=64, in_index=3, channels=6, **TINY)
        layer = 'out_conv'
    else:
        encoder = dict(type='ContextAugmentedEncoder', **TINY)
        head = dict(type='HFGDHead', in_channels=list(LEVELS), channels=8, encoder=encoder)
        layer = 'encoder.out_conv'
    cfg = segmentor_config({**head, **common}, dict(type='TinyPyramid')).model
    cfg.update(type='CAREncoderDecoder', car=dict(layer=layer, channels=10))
    model = MODELS.build(cfg)
    model.init_weights()
    return model.train()


@pytest.mark.parametrize('place', ['alone', 'in HFGDHead'])
def test_class_aware_regularization(place):
    model = regularized(place)
    encoder = 'decode_head' if place == 'alone' else 'decode_head.encoder'
    layer = model.get_submodule(f'{encoder}.out_conv')
    assert isinstance(layer, ClassAwareConv)
    assert model.car_layers == (f'{encoder}.out_conv',)
    # The width of the attention or the cap, whichever is less.
    assert layer.linear.out_channels <= 10
    losses = model.loss(torch.randn(2, 3, *SIZE), toy_samples(5, SIZE))
    car = {name for name in losses if 'car' in name}
    assert car == {f'decode.{name}' for name in CAR}
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total, sum(v for name, v in losses.items() if 'loss' in name))

    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        sum(losses[name] for name in car),
        list(named.values()),
        allow_unused=True,
        retain_graph=True,
    )
    reached = {name for name, g in zip(named, gradients) if g is not None and g.any()}
    before = [
        *(f'{encoder}.{part}.' for part in ('wide_conv', 'in_conv', 'attention')),
        f'{encoder}.out_conv.linear.',
        'backbone.',
    ]
    expected = {name for name in named if name.startswith(tuple(before))}
    assert len(expected) > 20
    # A key's bias moves all logits of a query alike: its gradient is 0 but for rounding.
    unsure = {f'{encoder}.attention.query_key.key.conv.bias'}
    assert reached - unsure == expected - unsure

    # All together, for DistributedDataParallel.
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    assert [name for name, g in zip(named, gradients) if g is None] == []


@pytest.mark.parametrize('place', ['alone', 'in HFGDHead'])
def test_merging_leaves_the_logits(place):
    model = regularized(place)
    images = torch.randn(2, 3, *SIZE)
    model.loss(images, toy_samples(5, SIZE))  # moves the running statistics
    model = moved_norms(model).double().eval()
    before = sum(p.numel() for p in model.parameters())
    images = images.double()
    with torch.no_grad():
        expected = model(images, mode='tensor')
        found = merge_car(model)(images, mode='tensor')
    assert expected.std() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert sum(p.numel() for p in model.parameters()) < before


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (
            dict(wide_channels=0),
            r'wide_channels and attention_channels must .* got 0 and 12',
        ),
        (dict(attention_channels=0), r'must be at least 1, got 24 and 0'),
        (dict(qk_channels=0), r'qk_channels of the attention must be at least 1, got 0'),
    ],
)
def test_wrong_widths(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)
