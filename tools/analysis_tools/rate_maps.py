"""Feature maps per dilation rate, for ASPP and KSAC (figure 2.4 of KSAC's thesis).

    python tools/analysis_tools/rate_maps.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...] --images FILE

Takes the maps of any ASPP or kernel-sharing pyramid, rate by rate, after norm and activation.
``none`` instead of a checkpoint means the initial weights. The tool writes one picture per image
and ``rate_maps.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, image_sets, load, rows_table  # isort: skip

from mmseg_fusion.analysis.layer_features import batches
from mmseg_fusion.analysis.rate_maps import (
    draw_rate_maps,
    find_pyramid,
    rate_maps,
    rate_rows,
)
from mmseg_fusion.cli import exits_on_input_error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('rate_maps', __doc__)
    parser.add_models(
        models='any MMSegmentation config with an ASPP or KSAC head and its checkpoint, or none '
        'for the initial weights; several pairs are drawn together',
        layer='the pyramid, if a model has several: one name for all models or one for each',
    )
    parser.add_argument('--count', type=int, default=25, help='maps per rate; default: 25')
    parser.add_argument(
        '--channels',
        type=int,
        nargs='+',
        metavar='C',
        help='which channels, the same at every rate; default: those that vary most',
    )
    parser.add_images(1, labels=False)
    parser.add_output()
    return parser.parse(argv, count=1)


def run(args: argparse.Namespace) -> list[dict]:
    """Draws every image; one entry per image, model and rate."""
    seen = load(args, find=find_pyramid, alike=False)
    names, models, layers = seen.names, seen.models, seen.layers
    sets = image_sets(args, seen)
    entries: list[dict] = []
    for number, together in zip(sets[0].indices, zip(*map(batches, sets))):
        views = [
            rate_maps(model, batch, layer) for model, batch, layer in zip(models, together, layers)
        ]
        image = together[0]['data_samples'][0].metainfo.get('img_path') or f'image {number}'
        # The number keeps images of one name in two folders apart.
        picture = args.out_dir / f'{number:04d}_{Path(image).stem.replace(" ", "_")}.png'
        with args.outputs.path(picture) as file:
            draw_rate_maps(views, names, file, Path(image).name, args.count, args.channels)
        print(picture)
        for name, view in zip(names, views):
            entries += [dict(image=str(image), **row) for row in rate_rows(name, view)]
    return entries


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    numbers = args.out_dir / 'rate_maps.json'
    args.outputs.check(numbers)
    entries = run(args)
    args.outputs.write(numbers, json.dumps(entries, indent=1) + '\n')
    print(rows_table(entries))
    print('spread: standard deviation over the image; dead: share of channels that are 0 all over')
    print(numbers)


if __name__ == '__main__':
    main()
