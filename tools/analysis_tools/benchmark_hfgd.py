"""Time and peak memory of HFGD: its axial attention, and its head against the upsampler alone.

::

    python tools/analysis_tools/benchmark_hfgd.py [--shapes 1x256x129x257 ...] [--parts attention]
    python tools/analysis_tools/benchmark_hfgd.py --parts train inference [--shape H W]

``attention``: the column and the row pass of axial attention with four heads, forward and backward
to query, key and value; the 1x1 convolutions that make these are the same in both variants and left
out.

- ``fused``: the layer of the package, on PyTorch's ``scaled_dot_product_attention``;
- ``plain``: ``softmax(q k^T / sqrt(D)) v`` written out, with attention maps of W x H x H and
  H x W x W for each head.

``train`` and ``inference``: a step of the decode head of a config on noise in the shapes of the
backbone's levels; in training with all its losses, and backward to weights and levels.

- ``upsampler``: without encoder, guidance and axial attention;
- ``+ axial attention``: the upsampler with it;
- ``HFGD``: the head as it is configured.

The variants of a part take turns in one process. Pretrained weights are not loaded, class-aware
regularization is left out: tools/analysis_tools/benchmark_car.py times it.
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
from mmseg_fusion.cli import CONFIGS  # noqa: E402  isort: skip

import torch  # noqa: E402
from benchmark import (  # noqa: E402  (the scripts beside this one)
    load_what_a_step_loads,
    measure,
    resident_peak,
    synthetic_batch,
)
from benchmark_attention import (  # noqa: E402
    MEMORY_STEPS,
    Shape,
    memory_on_gpu,
    reset_peak,
    shape_of,
)
from benchmark_gff import build_head, level_shapes, noise, read  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from prettytable import PrettyTable  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmseg_fusion.models.layers import AxialAttention  # noqa: E402
from mmseg_fusion.models.layers.attention import DotProductAttention, attention_map  # noqa: E402

HEADS = 4
#: Output strides 4 and 2 of a crop of 513 x 1025.
SHAPES: tuple[Shape, ...] = ((1, 256, 129, 257), (1, 256, 257, 513))
PARTS = ('attention', 'train', 'inference')
#: The variants of each part; the ratios are to the first.
ATTENTION = ('fused', 'plain')
HEAD: dict[str, dict] = {
    'upsampler': dict(encoder=None, guidance=False, axial_attention=False),
    '+ axial attention': dict(encoder=None, guidance=False),
    'HFGD': {},
}


@dataclass(frozen=True)
class Measured:
    """One variant of one case.

    Attributes:
        case: what is measured.
        variant: its name.
        seconds: of each turn.
        memory: bytes at the peak on top of weights and inputs; None where it was not measured.
        error: largest difference of the result from ``plain``'s, relative to its largest value;
            None where the variants are not the same function.
    """

    case: str
    variant: str
    seconds: list[float]
    memory: int | None
    error: float | None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def ratio(self, base: Measured) -> float:
        """Median, over the turns, of this variant's time over another's."""
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='default: all')
    parser.add_argument(
        '--shapes',
        type=shape_of,
        nargs='+',
        default=list(SHAPES),
        metavar='NxCxHxW',
        help='of the value, for attention; default: 1x256x129x257 1x256x257x513',
    )
    parser.add_argument(
        '--config',
        default=str(CONFIGS.resolve() / '_base_' / 'models' / 'hfgd_r50.py'),
        help='with an HFGDHead; default: configs/_base_/models/hfgd_r50.py',
    )
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(513, 513), metavar=('H', 'W'),
        help='of an image, for train and inference; default: 513 513',
    )  # fmt: skip
    parser.add_argument('--batch-size', type=int, default=1, help='images; default: 1')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='CPU threads of torch')
    parser.add_argument('--amp', action='store_true', help='float16; bfloat16 on the CPU')
    parser.add_argument('--repeat', type=int, default=5, help='turns that are timed; default: 5')
    parser.add_argument('--warmup', type=int, default=1, help='turns before them; default: 1')
    parser.add_argument('--no-memory', action='store_true', help='time only')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    # One variant's peak of resident memory, measured in a process of its own.
    parser.add_argument('--only-memory', metavar='VARIANT', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shape = tuple(args.shape)
    if min(args.shape) < 1:
        found = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W, positive, got {found}')
    for shape in args.shapes:
        if shape[1] % HEADS:
            parser.error(f'argument --shapes: expected a multiple of {HEADS} channels, got {shape}')
    for name, least in dict(batch_size=1, repeat=1, warmup=0, threads=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            option = '--' + name.replace('_', '-')
            parser.error(f'argument {option}: expected at least {least}, got {value}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    return args


def autocast(args: argparse.Namespace) -> torch.autocast:
    half = torch.bfloat16 if args.device == 'cpu' else torch.float16
    return torch.autocast(torch.device(args.device).type, half, enabled=args.amp)


# --- axial attention -----------------------------------------------------------------------------


class PlainAttention(DotProductAttention):
    """The attention with its maps, which autograd keeps for the backward pass."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lines = query.shape[1]
        query, key, value = (self._heads(x) for x in (query, key, value))
        weights = attention_map(query, key, query.shape[-1] ** -0.5)
        out = weights.to(value.dtype) @ value
        return out.unflatten(1, (lines, self.num_heads)).transpose(2, 3).flatten(3)


def build_attention(variant: str, channels: int) -> AxialAttention:
    """The layer as HFGDHead has it; its 1x1 convolutions are not used."""
    options = dict(share_qk=False, share_axes=True, scale=None, norm_cfg=None, act_cfg=None)
    layer = AxialAttention(channels, channels, channels, HEADS, **options)
    if variant == 'plain':
        layer.column_attention = PlainAttention(HEADS, None)
        layer.row_attention = PlainAttention(HEADS, None)
    return layer


def make_inputs(shape: Shape, device: str) -> list[Tensor]:
    """Query, key and value, of one width."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(3)]


def passes(layer: AxialAttention, inputs: Sequence[Tensor]) -> Tensor:
    """Both passes, forward."""
    query, key, value = inputs
    return layer.row_pass(query, key, layer.column_pass(query, key, value))


def attention_step(
    variant: str, inputs: Sequence[Tensor], args: argparse.Namespace
) -> Callable[[], Tensor]:
    """A function that runs both passes forward and backward and gives their result."""
    layer = build_attention(variant, inputs[0].shape[1]).to(args.device)

    def step() -> Tensor:
        with autocast(args):
            out = passes(layer, inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        return out.detach()

    return step


# --- the head ------------------------------------------------------------------------------------


def vary(model: ConfigDict, variant: str) -> ConfigDict:
    """The model with the variant's decode head."""
    model = Config(model.to_dict())._cfg_dict
    model.decode_head.update(HEAD[variant])
    return model


def head_step(
    head: nn.Module, levels: Sequence[Tensor], args: argparse.Namespace
) -> Callable[[], object]:
    """A function that runs one step of a decode head: its losses, or its logits."""
    head = head.to(args.device).train(args.mode == 'train')
    samples = synthetic_batch(args.shape, args.batch_size, head.num_classes, args.device)
    samples = samples['data_samples']

    def train() -> None:
        head.zero_grad(set_to_none=True)
        for level in levels:
            level.grad = None
        with autocast(args):
            losses = head.loss(levels, samples, {})
        sum(value for name, value in losses.items() if 'loss' in name).backward()

    @torch.no_grad()
    def infer() -> None:
        with autocast(args):
            head(levels)

    return train if args.mode == 'train' else infer


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        name: its title.
        variants: their names.
        build: gives a variant's step.
        options: command line that measures this case alone.
    """

    name: str
    variants: tuple[str, ...]
    build: Callable[[str], Callable[[], object]]
    options: list[str]


def attention_case(shape: Shape, args: argparse.Namespace) -> Case:
    """Both passes at one shape."""
    text = 'x'.join(map(str, shape))
    inputs: list[Tensor] = []

    def build(variant: str) -> Callable[[], object]:
        # One set for all variants, and none in a process that measures no time.
        if not inputs:
            inputs.extend(make_inputs(shape, args.device))
        return attention_step(variant, inputs, args)

    return Case(f'attention {text}', ATTENTION, build, ['--parts', 'attention', '--shapes', text])


def head_case(mode: str, args: argparse.Namespace) -> Case:
    """A step of the head in one mode."""
    args = argparse.Namespace(**dict(vars(args), mode=mode))
    model = read(args.config, 'HFGDHead')
    shapes = level_shapes(model, args)

    def build(variant: str) -> Callable[[], object]:
        return head_step(build_head(vary(model, variant)), noise(shapes, args), args)

    options = ['--parts', mode, '--config', args.config, '--shape', *map(str, args.shape)]
    options += ['--batch-size', str(args.batch_size)]
    height, width = args.shape
    name = f'{mode} {args.batch_size}x3x{height}x{width}'
    return Case(name, tuple(HEAD), build, options)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """What is asked for, in the order of :data:`PARTS`."""
    found = []
    if 'attention' in args.parts:
        found += [attention_case(shape, args) for shape in args.shapes]
    return found + [head_case(mode, args) for mode in PARTS[1:] if mode in args.parts]


# --- measuring -----------------------------------------------------------------------------------


def memory_here(step: Callable[[], object]) -> int | None:
    """Bytes by which the largest resident set exceeds, in the steps, what is held before them."""
    load_what_a_step_loads()
    if not reset_peak():
        return None
    before = resident_peak()
    for _ in range(MEMORY_STEPS):
        step()
    return resident_peak() - before


def memory_apart(case: Case, variant: str, args: argparse.Namespace) -> int | None:
    """The same in a process of its own, that returns what it frees at once."""
    command = [sys.executable, __file__, '--only-memory', variant, '--device', 'cpu', *case.options]
    command += ['--amp'] * args.amp
    command += ['--threads', str(args.threads)] if args.threads else []
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f'memory of {case.name}, {variant}: {result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


def measure_case(case: Case, args: argparse.Namespace) -> list[Measured]:
    """All variants of one case."""
    on_gpu = args.device.startswith('cuda')
    peaks: dict[str, int | None] = dict.fromkeys(case.variants)
    if not args.no_memory and not on_gpu:
        # Before anything large lives here: Linux counts it into the peak of a child process.
        peaks = {variant: memory_apart(case, variant, args) for variant in case.variants}
    steps = {variant: case.build(variant) for variant in case.variants}
    if not args.no_memory and on_gpu:
        peaks = {variant: memory_on_gpu(step, args.device) for variant, step in steps.items()}
    errors: dict[str, float | None] = dict.fromkeys(case.variants)
    if case.variants == ATTENTION:
        fused, plain = (steps[variant]() for variant in ATTENTION)
        errors['fused'] = float((fused - plain).abs().max() / plain.abs().max())
        del fused, plain

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize(args.device)

    seconds = measure(list(steps.values()), args.repeat, args.warmup, synchronize)
    return [
        Measured(case.name, variant, times, peaks[variant], errors[variant])
        for variant, times in zip(case.variants, seconds)
    ]


# --- report --------------------------------------------------------------------------------------


def header(args: argparse.Namespace) -> str:
    """What is measured, and where."""
    if args.device.startswith('cuda'):
        device = torch.cuda.get_device_name(args.device)
        how = "torch's largest allocation in two steps on top of weights and inputs"
    else:
        device = f'CPU, {torch.get_num_threads()} thread(s)'
        how = (
            'largest resident set of a process of its own in two steps, less what it held before\n'
            'them (weights, inputs, libraries)'
        )
    return (
        f'{"mixed precision" if args.amp else "float32"}, {device}, torch {torch.__version__}\n'
        f'{args.repeat} turns after {args.warmup} to warm up\npeak MiB: {how}'
    )


def report(measured: Sequence[Measured]) -> str:
    """The variants of one case as a table, with their ratios to the first."""
    base = measured[0]
    table = PrettyTable(
        [base.case, 'median ms', 'min', 'max', f'/ {base.variant}', 'peak MiB', 'error']
    )
    table.align = 'r'
    table.align[base.case] = 'l'
    for m in measured:
        times = [f'{1000 * s:.2f}' for s in (m.median, min(m.seconds), max(m.seconds))]
        peak = '-' if m.memory is None else f'{m.memory / 2**20:.0f}'
        error = '-' if m.error is None else f'{m.error:.1e}'
        table.add_row([m.variant, *times, f'{m.ratio(base):.3f}', peak, error])
    lines = [str(table)]
    for m in measured[1:]:
        line = f'{m.variant} takes {m.ratio(base):.2f} times as long as {base.variant}'
        if m.memory and base.memory:
            line += f', {m.memory / base.memory:.2f} times the memory'
        lines.append(line)
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[Measured]:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Advice for training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    torch.manual_seed(0)
    cases = cases_of(args)
    if args.only_memory:
        (case,) = cases
        print(json.dumps(memory_here(case.build(args.only_memory))))
        return []
    print(header(args), flush=True)
    measured = []
    try:
        while cases:
            rows = measure_case(cases.pop(0), args)
            print(report(rows), flush=True)
            measured += rows
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(
            f'out of memory ({str(error).splitlines()[0]}): give a smaller --shape, --shapes or '
            '--batch-size'
        ) from error
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(asdict(m), median=m.median) for m in measured]
        args.json.write_text(json.dumps(dict(setup=header(args), rows=rows), indent=2) + '\n')
    return measured


if __name__ == '__main__':
    main()
