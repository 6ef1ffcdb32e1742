"""Figures 6 and 7 of GFF: what its gates let through, and what goes wrong without one of them.

    python tools/analysis_tools/gate_maps.py CONFIG CHECKPOINT IMAGE [IMAGE ...] --out gates.png
    python tools/analysis_tools/gate_maps.py CONFIG CHECKPOINT IMAGE --label LABEL --zero-gate all

CONFIG has a ``GFFHead`` or a ``GatedFullyFusion`` neck with gates. A row per image: image, label,
prediction, and a heat map per gate. ``--zero-gate`` sets gates to 0, one after the other, and marks
the pixels that become wrong, or, without a label, whose prediction changes. Without IMAGE the
images and labels are those of the validation set. ``none`` in place of the checkpoint stands for
the initial weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    check_at_least,
    check_checkpoint,
    check_config,
    exits_on_input_error,
    model_files,
    read_config,
)

import torch
from mmcv.transforms import LoadAnnotations
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.structures import PixelData
from mmseg.registry import TRANSFORMS
from prettytable import PrettyTable

from mmseg_fusion.analysis.gate_maps import (
    GateMaps,
    check_levels,
    draw_gate_maps,
    find_gates,
    gate_maps,
    gate_rows,
    labelled,
    level_names,
)
from mmseg_fusion.analysis.layer_features import (
    DataInfo,
    ImageSet,
    InputError,
    batches,
    check_alike,
    data_info,
    load_segmentor,
)
from mmseg_fusion.images import read_sample


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config with gates: a GFFHead or a GatedFullyFusion neck')
    parser.add_argument('checkpoint', help='its weights, or none for the initial ones')
    parser.add_argument(
        'images', nargs='*', metavar='IMAGE', help='files or folders; default: the data set'
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument('--label', nargs='+', metavar='FILE', help='a label for every IMAGE')
    labels.add_argument('--ann-dir', help='folder of the labels of the IMAGEs instead')
    parser.add_argument(
        '--zero-gate',
        nargs='+',
        default=[],
        metavar='L',
        help='gates to set to 0, one after the other: numbers, the finest level is 1, or all',
    )
    parser.add_argument('--layer', default='auto', help='the fusion, if the model has several')
    parser.add_argument('--split', choices=('val', 'test'), default='val', help='default: val')
    parser.add_argument('--indices', nargs='+', type=int, help='which images, by their number')
    parser.add_argument(
        '--num-samples', type=int, help='images, evenly over the set; default: 2, or all IMAGEs'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--title', default='', help='of the picture; default: name of the config')
    parser.add_argument('--out', type=Path, help='default: work_dirs/CONFIG/gate_maps.png')
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    # Options may stand between CHECKPOINT and the images.
    args = parser.parse_intermixed_args(argv)
    check_at_least(parser, args, num_samples=1)
    for option in ('label', 'ann_dir'):
        if getattr(args, option) and not args.images:
            parser.error(f'--{option.replace("_", "-")} belongs to images: give both')
    if args.num_samples and args.indices:
        parser.error('--indices says which images, --num-samples how many: give either')
    if args.label and (args.num_samples or args.indices):
        parser.error('--label gives a label for every image: leave --indices and --num-samples out')
    if args.num_samples is None and not args.images:
        args.num_samples = 2
    wrong = [text for text in args.zero_gate if text != 'all' and not text.isdigit()]
    if wrong:
        hint = '; images come before it' if Path(wrong[0]).exists() else ''
        parser.error(f'--zero-gate: expected numbers from 1, or all, got {wrong[0]!r}{hint}')
    args.out = args.out or Path('work_dirs') / Path(args.config).stem / 'gate_maps.png'
    if args.out.suffix.lower() != '.png':
        parser.error(f'--out: expected a file name in .png, got {args.out}')
    return args


def with_labels(
    loader: torch.utils.data.DataLoader, files: list[str], cfg: Config, info: DataInfo, split: str
) -> Iterator[dict]:
    """The samples of images with labels from files, read as the config's data set would."""
    steps = cfg[f'{split}_dataloader'].dataset.get('pipeline', ())
    built = [TRANSFORMS.build(dict(step)) for step in (dict(type='LoadAnnotations'), *steps)]
    read = [step for step in built if isinstance(step, LoadAnnotations)][-1]
    for batch, file in zip(loader, files):
        annotation = read_sample(
            read,
            dict(
                seg_map_path=file,
                label_map=info.label_map,
                reduce_zero_label=info.reduce_zero_label,
                seg_fields=[],
            ),
        )
        data = torch.from_numpy(annotation['gt_seg_map'].astype('int64'))[None]
        batch['data_samples'][0].gt_sem_seg = PixelData(data=data)
        yield batch


def run(args: argparse.Namespace) -> list[GateMaps]:
    """Looks at every image and draws them."""
    check_config(args.config)
    if args.checkpoint != 'none':
        check_checkpoint(args.checkpoint)
    missing = [file for file in args.label or () if not Path(file).is_file()]
    if missing:
        raise InputError(f'--label {missing[0]} is not a file')
    inputs = [*model_files([args.config, args.checkpoint]), *args.images, *(args.label or ())]
    outputs = Outputs('gate_maps', inputs, args.overwrite)
    outputs.check(args.out)
    cfg = read_config(args.config, args.cfg_options)
    info = data_info(cfg, args.split)
    images = ImageSet(cfg, args.split, args.images, args.ann_dir, args.num_samples, args.indices)
    outputs.add_inputs(images.files())
    outputs.check(args.out)
    if args.label and len(args.label) != len(images):
        raise InputError(
            f'--label: expected a label per image, {len(images)}, got {len(args.label)}'
        )
    checkpoint = None if args.checkpoint == 'none' else args.checkpoint
    model = load_segmentor(cfg, checkpoint, args.device)
    name = Path(args.config).stem
    check_alike([name], [info], [model])
    fusion = find_gates(model, args.layer)
    count = len(level_names(model, fusion))
    levels = list(
        dict.fromkeys(
            level
            for text in args.zero_gate
            for level in (range(1, count + 1) if text == 'all' else [int(text)])
        )
    )
    check_levels(model, fusion, levels)
    samples = batches(images)
    if args.label:
        samples = with_labels(samples, args.label, cfg, info, args.split)
    views = [gate_maps(model, batch, levels, fusion, info.ignore_index) for batch in samples]
    with outputs.path(args.out) as file:
        draw_gate_maps(views, info, file, args.title or name)
    return views


def report(views: list[GateMaps]) -> str:
    """The numbers as a table, and what they are."""
    rows = gate_rows(views)
    zeroed = bool(views[0].zeroed)
    shares = [key for key in ('become_wrong', 'become_right', 'changed') if key in rows[0]]
    heads = {'name': '', 'mean_gate': 'mean gate'}
    heads.update({key: f'{key.replace("_", " ")}, %' for key in shares if zeroed})
    columns = [key for key in rows[0] if zeroed or key not in shares]
    table = PrettyTable([heads.get(key, key) for key in columns])
    for row in rows:
        cells = {**row, 'gate': f'G_{row["gate"]}', 'mean_gate': f'{row["mean_gate"]:.4f}'}
        cells.update({key: '-' if row[key] is None else f'{100 * row[key]:.3f}' for key in shares})
        table.add_row([cells[key] for key in columns])
    lines = [str(table), f'{views[0].module}, {len(views)} image{"s" * (len(views) > 1)}']
    if rows[0]['channels'] > 1:
        lines.append('a gate is the mean over its channels')
    if zeroed and labelled(views):
        lines.append(
            'become wrong: right with this gate and wrong where it is 0; of all labelled pixels'
        )
    elif zeroed:
        lines.append(
            'changed: another prediction where this gate is 0; there are no labels (--label) to '
            'say what is wrong'
        )
    return '\n'.join(lines)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # init_weights would log a line per parameter.
    MMLogger.get_instance('gate_maps', log_level='WARNING')
    views = run(args)
    print(report(views))
    print(args.out)


if __name__ == '__main__':
    main()
