"""Predictions of several models, the truth, and the gains and losses of the second of two models.

    python tools/analysis_tools/predictions.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...] \\
        [--split test] [--num-samples 3 | --indices 5 8 | --largest-gain 3] [--out predictions.png]

The images come from the first config's data set: ``--num-samples`` evenly spaced ones, or the
``--indices``, so that they are not picked by their look. ``--largest-gain`` shows the images on
which the second of two models gains most. For that it evaluates the whole split. It prints the mean
over the split and the number of images that became worse, and writes both on the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import Observed, PictureParser, image_sets, load  # isort: skip

from mmseg_fusion.analysis.layer_features import ImageSet, batches, check_classes, observe
from mmseg_fusion.analysis.predictions import (
    Gain,
    GainSummary,
    Predictions,
    count_gain,
    draw_predictions,
    largest_gains,
    right,
)
from mmseg_fusion.cli import exits_on_input_error
from mmseg_fusion.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('predictions', __doc__)
    parser.add_models('pairs; none for the initial weights', 'any layer that runs once')
    parser.add_argument('--split', choices=('val', 'test'), default='test', help='default: test')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--indices', nargs='+', type=int, help='which images, by their number')
    which.add_argument('--num-samples', type=int, help='images, evenly over the set; default: 3')
    which.add_argument(
        '--largest-gain',
        type=int,
        metavar='N',
        help='of two models: the N images of the split on which the second one gains most',
    )
    parser.add_output('predictions.png')
    args = parser.parse(argv, largest_gain=1)
    # Not a default of argparse, which lets an argument pass that is equal to it.
    args.num_samples = 3 if args.num_samples is None else args.num_samples
    if args.largest_gain and len(args.models) != 4:
        parser.error(f'--largest-gain compares two models, got {len(args.models) // 2}')
    return args


def predictions(seen: Observed, sets: Sequence[ImageSet]) -> Iterator[Predictions]:
    """Every model on one image after the other."""
    for samples in zip(*map(batches, sets)):
        views = [
            observe(model, batch, layer, ignore_index=info.ignore_index)
            for model, batch, layer, info in zip(seen.models, samples, seen.layers, seen.infos)
        ]
        first = views[0]
        if first.label is None:
            raise InputError(f'{first.path} has no label: expected LoadAnnotations in the pipeline')
        check_classes(first.path, first.label, len(seen.infos[0].classes))
        yield Predictions(first.path, first.image, first.label, tuple(v.prediction for v in views))


def in_words(summary: GainSummary) -> str:
    """Means over images, and how many of them became better and worse."""
    same = summary.images - summary.better - summary.worse
    return (
        f'{100 * summary.gained:.2f} % gained, {100 * summary.lost:.2f} % lost, '
        f'net {100 * summary.net:+.2f}; images better: {summary.better}, worse: {summary.worse}, '
        f'the same: {same}'
    )


def tell(
    views: Sequence[Predictions],
    names: Sequence[str],
    classes: Sequence[str],
    over: str,
    summary: GainSummary | None,
) -> None:
    """Prints what each model has right on each image, and what the second one gains and loses."""
    for view in views:
        shares = [f'{100 * right(p, view.label):.1f} %' for p in view.predictions]
        text = ', '.join(map(' '.join, zip(names, shares)))
        if len(names) == 2:
            gained, lost = count_gain(*view.predictions, view.label, len(classes)).shares
            text += f'; {100 * gained:.1f} % gained, {100 * lost:.1f} % lost'
        print(f'{Path(view.path).name}: {text}')
    if summary is not None:
        print(f'{names[1]} against {names[0]}, mean over {over}: {in_words(summary)}')
        print(f'By class of the truth, over {over}:')
        print(summary.table(classes))


def run(args: argparse.Namespace) -> list[Predictions]:
    """Every model on every image, drawn; of two models what the second one gains and loses."""
    args.outputs.check(args.out)
    seen = load(args)
    count = None if args.largest_gain else args.num_samples
    sets = image_sets(args, seen, num_samples=count)
    views, classes = predictions(seen, sets), seen.infos[0].classes
    gains: list[Gain] = []
    if args.largest_gain:
        shown, gains = largest_gains(views, len(classes), args.largest_gain)
    else:
        shown = list(views)
        if len(seen.names) == 2:
            gains = [count_gain(*v.predictions, v.label, len(classes)) for v in shown]
    summary, over, title = None, '', ''
    if any(gain.labelled.any() for gain in gains):
        summary = GainSummary.of(gains)
        which = '' if summary.images == len(gains) else ' labelled'
        where = 'of the split' if args.largest_gain else 'drawn'
        over = f'the {summary.images}{which} images {where}'
        if args.largest_gain:
            title = f'The {len(shown)} images with the largest gain.\nMean over {over}: '
            title += in_words(summary)
    with args.outputs.path(args.out) as file:
        draw_predictions(shown, seen.names, seen.infos[0], file, title)
    tell(shown, seen.names, classes, over, summary)
    return shown


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run(args)
    print(args.out)


if __name__ == '__main__':
    main()
