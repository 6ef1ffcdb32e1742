"""docs/model_zoo.md is made from the metafiles, and holds each of their models."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ZOO = runpy.run_path(str(ROOT / 'docs' / 'model_zoo.py'))
PAGE = (ROOT / 'docs' / 'model_zoo.md').read_text(encoding='utf-8')


def test_page_is_what_the_script_writes():
    assert ZOO['page']() == PAGE, 'python docs/model_zoo.py'


@pytest.mark.parametrize(
    'metafile', sorted(ROOT.glob('configs/*/metafile.yaml')), ids=lambda p: p.parent.name
)
def test_every_model_has_its_line(metafile):
    for model in yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']:
        (line,) = [row for row in PAGE.splitlines() if f'| `{model["Name"]}` |' in row]
        assert f'{model["Metadata"]["Parameters"] / 1e6:.2f} M' in line
        results = model.get('Results') or []
        for result in results if isinstance(results, list) else [results]:
            for key, value in result['Metrics'].items():
                assert not key.startswith('mIoU') or f'{value}' in line


def test_ours_are_means_over_seeds(tmp_path, monkeypatch):
    runs = [dict(config='a', mIoU=50.0), dict(config='a', mIoU=52.0), dict(config='b', mIoU=40.0)]
    record = tmp_path / 'record.json'
    record.write_text(json.dumps(dict(runs=runs)), encoding='utf-8')
    for text in ZOO['ours']().values():
        assert f'| {text} |' in PAGE
    monkeypatch.setitem(ZOO['ours'].__globals__, 'RESULTS', record)
    assert ZOO['ours']() == {'a': '51.00 ± 1.41, 2 seeds', 'b': '40.00, 1 seed'}
