"""tools/analysis_tools/benchmark_scale_equalizer.py as a user runs it."""

from __future__ import annotations

import re

import pytest

from .running import TOOLS, forked_python, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_scale_equalizer.py'
CONFIG = 'configs/fusion_shapes/upernet_r18_1xb4-1k_fusion-shapes-128x128.py'


@pytest.mark.stack
@pytest.mark.parametrize('part', ['model', 'head'])
def test_four_variants(repo_root, part):
    done = run_again(
        TOOL, CONFIG, '--shape', 64, 64, '--batch-size', 2, '--repeat', 2, '--warmup', 1,
        '--device', 'cpu', '--part', part, cwd=repo_root, check=False, python=forked_python(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = re.findall(r'^\|\s+(.+?)\s+\|\s+([\d.]+)\s', done.stdout, re.M)
    assert [name for name, _ in rows] == ['plain', 'fold', 'module', 'batch norm after upsampling']
    assert all(float(median) > 0 for _, median in rows)
    assert '1.000 ' in done.stdout


def test_head_without_fusion(repo_root, tmp_path):
    config = tmp_path / 'fpn.py'
    head = dict(
        _delete_=True,
        type='FPNHead',
        in_channels=[64, 128, 256, 512],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=8,
        num_classes=8,
    )
    base = str(repo_root / CONFIG)
    config.write_text(f'_base_ = {base!r}\nmodel = dict(decode_head={head!r})\n')
    options = ['--shape', 64, 64, '--batch-size', 2, '--device', 'cpu']
    done = run_again(TOOL, config, *options, cwd=repo_root, check=False)
    assert done.returncode == 1
    assert 'FPNHead has no layer that takes concatenated features' in done.stderr
