"""What the tests' own processes save: they build hundreds of runners after ten thousand imports."""

from __future__ import annotations

import ctypes
import functools
import gc
import platform

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


def keep_freed_memory() -> None:
    """Lets glibc hand memory out again instead of giving it back to the system.

    Each tensor of some size comes out of new pages otherwise, and the system fills those with zeros
    first: a fifth of the time in which a wide model trains a step.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
