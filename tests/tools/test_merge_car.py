"""tools/model_converters/merge_car.py as a user runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import save_checkpoint
from mmseg.registry import MODELS

from .running import ROOT, TOOLS, load, run_again

TOOL = TOOLS / 'model_converters' / 'merge_car.py'
DANET = 'danet_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
PAIR = 'upernet_r18_{}1xb4-1k_fusion-shapes-128x128.py'


def small(folder: Path, car: bool = True) -> Path:
    path = folder / f'{"car" if car else "plain"}.py'
    base = ROOT / 'configs' / 'fusion_shapes' / PAIR.format('car_' if car else '')
    path.write_text(
        f'_base_ = {str(base)!r}\n'
        'model = dict(decode_head=dict(channels=16), auxiliary_head=dict(channels=8))\n'
    )
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A config with CAR and a checkpoint of its model, statistics and all away from their start."""
    folder = tmp_path_factory.mktemp('car')
    init_default_scope('mmseg')
    config = small(folder)
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 64, 64))
        model.decode_head.fpn_bottleneck.linear.bias.normal_()
    path = folder / 'trained.pth'
    save_checkpoint(dict(state_dict=model.state_dict(), meta=dict(iter=7)), str(path))
    return config, path


def test_merges(trained, tmp_path: Path) -> None:
    config, checkpoint = trained
    out = tmp_path / 'merged.pth'
    done = run_again(TOOL, config, checkpoint, out, cwd=tmp_path)
    assert '1 layer(s) merged: decode_head.fpn_bottleneck' in done.stdout
    written = load(out)
    assert written['meta']['iter'] == 7
    cfg = Config.fromfile(config)
    model = MODELS.build(cfg.model)
    model.load_state_dict(load(checkpoint)['state_dict'])
    cfg.model.car.merged = True
    merged = MODELS.build(cfg.model)
    merged.load_state_dict(written['state_dict'])
    x = torch.randn(1, 3, 65, 43)
    with torch.no_grad():
        expected, found = model.eval()(x), merged.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Twice is refused.
    again = run_again(TOOL, config, out, tmp_path / 'again.pth', cwd=tmp_path, check=False)
    assert again.returncode == 1
    assert 'does not fit the config' in again.stderr
    assert not (tmp_path / 'again.pth').exists()


def test_head_that_gives_more_than_its_prediction(tmp_path: Path) -> None:
    init_default_scope('mmseg')
    path = tmp_path / 'danet.py'
    path.write_text(
        f'_base_ = {str(ROOT / "configs" / "fusion_shapes" / DANET)!r}\n'
        "model = dict(type='CAREncoderDecoder', car=dict(channels=16))\n"
    )
    state = MODELS.build(Config.fromfile(path).model).state_dict()
    save_checkpoint(dict(state_dict=state), str(tmp_path / 'danet.pth'))
    done = run_again(TOOL, path, tmp_path / 'danet.pth', tmp_path / 'merged.pth', cwd=tmp_path)
    assert '2 layer(s) merged: decode_head.pam_out_conv, decode_head.cam_out_conv' in done.stdout
    assert (
        'decode_head.pam_out_conv.linear.weight' not in load(tmp_path / 'merged.pth')['state_dict']
    )


def failed(*arguments, cwd: Path) -> str:
    done: subprocess.CompletedProcess = run_again(TOOL, *arguments, cwd=cwd, check=False)
    assert done.returncode
    assert 'Traceback' not in done.stderr
    return done.stderr


def test_errors(trained, tmp_path: Path) -> None:
    config, checkpoint = trained
    assert 'OUT is the checkpoint itself' in failed(config, checkpoint, checkpoint, cwd=tmp_path)
    assert 'no folder' in failed(config, checkpoint, tmp_path / 'a/b.pth', cwd=tmp_path)
    plain = small(tmp_path, car=False)
    assert "expected 'CAREncoderDecoder'" in failed(plain, checkpoint, 'out.pth', cwd=tmp_path)
    kernel = ('--cfg-options', 'model.car.kernel_size=3')
    assert 'does not fit the config' in failed(config, checkpoint, 'out.pth', *kernel, cwd=tmp_path)
    assert not (tmp_path / 'out.pth').exists()
