"""Each layer whose start matters starts as the page says."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mmcv.cnn import ConvModule, is_norm
from mmengine.logging import MMLogger
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.models.layers import ClassAwareConv

from ..testers.every_head import HEADS, head_config

PAGE = Path(__file__).parents[2] / 'docs' / 'initial_weights.md'
BN = dict(type='BN')
OWN = 'mmseg_fusion.'
NECKS = {
    'GatedFullyFusion': dict(in_channels=[64, 128], channels=64, gate='channel', norm_cfg=BN),
    'FaPN': dict(in_channels=[64, 128], channels=64, norm_cfg=BN),
    'BiFPN': dict(in_channels=[32, 64, 128], channels=64, num_repeats=1, num_levels=4),
}


def modules() -> dict[str, Callable[[], nn.Module]]:
    """Every head and neck that the package registers, and the layer that CAR puts into others."""
    found = {
        name: lambda name=name: MODELS.build(head_config(name))
        for name in HEADS
        if MODELS.get(name).__module__.startswith(OWN)
    }
    found |= {n: lambda n=n, c=c: MODELS.build(dict(type=n, **c)) for n, c in NECKS.items()}
    found['ClassAwareConv'] = lambda: ClassAwareConv(128, 64, channels=96, norm_cfg=BN)
    return found


def layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with weights and no norm behind them, by the class that owns them and their place."""
    named = dict(root.named_modules())
    normed = {
        id(m)
        for block in named.values()
        if isinstance(block, ConvModule) and block.with_norm and block.order[0] == 'conv'
        for m in block.modules()
    }
    for name, module in named.items():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if not own or id(module) in normed or is_norm(module):
            continue
        parts = name.split('.')
        end = len(parts)
        if set(own) <= {'weight', 'bias'}:
            end -= 1
            while end and not type(named['.'.join(parts[:end])]).__module__.startswith(OWN):
                end -= 1
        else:
            parts.append(own[0])
        if parts[-1] == 'conv_seg':
            yield 'BaseDecodeHead.conv_seg', module
            continue
        owner = type(named['.'.join(parts[:end])] if end else root).__name__
        place = '.'.join('*' if p.isdigit() else p for p in parts[end:])
        yield f'{owner}.{place}', module


def table() -> dict[str, str]:
    rows = re.findall(r'^\| `([\w.*]+)` \| (.*?) \| .*? \|$', PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return dict(rows)


# --- the starts ----------------------------------------------------------------------------------


def fans(weight: Tensor) -> tuple[int, int]:
    taps = weight[0, 0].numel()
    return weight.shape[1] * taps, weight.shape[0] * taps


def uniform(weight: Tensor, bound: float) -> bool:
    near = 0.8 if weight.numel() < 500 else 0.95
    spread = abs(weight.std().item() / (bound / math.sqrt(3)) - 1)
    return near * bound < weight.abs().max() <= 1.0001 * bound and spread < 0.2


def normal(weight: Tensor, std: float) -> bool:
    # Values beyond sqrt(3) deviations are those that a uniform start does not have.
    few = weight.numel() < 200
    close = abs(weight.std().item() / std - 1) < (0.5 if few else 0.25)
    return close and (few or bool(weight.abs().max() > 1.9 * std))


def no_bias(module: nn.Module) -> bool:
    return module.bias is None or not module.bias.any()


STARTS: dict[str, Callable[[nn.Module], bool]] = {
    'Xavier uniform, no bias': lambda m: (
        uniform(m.weight, math.sqrt(6 / sum(fans(m.weight)))) and no_bias(m)
    ),
    'Caffe2 Xavier, no bias': lambda m: (
        uniform(m.weight, math.sqrt(3 / fans(m.weight)[0])) and no_bias(m)
    ),
    'Kaiming normal over the inputs, no bias': lambda m: (
        normal(m.weight, math.sqrt(2 / fans(m.weight)[0])) and no_bias(m)
    ),
    "mmcv's Kaiming normal, no bias": lambda m: (
        normal(m.weight, math.sqrt(2 / fans(m.weight)[1])) and no_bias(m)
    ),
    'normal of deviation 0.01, no bias': lambda m: normal(m.weight, 0.01) and no_bias(m),
    "PyTorch's uniform": lambda m: uniform(m.weight, 1 / math.sqrt(fans(m.weight)[0])),
    "PyTorch's uniform, no bias": lambda m: (
        uniform(m.weight, 1 / math.sqrt(fans(m.weight)[0])) and no_bias(m)
    ),
    'zero': lambda m: not any(p.any() for p in m.parameters(recurse=False)),
    'one': lambda m: all((p == 1).all() for p in m.parameters(recurse=False)),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """init_weights logs every parameter."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def build(name: str) -> nn.Module:
    module = modules()[name]()
    if hasattr(module, 'init_weights'):
        module.init_weights()
    return module


@pytest.mark.parametrize('name', sorted(modules()))
def test_layers_without_a_norm_start_as_the_page_says(name: str) -> None:
    rows = table()
    for place, module in layers(build(name)):
        assert place in rows, f'{place} of {name} is missing on docs/{PAGE.name}'
        assert STARTS[rows[place]](module), f'{place} of {name} does not start as {rows[place]}'


def test_the_page_has_no_layer_too_many() -> None:
    found = {place for name in modules() for place, _ in layers(build(name))}
    assert set(table()) == found


def test_the_starts_can_be_told_apart() -> None:
    """Else a row could name another start than it has."""
    conv = nn.Conv2d(64, 32, 3).requires_grad_(False)
    inits = {
        'Xavier uniform, no bias': lambda w: nn.init.xavier_uniform_(w),
        'Caffe2 Xavier, no bias': lambda w: nn.init.kaiming_uniform_(w, a=1),
        'Kaiming normal over the inputs, no bias': lambda w: nn.init.kaiming_normal_(w),
        "mmcv's Kaiming normal, no bias": lambda w: nn.init.kaiming_normal_(w, mode='fan_out'),
        'normal of deviation 0.01, no bias': lambda w: nn.init.normal_(w, std=0.01),
        "PyTorch's uniform, no bias": lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
        'zero': nn.init.zeros_,
        'one': nn.init.ones_,
    }
    nn.init.zeros_(conv.bias)
    for name, init in inits.items():
        init(conv.weight)
        passed = {start for start in inits if start != 'one' and STARTS[start](conv)}
        assert passed == {name} - {'one'}
    conv.reset_parameters()
    assert STARTS["PyTorch's uniform"](conv)
    assert not STARTS["PyTorch's uniform, no bias"](conv)
