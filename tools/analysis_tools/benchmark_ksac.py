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
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
import mmseg_fusion  # noqa: F401  isort: skip

import _harness as harness  # beside this script
import torch
from _steps import module_step
from mmseg.models.decode_heads.aspp_head import ASPPModule
from prettytable import PrettyTable
from torch import Tensor, nn

from mmseg_fusion.models.layers import KernelSharingAtrousConv
from mmseg_fusion.models.layers.kernel_sharing import choose_implementation

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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, batch_size=1)
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
    parser.add_argument('--channels-last', action='store_true')
    harness.add_amp(parser)
    args = harness.parse(parser, argv, channels=1)
    for name in ('case', 'rates'):
        given = getattr(args, name) or []
        flat = [v for pair in given for v in pair] if name == 'case' else given
        if any(v < 1 for v in flat):
            text = ' '.join(map(str, flat))
            parser.error(f'argument --{name}: expected positive numbers, got {text}')
    return args


def build(variant: str, in_channels: int, rates: tuple[int, ...], channels: int) -> nn.Module:
    if variant == 'ASPP':
        norm, act = dict(type='BN'), dict(type='ReLU')
        return ASPPModule(rates, in_channels, channels, None, norm, act)
    return KernelSharingAtrousConv(in_channels, channels, rates, variant)


def noise(in_channels: int, side: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The input, and the gradient of each output."""
    generator = torch.Generator().manual_seed(0)
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    x, gradient = (
        torch.randn(args.batch_size, c, side, side, generator=generator)
        .to(args.device)
        .contiguous(memory_format=form)
        for c in (in_channels, args.channels)
    )
    return x, gradient


def make_step(
    module: nn.Module, x: Tensor, gradient: Tensor, mode: str, args: argparse.Namespace
) -> harness.Step:
    """A function that runs one step."""
    x.requires_grad_(mode == 'train')

    def forward() -> Sequence[Tensor]:
        with harness.autocast(args):
            out = module(x)
        return [out] if isinstance(out, Tensor) else out

    def backward(out: Sequence[Tensor]) -> None:
        torch.autograd.backward(out, [gradient.to(o.dtype) for o in out])

    module.to(args.device)
    return module_step(module, [x], forward, backward if mode == 'train' else None)


def make_case(
    in_channels: int, side: int, rates: tuple[int, ...], mode: str, args: argparse.Namespace
) -> harness.Case:
    """The modules on one level, with one set of rates."""

    def step(variant: str) -> harness.Step:
        module = build(variant, in_channels, rates, args.channels)
        return make_step(module, *noise(in_channels, side, args), mode, args)

    auto = choose_implementation(args.device, in_channels, len(rates))
    text = ' '.join(map(str, rates))
    return harness.Case(
        f'{in_channels} channels, {side} x {side}, rates {text}, {mode}',
        VARIANTS[1:] if args.rule else VARIANTS,
        step,
        base='dilated',
        memory=not args.rule,
        info=dict(in_channels=in_channels, side=side, rates=list(rates), mode=mode, auto=auto),
    )


def cases(args: argparse.Namespace) -> list[harness.Case]:
    """What to measure."""
    shapes = args.case or CASES
    rates = [tuple(args.rates)] if args.rates else RATES
    modes = [args.mode or 'train']
    if args.rule:
        shapes = args.case or [(c, s) for s in RULE_SIDES for c in RULE_CHANNELS]
        rates = rates if args.rates else RULE_RATES
        modes = [args.mode] if args.mode else ['train', 'inference']
    return [
        make_case(c, side, r if args.rates or side <= 48 else tuple(2 * v for v in r), mode, args)
        for c, side in shapes
        for r in rates
        for mode in modes
    ]


def slowdown(result: harness.Result) -> float:
    """Time of the form that `auto` takes over that of the other."""
    auto = result.case.info['auto']
    other = 'dilated' if auto == 'shared_taps' else 'shared_taps'
    return result.ratio(auto, other)


def judge(results: Sequence[harness.Result]) -> str:
    """A row per case, and what the rule gets wrong."""
    table = PrettyTable(
        ['channels', 'side', 'rates', 'mode', 'shared / dilated', 'auto', 'its slowdown']
    )
    table.align = 'r'
    for r in results:
        info = r.case.info
        row = [info['in_channels'], info['side'], ' '.join(map(str, info['rates'])), info['mode']]
        row += [f'{r.ratio("shared_taps", "dilated"):.3f}', info['auto']]
        table.add_row([*row, f'{slowdown(r):.3f}' + ' wrong' * (slowdown(r) > TOLERANCE)])
    wrong = [r for r in results if slowdown(r) > TOLERANCE]
    lost = [r for r in wrong if r.case.info['auto'] == 'shared_taps']
    if wrong:
        verdict = (
            f'`auto` takes the slower form in {len(wrong)} of {len(results)} cases, at worst '
            f'{max(map(slowdown, wrong)):.2f} times as long as the other'
        )
    else:
        verdict = f'`auto` takes the faster form, within 5 %, in all {len(results)} cases'
    slower = f'`auto` is slower than `dilated` in {len(lost)} of {len(results)} cases'
    return f'{table}\n{verdict}\n{slower}'


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    what = f'batch {args.batch_size}, {args.channels} output channels'
    what += ', channels last' * args.channels_last + ', mixed precision' * args.amp
    results = harness.run(
        cases(args), args, __file__, what,
        None if args.rule else harness.table, '--case or --batch-size',
    )  # fmt: skip
    if results:
        print(judge(results))
    return results


if __name__ == '__main__':
    main()
