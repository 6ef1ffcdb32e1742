"""What is saved in the tests' processes changes nothing that they see."""

from __future__ import annotations

import gc
from types import FunctionType

import mmengine.config.config as module
import pytest
from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

from .cheaper import format_a_text_once


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that yapf gets."""
    texts = []

    def noting(text: str, **options: object) -> tuple:
        texts.append(text)
        return FormatCode(text, **options)

    monkeypatch.setattr(module, 'FormatCode', noting)
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
    monkeypatch.setattr(module, 'FormatCode', FormatCode)
    assert config.pretty_text == first


def test_a_text_that_yapf_refuses_stays_an_error(calls):
    config = Config(dict(a=1))
    config.merge_from_dict({'b': FunctionType})
    for _ in range(2):
        with pytest.raises(SyntaxError, match='Failed to format the config file'):
            config.pretty_text  # noqa: B018  (a property that works)


def test_imports_are_left_out_of_collections():
    assert gc.get_freeze_count() > 100_000
