"""Python without distutils: mmengine's environment report works."""

from __future__ import annotations

import importlib.metadata

import mmengine
import pytest

from .running import run_python


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


@pytest.mark.stack
def test_the_environment_report_works():
    from mmseg.utils import collect_env

    report = collect_env()
    assert report['MMEngine'] == mmengine.__version__
    assert report['TorchVision'].split('+')[0] == importlib.metadata.version('torchvision')
    assert 'MMSegmentation' in report
