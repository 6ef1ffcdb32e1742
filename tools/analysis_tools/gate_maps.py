"""Figures 6 and 7 of GFF: its gates, and the errors without one of them.

    python tools/analysis_tools/gate_maps.py CONFIG CHECKPOINT IMAGE [IMAGE ...] --out gates.png
    python tools/analysis_tools/gate_maps.py CONFIG CHECKPOINT IMAGE --label LABEL --zero-gate all

CONFIG has a ``GFFHead`` or a ``GatedFullyFusion`` neck with gates. The picture has a row per image:
image, label, prediction, and a heat map per gate. ``--zero-gate`` sets one gate at a time to 0, and
marks the pixels that become wrong or, without a label, whose prediction changes. Without IMAGE the
images and labels are those of the validation set. ``none`` instead of the checkpoint means the
initial weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, image_sets, load  # isort: skip

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
from mmseg_fusion.analysis.layer_features import batches
from mmseg_fusion.cli import exits_on_input_error
from mmseg_fusion.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('gate_maps', __doc__)
    parser.add_model('config with gates: a GFFHead or a GatedFullyFusion neck')
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
    parser.add_images(2, files=False)
    parser.add_output('gate_maps.png')
    parser.add_argument('--title', default='', help='of the picture; default: name of the config')
    # Options may stand between CHECKPOINT and the images.
    args = parser.parse(argv, intermixed=True)
    if args.label and not args.images:
        parser.error('--label belongs to images: give both')
    if args.label and (args.num_samples or args.indices):
        parser.error('--label gives a label for every image: leave --indices and --num-samples out')
    wrong = [text for text in args.zero_gate if text != 'all' and not text.isdigit()]
    if wrong:
        hint = '; images come before it' if Path(wrong[0]).exists() else ''
        parser.error(f'--zero-gate: expected numbers from 1, or all, got {wrong[0]!r}{hint}')
    return args


def run(args: argparse.Namespace) -> list[GateMaps]:
    """Looks at every image and draws them."""
    missing = [file for file in args.label or () if not Path(file).is_file()]
    if missing:
        raise InputError(f'--label {missing[0]} is not a file')
    args.outputs.check(args.out)
    seen = load(args, find=find_gates)
    (images,) = image_sets(args, seen, labels=args.label)
    (name,), (info,), (model,), (fusion,) = seen.names, seen.infos, seen.models, seen.layers
    count = len(level_names(model, fusion))
    levels = list(
        dict.fromkeys(
            level
            for text in args.zero_gate
            for level in (range(1, count + 1) if text == 'all' else [int(text)])
        )
    )
    check_levels(model, fusion, levels)
    views = [gate_maps(model, b, levels, fusion, info.ignore_index) for b in batches(images)]
    with args.outputs.path(args.out) as file:
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
    views = run(args)
    print(report(views))
    print(args.out)


if __name__ == '__main__':
    main()
