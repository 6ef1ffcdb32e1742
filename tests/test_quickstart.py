"""docs/quickstart.ipynb runs from top to bottom, and shows what its text says."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'quickstart.ipynb'


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(cell: nbformat.NotebookNode) -> str:
    return ''.join(output.text for output in cell.outputs if output.get('name') == 'stdout')


def pictures(cell: nbformat.NotebookNode) -> int:
    return sum(
        any(kind.startswith('image/') for kind in output.get('data', {})) for output in cell.outputs
    )


@pytest.fixture(scope='module')
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[nbformat.NotebookNode]:
    """The code cells after a run in an empty folder; an error in one of them is an error here."""
    notebook = nbformat.read(PAGE, as_version=4)
    folder = tmp_path_factory.mktemp('quickstart')
    for cell in code_of(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(notebook, timeout=1800, resources=dict(metadata=dict(path=str(folder))))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    client.execute(
        env=dict(
            os.environ,
            PYTHONPATH=path,
            OMP_NUM_THREADS='1',
            CUDA_VISIBLE_DEVICES='',
            # What keep_freed_memory() of cheaper.py sets.
            MALLOC_MMAP_MAX_='0',
            MALLOC_TRIM_THRESHOLD_=str(2**31 - 1),
        )
    )
    return code_of(notebook)


def test_it_runs_and_learns(ran):
    text = ''.join(map(printed, ran))
    first, last = map(
        float, re.search(r'first ten steps ([\d.]+), last ten ([\d.]+)', text).groups()
    )
    assert last < 0.85 * first
    # The best constant prediction has less than 6 %.
    assert float(re.search(r'held out: ([\d.]+) %', text)[1]) > 10


def test_it_shows_what_it_says(ran):
    text = ''.join(map(printed, ran))
    # Loss, prediction, and the tool's picture.
    assert sum(map(pictures, ran)) == 3
    assert re.search(r'decode_head\.fpn_bottleneck\.conv \[[\d.]+(, [\d.]+){3}\]', text)
    losses = re.findall(r'loss_car_(\w+): ([\d.]+) in the first step, ([\d.]+) in the last', text)
    assert {name for name, _, _ in losses} == {'intra_c2p', 'inter_c2c', 'inter_c2p'}
    assert "cfg.model.type = 'CAREncoderDecoder'\ncfg.model.car = dict(" in ran[-1].source


def test_the_page_is_stored_as_it_ran():
    """The site shows what is stored: every cell ran, in order, and none of them failed."""
    notebook = nbformat.read(PAGE, as_version=4)
    nbformat.validate(notebook)
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse(cell.source)
        assert all(output.output_type != 'error' for output in cell.outputs)
    assert sum(map(pictures, cells)) == 3
    assert PAGE.stat().st_size < 500_000


def test_its_links_are_there():
    text = '\n'.join(
        cell.source
        for cell in nbformat.read(PAGE, as_version=4).cells
        if cell.cell_type == 'markdown'
    )
    named = re.findall(r'\]\(([\w./]+)\)', text)
    assert named
    for name in named:
        assert (PAGE.parent / name).is_file(), name
