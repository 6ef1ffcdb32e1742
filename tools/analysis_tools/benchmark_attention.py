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
from torch import Tensor, nn

from mmseg_fusion.models.layers import AxialAttention, ChannelizedAxialAttention

VARIANTS = {
    'axial': None,
    'factorized': dict(implementation='factorized'),
    'grouped': dict(implementation='grouped'),
    'grouped, recomputed': dict(implementation='grouped', recompute=True),
}
SHAPES: tuple[harness.Shape, ...] = ((2, 512, 33, 33), (1, 512, 65, 65))
MORE_ON_A_GPU: tuple[harness.Shape, ...] = ((2, 512, 97, 97),)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, repeat=5, warmup=1)
    parser.add_argument(
        '--shapes',
        type=harness.shape_of,
        nargs='+',
        metavar='NxCxHxW',
        help='of the value; default: 2x512x33x33 1x512x65x65, and 2x512x97x97 on a GPU',
    )
    parser.add_argument('--groups', type=int, default=16, help='groups of algorithm 2; default: 16')
    args = harness.parse(parser, argv, groups=1)
    if args.shapes is None:
        args.shapes = [*SHAPES, *(MORE_ON_A_GPU if harness.on_gpu(args.device) else ())]
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
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(n, channels, h, w, generator=generator).to(device).requires_grad_()
        for channels in (64, 64, c)
    ]


def make_step(module: nn.Module, inputs: Sequence[Tensor]) -> harness.Step:
    """A function that runs both passes forward and backward and gives their result."""
    column, row, value = inputs
    wanted = [*inputs]
    for attention in (module.column_attention, module.row_attention):
        wanted += attention.parameters()

    def step() -> Tensor:
        out = module.row_pass(row, row, module.column_pass(column, column, value))
        torch.autograd.grad(out, wanted, torch.ones_like(out))
        return out.detach()

    return step


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
