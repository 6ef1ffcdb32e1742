"""Time of class-aware regularization: the sums of the classes in both ways, and all its losses.

::

    python tools/analysis_tools/benchmark_car.py [--shapes 4x512x65x65 ...] [--classes 59 171]

Forward and backward to the feature, on labels in patches as real ones are. The variants take turns
in one process:

- ``sums, scatter``: every feature added at its class' place;
- ``sums, one_hot``: the product with a dense matrix of pixels and classes, as the authors' code;
- ``all losses``: ``ClassAwareRegularization`` with its defaults.
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
from torch import Tensor

from mmseg_fusion.models.losses import ClassAwareRegularization
from mmseg_fusion.models.losses.class_aware_regularization import class_sums

VARIANTS = ('sums, scatter', 'sums, one_hot', 'all losses')
IGNORED = 255
#: Patches of one class along each side of a label.
PATCHES = 6


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument(
        '--shapes',
        type=harness.shape_of,
        nargs='+',
        default=[(4, 512, 65, 65)],
        metavar='NxCxHxW',
        help='of the feature; default: 4x512x65x65',
    )
    parser.add_argument('--classes', type=int, nargs='+', default=[59, 171], help='default: 59 171')
    args = harness.parse(parser, argv)
    if not 1 <= min(args.classes) <= max(args.classes) <= IGNORED:
        given = ' '.join(map(str, args.classes))
        parser.error(
            f'argument --classes: expected 1 to {IGNORED} ({IGNORED} is the ignored label), '
            f'got {given}'
        )
    return args


def make_label(shape: harness.Shape, classes: int, device: str) -> Tensor:
    """(N, H, W) in patches of one class each, every sixth ignored."""
    n, _, h, w = shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(classes, (n, 1, PATCHES, PATCHES), generator=generator)
    coarse.view(-1)[::6] = IGNORED
    label = torch.nn.functional.interpolate(coarse.float(), (h, w), mode='nearest')
    return label[:, 0].long().to(device)


def make_step(variant: str, shape: harness.Shape, classes: int, device: str) -> harness.Step:
    """A function that runs one variant forward and backward and gives its result."""
    torch.manual_seed(0)
    feat = torch.randn(shape, device=device).requires_grad_()
    label = make_label(shape, classes, device)
    index = label.flatten(1).masked_fill(label.flatten(1) == IGNORED, classes)
    loss = ClassAwareRegularization(classes)

    def step() -> Tensor:
        if variant == 'all losses':
            out = sum(loss(feat, label).values())
        else:
            out = class_sums(feat.flatten(2), index, classes, variant.split(', ')[1])
        torch.autograd.grad(out, feat, torch.ones_like(out))
        return out.detach()

    return step


def make_case(shape: harness.Shape, classes: int, args: argparse.Namespace) -> harness.Case:
    """All variants at one shape."""
    return harness.Case(
        f'{" x ".join(map(str, shape))}, {classes} classes',
        VARIANTS,
        lambda variant: make_step(variant, shape, classes, args.device),
        base='sums, scatter',
        same=('sums, one_hot',),
        compare=(('sums, one_hot', 'sums, scatter'),),
        memory=False,
    )


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    cases = [make_case(shape, k, args) for shape in args.shapes for k in args.classes]
    what = 'forward and backward, float32'
    return harness.run(cases, args, __file__, what, smaller='--shapes')


if __name__ == '__main__':
    main()
