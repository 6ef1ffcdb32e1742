"""Relation of a pixel to all others, for models side by side (figure 4.4 of the thesis).

    python tools/analysis_tools/pixel_relation.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...]

Takes the feature before the classifier at a pixel and draws its dot product with the features of
the whole image, beside the predictions. The pixel is ``--point X Y``, or one per class deep inside
a region of it. ``none`` in place of a checkpoint stands for the initial weights. Writes one
picture per image and ``pixel_relation.json``.
"""

from __future__ import annotations

import argparse
import json
import math
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

import numpy as np
import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from prettytable import PrettyTable

from mmseg_fusion.analysis.layer_features import (
    ImageSet,
    InputError,
    Observation,
    batches,
    check_classes,
    load_observed,
    observe,
)
from mmseg_fusion.analysis.pixel_relation import (
    SIMILARITY_NAMES,
    Point,
    automatic_points,
    class_at,
    draw_relations,
    relate,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(
        parser,
        models='any MMSegmentation config and its checkpoint, or none for the initial weights; '
        'several pairs are drawn side by side',
        layer='layer whose feature it is, one for all models or one for each; default: auto, the '
        'classifier of the last decode head',
    )
    parser.add_argument(
        '--point',
        nargs=2,
        type=int,
        action='append',
        metavar=('X', 'Y'),
        help='pixel of the image file to look from, in every image; may be given several times; '
        'default: one per class',
    )
    parser.add_argument(
        '--max-points', type=int, default=4, help='classes per image without --point; default: 4'
    )
    parser.add_argument(
        '--side',
        choices=('input', 'output'),
        default='input',
        help='whether the feature is what the layer takes or gives; default: input',
    )
    parser.add_argument(
        '--similarity',
        choices=tuple(SIMILARITY_NAMES),
        default='dot',
        help='default: dot, as the thesis',
    )
    parser.add_argument('--split', choices=('val', 'test'), default='val', help='default: val')
    parser.add_argument(
        '--images', nargs='+', default=[], help='image files or folders, not the data set'
    )
    parser.add_argument('--ann-dir', help='folder of the labels of --images')
    parser.add_argument('--indices', nargs='+', type=int, help='which images, by their number')
    parser.add_argument(
        '--num-samples', type=int, help='images, evenly over the set; default: 4, or all --images'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out-dir', type=Path, help='default: work_dirs/CONFIG/pixel_relation')
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args(argv)
    check_models(parser, args)
    check_at_least(parser, args, max_points=1, num_samples=1)
    if args.ann_dir and not args.images:
        parser.error('--ann-dir belongs to --images: give both')
    if args.num_samples and args.indices:
        parser.error('--indices says which images, --num-samples how many: give either')
    if args.num_samples is None and not args.images:
        args.num_samples = 4
    return args


def points_of(args: argparse.Namespace, seen: Observation, num_classes: int) -> list[Point]:
    """The pixels to look from in one image; classes are the label's, or as predicted."""
    size = seen.placement.size
    label = seen.label if seen.label is not None else seen.prediction
    check_classes(seen.path, label, num_classes)
    if not args.point:
        return automatic_points(label, size, num_classes, args.max_points)
    for point in args.point:
        seen.placement.check(point, seen.path)
    return [Point(x, y, class_at(label, size, x, y)) for x, y in args.point]


def free_name(stem: str, taken: set[str]) -> str:
    """``stem``, with a number where another image of that name was drawn."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f'{stem}_{number}'
    taken.add(name)
    return name


def run(args: argparse.Namespace, outputs: Outputs, out_dir: Path) -> list[dict]:
    """Draws every image; one entry per image, pixel and model."""
    loaded = load_observed(args, args.device)
    names, infos, models, layers = loaded.names, loaded.infos, loaded.models, loaded.layers
    for name, layer in zip(names, layers):
        print(f'{name}: {args.side} of {layer}')
    sets = [
        ImageSet(cfg, args.split, args.images, args.ann_dir, args.num_samples, args.indices)
        for cfg in loaded.cfgs
    ]
    for images in sets:
        outputs.add_inputs(images.files())
    entries: list[dict] = []
    taken: set[str] = set()
    for together in zip(*map(batches, sets)):
        seen = [
            observe(model, batch, layer, args.side, ignore_index=info.ignore_index)
            for model, batch, layer, info in zip(models, together, layers, infos)
        ]
        if len({view.placement.size for view in seen}) > 1:
            raise InputError(
                f'models side by side need the same images: {seen[0].path} of {names[0]} is not '
                f'as large as {seen[-1].path} of {names[-1]} ({args.split}_dataloader)'
            )
        points = points_of(args, seen[0], len(infos[0].classes))
        relations = [[relate(view, point, args.similarity) for view in seen] for point in points]
        picture = out_dir / f'{free_name(Path(seen[0].path).stem or "image", taken)}.png'
        with outputs.path(picture) as file:
            draw_relations(
                seen,
                points,
                relations,
                names,
                infos[0],
                file,
                Path(seen[0].path).name,
                args.similarity,
            )
        print(picture)
        for point, row in zip(points, relations):
            for name, view, relation in zip(names, seen, row):
                category = point.category
                predicted = int(view.prediction[point.y, point.x])
                classes = infos[0].classes
                entries.append(
                    dict(
                        image=view.path,
                        x=point.x,
                        y=point.y,
                        category=None if category is None else classes[category],
                        model=name,
                        predicted=classes[predicted],
                        own=None if math.isnan(relation.own) else relation.own,
                        others=None if math.isnan(relation.others) else relation.others,
                    )
                )
    return entries


def report(entries: list[dict]) -> None:
    """Prints, per model, the mean relation to the own class and to the others."""
    table = PrettyTable(['model', 'pixels', 'own class', 'other classes', 'difference'])
    table.align['model'] = 'l'
    for name in dict.fromkeys(entry['model'] for entry in entries):
        means = [
            (entry['own'], entry['others'])
            for entry in entries
            if entry['model'] == name and None not in (entry['own'], entry['others'])
        ]
        if not means:
            continue
        own, others = np.mean(means, 0)
        table.add_row([name, len(means), f'{own:.4f}', f'{others:.4f}', f'{own - others:.4f}'])
    print(table)
    print('Mean relation to pixels of the class; each map goes from 0 to 1 over its image.')


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # init_weights would log a line per parameter.
    MMLogger.get_instance('pixel_relation', log_level='WARNING')
    out_dir = args.out_dir or Path('work_dirs') / Path(args.models[0]).stem / 'pixel_relation'
    numbers = out_dir / 'pixel_relation.json'
    outputs = Outputs('pixel_relation', model_files(args.models), args.overwrite)
    outputs.check(numbers)
    entries = run(args, outputs, out_dir)
    report(entries)
    outputs.write(numbers, json.dumps(entries, indent=1) + '\n')
    print(numbers)


if __name__ == '__main__':
    main()
