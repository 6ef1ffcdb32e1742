"""What ``CAREncoderDecoder(car=dict(layer='auto'))`` does with every decode head there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.layers import ClassAwareConv

from ...testers.every_head import HEADS, UNBUILDABLE, model_config, ops_there, registered_heads
from ...testers.toys import toy_samples

PAGE = Path(__file__).parents[3] / 'docs' / 'methods' / 'car.md'
KEYS = ('intra_c2p', 'inter_c2c', 'inter_c2p')


def size_for(name: str) -> tuple[int, int]:
    # LRASPPHead pools over 49 x 49 cells.
    return (512, 512) if name == 'LRASPPHead' else (64, 64)


def build(name: str, **car) -> nn.Module:
    cfg = model_config(name)
    cfg.pop('num_stages', None)
    return MODELS.build(dict(cfg, type='CAREncoderDecoder', car=car))


def train_step(model: nn.Module, name: str) -> tuple[dict, list[str]]:
    """The losses of a step, and the parameters of the decode head without a gradient."""
    size = size_for(name)
    samples = toy_samples(5, size)
    for sample in samples:  # PIDHead
        sample.gt_edge_map = PixelData(data=torch.randint(2, (1, *size)))
    losses = model.train().loss(torch.randn(2, 3, *size), samples)
    model.parse_losses(losses)[0].backward()
    missing = [n for n, p in model.decode_head.named_parameters() if p.grad is None]
    return losses, missing


def table() -> dict[str, tuple[str, str]]:
    """The table of the page: head, what is replaced, and why nothing is."""
    text = PAGE.read_text().split('<!-- every head -->')[1]
    rows = re.findall(r'^\| `(\w+)` \| (.*?) \| (.*?) \|$', text, re.MULTILINE)
    return {name: (layers, reason) for name, layers, reason in rows}


def expected_row(name: str) -> tuple[str, str]:
    """The table's row for this mmcv: one says what is different without the compiled ops."""
    layers, reason = table()[name]
    without = reason.partition('on mmcv-lite none: ')[2]
    if not without:
        return layers, reason
    return (layers, '') if ops_there() else ('none', without)


def outcome(name: str) -> tuple[tuple[str, str], Exception | nn.Module]:
    """The row of a head as it comes out, and the model or the error."""
    try:
        model = build(name)
    except ValueError as error:
        text = str(error)
        if 'sums: ' in text:
            reason = f'`{text.split("sums: ")[1].split(". ")[0]}` in between'
        elif 'calls its classifier conv_seg' in text:
            reason = 'no classifier `conv_seg`'
        elif 'no ignore_index' in text:
            reason = 'no classes'
        else:
            reason = 'needs the compiled ops of mmcv' if 'mmcv op' in text else text
        return ('none', reason), error
    layers = (layer.removeprefix('decode_head.') for layer in model.car_layers)
    return (', '.join(f'`{layer}`' for layer in layers), ''), model


@pytest.mark.stack
def test_every_registered_head_is_here_and_in_the_table() -> None:
    assert sorted(HEADS) == registered_heads()
    assert list(table()) == sorted(HEADS)


@pytest.mark.parametrize('name', sorted(UNBUILDABLE))
def test_heads_that_cannot_be_built(name: str) -> None:
    with pytest.raises(UNBUILDABLE[name].error):
        MODELS.build(model_config(name))
    assert table()[name] == ('none', UNBUILDABLE[name].reason)


@pytest.mark.parametrize('name', sorted(set(HEADS) - set(UNBUILDABLE)))
def test_what_is_replaced(name: str) -> None:
    row, result = outcome(name)
    assert row == expected_row(name)
    if isinstance(result, nn.Module):
        assert all(isinstance(result.get_submodule(n), ClassAwareConv) for n in result.car_layers)
        losses, missing = train_step(result, name)
        count = len(result.car_layers)
        ends = [''] if count == 1 else [f'_{i}' for i in range(count)]
        assert {f'decode.loss_car_{k}{e}' for k in KEYS for e in ends} <= set(losses)
        # EMAHead and STDCHead have weights that are never trained.
        assert set(missing) <= set(train_step(MODELS.build(model_config(name)), name)[1])
        return
    # What the error offers instead builds and trains.
    offered = re.search(r'one of: (.*)', str(result))
    for layer in offered[1].split(', ') if offered and row[1] not in ('no classes',) else []:
        if name == 'SideAdapterCLIPHead' or (name == 'PSAHead' and not ops_there()):
            build(name, layer=layer)
            continue
        losses, _ = train_step(build(name, layer=layer), name)
        assert {f'decode.loss_car_{k}' for k in KEYS} <= set(losses)


@pytest.mark.parametrize('act', ['Swish', 'Sigmoid', 'Tanh', 'HSigmoid', 'HSwish', 'GELU', 'SiLU'])
def test_a_head_with_another_activation(act: str) -> None:
    cfg = model_config('ESegHead', act_cfg=dict(type=act))
    model = MODELS.build(dict(cfg, type='CAREncoderDecoder', car={}))
    assert model.car_layers == ('decode_head.conv',)
    assert not train_step(model, 'ESegHead')[1]


@pytest.mark.parametrize(
    ('name', 'layer', 'message'),
    [
        ('KSACHead', 'pyramid.conv', "'pyramid.conv' is _SharedKernel, which takes more"),
        ('IterativeDecodeHead', 'kernel_generate_head.conv_seg', 'not its classifier'),
        ('DPTHead', 'reassemble_blocks.resize_layers.3', r'has a stride of \(2, 2\)'),
    ],
)
def test_layers_that_cannot_be_replaced(name: str, layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, layer=layer)


def test_a_layer_that_sees_windows_says_so() -> None:
    model = build('ISAHead', layer='global_relation.value_project')
    with pytest.raises(ValueError, match=r'car.layer: .*value_project.* \(8, 16, 1, 1\) in a tr'):
        train_step(model, 'ISAHead')


def test_a_layer_that_does_not_run_says_so() -> None:
    model = build('SequentialDualAttentionHead', layer='in_conv')
    model.decode_head.in_conv = nn.Conv2d(64, 16, 3, padding=1)
    model.car_layers = ('decode_head.unused',)
    model.decode_head.unused = ClassAwareConv(4, 4)
    with pytest.raises(ValueError, match=r'decode_head.unused. gave nothing in a training step'):
        train_step(model, 'SequentialDualAttentionHead')


def test_a_norm_in_front_of_the_convolution_is_not_lost() -> None:
    """That of BatchNormAfterUpsampling hangs on the convolution that CAR would replace."""
    cfg = model_config('UPerHead')
    cfg['decode_head'].update(
        type='BatchNormAfterUpsampling', head='UPerHead', layers=['fpn_bottleneck.conv']
    )
    with pytest.raises(ValueError, match=r"'decode_head.fpn_bottleneck' has hooks or modules"):
        MODELS.build(dict(cfg, type='CAREncoderDecoder', car={}))
