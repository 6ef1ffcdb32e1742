"""A fresh interpreter, a run of milliseconds, and checkpoints in every form."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmseg_fusion import compat

MET = {quirk.name for quirk in compat.APPLIED}


def run_python(
    code: str, path: tuple[Path, ...] = (), check: bool = True, **env: str
) -> subprocess.CompletedProcess:
    """Runs ``code`` in a fresh interpreter that sees no GPU, with ``path`` first on its path."""
    root = Path(compat.__file__).parents[2]
    full = dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', **env)
    full['PYTHONPATH'] = os.pathsep.join(map(str, [*path, root]))
    full.pop('PYTEST_XDIST_WORKER', None)
    result = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], env=full, capture_output=True, text=True
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def origin(module: str) -> str:
    """The file of an installed module."""
    return importlib.util.find_spec(module).origin


class Line(BaseModel):
    """One weight, so that a training run takes milliseconds."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(torch.stack(inputs)).square().mean())


def make_runner(work_dir: Path, iterations: int, **kwargs) -> Runner:
    dataset = [dict(inputs=torch.full((1,), float(i))) for i in range(8)]
    loader = dict(dataset=dataset, sampler=dict(type=DefaultSampler, shuffle=False), batch_size=2)
    hooks = dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    )
    return Runner(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        param_scheduler=dict(type='PolyLR', by_epoch=False, begin=0, end=4),
        default_hooks=hooks,
        log_processor=dict(by_epoch=False),
        experiment_name=f'{work_dir.name}_{iterations}_{len(kwargs)}',
        default_scope='mmengine',
        **kwargs,
    )


def saved(path: Path, content: object, form: str) -> Path:
    """A checkpoint in one of the forms that torch reads."""
    if form == 'tar':
        data = pickle.dumps(content, 2)
        with tarfile.open(path, 'w') as archive:
            for name in ('sys_info', 'pickle', 'storages', 'tensors'):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    return path
