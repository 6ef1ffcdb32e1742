"""Third-party quirks, each with the version that makes it unnecessary.

:func:`apply` runs once when :mod:`mmseg_fusion` is imported, before anything of MMSegmentation
is. A quirk acts only where it is found, never replaces a working part and is listed, with what it
did, by ``python -m mmseg_fusion``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.version import Version

#: What MMSegmentation itself needs, per family: module -> (distributions, lowest, below).
FAMILIES = {
    'openmmlab': {
        'mmengine': (('mmengine', 'mmengine-lite'), '0.10.5', '0.11'),
        'mmcv': (('mmcv', 'mmcv-lite'), '2.0.1', '2.2'),
        'mmseg': (('mmsegmentation',), '1.2.2', '1.3'),
        'mmpretrain': (('mmpretrain',), '1.2.0', '1.3'),
    },
    'onedl': {
        'mmengine': (('onedl-mmengine',), '0.10.12', None),
        'mmcv': (('onedl-mmcv',), '2.3.6', None),
        'mmseg': (('onedl-mmsegmentation',), '1.4.2', None),
        'mmpretrain': (('onedl-mmpretrain',), '1.3.6', None),
    },
}
#: Modules that a stack may lack: only some backbones come from there.
OPTIONAL = ('mmpretrain',)


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


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those of ``distributions`` that are installed, by distribution name."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def family() -> str:
    """``'openmmlab'`` or ``'onedl'``: the family that the installed mmseg belongs to."""
    return 'onedl' if installed(FAMILIES['onedl']['mmseg'][0]) else 'openmmlab'


def check_stack() -> list[str]:
    """Compares the installed mm* packages with what MMSegmentation needs.

    Returns:
        One line per problem that does not stop the import: packages that overwrite each other,
        optional ones that are missing.

    Raises:
        ImportError: a package is missing or of a version that MMSegmentation refuses; the
            message says what was found, what is needed and the command.
    """
    kind = family()
    remedy = f"pip install 'mmseg-fusion[{kind}]' (pinned and tested: requirements/{kind}.txt)"
    wrong, notes = [], []
    for module, (names, low, below) in FAMILIES[kind].items():
        found = installed(names)
        needed = f'{names[0]} >= {low}' + (f', < {below}' if below else '')
        if len(found) > 1:
            notes.append(
                f'{" and ".join(found)} are both installed and overwrite each other; '
                f'uninstall both, then install one'
            )
        if not found:
            # A source checkout on PYTHONPATH has no metadata: let it be.
            if importlib.util.find_spec(module) is not None:
                continue
            (notes if module in OPTIONAL else wrong).append(
                f'{module}: found nothing, needed {needed}'
            )
            continue
        for name, text in found.items():
            version = Version(text)
            if version < Version(low) or (below and version >= Version(below)):
                wrong.append(f'{module}: found {name} {text}, needed {needed}')
    other = 'openmmlab' if kind == 'onedl' else 'onedl'
    mixed = installed(n for names, _, _ in FAMILIES[other].values() for n in names)
    if mixed:
        notes.append(
            f'{", ".join(sorted(mixed))} of the {other} family stand beside the {kind} family and '
            f'overwrite its modules; uninstall both families, then {remedy}'
        )
    if wrong:
        raise ImportError(
            'mmseg_fusion cannot use the installed OpenMMLab packages:\n  '
            + '\n  '.join(wrong)
            + f'\nInstall: {remedy}'
        )
    return notes


# --- mmcv without compiled ops ----------------------------------------------------------------


class _Uncompiled(types.ModuleType):
    """Stands for ``mmcv._ext``: every op is there, and says what is missing when it is called."""

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            version = ' '.join(f'{k} {v}' for k, v in installed(('mmcv', 'mmcv-lite')).items())
            raise RuntimeError(
                f"mmcv op '{name}' is not compiled: {version or 'mmcv'} was installed without "
                'its extension. mmseg_fusion never needs it, the layer that called it does. '
                'Install the full package for your torch and CUDA (pip uninstall mmcv-lite; '
                'pip install -U openmim; mim install "mmcv>=2.0.1,<2.2"), or choose a layer '
                'that needs no compiled op.'
            )

        missing.__name__ = name
        return missing


def _has_ext() -> bool:
    spec = importlib.util.find_spec('mmcv')
    if spec is None or not spec.submodule_search_locations:
        return False
    return any(
        entry.name.startswith('_ext.') and entry.name.endswith(('.so', '.pyd'))
        for root in spec.submodule_search_locations
        for entry in Path(root).iterdir()
    )


def mmcv_without_ops() -> Quirk | None:
    """Lets mmseg 1.2.2 import on mmcv-lite: a placeholder for the missing ``mmcv._ext``.

    onedl-mmsegmentation imports without ops by itself and is left alone.
    """
    if family() == 'onedl' or 'mmcv._ext' in sys.modules or _has_ext():
        return None
    module = _Uncompiled('mmcv._ext', 'Placeholder: mmcv was installed without compiled ops.')
    # A spec without a loader: mmengine's mmcv_full_available() then answers False; without a
    # spec at all it raises.
    module.__spec__ = ModuleSpec('mmcv._ext', None)
    sys.modules['mmcv._ext'] = module
    return Quirk(
        'mmcv_without_ops',
        'mmcv has no compiled ops: mmcv._ext is a placeholder whose functions raise when called',
        'a full mmcv, or mmsegmentation that imports without mmcv.ops (onedl-mmsegmentation)',
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
    version = importlib.metadata.version('torchvision')
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

        for key in ('CPU', 'CUDA'):
            library.impl(name, missing, key)
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
    ``HistoryBuffer`` objects with numpy arrays, so that ``--resume`` failed.
    """
    import numpy
    import torch
    from mmengine.logging import HistoryBuffer

    if not hasattr(torch.serialization, 'add_safe_globals'):  # torch < 2.4 has no such list
        return None
    core = numpy._core if hasattr(numpy, '_core') else numpy.core
    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    types_ = [HistoryBuffer, numpy.ndarray, numpy.dtype, reconstruct, scalar]
    # Files written with the other major version of numpy name the same functions differently.
    names = [
        (function, f'{module}.multiarray.{function.__name__}')
        for function in (reconstruct, scalar)
        for module in ('numpy.core', 'numpy._core')
    ]
    if hasattr(numpy, 'dtypes'):
        types_ += [type(numpy.dtype(t)) for t in 'fdqilbB?']
    safe = torch.serialization.add_safe_globals
    safe(types_)
    import contextlib

    # Pairs (object, name) came with torch 2.5.
    with contextlib.suppress(AttributeError, TypeError):
        safe(names)
    # numpy < 2 restores arrays of its own through this.
    return Quirk(
        'resume_weights_only',
        'HistoryBuffer and the numpy types in a checkpoint are safe globals of torch.load',
        'mmengine that declares them itself',
    )


# --- configs of installed packages ---------------------------------------------------------------


def external_configs() -> Quirk | None:
    """``_base_ = 'mmseg_fusion::...'`` and ``'mmseg::...'`` on every stack.

    mmengine knows neither this package nor, in ``mmseg::``, the distribution that onedl installs;
    mmengine 0.10.7 finds neither an editable install nor, beside setuptools >= 82, anything at
    all, since it asks ``pkg_resources``. The lookup of a known package goes through
    ``importlib`` instead, everything else as before.
    """
    import mmengine.config.config
    import mmengine.config.utils
    import mmengine.hub.hub
    import mmengine.utils
    from mmengine.utils import package_utils

    table = mmengine.config.utils.MODULE2PACKAGE
    table['mmseg_fusion'] = 'mmseg-fusion'
    if family() == 'onedl':
        for module, (names, _, _) in FAMILIES['onedl'].items():
            if module in table:
                table[module] = names[0]

    def module_of(package: str) -> str | None:
        return next((m for m, p in table.items() if package in (m, p)), None)

    def location(package: str) -> str | None:
        module = module_of(package)
        spec = None if module is None else importlib.util.find_spec(module)
        return None if spec is None or spec.origin is None else os.path.dirname(spec.origin)

    def patched(original, ours):
        @functools.wraps(original)
        def lookup(package: str):
            found = location(package)
            return original(package) if found is None else ours(found)

        return lookup

    for name, ours in (('is_installed', bool), ('get_installed_path', str)):
        replacement = patched(getattr(package_utils, name), ours)
        for module in (package_utils, mmengine.utils, mmengine.config.config, mmengine.hub.hub):
            if hasattr(module, name):
                setattr(module, name, replacement)
    return Quirk(
        'external_configs',
        "'mmseg_fusion::' and 'mmseg::' configs are found through importlib",
        'mmengine that reads entry points, without pkg_resources',
    )


# --- cross entropy with class weights ------------------------------------------------------------


def cross_entropy_class_weight() -> Quirk | None:
    """Class weights together with ignored pixels in mmseg's cross entropy.

    mmseg 1.2.2 looks up the weight of every label, the ignore index 255 included, and raises
    IndexError. The divisor is computed here over the pixels that are not ignored, as torch's own
    ``mean`` reduction and onedl-mmsegmentation do, and handed to mmseg's function.

    Must run after :mod:`mmseg.models` can be imported.
    """
    if family() == 'onedl':
        return None
    from mmseg.models.losses import cross_entropy_loss as module

    original = module.cross_entropy

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

    module.cross_entropy = cross_entropy
    return Quirk(
        'cross_entropy_class_weight',
        'class_weight works with ignored pixels: the divisor leaves them out',
        'onedl-mmsegmentation 1.4',
    )


#: In this order: what must be there before mmengine, mmpretrain and mmseg are imported is first.
QUIRKS = (
    mmcv_without_ops,
    torchvision_build_mismatch,
    resume_weights_only,
    external_configs,
    cross_entropy_class_weight,
)


@functools.cache
def apply() -> tuple[Quirk, ...]:
    """Meets every quirk that is found; a second call does nothing.

    Returns:
        The quirks that were met, also kept in :data:`APPLIED`.

    Raises:
        ImportError: see :func:`check_stack`.
    """
    import warnings

    for note in check_stack():
        if not note.startswith(OPTIONAL):
            warnings.warn(note, stacklevel=3)
    for quirk in QUIRKS:
        met = quirk()
        if met is not None:
            APPLIED.append(met)
    return tuple(APPLIED)
