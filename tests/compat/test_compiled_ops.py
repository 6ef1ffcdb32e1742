"""mmcv without compiled ops: a layer that needs one says so, one that is there is left alone."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from mmseg.registry import MODELS

from .running import MET, origin, run_python

needs_lite = pytest.mark.skipif(
    'mmcv_without_ops' not in MET, reason='this mmcv has its ops, or mmseg imports without them'
)


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

    has_ops = any(p.name.startswith('_ext.') for p in Path(origin('mmcv')).parent.iterdir())
    assert mmcv_full_available() is has_ops


@needs_lite
def test_an_extension_that_does_not_load_is_replaced_and_named(tmp_path):
    # A copy of mmcv, in links, with an extension of another build: the usual mishap after an
    # update of torch.
    package = tmp_path / 'mmcv'
    package.mkdir()
    for entry in Path(origin('mmcv')).parent.iterdir():
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
