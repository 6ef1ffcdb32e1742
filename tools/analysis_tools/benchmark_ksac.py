"""Time and peak memory of ASPP and of both forms of KSAC's pyramid; where `auto` is wrong.

    python tools/analysis_tools/benchmark_ksac.py [--case CHANNELS SIDE] [--mode inference]
    python tools/analysis_tools/benchmark_ksac.py --rule

A training step is forward and backward, to the weights and to the input. `--rule` measures the two
forms over a grid of shapes, which is what `choose_implementation` was made from, and lists the
cases in which it takes the slower one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from mmseg.models.decode_heads.aspp_head import ASPPModule
from torch import Tensor, nn

from mmseg_fusion.models.layers import KernelSharingAtrousConv
from mmseg_fusion.models.layers.kernel_sharing import choose_implementation

#: MMSegmentation's module; KSAC's with a convolution per rate; with nine products for all rates.
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
    parser = harness.make_parser(__doc__, batch_size=1, amp=True)
    add = parser.add_argument
    several = 'input channels and side of the level; may be given several times; default: '
    several += ', '.join(f'{c} {s}' for c, s in CASES)
    rates = 'default: 6 12 18 and 1 6 12 18 24, doubled above a side of 48'
    pair = ('CHANNELS', 'SIDE')
    add('--case', type=int, nargs=2, action='append', metavar=pair, help=several)
    add('--rates', type=int, nargs='+', help=rates)
    add('--rule', action='store_true', help='the grid that the rule is from')
    add('--mode', choices=['train', 'inference'], help='default: train; both')
    add('--channels', type=int, default=256, help='output channels; default: 256')
    add('--channels-last', action='store_true')
    args = harness.parse(parser, argv, channels=1)
    sizes = [number for pair in args.case or () for number in pair]
    for name, given in (('case', sizes), ('rates', args.rates or ())):
        if any(number < 1 for number in given):
            text = ' '.join(map(str, given))
            parser.error(f'argument --{name}: expected positive numbers, got {text}')
    return args


def build(variant: str, in_channels: int, rates: tuple[int, ...], channels: int) -> nn.Module:
    if variant == 'ASPP':
        norm, act = dict(type='BN'), dict(type='ReLU')
        return ASPPModule(rates, in_channels, channels, None, norm, act)
    return KernelSharingAtrousConv(in_channels, channels, rates, variant)


def noise(in_channels: int, side: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The input, and the gradient of each output."""
    shapes = [(args.batch_size, c, side, side) for c in (in_channels, args.channels)]
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    tensors = harness.noise(shapes, args.device, False, torch.randn)
    x, gradient = (tensor.contiguous(memory_format=form) for tensor in tensors)
    return x, gradient


def make_step(
    module: nn.Module, x: Tensor, gradient: Tensor, mode: str, args: argparse.Namespace
) -> harness.Step:
    """A function that runs one step."""
    x.requires_grad_(mode == 'train')

    def backward(out: Tensor | Sequence[Tensor]) -> None:
        outs = [out] if isinstance(out, Tensor) else out
        torch.autograd.backward(outs, [gradient.to(o.dtype) for o in outs])

    return harness.module_step(
        module, [x], lambda: module(x), backward if mode == 'train' else None, args
    )


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
    wrong = [r for r in results if slowdown(r) > TOLERANCE]
    lost = [r for r in wrong if r.case.info['auto'] == 'shared_taps']
    columns = {
        'channels': (lambda r: r.case.info['in_channels'], '{}'),
        'side': (lambda r: r.case.info['side'], '{}'),
        'rates': (lambda r: ' '.join(map(str, r.case.info['rates'])), '{}'),
        'mode': (lambda r: r.case.info['mode'], '{}'),
        'shared / dilated': (lambda r: r.ratio('shared_taps', 'dilated'), '{:.3f}'),
        'auto': (lambda r: r.case.info['auto'], '{}'),
        'its slowdown': (lambda r: f'{slowdown(r):.3f}' + ' wrong' * (r in wrong), '{}'),
    }
    table = harness.text_table(results, columns, 'r')
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
