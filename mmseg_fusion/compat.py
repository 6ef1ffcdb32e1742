"""Third-party quirks, each with the version that makes it unnecessary.

:func:`apply` runs once when :mod:`mmseg_fusion` is imported, before anything of MMSegmentation
is. A quirk acts only where it is found, never replaces a working part and is listed, with what it
did, by ``python -m mmseg_fusion``.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import pkgutil
import re
import sys
import tarfile
import time
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from .errors import CheckpointError

Family = Literal['openmmlab', 'onedl']

#: What MMSegmentation itself needs, per family: module -> (distributions, lowest, below). The last
#: distribution is the one to install: mmcv-lite needs no compiler.
FAMILIES: dict[Family, dict[str, tuple[tuple[str, ...], str | None, str | None]]] = {
    'openmmlab': {
        'mmengine': (('mmengine-lite', 'mmengine'), '0.10.5', '0.11'),
        'mmcv': (('mmcv', 'mmcv-lite'), '2.0.1', '2.2'),
        'mmseg': (('mmsegmentation',), '1.2.2', '1.3'),
        'mmpretrain': (('mmpretrain',), '1.2.0', '1.3'),
        # mmpretrain imports it and does not declare it.
        'torchvision': (('torchvision',), None, None),
        # mmseg.models imports them, mmsegmentation does not declare them.
        'ftfy': (('ftfy',), None, None),
        'regex': (('regex',), None, None),
    },
    'onedl': {
        'mmengine': (('onedl-mmengine',), '0.10.12', None),
        'mmcv': (('onedl-mmcv',), '2.3.6', None),
        'mmseg': (('onedl-mmsegmentation',), '1.4.2', None),
        'mmpretrain': (('onedl-mmpretrain',), '1.3.6', None),
        'torchvision': (('torchvision',), None, None),
    },
}
#: Modules that a stack may lack: only some backbones come from there.
OPTIONAL = ('mmpretrain', 'torchvision')
#: Pinned, tested versions, one file per family; a wheel carries them.
REQUIREMENTS = Path(__file__).parent / '.mim' / 'requirements'


@dataclass(frozen=True)
class Quirk:
    """One third-party quirk that was found and met.

    Attributes:
        name: short name, the name of the function that meets it.
        what: what was found and what was done.
        until: the version that makes the quirk unnecessary.
    """

    name: str
    what: str
    until: str


#: Filled by :func:`apply`.
APPLIED: list[Quirk] = []


# --- the installed packages --------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """What is installed of one module that MMSegmentation needs.

    Attributes:
        module: the name to import.
        distribution: the name to install.
        found: versions by distribution name; empty for a source checkout, which has no metadata.
        needed: one requirement, as pip takes it.
        state: ``'missing'``, ``'wrong'`` (a version that MMSegmentation refuses) or ``'ok'``.
    """

    module: str
    distribution: str
    found: dict[str, str]
    needed: str
    state: Literal['ok', 'missing', 'wrong']

    def __str__(self) -> str:
        found = ' and '.join(f'{name} {version}' for name, version in self.found.items())
        return f'{self.module}: found {found or "nothing"}, needed {self.needed}'


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those of ``distributions`` that are installed, by distribution name."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _of_family(kind: Family) -> dict[str, str]:
    """The installed mm* distributions of one family."""
    return installed(
        name for names, _, _ in FAMILIES[kind].values() for name in names if 'mm' in name
    )


def family() -> Family:
    """``'openmmlab'`` or ``'onedl'``: the family that the installed mmseg belongs to.

    Without any mmseg it is the family of the other mm* packages, ``'openmmlab'`` without those.
    """
    for kind in FAMILIES:
        if installed(FAMILIES[kind]['mmseg'][0]):
            return kind
    return 'onedl' if _of_family('onedl') and not _of_family('openmmlab') else 'openmmlab'


def stack() -> list[Package]:
    """Every module of :data:`FAMILIES` for the installed family, with what is installed of it."""
    from packaging.version import Version

    packages = []
    for module, (names, low, below) in FAMILIES[family()].items():
        found = installed(names)
        bounds = [f'>={low}'] * bool(low) + [f'<{below}'] * bool(below)
        needed = names[-1] + ','.join(bounds)
        state = 'ok'
        if not found and importlib.util.find_spec(module) is None:
            state = 'missing'
        for version in map(Version, found.values()):
            if (low and version < Version(low)) or (below and version >= Version(below)):
                state = 'wrong'
        packages.append(Package(module, names[-1], found, needed, state))
    return packages


def remedy(packages: Iterable[Package]) -> list[str]:
    """The commands that bring ``packages`` to what is needed, then the one for the tested stack."""
    packages = list(packages)
    replaced = [
        name for package in packages for name in package.found if name != package.distribution
    ]
    commands = [f'pip uninstall -y {" ".join(replaced)}'] if replaced else []
    wanted = ' '.join(f"'{package.needed}'" for package in packages)
    if wanted:
        commands.append(f'pip install {wanted}')
    return [*commands, f'pip install -r {REQUIREMENTS / (family() + ".txt")}  # the tested stack']


def check_stack() -> list[str]:
    """Compares the installed mm* packages with what MMSegmentation needs.

    Returns:
        One line per problem that does not stop the import: packages that overwrite each other,
        optional ones that are missing.

    Raises:
        ImportError: a package is missing or of a version that MMSegmentation refuses; the
            message says what was found, what is needed and the command.
    """
    packages = stack()
    wrong = [p for p in packages if p.state != 'ok' and p.module not in OPTIONAL]
    if wrong:
        lines = [str(p) for p in wrong] + ['Install:', *(f'  {line}' for line in remedy(wrong))]
        raise ImportError(
            'mmseg_fusion cannot use the installed OpenMMLab packages:\n  ' + '\n  '.join(lines)
        )
    notes = [str(p) for p in packages if p.state != 'ok']
    for package in packages:
        if len(package.found) > 1:
            notes.append(
                f'{" and ".join(package.found)} are both installed and overwrite each other: '
                f'pip uninstall -y {" ".join(package.found)}, then install the one you want'
            )
    kind = family()
    other = _of_family('openmmlab' if kind == 'onedl' else 'onedl')
    if other:
        both = ' '.join([*_of_family(kind), *other])
        notes.append(
            f'{", ".join(other)} of the other family overwrite modules of the {kind} family: '
            f'pip uninstall -y {both}; {remedy([])[0]}'
        )
    return notes


# --- mmcv without compiled ops ----------------------------------------------------------------


class _Uncompiled(types.ModuleType):
    """Stands for ``mmcv._ext``: every op is there, and says what is missing when it is called."""

    def __init__(self, reason: str):
        super().__init__('mmcv._ext', 'Placeholder for the compiled ops of mmcv.')
        self.__reason__ = reason
        # mmengine's mmcv_full_available() asks for the loader and then answers False; without
        # any spec it would raise.
        self.__spec__ = ModuleSpec('mmcv._ext', None)

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise RuntimeError(
                f"mmcv op '{name}' is not available: {self.__reason__}. mmseg_fusion never needs "
                'it, the layer that called it does. Install the full package for your torch and '
                'CUDA (pip uninstall -y mmcv mmcv-lite; pip install -U openmim; '
                'mim install "mmcv>=2.0.1,<2.2"), or choose a layer that needs no compiled op.'
            )

        missing.__name__ = name
        return missing


def mmcv_without_ops() -> Quirk | None:
    """Lets mmseg 1.2.2 import where ``mmcv._ext`` is missing or was built for another torch.

    mmseg imports all of ``mmcv.ops``, though few of its layers call an op. A placeholder takes the
    extension's place. onedl-mmsegmentation imports without ops by itself and is left alone.
    """
    if family() == 'onedl':
        return None
    import torch  # noqa: F401  (the extension links against its libraries)

    try:
        import mmcv._ext  # noqa: F401

        return None
    except ModuleNotFoundError:
        problem = 'was installed without compiled ops'
    except (ImportError, OSError) as error:
        problem = f'has compiled ops that do not load here ({str(error).splitlines()[0]})'
    version = ' and '.join(f'{k} {v}' for k, v in installed(('mmcv', 'mmcv-lite')).items())
    reason = f'{version or "mmcv"} {problem}'
    sys.modules['mmcv._ext'] = _Uncompiled(reason)
    return Quirk(
        'mmcv_without_ops',
        f'{reason}: mmcv._ext is a placeholder, an op raises when it is called',
        'a full mmcv for this torch, or onedl-mmsegmentation, which imports without mmcv.ops',
    )


def find_loader_removed() -> Quirk | None:
    """``pkgutil.find_loader`` for mmengine and mmcv where Python has it no more (3.14).

    They ask it whether mmcv has compiled ops. Only their own view of ``pkgutil`` changes.
    """
    if hasattr(pkgutil, 'find_loader'):
        return None
    from mmcv.utils import ext_loader
    from mmengine.utils.dl_utils import misc

    def find_loader(name: str):
        spec = importlib.util.find_spec(name)
        return None if spec is None else spec.loader

    users = [module for module in (misc, ext_loader) if hasattr(module, 'pkgutil')]
    for module in users:
        module.pkgutil = types.SimpleNamespace(find_loader=find_loader)
    if not users:
        return None
    return Quirk(
        'find_loader_removed',
        'mmengine and mmcv look for the compiled ops through importlib, not pkgutil.find_loader',
        'onedl-mmengine 0.10.12',
    )


# --- torchvision beside another build of torch -------------------------------------------------

_BOXES = 'Tensor input, Tensor rois, float spatial_scale'
_POOLED = 'SymInt pooled_height, SymInt pooled_width'
_BACK = 'SymInt batch_size, SymInt channels, SymInt height, SymInt width'
_DEFORM = (
    'Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, '
    'SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, '
    'SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask'
)
_TORCHVISION_OPS = {
    'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'roi_align': f'({_BOXES}, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor',
    'qroi_align': f'({_BOXES}, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor',
    '_roi_align_backward': '(Tensor grad, Tensor rois, float spatial_scale, '
    f'{_POOLED}, {_BACK}, int sampling_ratio, bool aligned) -> Tensor',
    'roi_pool': f'({_BOXES}, {_POOLED}) -> (Tensor, Tensor)',
    '_roi_pool_backward': '(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, '
    f'{_POOLED}, {_BACK}) -> Tensor',
    'ps_roi_align': f'({_BOXES}, {_POOLED}, int sampling_ratio) -> (Tensor, Tensor)',
    '_ps_roi_align_backward': '(Tensor grad, Tensor rois, Tensor channel_mapping, '
    f'float spatial_scale, {_POOLED}, int sampling_ratio, {_BACK}) -> Tensor',
    'ps_roi_pool': f'({_BOXES}, {_POOLED}) -> (Tensor, Tensor)',
    '_ps_roi_pool_backward': '(Tensor grad, Tensor rois, Tensor channel_mapping, '
    f'float spatial_scale, {_POOLED}, {_BACK}) -> Tensor',
    'deform_conv2d': f'({_DEFORM}) -> Tensor',
    '_deform_conv2d_backward': f'(Tensor grad, {_DEFORM}) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
}
# A library lives as long as the object: kept here.
_LIBRARIES: list = []


def _torchvision_binary() -> Path | None:
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    return next((p for p in (root / '_C.so', root / '_C.pyd') if p.exists()), None)


def torchvision_build_mismatch() -> Quirk | None:
    """Declares torchvision's ops where its binary cannot be loaded beside this torch.

    torchvision registers fake kernels for them at import and dies with "operator torchvision::nms
    does not exist" if a CUDA wheel stands beside a CPU torch, and mmpretrain dies with it.
    Its Python part (models, transforms) works once the schemas are there; an op that is called
    raises a clear error.
    """
    import torch

    if 'torchvision' in sys.modules or importlib.util.find_spec('torchvision') is None:
        return None
    binary = _torchvision_binary()
    try:
        # What torchvision itself does first.
        if binary is not None:
            torch.ops.load_library(str(binary))
            return None
        reason = 'no binary in the package'
    except (OSError, ImportError) as error:
        reason = str(error).splitlines()[0]
    version = installed(['torchvision']).get('torchvision', 'of unknown version')
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name, schema in _TORCHVISION_OPS.items():
        if hasattr(torch.ops.torchvision, name):
            continue
        library.define(name + schema)

        def missing(*args, _name=name, **kwargs):
            raise RuntimeError(
                f"torchvision op '{_name}' is not available: torchvision {version} does not match "
                f'torch {torch.__version__} ({reason}). Install the torchvision that was built '
                'for this torch.'
            )

        library.impl(name, missing, 'CompositeExplicitAutograd')
    _LIBRARIES.append(library)
    return Quirk(
        'torchvision_build_mismatch',
        f'torchvision {version} does not match torch {torch.__version__}: its ops are declared, '
        'so that its Python part imports, and raise when called',
        'a torchvision built for this torch',
    )


# --- resuming ------------------------------------------------------------------------------------


def _of_training() -> list[Any]:
    """The types in a training checkpoint of mmengine beside tensors, as torch's safe globals.

    mmengine's message hub holds ``HistoryBuffer`` objects with numpy arrays. The buffers name their
    own methods through ``getattr``, which stays forbidden for everything else.
    """
    import numpy
    from mmengine.logging import HistoryBuffer

    # numpy 1.26 has a numpy._core too, an empty one.
    core = numpy._core if int(numpy.__version__.partition('.')[0]) > 1 else numpy.core
    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    # Files written with the other major version of numpy name the same functions differently.
    functions = [
        (function, f'{module}.multiarray.{function.__name__}')
        for function in (reconstruct, scalar)
        for module in ('numpy.core', 'numpy._core')
    ]
    HistoryBuffer()  # fills the table of its statistics
    statistics = tuple(HistoryBuffer._statistics_methods)

    def statistics_method(owner: type, name: str):
        if owner is not HistoryBuffer or name not in statistics:
            raise UnpicklingError(
                f'a checkpoint may name the statistics of HistoryBuffer '
                f'({", ".join(statistics)}), not {name!r} of {owner!r}'
            )
        return getattr(owner, name)

    functions.append((statistics_method, 'builtins.getattr'))
    dtypes = {type(numpy.dtype(code)) for code in 'efdbhilqBHILQ?'}
    return [HistoryBuffer, numpy.ndarray, numpy.dtype, *functions, *dtypes]


def resume_weights_only() -> Quirk | None:
    """Names the types in a training checkpoint of mmengine as safe to load.

    torch >= 2.6 loads with ``weights_only=True``, which stays on; mmengine's message hub holds
    other objects, so that ``--resume`` failed.
    """
    import torch
    from mmengine.runner import checkpoint

    if _before_torch_2_6() or hasattr(checkpoint, 'get_torch_safe_globals'):
        return None
    torch.serialization.add_safe_globals(_of_training())
    return Quirk(
        'resume_weights_only',
        'HistoryBuffer and the numpy types in a checkpoint are safe globals of torch.load',
        'onedl-mmengine 0.10.12, which declares them itself',
    )


# --- checkpoints from anywhere -------------------------------------------------------------------

#: Inside of mmengine's CheckpointLoader: why files could not be read so far. None elsewhere.
_LOADING: ContextVar[list[Exception] | None] = ContextVar('_LOADING', default=None)


def _before_torch_2_6() -> bool:
    import torch
    from packaging.version import Version

    return Version(torch.__version__).release < (2, 6)


def checkpoints_weights_only() -> Quirk | None:
    """No checkpoint runs code, wherever it comes from.

    mmengine's CheckpointLoader has a loader per scheme. That for http(s), which most others call,
    asks torch.hub, which loads with ``weights_only=False``; below torch 2.6 that is the default of
    ``torch.load`` too; and onedl-mmengine falls back to it where a file asks for it. While the
    CheckpointLoader is at work, ``torch.load`` reads tensors and plain values only, whatever the
    loader asks for, and so for schemes that are registered later. Elsewhere it is as it was.

    A loader that does not read through ``torch.load`` (its own ``pickle.load``, say) is not held by
    this: one that is registered must call ``torch.load``.

    Below torch 2.6 torch's own restricted reader does not know the objects in a training
    checkpoint, and hands archives of the TorchScript and tar formats to readers that are not
    restricted; here :class:`_TensorsOnly` reads, and those archives are refused.
    """
    import torch
    from mmengine.runner import CheckpointLoader, checkpoint

    if hasattr(checkpoint, 'get_torch_safe_globals') and not _before_torch_2_6():
        # onedl's own list, which comes and goes with each load, lets a file call getattr.
        torch.serialization.add_safe_globals([slice, *_of_training()])
        checkpoint.get_torch_safe_globals = list
    torch.load = _tensors_only_while_loading(torch.load)
    CheckpointLoader.load_checkpoint = classmethod(
        _loads_tensors_only(CheckpointLoader.load_checkpoint.__func__)
    )
    return Quirk(
        'checkpoints_weights_only',
        'mmengine loads checkpoints of every scheme with weights_only=True'
        + (', by a reader of this package: torch is older than 2.6' if _before_torch_2_6() else ''),
        'mmengine whose loaders of every scheme ask for weights_only, and torch 2.6',
    )


def _tensors_only_while_loading(original: Callable) -> Callable:
    old = _before_torch_2_6()

    def tensors_only(f, map_location, pickle_module, kwargs):
        if not old:
            return original(f, map_location, pickle_module, **{**kwargs, 'weights_only': True})
        if pickle_module is not None:
            raise UnpicklingError(f'read by another unpickler, {pickle_module.__name__}')
        _refuse_archives(f)
        kwargs.pop('weights_only', None)
        return original(f, map_location, _tensors_only(), **kwargs)

    @functools.wraps(original)
    def load(f, map_location=None, pickle_module=None, **kwargs):
        failures = _LOADING.get()
        if failures is None:
            return original(f, map_location, pickle_module, **kwargs)
        try:
            return tensors_only(f, map_location, pickle_module, kwargs)
        except Exception as error:
            failures.append(error)
            raise

    return load


def _loads_tensors_only(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_checkpoint(cls, filename, map_location=None, logger='current'):
        import torch

        failures: list[Exception] = []
        token = _LOADING.set(failures)
        try:
            return original(cls, filename, map_location, logger)
        # A file that is not there, a server that does not answer, a package of the scheme that is
        # not installed, no memory: these say what they are.
        except (OSError, ImportError, MemoryError, torch.cuda.OutOfMemoryError, CheckpointError):
            raise
        # Bytes that are no checkpoint end in any kind of error.
        except Exception as error:
            # onedl-mmengine tries a second time, where a stream is at its end already.
            first = failures[0] if failures else error
            raise CheckpointError(_why_not_loaded(str(filename), first)) from first
        finally:
            _LOADING.reset(token)

    return load_checkpoint


def _why_not_loaded(name: str, error: Exception) -> str:
    """What is wrong with the checkpoint ``name``, whose reading ended in ``error``."""
    import torch

    foreign = re.search(r'GLOBAL (\S+)', str(error))
    if foreign or (isinstance(error, UnpicklingError) and 'HistoryBuffer' in str(error)):
        what = foreign[1].rstrip('.') if foreign else 'getattr'
        return (
            f'checkpoint {name!r} was not loaded: it holds more than tensors and plain values '
            f'({what}), and reading that runs code of whoever made the file. Get a file of weights '
            'alone. If you trust its maker and need the object, let a module in custom_imports '
            'call torch.serialization.add_safe_globals([...]) with it (torch 2.4 or newer).'
        )
    scheme = re.match(r'(\w[\w-]*)://', name)
    if isinstance(error, KeyError) and scheme and scheme[1] not in ('http', 'https', 'file'):
        return f'checkpoint {name!r}: {scheme[0]} knows no model {error}'
    remedy = 'Give a file that tools/train.py or torch.save wrote, or fetch it again'
    # torch's own advice on weights_only=False is none here.
    what = '' if 'load failed' in str(error) else str(error).split('. ')[0].splitlines()
    what = what[0][:200] if what else ''
    if scheme is None:
        what = _looks_like(Path(name).expanduser()) or what
    elif scheme[1] in ('http', 'https'):
        remedy += f'; the download is kept in {torch.hub.get_dir()}/checkpoints: delete it there'
        kept = Path(torch.hub.get_dir(), 'checkpoints', Path(name.partition('?')[0]).name)
        what = _looks_like(kept) or what
    return (
        f'checkpoint {name!r} cannot be read as a checkpoint: expected tensors and plain '
        f'values as torch.save writes them, but {what or "the file is something else"} '
        f'({type(error).__name__}). {remedy}.'
    )


def _looks_like(path: Path) -> str | None:
    """What a file that is no checkpoint seems to be; None where nothing is known."""
    if not path.is_file():
        return None
    with path.open('rb') as file:
        start = file.read(512)
    if not start:
        return 'the file is empty'
    if start.startswith(b'version https://git-lfs'):
        return 'it is a pointer of Git LFS (git lfs pull brings the file itself)'
    if start.lstrip()[:14].lower().startswith((b'<!doctype html', b'<html')):
        return 'it is a web page'
    if start.startswith(b'PK') and not zipfile.is_zipfile(path):
        return f'it is truncated: {path.stat().st_size:,} bytes that begin like a checkpoint'
    if all(byte in b'\t\n\r\f' or byte >= 32 for byte in start) and b'\x7f' not in start:
        try:
            start.decode()
        except UnicodeDecodeError:
            return None
        return 'it is a text file'
    return None


def _refuse_archives(file: Any) -> None:
    """Stops at the formats that torch before 2.6 reads without any restriction."""
    where = file.tell() if hasattr(file, 'tell') else None
    kind = None
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(Path(name).name == 'constants.pkl' for name in archive.namelist()):
                kind = 'TorchScript'
    elif where is None and Path(file).is_file() and tarfile.is_tarfile(file):
        kind = 'tar'
    if where is not None:
        file.seek(where)
        if kind is None and not zipfile.is_zipfile(file):
            file.seek(where)
            try:
                tarfile.open(fileobj=file, mode='r:').close()
                kind = 'tar'
            except tarfile.TarError:
                pass
        file.seek(where)
    if kind:
        raise UnpicklingError(f'an archive of the {kind} format')


@functools.cache
def _tensors_only() -> types.ModuleType:
    """A stand-in for :mod:`pickle` that builds tensors, plain values and what training leaves."""
    import numpy
    import torch
    from mmengine.logging import HistoryBuffer
    from torch._weights_only_unpickler import _get_allowed_globals

    allowed = dict(_get_allowed_globals())
    own = _of_training()
    if hasattr(torch.serialization, 'get_safe_globals'):
        own += torch.serialization.get_safe_globals()
    for entry in own:
        value, name = entry if isinstance(entry, tuple) else (entry, None)
        allowed[name or f'{value.__module__}.{value.__qualname__}'] = value
    allowed['_codecs.encode'] = _encode_latin1
    # Of whose instances a file may set the state; of a class or a function it may not.
    with_state = (OrderedDict, HistoryBuffer, numpy.ndarray, numpy.dtype, torch.Tensor)

    class Unpickler(pickle._Unpickler):
        dispatch = dict(pickle._Unpickler.dispatch)

        def find_class(self, module: str, name: str) -> Any:
            module = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module)
            try:
                return allowed[f'{module}.{name}']
            except KeyError:
                raise UnpicklingError(f'GLOBAL {module}.{name} was not an allowed global') from None

        def load_build(self) -> None:
            if not isinstance(self.stack[-2], with_state):
                raise UnpicklingError(f'sets the state of GLOBAL {type(self.stack[-2]).__name__}')
            super().load_build()

        dispatch[pickle.BUILD[0]] = load_build

    module = types.ModuleType('tensors_only')
    module.Unpickler = Unpickler
    module.load = lambda file, **kwargs: Unpickler(file, **kwargs).load()
    return module


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How the second pickle protocol writes bytes."""
    if encoding != 'latin1':
        raise UnpicklingError(f'bytes in the encoding {encoding!r}')
    return text.encode('latin1')


# --- checkpoints that a kill leaves ------------------------------------------------------------


def checkpoints_whole() -> Quirk | None:
    """A checkpoint is at its name once it is complete, and never in part.

    mmengine writes in place: a process that is killed, or a full disk, left a truncated
    ``iter_*.pth`` or ``best_*.pth`` under its final name, over the one that was there. Here local
    files are written beside and renamed. Other storage is mmengine's own, as it was.
    """
    from mmengine.fileio import LocalBackend, get_file_backend
    from mmengine.runner import checkpoint

    original = checkpoint.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(content, filename, file_client_args=None, backend_args=None):
        name = os.fspath(filename)
        local = not (file_client_args or '://' in name) and isinstance(
            get_file_backend(name, backend_args=backend_args), LocalBackend
        )
        if not local:
            return original(content, name, file_client_args, backend_args)
        folder, base = os.path.split(name)
        # Of one name, so that the next save replaces what a kill left; no suffix of a checkpoint.
        beside = os.path.join(folder, f'.{base}.unfinished')
        try:
            original(content, beside, None, backend_args)
            with open(beside, 'rb+') as file:
                os.fsync(file.fileno())
            os.replace(beside, name)
        finally:
            Path(beside).unlink(missing_ok=True)

    for module in list(sys.modules.values()):
        if getattr(module, '__name__', '').startswith('mmengine.') and (
            vars(module).get('save_checkpoint') is original
        ):
            module.save_checkpoint = save_checkpoint
    return Quirk(
        'checkpoints_whole',
        'checkpoints are written beside their name and renamed',
        'mmengine whose LocalBackend writes so',
    )


# --- values with blanks on the command line ------------------------------------------------------


def blanks_in_options() -> Quirk | None:
    """``--cfg-options`` keeps the blanks inside a value.

    mmengine drops them all, so that the folder ``my data`` became ``mydata``. Those around an
    element of a list are still dropped.
    """
    from mmengine.config import DictAction

    original = DictAction._parse_iterable
    if original('a b') == 'a b':
        return None
    # mmengine parses the elements of a list through the same name.
    blank = '\0'

    def restored(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(blank, ' ')
        return type(value)(map(restored, value)) if isinstance(value, (list, tuple)) else value

    @functools.wraps(original)
    def parse_iterable(val: str) -> Any:
        val = val.replace(blank, ' ').strip().strip('\'"')
        return restored(original(val.replace(' ', blank)))

    DictAction._parse_iterable = staticmethod(parse_iterable)
    return Quirk(
        'blanks_in_options',
        '--cfg-options keeps the blanks inside a value, which mmengine drops',
        'mmengine whose DictAction keeps them',
    )


# --- configs of installed packages ---------------------------------------------------------------


def external_configs() -> Quirk | None:
    """``_base_ = 'mmseg_fusion::...'`` and ``'mmseg::...'`` on every stack.

    mmengine knows neither this package nor, in ``mmseg::``, the distribution that onedl installs.
    mmengine 0.10.7 moreover asks ``pkg_resources``, which is gone from setuptools 82 and finds no
    editable install; there the lookup of a known package goes through ``importlib`` instead.
    """
    import mmengine.config.config
    import mmengine.config.utils
    import mmengine.hub.hub
    import mmengine.utils
    from mmengine.utils import package_utils

    table = mmengine.config.utils.MODULE2PACKAGE
    # The module's name is good for both: a distribution is found under any spelling of its name.
    table['mmseg_fusion'] = 'mmseg_fusion'
    what = "mmengine knows the configs of 'mmseg_fusion::'"
    if family() == 'onedl':
        for module, (names, _, _) in FAMILIES['onedl'].items():
            if module in table:
                table[module] = names[0]
        what += " and, for 'mmseg::', what onedl's distribution is called"
    if 'pkg_resources' in package_utils.get_installed_path.__code__.co_names:
        _look_up_through_importlib(table, package_utils)
        what += ', and looks installed packages up through importlib, not pkg_resources'
    _mmseg_scope_for_our_configs(mmengine.config.config.Config)
    return Quirk('external_configs', what, 'mmengine that reads entry points')


def _mmseg_scope_for_our_configs(config: type) -> None:
    """mmengine looks up what a ``package::`` config names in registries of that package's own
    name; this package registers into mmseg's."""
    find = config._get_cfg_path

    def in_scope_of_mmseg(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = find(cfg_path, filename)
        return path, 'mmseg' if scope == 'mmseg_fusion' else scope

    config._get_cfg_path = staticmethod(in_scope_of_mmseg)


def _look_up_through_importlib(table: dict[str, str], package_utils: types.ModuleType) -> None:
    """Replaces ``is_installed`` and ``get_installed_path`` wherever mmengine has imported them."""
    import mmengine

    def folder(package: str) -> str | None:
        """Where the module of ``package`` lies, which may be named by its distribution."""
        module = next((m for m, p in table.items() if package in (m, p)), package)
        spec = importlib.util.find_spec(module.replace('-', '_'))
        return None if spec is None or spec.origin is None else os.path.dirname(spec.origin)

    def is_installed(package: str) -> bool:
        return folder(package) is not None or bool(installed([package]))

    def get_installed_path(package: str) -> str:
        found = folder(package)
        if found is None:
            raise ModuleNotFoundError(
                f'no module of package {package!r} is found: install it, or put its folder on '
                'PYTHONPATH'
            )
        return found

    for ours in (is_installed, get_installed_path):
        original = getattr(package_utils, ours.__name__)
        replacement = functools.update_wrapper(ours, original)
        for module in (package_utils, mmengine.utils, mmengine.config.config, mmengine.hub.hub):
            if getattr(module, ours.__name__, None) is original:
                setattr(module, ours.__name__, replacement)


# --- several processes without a GPU -------------------------------------------------------------


def distributed_without_cuda() -> Quirk | None:
    """Training and testing with several processes on a machine without an accelerator.

    mmengine asks for ``nccl`` and a CUDA device whatever is there, and hands a device index to
    DistributedDataParallel, which refuses one for a model on the CPU. There the backend becomes
    ``gloo``, and SyncBatchNorm, which torch runs on GPUs only, becomes BatchNorm.
    """
    from mmengine.device import get_device

    if get_device() != 'cpu':
        return None
    from mmengine.dist import utils
    from mmengine.runner import Runner

    for name in ('_init_dist_pytorch', '_init_dist_slurm', '_init_dist_mpi'):
        setattr(utils, name, _init_with_gloo(getattr(utils, name)))
    Runner.wrap_model = _wrap_model_on_cpu(Runner.wrap_model)
    return Quirk(
        'distributed_without_cuda',
        'no CUDA: several processes talk through gloo, DDP gets no device, SyncBN becomes BN',
        'mmengine that chooses the backend by the device',
    )


def _init_with_gloo(original):
    @functools.wraps(original)
    def init(backend, *args, **kwargs):
        import torch
        from mmengine.logging import print_log

        wanted, backend = backend, 'gloo' if 'nccl' in backend else backend
        set_device = torch.cuda.set_device
        torch.cuda.set_device = lambda device: None
        try:
            original(backend, *args, **kwargs)
        finally:
            torch.cuda.set_device = set_device
        atexit.register(_leave_process_group)
        if wanted != backend:
            print_log(
                f'No CUDA device: the processes talk through {backend} instead of {wanted} and '
                'compute on the CPU.',
                'current',
                logging.WARNING,
            )

    return init


def _leave_process_group() -> None:
    """Ends gloo's threads: one that frees a tensor while Python shuts down aborts the process."""
    from torch import distributed

    if not distributed.is_initialized():
        return
    # A runner is part of cycles, and its DDP keeps the group alive.
    gc.collect()
    distributed.destroy_process_group()
    # Where somebody still holds it, its threads get a moment to free what they have.
    time.sleep(0.5)


def _wrap_model_on_cpu(original):
    @functools.wraps(original)
    def wrap_model(self, model_wrapper_cfg, model):
        from mmengine.model import is_model_wrapper, revert_sync_batchnorm
        from mmengine.registry import MODEL_WRAPPERS
        from torch.nn import SyncBatchNorm
        from torch.nn.parallel import DistributedDataParallel

        if not self.distributed or is_model_wrapper(model):
            return original(self, model_wrapper_cfg, model)
        asked = self.cfg.pop('sync_bn', None)
        layers = sum(isinstance(m, SyncBatchNorm) for m in model.modules())
        if layers or asked:
            self.logger.warning(
                f'SyncBatchNorm needs GPUs: {layers or "all"} layers are BatchNorm here, with the '
                "statistics of each process's own batch."
            )
            model = revert_sync_batchnorm(model)
        wrapper = dict(model_wrapper_cfg or {})
        if model_wrapper_cfg is None:
            wrapper['broadcast_buffers'] = False
            wrapper['find_unused_parameters'] = self.cfg.get('find_unused_parameters', False)
        kind = wrapper.setdefault('type', 'MMDistributedDataParallel')
        kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
            wrapper['device_ids'] = None
        try:
            return original(self, wrapper, model)
        finally:
            if asked is not None:
                self.cfg.sync_bn = asked

    return wrap_model


# --- mixed precision without a GPU ----------------------------------------------------------------


def amp_without_cuda() -> Quirk | None:
    """Configs with ``AmpOptimWrapper``, and ``--amp``, on a machine without an accelerator.

    mmengine's wrapper refuses to be built there, although its autocast knows the CPU. It computes
    in bfloat16, the one type that autocast takes there, and needs no loss scaling.
    """
    from mmengine.device import get_device

    if get_device() != 'cpu':
        return None
    from mmengine.optim import AmpOptimWrapper

    module = sys.modules[AmpOptimWrapper.__module__]
    if not hasattr(module, 'is_cuda_available'):
        return None
    # Nothing but the refusal asks it there.
    module.is_cuda_available = lambda: True
    AmpOptimWrapper.__init__ = _amp_in_bfloat16(AmpOptimWrapper.__init__)
    return Quirk(
        'amp_without_cuda',
        'no CUDA: AmpOptimWrapper computes in bfloat16 without loss scaling',
        'mmengine whose AmpOptimWrapper takes the CPU',
    )


def _amp_in_bfloat16(original):
    @functools.wraps(original)
    def __init__(self, loss_scale='dynamic', dtype=None, **kwargs):
        from mmengine.logging import print_log

        print_log(
            'No CUDA device: mixed precision is bfloat16 on the CPU'
            + (f' instead of {dtype}' if dtype not in (None, 'bfloat16') else '')
            + ', without loss scaling.',
            'current',
            logging.WARNING,
        )
        with warnings.catch_warnings():
            # torch's scaler says that it is off without CUDA.
            warnings.simplefilter('ignore')
            original(self, loss_scale, 'bfloat16', **kwargs)

    return __init__


# --- cross entropy with class weights ------------------------------------------------------------


def cross_entropy_class_weight() -> Quirk | None:
    """Class weights together with ignored pixels in mmseg's cross entropy.

    mmseg 1.2.2 looks up the weight of every label, the ignore index 255 included, and raises
    IndexError; onedl-mmsegmentation 1.4.2 does with ``avg_non_ignore=True``. The divisor is
    computed here over the pixels that are not ignored, as torch's own ``mean`` reduction does, and
    handed to mmseg's function. Where every pixel is ignored the loss is 0.

    Must run after :mod:`mmseg.models` can be imported.
    """
    import torch
    from mmseg.models import losses
    from mmseg.models.losses import cross_entropy_loss as module

    original = module.cross_entropy
    logits, label, weight = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]), torch.ones(2)
    try:
        for avg_non_ignore in (False, True):
            original(
                logits,
                label,
                class_weight=weight,
                ignore_index=255,
                avg_non_ignore=avg_non_ignore,
            )
        return None
    except IndexError:
        pass

    @functools.wraps(original)
    def cross_entropy(
        pred,
        label,
        weight=None,
        class_weight=None,
        reduction='mean',
        avg_factor=None,
        ignore_index=-100,
        avg_non_ignore=False,
    ):
        if class_weight is not None and avg_factor is None and reduction == 'mean':
            avg_factor = class_weight[label[label != ignore_index]].sum()
        return original(
            pred, label, weight, class_weight, reduction, avg_factor, ignore_index, avg_non_ignore
        )

    for place in (module, losses):
        if getattr(place, 'cross_entropy', None) is original:
            place.cross_entropy = cross_entropy
    return Quirk(
        'cross_entropy_class_weight',
        'class_weight works with ignored pixels: the divisor leaves them out',
        'mmsegmentation whose cross entropy takes the ignore index beside class weights',
    )


# --- deterministic runs on a GPU -----------------------------------------------------------------


def deterministic_on_cuda() -> Quirk | None:
    """``randomness=dict(deterministic=True)`` on a GPU.

    mmengine asks torch for deterministic algorithms and nothing else. On CUDA torch then stops at
    operations that have none, the cross entropy of an image among them, which is every model here,
    and at cuBLAS unless ``CUBLAS_WORKSPACE_CONFIG`` is set. Here the variable is set where it is
    not, and such an operation warns and runs. mmseg's cross entropy, which sums by itself, is
    repeatable all the same; adaptive pooling and bilinear resizing sum their gradients in any
    order.
    """
    from mmengine.device import get_device
    from mmengine.runner import runner

    if get_device() != 'cuda':
        return None
    original = runner.set_random_seed

    @functools.wraps(original)
    def set_random_seed(seed=None, deterministic=False, diff_rank_seed=False):
        import torch

        if deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        seed = original(seed, deterministic, diff_rank_seed)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        return seed

    runner.set_random_seed = set_random_seed
    return Quirk(
        'deterministic_on_cuda',
        'deterministic=True: operations without a deterministic form on CUDA warn instead of stop',
        'mmengine that passes warn_only',
    )


#: In this order: what must be there before mmengine, mmpretrain and mmseg are imported is first.
QUIRKS = (
    torchvision_build_mismatch,
    mmcv_without_ops,
    find_loader_removed,
    resume_weights_only,
    checkpoints_weights_only,
    checkpoints_whole,
    blanks_in_options,
    external_configs,
    distributed_without_cuda,
    amp_without_cuda,
    cross_entropy_class_weight,
    deterministic_on_cuda,
)


@functools.cache
def apply() -> tuple[Quirk, ...]:
    """Meets every quirk that is found; a second call does nothing.

    Returns:
        The quirks that were met, also kept in :data:`APPLIED`.

    Raises:
        ImportError: see :func:`check_stack`.
    """
    for note in check_stack():
        if not note.startswith(OPTIONAL):
            warnings.warn(note, stacklevel=3)
    for quirk in QUIRKS:
        met = quirk()
        if met is not None:
            APPLIED.append(met)
    return tuple(APPLIED)
