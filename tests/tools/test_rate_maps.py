"""tools/analysis_tools/rate_maps.py as a user runs it, on FusionShapes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS

from tests.tools.running import TOOLS, load_tool, run_again, small_config

TOOL = TOOLS / 'analysis_tools' / 'rate_maps.py'


def with_head(folder: Path, name: str, head: str, **options: object) -> Path:
    """The small config with another head, on the deepest level, and no auxiliary one."""
    base = small_config(folder)
    path = folder / f'{name}.py'
    options.update(type=head, in_channels=64, in_index=3, channels=16, num_classes=8)
    path.write_text(
        f'_base_ = {base.name!r}\n'
        "norm_cfg = dict(type='BN')\n"
        f'model = dict(decode_head=dict(_delete_=True, norm_cfg=norm_cfg, **{options!r}),\n'
        '    auxiliary_head=None)\n'
    )
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        with_head(tmp_path, 'aspp', 'ASPPHead', dilations=(1, 2, 3)),
        with_head(tmp_path, 'ksac', 'KSACHead', dilations=(2, 3)),
    )


@pytest.mark.stack
def test_draws_aspp_beside_ksac(pair: tuple[Path, Path], tmp_path: Path) -> None:
    aspp, ksac = pair
    cfg = Config.fromfile(ksac)
    model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'ksac.pth')
    image = tmp_path / 'my scene.png'
    cv2.imwrite(str(image), np.random.default_rng(0).integers(256, size=(64, 96, 3)))
    done = run_again(
        TOOL, aspp, 'none', ksac, tmp_path / 'ksac.pth', '--names', 'ASPP', 'KSAC', '--images',
        image, '--count', 9, '--device', 'cpu', '--out-dir', tmp_path / 'out', cwd=tmp_path,
    )  # fmt: skip
    (picture,) = (tmp_path / 'out').glob('*.png')
    assert picture.name == '0000_my_scene.png'
    assert str(picture) in done.stdout
    assert cv2.imread(str(picture)).std() > 10
    rows = json.loads((tmp_path / 'out' / 'rate_maps.json').read_text())
    assert [(r['model'], r['rate']) for r in rows] == [
        ('ASPP', 1), ('ASPP', 2), ('ASPP', 3), ('KSAC', 2), ('KSAC', 3),
    ]  # fmt: skip
    assert {(r['size'], r['channels']) for r in rows} == {('2x3', 16)}
    assert all(r['spread'] > 0 for r in rows)


def test_model_without_a_pyramid(tmp_path: Path) -> None:
    words = [small_config(tmp_path), 'none', '--device', 'cpu']
    done = run_again(TOOL, *words, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert 'no pyramid of atrous convolutions' in done.stderr
    assert "'KSACHead'" in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    """The tool in this process: what is wrong is found before anything is drawn."""
    return load_tool(TOOL)


def test_images_of_the_data_set(
    tool: ModuleType, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ['--indices', '2', '0', '--channels', '3', '5', '--device', 'cpu']
    tool.main([str(pair[1]), 'none', *options])
    drawn = sorted((tmp_path / 'work_dirs' / 'ksac' / 'rate_maps').glob('*.png'))
    assert [path.name[:4] for path in drawn] == ['0000', '0002']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['KSAC', 'none', '--channels', '16'], 'expected numbers from 0 to 15 (--channels)'),
        (['KSAC', 'none', '--layer', 'decode_head'], "'decode_head' (--layer) is no pyramid"),
        (['KSAC', 'none', 'ASPP'], 'expected pairs of CONFIG CHECKPOINT'),
        (['KSAC', 'nowhere.pth'], "checkpoint 'nowhere.pth' is not a file"),
        (['nowhere.py', 'none'], "config 'nowhere.py' is not a file"),
        (['KSAC', 'none', '--images', 'nowhere.png'], 'neither an image file nor a folder'),
        (['KSAC', 'none', '--count', '0'], '--count must be at least 1, got 0'),
        (['KSAC', 'none', '--names', 'a', 'b'], '--names: expected 1, one per model, got 2'),
    ],
)
def test_what_was_expected(
    tool: ModuleType,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {'ASPP': str(pair[0]), 'KSAC': str(pair[1])}
    with pytest.raises(SystemExit) as stopped:
        tool.main([*(names.get(a, a) for a in arguments), '--device', 'cpu'])
    assert message in str(stopped.value.code) + capsys.readouterr().err
