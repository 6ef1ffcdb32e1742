"""What is saved in the tests' processes changes nothing that they see."""

from __future__ import annotations

import gc
import platform
import resource
import statistics
from collections.abc import Callable
from types import FunctionType

import mmengine.config.config as module
import pytest
import torch
from mmengine.config import Config
from yapf.yapflib import yapf_api

from .cheaper import FORMAT_CODE, format_a_text_once


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


def test_imports_are_left_out_of_collections():
    assert gc.get_freeze_count() > 100_000


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="an option of glibc's malloc")
def test_memory_that_was_freed_is_handed_out_again():
    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**25)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # 128 MiB are 32,768 pages of 4 KiB, or 64 of 2 MiB. The first times find no room for them.
    assert statistics.median(new_pages() for _ in range(11)) < 10
