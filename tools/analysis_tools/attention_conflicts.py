"""Figures 3.3 and 3.4 of the thesis: where spatial and channel attention contradict each other.

    python tools/analysis_tools/attention_conflicts.py CONFIG CHECKPOINT
    python tools/analysis_tools/attention_conflicts.py CONFIG CHECKPOINT --images FOLDER a.jpg

CONFIG has a ``DAHead`` (parallel) or a ``SequentialDualAttentionHead``. Images are those of its
validation set, with their labels, or the given ones, with labels from ``--labels``. Prints on
how many pixels the attentions disagree and on how many the prediction is wrong although one of
them was right; writes ``attention_conflicts.csv``, a row per image, and
``attention_conflicts.png`` with the images on which most is lost.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    check_checkpoint,
    exits_on_input_error,
    model_files,
    read_config,
)

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.utils import ProgressBar
from mmseg.registry import DATASETS, MODELS
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
from mmseg_fusion.analysis.layer_features import load_segmentor
from mmseg_fusion.checkpoints import read_checkpoint
from mmseg_fusion.images import read_image, read_sample

SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp'}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config with a dual attention head')
    parser.add_argument('checkpoint', help='its trained weights')
    parser.add_argument('--images', nargs='+', help='files or folders; default: the val set')
    parser.add_argument('--labels', help='folder with a label of the same stem for every image')
    parser.add_argument('--num-images', type=int, default=32, help='evenly drawn from the val set')
    parser.add_argument('--rows', type=int, default=4, help='images in the picture')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--out-dir', type=Path, help='default: work_dirs/CONFIG/attention_conflicts'
    )
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args(argv)
    for name in ('num_images', 'rows'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} is at least 1, got {getattr(args, name)}')
    if args.labels and not args.images:
        parser.error('--labels belongs to --images: the val set has its own labels')
    return args


def given_files(images: list[str], labels: str | None) -> list[tuple[Path, Path | None]]:
    """Every image with its label.

    Args:
        images: files and folders.
        labels: folder with the labels, if any.

    Raises:
        SystemExit: something is not there.
    """
    paths: list[Path] = []
    for given in map(Path, images):
        if given.is_dir():
            inside = sorted(p for p in given.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise SystemExit(f'no image in {given}; looked for {", ".join(sorted(SUFFIXES))}')
            paths += inside
        elif given.is_file():
            paths.append(given)
        else:
            raise SystemExit(f'--images: {given} is neither a file nor a folder')
    if labels is None:
        return [(path, None) for path in paths]
    if not Path(labels).is_dir():
        raise SystemExit(f'--labels: {labels} is no folder')
    by_stem = {p.stem: p for p in sorted(Path(labels).iterdir()) if p.suffix.lower() in SUFFIXES}
    missing = [path.name for path in paths if path.stem not in by_stem]
    if missing:
        raise SystemExit(
            f'--labels: {labels} has no label for {len(missing)} of {len(paths)} images, the first '
            f'is {missing[0]}; a label has the name of its image, up to the suffix'
        )
    return [(path, by_stem[path.stem]) for path in paths]


def from_files(files: list[tuple[Path, Path | None]], cfg: Config) -> Iterator[dict]:
    """The images through the pipeline of the val set."""
    data = cfg.val_dataloader.dataset
    kind = DATASETS.get(data.type)
    steps = [s for s in data.pipeline if files[0][1] is not None or s.type != 'LoadAnnotations']
    pipeline = Compose(steps)
    # As the data set would say it, which may not be there.
    reduce = data.get('reduce_zero_label')
    if reduce is None:
        parameter = inspect.signature(kind).parameters.get('reduce_zero_label')
        reduce = False if parameter is None else parameter.default
    for step in steps:
        if step.get('reduce_zero_label') is not None:
            reduce = step.reduce_zero_label
    label_map = kind.get_label_map(data.get('metainfo', {}).get('classes'))
    for image, label in files:
        info = dict(img_path=str(image), seg_fields=[], reduce_zero_label=reduce)
        if label is not None:
            info.update(seg_map_path=str(label), label_map=label_map)
        yield read_sample(pipeline, info)


def val_set(cfg: Config):
    """The validation set.

    Raises:
        SystemExit: its files are not there.
    """
    # Some data sets of mmseg assert that their folder exists.
    try:
        return DATASETS.build(cfg.val_dataloader.dataset)
    except (AssertionError, FileNotFoundError) as error:
        raise SystemExit(
            f'{error}\nThe validation images of the config are not there; point it at them with '
            '--cfg-options val_dataloader.dataset.data_root=FOLDER, or give --images'
        ) from error


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
    cfg = read_config(args.config, args.cfg_options, ['model.decode_head'])
    check_checkpoint(args.checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    files = given_files(args.images, args.labels) if args.images else None
    name = Path(args.config).stem
    out_dir = args.out_dir or Path('work_dirs') / name / 'attention_conflicts'
    numbers, picture = (out_dir / f'attention_conflicts.{kind}' for kind in ('csv', 'png'))
    inputs = model_files([args.config, args.checkpoint])
    outputs = Outputs('attention_conflicts', inputs, args.overwrite)
    outputs.add_inputs(path for pair in files or () for path in pair)
    outputs.check(numbers, picture)
    # The head first: a checkpoint that fits it is no help where the head has no branches.
    head = cfg.model.decode_head
    try:
        branches = branches_of(MODELS.build(head[-1] if isinstance(head, list) else head))
    except ValueError as error:
        raise SystemExit(f'{args.config}: {error}') from error
    model = load_segmentor(cfg, args.checkpoint, args.device)
    meta = read_checkpoint(args.checkpoint).get('meta') or {}
    ignore_index = model.decode_head.ignore_index

    if files is None:
        dataset = val_set(cfg)
        metainfo, number = dataset.metainfo, min(args.num_images, len(dataset))
        indices = np.linspace(0, len(dataset) - 1, number).round().astype(int)
        samples: Iterator[dict] = (
            read_sample(lambda _, i=i: dataset[i], dataset.get_data_info(i))
            for i in indices.tolist()
        )
    else:
        metainfo, number = DATASETS.get(cfg.val_dataloader.dataset.type).METAINFO, len(files)
        metainfo = {**metainfo, **(meta.get('dataset_meta') or {})}
        samples = from_files(files, cfg)

    total, rows, kept = Conflicts(), [], []
    bar = ProgressBar(number)
    for sample in samples:
        data_sample = sample['data_samples']
        label = data_sample.get('gt_sem_seg')
        truth = None if label is None else label.data[0].numpy()
        (answers,) = predict_branches(model, pseudo_collate([sample]))
        try:
            counts = compare(answers, truth, ignore_index)
        except ValueError as error:
            raise SystemExit(f'{data_sample.img_path}: {error}') from error
        total = total + counts
        image_name = Path(data_sample.img_path).name
        outputs.add_inputs([data_sample.img_path, data_sample.get('seg_map_path')])
        rows.append({'image': image_name, 'pixels': counts.pixels, **counts.shares()})
        image = read_image(data_sample.img_path)
        kept.append(Example(image_name, image, answers, truth, counts))
        kept = sorted(kept, key=lambda example: -example.rank)[: args.rows]
        bar.update()

    print('\n' + report(total, number))
    if len(branches) == 1:
        print(f'(sequential: {next(iter(branches))} is compared with the prediction behind it)')
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    outputs.write(numbers, text.getvalue())
    with outputs.path(picture) as file:
        draw_conflicts(kept, metainfo, file, name, ignore_index)
    print(f'{numbers}\n{picture}')


if __name__ == '__main__':
    main()
