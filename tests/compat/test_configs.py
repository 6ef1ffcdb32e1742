"""Values with blanks on the command line, and configs of installed packages."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction
from mmengine.infer import BaseInferencer
from mmseg.registry import MODELS

from mmseg_fusion import cli, compat
from mmseg_fusion.errors import InputError
from mmseg_fusion.files import config_file

from .running import origin, run_python

FUSION_BASE = 'mmseg_fusion::_base_/models/upernet_r18.py'


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
        assert get_installed_path(module) == str(Path(origin(module)).parent)
    assert get_installed_path(compat.FAMILIES[compat.family()]['mmseg'][0][0]) == str(
        Path(origin('mmseg')).parent
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


#: Everyone who reads a config by its name.
READERS = {
    'tools': cli.read_config,
    'inferencers': lambda name: BaseInferencer._load_model_from_metafile(None, name)[0],
}


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('end', ['', '.py'])
def test_a_name_is_the_same_file_for_everyone(reader, end):
    name = f'mmseg_fusion::camvid/upernet_r18_1xb16-4k_camvid-360x480{end}'
    assert READERS[reader](name).filename == config_file(name)


@pytest.mark.parametrize('reader', READERS)
def test_a_name_of_no_package_is_refused_by_everyone(reader):
    # mmengine's hub knows a table of packages, and would install one of them that is missing.
    with pytest.raises(
        (InputError, FileNotFoundError, SystemExit),
        match=r"'no_such_package' is no installed package with configs\. Expected PACKAGE::FOLDER",
    ):
        READERS[reader]('no_such_package::a/b')
