"""Every registered decode head inside GFFHead and HFGDHead: it trains, or is refused by name."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion import compat

from ...testers import every_head
from ...testers.toys import toy_samples

BN = dict(type='BN')
WIDTH, CLASSES = 16, 5
LEVELS = dict(in_channels=[WIDTH] * 4, in_index=[0, 1, 2, 3])
SIZES = [(16, 16), (8, 8), (4, 4), (2, 2)]
IMAGE = (64, 64)
#: The head around, and the argument that holds the head inside.
PLACES = {
    'context': dict(type='GFFHead'),
    'encoder': dict(type='HFGDHead', upsampler=dict(type='SemanticFPNHead')),
    'upsampler': dict(type='HFGDHead', encoder=None),
}
#: What a head that is refused is told, beside place and class.
REFUSED = {
    'DAHead': 'losses of its own (DAHead.loss_by_feat)',
    'DDRHead': 'losses of its own (DDRHead.loss_by_feat)',
    'DPTHead': 'pairs of a feature and a class token',
    'EncHead': 'losses of its own (EncHead.loss_by_feat), which would be lost there: set ',
    'HFGDHead': 'losses of its own (HFGDHead.loss)',
    'IterativeDecodeHead': 'losses of its own (IterativeDecodeHead.loss_by_feat)',
    'Mask2FormerHead': 'classifies with conv_seg, and Mask2FormerHead is none: set ',
    'MaskFormerHead': 'classifies with conv_seg, and MaskFormerHead is none: set ',
    'PIDHead': 'losses of its own (PIDHead.loss_by_feat)',
    'PointHead': 'losses of its own (PointHead.loss)',
    'STDCHead': 'losses of its own (STDCHead.loss_by_feat)',
    'SegmenterMaskTransformerHead': 'classifies with conv_seg, and SegmenterMaskTransformerHead d',
    'SequentialDualAttentionHead': 'losses of its own (SequentialDualAttentionHead.loss_by_feat)',
    'SideAdapterCLIPHead': 'losses of its own (SideAdapterCLIPHead.loss)',
    'VPDDepthHead': 'losses of its own (VPDDepthHead.loss_by_feat)',
}
#: Losses of their own.
OWN = {'CPHead': {'loss_affinity'}}
#: At another size than the levels above.
LARGE = {'LRASPPHead': [(56, 56), (52, 52), (4, 4), (2, 2)], 'SETRMLAHead': [(8, 8)] * 4}
CHANGES = {'DepthwiseSeparableASPPHead': dict(c1_in_channels=WIDTH)}
#: What a plain mmcv lacks.
NEEDS_OPS = ('PSAHead',)


def inside(name: str, **changes) -> dict:
    """Config of a head that takes its widths, classes and levels from the head around it."""
    cfg = dict(copy.deepcopy(every_head.HEADS[name]), type=name)
    for key in ('in_channels', 'loss_decode'):
        cfg.pop(key, None)
    return {**cfg, **CHANGES.get(name, {}), **changes}


def around(place: str, cfg: dict, **changes) -> nn.Module:
    common = dict(channels=WIDTH, num_classes=CLASSES, norm_cfg=BN, **LEVELS)
    return MODELS.build({**common, **PLACES[place], place: cfg, **changes})


def levels(name: str = '') -> list[Tensor]:
    return [torch.randn(2, WIDTH, *s, requires_grad=True) for s in LARGE.get(name, SIZES)]


def trained(head: nn.Module, inputs: list[Tensor], *previous: Tensor) -> dict[str, Tensor]:
    """Losses of a step, after which every parameter has a gradient."""
    losses = head.loss(inputs, *previous, toy_samples(CLASSES, IMAGE), None)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert not [n for n, p in head.named_parameters() if p.requires_grad and p.grad is None]
    return losses


CASES = [
    pytest.param(place, name, id=f'{place}-{name}')
    for place in PLACES
    for name in every_head.registered_heads()
]


@pytest.mark.stack
@pytest.mark.parametrize(('place', 'name'), CASES)
def test_every_registered_head(place: str, name: str) -> None:
    owner, cfg = f'{PLACES[place]["type"]}: {place}', inside(name)
    kept = copy.deepcopy(cfg)
    reason = REFUSED.get(name)
    if name == 'OCRHead' and place != 'encoder':
        reason = 'refines the prediction of another head, and there is none here'
    if reason is not None:
        with pytest.raises(ValueError, match=re.escape(reason)) as raised:
            around(place, cfg)
        for word in (owner, name, f'{place}.type'):
            assert word in str(raised.value)
        return
    if name in ('CCHead', 'PSAHead') and compat.family() == 'onedl' and not every_head.ops_there():
        # The fork's refuse to be built without the ops, and its words are handed on.
        with pytest.raises(ValueError, match='Please install onedl-mmcv') as raised:
            around(place, cfg)
        assert owner in str(raised.value)
        return
    head = around(place, cfg)
    assert cfg == kept
    nested = getattr(head, place)
    # Nothing that its body may call is away.
    assert isinstance(nested.conv_seg, nn.Identity)
    assert isinstance(nested.dropout, nn.Identity)
    inputs = levels(name)
    previous = [torch.randn(2, CLASSES, 2, 2)] if name == 'OCRHead' else []
    if name in NEEDS_OPS and not every_head.ops_there():
        with pytest.raises(RuntimeError, match='mmcv'):
            trained(head, inputs, *previous)
        return
    losses = trained(head, inputs, *previous)
    own = {key for key in losses if key.startswith(f'{place}_')}
    assert own == {f'{place}_{key}' for key in OWN.get(name, ())}
    assert all(losses[key].requires_grad and losses[key].isfinite() for key in own)
    with torch.no_grad():
        logits = head.eval()(inputs, *previous)
    assert logits.shape[:2] == (2, CLASSES)
    assert logits.isfinite().all()


def test_the_table_is_of_registered_heads() -> None:
    known = set(every_head.registered_heads())
    assert {*REFUSED, *OWN, *LARGE, *CHANGES, *NEEDS_OPS} <= known


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize('place', PLACES)
def test_own_losses_are_those_of_the_head_alone(place: str) -> None:
    """The affinity loss of CPHead, on the levels that it sees, and its switch."""
    head = around(place, inside('CPHead'), ignore_index=254)
    inputs, samples = levels(), toy_samples(CLASSES, IMAGE, ignore_index=254)
    seen = []
    nested = getattr(head, place)
    # Of the batch that it saw, whatever is done to it first.
    nested.prior_conv.register_forward_hook(lambda m, x, y: seen.append(y))
    losses = head.loss(inputs, samples, None)
    label = torch.stack([s.gt_sem_seg.data for s in samples]).squeeze(1)
    loss = MODELS.build(dict(type='AffinityLoss'))
    expected = loss(seen[0], label, ignore_index=254)
    torch.testing.assert_close(losses[f'{place}_loss_affinity'], expected)
    silent = around(place, inside('CPHead', loss_prior_decode=None), ignore_index=254)
    assert not [k for k in silent.loss(inputs, samples, None) if k.startswith(place)]


def test_own_losses_of_a_head_two_levels_down() -> None:
    context = inside('CPHead')
    upsampler = dict(type='GFFHead', context=context)
    losses = trained(around('upsampler', upsampler), levels())
    assert losses['upsampler_context_loss_affinity'].isfinite()


def test_switched_off_losses_are_none() -> None:
    """EncHead without its semantic encoding loss has one output."""
    trained(around('context', inside('EncHead', use_se_loss=False)), levels())


def test_a_body_that_calls_its_dropout() -> None:
    """ANNHead: the dropout is the head's around it, and not twice."""
    head = around('context', inside('ANNHead'))
    calls = []
    head.context.dropout.register_forward_hook(lambda m, x, y: calls.append(y is x[0]))
    head(levels())
    assert calls == [True, True]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('loss_decode', dict(type='CrossEntropyLoss', loss_weight=0.4)),
        ('sampler', dict(type='OHEMPixelSampler')),
        ('dropout_ratio', 0.3),
        ('num_classes', 7),
        ('ignore_index', 0),
        ('out_channels', 1),
        ('threshold', 0.3),
    ],
)
def test_settings_that_would_do_nothing(place: str, key: str, value: object) -> None:
    cfg = inside('PSPHead', **{key: value})
    owner = f'{PLACES[place]["type"]}: {place}'
    with pytest.raises(ValueError, match=rf'{owner}: {key} of PSPHead .* remove {place}\.{key}'):
        around(place, cfg)


def test_settings_of_the_head_around_may_be_repeated() -> None:
    around('context', inside('PSPHead', num_classes=CLASSES, ignore_index=255))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (
            dict(type='LRASPPHead'),
            r"LRASPPHead cannot be built with in_channels=16, in_index=3, .*set input_transform='mu"
            r"ltiple_select', in_index to a list of three levels",
        ),
        (
            dict(type='SETRMLAHead', in_index=[0, 1]),
            r'SETRMLAHead cannot be built with .*channels=16: expected self\.channels == num'
            r'_inputs \* mla_channels\. SETRMLAHead .*: set channels, or mla_channels',
        ),
        (
            dict(type='ASPPHead', in_index=[0, 1]),
            r'ASPPHead cannot be built with in_channels=\[16, 16\], in_index=\[0, 1\], .*expected i'
            r'sinstance\(in_channels, int\)\. Where the levels .* set \w+\.in_index',
        ),
        (dict(type='UPerHead'), r'UPerHead cannot be built .* a list for one on several'),
        (
            dict(type='PSPHead', pool_scales=3),
            r'PSPHead cannot be built .*expected isinstan',
        ),
        (dict(type='FPNHead', in_index=[0, 1]), r"FPNHead cannot .*argument: 'feature_strides'"),
        (dict(type='PSPHead', pools=3), r"PSPHead cannot .*unexpected keyword argument 'pools'"),
        (dict(type='PSPHaed'), r"'PSPHaed' is not registered: set \w+\.type"),
        (
            dict(type='PSPHead', in_index=4),
            r'in_index=4, and in_index=\[0, 1, 2, 3\].*set \w+\.in_chann',
        ),
        (dict(type='PSPHead', in_index=-5), r'in_index=-5, and in_index=\[0, 1, 2, 3\]'),
        (dict(type='PSPHead', in_index=None), r'in_index=None, and in_index='),
    ],
)
@pytest.mark.parametrize('place', ['context', 'encoder'])
def test_refusals_name_place_class_and_key(place: str, cfg: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf'^{PLACES[place]["type"]}: {place}: .*{message}'):
        around(place, cfg)


@MODELS.register_module()
class MuteHead(BaseDecodeHead):
    """Cannot be built, and does not say why."""

    def __init__(self, **kwargs) -> None:
        raise NotImplementedError

    def forward(self, inputs: list[Tensor]) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize(
    ('name', 'reason'), [('SETRMLAHead', 'Sizes of tensors'), ('LRASPPHead', 'too small')]
)
def test_levels_that_a_head_cannot_take_are_named(place: str, name: str, reason: str) -> None:
    """It is built, and needs levels of other sizes than a pyramid has, or larger ones."""
    head = around(place, inside(name))
    with pytest.raises(RuntimeError, match=f'{reason}.*{place}.type to another head') as raised:
        trained(head, levels())
    message = str(raised.value)
    assert message.startswith(f'{PLACES[place]["type"]}: {place}: {name} with in_index=')
    assert 'levels of 16x16x16, 16x8x8, 16x4x4, 16x2x2 (channels, height, width)' in message
    assert f'set {place}.in_index' in message


def test_no_memory_is_no_fault_of_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    head = around('context', inside('FCNHead'))
    error = torch.cuda.OutOfMemoryError('out of memory')
    monkeypatch.setattr(head.context, 'forward', lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r'^out of memory$'):
        head(levels())


def test_an_error_without_a_message_is_named() -> None:
    """Only of an assertion is the source what was expected."""
    with pytest.raises(ValueError, match=r'MuteHead cannot .*=16: NotImplementedError\. W'):
        around('context', dict(type='MuteHead'))


def test_a_function_that_builds_a_head() -> None:
    """It is judged by what it builds."""
    made = dict(type='BatchNormAfterUpsampling', head='PSPHead', layers=['bottleneck.conv'])
    trained(around('context', dict(made, pool_scales=(1, 2))), levels())
    made = dict(made, head='DAHead', layers=[], pam_channels=8)
    with pytest.raises(ValueError, match=r'GFFHead: context: DAHead has losses of its own'):
        around('context', made)


# --- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize('place', ['context', 'encoder'])
@pytest.mark.parametrize(
    ('index', 'expected'),
    [(-1, (3, 64)), (-3, (1, 16)), (2, (2, 32)), ([0, -1], ([0, 3], [8, 64]))],
)
def test_in_index_counts_the_backbones_levels(
    place: str, index: int | list[int], expected: tuple
) -> None:
    """Channels follow from it, and a negative number counts from the last level of the head."""
    cfg = inside('UPerHead') if isinstance(index, list) else inside('PSPHead')
    channels = dict(in_channels=[8, 16, 32, 64])
    nested = getattr(around(place, dict(cfg, in_index=index), **channels), place)
    assert (nested.in_index, nested.in_channels) == expected


def test_negative_in_index_of_a_head_on_some_levels() -> None:
    head = around('encoder', inside('PSPHead', in_index=-1), in_channels=[8, 16], in_index=[1, 2])
    assert (head.encoder.in_index, head.encoder.in_channels) == (2, 16)
    # Counted from the end by the head itself.
    head = around('encoder', inside('PSPHead', in_index=-1), in_channels=[8, 16], in_index=[0, -1])
    assert (head.encoder.in_index, head.encoder.in_channels) == (-1, 16)
