"""The pages of results say what the records say, and the records belong to the configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmseg_fusion.analysis import comparison

ROOT = Path(__file__).resolve().parents[1]
PAGES = {'results/camvid.json': 'docs/results.md'}
RECORDS = {name: comparison.read(ROOT / name) for name in PAGES}
CONFIGS = [(name, config) for name in RECORDS for config in RECORDS[name]['configs']]


def test_every_record_has_a_page() -> None:
    assert {f'results/{p.name}' for p in (ROOT / 'results').iterdir()} == set(PAGES)


@pytest.mark.parametrize(('source', 'path'), PAGES.items())
def test_page_is_made_from_its_record(source: str, path: str) -> None:
    made = comparison.page(RECORDS[source], source, path)
    assert (ROOT / path).read_text(encoding='utf-8') == made, (
        f'python tools/compare.py --from {source} --write {path} --insert README.md'
    )
    # Every number of the record is on it.
    for group in RECORDS[source]['groups']:
        for row in comparison.rows(RECORDS[source], group):
            if row['n']:
                assert f'| {row["mean"]:.2f} |' in made


def test_readme_has_the_differences() -> None:
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert comparison.inserted(text, RECORDS['results/camvid.json']) == text


@pytest.mark.parametrize(('source', 'name'), CONFIGS, ids=[c for _, c in CONFIGS])
def test_runs_belong_to_the_config_as_it_is(source: str, name: str) -> None:
    record = RECORDS[source]
    entry = record['configs'][name]
    assert Path(entry['path']).stem == name
    cfg = comparison.prepared(ROOT / entry['path'], entry.get('options'))
    now = comparison.settings_of(cfg._cfg_dict.to_dict())
    runs = comparison.runs_of(record, name)
    if runs:
        assert list(comparison.differences(entry['settings'], now)) == []
    for run in runs.values():
        assert run['fingerprint'] == comparison.fingerprint(now)
        assert run['mIoU'] == pytest.approx(sum(run['IoU'].values()) / len(run['IoU']), abs=1e-3)
        assert run['iterations'] == cfg.train_cfg.max_iters


@pytest.mark.parametrize('source', RECORDS)
def test_groups_name_their_configs(source: str) -> None:
    record = RECORDS[source]
    grouped = [name for group in record['groups'] for name in group['configs']]
    assert sorted(grouped) == sorted(record['configs'])
    for group in record['groups']:
        assert group['baseline'] in group['configs']
    keys = [(run['config'], run['seed']) for run in record['runs']]
    assert len(keys) == len(set(keys))
    assert {config for config, _ in keys} <= set(record['configs'])
