"""Deterministic runs on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from mmseg_fusion import compat


@pytest.mark.stack
def test_deterministic_runs_warn_on_a_gpu(monkeypatch):
    from mmengine.runner import runner

    original = runner.set_random_seed
    assert compat.deterministic_on_cuda() is None
    assert runner.set_random_seed is original
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    monkeypatch.setattr(runner, 'set_random_seed', original)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    assert compat.deterministic_on_cuda().name == 'deterministic_on_cuda'
    before = torch.are_deterministic_algorithms_enabled()
    try:
        assert runner.set_random_seed(3, deterministic=True) == 3
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
        first = torch.rand(2)
        runner.set_random_seed(3, deterministic=False)
        assert torch.equal(torch.rand(2), first)
    finally:
        torch.use_deterministic_algorithms(before)
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)
