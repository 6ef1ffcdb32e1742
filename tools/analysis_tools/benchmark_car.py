"""Time of class-aware regularization: the sums of the classes in both ways, and all its losses.

    python tools/analysis_tools/benchmark_car.py [--shapes 4x512x65x65 ...] [--classes 59 171]

Forward and backward to the feature, on labels in patches as real ones are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from torch import Tensor

from mmseg_fusion.models.losses import ClassAwareRegularization
from mmseg_fusion.models.losses.class_aware_regularization import class_sums

#: Every feature added at its class' place; the product with a dense matrix of pixels and classes,
#: as the authors' code has it; ``ClassAwareRegularization`` with its defaults.
VARIANTS = ('sums, scatter', 'sums, one_hot', 'all losses')
IGNORED = 255
#: Patches of one class along each side of a label.
PATCHES = 6


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, shapes=('the feature', [(4, 512, 65, 65)]))
    parser.add_argument('--classes', type=int, nargs='+', default=[59, 171], help='default: 59 171')
    args = harness.parse(parser, argv)
    if not 1 <= min(args.classes) <= max(args.classes) <= IGNORED:
        given = ' '.join(map(str, args.classes))
        known = f'1 to {IGNORED} ({IGNORED} is the ignored label)'
        parser.error(f'argument --classes: expected {known}, got {given}')
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

    def forward() -> Tensor:
        if variant == 'all losses':
            return sum(loss(feat, label).values())
        return class_sums(feat.flatten(2), index, classes, variant.split(', ')[1])

    return harness.gradient_step(forward, [feat])


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
