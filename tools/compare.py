"""Trains configs over seeds, tests them, and writes one table of means, spreads and differences.

    python tools/compare.py CONFIG... --seeds 0 1 2 [--baseline CONFIG] [--results FILE]
    python tools/compare.py --from FILE [--write PAGE.md] [--plot PICTURE [--latency FILE]]
    python tools/compare.py --from FILE --run

The first form runs all runs that are not finished yet. The second makes the tables from a record
that the first form wrote. The third runs the runs that are missing in that record.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    check_at_least,
    check_config,
    config_files,
    exits_on_input_error,
    whole_file,
)

from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mmseg_fusion.analysis import comparison
from mmseg_fusion.analysis.counting import count

TOOLS = Path(__file__).resolve().parent
VERSIONS = {
    'torch': ('torch',),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmsegmentation': ('mmsegmentation', 'onedl-mmsegmentation'),
    'timm': ('timm',),
    'mmseg-fusion': ('mmseg-fusion',),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition('\n\n')[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='*', metavar='CONFIG', help='the first is the baseline')
    parser.add_argument('--from', dest='source', type=Path, metavar='FILE', help='a record (JSON)')
    parser.add_argument('--run', action='store_true', help='with --from: run what it lacks')
    parser.add_argument(
        '--only', nargs='+', metavar='NAME', help='with --run: of the configs, these alone for now'
    )
    parser.add_argument('--plan', action='store_true', help='write the record and run nothing yet')
    parser.add_argument('--baseline', metavar='CONFIG', help='one of the configs')
    parser.add_argument(
        '--seeds', type=int, nargs='+',
        help='default: 0 1 2; with --run: of the seeds of the record, these alone for now',
    )  # fmt: skip
    parser.add_argument('--title', help='of the table; default: the name of the baseline')
    parser.add_argument(
        '--results',
        type=Path,
        metavar='FILE',
        help='the record (JSON) to add to; default: WORK_DIR/results.json',
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare'))
    parser.add_argument('--write', type=Path, metavar='PAGE.md', help='the tables as Markdown')
    parser.add_argument(
        '--insert',
        type=Path,
        metavar='FILE.md',
        help=f'the differences, between the lines {comparison.BEGIN} and {comparison.END}',
    )
    parser.add_argument('--plot', type=Path, metavar='PICTURE', help='points, means, intervals')
    parser.add_argument(
        '--latency',
        type=Path,
        metavar='FILE',
        help='of benchmark.py or benchmark_eseg.py --json: --plot draws mIoU against its medians',
    )
    add_overwrite(parser, 'replace a PICTURE that this tool did not write')
    parser.add_argument('--jobs', type=int, default=1, help='runs side by side')
    parser.add_argument('--threads', type=int, help="of each run on a CPU; default: PyTorch's own")
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none')
    parser.add_argument('--gpus-per-run', type=int, default=1, help='processes of a launcher')
    parser.add_argument('--partition', help='of --launcher slurm')
    parser.add_argument('--amp', action='store_true', help='passed to tools/train.py')
    parser.add_argument(
        '--rerun',
        action='store_true',
        help='drop finished runs of configs that have changed since, instead of stopping',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change every config first, as train_cfg.max_iters=2000',
    )
    args = parser.parse_args(argv)
    if bool(args.configs) == bool(args.source):
        parser.error('give configs, or --from with a record')
    if args.run and not args.source:
        parser.error('--run goes with --from; with configs nothing else is done anyway')
    if args.only and not args.run:
        parser.error('--only goes with --run')
    if args.plan and not args.configs:
        parser.error('--plan goes with configs')
    if args.source and not args.source.is_file():
        parser.error(f'--from: {args.source} is not a file')
    if args.latency and not args.plot:
        parser.error('--latency goes with --plot')
    if args.latency and not args.latency.is_file():
        parser.error(f'--latency: {args.latency} is not a file')
    if args.source and (args.baseline or args.title or args.cfg_options):
        parser.error('--baseline, --title and --cfg-options stand in the record: --from')
    if args.source and args.seeds and not args.run:
        parser.error('--seeds goes with configs, or with --from and --run')
    if args.launcher == 'none' and args.gpus_per_run != 1:
        parser.error('--gpus-per-run needs --launcher pytorch or slurm')
    if (args.launcher == 'slurm') != bool(args.partition):
        parser.error('--launcher slurm and --partition go together')
    check_at_least(parser, args, jobs=1, gpus_per_run=1, threads=1)
    if args.seeds and len(set(args.seeds)) != len(args.seeds):
        parser.error(f'--seeds: one of them stands twice: {args.seeds}')
    args.configs = [check_config(path) for path in args.configs]
    names = [Path(p).stem for p in args.configs]
    if len(set(names)) != len(names):
        parser.error(f'two of the configs have one name: {" ".join(sorted(names))}')
    if args.baseline and Path(args.baseline).stem not in names:
        parser.error(f'--baseline: {args.baseline} is none of the configs')
    return args


# --- what is to be run ---------------------------------------------------------------------------


@dataclass
class Run:
    """One config with one seed.

    Attributes:
        name: of the config.
        seed: of the run.
        folder: of its own.
        cfg: what is trained.
        settings: what of it decides over the result.
        peak_mb: memory of its processes so far.
        seconds: they took so far.
    """

    name: str
    seed: int
    folder: Path
    cfg: Config
    settings: dict[str, Any]
    peak_mb: float = 0.0
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        return comparison.fingerprint(self.settings)

    @property
    def iterations(self) -> int:
        return self.cfg.train_cfg.get('max_iters') or self.cfg.train_cfg.get('max_epochs')

    def __str__(self) -> str:
        return f'{self.name}, seed {self.seed}'


def planned(record: dict[str, Any], args: argparse.Namespace) -> list[Run]:
    """All runs of a record: group by group, in a group seed by seed, so that pairs are finished."""
    configs = {}
    for name, entry in record['configs'].items():
        check_config(entry['path'])
        cfg = comparison.prepared(entry['path'], entry.get('options', {}))
        settings = comparison.settings_of(cfg._cfg_dict.to_dict())
        # What the command line adds to the config decides as well.
        if args.amp:
            settings['amp'] = True
        if args.gpus_per_run > 1:
            settings['gpus_per_run'] = args.gpus_per_run
        configs[name] = cfg, settings
    order = dict.fromkeys(
        (name, seed)
        for group in record['groups']
        for seed in record['seeds']
        for name in group['configs']
    )
    runs = []
    for name, seed in order:
        cfg, settings = configs[name]
        cfg = Config(cfg._cfg_dict.to_dict())
        cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
        runs.append(Run(name, seed, args.work_dir / name / f'seed-{seed}', cfg, settings))
    return runs


def changed(record: dict[str, Any], runs: list[Run]) -> dict[str, list[str]]:
    """By config, the differences between the trained settings and the present ones."""
    changes: dict[str, list[str]] = {}
    for run in runs:
        old = record['configs'][run.name].get('settings')
        kept = comparison.runs_of(record, run.name)
        if not kept or old is None or comparison.fingerprint(old) == run.fingerprint:
            state = _read(run.folder / 'run.json')
            old = state.get('settings') if state else None
        if old is not None and comparison.fingerprint(old) != run.fingerprint:
            changes.setdefault(run.name, list(comparison.differences(old, run.settings)))
    return changes


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding='utf-8')) if path.is_file() else None


def _write(path: Path, content: str) -> None:
    with whole_file(path) as file:
        file.write(content.encode())


# --- one run -------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(run: Run, say) -> Iterator[int]:
    """Locks the folder of a run; its processes keep the lock, even if this process is killed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / 'lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'{run}: waits for a process that still works in {run.folder}')
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def train_command(args: argparse.Namespace, run: Run) -> list[str]:
    """The command line of the project's own tools that trains ``run``."""
    config = str(run.folder / 'config.py')
    options = ['--work-dir', str(run.folder)]
    if (run.folder / 'last_checkpoint').is_file():
        options.append('--resume')
    if args.amp:
        options.append('--amp')
    if args.launcher == 'pytorch':
        return ['bash', str(TOOLS / 'dist_train.sh'), config, str(args.gpus_per_run), *options]
    if args.launcher == 'slurm':
        name = f'{run.name}-{run.seed}'
        return ['bash', str(TOOLS / 'slurm_train.sh'), args.partition, name, config, *options]
    return [sys.executable, str(TOOLS / 'train.py'), config, *options]


def test_command(args: argparse.Namespace, run: Run, checkpoint: Path) -> list[str]:
    """Likewise, that tests it."""
    options = [str(run.folder / 'config.py'), str(checkpoint)]
    last = ['--work-dir', str(run.folder / 'test')]
    if args.launcher == 'pytorch':
        return ['bash', str(TOOLS / 'dist_test.sh'), *options, str(args.gpus_per_run), *last]
    if args.launcher == 'slurm':
        name = f'{run.name}-{run.seed}-test'
        return ['bash', str(TOOLS / 'slurm_test.sh'), args.partition, name, *options, *last]
    return [sys.executable, str(TOOLS / 'test.py'), *options, *last]


def call(args: argparse.Namespace, run: Run, command: list[str], log: str, lock: int) -> None:
    """Runs ``command``; what it prints goes into a file.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    env = dict(os.environ, PYTHON=sys.executable, PYTHONUNBUFFERED='1')
    if args.launcher == 'slurm':
        env['GPUS'] = str(args.gpus_per_run)
        env.setdefault('GPUS_PER_NODE', str(min(args.gpus_per_run, 8)))
    if args.threads:
        env.update(OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads))
    path = run.folder / log
    with path.open('ab') as output:
        # A session of its own: ^C here is passed on below, once.
        run.process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, pass_fds=[lock],
            start_new_session=True,
        )  # fmt: skip
        _, status, usage = os.wait4(run.process.pid, 0)
        run.process.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes.
    run.peak_mb = max(run.peak_mb, usage.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10))
    code, run.process = run.process.returncode, None
    if code:
        end = path.read_text(encoding='utf-8', errors='replace').strip().splitlines()[-8:]
        raise RuntimeError(f'{command[1]} ended with {code}; {path} ends with\n' + '\n'.join(end))


def perform(args: argparse.Namespace, run: Run, say) -> dict[str, Any]:
    """Trains and tests a run, or the rest of it, and returns its line of the record."""
    with alone(run, say) as lock:
        result = _read(run.folder / 'result.json')
        if result is not None:
            return result
        state = _read(run.folder / 'run.json') or dict(settings=run.settings, peak_mb=0.0)
        run.peak_mb = state['peak_mb']
        # First, since it builds the model: what cannot be built fails before anything is trained.
        params = parameters(run.cfg)

        def keep() -> None:
            state['peak_mb'] = run.peak_mb
            _write(run.folder / 'run.json', json.dumps(state))

        keep()
        _write(run.folder / 'config.py', run.cfg.pretty_text)
        if not state.get('trained'):
            call(args, run, train_command(args, run), 'train.log', lock)
            state['trained'] = True
            keep()
        checkpoint = Path((run.folder / 'last_checkpoint').read_text().strip())
        # Where the folder was moved since.
        checkpoint = run.folder / checkpoint.name
        call(args, run, test_command(args, run, checkpoint), 'test.log', lock)
        metrics = json.loads(sorted((run.folder / 'test').glob('*/*.json'))[-1].read_text())
        result = outcome(run, metrics, params)
        _write(run.folder / 'result.json', json.dumps(result))
        return result


def outcome(run: Run, metrics: dict[str, float], params: int) -> dict[str, Any]:
    """The line of a finished run."""
    scalars = training_scalars(run.folder)
    times = [row['time'] for row in scalars if 'time' in row]
    gpu = [row['memory'] for row in scalars if 'memory' in row]
    classes = {
        key.partition('.')[2]: round(value, 4)
        for key, value in metrics.items()
        if key.startswith('IoU.')
    }
    miou = sum(classes.values()) / len(classes) if classes else metrics['mIoU']
    return dict(
        config=run.name,
        seed=run.seed,
        fingerprint=run.fingerprint,
        mIoU=round(miou, 4),
        aAcc=metrics['aAcc'],
        mAcc=metrics['mAcc'],
        IoU=classes,
        iterations=run.iterations,
        seconds_per_iteration=round(median(times), 3) if times else None,
        peak_memory_mb=round(max(gpu) if gpu else run.peak_mb),
        parameters=params,
        versions=versions(),
        device=device(),
    )


def training_scalars(folder: Path) -> list[dict[str, Any]]:
    """The scalars that training logged, over all of its parts, without those of the test."""
    scalars = []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed process
            for line in path.read_text(encoding='utf-8').splitlines():
                row = json.loads(line)
                if 'loss' in row:
                    scalars.append(row)
    return scalars


def parameters(cfg: Config) -> int:
    """The number of parameters, without auxiliary heads."""
    size = cfg.model.get('data_preprocessor', {}).get('size', (512, 512))
    return count(Config(cfg._cfg_dict.to_dict()), tuple(size)).params


def versions() -> dict[str, str]:
    """Of the packages that a result may depend on."""
    installed = {}
    for name, spellings in VERSIONS.items():
        for spelling in spellings:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                installed[name] = importlib.metadata.version(spelling)
                break
    return installed


def device() -> str:
    """What a run is computed on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r'model name\s*: (.+)', _cpuinfo())
    return (names[0] if names else platform.processor()) or 'CPU'


def _cpuinfo() -> str:
    path = Path('/proc/cpuinfo')
    return path.read_text() if path.is_file() else ''


# --- all runs ------------------------------------------------------------------------------------


def perform_all(args: argparse.Namespace, runs: list[Run], keep) -> list[str]:
    """Performs all runs, ``args.jobs`` at a time; returns the failures, in words.

    Args:
        args: of the program.
        runs: the runs to perform.
        keep: called with the line of every run that is finished.
    """
    console = Console(stderr=True)
    failed: list[str] = []
    stop = threading.Event()
    bars = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    def work(run: Run) -> dict[str, Any] | None:
        if stop.is_set():
            return None
        task = bars.add_task(str(run), total=run.iterations)
        tasks[task] = run
        try:
            return perform(args, run, bars.console.print)
        finally:
            tasks.pop(task, None)
            bars.remove_task(task)

    tasks: dict[Any, Run] = {}
    with bars, ThreadPoolExecutor(args.jobs) as pool:
        total = bars.add_task('[bold]all runs', total=len(runs))
        watcher = threading.Thread(target=_watch, args=(bars, tasks, stop), daemon=True)
        watcher.start()
        futures = {pool.submit(work, run): run for run in runs}
        try:
            for future in as_completed(futures):
                run = futures[future]
                try:
                    result = future.result()
                except Exception as error:
                    failed.append(f'{run}: {error}')
                    bars.console.print(f'{run}: failed', style='red')
                else:
                    if result is not None:
                        keep(result)
                        bars.console.print(f'{run}: mIoU {result["mIoU"]:.2f}')
                bars.advance(total)
        except KeyboardInterrupt:
            stop.set()
            for run in runs:
                if run.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(run.process.pid, signal.SIGTERM)
            raise
        finally:
            stop.set()
    return failed


def _watch(bars: Progress, tasks: dict[Any, Run], stop: threading.Event) -> None:
    """Moves the bars to the iterations that the runs have logged."""
    while not stop.wait(1.0):
        if bars.disable:
            return
        for task, run in list(tasks.items()):
            scalars = training_scalars(run.folder)
            if scalars:
                bars.update(task, completed=scalars[-1].get('step', 0))


def extended(record: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The record with the group of the command line."""
    names = [Path(p).stem for p in args.configs]
    baseline = Path(args.baseline).stem if args.baseline else names[0]
    group = dict(title=args.title or baseline.split('_1xb')[0], baseline=baseline, configs=names)
    others = [g for g in record['groups'] if g['title'] != group['title']]
    same = [g for g in record['groups'] if g['title'] == group['title']]
    if same:
        place = record['groups'].index(same[0])
        # What stands in the file beside them, as a note, was written by hand.
        others.insert(place, {**same[0], **group})
    else:
        others.append(group)
    record['groups'] = others
    record['seeds'] = sorted({*record['seeds'], *(args.seeds or [0, 1, 2])})
    for name, path in zip(names, args.configs):
        entry = record['configs'].setdefault(name, {})
        entry['path'] = _shown(Path(path))
        if args.cfg_options:
            entry['options'] = json.loads(json.dumps(dict(args.cfg_options)))
        else:
            entry.pop('options', None)
    return record


def _shown(path: Path) -> str:
    """``path`` from where the program is called, without a machine's folders."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


@exits_on_input_error
def main() -> None:
    args = parse_args()
    file = args.source or args.results or args.work_dir / 'results.json'
    # A record is added to, a page says itself that it is made, and FILE.md is changed in place.
    inputs = [*config_files(*args.configs), file, args.write, args.insert, args.latency]
    outputs = Outputs('compare', inputs, args.overwrite)
    outputs.check(args.plot)
    try:
        record = comparison.read(file) if file.is_file() else comparison.empty('Comparison', [])
        latencies = comparison.read_latencies(args.latency) if args.latency else None
    except ValueError as error:
        raise SystemExit(str(error)) from None
    failed = []
    if args.configs or args.run:
        if args.configs:
            record = extended(record, args)
        if args.plan:
            _write(file, comparison.text(record))
        else:
            failed = run_missing(record, file, args)
    try:
        if args.write:
            if args.write.exists() and comparison.MADE not in args.write.read_text('utf-8'):
                raise ValueError('it is there, and was not made by this tool')
            _write(args.write, comparison.page(record, _shown(file), _shown(args.write)))
        if args.insert:
            text = args.insert.read_text('utf-8')
            _write(args.insert, comparison.inserted(text, record))
    except ValueError as error:
        raise SystemExit(f'{args.write or args.insert}: {error}') from None
    if not (args.write or args.insert):
        print(comparison.tables(record), end='')
    if args.plot:
        with outputs.path(args.plot) as picture:
            if latencies is None:
                comparison.draw(record, picture)
            else:
                try:
                    comparison.draw_latency(record, latencies, picture)
                except ValueError as error:
                    raise SystemExit(f'--latency {args.latency}: {error}') from None
    if failed:
        raise SystemExit(
            f'\n{len(failed)} runs failed; the same command tries them again:\n\n'
            + '\n\n'.join(failed)
        )


def run_missing(record: dict[str, Any], file: Path, args: argparse.Namespace) -> list[str]:
    """Runs the missing runs of a record and stores each result; returns the failures."""
    runs = planned(record, args)
    for name, lines in changed(record, runs).items():
        if not args.rerun:
            shown = '\n'.join(f'  {line}' for line in lines[:20])
            raise SystemExit(
                f'{name} has changed since it was run, so that its results do not belong to it:\n'
                f'{shown}\nPut it back, give it another name, choose another --work-dir and '
                '--results, or drop its old runs with --rerun.'
            )
        record['runs'] = [run for run in record['runs'] if run['config'] != name]
        for run in runs:
            if run.name == name and run.folder.is_dir():
                run.folder.rename(run.folder.with_name(f'{run.folder.name}.{int(time.time())}'))
    for run in runs:
        entry = record['configs'][run.name]
        entry.update(fingerprint=run.fingerprint, settings=run.settings)
    lock = threading.Lock()

    def keep(result: dict[str, Any] | None = None) -> None:
        with lock:
            if result is not None:
                key = (result['config'], result['seed'])
                record['runs'] = [r for r in record['runs'] if (r['config'], r['seed']) != key]
                record['runs'].append(result)
                order = {(r.name, r.seed): i for i, r in enumerate(runs)}
                record['runs'].sort(key=lambda r: order.get((r['config'], r['seed']), len(order)))
            _write(file, comparison.text(record))

    keep()
    finished = {(r['config'], r['seed']) for r in record['runs']}
    missing = [run for run in runs if (run.name, run.seed) not in finished]
    if args.only:
        unknown = sorted({*args.only} - {*record['configs']})
        if unknown:
            raise SystemExit(f'--only: {unknown} are none of {sorted(record["configs"])}')
        missing = [run for run in missing if run.name in args.only]
    # With configs, the record holds these seeds by now.
    if args.seeds:
        unknown = sorted({*args.seeds} - {*record['seeds']})
        if unknown:
            raise SystemExit(f'--seeds: {unknown} are none of {record["seeds"]}')
        missing = [run for run in missing if run.seed in args.seeds]
    return perform_all(args, missing, keep) if missing else []


if __name__ == '__main__':
    main()
