"""Fixtures that every test may use, and what each test starts from."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import mmseg_fusion  # noqa: F401  isort: skip  (first: it meets the third-party quirks)
import numpy as np
import pytest
import torch
from hypothesis import settings
from mmengine.registry import DefaultScope

from .cheaper import (
    format_a_text_once,
    keep_freed_memory,
    leave_imports_alone,
    read_a_file_once,
)

ROOT = Path(__file__).resolve().parent.parent

# A loaded machine is no failure, and a failure is one that comes again.
settings.register_profile('mmseg_fusion', deadline=None, derandomize=True)
settings.load_profile('mmseg_fusion')

# Plain asserts in the base testers then print both sides, as they do in a test file.
pytest.register_assert_rewrite('tests.testers')


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist each worker, and each program it starts, would take a thread per core.
    if os.environ.get('PYTEST_XDIST_WORKER'):
        torch.set_num_threads(1)
        os.environ.setdefault('OMP_NUM_THREADS', '1')
    format_a_text_once()
    keep_freed_memory()
    read_a_file_once(ROOT / 'configs')


def pytest_collection_finish(session: pytest.Session) -> None:
    leave_imports_alone()


#: What a file has in it whose tests start programs, or go through the configs of all methods.
LONG = re.compile(
    r'\bsubprocess\b|\brun_python\b|\bmultiprocessing\b|\bin_processes\b|\bNotebookClient\b'
    r'|from \.files import'
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--fast',
        action='store_true',
        help='leave out the tests that start programs, go through all configs, compile a model '
        'or are of a backbone',
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Not even imported: the files about the configs read all of them to name their tests.
    if not config.getoption('fast', False) or collection_path.suffix != '.py':
        return None
    folders = {ROOT / 'tests' / 'tools', ROOT / 'tests' / 'models' / 'backbones'}
    return (
        bool(folders & {*collection_path.parents})
        or bool(LONG.search(collection_path.read_text(encoding='utf-8')))
        or None
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption('fast', False):
        compiled = [item for item in items if 'compiles' in item.name]
        config.hook.pytest_deselected(items=compiled)
        items[:] = [item for item in items if item not in compiled]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason='marked gpu: torch sees no CUDA device')
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts with the same random states and with mmseg's registries, in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='module', autouse=True)
def _leave_earlier_files_alone() -> None:
    """What earlier files have left, as configs that were read, is not collected again and again."""
    leave_imports_alone()


@pytest.fixture(scope='session')
def repo_root() -> Path:
    """The folder with pyproject.toml."""
    return ROOT


@pytest.fixture(scope='session')
def camvid_root() -> Path:
    """A folder with CamVid's img_dir/ and ann_dir/; a test that asks is skipped without one."""
    tried = [ROOT / 'data' / 'camvid', ROOT.parent / 'shared' / 'camvid']
    if os.environ.get('CAMVID_ROOT'):
        tried.insert(0, Path(os.environ['CAMVID_ROOT']))
    for path in tried:
        if (path / 'img_dir').is_dir() and (path / 'ann_dir').is_dir():
            return path
    pytest.skip(
        'no CamVid images: set CAMVID_ROOT or make data/camvid with img_dir/ and ann_dir/ '
        f'(looked in {", ".join(map(str, tried))})'
    )
