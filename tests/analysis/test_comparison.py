"""What a table of several models over several seeds says."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest

from mmseg_fusion.analysis import comparison


def run(config: str, seed: int, miou: float, **more) -> dict:
    found = dict(config=config, seed=seed, fingerprint='f', mIoU=miou, aAcc=90.0, mAcc=50.0)
    found.update(IoU=dict(sky=miou + 1, road=miou - 1), seconds_per_iteration=0.5 + seed)
    found.update(
        peak_memory_mb=100,
        parameters=2_500_000,
        iterations=6,
        versions={'torch': '2'},
        device='CPU',
    )
    return {**found, **more}


@pytest.fixture
def record() -> dict:
    found = comparison.empty('Street', [0, 1, 2])
    found['note'] = 'Small.'
    found['groups'] = [dict(title='Heads', baseline='a', configs=['a', 'b', 'c'])]
    found['configs'] = {n: dict(path=f'configs/x/{n}.py') for n in 'abc'}
    found['runs'] = [
        *(run('a', s, v) for s, v in enumerate((40.0, 42.0, 41.0))),
        *(run('b', s, v) for s, v in enumerate((41.0, 44.0, 42.0))),
    ]
    return found


def test_paired_difference_is_students():
    # Differences 1, 2, 1: mean 4/3, standard error sqrt(1/3)/sqrt(3) = 1/3; the 0.975 quantile of
    # t with 2 degrees of freedom is 4.302653 (any printed table).
    found = comparison.paired_difference({0: 40.0, 1: 42.0, 2: 41.0}, {0: 41.0, 1: 44.0, 2: 42.0})
    assert found.mean == pytest.approx(4 / 3)
    assert found.low == pytest.approx(4 / 3 - 4.302653 / 3, abs=1e-5)
    assert found.high == pytest.approx(4 / 3 + 4.302653 / 3, abs=1e-5)
    assert str(found) == '+1.33 [-0.10, +2.77]'


def test_paired_difference_over_common_seeds_alone():
    one = comparison.paired_difference({0: 1.0, 5: 9.0}, {0: 2.0, 7: 3.0})
    assert (one.mean, one.low, one.high, one.n) == (1.0, None, None, 1)
    assert str(one) == '+1.00 (n = 1)'
    assert comparison.paired_difference({0: 1.0}, {1: 2.0}) is None


def test_equal_differences_have_an_interval_without_width():
    found = comparison.paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0})
    assert (found.low, found.high) == (1.0, 1.0)


def test_rows(record):
    a, b, c = comparison.rows(record, record['groups'][0])
    assert (a['mean'], a['std'], a['n'], a['difference']) == (41.0, 1.0, 3, None)
    assert b['std'] == pytest.approx(math.sqrt(7 / 3))
    assert b['difference'].mean == pytest.approx(4 / 3)
    assert b['IoU'] == pytest.approx({'sky': 43.3333, 'road': 41.3333}, abs=1e-3)
    assert a['seconds_per_iteration'] == 1.5
    assert c['n'] == 0


def test_a_class_without_pixels_is_left_out_of_the_mean(record):
    record['runs'][0]['IoU']['sky'] = math.nan
    row = comparison.rows(record, record['groups'][0])[0]
    assert row['IoU']['sky'] == pytest.approx(42.5)


def test_tables_show_every_row_and_what_is_missing(record):
    for markdown in (False, True):
        text = comparison.tables(record, markdown)
        assert '+1.33 [-0.10, +2.77]' in text
        assert '41.00' in text
        assert '2.50 M' in text
        assert 'not run yet' in text
        assert 'sky' in text


def test_page(record):
    page = comparison.page(record, 'results/x.json', 'docs/x.md')
    assert page.startswith('# Street\n\nSmall.')
    assert '6 of 9 runs are finished.' in page
    assert 'compare.py --from results/x.json --write docs/x.md' in page
    lines = [line for line in page.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in lines[:5]}) == 1


def test_names_lose_what_they_share(record):
    names = {n: f'{n}_1xb4-1k_street-8x8' for n in 'abc'}
    assert comparison.common_end([*names.values()]) == '_1xb4-1k_street-8x8'
    assert comparison.common_end([*names.values(), 'd_1xb4-2k_street-8x8']) == ''
    assert comparison.common_end(['a', 'b']) == ''


def test_summary_and_where_it_is_inserted(record):
    assert comparison.summary(record).splitlines()[2:] == [
        '| a | b | 41.00 | 42.33 | +1.33 [-0.10, +2.77] | 3 |'
    ]
    text = f'before\n{comparison.BEGIN}\nold\n{comparison.END}\nafter\n'
    found = comparison.inserted(text, record)
    assert found == comparison.inserted(found, record)
    assert found.startswith(f'before\n{comparison.BEGIN}\n| baseline')
    assert found.endswith(f'| 3 |\n{comparison.END}\nafter\n')
    for wrong in ('', f'{comparison.BEGIN}\n', f'{comparison.END}\n{comparison.BEGIN}\n', text * 2):
        with pytest.raises(ValueError, match='expected one line'):
            comparison.inserted(wrong, record)


def test_record_is_read_as_it_was_written(record, tmp_path):
    path = tmp_path / 'record.json'
    path.write_text(comparison.text(record))
    assert comparison.read(path) == record
    # A line for every run: a new one is one line of a diff.
    assert sum('"seed":' in line for line in path.read_text().splitlines()) == 6
    path.write_text(json.dumps({'title': ''}))
    with pytest.raises(ValueError, match=r'no record.*configs'):
        comparison.read(path)
    path.write_text('{')
    with pytest.raises(ValueError, match='no record'):
        comparison.read(path)


SETTINGS = dict(
    model=dict(type='A', decode_head=dict(channels=8, in_index=[0, 1])),
    train_cfg=dict(max_iters=6, val_interval=3),
    optim_wrapper=dict(optimizer=dict(lr=0.1)),
    work_dir='somewhere',
    log_level='INFO',
    default_hooks=dict(checkpoint=dict(interval=3)),
)


def changed(key: str, value) -> dict:
    found = json.loads(json.dumps(SETTINGS))
    *path, last = key.split('.')
    inner = found
    for name in path:
        inner = inner[name]
    inner[last] = value
    return found


@pytest.mark.parametrize(
    ('key', 'value', 'decides'),
    [
        ('model.decode_head.channels', 9, True),
        ('model.decode_head.in_index', [0, 2], True),
        ('train_cfg.max_iters', 7, True),
        ('optim_wrapper.optimizer.lr', 0.2, True),
        ('custom_hooks', [dict(type='EMAHook')], True),
        ('load_from', 'x.pth', True),
        ('train_cfg.val_interval', 6, False),
        ('work_dir', 'elsewhere', False),
        ('log_level', 'ERROR', False),
        ('default_hooks.checkpoint.interval', 1, False),
    ],
)
def test_fingerprint_changes_with_what_decides(key, value, decides):
    old = comparison.settings_of(SETTINGS)
    new = comparison.settings_of(changed(key, value))
    assert (comparison.fingerprint(old) != comparison.fingerprint(new)) == decides
    lines = list(comparison.differences(old, new))
    assert bool(lines) == decides
    if decides:
        assert lines[0].startswith(key)


def test_differences_name_old_and_new():
    old = comparison.settings_of(SETTINGS)
    new = comparison.settings_of(changed('model.decode_head.in_index', [0, 2]))
    assert list(comparison.differences(old, new)) == ['model.decode_head.in_index.1: 1 -> 2']


def test_draw(record, tmp_path):
    import cv2

    path = tmp_path / 'plot.png'
    comparison.draw(record, path)
    first = cv2.imread(str(path))
    record['runs'][0]['mIoU'] += 3
    comparison.draw(record, path)
    second = cv2.imread(str(path))
    assert first.shape[1] >= 600
    assert first.shape != second.shape or (first != second).any()
    # No text leaves the picture: its border is white all around.
    for edge in (first[:2], first[-2:], first[:, :2], first[:, -2:]):
        assert (edge == 255).all()


def test_draw_with_long_names_cuts_nothing(record, tmp_path):
    import cv2

    names = {name: f'{name}_sequential-dual-attention_lite0' for name in record['configs']}
    long = json.loads(json.dumps(record))
    long['configs'] = {names[name]: entry for name, entry in record['configs'].items()}
    for group in long['groups']:
        group['configs'] = [names[name] for name in group['configs']]
        group['baseline'] = names[group['baseline']]
        group['title'] = 'Sequential instead of parallel dual attention'
    for run in long['runs']:
        run['config'] = names[run['config']]
    comparison.draw(long, tmp_path / 'plot.png')
    picture = cv2.imread(str(tmp_path / 'plot.png'))
    for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]):
        assert (edge == 255).all()


@pytest.mark.parametrize(
    'content',
    [
        # What benchmark.py and the benchmarks of the methods write.
        dict(configs=[dict(config='configs/x/a.py', median=0.5), dict(config='b.py', median=0.25)]),
        dict(setup='', results=[dict(variant='a', median=0.5), dict(variant='b', median=0.25)]),
    ],
)
def test_latencies(content, record, tmp_path):
    path = tmp_path / 'latency.json'
    path.write_text(json.dumps(content))
    assert comparison.read_latencies(path) == {'a': 500.0, 'b': 250.0}
    found = comparison.points(record, comparison.read_latencies(path))
    assert [(p['config'], p['latency'], p['baseline']) for p in found] == [
        ('a', 500.0, True),
        ('b', 250.0, False),
    ]
    assert found[1]['mean'] == pytest.approx((41 + 44 + 42) / 3)


@pytest.mark.parametrize('content', ['no JSON', '[]', '{}', '{"results": [{"variant": "a"}]}'])
def test_files_that_are_no_latencies(content, tmp_path):
    path = tmp_path / 'latency.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=r'latency\.json: expected what benchmark\.py'):
        comparison.read_latencies(path)


def test_draw_latency(record, tmp_path):
    import cv2

    path = tmp_path / 'plot.png'
    pictures = []
    for latency in (10.0, 30.0):
        comparison.draw_latency(record, {'a': 20.0, 'b': latency}, path)
        pictures.append(cv2.imread(str(path)))
    first, second = pictures
    assert first.shape != second.shape or (first != second).any()
    for edge in (first[:2], first[-2:], first[:, :2], first[:, -2:]):
        assert (edge == 255).all()
    # The third was timed and not run.
    with pytest.raises(ValueError, match='both run and timed; timed: c; run: a, b'):
        comparison.draw_latency(record, {'c': 1.0}, path)


def test_every_pair_of_keys_is_a_different_fingerprint():
    variants = [changed('model.decode_head.channels', n) for n in range(5)]
    prints = [comparison.fingerprint(comparison.settings_of(v)) for v in variants]
    assert all(a != b for a, b in combinations(prints, 2))
