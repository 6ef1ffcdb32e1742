"""tools/model_converters/gff_wrn38.py on files with the authors' names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmseg.registry import MODELS

from mmseg_fusion.models.backbones import WiderResNet

from ..configs.files import CONFIGS
from .running import TOOLS, load, load_tool, run_again

TOOL = TOOLS / 'model_converters' / 'gff_wrn38.py'
GOLDEN = Path(__file__).parents[1] / 'data' / 'golden' / 'gff_head.npz'
CONFIG = CONFIGS / 'gff/gff-dfp_wrn38-d8_4xb2-100k_cityscapes-864x864.py'
NORM = ('weight', 'bias', 'running_mean', 'running_var')
State = dict[str, torch.Tensor]


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def head() -> State:
    """The golden weights of the head, and ASPP as the authors' code has it."""
    with np.load(GOLDEN) as data:
        found = {k: torch.from_numpy(data[k]) for k in data.files}
    state = {}
    for key, value in found.items():
        if key.startswith('w/'):
            scale = found.get(f'scale/{key[2:]}')
            state[f'gff_head.{key[2:]}'] = value if scale is None else value.float() * scale
    generator = torch.Generator().manual_seed(0)

    def branch(name: str, taps: int) -> None:
        size = (256, 4096, taps, taps)
        state[f'{name}.0.weight'] = torch.randn(size, generator=generator) / (64 * taps)
        for kind in NORM:
            state[f'{name}.1.{kind}'] = torch.rand(256, generator=generator) + 0.1

    branch('aspp.img_conv', 1)
    for i, taps in enumerate((1, 3, 3, 3)):
        branch(f'aspp.features.{i}', taps)
    state['bot_aspp.weight'] = torch.randn(256, 1280, 3, 3, generator=generator) / 107
    return state


@pytest.fixture(scope='module')
def backbone() -> State:
    """Every tensor at full size, of one number: a small file."""
    with torch.device('meta'):
        state = WiderResNet().state_dict()
    return {
        name: torch.tensor(7) if value.ndim == 0 else torch.tensor(0.5).expand(value.shape)
        for name, value in state.items()
    }


def save(folder: Path, state: object, name: str = 'src.pth') -> Path:
    torch.save(state, folder / name)
    return folder / name


def test_released_file(head: State, backbone: State, tmp_path: Path) -> None:
    """As a user runs it; the result loads strictly into the model of the config."""
    state = {f'module.{name}': value for name, value in {**backbone, **head}.items()}
    src = save(tmp_path, dict(state_dict=state, epoch=170, mean_iu=0.8, command='train.py'))
    done = run_again(TOOL, src, 'dst.pth', cwd=tmp_path)
    assert f'{len(backbone)} tensors of the backbone' in done.stdout
    assert 'for 19 classes' in done.stdout
    found = load(tmp_path / 'dst.pth')['state_dict']
    model = Config.fromfile(CONFIG).model
    model.backbone.pop('init_cfg')
    model.pop('data_preprocessor')
    with torch.device('meta'):
        model = MODELS.build(model)
    model.load_state_dict(found, strict=True, assign=True)
    for name, value in backbone.items():
        assert torch.equal(found[f'backbone.{name}'], value), name


def test_context_is_the_authors_aspp(tool: ModuleType, head: State) -> None:
    """Written out with their names: branches, then one 3x3 convolution and nothing behind it."""
    ours = tool.head_state(head, 'SRC')
    cfg = Config.fromfile(tool.MODEL).model.decode_head.context
    cfg.update(num_classes=19, norm_cfg=dict(type='BN'), align_corners=True)
    context = MODELS.build(cfg).eval()
    start = 'context.'
    state = {k[len(start) :]: v for k, v in ours.items() if k.startswith(start)}
    found = context.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (
        ['conv_seg.weight', 'conv_seg.bias'],
        [],
    )
    x = torch.randn(1, 4096, 5, 6, generator=torch.Generator().manual_seed(1))

    def branch(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        weight, bias, mean, var = (head[f'{name}.1.{kind}'].view(-1, 1, 1) for kind in NORM)
        x = F.conv2d(x, head[f'{name}.0.weight'], **options)
        return F.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)

    branches = [branch('aspp.img_conv', x.mean((2, 3), keepdim=True)).expand(-1, -1, 5, 6)]
    branches += [branch('aspp.features.0', x)]
    for i, rate in ((1, 12), (2, 24), (3, 36)):
        branches.append(branch(f'aspp.features.{i}', x, padding=rate, dilation=rate))
    expected = F.conv2d(torch.cat(branches, 1), head['bot_aspp.weight'], padding=1)
    with torch.no_grad():
        torch.testing.assert_close(
            context._forward_feature([x, x, x]), expected, rtol=1e-4, atol=1e-4
        )


def test_every_tensor_of_the_head_has_its_place(tool: ModuleType, head: State) -> None:
    """None is used twice, none is left, and what the file lacks are zeros."""
    found = tool.head_state(head, 'SRC')
    places = {value.data_ptr() for value in head.values()}
    taken = {name: value for name, value in found.items() if value.data_ptr() in places}
    assert len(taken) == len(head) == len(places)
    assert {value.data_ptr() for value in taken.values()} == places
    added = {name for name in found if name not in taken}
    assert all(n == 'conv_seg.bias' or n.endswith('num_batches_tracked') for n in added)
    assert not any(found[name].any() for name in added)


def without(name: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(name)}


def changed(name: str, value: torch.Tensor) -> Callable[[State], State]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ('change', 'messages'),
    [
        (without('gff_head.gate2'), ['missing: gff_head.gate2.0.weight, gff_head.gate2.0.bias\n']),
        (without('gff_head.cls.6'), ['missing: gff_head.cls.6.weight\n']),
        (without('bot_aspp'), ['missing: bot_aspp.weight\n']),
        (without('gff_head'), ['expected one tensor gff_head.d_in1.0.weight', 'found none in:']),
        (
            changed('gff_head.dense_12.conv1.bias', torch.ones(3)),
            ['unknown: gff_head.dense_12.conv1.bias\n'],
        ),
        (
            changed('gff_head.d_in1.0.weight', torch.ones(128, 256, 1, 1)),
            ['shape: gff_head.d_in1.0.weight (128, 256, 1, 1) instead of (128, 128, 1, 1)\n'],
        ),
        (
            changed('gff_head.cls.1.bias', torch.full((256,), float('nan'))),
            ['NaN or infinite in final.0.bn.bias\n'],
        ),
    ],
)
def test_wrong_weights(
    tool: ModuleType,
    head: State,
    tmp_path: Path,
    change: Callable[[State], State],
    messages: list[str],
) -> None:
    # Of one number each: a small file.
    small = {k: v.flatten()[:1].view([1] * v.ndim).clone().expand(v.shape) for k, v in head.items()}
    src = save(tmp_path, dict(state_dict=change(small)))
    with pytest.raises(SystemExit) as raised:
        tool.main([str(src), str(tmp_path / 'dst.pth')])
    for message in [*messages, str(src)]:
        assert message in f'{raised.value}\n'
    assert not (tmp_path / 'dst.pth').exists()
