"""DenseNet with dilated convolutions: mmpretrain's network, at more places."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from mmseg.registry import MODELS
from torch import Tensor, nn

import mmseg_fusion
from mmseg_fusion.analysis import count
from mmseg_fusion.models.backbones.dilated_densenet import DilatedDenseNet

from ...testers import BackboneTester

mmpretrain = pytest.importorskip('mmpretrain')
from mmpretrain.models.backbones import DenseNet  # noqa: E402

TINY = dict(growth_rate=4, depths=[2, 3, 2, 2], init_channels=8)
# What the blocks of TINY give, each transition halving: 8 + 2 x 4, 8 + 3 x 4, 10 + 2 x 4, ...
CHANNELS = (16, 20, 18, 17)
ARCHS = {
    '121': (256, 512, 1024, 1024),
    '161': (384, 768, 2112, 2208),
    '169': (256, 512, 1280, 1664),
    '201': (256, 512, 1792, 1920),
}


def build(arch: str | dict = TINY, **changes) -> DilatedDenseNet:
    return MODELS.build(dict(type='DilatedDenseNet', arch=arch, **changes))


class TestOutputStride8(BackboneTester):
    backbone = dict(type='DilatedDenseNet', arch=TINY)
    out_channels, out_strides = CHANNELS, (4, 8, 8, 8)


class TestOutputStride32(BackboneTester):
    backbone = dict(type='DilatedDenseNet', arch=TINY, output_stride=32, out_indices=(0, 1, 2))
    out_channels, out_strides = CHANNELS[:3], (4, 8, 16)


class TestMemoryEfficient(BackboneTester):
    backbone = dict(
        type='DilatedDenseNet',
        arch=TINY,
        output_stride=16,
        out_indices=(1, 3),
        memory_efficient=True,
    )
    out_channels, out_strides = (CHANNELS[1], CHANNELS[3]), (8, 16)


def with_noise(net: nn.Module) -> nn.Module:
    """In float64 and eval mode, with weights and statistics of norms that are no ones and zeros."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    net.eval()  # mmpretrain's returns nothing
    return net.double()


# --- mmpretrain's network --------------------------------------------------------------------


@pytest.mark.parametrize('arch', ARCHS)
def test_weights_of_mmpretrain_fit(arch: str) -> None:
    with torch.device('meta'):
        theirs, ours = DenseNet(arch), build(arch)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert (ours.out_channels, ours.out_strides) == (ARCHS[arch], (4, 8, 8, 8))


def test_parameters_are_the_published_ones() -> None:
    """mmpretrain's metafile counts the classifier: 1000 classes and their biases."""
    path = Path(mmpretrain.__file__).parent / '.mim/configs/densenet/metafile.yml'
    published = {}
    for model in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']:
        published[model['Name'][len('densenet') :].split('_')[0]] = model['Metadata']['Parameters']
    assert set(published) == set(ARCHS)
    for arch, params in published.items():
        with torch.device('meta'):
            net = build(arch)
        own = sum(p.numel() for p in net.parameters())
        assert own + 1000 * (net.out_channels[-1] + 1) == params, arch


@pytest.mark.stack
def test_output_stride_32_is_mmpretrains(tmp_path: Path) -> None:
    theirs = with_noise(DenseNet(TINY, out_indices=[0, 1, 2, 3]))
    state = {f'backbone.{name}': value for name, value in theirs.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'classifier.pth')
    checkpoint = str(tmp_path / 'classifier.pth')
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone')
    ours = build(output_stride=32, init_cfg=init_cfg).double()
    ours.init_weights()
    ours.eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        *levels, last = ours(x)
        *pooled, expected = theirs(x)
        assert torch.equal(last, expected)
        # Of the others, mmpretrain returns what its transitions make of them.
        for level, transition, found in zip(levels, theirs.transitions, pooled):
            assert torch.equal(transition.pool(transition.conv(level)), found)


# --- written out -----------------------------------------------------------------------------


def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var, weight, bias = (
        t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return ((x - mean) / (var + norm.eps).sqrt() * weight + bias).clamp_min(0)


def unfolded(x: Tensor, conv: nn.Conv2d, rate: int) -> Tensor:
    k = conv.weight.shape[-1]
    cells = F.unfold(x, k, dilation=rate, padding=k // 2 * rate)
    return (conv.weight.flatten(1) @ cells).unflatten(2, x.shape[-2:])


def halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 cells; of those that there are, at the end of an odd side."""
    rows = [x[..., i : i + 2, :].mean(-2) for i in range(0, x.shape[-2], 2)]
    x = torch.stack(rows, -2)
    return torch.stack([x[..., i : i + 2].mean(-1) for i in range(0, x.shape[-1], 2)], -1)


def naive(net: DilatedDenseNet, x: Tensor, rates: tuple, pools: tuple) -> list[Tensor]:
    x, levels = net.stem(x), []
    for stage, transition, rate, pool in zip(net.stages, net.transitions, rates, pools):
        for layer in stage.block:
            y = unfolded(normed(x, layer.norm1), layer.conv1, 1)
            x = torch.cat([x, unfolded(normed(y, layer.norm2), layer.conv2, rate)], 1)
        x = normed(x, transition[0])
        levels.append(x)
        if pool is not None:
            x = pool(unfolded(x, transition.conv, 1))
    return levels


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ('output_stride', 'rates', 'pools'),
    [
        (8, (1, 1, 2, 4), (halved, same, same, None)),
        (16, (1, 1, 1, 2), (halved, halved, same, None)),
        (32, (1, 1, 1, 1), (halved, halved, halved, None)),
    ],
)
def test_blocks_written_out(output_stride: int, rates: tuple, pools: tuple) -> None:
    net = with_noise(build(output_stride=output_stride))
    x = torch.randn(2, 3, 75, 100, dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(net(x), naive(net, x, rates, pools)):
            torch.testing.assert_close(found, expected)


@pytest.mark.stack
@pytest.mark.parametrize('output_stride', [8, 16])
def test_dilated_network_is_the_strided_one_at_more_places(output_stride: int) -> None:
    """But for the means that the pools take: with every second cell instead, exactly."""
    strided = with_noise(build(output_stride=32))
    for i, transition in enumerate(strided.transitions[:3]):
        if 8 << i > output_stride:
            transition.pool = nn.MaxPool2d(1, 2)
    dilated = build(output_stride=output_stride).double().eval()
    dilated.load_state_dict(strided.state_dict(), strict=True)
    x = torch.randn(1, 3, 87, 130, dtype=torch.float64)
    with torch.no_grad():
        few, many = strided(x), dilated(x)
    for i, (a, b) in enumerate(zip(few, many)):
        times = strided.out_strides[i] // dilated.out_strides[i]
        torch.testing.assert_close(b[..., ::times, ::times], a)
    assert times == 32 // output_stride


def test_memory_efficient_has_the_same_gradients_and_keeps_less() -> None:
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    arch = dict(TINY, depths=[12, 3, 2, 2])
    plain = build(arch, drop_rate=0.2).double().train()
    thrifty = build(arch, drop_rate=0.2, memory_efficient=True).double().train()
    thrifty.load_state_dict(plain.state_dict(), strict=True)
    gradients, kept, calls = [], [], []
    for net in (plain, thrifty):
        torch.manual_seed(0)
        saved = {}

        def keep(tensor: Tensor, saved: dict = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, same):
            loss = sum(y.square().sum() for y in net(x))
        loss.backward()
        kept.append(sum(saved.values()))
        gradients.append([p.grad for p in net.parameters()])
        calls.append(net.stages[1].block[0].norm1.num_batches_tracked.item())
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.6 * kept[0]
    assert calls == [1, 2]


# --- cost ------------------------------------------------------------------------------------


def test_multiply_adds() -> None:
    side, theirs = 64, nn.Sequential(DenseNet(TINY))
    kept, dilated = (count(build(output_stride=s), side) for s in (32, 8))
    expected = count(theirs, side)
    assert (kept.flops, kept.params) == (expected.flops, expected.params)
    assert dilated.params == expected.params
    convs = [name for name in kept.flops_by_module if name.endswith(('conv1', 'conv2', 'conv'))]
    assert len(convs) == 2 * sum(TINY['depths']) + 3
    times = functools.partial(dict.get, {'stages.2': 4, 'stages.3': 16, 'transitions.2': 4})
    for name in convs:
        factor = times('.'.join(name.split('.')[:2])) or 1
        assert dilated.flops_by_module[name] == factor * kept.flops_by_module[name], name


# --- what a user meets -----------------------------------------------------------------------


@pytest.mark.parametrize('last', [0, 1, 2, 3])
def test_layers_behind_the_last_index_are_left_out(last: int) -> None:
    net = build(out_indices=(last,)).train()
    assert (len(net.stages), len(net.transitions)) == (last + 1, last + 1)
    (level,) = net(torch.randn(2, 3, 64, 64))
    assert (level.shape[1],) == net.out_channels == (CHANNELS[last],)
    level.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    whole = build()
    whole.load_state_dict(net.state_dict(), strict=False)
    assert set(net.state_dict()) <= set(whole.state_dict())


@pytest.mark.parametrize(('stages', 'held'), [(-1, 0), (0, 1), (2, 5), (4, 9)])
def test_frozen_before_the_first_call_of_train(stages: int, held: int) -> None:
    net = build(frozen_stages=stages)
    frozen = {
        '.'.join(name.split('.')[: 1 if name.startswith('stem') else 2])
        for name, p in net.named_parameters()
        if not p.requires_grad
    }
    order = ['stem'] + [f'{part}.{i}' for i in range(4) for part in ('stages', 'transitions')]
    assert frozen == set(order[:held])


def test_norms_and_activations_are_those_asked_for() -> None:
    net = build(norm_cfg=dict(type='GN', num_groups=1), act_cfg=dict(type='LeakyReLU'))
    kinds = {type(m) for m in net.modules()}
    assert {nn.GroupNorm, nn.LeakyReLU} <= kinds
    assert not {nn.BatchNorm2d, nn.ReLU} & kinds
    (y, *_) = net(torch.randn(1, 3, 40, 40))
    assert (y < 0).any()
    sync = build(norm_cfg=dict(type='SyncBN'), norm_eval=True).train()
    norms = [m for m in sync.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(m.training for m in norms)


def test_default_initialization() -> None:
    """He's, as in the DenseNet paper: a variance of 2 over the outputs' fan."""
    net = build(dict(TINY, init_channels=64))
    net.init_weights()
    assert abs(net.stem[0].weight.std().item() / (2 / (64 * 49)) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(arch='122'), r"arch is one of 121, .*but got '122'.*backbone.arch"),
        (dict(arch=121), r'as a string, .*but got 121'),
        (dict(arch=dict(depths=[2])), r'depths, growth_rate, init_channels, but got \{'),
        (dict(output_stride=4), 'output_stride is 8, 16 or 32, but got 4'),
        (dict(out_indices=(2, 4)), r'0 to 3, but got \(2, 4\)'),
        (dict(out_indices=(2, 1)), r'rising .*but got \(2, 1\)'),
        (dict(out_indices=()), r'but got \(\)'),
        (dict(out_indices=(0, 1), frozen_stages=3), '0 to 2 .*but got 3'),
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
