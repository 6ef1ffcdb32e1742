"""What is saved in the tests' processes changes nothing that they see."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import mmengine.config.config as module
import pytest
import torch
from mmengine.config import Config
from yapf.yapflib import yapf_api

from .cheaper import FILE_TO_DICT, FORMAT_CODE, format_a_text_once, read_a_file_once

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'


def formats_with(monkeypatch: pytest.MonkeyPatch, function: Callable) -> None:
    """Puts ``function`` where either family of the packages reads yapf's."""
    monkeypatch.setattr(yapf_api, 'FormatCode', function)
    if hasattr(module, 'FormatCode'):
        monkeypatch.setattr(module, 'FormatCode', function)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that yapf gets."""
    texts = []

    def noting(text: str, **options: object) -> tuple:
        texts.append(text)
        return FORMAT_CODE(text, **options)

    formats_with(monkeypatch, noting)
    format_a_text_once()
    return texts


def test_the_text_is_what_yapf_gives_and_a_changed_config_is_another_text(calls, monkeypatch):
    config = Config(dict(model=dict(type='A', sizes=[1, 2, 3]), lr=0.1))
    first = config.pretty_text
    assert config.pretty_text == first
    assert len(calls) == 1
    config.lr = 0.5
    assert config.pretty_text == first.replace('0.1', '0.5')
    assert len(calls) == 2
    config.lr = 0.1
    formats_with(monkeypatch, FORMAT_CODE)
    assert config.pretty_text == first


def test_a_text_that_yapf_refuses_stays_one(calls, monkeypatch):
    config = Config(dict(a=1))
    config.merge_from_dict({'b': FunctionType})

    def outcome() -> str:
        try:
            return config.pretty_text
        except SyntaxError as error:  # of mmengine; the fork returns the text
            return f'{type(error).__name__}: {error}'

    twice = [outcome(), outcome()]
    assert calls
    formats_with(monkeypatch, FORMAT_CODE)
    assert twice == 2 * [outcome()]


@pytest.mark.parametrize(
    'name',
    [
        *('gff/gff_r101-d8_4xb2-100k_cityscapes-864x864', 'car/sa_r50-d8_car_4xb4-30k_'),
        *('caa/caa_efficientnet-b7-d8_4xb4-40k_pascal-context-59-513x513', 'ksac/', 'eseg/eseg-l_'),
        *('hfgd/hfgd_r50_', 'camvid/', 'scale_equalizer/upernet_swin-t_scale-eq'),
    ],
)
def test_a_config_is_the_one_that_mmengine_reads(name, monkeypatch):
    folder, _, start = name.partition('/')
    path = next(p for p in sorted((CONFIGS / folder).glob('*.py')) if p.name.startswith(start))
    found, again = Config.fromfile(path), Config.fromfile(path)
    monkeypatch.setattr(Config, '_file2dict', staticmethod(FILE_TO_DICT))
    expected = Config.fromfile(path)
    again.model.clear()
    for cfg in (found, Config.fromfile(path)):
        assert cfg._cfg_dict.to_dict() == expected._cfg_dict.to_dict()
        assert (cfg.text, cfg.filename) == (expected.text, expected.filename)


def test_a_file_is_read_once_and_another_folders_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(Config, '_file2dict', staticmethod(FILE_TO_DICT))
    monkeypatch.setenv('LAYERS', '2')
    for name in ('read', 'other'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.py').write_text('sizes = [1, 2]')
        (tmp_path / name / 'b.py').write_text("layers = {{'$LAYERS:1'}}")
    read_a_file_once(tmp_path / 'read')

    def fresh(file: str) -> object:
        return Config.fromfile(tmp_path / file)

    first = fresh('read/a.py')
    first.sizes.append(3)
    assert (fresh('other/a.py').sizes, fresh('read/b.py').layers) == ([1, 2], 2)
    (tmp_path / 'read/a.py').write_text('sizes = [4]')
    (tmp_path / 'other/a.py').write_text('sizes = [4]')
    monkeypatch.setenv('LAYERS', '3')
    assert (fresh('read/a.py').sizes, fresh('other/a.py').sizes) == ([1, 2], [4])
    assert fresh('read/b.py').layers == 3


def test_imports_are_left_out_of_collections():
    assert gc.get_freeze_count() > 100_000


class MallInfo(ctypes.Structure):
    """What glibc's ``mallinfo`` gives: malloc.h."""

    names = 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'
    _fields_ = [(name, ctypes.c_int) for name in names.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="an option of glibc's malloc")
def test_no_tensor_has_pages_that_the_system_takes_back():
    mallinfo = ctypes.CDLL(None).mallinfo
    mallinfo.restype = MallInfo
    before = mallinfo().hblkhd
    tensor = torch.ones(2**25)
    # Bytes in blocks of their own.
    assert mallinfo().hblkhd == before
    assert tensor.all()
