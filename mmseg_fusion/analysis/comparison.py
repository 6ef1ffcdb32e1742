"""Compares several models over several seeds: tables, differences and their intervals.

A record is a dict with all data of a comparison, as stored in a JSON file::

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
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from mmengine.config import Config

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


def prepared(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """A config as it is trained: with options, ``IterationSeedHook`` and ``ClassIoUMetric``.

    Args:
        path: of the config.
        options: changes to the config, by dotted keys.
    """
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(dict(options or {}))
    hooks = cfg.get('custom_hooks', [])
    if not any(hook['type'] == 'IterationSeedHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='IterationSeedHook')]
    evaluator = cfg.get('test_evaluator')
    if isinstance(evaluator, dict) and evaluator['type'] == 'IoUMetric':
        evaluator['type'] = 'ClassIoUMetric'
    imports = cfg.get('custom_imports') or dict(imports=[], allow_failed_imports=False)
    if 'mmseg_fusion' not in imports['imports']:
        imports['imports'] = [*imports['imports'], 'mmseg_fusion']
    cfg.custom_imports = imports
    return cfg


def settings_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that affects the result, as builtin types.

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
    """Mean of paired differences, and its 95 % interval if there are at least two pairs."""

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
        None if no seed is common.
    """
    seeds = sorted(set(baseline) & set(other))
    if not seeds:
        return None
    differences = [other[s] - baseline[s] for s in seeds]
    if len(seeds) == 1:
        return Difference(differences[0], None, None, 1)
    if len({round(d, 12) for d in differences}) == 1:
        # No spread at all, of which scipy makes NaN.
        return Difference(differences[0], differences[0], differences[0], len(seeds))
    from scipy.stats import ttest_rel

    test = ttest_rel([other[s] for s in seeds], [baseline[s] for s in seeds])
    low, high = test.confidence_interval(0.95)
    return Difference(mean(differences), float(low), float(high), len(seeds))


def mean_and_std(values: Collection[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation where two values or more have one."""
    return mean(values), stdev(values) if len(values) > 1 else None


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
        if runs:
            row['mean'], row['std'] = mean_and_std(values.values())
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
                measured = [r[key] for r in runs.values() if r.get(key) is not None]
                row[key] = median(measured) if measured else None
        table.append(row)
    return table


def _is(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


# --- words ---------------------------------------------------------------------------------------

COLUMNS = ('model', 'mIoU', 'std', 'n', 'difference', 's/iter', 'memory', 'parameters')


def common_end(names: Sequence[str]) -> str:
    """The common ending of names in MMSegmentation's style, from ``_1xb4-...`` on, or nothing."""
    ends = {m[0] if (m := re.search(r'_\d+xb\d.*$', name)) else '' for name in names}
    return ends.pop() if len(ends) == 1 else ''


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the main table as text, without the name; unknown values are a dash."""
    if not row['n']:
        return ('not run yet', *['–'] * 6)
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
    return (f'{row["mean"]:.2f}', optional[0], str(row['n']), *optional[1:])


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        lines = [head, ['---'] * len(head), *lines]
        return ['| ' + ' | '.join(line) + ' |' for line in lines]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return ['  '.join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in [head, *lines]]


def tables(record: dict[str, Any], markdown: bool = False) -> str:
    """All groups of a record as text or Markdown.

    Args:
        record: see the module.
        markdown: tables with ``|``, titles with ``##``.
    """
    end = common_end([*record['configs']])
    parts = []
    for group in record['groups']:
        table = rows(record, group)
        lines = [(row['config'].removesuffix(end), *cells(row)) for row in table]
        parts.append(f'## {group["title"]}' if markdown else group['title'])
        parts.append('\n'.join(_table(COLUMNS, lines, markdown)))
        done = [row for row in table if row['n']]
        if done:
            classes = list(done[0]['IoU'])
            lines = [
                (
                    row['config'].removesuffix(end),
                    *('–' if (v := row['IoU'][c]) is None else f'{v:.1f}' for c in classes),
                )
                for row in done
            ]
            parts.append('IoU per class, means over the seeds:')
            parts.append('\n'.join(_table(('model', *classes), lines, markdown)))
        if group.get('note'):
            parts.append(group['note'])
    return '\n\n'.join(parts) + '\n'


#: By this a page is known as one that may be written over.
MADE = 'This page is made from its record by'


def page(record: dict[str, Any], source: str, path: str) -> str:
    """A Markdown page of a record: title, note, tables, and the commands that make it.

    Args:
        record: see the module.
        source: path of the record, as the commands on the page name it.
        path: path of the page, likewise.
    """
    planned = len({n for g in record['groups'] for n in g['configs']}) * len(record['seeds'])
    how = (
        'mIoU in per cent on the test split, mean over the seeds; std: standard deviation over the '
        'seeds; n: how many; difference: to the first line of the table, over the seeds that both '
        'have, with the 95 % interval of the paired t, where two seeds or more allow one. '
        's/iter: median of the seconds per iteration of training, on a machine as busy as it was; '
        'memory: peak of the process, or of the GPU where there is one; parameters: without '
        'auxiliary heads.'
    )
    end = common_end([*record['configs']])
    if end:
        how += f" The configs' names end with `{end}`."
    parts = [f'# {record["title"]}', record.get('note', '').strip(), how]
    done = f'{len(record["runs"])} of {planned} runs are finished.'
    places = sorted({f'{run["device"]}' for run in record['runs']})
    stacks = {', '.join(f'{k} {v}' for k, v in run['versions'].items()) for run in record['runs']}
    if places:
        done += f' They ran on {" and ".join(places)}, with {"; or ".join(sorted(stacks))}.'
    parts += [done, tables(record, markdown=True).strip()]
    parts.append(
        f'## How it was made\n\n{MADE}\n\n'
        f'```shell\npython tools/compare.py --from {source} --write {path}\n```\n\n'
        'and the runs that are missing are made by\n\n'
        f'```shell\npython tools/compare.py --from {source} --run\n```'
    )
    return '\n\n'.join(p for p in parts if p) + '\n'


def summary(record: dict[str, Any]) -> str:
    """The differences alone: a Markdown table with one line per method that has been run."""
    end = common_end([*record['configs']])
    lines = []
    for group in record['groups']:
        base, *others = rows(record, group)
        lines += [
            (
                base['config'].removesuffix(end),
                row['config'].removesuffix(end),
                f'{base["mean"]:.2f}',
                f'{row["mean"]:.2f}',
                str(row['difference'] or '–'),
                str(row['n']),
            )
            for row in others
            if base['n'] and row['n']
        ]
    head = ('baseline', 'with the method', 'mIoU', 'mIoU', 'paired difference', 'seeds')
    return '\n'.join(_table(head, lines, True)) + '\n'


BEGIN, END = '<!-- comparison: begin -->', '<!-- comparison: end -->'


def inserted(text: str, record: dict[str, Any]) -> str:
    """``text`` with the summary of ``record`` between its two lines :data:`BEGIN`, :data:`END`.

    Raises:
        ValueError: the two lines do not occur exactly once each, in this order.
    """
    head, begin, rest = text.partition(BEGIN + '\n')
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f'expected one line {BEGIN!r} and behind it one line {END!r}')
    return f'{head}{begin}{summary(record)}{end}{tail}'


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
    """A record as JSON, a line per group, config and run, so that versions of it diff well."""

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

    groups = [(g, [r for r in rows(record, g) if r['n']]) for g in record['groups']]
    # A group of which nothing was run takes no room.
    tables = [(group, table) for group, table in groups if table]
    lines = sum(len(r) for _, r in tables)
    figure, axis = plt.subplots(figsize=(8, 1.5 + 0.36 * (lines + len(tables))))
    height, ticks, labels = 0.0, [], []
    for group, table in tables:
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
            labels.append(row['config'].removesuffix(common_end([*record['configs']])))
    axis.set_yticks(ticks, labels)
    # In lines that have room beside the longest name.
    axis.set_xlabel(
        'mIoU in per cent\ncircles are seeds, diamonds their mean,\nlines its 95 % interval'
    )
    axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def read_latencies(path: Path) -> dict[str, float]:
    """Milliseconds per step of every config in what ``benchmark*.py --json`` has written.

    Raises:
        ValueError: the file holds no such numbers.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        # benchmark.py names a config by its path, the benchmarks of the methods by its stem.
        rows = content['results'] if 'results' in content else content['configs']
        return {
            Path(row.get('config') or row['variant']).stem: 1000 * float(row['median'])
            for row in rows
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path}: expected what benchmark.py or benchmark_eseg.py writes with --json, a list '
            f'of results with the name of the config and the median of its seconds ({error!r})'
        ) from None


def points(record: dict[str, Any], latencies: dict[str, float]) -> list[dict[str, Any]]:
    """What a picture of accuracy against latency shows, group by group.

    Args:
        record: see the module.
        latencies: milliseconds by config, from :func:`read_latencies`.

    Returns:
        A dict for every config that was run and timed: ``config``, ``group`` (its title),
        ``baseline`` (whether it is that of the group), ``latency`` in ms, ``mean`` and ``std`` of
        the mIoU over the seeds, in per cent; ``std`` is None with one seed.

    Raises:
        ValueError: there is no such config.
    """
    found = [
        dict(
            config=row['config'],
            group=group['title'],
            baseline=row['config'] == group['baseline'],
            latency=latencies[row['config']],
            mean=row['mean'],
            std=row['std'],
        )
        for group in record['groups']
        for row in rows(record, group)
        if row['n'] and row['config'] in latencies
    ]
    if not found:
        raise ValueError(
            f'no config of the record was both run and timed; timed: {", ".join(latencies)}; '
            f'run: {", ".join(sorted({run["config"] for run in record["runs"]}))}'
        )
    return found


def draw_latency(record: dict[str, Any], latencies: dict[str, float], path: Path) -> None:
    """A picture of mIoU against latency: a point per config, joined to the baseline of its group.

    Args:
        record: see the module.
        latencies: milliseconds by config, from :func:`read_latencies`.
        path: of the picture; its suffix chooses the format.

    Raises:
        ValueError: no config was both run and timed.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    found = points(record, latencies)
    figure, axis = plt.subplots(figsize=(8, 7))
    colours = plt.get_cmap('tab10')
    colour_of = {t: colours(i % 10) for i, t in enumerate(dict.fromkeys(p['group'] for p in found))}
    for title, colour in colour_of.items():
        group = [p for p in found if p['group'] == title]
        base = next((p for p in group if p['baseline']), None)
        for point in group:
            x, y = point['latency'], point['mean']
            if base is not None and point is not base:
                axis.plot([base['latency'], x], [base['mean'], y], lw=0.8, alpha=0.5, color=colour)
            face = 'white' if point['baseline'] else colour
            axis.errorbar(
                x, y, point['std'], fmt='o', ms=7, mfc=face, color=colour, elinewidth=1, capsize=2
            )
        axis.plot([], [], 'o', color=colour, label=title)
    axis.set_xlabel('latency in ms')
    axis.set_ylabel('mIoU in per cent')
    # Beside the outer points there is room for their names.
    axis.margins(x=0.2, y=0.1)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(
        title='empty circles: the baselines; bars: standard deviation over seeds',
        ncols=2,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        loc='upper center',
        bbox_to_anchor=(0.5, -0.1),
    )
    figure.tight_layout()
    _name_points(axis, found, [colour_of[p['group']] for p in found], common_end(record['configs']))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _name_points(axis: Any, found: list[dict[str, Any]], colours: list[Any], end: str) -> None:
    """Writes the name of every point beside it, where no other name and no point stands."""
    figure = axis.figure
    figure.canvas.draw()
    marks = [axis.transData.transform((p['latency'], p['mean'])) for p in found]
    taken: list[Any] = []
    # Horizontally beside the point, then farther and farther above and below.
    places = [(9, 0, 'left'), (-9, 0, 'right')]
    for step in range(1, 6):
        for side in (9, 0, -9):
            align = {9: 'left', 0: 'center', -9: 'right'}[side]
            places += [(side, 10 * step, align), (side, -10 * step, align)]
    for point, colour in zip(found, colours):
        best = None
        for dx, dy, align in places:
            text = axis.annotate(
                point['config'].removesuffix(end),
                (point['latency'], point['mean']),
                textcoords='offset points',
                xytext=(dx, dy),
                ha=align,
                va='center',
                fontsize=8,
                color=colour,
            )
            box = text.get_window_extent()
            hits = sum(box.overlaps(other) for other in taken)
            hits += sum(box.padded(5).contains(*mark) for mark in marks)
            hits += not all(figure.bbox.padded(-3).contains(*corner) for corner in box.corners())
            if best is None or hits < best[0]:
                if best is not None:
                    best[1].remove()
                best = hits, text, box
            else:
                text.remove()
            if not hits:
                break
        taken.append(best[2])
