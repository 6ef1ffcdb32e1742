"""Relation of a pixel to all others, for models side by side (figure 4.4 of the thesis).

    python tools/analysis_tools/pixel_relation.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...]

Takes the feature before the classifier at a pixel and draws its dot product with the features of
the whole image, next to the predictions. The pixel is ``--point X Y``, or one per class far inside
a region of it. ``none`` instead of a checkpoint means the initial weights. The tool writes one
picture per image and ``pixel_relation.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, image_sets, load, say_layers  # isort: skip

import numpy as np
from prettytable import PrettyTable

from mmseg_fusion.analysis.layer_features import (
    Observation,
    batches,
    check_classes,
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
from mmseg_fusion.cli import exits_on_input_error
from mmseg_fusion.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('pixel_relation', __doc__)
    parser.add_models()
    parser.add_side()
    parser.add_images(4)
    parser.add_output()
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
        '--similarity',
        choices=tuple(SIMILARITY_NAMES),
        default='dot',
        help='default: dot, as the thesis',
    )
    return parser.parse(argv, max_points=1)


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


def run(args: argparse.Namespace) -> list[dict]:
    """Draws every image; one entry per image, pixel and model."""
    loaded = load(args)
    names, infos, models, layers = loaded.names, loaded.infos, loaded.models, loaded.layers
    say_layers(loaded, args.side)
    sets = image_sets(args, loaded)
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
        picture = args.out_dir / f'{free_name(Path(seen[0].path).stem or "image", taken)}.png'
        title = Path(seen[0].path).name
        with args.outputs.path(picture) as file:
            draw_relations(seen, points, relations, names, infos[0], file, title, args.similarity)
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
    numbers = args.out_dir / 'pixel_relation.json'
    args.outputs.check(numbers)
    entries = run(args)
    report(entries)
    args.outputs.write(numbers, json.dumps(entries, indent=1) + '\n')
    print(numbers)


if __name__ == '__main__':
    main()
