"""Feature maps per dilation rate, ASPP beside KSAC (figure 2.4 of KSAC's thesis).

    python tools/analysis_tools/rate_maps.py CONFIG CHECKPOINT [CONFIG CHECKPOINT ...] --images FILE

Takes the maps of any ASPP or kernel-sharing pyramid, rate by rate, after norm and activation.
``none`` in place of a checkpoint stands for the initial weights. Writes one picture per image and
``rate_maps.json``.
"""

from __future__ import annotations

import argparse
import json
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
    check_checkpoint,
    check_config,
    check_models,
    exits_on_input_error,
    model_files,
    read_config,
)

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from prettytable import PrettyTable

from mmseg_fusion.analysis.layer_features import (
    ImageSet,
    batches,
    load_segmentor,
)
from mmseg_fusion.analysis.rate_maps import (
    draw_rate_maps,
    find_pyramid,
    rate_maps,
    rate_rows,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_models(
        parser,
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
    parser.add_argument('--split', choices=('val', 'test'), default='val', help='default: val')
    parser.add_argument(
        '--images', nargs='+', default=[], help='image files or folders, not the data set'
    )
    parser.add_argument('--indices', nargs='+', type=int, help='which images, by their number')
    parser.add_argument(
        '--num-samples', type=int, help='images, evenly over the set; default: 1, or all --images'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out-dir', type=Path, help='default: work_dirs/CONFIG/rate_maps')
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args(argv)
    check_models(parser, args)
    check_at_least(parser, args, count=1, num_samples=1)
    if args.num_samples and args.indices:
        parser.error('--indices says which images, --num-samples how many: give either')
    if args.num_samples is None and not args.images:
        args.num_samples = 1
    return args


def run(args: argparse.Namespace, outputs: Outputs, out_dir: Path) -> list[dict]:
    """Draws every image; one entry per image, model and rate."""
    configs, checkpoints = args.models[::2], args.models[1::2]
    for config, checkpoint in zip(configs, checkpoints):
        check_config(config)
        if checkpoint != 'none':
            check_checkpoint(checkpoint)
    cfgs = [read_config(config, args.cfg_options) for config in configs]
    names = args.names or [Path(config).stem for config in configs]
    models = [
        load_segmentor(cfg, None if checkpoint == 'none' else checkpoint, args.device)
        for cfg, checkpoint in zip(cfgs, checkpoints)
    ]
    layers = [find_pyramid(model, layer) for model, layer in zip(models, args.layer)]
    sets = [
        ImageSet(cfg, args.split, args.images, None, args.num_samples, args.indices) for cfg in cfgs
    ]
    for images in sets:
        outputs.add_inputs(images.files())
    entries: list[dict] = []
    for number, together in zip(sets[0].indices, zip(*map(batches, sets))):
        views = [
            rate_maps(model, batch, layer) for model, batch, layer in zip(models, together, layers)
        ]
        image = together[0]['data_samples'][0].metainfo.get('img_path') or f'image {number}'
        # The number keeps images of one name in two folders apart.
        picture = out_dir / f'{number:04d}_{Path(image).stem.replace(" ", "_")}.png'
        with outputs.path(picture) as file:
            draw_rate_maps(views, names, file, Path(image).name, args.count, args.channels)
        print(picture)
        for name, view in zip(names, views):
            entries += [dict(image=str(image), **row) for row in rate_rows(name, view)]
    return entries


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # init_weights would log a line per parameter.
    MMLogger.get_instance('rate_maps', log_level='WARNING')
    out_dir = args.out_dir or Path('work_dirs') / Path(args.models[0]).stem / 'rate_maps'
    numbers = out_dir / 'rate_maps.json'
    outputs = Outputs('rate_maps', model_files(args.models), args.overwrite)
    outputs.check(numbers)
    entries = run(args, outputs, out_dir)
    outputs.write(numbers, json.dumps(entries, indent=1) + '\n')
    table = PrettyTable(list(entries[0]))
    for row in entries:
        table.add_row([f'{v:.4g}' if isinstance(v, float) else v for v in row.values()])
    print(table)
    print('spread: standard deviation over the image; dead: share of channels that are 0 all over')
    print(numbers)


if __name__ == '__main__':
    main()
