"""tools/analysis_tools/scale_report.py as a user runs it."""

from __future__ import annotations

import csv

from .running import TOOLS, run_again

TOOL = TOOLS / 'analysis_tools' / 'scale_report.py'


def test_on_camvid(repo_root, camvid_root, tmp_path):
    options = [
        f'train_dataloader.dataset.data_root={camvid_root}',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'model.data_preprocessor.size=(64,64)',
    ]
    config = 'configs/camvid/upernet_r18_scale-eq_1xb16-4k_camvid-360x480.py'
    done = run_again(
        TOOL, config, '--num-images', 8, '--batch-size', 4, '--device', 'cpu',
        '--out-dir', tmp_path, '--cfg-options', *options, cwd=repo_root, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'decode_head.fpn_bottleneck.conv' in done.stdout
    rows = list(csv.DictReader((tmp_path / 'scale_report.csv').open()))
    assert len(rows) == 9
    assert all(abs(float(r['std equalized']) - 1) < 0.2 for r in rows)
    assert (tmp_path / 'scale_report.png').stat().st_size > 10_000


def test_missing_images(repo_root, tmp_path):
    config = 'configs/camvid/upernet_r18_1xb16-4k_camvid-360x480.py'
    done = run_again(
        TOOL, config, '--out-dir', tmp_path,
        '--cfg-options', f'train_dataloader.dataset.data_root={tmp_path / "nowhere"}',
        cwd=repo_root, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert 'data_root' in done.stderr
    assert 'Traceback' not in done.stderr


def test_missing_config(repo_root):
    done = run_again(TOOL, 'configs/camvid/upernet_r19.py', cwd=repo_root, check=False)
    assert done.returncode == 1
    assert 'is not a file' in done.stderr
