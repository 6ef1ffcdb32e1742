"""Reads every image and label of a config's data sets and lists the faults for training.

    python tools/analysis_tools/check_dataset.py CONFIG [--splits train val test] [--nproc 4]

Reads through the data set's own list and the loading transforms of its pipeline, so
``reduce_zero_label``, ``metainfo.classes`` and file backends count as they do in training. Errors
are files that are missing or cannot be read, image and label of different sizes, ids that are
neither a class nor the ignore index, labels without an image, heads whose ``num_classes`` or
``ignore_index`` does not fit the data set, and a ``mean`` that does not fit the backbone. The exit
status is 1 if there is an error. Warnings are a class that never occurs, an image of more than 8
bits that is read as 8 bits, and an image with other channels than the model takes.
"""

from __future__ import annotations

import argparse
import io
import os.path as osp
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import read_config  # isort: skip

import cv2
import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.config import DictAction
from mmengine.registry import init_default_scope
from mmengine.utils import track_parallel_progress, track_progress
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image, UnidentifiedImageError
from prettytable import PrettyTable

from mmseg_fusion.channels import check_channels, image_channels
from mmseg_fusion.errors import InputError
from mmseg_fusion.images import fault

SPLITS = ('train', 'val', 'test')
#: What a user can do about an image of more than 8 bits, of which mmcv keeps 8.
KEEP_BITS = (
    "dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True), mean and std of the "
    "file's own values, no PhotoMetricDistortion; docs/data.md has more"
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: problems of one kind are listed together.
        path: file, folder or config key.
        detail: the actual and the expected value.
        warning: training would go on.
    """

    kind: str
    path: str
    detail: str
    warning: bool = False


@dataclass
class Report:
    """The result of the check of one split.

    Attributes:
        classes: names of the classes.
        ignore_index: id of the pixels that are ignored.
        pairs: number of pairs read.
        pixels: pixels per id.
        images: images per id.
        problems: in the order of reading.
    """

    classes: tuple[str, ...]
    ignore_index: int
    pairs: int = 0
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    problems: list[Problem] = field(default_factory=list)

    def absent(self) -> list[str]:
        """Classes that never occur."""
        return [name for i, name in enumerate(self.classes) if not self.pixels[i]]


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return type(error).__name__ + (f': {text[0]}' if text else '')


class PairReader:
    """Reads one image and label as the pipeline does; picklable, for several processes.

    Args:
        image_steps: the loading transforms of the pipeline that read the image.
        label_steps: those that read the label.
        num_classes: number of classes.
        ignore_index: id of the pixels that are ignored.
        channels: of the images that the model takes; None where that is unknown.
    """

    def __init__(
        self,
        image_steps: list,
        label_steps: list,
        num_classes: int,
        ignore_index: int,
        channels: int | None = None,
    ) -> None:
        self.image_steps = image_steps
        self.label_steps = label_steps
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.channels = channels

    def __call__(self, info: dict) -> tuple[np.ndarray, list[Problem]]:
        """Pixels per id (256) of the label, and what is wrong with the pair."""
        counts = np.zeros(256, np.int64)
        problems: list[Problem] = []
        results = dict(info)
        image_ok = self._load('image', self.image_steps, results, info.get('img_path'), problems)
        if image_ok:
            problems += self._lost(info['img_path'], results['img'])
        path = info.get('seg_map_path')
        if not self.label_steps or path is None:
            return counts, problems
        if not self._load('label', self.label_steps, results, path, problems):
            return counts, problems
        label = results['gt_seg_map']
        if label.ndim != 2:
            problems.append(
                Problem(
                    'unreadable label',
                    path,
                    f'expected one channel of class ids, but got shape {label.shape}; is it a '
                    'colour rendering?',
                )
            )
            return counts, problems
        if image_ok and results['img'].shape[:2] != label.shape:
            problems.append(
                Problem(
                    'sizes differ',
                    path,
                    f'label is {label.shape[0]} x {label.shape[1]}, image '
                    f'{info["img_path"]} is {" x ".join(map(str, results["img"].shape[:2]))}',
                )
            )
        counts += np.bincount(label.ravel(), minlength=256)
        allowed = {*range(self.num_classes), self.ignore_index}
        foreign = [i for i in np.flatnonzero(counts) if i not in allowed]
        if foreign:
            listed = ', '.join(f'{i} ({counts[i]} pixels)' for i in foreign)
            problems.append(
                Problem(
                    'ids out of range',
                    path,
                    f'{listed}; expected 0..{self.num_classes - 1} and {self.ignore_index}',
                )
            )
        return counts, problems

    def _load(
        self, what: str, steps: list, results: dict, path: str, problems: list[Problem]
    ) -> bool:
        try:
            for step in steps:
                if step(results) is None:
                    raise ValueError(f'{type(step).__name__} returned nothing')
            self._verify(what, path, steps)
        except FileNotFoundError:
            problems.append(Problem(f'missing {what}', path, 'no such file'))
        except Exception as error:  # whatever a decoder raises is the finding
            detail = fault(path)
            if detail is None:
                detail = _reason(error)
                if str(path).lower().endswith(('.tif', '.tiff')):
                    detail += (
                        '; OpenCV reads a TIFF of up to 4 channels: docs/data.md has a transform'
                    )
            problems.append(Problem(f'unreadable {what}', path, detail))
        else:
            return True
        return False

    def _lost(self, path: str, image: np.ndarray) -> Iterator[Problem]:
        """Bits and channels of an image file that the transforms leave out."""
        backend_args = getattr(self.image_steps[-1], 'backend_args', None)
        if image.dtype == np.uint8:
            whole = _unchanged(fileio.get(path, backend_args=backend_args))
            if whole is not None and whole.dtype != np.uint8:
                yield Problem(
                    'read as 8 bit',
                    path,
                    f'holds {whole.dtype} up to {whole.max():g}, read as uint8 up to '
                    f'{image.max()}; to keep it: {KEEP_BITS}',
                    warning=True,
                )
        channels = image.shape[2] if image.ndim > 2 else 1
        if self.channels is not None and channels != self.channels:
            yield Problem(
                'channels',
                path,
                f'is read with {channels} channels, but the model takes {self.channels} '
                '(model.data_preprocessor.mean, model.backbone.in_channels); does a transform '
                'behind the loading add the others?',
                warning=True,
            )

    @staticmethod
    def _verify(what: str, path: str, steps: list) -> None:
        """What the transforms pass over in silence: a cut-off file, ids that wrap at 256."""
        backend_args = getattr(steps[-1], 'backend_args', None)
        try:
            with Image.open(io.BytesIO(fileio.get(path, backend_args=backend_args))) as image:
                image.load()
                if what == 'label' and image.mode[0] in 'IF' and image.getextrema()[1] > 255:
                    raise ValueError(
                        f'ids up to {image.getextrema()[1]}, but LoadAnnotations keeps 8 bits: '
                        'they wrap around'
                    )
        except UnidentifiedImageError:
            # A format that Pillow does not know; the transforms have read it.
            pass


def _unchanged(content: bytes) -> np.ndarray | None:
    """An image with all bits and channels of its file; None where it has 8 bits for sure."""
    # JPEG, BMP, GIF, WebP; the byte behind the sides of a PNG has its bits.
    if content.startswith((b'\xff\xd8', b'BM', b'GIF', b'RIFF')):
        return None
    if content.startswith(b'\x89PNG') and content[24] <= 8:
        return None
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # A format of another library.
        return None


def leaf_datasets(cfg: dict, key: str) -> Iterator[tuple[str, dict]]:
    """The data sets that read files, with their config keys, out of any wrappers."""
    if 'datasets' in cfg:
        for i, inner in enumerate(cfg['datasets']):
            yield from leaf_datasets(inner, f'{key}.datasets.{i}')
    elif 'dataset' in cfg:
        yield from leaf_datasets(cfg['dataset'], f'{key}.dataset')
    else:
        yield key, cfg


def loading_steps(pipeline: list) -> tuple[list, list]:
    """Builds the transforms of a pipeline that read the image, and those that read the label."""
    image_steps, label_steps = [], []
    for cfg in pipeline:
        if not isinstance(cfg, dict) or not str(cfg.get('type')).rsplit('.')[-1].startswith('Load'):
            continue
        step = TRANSFORMS.build(cfg)
        (label_steps if isinstance(step, LoadAnnotations) else image_steps).append(step)
    return image_steps, label_steps


def missing_places(cfg: dict, key: str) -> list[Problem]:
    """Folders and lists of a data set's config that do not exist."""
    root = cfg.get('data_root') or ''
    places = {f'{key}.data_prefix.{k}': v for k, v in (cfg.get('data_prefix') or {}).items()}
    places[f'{key}.ann_file'] = cfg.get('ann_file')
    if root and not fileio.exists(root):
        return [
            Problem(
                'missing folder',
                root,
                f'no such folder; {key}.data_root has to name where the data is '
                f'(for a trial: --cfg-options {key}.data_root=PATH)',
            )
        ]
    problems = []
    for place, value in places.items():
        path = osp.join(root, value) if value else ''
        if path and not fileio.exists(path):
            problems.append(Problem('missing folder', path, f'does not exist; set by {place}'))
    return problems


def _suffixes(folder: str, backend_args: dict | None) -> str:
    endings = Counter(
        osp.splitext(name)[1] or '(none)'
        for name in fileio.list_dir_or_file(
            folder, list_dir=False, recursive=True, backend_args=backend_args
        )
    )
    listed = ', '.join(f'{suffix} ({n})' for suffix, n in endings.most_common(5))
    return f'files there end with {listed}' if listed else 'the folder is empty'


def labels_without_image(dataset) -> list[Problem]:
    """Label files in the folder that no image of the data set belongs to."""
    folder = dataset.data_prefix.get('seg_map_path')
    # A list of names may well leave out some files on purpose.
    if dataset.ann_file or not folder or not fileio.exists(folder):
        return []
    used = {osp.normpath(dataset.get_data_info(i)['seg_map_path']) for i in range(len(dataset))}
    labels = (
        osp.normpath(osp.join(folder, name))
        for name in fileio.list_dir_or_file(
            folder,
            list_dir=False,
            suffix=dataset.seg_map_suffix,
            recursive=True,
            backend_args=dataset.backend_args,
        )
    )
    images = dataset.data_prefix.get('img_path')
    return [
        Problem('label without image', path, f'no image *{dataset.img_suffix} of it in {images}')
        for path in sorted(set(labels) - used)
    ]


def check_leaf(cfg: dict, key: str, nproc: int, channels: int | None = None) -> Report:
    """Checks one data set.

    Args:
        cfg: its config.
        key: its place in the config, for messages.
        nproc: number of processes that read.
        channels: of the images that the model takes; None where that is unknown.
    """
    cfg = dict(cfg)
    pipeline = cfg.pop('pipeline', [])
    try:
        # mmengine cannot serialize an empty list, which has an explanation below.
        dataset = DATASETS.build({**cfg, 'pipeline': [], 'serialize_data': False})
        dataset.full_init()
    except Exception as error:  # asserts without a text among them: explain what can be seen
        problems = missing_places(cfg, key)
        problems = problems or [Problem('data set cannot be built', key, _reason(error))]
        return Report((), 255, problems=problems)

    report = Report(tuple(dataset.metainfo.get('classes') or ()), dataset.ignore_index)
    if not report.classes:
        report.problems.append(
            Problem(
                'no classes',
                key,
                f'{cfg["type"]} knows no classes; name them: metainfo=dict(classes=(...))',
            )
        )
        return report
    if not len(dataset):
        folder = dataset.data_prefix.get('img_path')
        report.problems.append(
            Problem(
                'no images',
                folder,
                f'none ends with {dataset.img_suffix!r}; {_suffixes(folder, dataset.backend_args)}'
                f' (set {key}.img_suffix)',
            )
        )
        return report
    report.problems += labels_without_image(dataset)
    image_steps, label_steps = loading_steps(pipeline)
    if not image_steps:
        report.problems.append(
            Problem('pipeline', f'{key}.pipeline', 'no transform in it reads an image (Load...)')
        )
        return report
    reader = PairReader(
        image_steps, label_steps, len(report.classes), report.ignore_index, channels
    )
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if nproc > 1:
        results = track_parallel_progress(reader, infos, nproc, chunksize=8)
    else:
        results = track_progress(reader, infos)
    print()
    for counts, problems in results:
        report.pairs += 1
        report.pixels += counts
        report.images += counts > 0
        report.problems += problems
    if not label_steps or infos[0].get('seg_map_path') is None:
        print(f'{key}: has no labels (no LoadAnnotations, or no seg_map_path), only images read')
    # The most frequent cause of an id that is one too large.
    last = len(report.classes)
    if last < 256 and last != report.ignore_index and report.pixels[last] and not report.pixels[0]:
        report.problems.append(
            Problem(
                'ids out of range',
                key,
                f'0 never occurs and {last} does: if the labels count from 1, set '
                'reduce_zero_label=True',
            )
        )
    return report


def check_heads(model: dict, classes: tuple[str, ...], ignore_index: int) -> list[Problem]:
    """Compares the heads of a config with the data set.

    Args:
        model: the config of the model.
        classes: of the data set.
        ignore_index: of the data set.
    """
    problems = []
    for role in ('decode_head', 'auxiliary_head'):
        heads = model.get(role) or []
        listed = isinstance(heads, (list, tuple))
        for i, head in enumerate(heads if listed else [heads]):
            key = f'model.{role}' + (f'.{i}' if listed else '')
            number = head.get('num_classes')
            if number is not None and number != len(classes):
                problems.append(
                    Problem(
                        'config',
                        f'{key}.num_classes',
                        f'is {number}, but the data set has {len(classes)} classes',
                    )
                )
            if head.get('ignore_index', 255) != ignore_index:
                problems.append(
                    Problem(
                        'config',
                        f'{key}.ignore_index',
                        f'is {head.get("ignore_index", 255)}, but the data set has {ignore_index}',
                    )
                )
    return problems


def print_table(reports: dict[str, Report]) -> None:
    """Share of pixels and number of images per class and split."""
    classes = next((r.classes for r in reports.values() if r.classes), ())
    table = PrettyTable()
    table.add_column('id', [*range(len(classes)), 'ignored'])
    table.add_column('class', [*classes, ''])
    table.align['class'] = 'l'
    for split, report in reports.items():
        if not report.classes:
            continue
        if report.classes != classes:
            print(f'{split}: has other classes ({len(report.classes)}), left out of the table')
            continue
        rows = [*range(len(classes)), report.ignore_index]
        total = max(1, report.pixels[rows].sum())
        shares = [f'{100 * report.pixels[i] / total:.2f} %' for i in rows]
        table.add_column(f'{split}: pixels', shares, align='r')
        table.add_column('images', [int(report.images[i]) for i in rows], align='r')
    print(table)


def print_problems(name: str, problems: list[Problem], max_errors: int) -> None:
    """Lists problems by kind, at most ``max_errors`` of each."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    for kind, members in kinds.items():
        print(f'\n{name}: {kind} ({len(members)})')
        for problem in members[:max_errors]:
            print(f'  {problem.path}: {problem.detail}')
        if len(members) > max_errors:
            print(f'  ... and {len(members) - max_errors} more (--max-errors {len(members)})')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check the files of a config's data sets")
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--splits', nargs='+', choices=SPLITS, help='default: those that the config has'
    )
    parser.add_argument('--nproc', type=int, default=1, help='number of processes that read')
    parser.add_argument(
        '--max-errors', type=int, default=20, help='listed per kind and split; all are counted'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings, key=value'
    )
    args = parser.parse_args(argv)
    if args.nproc < 1:
        parser.error(f'--nproc is at least 1, but got {args.nproc}')
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options, needs=())
    init_default_scope(cfg.get('default_scope') or 'mmseg')

    splits = args.splits or [s for s in SPLITS if cfg.get(f'{s}_dataloader')]
    if not splits:
        print(
            f'{args.config} has no data to check: expected a dataloader of {", ".join(SPLITS)}, '
            'e.g. train_dataloader=dict(dataset=...); give a whole config, not a base of one',
            file=sys.stderr,
        )
        return 2
    model = cfg.get('model') or {}
    # A single mean is for any number of channels.
    mean = (model.get('data_preprocessor') or {}).get('mean')
    channels = None if mean is None else image_channels(model)
    reports: dict[str, Report] = {}
    seen: dict[str, str] = {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            print(f'{args.config} has no {split}_dataloader', file=sys.stderr)
            return 2
        for key, leaf in leaf_datasets(loader['dataset'], f'{split}_dataloader.dataset'):
            text = repr(sorted(leaf.items(), key=str))
            name = split if key.endswith('_dataloader.dataset') else key
            if text in seen:
                print(f'{name}: the same data set as {seen[text]}')
                continue
            seen[text] = name
            print(f'{name}: {leaf["type"]}')
            reports[name] = check_leaf(leaf, key, args.nproc, channels)

    print()
    if any(report.pairs for report in reports.values()):
        print_table(reports)
    errors = 0
    for name, report in reports.items():
        if report.pixels.any() and report.absent():
            print(f'warning: {name}: never occurs: {", ".join(report.absent())}')
    for name, report in reports.items():
        warned = [problem for problem in report.problems if problem.warning]
        print_problems(f'warning: {name}', warned, args.max_errors)
        wrong = [problem for problem in report.problems if not problem.warning]
        print_problems(name, wrong, args.max_errors)
        errors += len(wrong)
    heads = next(
        (
            check_heads(model, report.classes, report.ignore_index)
            for report in reports.values()
            if report.classes
        ),
        [],
    )
    try:
        check_channels(model)
    except InputError as error:
        heads.append(Problem('config', 'model.data_preprocessor.mean', str(error)))
    print_problems(args.config, heads, args.max_errors)
    errors += len(heads)
    pairs = sum(report.pairs for report in reports.values())
    print(f'\n{pairs} pairs read, {errors} errors')
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
