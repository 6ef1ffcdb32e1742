"""What the pages say that a paper reports is what the metafiles say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / 'docs' / 'paper_numbers.py'))
METHODS = SCRIPT['METHODS']


@pytest.mark.parametrize('path', SCRIPT['pages'](), ids=lambda p: p.stem)
def test_page_is_what_the_script_writes(path: Path) -> None:
    text = path.read_text(encoding='utf-8')
    assert SCRIPT['inserted'](text, SCRIPT['pages']()[path]) == text, 'docs/paper_numbers.py'


@pytest.mark.parametrize('method', METHODS)
def test_numbers_are_the_metafiles(method: str) -> None:
    metafile = ROOT / 'configs' / method / 'metafile.yaml'
    found = {m['Name']: m for m in yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']}
    title, _, rows = METHODS[method]
    lines = SCRIPT['table'](method).splitlines()
    (line,) = [row for row in SCRIPT['overview']().splitlines() if f'[{title}](' in row]
    for label, name in rows:
        results = found[name]['Results']
        for result in results if isinstance(results, list) else [results]:
            assert result['Source'] != 'ours'
        first = results[0] if isinstance(results, list) else results
        (row,) = [row for row in lines if row.startswith(f'| {label} |')]
        assert f'| {first["Metrics"]["mIoU"]:.2f} |' in row
        assert f'{found[name]["Metadata"]["Parameters"] / 1e6:.2f} M' in row
        if name in (rows[0][1], rows[-1][1]):
            assert f'{first["Metrics"]["mIoU"]:.2f}' in line
    # Baseline and method are compared on one data set and one size.
    sizes = {str(found[name]['Metadata']['FLOPs Shape']) for _, name in rows}
    data = {str(found[name]['Metadata']['Training Data']) for _, name in rows}
    assert len(sizes) == len(data) == 1


def test_every_method_has_its_lines() -> None:
    assert sorted(METHODS) == sorted(p.stem for p in (ROOT / 'docs' / 'methods').glob('*.md'))


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match='paper: begin'):
        SCRIPT['inserted']('text', 'table')
