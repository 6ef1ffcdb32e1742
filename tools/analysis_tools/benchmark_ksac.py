"""Time and peak memory of ASPP and of both forms of KSAC's pyramid; where `auto` is wrong.

::

    python tools/analysis_tools/benchmark_ksac.py [--case CHANNELS SIDE] [--mode inference]
    python tools/analysis_tools/benchmark_ksac.py --rule

The modules take turns in one process, on noise: MMSegmentation's ASPPModule, and
KernelSharingAtrousConv with a convolution per rate (`dilated`) and with nine products for all rates
(`shared_taps`). A training step is forward and backward, to the weights and to the input. `--rule`
measures the two forms over a grid of shapes, which is what `choose_implementation` was made from,
and lists the cases in which it takes the slower one.
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
from benchmark import (  # noqa: E402  (the script beside this one)
    load_what_a_step_loads,
    measure,
    resident_peak,
)
from mmseg.models.decode_heads.aspp_head import ASPPModule  # noqa: E402
from prettytable import PrettyTable  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmseg_fusion.models.layers import KernelSharingAtrousConv  # noqa: E402
from mmseg_fusion.models.layers.kernel_sharing import choose_implementation  # noqa: E402

VARIANTS = ('ASPP', 'dilated', 'shared_taps')

#: Input channels and side of the level: ResNet at output stride 16 and 8, MobileNetV2 at 16.
CASES = ((2048, 33), (2048, 65), (320, 33))
#: At output stride 16, that is up to a side of 48; at 8 they are doubled.
RATES = ((6, 12, 18), (1, 6, 12, 18, 24))

RULE_CHANNELS = (32, 64, 128, 256, 320, 512, 1024, 2048)
RULE_SIDES = (17, 33, 65)
RULE_RATES = ((6,), (6, 12), *RATES)

#: How much slower the form that `auto` takes must be to be called wrong: less is noise.
TOLERANCE = 1.05


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        in_channels: channels of the input.
        side: its height and width.
        rates: of the pyramid.
        mode: 'train', forward and backward, or 'inference'.
    """

    in_channels: int
    side: int
    rates: tuple[int, ...]
    mode: str


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        case: what was measured.
        seconds: of each repeat, per variant; the variants took turns.
        memory: bytes at the peak, per variant; empty if not measured.
        auto: the variant that ``implementation='auto'`` takes.
    """

    case: Case
    seconds: dict[str, list[float]]
    memory: dict[str, int | None]
    auto: str

    def ratio(self, variant: str = 'shared_taps', base: str = 'dilated') -> float:
        """Median, over the turns, of one variant's time over another's."""
        pairs = zip(self.seconds[variant], self.seconds[base])
        return statistics.median(a / b for a, b in pairs)

    def slowdown(self) -> float:
        """Time of the variant that `auto` takes over that of the other form."""
        other = 'dilated' if self.auto == 'shared_taps' else 'shared_taps'
        return self.ratio(self.auto, other)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--case',
        type=int,
        nargs=2,
        action='append',
        metavar=('CHANNELS', 'SIDE'),
        help='input channels and side of the level; may be given several times; default: '
        + ', '.join(f'{c} {s}' for c, s in CASES),
    )
    parser.add_argument(
        '--rates',
        type=int,
        nargs='+',
        help='default: 6 12 18 and 1 6 12 18 24, doubled above a side of 48',
    )
    parser.add_argument('--rule', action='store_true', help='the grid that the rule is from')
    parser.add_argument('--mode', choices=['train', 'inference'], help='default: train; both')
    parser.add_argument('--channels', type=int, default=256, help='output channels; default: 256')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='CPU threads of torch')
    parser.add_argument('--amp', action='store_true', help='float16; bfloat16 on the CPU')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--repeat', type=int, default=10, help='turns that are timed; default: 10')
    parser.add_argument('--warmup', type=int, default=2, help='turns before them; default: 2')
    parser.add_argument('--no-memory', action='store_true', help='time only')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    # One variant's peak of resident memory, measured in a process of its own.
    parser.add_argument('--only-memory', choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    least = dict(channels=1, batch_size=1, repeat=1, warmup=0, threads=1)
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            option = '--' + name.replace('_', '-')
            parser.error(f'argument {option}: expected at least {smallest}, got {value}')
    for name in ('case', 'rates'):
        given = getattr(args, name) or []
        flat = [v for pair in given for v in pair] if name == 'case' else given
        if any(v < 1 for v in flat):
            found = ' '.join(map(str, flat))
            parser.error(f'argument --{name}: expected positive numbers, got {found}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """What to measure."""
    shapes = args.case or CASES
    rates = [tuple(args.rates)] if args.rates else RATES
    modes = [args.mode or 'train']
    if args.rule:
        shapes = args.case or [(c, s) for s in RULE_SIDES for c in RULE_CHANNELS]
        rates = rates if args.rates else RULE_RATES
        modes = [args.mode] if args.mode else ['train', 'inference']
    return [
        Case(c, side, r if args.rates or side <= 48 else tuple(2 * v for v in r), mode)
        for c, side in shapes
        for r in rates
        for mode in modes
    ]


def build(variant: str, case: Case, channels: int) -> nn.Module:
    if variant == 'ASPP':
        norm, act = dict(type='BN'), dict(type='ReLU')
        return ASPPModule(case.rates, case.in_channels, channels, None, norm, act)
    return KernelSharingAtrousConv(case.in_channels, channels, case.rates, variant)


def make_step(
    case: Case, module: nn.Module, x: Tensor, gradient: Tensor, amp: bool
) -> Callable[[], object]:
    """A function that runs one step."""
    half = torch.bfloat16 if x.device.type == 'cpu' else torch.float16
    module = module.to(x.device).train(case.mode == 'train')

    def forward() -> list[Tensor]:
        with torch.autocast(x.device.type, half, enabled=amp):
            out = module(x)
        return [out] if isinstance(out, Tensor) else out

    def train() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        out = forward()
        torch.autograd.backward(out, [gradient.to(o.dtype) for o in out])

    @torch.no_grad()
    def infer() -> None:
        forward()

    return train if case.mode == 'train' else infer


def noise(case: Case, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The input, and the gradient of each output."""
    generator = torch.Generator().manual_seed(0)
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    tensors = (
        torch.randn(args.batch_size, c, case.side, case.side, generator=generator)
        .to(args.device)
        .contiguous(memory_format=form)
        for c in (case.in_channels, args.channels)
    )
    x, gradient = tensors
    return x.requires_grad_(case.mode == 'train'), gradient


# --- memory --------------------------------------------------------------------------------------


def memory_here(case: Case, variant: str, args: argparse.Namespace) -> int | None:
    """Growth of this process's peak (CPU), or of torch's allocations (GPU), by two steps."""
    on_gpu = args.device.startswith('cuda')
    if on_gpu:
        torch.cuda.synchronize(args.device)
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
    else:
        load_what_a_step_loads()
        before = resident_peak()
    step = make_step(case, build(variant, case, args.channels), *noise(case, args), args.amp)
    for _ in range(2):
        step()
    if on_gpu:
        return torch.cuda.max_memory_allocated(args.device) - before
    return None if before is None else resident_peak() - before


def memory_apart(case: Case, variant: str, args: argparse.Namespace) -> int | None:
    """The same in a process of its own, as a CPU's peak never falls."""
    command = [sys.executable, __file__, '--only-memory', variant, '--device', args.device]
    command += ['--case', str(case.in_channels), str(case.side), '--mode', case.mode]
    command += ['--rates', *map(str, case.rates), '--channels', str(args.channels)]
    command += ['--batch-size', str(args.batch_size)]
    command += ['--amp'] * args.amp + ['--channels-last'] * args.channels_last
    command += ['--threads', str(args.threads)] if args.threads else []
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f'measuring the memory of {variant} failed: {result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


# --- time, report --------------------------------------------------------------------------------


def peaks(case: Case, args: argparse.Namespace) -> dict[str, int | None]:
    """The peak memory of each variant, empty if it is not asked for."""
    if args.no_memory or args.rule:
        return {}
    measured = memory_here if args.device.startswith('cuda') else memory_apart
    return {variant: measured(case, variant, args) for variant in VARIANTS}


def times(case: Case, args: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of each variant, which take turns."""
    variants = VARIANTS[1:] if args.rule else VARIANTS
    x, gradient = noise(case, args)
    steps = [
        make_step(case, build(variant, case, args.channels), x, gradient, args.amp)
        for variant in variants
    ]
    on_gpu = args.device.startswith('cuda')
    synchronize = (lambda: torch.cuda.synchronize(args.device)) if on_gpu else (lambda: None)
    return dict(zip(variants, measure(steps, args.repeat, args.warmup, synchronize)))


def header(args: argparse.Namespace) -> str:
    if args.device.startswith('cuda'):
        device = torch.cuda.get_device_name(args.device)
    else:
        device = f'{args.device}, {torch.get_num_threads()} thread(s)'
    form = ', channels last' if args.channels_last else ''
    precision = ', mixed precision' if args.amp else ''
    return (
        f'{device}, torch {torch.__version__}: batch {args.batch_size}, {args.channels} output '
        f'channels{form}{precision}; medians of {args.repeat} turns'
    )


def report(results: Sequence[Result]) -> str:
    """The printed text: a row per case, and what the rule gets wrong."""
    variants = list(results[0].seconds)
    with_memory = bool(results[0].memory)
    table = PrettyTable(
        ['channels', 'side', 'rates', 'mode']
        + [f'{v} ms' for v in variants]
        + ['shared / dilated']
        + [f'{v} MiB' for v in variants] * with_memory
        + ['auto', 'its slowdown']
    )
    table.align = 'r'
    for r in results:
        row = [r.case.in_channels, r.case.side, ' '.join(map(str, r.case.rates)), r.case.mode]
        row += [f'{1000 * statistics.median(s):.2f}' for s in r.seconds.values()]
        row.append(f'{r.ratio():.3f}')
        for m in r.memory.values():
            row.append('-' if m is None else f'{m / 2**20:.0f}')
        wrong = r.slowdown() > TOLERANCE
        table.add_row([*row, r.auto, f'{r.slowdown():.3f}' + ' wrong' * wrong])
    wrong = [r for r in results if r.slowdown() > TOLERANCE]
    lines = [str(table)]
    if wrong:
        worst = max(r.slowdown() for r in wrong)
        lines.append(
            f'`auto` takes the slower form in {len(wrong)} of {len(results)} cases, at worst '
            f'{worst:.2f} times as long as the other'
        )
    else:
        lines.append(f'`auto` takes the faster form, within 5 %, in all {len(results)} cases')
    lost = [r for r in wrong if r.auto == 'shared_taps']
    lines.append(f'`auto` is slower than `dilated` in {len(lost)} of {len(results)} cases')
    if with_memory:
        lines.append(
            "MiB: peak of two steps, in a process of its own on a CPU; input, the module's "
            'weights and gradients included'
        )
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = cases(args)
    if args.only_memory:
        print(json.dumps(memory_here(wanted[0], args.only_memory, args)))
        return []
    print(header(args))
    try:
        # Before anything large lives here: Linux counts it into the peak of a child process.
        memory = [peaks(case, args) for case in wanted]
        results = []
        for number, (case, peak) in enumerate(zip(wanted, memory), 1):
            auto = choose_implementation(args.device, case.in_channels, len(case.rates))
            results.append(Result(case, times(case, args), peak, auto))
            print(f'{number} of {len(wanted)} cases timed', file=sys.stderr)
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(
            f'out of memory ({str(error).splitlines()[0]}): give a smaller --batch-size or --case'
        ) from error
    print(report(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [dict(asdict(r), ratio=r.ratio(), slowdown=r.slowdown()) for r in results]
        args.json.write_text(json.dumps(dict(setup=header(args), results=rows), indent=2) + '\n')
    return results


if __name__ == '__main__':
    main()
