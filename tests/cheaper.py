"""What the tests' own processes save: they build hundreds of runners after ten thousand imports."""

from __future__ import annotations

import functools
import gc

import mmengine.config.config
import yapf.yapflib.yapf_api

#: yapf's own.
FORMAT_CODE = yapf.yapflib.yapf_api.FormatCode


def format_a_text_once() -> None:
    """Lets yapf format the text of a config once; a Runner asks four times, half a second each."""
    original = yapf.yapflib.yapf_api.FormatCode

    @functools.lru_cache(maxsize=64)
    def formatted(text: str, style: tuple, more: tuple) -> tuple:
        return original(text, style_config=dict(style), **dict(more))

    def format_code(text: str, style_config: dict, **more: object) -> tuple:
        return formatted(text, tuple(style_config.items()), tuple(more.items()))

    # onedl-mmengine imports it where it formats, mmengine when it is imported itself.
    yapf.yapflib.yapf_api.FormatCode = format_code
    if hasattr(mmengine.config.config, 'FormatCode'):
        mmengine.config.config.FormatCode = format_code


def leave_imports_alone() -> None:
    """Takes what is there out of every later garbage collection, half a second each."""
    gc.collect()
    gc.freeze()
