"""EfficientNet with dilated convolutions: mmpretrain's network, at more places."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from mmseg.registry import MODELS
from torch import Tensor, nn

import mmseg_fusion
from mmseg_fusion.analysis import count
from mmseg_fusion.models.backbones import DilatedEfficientNet
from tests.testers import BackboneTester

mmpretrain = pytest.importorskip('mmpretrain')
from mmpretrain.models.backbones import EfficientNet  # noqa: E402

ARCHS = tuple(DilatedEfficientNet.level_channels)
ALL = (0, 1, 2, 3, 4, 5, 6)


def build(arch: str = 'b0', **changes) -> DilatedEfficientNet:
    return MODELS.build(dict(type='DilatedEfficientNet', arch=arch, **changes))


class TestOutputStride8(BackboneTester):
    backbone = dict(type='DilatedEfficientNet', arch='b0', output_stride=8)
    out_channels, out_strides = (24, 40, 112, 1280), (4, 8, 8, 8)


class TestOutputStride16(BackboneTester):
    backbone = dict(type='DilatedEfficientNet', arch='b0', out_indices=(2, 3, 4, 5))
    out_channels, out_strides = (24, 40, 112, 320), (4, 8, 16, 16)


def without_memory(make: Callable[..., nn.Module], *args, **kwargs) -> nn.Module:
    """A network whose weights have shapes and no values: the largest has 480 million."""
    # mmpretrain reads the values of the drop path rates.
    real = functools.partial(torch.linspace, device='cpu')
    with torch.device('meta'), mock.patch('torch.linspace', real):
        return make(*args, **kwargs)


def with_noise(net: nn.Module) -> nn.Module:
    """Eval mode, with statistics and weights of norms that are no ones and zeros."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    net.eval()  # mmpretrain's returns nothing
    return net


def without_pooling(net: nn.Module) -> nn.Module:
    """Squeeze and excitation with constant gates: their mean over the map depends on its grid."""
    for name, module in net.named_modules():
        if name.endswith('se'):
            nn.init.zeros_(module.conv2.conv.weight)
    return net


# --- mmpretrain's network --------------------------------------------------------------------


@pytest.mark.parametrize('arch', ARCHS)
def test_weights_of_mmpretrain_fit(arch: str) -> None:
    theirs = without_memory(EfficientNet, arch)
    ours = without_memory(build, arch, output_stride=8, out_indices=(2, 3, 4, 5, 6))
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert ours.out_channels == DilatedEfficientNet.level_channels[arch]


@pytest.mark.stack
def test_output_stride_32_is_mmpretrains(tmp_path: Path) -> None:
    theirs = with_noise(EfficientNet('b0', out_indices=ALL))
    state = {f'backbone.{name}': value for name, value in theirs.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'classifier.pth')
    init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'), prefix='backbone'
    )
    ours = build(output_stride=32, out_indices=ALL, init_cfg=init_cfg)
    ours.init_weights()
    ours.eval()
    x = torch.randn(2, 3, 65, 47)
    with torch.no_grad():
        for found, expected in zip(ours(x), theirs(x)):
            assert torch.equal(found, expected)


def test_parameters_are_the_published_ones() -> None:
    """mmpretrain's metafile counts the classifier: 1000 classes and their biases."""
    path = Path(mmpretrain.__file__).parent / '.mim/configs/efficientnet/metafile.yml'
    published = {}
    for model in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']:
        arch = re.match(r'efficientnet-([a-z0-9]+)_', model['Name'])[1]
        published[arch] = model['Metadata']['Parameters']
    assert set(published) == {*ARCHS} - {'es', 'em', 'el'}
    for arch, params in published.items():
        net = without_memory(build, arch)
        own = sum(p.numel() for p in net.parameters())
        assert own + 1000 * (net.out_channels[-1] + 1) == params, arch


# --- dilation --------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize('conv_cfg', [dict(type='Conv2dAdaptivePadding'), None])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_dilated_network_is_the_strided_one_at_more_places(
    output_stride: int, conv_cfg: dict | None
) -> None:
    """Every place of the strided network's map is a place of the dilated one's, to rounding.

    Padding as TensorFlow does, a strided convolution begins one pixel later than one without
    stride: its place j is place 2 j + 1 of that. With padding on both sides it is place 2 j.
    """
    options = dict(conv_cfg=conv_cfg, out_indices=ALL)
    strided = without_pooling(with_noise(build(output_stride=32, **options))).double()
    dilated = build(output_stride=output_stride, **options).double().eval()
    dilated.load_state_dict(strided.state_dict(), strict=True)
    x = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        few, many = strided(x), dilated(x)
    for i, (a, b) in enumerate(zip(few, many)):
        times = strided.out_strides[i] // dilated.out_strides[i]
        start = times - 1 if conv_cfg else 0
        torch.testing.assert_close(b[..., start::times, start::times], a)
    assert times == 32 // output_stride


def naive(net: DilatedEfficientNet, x: Tensor, output_stride: int, contract: bool) -> Tensor:
    """The blocks written out, convolutions by explicit padding and unfolding."""

    def depthwise(conv: nn.Conv2d, x: Tensor, stride: int, rate: int) -> Tensor:
        k, (h, w) = conv.kernel_size[0], x.shape[-2:]
        pads = []
        for size in (w, h):
            total = max((-(-size // stride) - 1) * stride + (k - 1) * rate + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        x = nn.functional.pad(x, pads)
        cells = nn.functional.unfold(x, k, dilation=rate, stride=stride)
        cells = cells.view(len(x), x.shape[1], k * k, -1)
        out = (cells * conv.weight.view(1, x.shape[1], k * k, 1)).sum(2)
        return out.view(len(x), x.shape[1], -(-h // stride), -(-w // stride))

    stride, rate = 2, 1
    x = net.layers[0](x)
    for layer, first in zip(net.layers[1:6], (1, 2, 2, 2, 2)):
        for i, block in enumerate(layer):
            own = first if i == 0 else 1
            here = rate
            if stride * own <= output_stride:
                stride *= own
            else:
                rate, own = rate * own, 1
                here = here if contract else rate
            y = block.expand_conv(x) if block.with_expand_conv else x
            part = block.depthwise_conv
            y = part.activate(part.norm(depthwise(part.conv, y, own, here)))
            y = block.linear_conv(block.se(y))
            x = x + y if y.shape == x.shape and i > 0 else y
    return net.layers[6](x)


@pytest.mark.parametrize('contract', [True, False])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_blocks_written_out(output_stride: int, contract: bool) -> None:
    net = build(output_stride=output_stride, contract_dilation=contract, out_indices=(6,))
    net = with_noise(net).double()
    x = torch.randn(1, 3, 45, 70, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], naive(net, x, output_stride, contract))


@pytest.mark.parametrize('arch', ['es', 'em'])
def test_edge_blocks(arch: str) -> None:
    net = build(arch, output_stride=8).eval()
    with torch.no_grad():
        levels = net(torch.randn(1, 3, 64, 96))
    assert [tuple(y.shape[-2:]) for y in levels] == [(16, 24), (8, 12), (8, 12), (8, 12)]
    assert tuple(y.shape[1] for y in levels) == net.out_channels


# --- cost ------------------------------------------------------------------------------------


def test_multiply_adds() -> None:
    side = 96
    # In a container: mmpretrain's own eval() returns nothing.
    theirs = count(nn.Sequential(EfficientNet('b0')), side)
    kept = count(build(output_stride=32, out_indices=(6,)), side)
    assert (kept.flops, kept.params) == (theirs.flops, theirs.params)
    # Four times the work where the map has four times the pixels: behind the stride that went
    # away, but for the gates, which see one pixel.
    dilated = count(build(output_stride=16, out_indices=(6,)), side)
    assert dilated.params == theirs.params
    convs = [name for name in kept.flops_by_module if name.endswith('.conv')]
    assert len(convs) == 81
    for name in convs:
        before = name.startswith('layers.5.0.expand_conv') or '.se.' in name
        larger = name.startswith(('layers.5', 'layers.6')) and not before
        assert dilated.flops_by_module[name] == (4 if larger else 1) * kept.flops_by_module[name]


# --- what a user meets -----------------------------------------------------------------------


def test_layers_behind_the_last_index_are_left_out() -> None:
    net = build(out_indices=(2, 4))
    assert len(net.layers) == 5
    assert (net.out_channels, net.out_strides) == ((24, 112), (4, 16))
    sum(y.mean() for y in net.train()(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_frozen_before_the_first_call_of_train() -> None:
    net = build(frozen_stages=3)
    frozen = {name.split('.')[1] for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {'0', '1', '2'}


def test_norm_eval_of_sync_batch_norm() -> None:
    net = build(norm_cfg=dict(type='SyncBN', eps=1e-3), norm_eval=True).train()
    norms = [m for m in net.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(m.training for m in norms)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(arch='b9'), r"arch is one of b0, .*but got 'b9'.*backbone.arch"),
        (dict(output_stride=4), 'output_stride is 8, 16 or 32, but got 4'),
        (dict(out_indices=(2, 7)), r'0 to 6, .*but got \(2, 7\)'),
        (dict(out_indices=(4, 2)), r'rising .*but got \(4, 2\)'),
        (dict(out_indices=()), r'but got \(\)'),
        (dict(out_indices=(2, 3), frozen_stages=5), '0 to 4 .*but got 5'),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_without_mmpretrain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split('.')[0] == 'mmpretrain']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'mmpretrain', None)
    extra = mmseg_fusion.compat.family()
    with pytest.raises(ImportError, match=rf'pip install .mmseg-fusion\[{extra}\].*backbone.type'):
        build()
