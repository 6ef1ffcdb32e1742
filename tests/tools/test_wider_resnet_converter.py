"""tools/model_converters/wider_resnet.py on files with the published names and shapes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmseg.registry import MODELS

from mmseg_fusion.models.backbones.wider_resnet import WiderResNet

from .running import TOOLS, load, run_again

TOOL = TOOLS / 'model_converters' / 'wider_resnet.py'
State = dict[str, torch.Tensor]


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('wider_resnet_converter', TOOL)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope='module')
def backbone() -> State:
    """Every tensor of the network at full size, each of one number of its own: a small file."""
    with torch.device('meta'):
        state = WiderResNet().state_dict()
    numbers = torch.linspace(0.1, 0.9, len(state))
    return {
        name: torch.tensor(7) if value.ndim == 0 else number.clone().expand(value.shape)
        for number, (name, value) in zip(numbers, state.items())
    }


def classifier(prefix: str = '') -> State:
    """What the published ImageNet file holds beside the modules."""
    norm = {f'{prefix}bn_out.0.{key}': torch.ones(4096) for key in ('weight', 'bias')}
    norm.update({f'{prefix}bn_out.0.running_{key}': torch.ones(4096) for key in ('mean', 'var')})
    fc = {'weight': torch.zeros(()).expand(1000, 4096), 'bias': torch.zeros(1000)}
    return {**norm, **{f'{prefix}classifier.fc.{key}': value for key, value in fc.items()}}


def save(folder: Path, state: object, name: str = 'src.pth.tar', **kwargs: bool) -> Path:
    torch.save(state, folder / name, **kwargs)
    return folder / name


def same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def test_published_file(backbone: State, tmp_path: Path) -> None:
    """As a user runs it; the result goes into the full network through ``init_cfg``."""
    state = {f'module.{name}': value for name, value in backbone.items()}
    state.update(classifier('module.'))
    # Files of that age have no zip format.
    src = save(
        tmp_path,
        dict(state_dict=state, epoch=90, arch='wider_resnet38_a2'),
        _use_new_zipfile_serialization=False,
    )
    done = run_again(TOOL, src, 'backbone.pth', cwd=tmp_path)
    assert f'{len(backbone)} tensors of the backbone taken' in done.stdout
    assert 'left out: bn_out (4), classifier (2)\n' in done.stdout
    assert "init_cfg=dict(type='Pretrained', checkpoint='backbone.pth')" in done.stdout
    dst = tmp_path / 'backbone.pth'
    same(load(dst)['state_dict'], backbone)
    # Without memory at first: to draw 105 million numbers takes longer than all the rest.
    with torch.device('meta'):
        model = MODELS.build(
            dict(type='WiderResNet', init_cfg=dict(type='Pretrained', checkpoint=str(dst)))
        )
    model.to_empty(device='cpu').init_weights()
    same(model.state_dict(), backbone)


@pytest.mark.parametrize(
    ('prefix', 'wrapped'),
    [('', False), ('module.', True), ('backbone.', True), ('module.backbone.', False)],
)
def test_any_prefix(
    tool: ModuleType, backbone: State, tmp_path: Path, capsys, prefix: str, wrapped: bool
) -> None:
    """Of a segmentation model: its heads stay out, wherever they stand."""
    state = {f'{prefix}{name}': value for name, value in backbone.items()}
    heads = {f'{prefix}aspp.0.weight': torch.ones(2), 'decode_head.conv.weight': torch.ones(3)}
    state = {**heads, **state, 'fc.weight': torch.ones(1), 'fc.bias': torch.ones(1)}
    src = save(tmp_path, dict(state_dict=state, optimizer=dict(lr=0.1)) if wrapped else state)
    tool.main([str(src), str(tmp_path / 'dst.pth')])
    same(load(tmp_path / 'dst.pth')['state_dict'], backbone)
    assert 'left out: aspp (1), decode_head (1), fc (2)\n' in capsys.readouterr().out


def test_nothing_left_out_and_counters_added(
    tool: ModuleType, backbone: State, tmp_path: Path, capsys
) -> None:
    """Before PyTorch 0.4.1 a batch norm did not count; its own output can be converted again."""
    counted = {name for name in backbone if name.endswith('num_batches_tracked')}
    assert counted
    state = {name: value for name, value in backbone.items() if name not in counted}
    tool.main([str(save(tmp_path, state)), str(tmp_path / 'dst.pth')])
    assert 'left out: nothing\n' in capsys.readouterr().out
    expected = {n: torch.tensor(0) if n in counted else v for n, v in backbone.items()}
    same(load(tmp_path / 'dst.pth')['state_dict'], expected)
    tool.main([str(tmp_path / 'dst.pth'), str(tmp_path / 'again.pth')])
    same(load(tmp_path / 'again.pth')['state_dict'], expected)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(names)}


def changed(name: str, value: torch.Tensor) -> Callable[[State], State]:
    return lambda state: {**state, name: value}


def inplace_abn(state: State) -> State:
    """There the norm has its activation inside, and no ``.0``."""
    names = {name: name.replace('.0.', '.') for name in state}
    return {names[name]: value for name, value in state.items()}


@pytest.mark.parametrize(
    ('change', 'messages'),
    [
        (without('mod7.'), ['does not fit WiderResNet-38 A2', 'missing: mod7.block1.bn1.0.weight']),
        (without('mod3.block2.bn1.0.bias'), ['missing: mod3.block2.bn1.0.bias\n']),
        (
            changed('mod2.block4.convs.conv1.weight', torch.ones(128, 128, 3, 3)),
            ['unknown: mod2.block4.convs.conv1.weight\n'],
        ),
        (
            changed('mod5.block1.proj_conv.weight', torch.ones(4, 512, 1, 1)),
            ['shape: mod5.block1.proj_conv.weight (4, 512, 1, 1) instead of (1024, 512, 1, 1)'],
        ),
        (
            changed('mod2.block1.bn1.0.bias', torch.full((64,), float('nan'))),
            ['NaN or infinite in mod2.block1.bn1.0.bias'],
        ),
        (inplace_abn, ['in-place activated batch norm', 'leaky ReLU']),
        (
            lambda state: {'conv1.weight': torch.ones(64, 3, 7, 7), 'fc.bias': torch.ones(9)},
            ['expected one tensor mod1.conv1.weight', 'none in: conv1.weight, fc.bias'],
        ),
        (
            lambda state: {f'{p}.{k}': v for k, v in state.items() for p in ('model', 'ema')},
            ['found model.mod1.conv1.weight, ema.mod1.conv1.weight'],
        ),
        (lambda state: {}, ['holds no weights by name']),
    ],
)
def test_wrong_weights(
    tool: ModuleType,
    backbone: State,
    tmp_path: Path,
    change: Callable[[State], State],
    messages: list[str],
) -> None:
    src = save(tmp_path, dict(state_dict=change(backbone)))
    with pytest.raises(SystemExit) as raised:
        tool.main([str(src), str(tmp_path / 'dst.pth')])
    for message in [*messages, str(src)]:
        assert message in f'{raised.value}\n'
    assert not (tmp_path / 'dst.pth').exists()


def test_long_lists_are_cut(tool: ModuleType, backbone: State, tmp_path: Path) -> None:
    kept = without('mod7.', 'mod6.')(backbone)
    with pytest.raises(SystemExit, match=f'and {len(backbone) - len(kept) - 5 - 6} more'):
        tool.main([str(save(tmp_path, kept)), str(tmp_path / 'dst.pth')])


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_files_that_are_no_checkpoint(tool: ModuleType, backbone: State, tmp_path: Path) -> None:
    def failed(src: object) -> str:
        with pytest.raises(SystemExit) as raised:
            tool.main([str(src), str(tmp_path / 'dst.pth')])
        assert not (tmp_path / 'dst.pth').exists()
        return str(raised.value)

    for i, content in enumerate(
        (b'', b'<html>quota exceeded</html>', b'PK\x03\x04broken', b'Xabc')
    ):
        broken = tmp_path / f'{i}.pth'
        broken.write_bytes(content)
        assert 'cannot be read as a checkpoint' in failed(broken)
    bad = dict(state_dict=backbone, more=Payload(tmp_path / 'ran'))
    assert 'runs code' in failed(save(tmp_path, bad))
    assert not (tmp_path / 'ran').exists()
    assert 'holds no weights by name' in failed(save(tmp_path, [torch.ones(1)]))
    assert 'got int' in failed(save(tmp_path, dict(state_dict=3)))
    assert 'is not a file' in failed(tmp_path / 'absent.pth')


def test_writes_only_where_it_may(
    tool: ModuleType, backbone: State, tmp_path: Path, capsys
) -> None:
    src, dst = save(tmp_path, backbone), tmp_path / 'dst.pth'

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as raised:
            tool.main([str(a) for a in arguments])
        assert raised.value.code == 2
        return capsys.readouterr().err

    dst.write_text('mine')
    assert 'name another file or add --overwrite' in refused(src, dst)
    before = src.read_bytes()
    assert 'DST is SRC itself' in refused(src, src, '--overwrite')
    assert 'is a folder' in refused(src, tmp_path, '--overwrite')
    assert 'there is no folder' in refused(src, tmp_path / 'a' / 'b.pth')
    assert 'download it first' in refused('https://example.org/w.pth', tmp_path / 'new.pth')
    assert dst.read_text() == 'mine'
    assert src.read_bytes() == before
    # What fails leaves the old file alone.
    wrong = save(tmp_path, without('mod4.')(backbone), 'wrong.pth')
    with pytest.raises(SystemExit, match='missing: mod4'):
        tool.main([str(wrong), str(dst), '--overwrite'])
    assert dst.read_text() == 'mine'
    tool.main([str(src), str(dst), '--overwrite'])
    same(load(dst)['state_dict'], backbone)
