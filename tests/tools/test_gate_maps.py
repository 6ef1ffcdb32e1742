"""tools/analysis_tools/gate_maps.py as a user runs it, on FusionShapes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from mmseg_fusion.datasets.fusion_shapes import draw_scene
from tests.tools.running import TOOLS, load_tool, run_again, small_config

TOOL = TOOLS / 'analysis_tools' / 'gate_maps.py'


def with_gates(
    folder: Path, name: str = 'gff', fusion: str = 'gff', gate: str = 'map', width: int = 64
) -> Path:
    """The small config with a GFFHead, and a checkpoint beside it that predicts several classes."""
    base = small_config(folder)
    path = folder / f'{name}.py'
    path.write_text(
        f'_base_ = {base.name!r}\n'
        f'model = dict(backbone=dict(base_channels={width}, stem_channels={width}),\n'
        '    auxiliary_head=None, decode_head=dict(\n'
        f"    _delete_=True, type='GFFHead', in_channels={[width, 2 * width, 4 * width]},\n"
        '    channels=8,\n'
        f'    neck=dict(fusion={fusion!r}, gate={gate!r}, num_convs=0), num_classes=8,\n'
        "    context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)),\n"
        "    norm_cfg=dict(type='BN')))\n"
    )
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(path).model)
    for parameter in model.decode_head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    for gate, _ in model.decode_head.neck.gates or ():
        # Whatever number of channels they see: neither open nor shut everywhere.
        torch.nn.init.normal_(gate.weight, 0, 0.3 * (8 / gate.in_channels) ** 0.5)
    # Norms that fit the scenes: without them all pixels would be of one class.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    images = [draw_scene(i, split='val', size=(64, 64))[0] for i in range(4)]
    inputs = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 60 - 2
    with torch.no_grad():
        model.train().decode_head(model.extract_feat(inputs))
    torch.save(dict(state_dict=model.state_dict()), path.with_suffix('.pth'))
    return path


@pytest.fixture(scope='module')
def gff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_gates(tmp_path_factory.mktemp('gff'))


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two validation scenes as files."""
    folder = tmp_path_factory.mktemp('scenes')
    for index in range(2):
        image, label = draw_scene(index, split='val', size=(64, 64))
        for kind, array in (('img', image), ('ann', label)):
            (folder / kind).mkdir(exist_ok=True)
            cv2.imwrite(str(folder / kind / f'{index:06d}.png'), array)
    return folder


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    """The tool in this process: what is wrong is found before anything is drawn."""
    return load_tool(TOOL)


def table(printed: str) -> list[list[str]]:
    """The cells of the printed table, the heads first."""
    lines = [line for line in printed.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


@pytest.mark.stack
def test_gates_of_an_image_and_what_becomes_wrong(gff: Path, scenes: Path, tmp_path: Path) -> None:
    image, label = scenes / 'img' / '000001.png', scenes / 'ann' / '000001.png'
    done = run_again(
        TOOL, gff, gff.with_suffix('.pth'), image, '--label', label, '--zero-gate', 'all',
        '--device', 'cpu', '--out', 'pictures/gates.png', cwd=tmp_path,
    )  # fmt: skip
    assert cv2.imread(str(tmp_path / 'pictures' / 'gates.png')).std() > 10
    heads, *rows = table(done.stdout)
    assert heads == [
        'gate', '', 'stride', 'channels', 'mean gate', 'become wrong, %', 'become right, %',
    ]  # fmt: skip
    assert [row[:4] for row in rows] == [
        [f'G_{i}', f'level {i}', stride, '1'] for i, stride in ((1, '4'), (2, '8'), (3, '16'))
    ]
    assert all(0 < float(row[4]) < 1 for row in rows)
    assert all(float(row[5]) > 0 for row in rows)
    assert 'decode_head.neck, 1 image\n' in done.stdout
    assert done.stdout.splitlines()[-1] == 'pictures/gates.png'


def test_files_give_the_numbers_of_the_data_set(
    tool: ModuleType,
    gff: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    # The picture has its own test.
    monkeypatch.setattr(tool, 'draw_gate_maps', lambda *args: args[2].touch())
    common = [str(gff), str(gff.with_suffix('.pth')), '--device', 'cpu', '--zero-gate', '3', '1']
    printed = []
    for more in (
        ['--indices', '0', '1'],
        [str(scenes / 'img'), '--ann-dir', str(scenes / 'ann')],
        [*(str(scenes / 'img' / f'00000{i}.png') for i in (0, 1))]
        + ['--label', *(str(scenes / 'ann' / f'00000{i}.png') for i in (0, 1))],
    ):
        # Images in front of the options.
        tool.main([*common[:2], *more, *common[2:]])
        printed.append(table(capsys.readouterr().out))
    assert printed[0] == printed[1] == printed[2]
    # The second gate was left as it is.
    assert [row[5] == '-' for row in printed[0][1:]] == [False, True, False]
    assert (tmp_path / 'work_dirs' / 'gff' / 'gate_maps.png').is_file()


def test_without_a_label(
    tool: ModuleType, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = with_gates(tmp_path, gate='channel')
    out = tmp_path / 'a.png'
    image = str(scenes / 'img' / '000000.png')
    checkpoint = str(config.with_suffix('.pth'))
    # An option between the checkpoint and the image.
    tool.main([str(config), checkpoint, '--out', str(out), image, '--zero-gate', '2'])
    said = capsys.readouterr().out
    heads, *rows = table(said)
    assert heads[-1] == 'changed, %'
    assert [row[3] for row in rows] == ['8'] * 3
    assert [row[5] == '-' for row in rows] == [True, False, True]
    assert 'there are no labels (--label)' in said
    assert 'a gate is the mean over its channels' in said
    assert cv2.imread(str(out)).std() > 10


def test_initial_weights_and_no_gate_set_to_zero(
    tool: ModuleType,
    gff: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    there = []

    def draw(found, info, path, title) -> None:
        there.extend(tmp_path.iterdir())
        path.touch()

    monkeypatch.setattr(tool, 'draw_gate_maps', draw)
    tool.main([str(gff), 'none', '--num-samples', '1', '--out', str(tmp_path / 'a.png')])
    said = capsys.readouterr().out
    assert table(said)[0][-1] == 'mean gate'
    assert 'become' not in said
    # Looking whether the picture can be written leaves nothing behind.
    assert there == []
    assert (tmp_path / 'a.png').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['GFF', 'nowhere.pth'], "checkpoint 'nowhere.pth' is not a file"),
        (['nowhere.py', 'none'], "config 'nowhere.py' is not a file"),
        (['GFF', 'none', 'nowhere.png'], 'neither an image file nor a folder'),
        (['GFF', 'none', '--zero-gate', '4'], 'one of 1 (level 1), 2 (level 2), 3 (level 3), or'),
        (['GFF', 'none', '--zero-gate', '0'], '--zero-gate 0: decode_head.neck has no such gate'),
        (['GFF', 'none', '--zero-gate', 'first'], "numbers from 1, or all, got 'first'"),
        (['GFF', 'none', '--layer', 'neck'], "'neck' (--layer) is no GatedFullyFusion"),
        (['GFF', 'none', 'SCENE', '--label', 'no.png'], '--label no.png is not a file'),
        (['GFF', 'none', 'SCENE', '--label', 'LABEL', 'LABEL'], 'label per image, 1, got 2'),
        (['GFF', 'none', 'SCENE', '--label', 'SMALL'], 'is 20 x 30, but its image is 64 x 64'),
        (['GFF', 'none', '--label', 'LABEL'], '--label belongs to images'),
        (['GFF', 'none', '--ann-dir', 'somewhere'], '--ann-dir belongs to images'),
        (['GFF', 'none', '--num-samples', '0'], '--num-samples must be at least 1, got 0'),
        (['GFF', 'none', '--out', 'gates.txt'], 'expected a file name in .png, got gates.txt'),
        (['GFF', 'none', '--out', 'a.file/gates.png'], 'a.file is a file, not a folder; name'),
        (['GFF', 'none', '--out', 'folder.png'], 'folder.png is a folder: expected the name'),
        (['GFF', 'UPERNET'], 'does not fit the model of the config'),
    ],
)
def test_what_was_expected(
    tool: ModuleType,
    gff: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('small.png', np.zeros((20, 30), np.uint8))
    Path('a.file').touch()
    Path('folder.png').mkdir()
    if 'UPERNET' in arguments:
        torch.save({'decode_head.conv_seg.weight': torch.zeros(8, 1, 1, 1)}, 'upernet.pth')
    names = {
        'GFF': str(gff),
        'SCENE': str(scenes / 'img' / '000000.png'),
        'LABEL': str(scenes / 'ann' / '000000.png'),
        'SMALL': 'small.png',
        'UPERNET': 'upernet.pth',
    }
    with pytest.raises(SystemExit) as stopped:
        tool.main([*(names.get(a, a) for a in arguments), '--device', 'cpu'])
    assert message in str(stopped.value.code) + capsys.readouterr().err


def test_fusion_without_gates(tool: ModuleType, tmp_path: Path) -> None:
    config = with_gates(tmp_path, 'concat', fusion='concat')
    out = tmp_path / 'a.png'
    with pytest.raises(SystemExit, match=r"'concat'; .* model\.decode_head\.neck\.fusion='gff' or"):
        tool.main([str(config), 'none', '--device', 'cpu', '--out', str(out)])
    assert not out.exists()
    small = small_config(tmp_path)
    with pytest.raises(SystemExit, match='decode head UPerHead has no gates'):
        tool.main([str(small), 'none', '--device', 'cpu', '--out', str(out)])
