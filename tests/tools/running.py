"""Running a tool as a user does, on a config that trains in seconds."""

from __future__ import annotations

import atexit
import copy
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from mmengine.config import Config
from mmengine.runner import CheckpointLoader

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
SITE = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]


def environment(**more: str) -> dict[str, str]:
    """One thread, no GPU, and the installed packages without this one: a tool finds its own."""
    env = dict(
        os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.pathsep.join(SITE)
    )
    env.pop('PYTEST_XDIST_WORKER', None)
    return {**env, **more}


def run(
    tool: Path | str, *arguments: object, cwd: Path, check: bool = True
) -> subprocess.CompletedProcess:
    """Runs a Python tool in ``cwd``, without the environment's own install of this package."""
    # -S: a .pth file of an editable install is not read.
    command = [sys.executable, '-S', str(tool), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@functools.cache
def forking() -> tuple[subprocess.Popen, Path]:
    """The program that forks, one per test process, and a ``python`` that is a fork of it."""
    # A socket's path has 107 characters at most: none of pytest's folders.
    folder = tempfile.TemporaryDirectory()
    door, python = Path(folder.name, 'door'), Path(folder.name, 'python')
    here = Path(__file__)
    program = subprocess.Popen(
        [sys.executable, '-S', str(here.with_name('forking.py')), str(door)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    names = f'SOCKET, PYTHON = {str(door)!r}, {sys.executable!r}'
    source = here.with_name('knocking.py').read_text(encoding='utf-8')
    # -I and -S: it starts in hundredths of a second.
    python.write_text(f'#!{sys.executable} -IS\n' + source.replace("SOCKET = PYTHON = ''", names))
    python.chmod(0o755)

    def stop() -> None:
        program.stdin.close()
        program.wait()
        folder.cleanup()

    atexit.register(stop)
    assert program.stdout.readline() == 'ready\n'
    return program, python


def forked_python() -> str:
    """A ``python``, to run tools and ``-m`` modules, that forks instead of importing for seconds.

    For what starts others, such as a launch script: the rest of it is as with Python's own.
    """
    return str(forking()[1])


class Again:
    """A tool that has been started, in a fork, and may be killed; ended before the next starts.

    Args:
        argv: the tool and its arguments.
        cwd: the folder to run in.
        stdout: file, or named pipe, for what it prints.
        stderr: likewise.
        python: the interpreter with which it starts other programs; None for this one.
    """

    def __init__(
        self, argv: list[str], cwd: Path, stdout: Path, stderr: Path, python: str | None = None
    ):
        self._program = forking()[0]
        job = dict(argv=argv, cwd=str(cwd), stdout=str(stdout), stderr=str(stderr), python=python)
        self._program.stdin.write(json.dumps(job) + '\n')
        self._program.stdin.flush()
        self.pid = int(self._program.stdout.readline())

    def running(self) -> bool:
        """Whether it has not ended yet."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        """The exit code, once it has ended; the negative signal where one has ended it."""
        return int(self._program.stdout.readline())


def run_again(
    tool: Path | str, *arguments: object, cwd: Path, check: bool = True, python: str | None = None
) -> subprocess.CompletedProcess:
    """:func:`run` without the seconds of imports: test_imports.py looks at those of every tool.

    It is a process of its own as well, with its own exit code, output and folder. What it starts
    with ``python``, such as :func:`forked_python`, is one too.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ('stdout', 'stderr')]
        argv = [str(tool), *map(str, arguments)]
        code = Again(argv, cwd, *printed, python).wait()
        result = subprocess.CompletedProcess(argv, code, *(path.read_text() for path in printed))
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def load_tool(path: Path) -> ModuleType:
    """A tool as a module, once; it may import the modules beside it."""
    if path.stem not in sys.modules:
        sys.path.insert(0, str(path.parent))
        try:
            importlib.import_module(path.stem)
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[path.stem]


def read_bases_once(patch: pytest.MonkeyPatch) -> None:
    """Lets mmengine read a file of configs/, which no test changes, once: it is a base of many."""
    file2dict, known = Config._file2dict, {}

    def read(filename: str, *arguments: object, **options: object) -> tuple:
        if not Path(filename).resolve().is_relative_to(ROOT / 'configs'):
            return file2dict(filename, *arguments, **options)
        key = (str(filename), arguments, tuple(options.items()))
        if key not in known:
            known[key] = file2dict(filename, *arguments, **options)
        return copy.deepcopy(known[key])

    patch.setattr(Config, '_file2dict', staticmethod(read))


def load(checkpoint: Path) -> dict:
    """A checkpoint of a training run, read as mmengine reads it."""
    return CheckpointLoader.load_checkpoint(str(checkpoint), map_location='cpu')


def small_config(
    folder: Path,
    hook: bool = False,
    iterations: int = 6,
    installed: bool = False,
    width: int = 8,
) -> Path:
    """Writes a config on FusionShapes with tiny images and heads.

    Args:
        folder: where to.
        hook: whether it has the ScaleEqualizerHook.
        iterations: of training; validated after the last, saved every 3.
        installed: whether it inherits from ``mmseg_fusion::...`` instead of a path.
        width: channels of the first stage; ResNet-18 has 64. With 8 there are 0.2 million
            parameters, and a checkpoint takes 1 MB.

    Returns:
        The path of the config.
    """
    bases = sorted((ROOT / 'configs' / 'fusion_shapes').glob('upernet_r18_*.py'))
    base = next(path for path in bases if ('scale-eq' in path.name) is hook)
    parent = f'mmseg_fusion::fusion_shapes/{base.name}' if installed else str(base)
    levels = [width, 2 * width, 4 * width, 8 * width]
    loader = 'num_workers=0, persistent_workers=False'
    path = folder / 'small.py'
    path.write_text(
        f'_base_ = {parent!r}\n'
        'crop_size = (64, 64)\n'
        'model = dict(\n'
        '    data_preprocessor=dict(size=crop_size),\n'
        f'    backbone=dict(base_channels={width}, stem_channels={width}),\n'
        f'    decode_head=dict(in_channels={levels}, channels=16, dropout_ratio=0.0),\n'
        f'    auxiliary_head=dict(in_channels={levels[2]}, channels=8, dropout_ratio=0.0))\n'
        # Nothing random: a run that resumes may skip scenes without drawing numbers for them.
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),\n"
        "    dict(type='PackSegInputs')]\n"
        f'train_dataloader = dict(batch_size=2, {loader},\n'
        '    dataset=dict(size=crop_size, length=8, pipeline=pipeline))\n'
        f'val_dataloader = dict(batch_size=1, {loader},\n'
        '    dataset=dict(size=crop_size, length=3))\n'
        f'test_dataloader = dict(batch_size=1, {loader},\n'
        '    dataset=dict(size=crop_size, length=3))\n'
        f'train_cfg = dict(max_iters={iterations}, val_interval={iterations})\n'
        'default_hooks = dict(\n'
        '    logger=dict(interval=1),\n'
        '    checkpoint=dict(interval=3, save_best=None),\n'
        "    visualization=dict(type='SegVisualizationHook', interval=1))\n"
        'randomness = dict(seed=0, deterministic=True)\n'
    )
    return path
