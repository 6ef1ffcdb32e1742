"""Class dependency maps of one or more models side by side (figure 4.5 of the thesis).

    python tools/analysis_tools/class_dependency.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...]

Averages the last features before the classifier over every class of the config's validation set and
draws ``softmax(mu mu^T / sqrt(C))`` of these class centres: row i shows how much class i depends on
the others. ``--of weights`` takes the rows of the classifier's weight instead (class tokens) and
needs no image. ``none`` instead of a checkpoint means the initial weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, image_sets, load, say_layers  # isort: skip

from mmengine.utils import track_iter_progress
from prettytable import PrettyTable

from mmseg_fusion.analysis.class_dependency import (
    SIMILARITY_NAMES,
    Dependency,
    class_tokens,
    collect_centers,
    dependency_matrix,
    diagonal_means,
    draw_dependency,
    save_dependency,
    strongest_pairs,
)
from mmseg_fusion.analysis.layer_features import batches
from mmseg_fusion.cli import exits_on_input_error
from mmseg_fusion.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('class_dependency', __doc__, allow_abbrev=False)
    parser.add_models()
    parser.add_side()
    parser.add_images(None)
    parser.add_workers()
    parser.add_output()
    parser.add_argument(
        '--of',
        choices=('centers', 'weights'),
        default='centers',
        help="class centres of the features, or the classifier's weight; default: centers",
    )
    parser.add_argument(
        '--similarity',
        choices=tuple(SIMILARITY_NAMES),
        default='softmax',
        help='default: softmax, as equation 4.4',
    )
    parser.add_argument(
        '--classes-from',
        choices=('labels', 'predictions'),
        default='labels',
        help="a pixel's class: its label or each model's own prediction; default: labels",
    )
    parser.add_argument('--matrix', type=Path, help='also write the numbers: FILE.npz or FILE.json')
    parser.add_argument('--title', default='', help='of the picture')
    args = parser.parse(argv)
    if args.matrix and args.matrix.suffix not in ('.npz', '.json'):
        parser.error(f'--matrix: expected a file name in .npz or .json, got {args.matrix}')
    return args


def measure(args: argparse.Namespace) -> tuple[list[Dependency], tuple[str, ...], str]:
    """The map of every model, the class names, and what they were taken over."""
    seen = load(args, device='cpu')
    names, infos, models, layers = seen.names, seen.infos, seen.models, seen.layers
    classes = infos[0].classes
    say_layers(seen, 'weight' if args.of == 'weights' else args.side)
    maps = []
    if args.of == 'weights':
        for name, model, layer in zip(names, models, layers):
            tokens = class_tokens(model, layer)
            if len(tokens) != len(classes):
                raise InputError(
                    f'{name}: the weight of {layer} has {len(tokens)} rows, but there are '
                    f'{len(classes)} classes; name a classifier with --layer'
                )
            maps.append(Dependency(name, tokens, dependency_matrix(tokens, args.similarity)))
        return maps, classes, 'class tokens'
    sets = image_sets(args, seen)
    for name, model, images, info, layer in zip(names, models, sets, infos, layers):
        model.to(args.device)
        loader = batches(images, args.num_workers)
        collected = collect_centers(
            model,
            track_iter_progress((iter(loader), len(loader))),
            len(classes),
            layer,
            args.side,
            args.classes_from,
            info.ignore_index,
        )
        print()
        model.cpu()
        centers = collected.centers
        matrix = dependency_matrix(centers, args.similarity)
        maps.append(Dependency(name, centers, matrix, collected.counts))
    what = f'class centres over {len(sets[0])} images'
    if args.classes_from == 'predictions':
        what += ', classes as predicted'
    return maps, classes, what


def report(maps: list[Dependency], classes: tuple[str, ...], similarity: str) -> None:
    """Prints the means of every map and the pairs that depend on each other most."""
    table = PrettyTable(['model', 'classes', 'mean diagonal', 'mean off diagonal', 'cosine'])
    table.align['model'] = 'l'
    for entry in maps:
        present = int((~entry.matrix.diagonal().isnan()).sum())
        cosine = diagonal_means(dependency_matrix(entry.vectors, 'cosine'))[1]
        means = [f'{v:.5f}' for v in (*diagonal_means(entry.matrix), cosine)]
        table.add_row([entry.name, f'{present} of {len(classes)}', *means])
    print(table)
    print(f'diagonal: {similarity} similarity; cosine: its mean off the diagonal')
    for entry in maps:
        pairs = strongest_pairs(entry.matrix, classes)
        listed = ', '.join(f'{a} on {b} {value:.3f}' for a, b, value in pairs)
        print(f'{entry.name}: leans most: {listed}')
    absent = [
        name
        for i, name in enumerate(classes)
        if all(math.isnan(entry.matrix[i, i]) for entry in maps)
    ]
    if absent:
        print(f'absent: {", ".join(absent)}')


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    outputs = args.outputs
    picture = args.out_dir / 'class_dependency.png'
    outputs.check(picture, args.matrix)
    maps, classes, what = measure(args)
    report(maps, classes, args.similarity)
    title = args.title or f'Class dependency, {what}'
    with outputs.path(picture) as file:
        draw_dependency(maps, classes, file, title, args.similarity)
    print(picture)
    if args.matrix:
        with outputs.path(args.matrix) as file:
            save_dependency(maps, classes, file, similarity=args.similarity, of=args.of)
        print(args.matrix)


if __name__ == '__main__':
    main()
