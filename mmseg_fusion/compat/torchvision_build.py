"""torchvision and torch from different builds, for example a CUDA wheel and a CPU torch.

torchvision 0.28.0 cannot be imported then. Ends with one that was built for the installed torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .packages import installed
from .quirk import Quirk

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


def _torchvision_binaries() -> list[Path]:
    """The libraries with the ops, by whatever name: ``_C.so``, and ``_C_stable.so`` from 0.29 on.

    Ops that are declared although torchvision loads a library with them would end the process.
    """
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return []
    files = sorted(Path(spec.origin).parent.iterdir())
    libraries = [path for path in files if path.suffix in ('.so', '.pyd', '.dylib')]
    # Those read images and videos.
    return [path for path in libraries if not path.name.startswith(('image', 'video'))]


def torchvision_build_mismatch() -> Quirk | None:
    """Declares torchvision's ops if its binary cannot be loaded with this torch.

    torchvision registers fake kernels for them at import. If a CUDA wheel is installed with a CPU
    torch, this fails with "operator torchvision::nms does not exist", and importing mmpretrain
    fails, too. Its Python part (models, transforms) works once the schemas are there; an op that is
    called raises a clear error.
    """
    import torch

    if 'torchvision' in sys.modules or importlib.util.find_spec('torchvision') is None:
        return None
    try:
        # What torchvision itself does first.
        binaries = _torchvision_binaries()
        for binary in binaries:
            torch.ops.load_library(str(binary))
        if binaries:
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
