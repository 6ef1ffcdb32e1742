"""Checkpoints load as tensors and plain values: on resuming, and from anywhere."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmseg_fusion import compat
from mmseg_fusion.errors import CheckpointError

from .running import MET, make_runner, saved


@pytest.fixture
def loads(monkeypatch) -> list[bool]:
    """What each call of torch.load from here on had as its ``weights_only``."""
    seen, load = [], torch.load

    @functools.wraps(load)
    def recorded(*args, weights_only=None, **kwargs):
        # torch reads None as True since 2.6.
        seen.append(weights_only is not False)
        return load(*args, weights_only=weights_only, **kwargs)

    monkeypatch.setattr(torch, 'load', recorded)
    return seen


@pytest.mark.stack
def test_a_run_resumes_with_weights_only_left_on(trained, loads):
    work_dir, before = trained
    runner = make_runner(work_dir, 4, resume=True)
    runner.load_or_resume()
    assert loads == [True]
    assert runner.iter == 2
    scheduler, old = runner.param_schedulers[0], before.param_schedulers[0]
    assert scheduler.last_step == old.last_step == 2
    state = runner.optim_wrapper.state_dict()['state'][0]['momentum_buffer']
    assert torch.equal(state, before.optim_wrapper.state_dict()['state'][0]['momentum_buffer'])
    history = runner.message_hub.get_scalar('train/loss')
    assert isinstance(history, HistoryBuffer)
    assert len(history.data[0]) == 2
    assert history.statistics('mean', 2) == pytest.approx(history.data[0].mean())
    runner.train()
    assert runner.iter == 4
    assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 4


@pytest.mark.stack
def test_a_run_starts_from_the_weights_of_a_checkpoint(trained, loads):
    work_dir, before = trained
    runner = make_runner(work_dir, 4, load_from=str(work_dir / 'iter_2.pth'))
    runner.load_or_resume()
    assert loads == [True]
    assert runner.iter == 0
    assert torch.equal(runner.model.linear.weight, before.model.linear.weight)


needs_safe_globals = pytest.mark.skipif(
    'resume_weights_only' not in MET, reason='mmengine or torch needs no help here'
)


@needs_safe_globals
def test_without_the_quirk_the_same_checkpoint_is_refused(trained):
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    safe = get_safe_globals()
    clear_safe_globals()
    try:
        with pytest.raises(Exception, match='Weights only load failed'):
            torch.load(trained[0] / 'iter_2.pth')
    finally:
        add_safe_globals(safe)
    assert 'message_hub' in torch.load(trained[0] / 'iter_2.pth')


@needs_safe_globals
def test_a_checkpoint_of_the_other_numpy_major_loads():
    buffer = io.BytesIO()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save(history, buffer, _use_new_zipfile_serialization=False)
    names = b'numpy._core.multiarray', b'numpy.core.multiarray'
    data = buffer.getvalue()
    ours, theirs = names if names[0] in data else names[::-1]
    assert ours in data
    loaded = torch.load(io.BytesIO(data.replace(ours, theirs)))
    assert loaded.data[0].tolist() == [1.0, 2.0]


class Reaching:
    """Asks, when it is loaded, for something that a checkpoint has no use for."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@needs_safe_globals
@pytest.mark.parametrize('content', [Reaching(), Path('/')], ids=['getattr', 'other type'])
def test_what_a_checkpoint_has_no_use_for_stays_forbidden(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    with pytest.raises(Exception, match=r'statistics of HistoryBuffer|Weights only load failed'):
        torch.load(buffer)


def test_safe_globals_are_left_alone_where_nothing_is_wrong(monkeypatch):
    from mmengine.runner import checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'get_torch_safe_globals', list, raising=False)
        assert compat.resume_weights_only() is None
    monkeypatch.setattr(torch, '__version__', '2.4.1')
    assert compat.resume_weights_only() is None


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


#: A name of every scheme; those of a zoo lead to the server.
SCHEMES = {
    '': '{folder}/{name}',
    'http://': '{web}/{name}',
    'https://': '{web}/{name}',
    'torchvision://': 'torchvision://{name}',
    'modelzoo://': 'modelzoo://{name}',
    'open-mmlab://': 'open-mmlab://{name}',
    'openmmlab://': 'openmmlab://{name}',
    'mmcls://': 'mmcls://{name}',
    'pavi://': 'pavi://{name}',
    r'(\S+\:)?s3://': 's3://bucket/{name}',
    r'(\S+\:)?petrel://': 'petrel://bucket/{name}',
    'later://': 'later://{name}',
}


@pytest.mark.stack
@pytest.mark.parametrize('form', ['zip', 'legacy', 'tar'])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_checkpoint_of_any_scheme_runs_no_code(loader, web, tmp_path, scheme, form):
    address, folder = web
    # Every scheme that mmengine knows stands in the table; that of this package is attacked in
    # tests/models/backbones/test_package_checkpoint.py.
    assert {*SCHEMES, 'package://'} >= set(loader._schemes)
    ran = tmp_path / 'ran'
    good = saved(folder / f'good_{form}.pth', dict(state_dict=dict(a=torch.ones(2))), form)
    bad = saved(folder / f'bad_{form}.pth', dict(state_dict=Payload(ran)), form)
    name = SCHEMES[scheme].format(folder=folder, web=address, name=bad.name)
    with pytest.raises(CheckpointError) as refused:
        loader.load_checkpoint(name, map_location='cpu')
    assert not ran.exists()
    assert name in str(refused.value)
    assert ('tar' if form == 'tar' else 'open') in str(refused.value)
    if form != 'tar' and scheme != 'mmcls://':  # which takes the backbone's part
        name = SCHEMES[scheme].format(folder=folder, web=address, name=good.name)
        state = loader.load_checkpoint(name, map_location='cpu')['state_dict']
        assert torch.equal(state['a'], torch.ones(2))


def test_the_payload_runs_where_nothing_holds_it(tmp_path):
    # The attack itself: without this the tests above would show nothing.
    path = saved(tmp_path / 'bad.pth', Payload(tmp_path / 'ran'), 'zip')
    torch.load(path, weights_only=False)
    assert (tmp_path / 'ran').exists()


@pytest.mark.stack
def test_torch_load_elsewhere_is_as_it_was(tmp_path):
    path = saved(tmp_path / 'any.pth', Payload(tmp_path / 'ran'), 'zip')
    with contextlib.suppress(CheckpointError):
        from mmengine.runner import CheckpointLoader

        CheckpointLoader.load_checkpoint(str(path))
    assert not (tmp_path / 'ran').exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / 'ran').exists()


@pytest.mark.stack
def test_a_training_checkpoint_loads_from_a_server(trained, loader, web):
    # Its message hub holds more than tensors.
    address, folder = web
    shutil.copy(trained[0] / 'iter_2.pth', folder / 'training.pth')
    loaded = loader.load_checkpoint(f'{address}/training.pth', map_location='cpu')
    assert isinstance(loaded['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
