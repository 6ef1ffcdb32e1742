"""Time and peak memory of channelized axial attention: factorized, and the thesis' algorithm 2.

::

    python tools/analysis_tools/benchmark_attention.py [--shapes 2x512x33x33 ...] [--groups 16]

Measured are the column pass and the row pass with their gates, forward and backward to query, key,
value and the gates' weights; the 1x1 convolutions that make query, key and value are the same in
every variant and left out. The variants take turns in one process:

- ``axial``: both passes without gates, what the channelization is added to;
- ``factorized``: the gates outside of the sums, the default of the package;
- ``grouped``: algorithm 2 under autograd, which keeps the terms of every group;
- ``grouped, recomputed``: algorithm 2 that makes them again in the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
import mmseg_fusion  # noqa: E402, F401  isort: skip

import torch  # noqa: E402
from benchmark import measure, resident_peak  # noqa: E402  (the script beside this one)
from prettytable import PrettyTable  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmseg_fusion.models.layers import AxialAttention, ChannelizedAxialAttention  # noqa: E402

Shape = tuple[int, int, int, int]

VARIANTS = {
    'axial': None,
    'factorized': dict(implementation='factorized'),
    'grouped': dict(implementation='grouped'),
    'grouped, recomputed': dict(implementation='grouped', recompute=True),
}
SHAPES: tuple[Shape, ...] = ((2, 512, 33, 33), (1, 512, 65, 65))
MORE_ON_A_GPU: tuple[Shape, ...] = ((2, 512, 97, 97),)
MEMORY_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """One variant at one shape.

    Attributes:
        shape: of the value, (N, C, H, W).
        variant: its name.
        seconds: of each repeat, forward and backward.
        peak_memory: bytes on top of weights and inputs; None where it cannot be measured.
        error: largest difference of the result from ``grouped``'s, relative to its largest value;
            None for ``axial``, which is another function.
    """

    shape: Shape
    variant: str
    seconds: list[float]
    peak_memory: int | None
    error: float | None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def shape_of(text: str) -> Shape:
    """``'2x512x33x33'`` as numbers."""
    parts = text.lower().split('x')
    if len(parts) != 4 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f'expected NxCxHxW such as 2x512x33x33, got {text!r}')
    return tuple(map(int, parts))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--shapes',
        type=shape_of,
        nargs='+',
        metavar='NxCxHxW',
        help='of the value; default: 2x512x33x33 1x512x65x65, and 2x512x97x97 on a GPU',
    )
    parser.add_argument('--groups', type=int, default=16, help='groups of algorithm 2; default: 16')
    parser.add_argument('--repeat', type=int, default=5, help='steps that are timed; default: 5')
    parser.add_argument('--warmup', type=int, default=1, help='steps before them; default: 1')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='CPU threads of torch')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    # Peaks of resident memory, measured in a process of their own.
    parser.add_argument('--only-memory', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (('groups', 1), ('repeat', 1), ('warmup', 0)):
        if getattr(args, name) < least:
            parser.error(f'argument --{name}: expected at least {least}, got {getattr(args, name)}')
    if args.threads is not None and args.threads < 1:
        parser.error(f'argument --threads: expected at least 1, got {args.threads}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    if args.shapes is None:
        args.shapes = [*SHAPES, *(MORE_ON_A_GPU if args.device.startswith('cuda') else ())]
    return args


# --- one step ------------------------------------------------------------------------------------


def build(variant: str, shape: Shape, groups: int, device: str) -> nn.Module:
    """The attention with the thesis' widths: gates of 5 layers of C / 4."""
    channels = shape[1]
    options = VARIANTS[variant]
    torch.manual_seed(0)
    if options is None:
        return AxialAttention(8, channels).to(device)
    gate_channels = max(1, channels // 4)
    module = ChannelizedAxialAttention(
        8, channels, gate_channels=gate_channels, groups=groups, **options
    )
    return module.to(device)


def make_inputs(shape: Shape, device: str) -> list[Tensor]:
    """Query (and key) of the column pass, that of the row pass, and the value, as ReLU gives."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(n, channels, h, w, generator=generator).to(device).requires_grad_()
        for channels in (64, 64, c)
    ]


def passes(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Both passes, forward."""
    column, row, value = inputs
    return module.row_pass(row, row, module.column_pass(column, column, value))


def make_step(module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A function that runs both passes forward and backward."""
    wanted = [*inputs]
    for attention in (module.column_attention, module.row_attention):
        wanted += attention.parameters()

    def step() -> None:
        out = passes(module, inputs)
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    return step


# --- measuring -----------------------------------------------------------------------------------


def memory_on_cpu(shape: Shape, args: argparse.Namespace) -> list[int | None]:
    """Runs this script in a process of its own, that returns what it frees at once."""
    command = [sys.executable, __file__, '--only-memory', '--device', 'cpu']
    command += ['--shapes', 'x'.join(map(str, shape)), '--groups', str(args.groups)]
    command += ['--threads', str(args.threads)] if args.threads else []
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f'memory at {shape}: {result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


def reset_peak() -> bool:
    """Lets :func:`resident_peak` start from what this process holds now; Linux alone can."""
    try:
        # 5 resets the high-water mark: proc_pid_clear_refs(5).
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return False
    return True


def growth_of_this_process(variant: str, shape: Shape, groups: int) -> int | None:
    """Bytes by which the largest resident set exceeds, in the steps, what is held before them."""
    # Libraries and thread pools load at a size that does not count.
    small = (1, shape[1], 2, 2)
    make_step(build(variant, small, groups, 'cpu'), make_inputs(small, 'cpu'))()
    step = make_step(build(variant, shape, groups, 'cpu'), make_inputs(shape, 'cpu'))
    if not reset_peak():
        return None
    before = resident_peak()
    for _ in range(MEMORY_STEPS):
        step()
    return resident_peak() - before


def memory_on_gpu(step: Callable[[], None], device: str) -> int:
    """The most that torch allocates in the steps on top of what it holds before."""
    step()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(MEMORY_STEPS):
        step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_shape(shape: Shape, args: argparse.Namespace) -> list[Measured]:
    """All variants at one shape."""
    on_gpu = args.device.startswith('cuda')
    inputs = make_inputs(shape, args.device)
    modules = {v: build(v, shape, args.groups, args.device) for v in VARIANTS}
    with torch.no_grad():
        expected = passes(modules['grouped'], inputs)
        errors = {
            variant: None
            if VARIANTS[variant] is None
            else float((passes(module, inputs) - expected).abs().max() / expected.abs().max())
            for variant, module in modules.items()
        }
    del expected
    steps = {variant: make_step(module, inputs) for variant, module in modules.items()}
    if on_gpu:
        peaks = [memory_on_gpu(step, args.device) for step in steps.values()]
    else:
        peaks = memory_on_cpu(shape, args)

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize(args.device)

    seconds = measure(list(steps.values()), args.repeat, args.warmup, synchronize)
    return [
        Measured(shape, variant, times, peak, errors[variant])
        for variant, times, peak in zip(VARIANTS, seconds, peaks)
    ]


# --- report --------------------------------------------------------------------------------------


def speedup(fast: Measured, slow: Measured) -> float:
    """Median of the ratios of each turn: a slow moment of the machine counts for both."""
    return statistics.median(s / f for f, s in zip(fast.seconds, slow.seconds))


def header(args: argparse.Namespace) -> str:
    """What is measured, and where."""
    if args.device.startswith('cuda'):
        device = torch.cuda.get_device_name(args.device)
        how = "torch's largest allocation in two steps on top of weights and inputs"
    else:
        device = f'CPU, {torch.get_num_threads()} thread(s)'
        how = (
            'largest resident set of the process in two steps, less what it held before them:\n'
            'weights, inputs, libraries; in a process where freed memory goes back at once, on '
            'Linux'
        )
    return (
        f'column and row pass with gates, forward and backward, float32, {device}, torch '
        f'{torch.__version__}\n{args.groups} groups; {args.repeat} repeats after {args.warmup} to '
        f'warm up, the variants in turn\npeak MiB: {how}'
    )


def report(measured: Sequence[Measured]) -> str:
    """The variants of one shape as a table, and what factorizing saves."""
    rows = {m.variant: m for m in measured}
    fast = rows['factorized']
    table = PrettyTable(
        [' x '.join(map(str, fast.shape)), 'median ms', 'min', 'max', 'peak MiB', 'error']
    )
    table.align = 'r'
    table.align[table.field_names[0]] = 'l'
    for m in measured:
        times = [f'{1000 * s:.2f}' for s in (m.median, min(m.seconds), max(m.seconds))]
        peak = '-' if m.peak_memory is None else f'{m.peak_memory / 2**20:.1f}'
        error = '-' if m.error is None else f'{m.error:.1e}'
        table.add_row([m.variant, *times, peak, error])
    lines = [str(table)]
    for name in ('grouped', 'grouped, recomputed'):
        slow = rows[name]
        line = f'factorized against {name}: {speedup(fast, slow):.1f} times faster'
        if fast.peak_memory and slow.peak_memory:
            line += f', 1/{slow.peak_memory / fast.peak_memory:.1f} of the memory'
        lines.append(line)
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[Measured]:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only_memory:
        (shape,) = args.shapes
        print(json.dumps([growth_of_this_process(v, shape, args.groups) for v in VARIANTS]))
        return []
    print(header(args), flush=True)
    measured = []
    for shape in args.shapes:
        rows = measure_shape(shape, args)
        print(report(rows), flush=True)
        measured += rows
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        setup = dict(device=args.device, groups=args.groups, threads=torch.get_num_threads())
        rows = [dict(asdict(m), median=m.median) for m in measured]
        args.json.write_text(json.dumps(dict(setup, measured=rows), indent=2) + '\n')
    return measured


if __name__ == '__main__':
    main()
