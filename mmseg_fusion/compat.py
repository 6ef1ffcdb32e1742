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
import pkgutil
import sys
import time
import types
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

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


def resume_weights_only() -> Quirk | None:
    """Names the types in a training checkpoint of mmengine as safe to load.

    torch >= 2.6 loads with ``weights_only=True``, which stays on; mmengine's message hub holds
    ``HistoryBuffer`` objects with numpy arrays, so that ``--resume`` failed. The buffers name
    their own methods through ``getattr``, which stays forbidden for everything else.
    """
    import numpy
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint
    from packaging.version import Version

    if Version(torch.__version__).release < (2, 6):
        return None
    if hasattr(checkpoint, 'get_torch_safe_globals'):
        return None
    core = numpy._core if hasattr(numpy, '_core') else numpy.core
    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    # Files written with the other major version of numpy name the same functions differently.
    functions = [
        (function, f'{module}.multiarray.{function.__name__}')
        for function in (reconstruct, scalar)
        for module in ('numpy.core', 'numpy._core')
    ]

    def statistics_method(owner: type, name: str):
        if owner is not HistoryBuffer or name not in HistoryBuffer._statistics_methods:
            raise UnpicklingError(
                f'a checkpoint may name the statistics of HistoryBuffer '
                f'({", ".join(HistoryBuffer._statistics_methods)}), not {name!r} of {owner!r}'
            )
        return getattr(owner, name)

    HistoryBuffer()  # fills the table of its statistics
    functions.append((statistics_method, 'builtins.getattr'))
    dtypes = {type(numpy.dtype(code)) for code in 'efdbhilqBHILQ?'}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, numpy.ndarray, numpy.dtype, *functions, *dtypes]
    )
    return Quirk(
        'resume_weights_only',
        'HistoryBuffer and the numpy types in a checkpoint are safe globals of torch.load',
        'onedl-mmengine 0.10.12, which declares them itself',
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
