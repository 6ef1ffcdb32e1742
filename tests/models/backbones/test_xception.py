"""Aligned Xception: base tester, counts from a formula, strides, dilation, where ReLU stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.backbones import AlignedXception
from mmseg_fusion.models.backbones.xception import XceptionBlock
from tests.testers import BackboneTester

LEVEL_STRIDES = {8: (4, 8, 8, 8), 16: (4, 8, 16, 16), 32: (4, 8, 16, 32)}
every_stride = pytest.mark.parametrize('output_stride', [8, 16, 32])


class TestAlignedXception(BackboneTester):
    # Half the middle flow: the 65 differ in the number of equal blocks alone, see below.
    backbone = dict(type='AlignedXception', depth=41, output_stride=16)
    out_channels, out_strides = (256, 728, 728, 2048), LEVEL_STRIDES[16]
    # Twenty times the rounding of bfloat16 in a chain of ninety convolutions.
    autocast_error = 0.1


@pytest.fixture(scope='module')
def models() -> dict[int, AlignedXception]:
    """Xception-65 per output stride in float64, one set of weights, statistics not 0 and 1."""
    torch.manual_seed(0)
    built = {s: AlignedXception(output_stride=s) for s in (32, 16, 8)}
    built[32].init_weights()
    for module in built[32].modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            # Measured in the next lines: then no feature vanishes over 65 layers.
            module.momentum = None
    with torch.no_grad():
        built[32].train()(torch.randn(2, 3, 65, 65))
    for model in built.values():
        model.load_state_dict(built[32].state_dict())
        model.double().eval()
    return built


def expected_parameters(middle_blocks: int) -> int:
    """From the paper's figure: 3x3 depthwise, 1x1 pointwise, two numbers per norm and channel."""

    def separable(cin: int, cout: int) -> int:
        return 9 * cin + 2 * cin + cin * cout + 2 * cout

    def shortcut(cin: int, cout: int) -> int:
        return cin * cout + 2 * cout

    total = 27 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64
    for cin, cout in ((64, 128), (128, 256), (256, 728)):
        total += separable(cin, cout) + 2 * separable(cout, cout) + shortcut(cin, cout)
    total += middle_blocks * 3 * separable(728, 728)
    total += separable(728, 728) + separable(728, 1024) + separable(1024, 1024)
    total += shortcut(728, 1024)
    total += separable(1024, 1536) + separable(1536, 1536) + separable(1536, 2048)
    return total


@pytest.mark.stack
@pytest.mark.parametrize(('depth', 'blocks'), [(41, 8), (65, 16)])
def test_parameters(depth: int, blocks: int) -> None:
    model = MODELS.build(dict(type='AlignedXception', depth=depth))
    found = sum(p.numel() for p in model.parameters())
    assert found == expected_parameters(blocks)
    # As published for image classification (39.92 M for 65, 26.97 M for 41), the classifier's
    # 2048 x 1000 weights and 1000 biases apart.
    published = {41: 26.97, 65: 39.92}[depth]
    assert round((found + 2049 * 1000) / 1e6, 2) == published
    # The number in the name: two in the stem, three per block; shortcuts do not count.
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    depthwise = sum(m.groups > 1 for m in convs)
    assert 2 + depthwise == depth
    assert all(m.bias is None for m in convs)


@every_stride
@pytest.mark.parametrize('size', [(64, 96), (33, 47), (97, 50)])
def test_levels(models: dict[int, AlignedXception], output_stride: int, size: tuple) -> None:
    with torch.no_grad():
        levels = models[output_stride](torch.randn(1, 3, *size).double())
    expected = [
        (1, c, *(-(-side // s) for side in size))
        for c, s in zip((256, 728, 728, 2048), LEVEL_STRIDES[output_stride])
    ]
    assert [tuple(level.shape) for level in levels] == expected


@pytest.mark.parametrize('output_stride', [8, 16])
def test_removed_strides_compute_the_same_features(
    models: dict[int, AlignedXception], output_stride: int
) -> None:
    """With the same weights: what output stride 32 computes, at all positions in between too."""
    image = torch.randn(1, 3, 129, 161).double()
    with torch.no_grad():
        coarse, fine = models[32](image), models[output_stride](image)
    strides = zip(LEVEL_STRIDES[32], LEVEL_STRIDES[output_stride])
    for a, b, (stride, finer) in zip(coarse, fine, strides):
        step = stride // finer
        torch.testing.assert_close(b[..., ::step, ::step], a, rtol=1e-9, atol=1e-9)
        assert a.abs().mean() > 1e-2, 'nothing is compared where every ReLU is shut'


@pytest.mark.parametrize(
    ('output_stride', 'rates'),
    # Blocks 1 to 3 of the entry flow, the middle flow, the two of the exit flow.
    [(32, (1, 1, 1, 1, 1, 1)), (16, (1, 1, 1, 1, 1, 2)), (8, (1, 1, 1, 2, 2, 4))],
)
def test_dilation_starts_behind_a_removed_stride(output_stride: int, rates: tuple) -> None:
    model = AlignedXception(depth=41, output_stride=output_stride)
    parts = [*model.entry_flow, model.middle_flow, *model.exit_flow]
    for part, rate in zip(parts, rates):
        depthwise = [m for m in part.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert {m.dilation for m in depthwise} == {(rate, rate)}
        assert {m.padding for m in depthwise} == {(rate, rate)}


def norm(x: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    """Batch norm in eval mode, written out."""

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.view(1, -1, 1, 1)

    scaled = (x - spread(bn.running_mean)) / spread(bn.running_var + bn.eps).sqrt()
    return scaled * spread(bn.weight) + spread(bn.bias)


@pytest.mark.parametrize('shortcut', ['conv', 'identity', None])
@pytest.mark.parametrize('inside', [False, True])
def test_block_against_its_definition(shortcut: str | None, inside: bool) -> None:
    width = 6 if shortcut == 'identity' else 9
    block = XceptionBlock(
        6,
        (7, 8, width),
        stride=1 if shortcut == 'identity' else 2,
        dilation=2,
        shortcut=shortcut,
        activate_inside=inside,
        norm_cfg=dict(type='BN'),
    ).double()
    for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    block.eval()
    x = torch.randn(2, 6, 11, 8, dtype=torch.float64)
    kept, outs, out = x.clone(), [], x
    for conv in block.convs:
        dw, pw = conv.depthwise_conv, conv.pointwise_conv
        out = out if inside else out.clamp_min(0)
        out = norm(
            nn.functional.conv2d(
                out, dw.conv.weight, None, dw.conv.stride, 2, 2, groups=out.shape[1]
            ),
            dw.bn,
        )
        out = out.clamp_min(0) if inside else out
        out = norm(torch.einsum('oi,nihw->nohw', pw.conv.weight[..., 0, 0], out), pw.bn)
        out = out.clamp_min(0) if inside else out
        outs.append(out)
    if shortcut == 'conv':
        weight = block.shortcut.conv.weight[..., 0, 0]
        out = out + norm(torch.einsum('oi,nihw->nohw', weight, x[..., ::2, ::2]), block.shortcut.bn)
    elif shortcut == 'identity':
        out = out + x
    second, found = block(x)
    torch.testing.assert_close(second, outs[1])
    torch.testing.assert_close(found, out)
    assert torch.equal(x, kept)


def test_levels_are_taken_before_their_relu(models: dict[int, AlignedXception]) -> None:
    with torch.no_grad():
        low, middle, deep, last = models[16](torch.randn(1, 3, 65, 65).double())
    assert low.min() < 0
    assert middle.min() < 0
    assert deep.min() < 0
    assert last.min() == 0


def test_out_indices(models: dict[int, AlignedXception]) -> None:
    model, image = models[16], torch.randn(1, 3, 33, 33).double()
    some = AlignedXception(out_indices=(0, 3))
    some.load_state_dict(model.state_dict())
    with torch.no_grad():
        levels, found = model(image), some.double().eval()(image)
    assert len(found) == 2
    assert torch.equal(found[0], levels[0])
    assert torch.equal(found[1], levels[3])


def timm_name(name: str) -> str:
    """A parameter's name in timm's Xception-41: blocks in one row, convolutions from 1."""
    flow, _, rest = name.partition('.')
    if flow == 'stem':
        return name
    block, _, rest = rest.partition('.')
    first = {'entry_flow': 0, 'middle_flow': 3, 'exit_flow': 11}[flow]
    if rest.startswith('convs.'):
        _, i, which, kind, value = rest.split('.')
        which = {'depthwise_conv': 'dw', 'pointwise_conv': 'pw'}[which]
        rest = f'stack.conv{int(i) + 1}.{kind}_{which}.{value}'
    return f'blocks.{first + int(block)}.{rest}'


@pytest.mark.stack
def test_loads_published_weights(tmp_path: Path) -> None:
    """Files of timm's Xception, which hold the weights that DeepLab published for ImageNet."""
    source = AlignedXception(depth=41)
    state = {timm_name(name): value for name, value in source.state_dict().items()}
    assert 'blocks.12.stack.conv3.bn_pw.running_var' in state
    assert 'blocks.11.shortcut.conv.weight' in state
    state.update({'head.fc.weight': torch.zeros(1000, 2048), 'head.fc.bias': torch.zeros(1000)})
    torch.save(state, tmp_path / 'xception.pth')
    direct = AlignedXception(depth=41)
    direct.load_state_dict(state, strict=True)
    built = MODELS.build(
        dict(
            type='AlignedXception',
            depth=41,
            init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'xception.pth')),
        )
    )
    built.init_weights()
    # As a part of a segmentor, and its own names as ever.
    whole = nn.Sequential(AlignedXception(depth=41))
    whole.load_state_dict({f'0.{name}': value for name, value in state.items()})
    again = AlignedXception(depth=41)
    again.load_state_dict(source.state_dict())
    for model in (direct, built, whole[0], again):
        for name, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name


def test_weights_of_another_depth() -> None:
    state = {'blocks.20.stack.conv1.conv_dw.weight': torch.zeros(1024, 1, 3, 3)}
    with pytest.raises(ValueError, match=r'Xception-41 has 13; edit backbone\.depth'):
        AlignedXception(depth=41).load_state_dict(state, strict=False)


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_before_the_optimizer_is_built(frozen_stages: int) -> None:
    model = AlignedXception(depth=41, frozen_stages=frozen_stages)
    stages = [
        ('stem.',),
        ('entry_flow.0.', 'entry_flow.1.'),
        ('entry_flow.2.',),
        ('middle_flow.',),
        ('exit_flow.',),
    ]
    prefixes = tuple(prefix for stage in stages[: frozen_stages + 1] for prefix in stage)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes or '-'), name


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(depth=71), r'depth must be one of \[41, 65\], got 71'),
        (dict(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
        (dict(out_indices=(0, 4)), r'levels from 0 to 3, got \(0, 4\)'),
        (dict(out_indices=()), r'levels from 0 to 3, got \(\)'),
        (dict(frozen_stages=5), 'frozen_stages must be from -1 to 4, got 5'),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignedXception(**changes)
