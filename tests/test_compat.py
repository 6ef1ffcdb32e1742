"""Every quirk of mmseg_fusion.compat: met where it is found, left alone where the thing is fine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import importlib.metadata
import importlib.util
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import mmengine
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmengine.dataset import DefaultSampler
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner, save_checkpoint
from mmseg.registry import MODELS

from mmseg_fusion import compat
from mmseg_fusion.errors import CheckpointError

MET = {quirk.name for quirk in compat.APPLIED}
FUSION_BASE = 'mmseg_fusion::_base_/models/upernet_r18.py'
needs_lite = pytest.mark.skipif(
    'mmcv_without_ops' not in MET, reason='this mmcv has its ops, or mmseg imports without them'
)


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


# --- the installed packages --------------------------------------------------------------------

OPENMMLAB = {
    'mmengine': '0.10.7',
    'mmcv-lite': '2.1.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
    'ftfy': '6.3.1',
    'regex': '2026.11.15',
    'torchvision': '0.28.0',
}
ONEDL = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
    'torchvision': '0.28.0',
}


@pytest.fixture
def install(monkeypatch):
    """Makes ``importlib`` see these distributions, and of their modules only these."""
    modules = {name: m for t in compat.FAMILIES.values() for m, (n, *_) in t.items() for name in n}

    def pretend(distributions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in distributions:
                raise importlib.metadata.PackageNotFoundError(name)
            return distributions[name]

        present = {modules[name] for name in distributions}
        monkeypatch.setattr(importlib.metadata, 'version', version)
        monkeypatch.setattr(
            importlib.util, 'find_spec', lambda name: object() if name in present else None
        )

    return pretend


@pytest.mark.stack
def test_the_installed_stack_is_accepted():
    assert compat.check_stack() == []
    assert [package.state for package in compat.stack()] == ['ok'] * len(compat.stack())


@pytest.mark.parametrize('packages', [OPENMMLAB, ONEDL], ids=['openmmlab', 'onedl'])
def test_a_tested_stack_has_no_notes(install, packages):
    install(packages)
    assert compat.check_stack() == []


@pytest.mark.parametrize(
    ('change', 'found', 'needed', 'command'),
    [
        (
            {'mmcv-lite': '2.2.0'},
            'mmcv: found mmcv-lite 2.2.0',
            'needed mmcv-lite>=2.0.1,<2.2',
            "pip install 'mmcv-lite>=2.0.1,<2.2'",
        ),
        (
            {'mmengine': '0.7.0'},
            'mmengine: found mmengine 0.7.0',
            'needed mmengine>=0.10.5,<0.11',
            "pip install 'mmengine>=0.10.5,<0.11'",
        ),
        (
            {'mmsegmentation': None},
            'mmseg: found nothing',
            'needed mmsegmentation>=1.2.2,<1.3',
            "pip install 'mmsegmentation>=1.2.2,<1.3'",
        ),
        ({'ftfy': None}, 'ftfy: found nothing', 'needed ftfy', "pip install 'ftfy'"),
        (
            {'mmcv-lite': None, 'mmcv': '2.2.0'},
            'mmcv: found mmcv 2.2.0',
            'needed mmcv-lite>=2.0.1,<2.2',
            "pip uninstall -y mmcv\n    pip install 'mmcv-lite>=2.0.1,<2.2'",
        ),
    ],
)
def test_a_missing_or_wrong_package_says_found_needed_and_command(
    install, change, found, needed, command
):
    packages = {**OPENMMLAB, **change}
    install({name: version for name, version in packages.items() if version})
    with pytest.raises(ImportError) as error:
        compat.check_stack()
    message = str(error.value)
    assert f'{found}, {needed}' in message
    assert command in message
    assert f'pip install -r {compat.REQUIREMENTS / "openmmlab.txt"}' in message
    # Nothing else is said to be wrong.
    assert message.count(': found ') == 1


def test_the_command_for_onedl_names_its_own_packages(install):
    install({**ONEDL, 'onedl-mmcv': '2.0.0'})
    with pytest.raises(ImportError, match=r"pip install 'onedl-mmcv>=2.3.6'") as error:
        compat.check_stack()
    assert str(compat.REQUIREMENTS / 'onedl.txt') in str(error.value)


def test_the_family_without_mmseg_is_that_of_the_other_packages(install):
    install({name: version for name, version in ONEDL.items() if 'segmentation' not in name})
    with pytest.raises(ImportError, match=r'needed onedl-mmsegmentation>=1\.4\.2'):
        compat.check_stack()
    install({})
    assert compat.family() == 'openmmlab'


def test_two_families_side_by_side_are_noted_with_the_commands(install):
    install({**OPENMMLAB, **ONEDL})
    (note,) = compat.check_stack()
    command = note.split('pip uninstall -y ')[1].split(';')[0].split()
    assert set(command) == {name for name in {**OPENMMLAB, **ONEDL} if 'mm' in name}
    assert 'pip install -r' in note


def test_two_builds_of_mmcv_side_by_side_are_noted(install):
    install({**OPENMMLAB, 'mmcv': '2.1.0'})
    (note,) = compat.check_stack()
    assert 'pip uninstall -y mmcv mmcv-lite' in note


def test_a_missing_optional_package_does_not_stop_the_import(install):
    install({name: v for name, v in OPENMMLAB.items() if name not in ('mmpretrain', 'torchvision')})
    notes = compat.check_stack()
    assert [note.split(':')[0] for note in notes] == ['mmpretrain', 'torchvision']
    assert all(note.startswith(compat.OPTIONAL) for note in notes)


def test_a_source_checkout_without_metadata_is_let_be(install, monkeypatch):
    install({name: v for name, v in OPENMMLAB.items() if name != 'mmsegmentation'})
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    assert compat.check_stack() == []


@pytest.mark.stack
def test_each_quirk_is_met_once_and_documented():
    known = [quirk.__name__ for quirk in compat.QUIRKS]
    assert [quirk.name for quirk in compat.APPLIED] == [n for n in known if n in MET]
    assert all(quirk.what and quirk.until for quirk in compat.APPLIED)
    assert compat.apply() is compat.apply()


@pytest.mark.parametrize('quirk', compat.QUIRKS, ids=lambda quirk: quirk.__name__)
def test_a_quirk_stands_in_a_file_that_says_what_ends_it(quirk):
    module = sys.modules[quirk.__module__]
    assert module.__name__.startswith('mmseg_fusion.compat.')
    assert re.search(r'\b[Ee]nds with\b', module.__doc__)
    assert getattr(compat, quirk.__name__) is quirk
    assert quirk.__name__ in compat.__all__


# --- mmcv without compiled ops -------------------------------------------------------------------


@needs_lite
def test_a_layer_that_needs_a_compiled_op_names_the_op_and_the_remedy():
    from mmcv.ops import DeformConv2d, sigmoid_focal_loss

    head = dict(type='PSAHead', in_channels=8, channels=4, num_classes=3, mask_size=(9, 9))
    version = r'mmcv-lite [\d.]+ was installed without compiled ops'
    with pytest.raises(RuntimeError, match=f"op 'psamask_forward' is not available: {version}"):
        MODELS.build(head).eval()([torch.rand(1, 8, 9, 9)])
    with pytest.raises(RuntimeError, match=r"op 'deform_conv_forward'.* mim install"):
        DeformConv2d(4, 4, 3, padding=1)(torch.rand(1, 4, 8, 8), torch.rand(1, 18, 8, 8))
    with pytest.raises(RuntimeError, match=r"op 'sigmoid_focal_loss_forward'.*needs no compiled"):
        sigmoid_focal_loss(torch.rand(2, 3), torch.tensor([0, 2]), 2.0, 0.25, None, 'mean')


@pytest.mark.stack
def test_mmengine_still_sees_that_there_are_no_ops():
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    has_ops = any(p.name.startswith('_ext.') for p in Path(_origin('mmcv')).parent.iterdir())
    assert mmcv_full_available() is has_ops


def _origin(module: str) -> str:
    return importlib.util.find_spec(module).origin


@needs_lite
def test_an_extension_that_does_not_load_is_replaced_and_named(tmp_path):
    # A copy of mmcv, in links, with an extension of another build: the usual mishap after an
    # update of torch.
    package = tmp_path / 'mmcv'
    package.mkdir()
    for entry in Path(_origin('mmcv')).parent.iterdir():
        (package / entry.name).symlink_to(entry)
    (package / f'_ext{sysconfig.get_config_var("EXT_SUFFIX")}').write_bytes(b'not a library')
    code = """
        import mmcv, mmseg_fusion
        from mmcv.ops import nms
        import torch
        print(mmcv.__file__)
        print([q.what for q in mmseg_fusion.compat.APPLIED if q.name == 'mmcv_without_ops'])
        try:
            nms(torch.rand(2, 4), torch.rand(2), 0.5)
        except RuntimeError as error:
            print(error)
    """
    where, what, message = run_python(code, (tmp_path,)).stdout.splitlines()[-3:]
    assert where.startswith(str(tmp_path))
    assert 'has compiled ops that do not load here' in what
    assert "mmcv op 'nms' is not available" in message
    assert 'do not load here' in message


@pytest.mark.stack
def test_an_extension_that_is_there_is_left_alone():
    code = """
        import sys, types
        from importlib.machinery import ModuleSpec

        class Compiled(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith('__'):
                    raise AttributeError(name)
                return print

        ext = sys.modules['mmcv._ext'] = Compiled('mmcv._ext')
        ext.__spec__ = ModuleSpec('mmcv._ext', object())
        import mmseg_fusion
        assert sys.modules['mmcv._ext'] is ext
        print([q.name for q in mmseg_fusion.compat.APPLIED])
    """
    assert 'mmcv_without_ops' not in run_python(code).stdout


@pytest.mark.stack
def test_python_without_find_loader():
    code = """
        import pkgutil
        if hasattr(pkgutil, 'find_loader'):
            del pkgutil.find_loader
        import mmseg_fusion
        from mmcv.utils.ext_loader import check_ops_exist
        from mmengine.utils.dl_utils.misc import mmcv_full_available
        print(mmcv_full_available(), check_ops_exist(), hasattr(pkgutil, 'find_loader'))
    """
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert run_python(code).stdout.split()[-3:] == [str(mmcv_full_available())] * 2 + ['False']


@pytest.mark.stack
@pytest.mark.parametrize('setuptools', [True, False])
def test_python_without_distutils(setuptools):
    # As Python 3.12 without setuptools' .pth file; setuptools brings it when it is imported.
    code = f"""
        import importlib.machinery, importlib.util, sys, warnings
        from mmengine.utils.dl_utils.collect_env import collect_env
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == 'distutils' else find(name, *a)
        if not {setuptools}:
            sys.modules['setuptools'] = None
        warnings.simplefilter('always')
        import mmseg_fusion
        from mmseg_fusion import compat
        asks = 'distutils' in collect_env.__code__.co_names
        print(asks, any(quirk.name == 'distutils_removed' for quirk in compat.APPLIED))
    """
    result = run_python(code)
    asks, met = result.stdout.split()[-2:]
    assert met == str(asks == 'True' and setuptools)
    warned = "pip install 'setuptools<81'" in result.stderr
    assert warned == (asks == 'True' and not setuptools)


# --- torchvision beside another build of torch ---------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='mmpretrain.EfficientNet', arch='b0'),
        dict(type='mmpretrain.ConvNeXt', arch='tiny', gap_before_final_norm=False),
    ],
    ids=lambda backbone: backbone['type'],
)
def test_backbones_of_mmpretrain_build_and_run(backbone):
    import mmpretrain.models  # noqa: F401  (registers them)

    model = MODELS.build(backbone)
    model.eval()
    with torch.no_grad():
        features = model(torch.rand(1, 3, 32, 32))
    assert torch.isfinite(features[-1]).all()


@pytest.mark.stack
def test_an_op_of_torchvision_works_or_says_what_does_not_match():
    import torchvision

    boxes, scores = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]]), torch.ones(2)
    if 'torchvision_build_mismatch' not in MET:
        assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0]
        return
    with pytest.raises(RuntimeError, match='torchvision versions are incompatible'):
        torchvision.ops.nms(boxes, scores, 0.5)
    wanted = r"op 'nms' is not available: torchvision \S+ does not match torch .* Install"
    with pytest.raises(RuntimeError, match=wanted):
        torch.ops.torchvision.nms(boxes, scores, 0.5)


def test_a_torchvision_that_loads_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    monkeypatch.setattr(torch.ops, 'load_library', lambda path: None)
    assert compat.torchvision_build_mismatch() is None


@pytest.mark.stack
def test_the_environment_report_works():
    from mmseg.utils import collect_env

    report = collect_env()
    assert report['MMEngine'] == mmengine.__version__
    assert report['TorchVision'].split('+')[0] == importlib.metadata.version('torchvision')
    assert 'MMSegmentation' in report


# --- resuming ------------------------------------------------------------------------------------


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


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Runner]:
    """A folder with the checkpoints of two iterations, and the runner that wrote them."""
    work_dir = tmp_path_factory.mktemp('trained')
    runner = make_runner(work_dir, 2)
    runner.train()
    return work_dir, runner


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


# --- checkpoints from anywhere -------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


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


def test_a_file_that_was_not_torch_saves_says_what_it_is(tmp_path, loader, web):
    address, folder = web
    whole = saved(folder / 'whole.pth', dict(a=torch.zeros(999)), 'zip').read_bytes()
    for name, content, words in (
        ('empty', b'', 'the file is empty'),
        ('text', b'some words\n' * 9, 'it is a text file'),
        ('page', b'<!DOCTYPE html>404', 'it is a web page'),
        ('lfs', b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        ('half', whole[: len(whole) // 2], 'it is truncated'),
    ):
        (folder / f'{name}.pth').write_bytes(content)
        for path in (str(folder / f'{name}.pth'), f'{address}/{name}.pth'):
            with pytest.raises(CheckpointError) as wrong:
                loader.load_checkpoint(path)
            assert words in str(wrong.value)
            assert path in str(wrong.value)
            assert ('delete it there' in str(wrong.value)) == path.startswith('http')
    with pytest.raises(FileNotFoundError):
        loader.load_checkpoint(str(folder / 'none.pth'))


def test_a_zoo_that_has_no_such_model_says_so():
    from mmengine.runner import CheckpointLoader

    with pytest.raises(CheckpointError, match="torchvision:// knows no model 'resnet51'"):
        CheckpointLoader.load_checkpoint('torchvision://resnet51')


# --- checkpoints that a kill leaves ------------------------------------------------------------


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


# --- values with blanks on the command line ------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('my data/a b', 'my data/a b'),
        ('"my data"', 'my data'),
        (' 3 ', 3),
        ('[1, 2, (a b, c)]', [1, 2, ('a b', 'c')]),
        ('a b, c d', ['a b', 'c d']),
        ('[(1, 2), [x, None], True]', [(1, 2), ['x', None], True]),
        ('1e-4', 1e-4),
        ('', ''),
    ],
)
def test_options_keep_the_blanks_inside_a_value(text, value):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    found = parser.parse_args(['--cfg-options', f'data.root={text}']).cfg_options
    assert found == {'data.root': value}
    assert type(found['data.root']) is type(value)


def test_options_that_keep_their_blanks_are_left_alone(monkeypatch):
    monkeypatch.setattr(DictAction, '_parse_iterable', staticmethod(lambda value: value))
    assert compat.blanks_in_options() is None


# --- configs of installed packages ---------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize(
    ('base', 'head'),
    [
        (FUSION_BASE, 'UPerHead'),
        ('mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', 'PSPHead'),
        ('mmseg::_base_/models/upernet_swin.py', 'UPerHead'),
    ],
)
def test_a_config_inherits_from_an_installed_package(tmp_path, base, head):
    (tmp_path / 'config.py').write_text(f'_base_ = {base!r}\n')
    config = Config.fromfile(tmp_path / 'config.py')
    assert config.model.decode_head.type == head
    # What it names is found: in the registries of mmseg.
    assert type(MODELS.build(config.model)).__name__ == 'EncoderDecoder'


@pytest.mark.stack
def test_a_config_inherits_beside_setuptools_without_pkg_resources(tmp_path):
    (tmp_path / 'config.py').write_text(f'_base_ = {FUSION_BASE!r}\n')
    (tmp_path / 'stock.py').write_text("_base_ = 'mmseg::_base_/models/pspnet_r50-d8.py'\n")
    code = f"""
        import sys
        sys.modules['pkg_resources'] = None
        import mmseg_fusion
        from mmengine.config import Config, DictAction
        for name in ('config', 'stock'):
            print(Config.fromfile(rf'{tmp_path}/{{name}}.py').model.decode_head.type)
    """
    assert run_python(code).stdout.splitlines()[-2:] == ['UPerHead', 'PSPHead']


@pytest.mark.stack
def test_installed_packages_are_found():
    from mmengine.utils import get_installed_path, is_installed

    for module in ('mmseg', 'mmengine', 'mmseg_fusion'):
        assert is_installed(module)
        assert get_installed_path(module) == str(Path(_origin(module)).parent)
    assert get_installed_path(compat.FAMILIES[compat.family()]['mmseg'][0][0]) == str(
        Path(_origin('mmseg')).parent
    )
    assert is_installed('pytest')
    assert not is_installed('no-such-package')
    with pytest.raises(Exception, match='no-such-package'):
        get_installed_path('no-such-package')


@pytest.mark.stack
def test_the_hub_reads_a_config_of_mmseg():
    from mmengine.hub import get_config

    config = get_config('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py')
    assert config.model.decode_head.type == 'FCNHead'


# --- several processes, and mixed precision, without a GPU ---------------------------------------


@pytest.mark.stack
def test_distributed_training_on_the_cpu(tmp_path):
    # One process is enough to meet all that mmengine asks of CUDA; two: tests/tools/test_dist.py.
    code = f"""
        import atexit
        import sys
        import torch
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        # Registered first, it runs last.
        atexit.register(lambda: print('still a group', torch.distributed.is_initialized()))
        import mmseg_fusion
        from mmengine.config import Config, DictAction
        from tests import test_compat

        class Normed(test_compat.Line):
            def __init__(self):
                super().__init__()
                self.norm = torch.nn.SyncBatchNorm(1)

            def forward(self, inputs, mode='tensor'):
                return dict(loss=self.norm(self.linear(torch.stack(inputs))).square().mean())

        test_compat.Line = Normed
        from pathlib import Path
        runner = test_compat.make_runner(
            Path({str(tmp_path)!r}), 2, launcher='pytorch',
            env_cfg=dict(dist_cfg=dict(backend='nccl')), cfg=Config(dict(sync_bn='torch')))
        runner.train()
        print(type(runner.model).__name__, runner.model.device_ids, runner.cfg.sync_bn)
        print(type(runner.model.module.norm).__name__, torch.distributed.get_backend())
        print('device untouched', torch.cuda.set_device.__module__)
    """
    env = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    result = run_python(code, **env)
    assert result.stdout.splitlines()[-4:] == [
        'MMDistributedDataParallel None torch',
        '_BatchNormXd gloo',
        'device untouched torch.cuda',
        'still a group False',
    ]
    log = result.stdout + result.stderr
    assert 'gloo instead of nccl' in log
    assert 'SyncBatchNorm needs GPUs: 1 layers are BatchNorm here' in log


@pytest.mark.stack
def test_mixed_precision_on_the_cpu():
    code = """
        import torch
        import mmseg_fusion
        from mmengine.optim import AmpOptimWrapper

        model = torch.nn.Linear(4, 1)
        wrapper = AmpOptimWrapper(
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1), dtype='float16',
            loss_scale='dynamic', clip_grad=dict(max_norm=1))
        before = model.weight.clone()
        with wrapper.optim_context(model):
            output = model(torch.ones(2, 4))
            wrapper.update_params(output.float().mean())
        wrapper.load_state_dict(wrapper.state_dict())
        # d mean / d w = 1 for each of the 4 weights and the bias: norm sqrt(5), clipped to 1.
        print(output.dtype, model.weight.dtype, torch.allclose(
            before - model.weight, torch.full((1, 4), 0.1 / 5 ** 0.5), atol=1e-5))
    """
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == 'torch.bfloat16 torch.float32 True'
    assert 'bfloat16 on the CPU instead of float16' in result.stdout + result.stderr


def test_a_machine_with_a_gpu_is_left_alone(monkeypatch):
    from mmengine.dist import utils

    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cuda')
    before = Runner.wrap_model, utils._init_dist_pytorch
    assert compat.distributed_without_cuda() is None
    assert compat.amp_without_cuda() is None
    assert (Runner.wrap_model, utils._init_dist_pytorch) == before


# --- deterministic runs on a GPU -----------------------------------------------------------------


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


# --- cross entropy with class weights ------------------------------------------------------------

WEIGHT = (0.5, 2.0, 1.0, 0.1)


def _logits_and_label() -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.randint(0, 4, (2, 5, 5))
    label[:, :2] = 255
    return torch.randn(2, 4, 5, 5, requires_grad=True), label


@pytest.mark.stack
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``')
@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_class_weights_with_ignored_pixels_give_torchs_mean(avg_non_ignore):
    loss = MODELS.build(
        dict(type='CrossEntropyLoss', class_weight=WEIGHT, avg_non_ignore=avg_non_ignore)
    )
    logits, label = _logits_and_label()
    ours = loss(logits, label, ignore_index=255)
    expected = F.cross_entropy(logits, label, torch.tensor(WEIGHT), ignore_index=255)
    torch.testing.assert_close(ours, expected)
    ours, expected = (torch.autograd.grad(x, logits)[0] for x in (ours, expected))
    torch.testing.assert_close(ours, expected)


@pytest.mark.stack
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``')
@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_class_weights_with_every_pixel_ignored_give_zero(avg_non_ignore):
    loss = MODELS.build(
        dict(type='CrossEntropyLoss', class_weight=WEIGHT, avg_non_ignore=avg_non_ignore)
    )
    logits, label = _logits_and_label()
    ours = loss(logits, torch.full_like(label, 255), ignore_index=255)
    ours.backward()
    assert ours == 0
    assert (logits.grad == 0).all()


@pytest.mark.stack
@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_cross_entropy_without_class_weights_is_unchanged(avg_non_ignore):
    from mmseg.models.losses import cross_entropy

    logits, label = _logits_and_label()
    total = F.cross_entropy(logits, label, ignore_index=255, reduction='sum')
    pixels = (label != 255).sum() if avg_non_ignore else label.numel()
    ours = cross_entropy(logits, label, ignore_index=255, avg_non_ignore=avg_non_ignore)
    torch.testing.assert_close(ours, total / pixels)


@pytest.mark.stack
def test_other_reductions_with_class_weights_are_unchanged():
    from mmseg.models.losses import cross_entropy

    logits, label = _logits_and_label()
    weight = torch.tensor(WEIGHT)
    for reduction in ('none', 'sum'):
        ours = cross_entropy(
            logits, label, class_weight=weight, ignore_index=255, reduction=reduction
        )
        expected = F.cross_entropy(logits, label, weight, ignore_index=255, reduction=reduction)
        torch.testing.assert_close(ours, expected)
    ours = cross_entropy(logits, label, class_weight=weight, ignore_index=255, avg_factor=7)
    expected = F.cross_entropy(logits, label, weight, ignore_index=255, reduction='sum') / 7
    torch.testing.assert_close(ours, expected)


@pytest.mark.stack
def test_a_cross_entropy_that_works_is_left_alone():
    from mmseg.models.losses import cross_entropy_loss

    before = cross_entropy_loss.cross_entropy
    assert compat.cross_entropy_class_weight() is None
    assert cross_entropy_loss.cross_entropy is before
