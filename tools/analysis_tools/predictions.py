"""Predictions of several models beside the truth, and of two models where they differ.

    python tools/analysis_tools/predictions.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...] \\
        [--split test] [--num-samples 3] [--out predictions.png]

The images are those of the first config's data set, ``--num-samples`` evenly over it or the
``--indices``, so that nobody chooses them by their look.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_models,
    add_overwrite,
    check_at_least,
    check_models,
    exits_on_input_error,
    model_files,
)

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger

from mmseg_fusion.analysis.layer_features import (
    ImageSet,
    InputError,
    batches,
    check_classes,
    check_same_images,
    load_observed,
    observe,
)
from mmseg_fusion.analysis.predictions import Predictions, draw_predictions, right


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(parser, 'pairs; none for the initial weights', 'any layer that runs once')
    parser.add_argument('--split', choices=('val', 'test'), default='test', help='default: test')
    parser.add_argument('--indices', nargs='+', type=int, help='which images, by their number')
    parser.add_argument('--num-samples', type=int, default=3, help='images, evenly over the set')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='default: work_dirs/CONFIG/predictions.png')
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args(argv)
    check_models(parser, args)
    check_at_least(parser, args, num_samples=1)
    args.out = args.out or Path('work_dirs') / Path(args.models[0]).stem / 'predictions.png'
    if args.out.suffix.lower() != '.png':
        parser.error(f'--out: expected a file name in .png, got {args.out}')
    return args


def run(args: argparse.Namespace) -> list[Predictions]:
    """Every model on every image, drawn."""
    outputs = Outputs('predictions', model_files(args.models), args.overwrite)
    outputs.check(args.out)
    seen = load_observed(args, args.device)
    sets = [ImageSet(c, args.split, (), None, args.num_samples, args.indices) for c in seen.cfgs]
    check_same_images(seen.names, sets, args.split)
    for images in sets:
        outputs.add_inputs(images.files())
    outputs.check(args.out)
    rows = []
    for samples in zip(*map(batches, sets)):
        views = [
            observe(model, batch, layer, ignore_index=info.ignore_index)
            for model, batch, layer, info in zip(seen.models, samples, seen.layers, seen.infos)
        ]
        first = views[0]
        if first.label is None:
            raise InputError(f'{first.path} has no label: expected LoadAnnotations in the pipeline')
        check_classes(first.path, first.label, len(seen.infos[0].classes))
        predictions = tuple(view.prediction for view in views)
        rows.append(Predictions(first.path, first.image, first.label, predictions))
    with outputs.path(args.out) as file:
        draw_predictions(rows, seen.names, seen.infos[0], file)
    for row in rows:
        shares = [f'{100 * right(p, row.label):.1f} %' for p in row.predictions]
        print(f'{Path(row.path).name}: ' + ', '.join(map(' '.join, zip(seen.names, shares))))
    return rows


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # init_weights would log a line per parameter.
    MMLogger.get_instance('predictions', log_level='WARNING')
    run(args)
    print(args.out)


if __name__ == '__main__':
    main()
