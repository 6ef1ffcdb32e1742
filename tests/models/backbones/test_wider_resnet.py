"""WiderResNet: base tester, an independent forward pass, names, counts, dilation, dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.models.backbones.wider_resnet import IdentityResidualBlock, WiderResNet
from tests.testers import BackboneTester

#: Blocks and widths of modules 2 to 7 of the published network, as its description lists them.
PUBLISHED = {
    2: (3, (128, 128)),
    3: (3, (256, 256)),
    4: (6, (512, 512)),
    5: (3, (512, 1024)),
    6: (1, (512, 1024, 2048)),
    7: (1, (1024, 2048, 4096)),
}
#: Stride of the first convolution and dilation of modules 2 to 7, by output stride.
SPACING = {
    8: {2: (1, 1), 3: (1, 1), 4: (2, 1), 5: (1, 2), 6: (1, 4), 7: (1, 4)},
    16: {2: (1, 1), 3: (1, 1), 4: (2, 1), 5: (2, 1), 6: (1, 2), 7: (1, 2)},
    32: {2: (1, 1), 3: (1, 1), 4: (2, 1), 5: (2, 1), 6: (2, 1), 7: (1, 1)},
}
STRIDES = {8: (1, 2, 4, 8, 8, 8, 8), 16: (1, 2, 4, 8, 16, 16, 16), 32: (1, 2, 4, 8, 16, 32, 32)}
every_stride = pytest.mark.parametrize('output_stride', [8, 16, 32])


class TestWiderResNet(BackboneTester):
    backbone = dict(type='WiderResNet', depth=16, base_channels=4)
    out_channels, out_strides = (8, 64, 256), (2, 8, 8)


class TestUndilatedWithCheckpoints(BackboneTester):
    backbone = dict(type='WiderResNet', depth=16, base_channels=4, output_stride=32, with_cp=True)
    out_channels, out_strides = (8, 64, 256), (2, 16, 32)


# --- an independent forward pass ---------------------------------------------------------------


def norm_relu(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Norm layer ``name`` with its running statistics, and ReLU."""
    mean, variance, weight, bias = (
        state[f'{name}.0.{key}'][:, None, None]
        for key in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp_min(0)


def conv(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    margin = dilation * (weight.shape[-1] - 1) // 2
    return F.conv2d(F.pad(x, [margin] * 4), weight, stride=stride, dilation=dilation)


def reference_block(
    x: Tensor,
    state: dict[str, Tensor],
    name: str,
    stride: int = 1,
    dilation: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """The block as described; ``dropout`` only where the module drops, in training."""
    active = norm_relu(x, state, f'{name}.bn1')
    shortcut = x
    if f'{name}.proj_conv.weight' in state:
        # A 1x1 convolution with a stride is a product at every second place.
        weight = state[f'{name}.proj_conv.weight'][..., 0, 0]
        shortcut = torch.einsum('oi,nihw->nohw', weight, active[..., ::stride, ::stride])
    out = conv(
        active,
        state[f'{name}.convs.conv1.weight'],
        stride,
        dilation if state[f'{name}.convs.conv1.weight'].shape[-1] == 3 else 1,
    )
    if f'{name}.convs.conv3.weight' not in state:
        out = F.dropout2d(norm_relu(out, state, f'{name}.convs.bn2'), dropout, dropout > 0)
        return conv(out, state[f'{name}.convs.conv2.weight'], 1, dilation) + shortcut
    out = norm_relu(out, state, f'{name}.convs.bn2')
    out = conv(out, state[f'{name}.convs.conv2.weight'], 1, dilation)
    out = F.dropout2d(norm_relu(out, state, f'{name}.convs.bn3'), dropout, dropout > 0)
    weight = state[f'{name}.convs.conv3.weight'][..., 0, 0]
    return torch.einsum('oi,nihw->nohw', weight, out) + shortcut


def reference(x: Tensor, state: dict[str, Tensor], output_stride: int) -> list[Tensor]:
    """Outputs of modules 1 to 7 of depth 38, from its description and weights alone."""
    x = conv(x, state['mod1.conv1.weight'])
    levels = [x]
    for i, (blocks, _) in PUBLISHED.items():
        if i in (2, 3):
            x = F.pad(x, [1] * 4, value=float('-inf'))
            x = x.unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))
        stride, dilation = SPACING[output_stride][i]
        for block in range(1, blocks + 1):
            x = reference_block(x, state, f'mod{i}.block{block}', stride, dilation)
            stride = 1
        levels.append(x)
    return levels


def randomize(module: nn.Module) -> nn.Module:
    """Norms with weights and statistics that are not 1 and 0; float64."""
    for bn in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(bn.weight, 1, 0.3)
        nn.init.normal_(bn.bias, std=0.3)
        nn.init.normal_(bn.running_mean, std=0.3)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    return module.double()


@pytest.fixture(scope='module')
def models() -> dict[int, WiderResNet]:
    """Depth 38, all modules as levels, per output stride; one set of weights."""
    torch.manual_seed(0)
    built = {
        s: WiderResNet(output_stride=s, base_channels=3, out_indices=range(1, 8)).eval()
        for s in (8, 16, 32)
    }
    randomize(built[8])
    for model in built.values():
        model.double().load_state_dict(built[8].state_dict())
    return built


@pytest.mark.stack
@every_stride
@pytest.mark.parametrize('size', [(64, 96), (97, 50), (41, 33)])
def test_against_its_description(
    models: dict[int, WiderResNet], output_stride: int, size: tuple[int, int]
) -> None:
    model, image = models[output_stride], torch.randn(2, 3, *size).double()
    with torch.no_grad():
        found = model(image)
        expected = reference(image, model.state_dict(), output_stride)
    assert model.out_strides == STRIDES[output_stride]
    assert model.out_channels == tuple(3 * 2**i for i in range(7))
    for level, other, channels, stride in zip(
        found, expected, model.out_channels, model.out_strides
    ):
        assert level.shape == (2, channels, *(-(-side // stride) for side in size))
        assert other.std() > 1e-2, 'nothing is compared where nothing is left'
        torch.testing.assert_close(level, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('channels', [(5, 7), (6, 6), (4, 5, 7), (4, 5, 6)])
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2)])
def test_block_against_its_description(
    channels: tuple[int, ...], stride: int, dilation: int
) -> None:
    block = randomize(IdentityResidualBlock(6, channels, stride, dilation, dropout=0.5))
    state = {f'block.{key}': value for key, value in block.state_dict().items()}
    assert ('block.proj_conv.weight' in state) is (stride == 2 or channels[-1] != 6)
    x = torch.randn(2, 6, 11, 8, dtype=torch.float64)
    kept = x.clone()
    expected = reference_block(x, state, 'block', stride, dilation)
    torch.testing.assert_close(block.eval()(x), expected)
    # In training the last convolution lacks channels, the same ones with the same seed.
    block.train()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    torch.manual_seed(1)
    dropped = reference_block(x, state, 'block', stride, dilation, dropout=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), dropped)
    assert not torch.allclose(dropped, expected)
    assert torch.equal(x, kept)


def test_dropout_in_the_last_two_modules_alone() -> None:
    model = WiderResNet(base_channels=2)
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout2d)}
    assert found == {'mod6.block1.convs.dropout': 0.3, 'mod7.block1.convs.dropout': 0.5}


# --- dilation ----------------------------------------------------------------------------------


def test_output_stride_16_computes_the_features_of_32(models: dict[int, WiderResNet]) -> None:
    """Module 6 has its stride in a 1x1 convolution: without it, the same at more places."""
    image = torch.randn(1, 3, 129, 161).double()
    with torch.no_grad():
        coarse, fine = models[32](image), models[16](image)
    for a, b in zip(coarse[5:], fine[5:]):
        torch.testing.assert_close(b[..., ::2, ::2], a, rtol=1e-9, atol=1e-9)


# --- names and counts --------------------------------------------------------------------------


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in the published checkpoint, modules 1 to 7."""
    shapes: dict[str, tuple[int, ...]] = {'mod1.conv1.weight': (64, 3, 3, 3)}

    def norm(name: str, channels: int) -> None:
        for key in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'{name}.0.{key}'] = (channels,)
        shapes[f'{name}.0.num_batches_tracked'] = ()

    width = 64
    for i, (blocks, channels) in PUBLISHED.items():
        for block in range(1, blocks + 1):
            name = f'mod{i}.block{block}'
            norm(f'{name}.bn1', width)
            sides = (3, 3) if len(channels) == 2 else (1, 3, 1)
            before = (width, *channels)
            for number, (cin, cout, side) in enumerate(zip(before, channels, sides), 1):
                shapes[f'{name}.convs.conv{number}.weight'] = (cout, cin, side, side)
                if number > 1:
                    norm(f'{name}.convs.bn{number}', cin)
            if block == 1:
                shapes[f'{name}.proj_conv.weight'] = (channels[-1], width, 1, 1)
            width = channels[-1]
    return shapes


@pytest.mark.stack
def test_names_shapes_and_parameters() -> None:
    with torch.device('meta'):
        model = MODELS.build(dict(type='WiderResNet'))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == published_shapes()
    count = sum(p.numel() for p in model.parameters())
    learnable = (
        shape for name, shape in published_shapes().items() if name.endswith(('weight', 'bias'))
    )
    assert count == sum(torch.Size(shape).numel() for shape in learnable) == 105_062_720
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('depth', [16, 20, 38])
def test_depth(depth: int) -> None:
    """The number in the name: convolutions, and the classifier; shortcuts do not count."""
    model = WiderResNet(depth, base_channels=1)
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sum('proj_conv' not in name for name in convs) + 1 == depth


@pytest.mark.parametrize('out_indices', [(1,), (2, 5), (4, 6), (2, 5, 7)])
def test_out_indices(models: dict[int, WiderResNet], out_indices: tuple[int, ...]) -> None:
    every, image = models[8], torch.randn(1, 3, 47, 33).double()
    some = WiderResNet(base_channels=3, out_indices=out_indices).double().eval()
    # What stands behind the last of them would get no gradient.
    kept = tuple(f'mod{i}.' for i in range(1, out_indices[-1] + 1))
    state = {name: value for name, value in every.state_dict().items() if name.startswith(kept)}
    some.load_state_dict(state, strict=True)
    with torch.no_grad():
        levels, found = every(image), some(image)
    assert len(found) == len(out_indices)
    for level, i, channels in zip(found, out_indices, some.out_channels):
        assert torch.equal(level, levels[i - 1])
        assert channels == level.shape[1]


# --- training ----------------------------------------------------------------------------------


def test_checkpoints_give_the_same_gradients() -> None:
    plain = WiderResNet(16, base_channels=2).double()
    saving = WiderResNet(16, base_channels=2, with_cp=True).double()
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 33, 41).double()
    for model in (plain, saving):
        # The same channels are dropped, also when a block is computed again.
        torch.manual_seed(1)
        sum(level.square().mean() for level in model(image)).backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@pytest.mark.parametrize('frozen_stages', range(-1, 8))
def test_frozen_before_the_optimizer_is_built(frozen_stages: int) -> None:
    model = WiderResNet(16, base_channels=1, frozen_stages=frozen_stages).train()
    prefixes = tuple(f'mod{i}.' for i in range(1, frozen_stages + 1)) or '-'
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes), name
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout2d)):
            assert module.training != name.startswith(prefixes), name


def test_norm_cfg() -> None:
    model = WiderResNet(16, base_channels=4, norm_cfg=dict(type='GN', num_groups=2))
    norms = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    assert {type(m) for m in norms} == {nn.GroupNorm}
    assert len(norms) == 2 * 4 + 3 * 2


# --- weights -----------------------------------------------------------------------------------


def test_published_file_loads_as_it_is(tmp_path: Path) -> None:
    """mmengine takes ``module.`` off; classifier and its norm are of no use to a backbone."""
    torch.manual_seed(5)
    source = randomize(WiderResNet(16, base_channels=2)).float().state_dict()
    state = {f'module.{name}': value for name, value in source.items()}
    state['module.bn_out.0.weight'] = torch.ones(128)
    state['module.classifier.fc.weight'] = torch.zeros(1000, 128)
    torch.save(dict(state_dict=state), tmp_path / 'wider_resnet.pth.tar')
    cfg = dict(type='WiderResNet', depth=16, base_channels=2)
    cfg['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'wider_resnet.pth.tar'))
    built = MODELS.build(cfg)
    built.init_weights()
    for name, value in built.state_dict().items():
        assert torch.equal(value, source[name]), name


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(depth=50), r'depth must be one of \[16, 20, 38\], got 50; edit backbone\.depth'),
        (dict(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
        (dict(base_channels=0), 'base_channels must be at least 1, got 0'),
        (dict(out_indices=(0, 2)), r'modules from 1 to 7, got \(0, 2\)'),
        (dict(out_indices=(5, 2)), r'rising numbers .* got \(5, 2\)'),
        (dict(out_indices=()), r'got \(\)'),
        (dict(out_indices=(2, 5), frozen_stages=6), 'from -1 to 5, the last of out_indices, got 6'),
        (dict(frozen_stages=-2), 'from -1 to 7, the last of out_indices, got -2'),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WiderResNet(**{'base_channels': 1, **changes})
