"""One tiny image in training: each head and neck trains, or names the layer that cannot."""

from __future__ import annotations

import re

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_fusion.fusions import explain_single_value, is_single_value, single_value_layer
from mmseg_fusion.models.layers.single_value import SingleValueError

from ..testers.every_head import CHANNELS, HEADS, head_config
from ..testers.toys import toy_features, toy_samples

OWN = 'mmseg_fusion.'
STRIDES = (4, 8, 16, 32)
LEVELS = dict(in_channels=list(CHANNELS), norm_cfg=dict(type='BN'))
NECKS = {
    'BiFPN': dict(LEVELS, channels=16, num_repeats=1, num_levels=6),
    'FaPN': dict(LEVELS, channels=16),
    'GatedFullyFusion': dict(LEVELS, channels=16),
}
#: Levels of 8, 4, 2 and 1 cells a side; and of one cell each.
SIZES = (31, 4)
#: Which layer it is stands in frames of torch's own code.
pytestmark = pytest.mark.stack
#: First layer of a head that meets a single value, at these sizes; None where it trains.
STOPS: dict[str, tuple[str | None, str | None]] = {
    'BiFPN': (None, None),  # its topmost levels are one cell by design: running statistics there
    'CAAHead': ('in_conv.bn', 'in_conv.bn'),
    'CPHead': (None, None),  # works on a grid of its own
    'ContextAugmentedEncoder': ('wide_conv.bn', 'wide_conv.bn'),
    'DenseASPPHead': ('branches.0.1.bn', 'branches.0.1.bn'),
    'DetachedFCNHead': ('convs.0.bn', 'convs.0.bn'),
    'ESegHead': (None, 'conv.pointwise_conv.bn'),
    'FaPN': ('laterals.3.bn', 'laterals.3.bn'),
    'GFFHead': ('context.psp_modules.0.1.bn', 'context.psp_modules.0.1.bn'),
    'GatedFullyFusion': ('reduce.3.bn', 'reduce.0.bn'),
    'HFGDHead': ('encoder.wide_conv.bn', 'encoder.wide_conv.bn'),
    'KSACHead': ('pyramid.norms.0', 'pyramid.norms.0'),
    'LinearASPPHead': ('image_pool.1.bn', 'image_pool.1.bn'),
    'PointwiseUPerHead': ('psp_modules.0.1.bn', 'lateral_convs.0.bn'),
    'SAHead': ('in_conv.bn', 'in_conv.bn'),
    'SemanticFPNHead': ('branches.3.0.bn', 'branches.0.0.bn'),
    'SequentialDualAttentionHead': ('in_conv.bn', 'in_conv.bn'),
    'USFPNHead': ('branches.3.0.bn', 'branches.0.0.bn'),
}


def own_heads() -> list[str]:
    return [name for name in HEADS if MODELS.get(name).__module__.startswith(OWN)]


def own_necks() -> list[str]:
    """The registered ones: a new one has to come into the table."""
    found = {
        name: cls
        for name, cls in MODELS.module_dict.items()
        if getattr(cls, '__module__', '').startswith(f'{OWN}models.necks')
    }
    return sorted(found)


def levels(name: str, size: int) -> list[Tensor]:
    same = name in HEADS and HEADS[name]['in_channels'] == [16] * 4
    return toy_features([16] * 4 if same else CHANNELS, STRIDES, (size, size), batch=1)


def train(name: str, size: int, **changes: object) -> nn.Module:
    """One image of ``size`` x ``size`` forward and backward."""
    torch.manual_seed(0)
    if name in NECKS:
        module = MODELS.build(dict(NECKS[name], type=name, **changes))
        loss = sum(x.square().mean() for x in module(levels(name, size)))
    else:
        module = MODELS.build(head_config(name, **changes))
        losses = module.loss(levels(name, size), toy_samples(5, (size, size), batch=1), {})
        loss = sum(v for k, v in losses.items() if 'loss' in k)
    assert loss.isfinite()
    loss.backward()
    return module


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', [*own_heads(), *own_necks()])
def test_one_tiny_image_trains_or_names_the_layer(name: str, size: int) -> None:
    layer = STOPS[name][SIZES.index(size)]
    if layer is None:
        module = train(name, size)
        assert any(isinstance(m, _BatchNorm) for m in module.modules())
        return
    with pytest.raises(SingleValueError) as raised:
        train(name, size)
    message = str(raised.value)
    assert message.startswith(f'{name}: batch norm {layer} cannot train on one image per GPU')
    for word in ('expected a batch of 2 or more, got 1', 'batch_size=2', 'norm_cfg', 'larger crop'):
        assert word in message
    # torch's own words once, however deep the layer is.
    assert message.count('Expected more than 1 value per channel') == 1
    # What is offered helps.
    assert train(name, size, norm_cfg=dict(type='GN', num_groups=2))


def test_the_table_is_of_registered_classes() -> None:
    assert set(STOPS) == {*own_heads(), *own_necks()}


@pytest.mark.parametrize(
    ('head', 'layer'),
    [
        (dict(type='GFFHead', context=dict(type='KSACHead', dilations=(1, 2))), 'context.'),
        (dict(type='HFGDHead', encoder=dict(type='KSACHead', dilations=(1, 2))), 'encoder.'),
    ],
)
def test_a_head_inside_keeps_its_remedy(head: dict, layer: str) -> None:
    """The pooled branch of KSAC, at a level of several cells, and by the name it has outside."""
    common = dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3], channels=16, num_classes=5)
    module = MODELS.build(dict(common, norm_cfg=dict(type='BN'), **head))
    inputs = toy_features(CHANNELS, STRIDES, (65, 65), batch=1)
    message = rf'^{head["type"]}: batch norm {layer}image_pool\.1\.bn .*image_level=False'
    with pytest.raises(SingleValueError, match=message):
        module.loss(inputs, toy_samples(5, (65, 65), batch=1), {})


def test_another_error_of_a_head_is_its_own() -> None:
    head = MODELS.build(head_config('SAHead'))
    with pytest.raises(RuntimeError, match='channels'):
        head([torch.zeros(1, 3, 4, 4)] * 4)


# --- the helper ----------------------------------------------------------------------------------


def stopped(model: nn.Module) -> ValueError:
    with pytest.raises(ValueError, match='more than 1 value') as raised:
        model.train()(torch.randn(1, 4, 1, 1))
    return raised.value


def test_layer_is_named_in_any_module() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    error = stopped(model)
    assert is_single_value(error)
    assert single_value_layer(error, model) == '1.1'
    assert single_value_layer(error, model[1]) == '1'
    assert single_value_layer(error, model[0]) is None
    assert single_value_layer(ValueError('more than 1 value per channel'), model) is None
    explained = explain_single_value(error, 'give two')
    assert re.match(r'give two \(Expected more than 1 value per channel', str(explained))
    other = ValueError('something else')
    assert not is_single_value(other)
    assert explain_single_value(other, 'give two') is other
