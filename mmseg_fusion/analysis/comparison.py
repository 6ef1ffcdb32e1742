"""Several models over several seeds: what a table of them says, and how sure it is.

A record is a dict with all that a comparison keeps, as it stands in a JSON file::

    {'title': ..., 'note': ...,
     'groups': [{'title': ..., 'baseline': NAME, 'configs': [NAME, ...]}, ...],
     'seeds': [0, 1, 2],
     'configs': {NAME: {'path': ..., 'fingerprint': ..., 'settings': {...}}},
     'runs': [{'config': NAME, 'seed': 0, 'fingerprint': ..., 'mIoU': ..., 'IoU': {...}, ...}]}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

#: What a result depends on. Left out: where files lie, what is logged, saved and drawn, validation,
#: and the file's own variables, which have done their work once the file has been read.
DECISIVE = (
    'model',
    'train_dataloader',
    'test_dataloader',
    'test_evaluator',
    'test_cfg',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
    'custom_hooks',
    'load_from',
    'sync_bn',
    'find_unused_parameters',
)


def settings_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that decides over the result, as builtin types.

    Args:
        cfg: a config as a dict.
    """
    kept = {key: cfg[key] for key in DECISIVE if cfg.get(key) is not None}
    kept = json.loads(json.dumps(kept, default=str))
    for key in ('val_interval', 'val_begin', 'dynamic_intervals'):
        kept.get('train_cfg', {}).pop(key, None)
    return kept


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name of ``settings`` that changes with each of them."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, name: str = '') -> Iterator[str]:
    """Lines ``key: old -> new`` of every value that differs between two settings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f'{name}.{key}' if name else str(key)
            yield from differences(old.get(key), new.get(key), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f'{name}.{index}')
    elif old != new:
        yield f'{name}: {old!r} -> {new!r}'


# --- numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and its 95 % interval where two pairs or more allow one."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None:
            return f'{self.mean:+.2f} (n = {self.n})'
        return f'{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]'


def paired_difference(baseline: dict[int, float], other: dict[int, float]) -> Difference | None:
    """``other`` minus ``baseline`` over the seeds that both have.

    The interval is that of the paired t test.

    Args:
        baseline: value by seed.
        other: likewise.

    Returns:
        None where no seed is common.
    """
    seeds = sorted(set(baseline) & set(other))
    if not seeds:
        return None
    found = [other[s] - baseline[s] for s in seeds]
    if len(seeds) == 1:
        return Difference(found[0], None, None, 1)
    if len({round(d, 12) for d in found}) == 1:
        # No spread at all, of which scipy makes NaN.
        return Difference(found[0], found[0], found[0], len(seeds))
    from scipy.stats import ttest_rel

    test = ttest_rel([other[s] for s in seeds], [baseline[s] for s in seeds])
    low, high = test.confidence_interval(0.95)
    return Difference(mean(found), float(low), float(high), len(seeds))


def runs_of(record: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    """The finished runs of a config by seed."""
    return {run['seed']: run for run in record['runs'] if run['config'] == name}


def rows(record: dict[str, Any], group: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of one table: statistics of each config of ``group``, its baseline first."""
    baseline = runs_of(record, group['baseline'])
    names = [group['baseline'], *(n for n in group['configs'] if n != group['baseline'])]
    table = []
    for name in names:
        runs = runs_of(record, name)
        values = {seed: run['mIoU'] for seed, run in runs.items()}
        row: dict[str, Any] = dict(config=name, n=len(runs), seeds=values)
        row['path'] = record['configs'].get(name, {}).get('path')
        if runs:
            row['mean'] = mean(values.values())
            row['std'] = stdev(values.values()) if len(values) > 1 else None
            is_base = name == group['baseline']
            miou = {seed: run['mIoU'] for seed, run in baseline.items()}
            row['difference'] = None if is_base else paired_difference(miou, values)
            classes = next(iter(runs.values()))['IoU']
            row['IoU'] = {
                c: mean(v)
                if (v := [r['IoU'][c] for r in runs.values() if _is(r['IoU'][c])])
                else None
                for c in classes
            }
            for key in ('seconds_per_iteration', 'peak_memory_mb', 'parameters'):
                found = [r[key] for r in runs.values() if r.get(key) is not None]
                row[key] = median(found) if found else None
        table.append(row)
    return table


def _is(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


# --- words ---------------------------------------------------------------------------------------

COLUMNS = ('model', 'mIoU', 'std', 'n', 'difference', 's/iter', 'memory', 'parameters')


def cells(row: dict[str, Any], link: bool = False) -> tuple[str, ...]:
    """One line of the main table as text; what is not known is a dash."""
    name = row['config']
    if link and row.get('path'):
        name = f'[{name}]({row["path"]})'
    if not row['n']:
        return (name, 'not run yet', *['–'] * 6)
    optional = [
        '–' if row[key] is None else show(row[key])
        for key, show in (
            ('std', lambda v: f'{v:.2f}'),
            ('difference', str),
            ('seconds_per_iteration', lambda v: f'{v:.2f}'),
            ('peak_memory_mb', lambda v: f'{v:.0f} MB'),
            ('parameters', lambda v: f'{v / 1e6:.2f} M'),
        )
    ]
    return (name, f'{row["mean"]:.2f}', optional[0], str(row['n']), *optional[1:])


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        lines = [head, ['---'] * len(head), *lines]
        return ['| ' + ' | '.join(line) + ' |' for line in lines]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return ['  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in [head, *lines]]


def tables(record: dict[str, Any], markdown: bool = False, level: int = 2, links: str = '') -> str:
    """All groups of a record as text or Markdown.

    Args:
        record: see the module.
        markdown: tables with ``|``, titles with ``#``.
        level: of the groups' titles in Markdown.
        links: what stands before a config's path in Markdown links; without it there are none.
    """
    parts = []
    for group in record['groups']:
        found = rows(record, group)
        for row in found:
            row['path'] = links + row['path'] if links and row['path'] else None
        parts.append(f'{"#" * level} {group["title"]}' if markdown else group['title'])
        parts.append('\n'.join(_table(COLUMNS, [cells(r, bool(links)) for r in found], markdown)))
        done = [row for row in found if row['n']]
        if done:
            classes = list(done[0]['IoU'])
            lines = [
                (r['config'], *('–' if (v := r['IoU'][c]) is None else f'{v:.1f}' for c in classes))
                for r in done
            ]
            parts.append('IoU per class, means over the seeds:')
            parts.append('\n'.join(_table(('model', *classes), lines, markdown)))
    return '\n\n'.join(parts) + '\n'


def page(record: dict[str, Any], source: str, links: str) -> str:
    """A Markdown page of a record: title, note, tables, and the command that makes it.

    Args:
        record: see the module.
        source: the record's path, from the root of the repository.
        links: from the page to the root of the repository, as ``../``.
    """
    done = len(record['runs'])
    planned = len({n for g in record['groups'] for n in g['configs']}) * len(record['seeds'])
    versions = record['runs'][0].get('versions', {}) if record['runs'] else {}
    how = (
        'mIoU in per cent on the test split, mean over the seeds; std: standard deviation over the '
        'seeds; n: how many; difference: to the first line of the table, over the seeds that both '
        'have, with the 95 % interval of the paired t. Seconds per iteration are the median of the '
        'training run on the machine as busy as it was, memory is the peak of the process (of the '
        'GPU, where there is one).'
    )
    parts = [f'# {record["title"]}', record.get('note', '').strip(), how]
    parts.append(f'{done} of {planned} runs are finished.')
    if versions:
        parts.append('Versions: ' + ', '.join(f'{k} {v}' for k, v in versions.items()) + '.')
    parts.append(tables(record, markdown=True, links=links).strip())
    parts.append(
        'This page is made from its record by\n\n```shell\n'
        f'python tools/compare.py --from {source} --write PAGE.md\n```\n\n'
        'and the runs that are missing are made by\n\n```shell\n'
        f'python tools/compare.py --from {source} --run\n```'
    )
    return '\n\n'.join(p for p in parts if p) + '\n'


def summary(record: dict[str, Any]) -> str:
    """The differences alone: a Markdown table with one line per method that has been run."""
    lines = []
    for group in record['groups']:
        base, *others = rows(record, group)
        lines += [
            (
                group['title'],
                f'{base["mean"]:.2f}',
                row['config'].split('_1xb')[0],
                f'{row["mean"]:.2f}',
                str(row['difference'] or '–'),
                str(row['n']),
            )
            for row in others
            if base['n'] and row['n']
        ]
    head = ('baseline', 'mIoU', 'model', 'mIoU', 'paired difference', 'n')
    return '\n'.join(_table(head, lines, True)) + '\n'


# --- files ---------------------------------------------------------------------------------------


def empty(title: str, seeds: Sequence[int]) -> dict[str, Any]:
    """A record without runs."""
    return dict(title=title, note='', seeds=list(seeds), groups=[], configs={}, runs=[])


def read(path: Path) -> dict[str, Any]:
    """A record from its file.

    Raises:
        ValueError: the file is not such a record.
    """
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        missing = {'title', 'seeds', 'groups', 'configs', 'runs'} - set(record)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f'{path} is no record of tools/compare.py: {error}') from None
    if missing:
        raise ValueError(f'{path} is no record of tools/compare.py: no {sorted(missing)}')
    return record


def text(record: dict[str, Any]) -> str:
    """A record as JSON with one line per group, config and run, so that versions of it diff well."""

    def one_per_line(items: list[str], brackets: str) -> str:
        return f'{brackets[0]}\n' + ',\n'.join('  ' + i for i in items) + f'\n {brackets[1]}'

    parts = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            shown = one_per_line([json.dumps(v) for v in value], '[]')
        elif isinstance(value, dict) and value:
            lines = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in value.items()]
            shown = one_per_line(lines, '{}')
        else:
            shown = json.dumps(value)
        parts.append(f' {json.dumps(key)}: {shown}')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


def draw(record: dict[str, Any], path: Path) -> None:
    """A picture of a record: a point per seed, the mean and, from two seeds on, its interval.

    Args:
        record: see the module.
        path: of the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    found = [(g, [r for r in rows(record, g) if r['n']]) for g in record['groups']]
    lines = sum(len(r) for _, r in found)
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * (lines + len(found))))
    height, ticks, labels = 0.0, [], []
    for group, table in found:
        if not table:
            continue
        height -= 1
        ticks.append(height)
        labels.append(group['title'].upper())
        for row in table:
            height -= 1
            colour = 'tab:gray' if row['config'] == group['baseline'] else 'tab:blue'
            values = list(row['seeds'].values())
            axis.plot(values, [height] * len(values), 'o', ms=5, mfc='none', color=colour)
            axis.plot([row['mean']], [height], 'D', ms=6, color=colour)
            if row['std'] is not None:
                from scipy.stats import t

                half = t.ppf(0.975, row['n'] - 1) * row['std'] / math.sqrt(row['n'])
                axis.plot([row['mean'] - half, row['mean'] + half], [height] * 2, color=colour)
            ticks.append(height)
            labels.append(row['config'].split('_1xb')[0])
    axis.set_yticks(ticks, labels)
    axis.set_xlabel(
        'mIoU in per cent: circles are seeds, diamonds their mean, lines its 95 % interval'
    )
    axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
