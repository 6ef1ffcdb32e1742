"""Time and peak memory of channelized axial attention: factorized, and the thesis' algorithm 2.

    python tools/analysis_tools/benchmark_attention.py [--shapes 2x512x33x33 ...] [--groups 16]

Measured are the column pass and the row pass with their gates, forward and backward to query, key,
value and the gates' weights; the 1x1 convolutions that make query, key and value are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from torch import Tensor, nn

from mmseg_fusion.models.layers import AxialAttention, ChannelizedAxialAttention

VARIANTS = {
    # Both passes without gates: what the channelization is added to.
    'axial': None,
    # The gates outside of the sums: the default of the package.
    'factorized': dict(implementation='factorized'),
    # Algorithm 2 under autograd, which keeps the terms of every group.
    'grouped': dict(implementation='grouped'),
    # Algorithm 2 that makes them again in the backward pass.
    'grouped, recomputed': dict(implementation='grouped', recompute=True),
}
SHAPES: tuple[harness.Shape, ...] = ((2, 512, 33, 33), (1, 512, 65, 65))
MORE_ON_A_GPU: tuple[harness.Shape, ...] = ((2, 512, 97, 97),)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    shapes = ('the value, on a GPU 2x512x97x97 too', SHAPES)
    parser = harness.make_parser(__doc__, repeat=5, warmup=1, shapes=shapes)
    parser.add_argument('--groups', type=int, default=16, help='groups of algorithm 2; default: 16')
    args = harness.parse(parser, argv, groups=1)
    if args.shapes is parser.get_default('shapes') and harness.on_gpu(args.device):
        args.shapes = [*SHAPES, *MORE_ON_A_GPU]
    return args


def build(variant: str, shape: harness.Shape, groups: int, device: str) -> nn.Module:
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


def make_inputs(shape: harness.Shape, device: str) -> list[Tensor]:
    """Query (and key) of the column pass, that of the row pass, and the value, as ReLU gives."""
    n, c, h, w = shape
    return harness.noise([(n, channels, h, w) for channels in (64, 64, c)], device, True)


def make_step(module: nn.Module, inputs: Sequence[Tensor]) -> harness.Step:
    """A function that runs both passes forward and backward and gives their result."""
    column, row, value = inputs
    weights = [*module.column_attention.parameters(), *module.row_attention.parameters()]
    return harness.gradient_step(
        lambda: module.row_pass(row, row, module.column_pass(column, column, value)),
        [*inputs, *weights],
    )


def make_case(shape: harness.Shape, args: argparse.Namespace) -> harness.Case:
    """All variants at one shape."""

    def step(variant: str) -> harness.Step:
        module = build(variant, shape, args.groups, args.device)
        return make_step(module, make_inputs(shape, args.device))

    return harness.Case(
        ' x '.join(map(str, shape)),
        tuple(VARIANTS),
        step,
        base='grouped',
        same=('factorized', 'grouped, recomputed'),
        compare=(
            ('grouped', 'factorized'),
            ('grouped, recomputed', 'factorized'),
            ('factorized', 'axial'),
        ),
        info=dict(shape=list(shape), groups=args.groups, threads=torch.get_num_threads()),
    )


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    what = f'column and row pass with gates, forward and backward, float32, {args.groups} groups'
    cases = [make_case(shape, args) for shape in args.shapes]
    return harness.run(cases, args, __file__, what, smaller='--shapes')


if __name__ == '__main__':
    main()
