"""Last features in two dimensions by UMAP, for several models (figure 4 of arXiv 2303.08646).

    python tools/analysis_tools/feature_umap.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...]

Takes the features before the classifier at random labelled pixels, the same for all models, and
draws one scatter plot per model, coloured by class. Two numbers, which are computed from the
features and not from the plot, show how compact and how separate the classes are. It needs
``mmseg-fusion[umap]``, except with ``--embedding pca``. ``none`` instead of a checkpoint means the
initial weights.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, image_sets, load, say_layers  # isort: skip

from mmengine.utils import track_iter_progress
from prettytable import PrettyTable

from mmseg_fusion.analysis.feature_umap import (
    Embed,
    Embedding,
    PixelSample,
    Sample,
    draw_embeddings,
    embed_sample,
    find_classes,
    load_umap,
    pca_embedding,
    save_embeddings,
    umap_embedding,
)
from mmseg_fusion.analysis.layer_features import DataInfo, batches, observe
from mmseg_fusion.cli import exits_on_input_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('feature_umap', __doc__)
    parser.add_models()
    parser.add_side()
    parser.add_images(100)
    parser.add_workers()
    parser.add_output('feature_umap/feature_{embedding}.png', ('.png', '.pdf', '.svg'))
    parser.add_argument(
        '--classes',
        nargs='+',
        metavar='CLASS',
        help='names or numbers; default: the eight with most pixels',
    )
    parser.add_argument(
        '--pixels-per-class',
        type=int,
        default=500,
        help='at most, equally many of every image; default: 500',
    )
    parser.add_argument(
        '--embedding',
        choices=('umap', 'pca'),
        default='umap',
        help='UMAP, or two principal components; default: umap',
    )
    parser.add_argument(
        '--num-neighbors', type=int, default=15, help='n_neighbors of UMAP; default: 15'
    )
    parser.add_argument(
        '--min-dist', type=float, default=0.1, help='min_dist of UMAP, 0 to 1; default: 0.1'
    )
    parser.add_argument('--seed', type=int, default=0, help='of pixels and UMAP; default: 0')
    parser.add_argument('--json', type=Path, help='also write points, pixels and numbers: FILE')
    parser.add_argument('--title', default='', help='of the picture')
    args = parser.parse(argv, pixels_per_class=1, num_neighbors=2, seed=0)
    if not 0 <= args.min_dist <= 1:
        parser.error(f'--min-dist: expected a number from 0 to 1, got {args.min_dist}')
    if bool(args.ann_dir) != bool(args.images):
        parser.error('--images need labels, and --ann-dir says where they are: give both')
    return args


def chosen_embedding(args: argparse.Namespace) -> Embed:
    """The embedding that was asked for.

    Raises:
        ImportError: umap-learn is not installed.
    """
    if args.embedding == 'pca':
        return pca_embedding
    # Now, and not when all images have gone through the models.
    load_umap()
    return functools.partial(
        umap_embedding,
        seed=args.seed,
        num_neighbors=args.num_neighbors,
        min_dist=args.min_dist,
    )


def collect(args: argparse.Namespace) -> tuple[Sample, list[str], DataInfo]:
    """The pixels as every model sees them, the names of the models, and the classes."""
    seen = load(args)
    names, infos, models, layers = seen.names, seen.infos, seen.models, seen.layers
    classes = infos[0].classes
    wanted = find_classes(args.classes or (), classes)
    say_layers(seen, args.side)
    sets = image_sets(args, seen)
    drawn = PixelSample(len(classes), args.pixels_per_class, args.seed)
    together = zip(*(batches(images, args.num_workers) for images in sets))
    for samples in track_iter_progress((together, len(sets[0]))):
        drawn.add(
            [
                observe(model, batch, layer, args.side, False, info.ignore_index)
                for model, batch, layer, info in zip(models, samples, layers, infos)
            ]
        )
    print()
    absent = [classes[c] for c in wanted if not drawn.counts[c]]
    if absent:
        print(f'absent: {", ".join(absent)}')
    return drawn.take(wanted or drawn.most_frequent(8)), names, infos[0]


def report(maps: list[Embedding]) -> None:
    """Prints the numbers of every model."""
    table = PrettyTable(['model', 'pixels', 'channels', 'silhouette', 'within / between'])
    table.align['model'] = 'l'
    for entry in maps:
        numbers = [f'{v:.4f}' for v in (entry.silhouette, entry.within_between)]
        table.add_row([entry.name, len(entry.points), entry.channels, *numbers])
    print(table)
    print(
        'Of the features, not of the plot. silhouette: 1 where classes are points apart, 0 where '
        'they overlap; within / between: distance to the class centre by distance between centres'
    )


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        embed = chosen_embedding(args)
    except ImportError as error:
        raise SystemExit(str(error)) from error
    outputs = args.outputs
    outputs.check(args.out, args.json)
    sample, names, info = collect(args)
    maps = embed_sample(sample, names, embed)
    report(maps)
    what = f'{args.embedding.upper()} of the last features, {len(sample.images)} images'
    with outputs.path(args.out) as file:
        draw_embeddings(maps, sample.labels, info, file, args.title or what, args.seed)
    print(args.out)
    if args.json:
        about = dict(embedding=args.embedding, seed=args.seed)
        with outputs.path(args.json) as file:
            save_embeddings(maps, sample, info.classes, file, **about)
        print(args.json)


if __name__ == '__main__':
    main()
