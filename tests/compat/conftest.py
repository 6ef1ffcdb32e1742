"""A finished run, a web server, and a loader of checkpoints whose stores are stand-ins."""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from .running import make_runner


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Runner]:
    """A folder with the checkpoints of two iterations, and the runner that wrote them."""
    work_dir = tmp_path_factory.mktemp('trained')
    runner = make_runner(work_dir, 2)
    runner.train()
    return work_dir, runner


@pytest.fixture(scope='module')
def web(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a server on this machine, and the folder that it serves."""
    folder = tmp_path_factory.mktemp('web')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f'http://127.0.0.1:{server.server_port}', folder
        server.shutdown()


@pytest.fixture
def loader(web, monkeypatch, tmp_path):
    """mmengine's CheckpointLoader, with stand-ins for the stores that schemes lead to."""
    from mmengine.runner import CheckpointLoader, checkpoint

    address, folder = web
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    zoo = type('Zoo', (dict,), dict(__getitem__=lambda self, name: f'{address}/{name}'))
    for name in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(checkpoint, name, zoo)
    monkeypatch.setattr(checkpoint, 'get_deprecated_model_names', dict)
    store = types.SimpleNamespace(get=lambda uri: (folder / Path(uri).name).read_bytes())
    monkeypatch.setattr(checkpoint, 'get_file_backend', lambda *_, **__: store)

    def model(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            name=name, download=lambda path: shutil.copy(folder / name, path)
        )

    pavi = types.ModuleType('pavi')
    pavi.modelcloud = types.SimpleNamespace(get=model)
    monkeypatch.setitem(sys.modules, 'pavi', pavi)

    def load_from_later(filename: str, map_location: str | None = None) -> object:
        # Whatever a loader that is registered later asks for.
        kwargs = dict(map_location=map_location, weights_only=False)
        return torch.load(folder / filename[len('later://') :], **kwargs)

    monkeypatch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
    CheckpointLoader.register_scheme('later://', load_from_later)
    return CheckpointLoader
