"""A checkpoint is whole, or not there, after a kill or on a full disk."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from mmengine.runner import save_checkpoint

from .running import run_python


@pytest.mark.stack
def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    from mmengine.fileio import LocalBackend

    path = tmp_path / 'iter_1.pth'
    save_checkpoint(dict(a=torch.ones(3)), str(path))
    before = path.read_bytes()

    def half(self, data: bytes, name: str) -> None:
        Path(name).write_bytes(data[: len(data) // 2])
        raise OSError('No space left on device')

    monkeypatch.setattr(LocalBackend, 'put', half)
    for name in ('iter_1.pth', 'best_mIoU.pth'):
        with pytest.raises(OSError, match='No space left'):
            save_checkpoint(dict(a=torch.zeros(3)), str(tmp_path / name))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.stack
def test_a_kill_leaves_no_checkpoint_in_part(tmp_path):
    result = run_python(
        f"""
        import os, signal
        import mmseg_fusion, torch
        from mmengine.fileio import LocalBackend
        from mmengine.runner import save_checkpoint

        def killed(self, data, name):
            with open(name, 'wb') as file:
                file.write(data[:len(data) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        LocalBackend.put = killed
        save_checkpoint(dict(a=torch.zeros(3)), {str(tmp_path / 'iter_1.pth')!r})
        """,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert list(tmp_path.glob('*.pth')) == []
    # What is left is written over by the next save.
    assert [p.name for p in tmp_path.iterdir()] == ['.iter_1.pth.unfinished']
    save_checkpoint(dict(a=torch.ones(3)), str(tmp_path / 'iter_1.pth'))
    assert [p.name for p in tmp_path.iterdir()] == ['iter_1.pth']


@pytest.mark.stack
def test_the_runner_saves_whole_checkpoints(trained, monkeypatch):
    from mmengine.fileio import LocalBackend

    names, put = [], LocalBackend.put
    monkeypatch.setattr(
        LocalBackend, 'put', lambda self, data, name: names.append(name) or put(self, data, name)
    )
    work_dir, runner = trained
    runner.save_checkpoint(str(work_dir), 'best_loss.pth', by_epoch=False)
    assert [Path(name).name for name in names] == ['.best_loss.pth.unfinished']
    (work_dir / 'best_loss.pth').unlink()
