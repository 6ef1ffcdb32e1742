"""Figures 3.3 and 3.4 of the thesis: where spatial and channel attention contradict each other.

    python tools/analysis_tools/attention_conflicts.py CONFIG CHECKPOINT
    python tools/analysis_tools/attention_conflicts.py CONFIG CHECKPOINT --images FOLDER a.jpg

CONFIG has a ``DAHead`` (parallel) or a ``SequentialDualAttentionHead``. Images are those of its
validation set, with their labels, or the given files, with labels from ``--labels``. The tool
prints on how many pixels the attentions disagree, and on how many the prediction is wrong although
one of them was right. It writes ``attention_conflicts.csv``, a row per image, and
``attention_conflicts.png`` with the images of the largest loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, image_sets, load  # isort: skip

import numpy as np
from mmengine.registry import init_default_scope
from mmengine.utils import track_iter_progress
from mmseg.registry import MODELS
from prettytable import PrettyTable

from mmseg_fusion.analysis.attention_conflicts import (
    PREDICTION,
    Conflicts,
    Example,
    branches_of,
    compare,
    draw_conflicts,
    predict_branches,
)
from mmseg_fusion.analysis.layer_features import IMAGE_SUFFIXES, batches, image_files
from mmseg_fusion.cli import exits_on_input_error, read_config
from mmseg_fusion.errors import InputError
from mmseg_fusion.images import read_image


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('attention_conflicts', __doc__)
    parser.add_model('config with a dual attention head')
    parser.add_argument('--images', nargs='+', help='files or folders; default: the val set')
    parser.add_argument('--labels', help='folder with a label of the same stem for every image')
    parser.add_argument('--num-images', type=int, default=32, help='evenly drawn from the val set')
    parser.add_argument('--rows', type=int, default=4, help='images in the picture')
    parser.add_output()
    args = parser.parse(argv, num_images=1, rows=1)
    if args.labels and not args.images:
        parser.error('--labels belongs to --images: the val set has its own labels')
    args.split = 'val'
    return args


def labels_of(images: Sequence[Path], folder: str) -> list[str]:
    """The label of every image.

    Args:
        images: the files.
        folder: with a label of the same stem for each, whatever its suffix.

    Raises:
        InputError: a label or the folder is not there.
    """
    if not Path(folder).is_dir():
        raise InputError(f'--labels: {folder} is no folder: give that of the labels')
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    by_stem = {path.stem: str(path) for path in files}
    missing = [path.name for path in images if path.stem not in by_stem]
    if missing:
        raise InputError(
            f'--labels: {folder} has no label for {len(missing)} of {len(images)} images, the '
            f'first is {missing[0]}; a label has the name of its image, up to the suffix'
        )
    return [by_stem[path.stem] for path in images]


def report(total: Conflicts, images: int) -> str:
    """The numbers in words."""
    shares = total.shares()
    branches = [name for name in total.right if name != PREDICTION]
    lines = []
    if total.right:
        table = PrettyTable(['answer', 'right, %', 'right where the prediction is wrong, %'])
        for name in [*branches, PREDICTION]:
            lost = f'{shares[f"{name} right, lost"]:.2f}' if name != PREDICTION else '-'
            table.add_row([name, f'{shares[f"{name} right"]:.2f}', lost])
        lines.append(str(table))
    kind = 'labelled pixels' if total.right else 'pixels'
    lines.append(f'{images} images, {total.pixels} {kind}')
    lines.append(f'disagree: {shares["disagree"]:.2f} % of the pixels')
    if total.right:
        lines.append(
            f'lost: {shares["lost"]:.2f} % (the prediction is wrong, an attention was right)'
        )
        lines.append(
            f'gained: {shares["gained"]:.2f} % (the prediction is right, no attention was)'
        )
    return '\n'.join(lines)


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    numbers, picture = (args.out_dir / f'attention_conflicts.{kind}' for kind in ('csv', 'png'))
    args.outputs.check(numbers, picture)
    # The head first: a checkpoint that fits it is no help where the head has no branches.
    cfg = read_config(args.config, args.cfg_options, ['model.decode_head'])
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    head = cfg.model.decode_head
    try:
        branches = branches_of(MODELS.build(head[-1] if isinstance(head, list) else head))
    except ValueError as error:
        raise InputError(f'{args.config}: {error}') from error
    seen = load(args, find=lambda *_: 'decode_head')
    (name,), (info,), (model,) = seen.names, seen.infos, seen.models
    files = image_files(args.images or ())
    (images,) = image_sets(
        args, seen, images=files, labels=labels_of(files, args.labels) if args.labels else None
    )
    if not files:
        last, number = len(images) - 1, min(args.num_images, len(images))
        images.indices = np.linspace(0, last, number).round().astype(int).tolist()

    total, rows, kept = Conflicts(), [], []
    loader = batches(images)
    for batch in track_iter_progress((iter(loader), len(loader))):
        (sample,) = batch['data_samples']
        label = sample.get('gt_sem_seg')
        truth = None if label is None else label.data[0].numpy()
        (answers,) = predict_branches(model, batch)
        try:
            counts = compare(answers, truth, info.ignore_index)
        except ValueError as error:
            raise InputError(f'{sample.img_path}: {error}') from error
        total = total + counts
        image = Path(sample.img_path).name
        rows.append({'image': image, 'pixels': counts.pixels, **counts.shares()})
        kept.append(Example(image, read_image(sample.img_path), answers, truth, counts))
        kept = sorted(kept, key=lambda example: -example.rank)[: args.rows]

    print('\n' + report(total, len(images)))
    if len(branches) == 1:
        print(f'(sequential: {next(iter(branches))} is compared with the prediction behind it)')
    args.outputs.write_rows(numbers, rows)
    metainfo = dict(classes=info.classes, palette=info.palette)
    with args.outputs.path(picture) as file:
        draw_conflicts(kept, metainfo, file, name, info.ignore_index)
    print(f'{numbers}\n{picture}')


if __name__ == '__main__':
    main()
