"""What the tests' own processes save: they build hundreds of runners after ten thousand imports."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import pickle
import platform
from pathlib import Path
from typing import Any

import mmengine.config.config
import yapf.yapflib.yapf_api
from mmengine.config import Config

#: yapf's own, and MMEngine's.
FORMAT_CODE = yapf.yapflib.yapf_api.FormatCode
FILE_TO_DICT = Config._file2dict


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


def read_a_file_once(folder: Path) -> None:
    """Lets a config file below ``folder`` be read once: 400 configs inherit from the same few.

    Nobody changes those files while tests run. What comes of one is a copy each time.
    """
    parsed: dict[Any, bytes] = {}

    @functools.wraps(FILE_TO_DICT)
    def file_to_dict(filename: str, *args: Any, **options: Any) -> tuple:
        key = (os.path.abspath(filename), args, tuple(options.items()))
        if not key[0].startswith(f'{folder}{os.sep}'):
            return FILE_TO_DICT(filename, *args, **options)
        if key in parsed:
            return pickle.loads(parsed[key])
        found = FILE_TO_DICT(filename, *args, **options)
        # The third are the variables of the environment that it has asked for.
        if not found[2]:
            parsed[key] = pickle.dumps(found)
        return found

    Config._file2dict = staticmethod(file_to_dict)


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
