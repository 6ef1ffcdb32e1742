"""CamVid in the SegNet layout -> the folders that ``CamVidDataset`` reads.

In:  CamVid/{train,trainannot,val,valannot,test,testannot}/*.png, labels 0..10 and 11 (unlabelled)
Out: img_dir/{train,val,test}/*.jpg, ann_dir/{train,val,test}/*.png, labels 0..10 and 255

    python tools/dataset_converters/camvid.py CamVid --out-dir data/camvid --nproc 4
"""

from __future__ import annotations

import argparse
import io
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    exits_on_input_error,
)

import cv2
import numpy as np
from mmengine.utils import track_parallel_progress, track_progress
from PIL import Image

from mmseg_fusion.errors import InputError
from mmseg_fusion.images import check_image, read_image

#: Split and the number of images that the published split has.
SPLITS = {'train': 367, 'val': 101, 'test': 233}
NUM_CLASSES = 11
UNLABELLED = 11
IGNORE = 255


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Convert CamVid from the SegNet layout (train, trainannot, ...)'
    )
    parser.add_argument('camvid_path', type=Path, help='folder with train, trainannot, val, ...')
    parser.add_argument('-o', '--out-dir', type=Path, default=Path('data/camvid'))
    parser.add_argument('--nproc', type=int, default=1, help='number of processes')
    parser.add_argument(
        '--jpeg-quality', type=int, default=92, help='of the images that are written (1..100)'
    )
    parser.add_argument(
        '--keep-png',
        action='store_true',
        help="copy the images as they are; the dataset then needs img_suffix='.png'",
    )
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if not 1 <= args.jpeg_quality <= 100:
        parser.error(f'--jpeg-quality is 1 to 100, but got {args.jpeg_quality}')
    if args.nproc < 1:
        parser.error(f'--nproc is at least 1, but got {args.nproc}')
    return args


def find_pairs(root: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """Pairs of image and label in the SegNet layout.

    Args:
        root: the folder with train, trainannot, val, ...

    Returns:
        (split, image, label) for every pair, and one line for every file or folder that lacks
        its other half.
    """
    pairs, problems = [], []
    for split in SPLITS:
        folders = root / split, root / f'{split}annot'
        absent = [folder for folder in folders if not folder.is_dir()]
        if absent:
            problems += [f'{folder}: no such folder' for folder in absent]
            continue
        images, labels = ({p.name: p for p in folder.glob('*.png')} for folder in folders)
        if not images and not labels:
            problems += [f'{folder}: no *.png in it' for folder in folders]
        problems += [
            f'{images[n]}: no label {folders[1] / n}' for n in sorted(images.keys() - labels)
        ]
        problems += [
            f'{labels[n]}: no image {folders[0] / n}' for n in sorted(labels.keys() - images)
        ]
        pairs += [(split, images[n], labels[n]) for n in sorted(images.keys() & labels)]
    return pairs, problems


def targets(pair: tuple[str, Path, Path], out_dir: Path, keep_png: bool) -> tuple[Path, Path]:
    """Where the label and the image of a pair go."""
    split, image, label = pair
    image = image if keep_png else image.with_suffix('.jpg')
    return out_dir / 'ann_dir' / split / label.name, out_dir / 'img_dir' / split / image.name


def convert_pair(
    pair: tuple[str, Path, Path],
    out_dir: Path,
    jpeg_quality: int,
    keep_png: bool,
    outputs: Outputs,
) -> str | None:
    """Checks one pair, then writes it.

    Args:
        pair: split, image and label.
        out_dir: where ``img_dir`` and ``ann_dir`` are.
        jpeg_quality: of the image that is written.
        keep_png: copy the image instead.
        outputs: what this run writes.

    Returns:
        What is wrong with the pair, with its path, or None. A wrong pair is not written.
    """
    image_path, label_path = pair[1:]
    try:
        image = read_image(image_path)[..., ::-1]
        check_image(label_path, 'a label')
    except InputError as error:
        return str(error)
    label = np.array(Image.open(label_path))
    if label.ndim != 2:
        return (
            f'{label_path}: expected one channel of class ids, but got shape {label.shape}; '
            'is it a colour rendering?'
        )
    if label.shape != image.shape[:2]:
        return f'{label_path}: is {label.shape}, but its image {image_path} is {image.shape[:2]}'
    ids, counts = np.unique(label, return_counts=True)
    foreign = [f'{i} ({n} pixels)' for i, n in zip(ids, counts) if not 0 <= i < NUM_CLASSES + 1]
    if foreign:
        return (
            f'{label_path}: ids {", ".join(foreign)}; expected 0..{NUM_CLASSES - 1} and '
            f'{UNLABELLED} for unlabelled'
        )
    label = np.where(label == UNLABELLED, IGNORE, label).astype(np.uint8)
    annotation = io.BytesIO()
    Image.fromarray(label).save(annotation, format='PNG')
    label_target, target = targets(pair, out_dir, keep_png)
    if keep_png:
        content = image_path.read_bytes()
    else:
        content = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])[1].tobytes()
    try:
        outputs.write(label_target, annotation.getvalue())
        outputs.write(target, content)
    except InputError as error:
        return str(error)
    return None


@exits_on_input_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    pairs, problems = find_pairs(args.camvid_path)
    outputs = Outputs('camvid', (path for pair in pairs for path in pair[1:]), args.overwrite)
    outputs.check(*(path for pair in pairs for path in targets(pair, args.out_dir, args.keep_png)))
    convert = partial(
        convert_pair,
        out_dir=args.out_dir,
        jpeg_quality=args.jpeg_quality,
        keep_png=args.keep_png,
        outputs=outputs,
    )
    if pairs:
        if args.nproc > 1:
            results = track_parallel_progress(convert, pairs, args.nproc, chunksize=8)
        else:
            results = track_progress(convert, pairs)
        problems += [result for result in results if result is not None]
        print()
    if problems:
        print(
            f'{len(problems)} problems; what they name was not converted, mend it and run again:',
            file=sys.stderr,
        )
        for problem in problems:
            print(f'  {problem}', file=sys.stderr)
        return 1
    for split, published in SPLITS.items():
        count = sum(pair[0] == split for pair in pairs)
        note = '' if count == published else f' (the published split has {published})'
        print(f'{split}: {count} pairs{note}')
    if args.keep_png:
        print("the images are PNG: set img_suffix='.png' in the datasets of the config")
    print(f'written to {args.out_dir}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
