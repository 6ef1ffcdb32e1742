"""COCO's instances -> label maps in the 21 classes of PASCAL VOC, for KSAC's first stage.

    python tools/dataset_converters/coco_voc.py \\
        data/coco/annotations/instances_train2017.json data/coco/train2017 data/coco/voc_train2017

``IMAGES/a.jpg`` gets ``OUT/a.png``. A pixel is 1 to 20 in an instance of one of VOC's classes,
including crowds, 255, which losses ignore, where instances of two such classes overlap, and 0
everywhere else. Images with no more than ``--min-pixels`` pixels of 1 to 20 are left out.
``OUT/images.txt`` lists the other images (``ann_file`` of a data set), and ``OUT/coco_voc.json``
the pixels of each class. The tool needs pycocotools (``pip install 'mmseg-fusion[coco]'``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    check_at_least,
    exits_on_input_error,
)

import numpy as np
from mmengine.utils import track_parallel_progress, track_progress
from PIL import Image, PngImagePlugin

from mmseg_fusion.errors import InputError
from mmseg_fusion.images import check_image

#: COCO's name of each of VOC's classes, in VOC's order; the first has the id 1.
VOC_OF_COCO = {
    'airplane': 'aeroplane',
    'bicycle': 'bicycle',
    'bird': 'bird',
    'boat': 'boat',
    'bottle': 'bottle',
    'bus': 'bus',
    'car': 'car',
    'cat': 'cat',
    'chair': 'chair',
    'cow': 'cow',
    'dining table': 'diningtable',
    'dog': 'dog',
    'horse': 'horse',
    'motorcycle': 'motorbike',
    'person': 'person',
    'potted plant': 'pottedplant',
    'sheep': 'sheep',
    'couch': 'sofa',
    'train': 'train',
    'tv': 'tvmonitor',
}
IDS = {name: i for i, name in enumerate(VOC_OF_COCO, 1)}
IGNORE = 255
LIST, SUMMARY = 'images.txt', 'coco_voc.json'
#: Stands in every file of this tool that can hold it: only those are ever replaced.
KEY = 'mmseg_fusion coco_voc'
#: How many names an error lists.
SHOWN = 5


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('annotations', type=Path, help='instances_train2017.json, or one like it')
    parser.add_argument('images', type=Path, help='folder of its images')
    parser.add_argument('out', type=Path, help='folder for the label maps; not in IMAGES')
    parser.add_argument(
        '--min-pixels',
        type=int,
        default=1000,
        help="an image is taken if more pixels than these are of VOC's classes; default: 1000",
    )
    parser.add_argument('--nproc', type=int, default=1, help='number of processes')
    parser.add_argument(
        '--overwrite', action='store_true', help='make what this tool wrote into OUT again'
    )
    args = parser.parse_args(argv)
    check_at_least(parser, args, min_pixels=0, nproc=1)
    return args


def check_folders(images: Path, out: Path) -> None:
    """Raises:
    InputError: there are no images, or labels would be written among them.
    """
    if not images.is_dir():
        what = 'is a file; give the folder of the images' if images.exists() else 'is no folder'
        raise InputError(f'IMAGES {str(images)!r} {what} (looked in {os.getcwd()})')
    if out.exists() and not out.is_dir():
        raise InputError(f'OUT {str(out)!r} is a file; give the folder to write the labels to')
    inner, outer = out.resolve(), images.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise InputError(
            f'one of OUT {str(out)!r} and IMAGES {str(images)!r} is in the other, where a label '
            'may have the name of an image; choose a folder beside the images, as '
            f'{str(images.parent / f"voc_{images.name}")!r}'
        )


def read_annotations(path: Path) -> dict:
    """A file of COCO's instances.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        with path.open(encoding='utf-8') as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f'ANNOTATIONS {str(path)!r} cannot be read as JSON (looked in {os.getcwd()}): {error}'
        ) from error
    needed = dict(
        images={'id', 'file_name', 'height', 'width'},
        categories={'id', 'name'},
        annotations={'image_id', 'category_id', 'segmentation'},
    )
    for part, keys in needed.items():
        entries = data.get(part) if isinstance(data, dict) else None
        whole = isinstance(entries, list) and all(
            isinstance(entry, dict) and keys <= entry.keys() for entry in entries
        )
        if not whole or not entries:
            raise InputError(
                f"ANNOTATIONS {str(path)!r} is no file of COCO's instances: expected a list "
                f'{part!r} of entries with {", ".join(sorted(keys))}; give '
                'instances_train2017.json'
            )
    if not any(category['name'] in IDS for category in data['categories']):
        categories = ', '.join(repr(c['name']) for c in data['categories'][:SHOWN])
        raise InputError(
            f"ANNOTATIONS {str(path)!r} has none of VOC's classes under COCO's names (airplane, "
            f'bicycle, ...): its categories are {categories}, ...'
        )
    return data


def label_paths(images: Sequence[dict], out: Path) -> dict[int, Path]:
    """Where the label of each image goes, by the image's id.

    Raises:
        InputError: a path leaves the folder, or two images would have one label.
    """
    paths: dict[int, Path] = {}
    first: dict[Path, str] = {}
    for image in images:
        name = PurePosixPath(image['file_name'])
        if name.is_absolute() or '..' in name.parts:
            raise InputError(f"file_name {str(name)!r} is not a path inside the images' folder")
        path = out / name.with_suffix('.png')
        if path in first:
            raise InputError(f'{first[path]} and {name} would both have the label {path}')
        first[path] = str(name)
        paths[image['id']] = path
    return paths


def is_own(path: Path) -> bool:
    """Whether this tool wrote the file."""
    if path.name == LIST:
        return is_own(path.with_name(SUMMARY))
    try:
        if path.suffix == '.png':
            with Image.open(path) as image:
                return KEY in image.info
        return json.loads(path.read_bytes()).get('made by') == KEY
    except (OSError, ValueError, AttributeError):
        return False


def check_out(paths: Sequence[Path], overwrite: bool) -> None:
    """Raises an error before a file of somebody else would be replaced.

    Raises:
        InputError: a file exists and is not this tool's, or is this tool's and ``overwrite`` is not
            given.
    """
    there = [path for path in paths if path.exists()]
    foreign = [path for path in there if not is_own(path)]
    if foreign:
        raise InputError(
            f'{len(foreign)} files in OUT were not written by this tool and are left alone '
            f'({", ".join(map(str, foreign[:SHOWN]))}); choose another OUT'
        )
    if there and not overwrite:
        raise InputError(
            f'{len(there)} files of this tool are in OUT already (as {there[0]}); choose another '
            'OUT, or --overwrite to make them again'
        )


def label_map(height: int, width: int, instances: Sequence[tuple[int, dict]]) -> np.ndarray:
    """VOC's classes over an image.

    Args:
        height: of the image.
        width: of the image.
        instances: VOC's class and COCO's annotation of each.

    Returns:
        (H, W), uint8: 0, 1 to 20, or 255 where two classes overlap.

    Raises:
        ValueError: a segmentation cannot be read.
    """
    from pycocotools import mask as coco_mask

    label = np.zeros((height, width), np.uint8)
    for voc, annotation in instances:
        segmentation = annotation['segmentation']
        if isinstance(segmentation, list):
            if not segmentation or any(len(p) < 6 or len(p) % 2 for p in segmentation):
                raise ValueError('expected polygons of three points or more')
            parts = coco_mask.frPyObjects(segmentation, height, width)
        else:
            if list(segmentation['size']) != [height, width]:
                raise ValueError(
                    f'its mask is of size {segmentation["size"]}, the image of {[height, width]}'
                )
            # COCO's own files hold counts as numbers; as text they are compressed already.
            plain = isinstance(segmentation['counts'], list)
            parts = [coco_mask.frPyObjects(segmentation, height, width) if plain else segmentation]
        inside = coco_mask.decode(coco_mask.merge(parts)).astype(bool)
        other = inside & (label != 0) & (label != voc)
        label[inside] = voc
        label[other] = IGNORE
    return label


def convert(
    task: tuple[dict, Path, list[tuple[int, dict]]],
    images: Path,
    min_pixels: int,
    outputs: Outputs,
) -> list[int] | str | None:
    """Writes the label of one image.

    Args:
        task: the image's entry, where its label goes, and its instances.
        images: folder of the images.
        min_pixels: the image is taken if more pixels than this belong to a class.
        outputs: what this run writes.

    Returns:
        Pixels per id, 0 to 20; None if there are too few; or what is wrong with the image.
    """
    image, path, instances = task
    source = images / image['file_name']
    try:
        label = label_map(image['height'], image['width'], instances)
    except (ValueError, TypeError, KeyError) as error:
        return f'{source}: a segmentation cannot be read ({type(error).__name__}: {error})'
    counts = np.bincount(label.ravel(), minlength=IGNORE + 1)[: len(IDS) + 1]
    if counts[1:].sum() <= min_pixels:
        return None
    try:
        check_image(source)
    except InputError as error:
        return str(error)
    with Image.open(source) as opened:
        size = opened.size
    if size != label.shape[::-1]:
        return (
            f'{source}: is {size[1]} x {size[0]} (height x width), but its annotations are for '
            f'{label.shape[0]} x {label.shape[1]}'
        )
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, image['file_name'])
    try:
        with outputs.file(path) as file:
            Image.fromarray(label).save(file, format='PNG', pnginfo=text)
    except InputError as error:
        return str(error)
    return counts.tolist()


@exits_on_input_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"pycocotools is needed to read COCO's masks ({error}): "
            "pip install 'mmseg-fusion[coco]'"
        ) from error
    check_folders(args.images, args.out)
    data = read_annotations(args.annotations)
    paths = label_paths(data['images'], args.out)
    files = [args.out / LIST, args.out / SUMMARY]
    check_out([*paths.values(), *files], args.overwrite)
    # What is there is this tool's own, and is to be replaced.
    outputs = Outputs('coco_voc', [args.annotations], overwrite=True)
    outputs.check(*files)

    voc_of = {c['id']: IDS[c['name']] for c in data['categories'] if c['name'] in IDS}
    instances: dict[int, list[tuple[int, dict]]] = {}
    problems = []
    for annotation in data['annotations']:
        if annotation['category_id'] not in voc_of:
            continue
        if annotation['image_id'] not in paths:
            problems.append(
                f'annotation {annotation.get("id")}: no image has the id {annotation["image_id"]}'
            )
            continue
        of_image = instances.setdefault(annotation['image_id'], [])
        of_image.append((voc_of[annotation['category_id']], annotation))
    tasks = [
        (image, paths[image['id']], instances[image['id']])
        for image in data['images']
        if image['id'] in instances
    ]
    make = partial(convert, images=args.images, min_pixels=args.min_pixels, outputs=outputs)
    results: list[list[int] | str | None] = []
    if tasks:
        if args.nproc > 1:
            results = track_parallel_progress(make, tasks, args.nproc, chunksize=64)
        else:
            results = track_progress(make, tasks)
        print()
    problems += [result for result in results if isinstance(result, str)]
    made = {
        path.relative_to(args.out).with_suffix('').as_posix(): result
        for (_, path, _), result in zip(tasks, results)
        if isinstance(result, list)
    }
    pixels = np.sum([*made.values(), [0] * (len(IDS) + 1)], axis=0)
    names = ['background', *VOC_OF_COCO.values()]
    summary = {
        'made by': KEY,
        'annotations': str(args.annotations),
        'min_pixels': args.min_pixels,
        'images': len(data['images']),
        'with a class of VOC': len(tasks),
        'taken': len(made),
        'pixels': {name: int(n) for name, n in zip(names, pixels)},
        'problems': problems,
    }
    # The summary first: the list is taken for this tool's only beside it.
    outputs.write(args.out / SUMMARY, json.dumps(summary, indent=1) + '\n')
    outputs.write(args.out / LIST, ''.join(f'{name}\n' for name in sorted(made)))

    absent = [name for name in IDS if name not in {c['name'] for c in data['categories']}]
    if absent:
        print(f'ANNOTATIONS has no category {", ".join(map(repr, absent))}')
    print(
        f'{len(data["images"])} images, {len(tasks)} with a class of VOC, {len(made)} of them with '
        f'more than {args.min_pixels} pixels of them: labels written to {args.out}'
    )
    if problems:
        print(
            f'{len(problems)} problems; what they name was not converted, mend it and run again:',
            file=sys.stderr,
        )
        for problem in problems:
            print(f'  {problem}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
