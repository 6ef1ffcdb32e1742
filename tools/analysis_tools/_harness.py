"""What the benchmarks of this folder share: turns, ratios, peak memory, tables, JSON, arguments.

A benchmark imports this file first: it finds the package of a source checkout.

A benchmark is a list of :class:`Case`. Each is a table: variants that take turns in one process, so
that a slow moment of the machine counts for all of them. A ratio is the median, over the turns, of
one variant's time over another's; ``torch.utils.benchmark`` times one statement after the other and
cannot give it.

``peak MiB`` has one meaning in all of them: what is held at the peak of two steps beyond what was
held before the first, that is beyond weights and inputs. Saved activations, gradients and
workspaces are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    CONFIGS,
    Outputs,
    add_overwrite,
    check_at_least,
    config_files,
    exits_on_input_error,
)

import torch
from prettytable import PrettyTable
from torch import Tensor, nn

from mmseg_fusion.analysis.counting import Counts

Step = Callable[[], object]
Shape = tuple[int, int, int, int]

MEMORY_STEPS = 2


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        name: its title.
        variants: their names, a row each.
        build: makes the step of a variant, with its weights and inputs.
        base: the variant that ratios are to; none if it is not among the variants.
        same: variants that compute what ``base`` does: their steps return a tensor, and ``error``
            is its largest difference from the base's, relative to the largest value of that.
        compare: pairs of variants for the sentences below the table.
        columns: by title, a number per variant that is known without running it, and its format.
        images: per step, for a column of images per second.
        memory: whether the peak is measured.
        info: what the JSON says about the case beside its name.
    """

    name: str
    variants: tuple[str, ...]
    build: Callable[[str], Step]
    base: str | None = None
    same: tuple[str, ...] = ()
    compare: tuple[tuple[str, str], ...] = ()
    columns: dict[str, tuple[dict[str, float], str]] = field(default_factory=dict)
    images: int | None = None
    memory: bool = True
    info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One variant of a case.

    Attributes:
        variant: its name.
        seconds: of each turn.
        memory: bytes at the peak beyond weights and inputs; None where it is unknown.
        error: see :attr:`Case.same`.
    """

    variant: str
    seconds: list[float]
    memory: int | None = None
    error: float | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio(self, base: Measured) -> float:
        """Median, over the turns, of this variant's time over another's."""
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds))

    @property
    def mib(self) -> float | None:
        """Its memory in MiB."""
        return None if self.memory is None else self.memory / 2**20

    def memory_ratio(self, base: Measured) -> float | None:
        """This variant's memory over another's, where both are known."""
        return self.memory / base.memory if self.memory is not None and base.memory else None


@dataclass(frozen=True)
class Result:
    """All variants of a case.

    Attributes:
        case: what was measured.
        rows: in the order of its variants.
    """

    case: Case
    rows: list[Measured]

    def __getitem__(self, variant: str) -> Measured:
        return next(row for row in self.rows if row.variant == variant)

    def ratio(self, variant: str, base: str) -> float:
        """Median, over the turns, of one variant's time over another's."""
        return self[variant].ratio(self[base])

    def as_json(self) -> list[dict]:
        """A plain dictionary per row."""
        rows = []
        for row in self.rows:
            known = {title: values[row.variant] for title, (values, _) in self.case.columns.items()}
            more = dict(case=self.case.name, median=row.median)
            rows.append({**asdict(row), **more, **self.case.info, **known})
        return rows


# --- arguments -----------------------------------------------------------------------------------


def make_parser(
    doc: str,
    repeat: int = 10,
    warmup: int = 2,
    batch_size: int | None = None,
    amp: bool = False,
    shape: tuple[int, int] | None = None,
    shapes: tuple[str, Sequence[Shape]] | None = None,
    config: tuple[str, str] | None = None,
) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes, and the options that a value is given for.

    Args:
        doc: docstring of the script; its first line is the description.
        repeat: default number of turns that are timed.
        warmup: default number of turns before them.
        batch_size: default of ``--batch-size``.
        amp: whether there is ``--amp``, see :func:`autocast`.
        shape: default of ``--shape H W``, of an image.
        shapes: of ``--shapes NxCxHxW ...``: what has them, and the default.
        config: of ``--config``: a name in configs/_base_/models, and the head that it must have.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=int, help='CPU threads of torch')
    add('--repeat', type=int, default=repeat, help=f'turns that are timed; default: {repeat}')
    add('--warmup', type=int, default=warmup, help=f'turns before them; default: {warmup}')
    add('--no-memory', action='store_true', help='time only')
    add('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    add_overwrite(parser)
    # Peaks of resident memory alone, as JSON.
    add('--only-memory', nargs='?', type=int, const=True, help=argparse.SUPPRESS)
    if batch_size is not None:
        add('--batch-size', type=int, default=batch_size, help=f'default: {batch_size}')
    if amp:
        add('--amp', action='store_true', help='mixed precision; bfloat16 on the CPU')
    if shape is not None:
        text = 'of an image; default: {} {}'.format(*shape)
        add('--shape', type=int, nargs=2, default=shape, metavar=('H', 'W'), help=text)
    if shapes is not None:
        of, sizes = shapes[0], list(shapes[1])
        text = f'of {of}; default: ' + ' '.join('x'.join(map(str, size)) for size in sizes)
        add('--shapes', type=shape_of, nargs='+', default=sizes, metavar='NxCxHxW', help=text)
    if config is not None:
        name, head = config
        path = CONFIGS.resolve() / '_base_' / 'models' / f'{name}.py'
        text = f'with a decode head of type {head}; default: configs/_base_/models/{name}.py'
        add('--config', default=str(path), help=text)
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **least: int
) -> argparse.Namespace:
    """Parses a command line; what every benchmark takes is checked, and ``least`` values too."""
    args = parser.parse_args(argv)
    # What a process of its own is started with.
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if 'batch_size' in args:
        least['batch_size'] = 1
    check_at_least(parser, args, repeat=1, warmup=0, threads=1, **least)
    if 'shape' in args:
        args.shape = tuple(args.shape)
        if min(args.shape) < 1:
            given = ' '.join(map(str, args.shape))
            parser.error(f'argument --shape: expected H W, positive, got {given}')
    check_device(parser, args)
    return args


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stops the program where there is no such device."""
    if on_gpu(args.device) and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')


def shape_of(text: str) -> Shape:
    """``'2x512x33x33'`` as numbers."""
    parts = text.lower().split('x')
    if len(parts) != 4 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f'expected NxCxHxW such as 2x512x33x33, got {text!r}')
    return tuple(map(int, parts))


def on_gpu(device: str) -> bool:
    return device.startswith('cuda')


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Mixed precision where ``--amp`` asks for it."""
    device = torch.device(args.device).type
    half = torch.bfloat16 if device == 'cpu' else torch.float16
    return torch.autocast(device, half, enabled=args.amp)


# --- steps ---------------------------------------------------------------------------------------


def noise(
    shapes: Sequence[Sequence[int]], device: str, gradient: bool, draw: Callable = torch.rand
) -> list[Tensor]:
    """Inputs, without negative values as behind ReLU unless ``draw`` is ``torch.randn``."""
    generator = torch.Generator().manual_seed(0)
    inputs = [draw(*shape, generator=generator).to(device) for shape in shapes]
    return [x.requires_grad_(gradient) for x in inputs]


def gradient_step(forward: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Step:
    """A step: forward and backward to what is wanted. It keeps no gradient and gives the result."""

    def step() -> Tensor:
        out = forward()
        torch.autograd.grad(out, wanted, torch.ones_like(out))
        return out.detach()

    return step


def module_step(
    module: nn.Module,
    inputs: Sequence[Tensor],
    forward: Callable[[], Any],
    backward: Callable[[Any], None] | None,
    args: argparse.Namespace,
) -> Step:
    """A step: forward, and backward to weights and inputs where ``backward`` is given."""

    def train() -> None:
        module.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None
        with autocast(args):
            out = forward()
        backward(out)

    @torch.no_grad()
    def infer() -> None:
        with autocast(args):
            forward()

    module.to(args.device).train(backward is not None)
    return infer if backward is None else train


# --- measuring -----------------------------------------------------------------------------------


def measure(steps: Sequence[Step], repeat: int, warmup: int, device: str) -> list[list[float]]:
    """Seconds of each turn of each step; a turn is one of each."""

    def synchronize() -> None:
        if on_gpu(device):
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        for step in steps:
            step()
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeat):
        for step, times in zip(steps, seconds):
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            times.append(time.perf_counter() - start)
    return seconds


def reset_peak() -> bool:
    """Lets :func:`resident_peak` start from what this process holds now; Linux alone can."""
    try:
        # 5 resets the high-water mark: proc_pid_clear_refs(5).
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def resident_peak() -> int | None:
    """The most memory, in bytes, that this process has held so far; None on Windows."""
    try:
        # getrusage would begin with what the process held that started this one.
        status = Path('/proc/self/status').read_text()
        return int(re.search(r'VmHWM:\s+(\d+) kB', status).group(1)) * 1024
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def load_what_a_step_loads() -> None:
    """A step of one convolution: at the first, torch imports parts of itself."""
    model = torch.nn.Conv2d(8, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(1, 8, 8, 8)).mean().backward()
    optimizer.step()


def peak_of(work: Step, device: str, fresh: bool = False) -> int | None:
    """Bytes at the peak of ``work`` in this process, beyond what it holds before.

    On a GPU of torch's allocations, on the CPU of the resident set. There an earlier peak would
    hide this one: it is None where that cannot be reset, unless the process is ``fresh``.
    """
    if on_gpu(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    load_what_a_step_loads()
    before = resident_peak() if reset_peak() or fresh else None
    work()
    return None if before is None else resident_peak() - before


def memory_here(step: Step, device: str) -> int | None:
    """Peak of :data:`MEMORY_STEPS` steps in this process, beyond what it holds before the first."""
    return peak_of(lambda: [step() for _ in range(MEMORY_STEPS)], device)


def all_memory_here(cases: Sequence[Case], device: str) -> list[dict[str, int | None]]:
    """Peak memory per case and variant, one after the other."""
    wanted = [(i, v) for i, case in enumerate(cases) if case.memory for v in case.variants]
    peaks: list[dict[str, int | None]] = [{} for _ in cases]
    # The first twice: it loads what all of them need.
    for i, variant in wanted[:1] + wanted:
        peaks[i][variant] = memory_here(cases[i].build(variant), device)
    return peaks


def all_memory_apart(script: str, argv: Sequence[str], number: int | None = None) -> Any:
    """What a script measures of memory, in a process of its own that returns at once what it frees.

    Args:
        script: its path.
        argv: its command line.
        number: of what alone is measured; None for all, as :func:`all_memory_here` has it.

    Raises:
        SystemExit: the script failed.
    """
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    command = [sys.executable, script, *argv, '--only-memory']
    command += [] if number is None else [str(number)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'measuring the memory failed: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def memory_for(smaller: str) -> Iterator[None]:
    """Where a GPU has too little memory, the program ends with what to make smaller."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f'out of memory ({reason}): give a smaller {smaller}') from error


def difference(out: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((out.float() - expected.float()).abs().max() / expected.float().abs().max())


def measure_case(
    case: Case, args: argparse.Namespace, memory: dict[str, int | None] | None = None
) -> Result:
    """All variants of a case; ``memory`` is what was measured of them apart."""
    memory = dict(memory or {})
    steps = {}
    for variant in case.variants:
        steps[variant] = case.build(variant)
        if on_gpu(args.device) and case.memory and not args.no_memory:
            memory[variant] = memory_here(steps[variant], args.device)
    errors = {}
    if case.same:
        expected = steps[case.base]()
        errors = {variant: difference(steps[variant](), expected) for variant in case.same}
        del expected
    seconds = measure(list(steps.values()), args.repeat, args.warmup, args.device)
    rows = [
        Measured(variant, times, memory.get(variant), errors.get(variant))
        for variant, times in zip(case.variants, seconds)
    ]
    return Result(case, rows)


def count_columns(counts: dict[str, Counts]) -> dict[str, tuple[dict[str, float], str]]:
    """Parameters and multiply-adds of variants, as :attr:`Case.columns`."""
    return {
        'M parameters': ({name: c.params / 1e6 for name, c in counts.items()}, '{:.2f}'),
        'G multiply-adds': ({name: c.flops / 1e9 for name, c in counts.items()}, '{:.2f}'),
    }


# --- report --------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    """What the steps run on."""
    if on_gpu(device):
        return torch.cuda.get_device_name(device)
    return f'CPU, {torch.get_num_threads()} thread(s)'


def header(what: str, args: argparse.Namespace, memory: bool) -> str:
    """What is measured, where, and what the memory means."""
    turns = f'{args.repeat} turns after {args.warmup} to warm up'
    text = f'{what}\n{device_name(args.device)}, torch {torch.__version__}; {turns}'
    if not memory:
        return text
    cpu = 'the resident set of a process of its own'
    how = "torch's allocations" if on_gpu(args.device) else cpu
    return f'{text}\npeak MiB: {how} in {MEMORY_STEPS} steps, beyond weights and inputs'


def text_table(
    rows: Sequence[Any], columns: dict[str, tuple[Callable[[Any], Any], str]], first: str = 'l'
) -> str:
    """A line per row; per title what to show of a row and its format, a dash where that is None."""
    out = PrettyTable()
    for title, (value, form) in columns.items():
        cells = ['-' if v is None else form.format(v) for v in map(value, rows)]
        out.add_column(title, cells, 'r' if out.field_names else first)
    return str(out)


def table(result: Result) -> str:
    """The printed text of a case: a row per variant, and a sentence per comparison."""
    case, rows = result.case, result.rows
    base = result[case.base] if case.base in case.variants else None
    with_memory = any(row.memory is not None for row in rows)
    columns: dict[str, tuple[Callable[[Measured], Any], str]] = {
        case.name: (lambda row: row.variant, '{}'),
        **{
            title: (lambda row, known=known: known[row.variant], form)
            for title, (known, form) in case.columns.items()
        },
        'median ms': (lambda row: 1000 * row.median, '{:.2f}'),
        'min': (lambda row: 1000 * min(row.seconds), '{:.2f}'),
        'max': (lambda row: 1000 * max(row.seconds), '{:.2f}'),
    }
    if case.images is not None:
        columns['images/s'] = lambda row: case.images / row.median, '{:.2f}'
    if base is not None:
        columns[f'time / {case.base}'] = lambda row: row.ratio(base), '{:.3f}'
    if with_memory:
        columns['peak MiB'] = lambda row: row.mib, '{:.1f}'
    if with_memory and base is not None:
        columns[f'MiB / {case.base}'] = lambda row: row.memory_ratio(base), '{:.3f}'
    if case.same:
        columns['error'] = lambda row: row.error, '{:.1e}'
    lines = [text_table(rows, columns)]
    for first, second in case.compare:
        if {first, second} <= set(case.variants):
            a, b = result[first], result[second]
            lines.append(f'{first} takes {a.ratio(b):.3g} times as long as {second}')
            memory = a.memory_ratio(b)
            lines[-1] += '' if memory is None else f', {memory:.3g} times the memory'
    return '\n'.join(lines)


@exits_on_input_error
def run(
    cases: Sequence[Case],
    args: argparse.Namespace,
    script: str,
    what: str,
    report: Callable[[Result], str] | None = table,
    smaller: str = '--shape or --batch-size',
) -> list[Result]:
    """Measures and prints all cases, and writes them to ``--json``.

    Args:
        cases: what to measure.
        args: what :func:`parse` gave.
        script: path of the benchmark, which is started again for the memory on a CPU.
        what: for the header.
        report: text of a case, printed as soon as it is there; None for a line of progress.
        smaller: option to change where a GPU has too little memory.

    Returns:
        A result per case; none in a process that measured memory alone.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.only_memory:
        print(json.dumps(all_memory_here(cases, args.device)))
        return []
    # Asked before hours of measuring.
    outputs = Outputs(Path(script).stem, configs_of(args), args.overwrite)
    outputs.check(args.json)
    with_memory = not args.no_memory and any(case.memory for case in cases)
    head = header(what, args, with_memory)
    print(head, flush=True)
    results = []
    with memory_for(smaller):
        memory: list[dict] = [{} for _ in cases]
        if with_memory and not on_gpu(args.device):
            # Before anything large lives here: Linux counts it into the peak of a child process.
            memory = all_memory_apart(script, args.argv)
        for number, (case, apart) in enumerate(zip(cases, memory), 1):
            results.append(measure_case(case, args, apart))
            if report is None:
                print(f'{number} of {len(cases)} cases timed', file=sys.stderr)
            else:
                print(report(results[-1]), flush=True)
    if args.json:
        content = dict(setup=head, results=[row for r in results for row in r.as_json()])
        outputs.write(args.json, json.dumps(content, indent=2) + '\n')
    return results


def configs_of(args: argparse.Namespace) -> list[str]:
    """The config files among the arguments, and all that they inherit from."""
    words: list[object] = []
    for value in vars(args).values():
        words += value if isinstance(value, (list, tuple)) else [value]
    texts = [word for word in words if isinstance(word, str)]
    models = CONFIGS / '_base_' / 'models'
    return config_files(
        *(text for text in texts if text.endswith('.py')),
        *(str(models / f'{text}.py') for text in texts),
    )
