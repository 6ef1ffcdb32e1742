"""Labels a folder of images with the predictions of a trained model, for self-training.

    python tools/pseudo_labels.py CONFIG CHECKPOINT IMAGES OUT

``IMAGES/a/b.jpg`` gets ``OUT/a/b.png``, with the train id of the predicted class where the model is
confident (``--threshold``) and 255, which losses ignore, elsewhere. A second run continues where
the first one stopped. ``OUT/pseudo_labels.json`` records how many pixels of each class were kept,
and ``OUT/images.jpg.txt`` lists the images with at least one kept pixel (``ann_file`` of a data
set).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    check_checkpoint,
    exits_on_input_error,
    model_files,
    read_config,
)

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.fileio import list_dir_or_file
from mmengine.logging import MMLogger
from mmengine.utils import track_iter_progress
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from prettytable import PrettyTable
from torch import Tensor, nn

from mmseg_fusion.analysis.layer_features import (
    IGNORE,
    IMAGE_SUFFIXES,
    InputError,
    data_info,
    last_head,
    load_segmentor,
)
from mmseg_fusion.images import read_sample

SUMMARY = 'pseudo_labels.json'
#: Every label carries how it was made under this key of its PNG file.
KEY = 'mmseg_fusion pseudo label'
Scores = Literal['softmax', 'sigmoid', 'binary']


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='any MMSegmentation config')
    parser.add_argument('checkpoint', help='the weights that predict')
    parser.add_argument('images', type=Path, help='folder, with all folders in it')
    parser.add_argument('out', type=Path, help='folder for the labels; not in IMAGES')
    parser.add_argument(
        '--threshold',
        type=float,
        default=0.5,
        help='probability of the predicted class from which on a pixel is kept; default: 0.5',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="mean probabilities over the config's tta_pipeline (scales, flips)",
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='make labels again that are in OUT already, and replace lists and summary that this '
        'tool did not write',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        parser.error(f'--threshold is a probability from 0 to 1, got {args.threshold}')
    return args


# ------------------------------------------------------------------------------ images and labels


def find_images(images: Path, out: Path) -> dict[str, str]:
    """Paths of all images, relative to their folder, and of their labels, relative to ``out``.

    Args:
        images: folder, searched as :class:`mmseg.datasets.BaseSegDataset` searches it.
        out: folder of the labels.

    Raises:
        InputError: there is no image, two would have the same label, or one folder is in the other.
    """
    if not images.is_dir():
        what = 'is a file; give the folder of the images' if images.exists() else 'is no folder'
        raise InputError(f'IMAGES {str(images)!r} {what} (looked in {os.getcwd()})')
    inner, outer = out.resolve(), images.resolve()
    if inner == outer or outer in inner.parents:
        raise InputError(
            f'OUT {str(out)!r} is in IMAGES {str(images)!r}, where labels would be taken for '
            'images; choose a folder beside it'
        )
    if inner in outer.parents:
        raise InputError(
            f'IMAGES {str(images)!r} is in OUT {str(out)!r}, where a label may have the name of an '
            f'image; choose another folder, as {str(out / "pseudo_labels")!r}'
        )
    if out.exists() and not out.is_dir():
        raise InputError(f'OUT {str(out)!r} is a file; give the folder to write the labels to')
    files = sorted(
        Path(name).as_posix()
        for name in list_dir_or_file(str(images), list_dir=False, recursive=True)
        if name.lower().endswith(IMAGE_SUFFIXES)
    )
    if not files:
        raise InputError(
            f'no images in {str(images)!r} and the folders in it: expected files that end in '
            f'{", ".join(IMAGE_SUFFIXES)}'
        )
    labels = {name: str(Path(name).with_suffix('.png').as_posix()) for name in files}
    first: dict[str, str] = {}
    for name, label in labels.items():
        if label in first:
            raise InputError(
                f'{first[label]} and {name} would both have the label {label}; rename one of them, '
                'or give each kind of image a folder of its own'
            )
        first[label] = name
    return labels


@dataclass
class Made:
    """How a label was made, and its numbers of pixels; stored in the file of the label.

    Attributes:
        settings: the settings that all labels of one set share.
        predicted: pixels per class before the threshold.
        kept: pixels per class in the label.
    """

    settings: dict
    predicted: list[int]
    kept: list[int]

    @classmethod
    def read(cls, path: Path) -> Made | None:
        """Of a label that is there; None where no whole image is.

        Raises:
            InputError: it is an image that this tool did not write.
        """
        try:
            with Image.open(path) as image:
                text = image.info.get(KEY)
                if text is not None:
                    # The text stands before the pixels: a file that was cut off has it as well.
                    image.load()
        except UnidentifiedImageError:
            text = None
        except (OSError, SyntaxError):
            return None
        if text is None:
            raise InputError(
                f'{path} was not written by this tool and is left alone; choose another OUT'
            )
        return cls(**json.loads(text))


def write_label(outputs: Outputs, path: Path, label: np.ndarray, made: Made) -> None:
    """Writes an 8-bit greyscale PNG.

    Args:
        outputs: what this run writes.
        path: where to.
        label: (H, W), uint8, train ids and 255.
        made: kept beside the pixels.
    """
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps(vars(made)))
    with outputs.file(path) as file:
        Image.fromarray(label).save(file, format='PNG', pnginfo=text)


# ------------------------------------------------------------------------------------ the model


def kind_of_scores(head: nn.Module) -> Scores:
    """The function that makes probabilities of a head's outputs, as in its losses.

    Raises:
        InputError: the head has no ``loss_decode`` to tell.
    """
    if getattr(head, 'out_channels', None) == 1:
        return 'binary'
    losses = getattr(head, 'loss_decode', None)
    if losses is None:
        raise InputError(
            f'{type(head).__name__} has no loss_decode, so that nothing tells whether its outputs '
            'become probabilities through a softmax or a sigmoid; expected a BaseDecodeHead that '
            'is trained pixel by pixel (model.decode_head)'
        )
    losses = list(losses) if isinstance(losses, nn.ModuleList) else [losses]
    # One loss with a softmax is enough for the classes to compete.
    every = all(getattr(loss, 'use_sigmoid', False) for loss in losses)
    return 'sigmoid' if every else 'softmax'


def pipeline_of(cfg: Config, tta: bool) -> list[dict]:
    """The pipeline that makes inputs of an image file, without its annotation.

    Raises:
        InputError: the config has no such pipeline.
    """
    key = 'tta_pipeline' if tta else 'test_pipeline'
    steps = cfg.get(key)
    if not steps:
        hint = ', with a TestTimeAug in it, or leave --tta out' if tta else ''
        raise InputError(f'the config has no {key}; add one{hint}')

    def annotates(step: dict) -> bool:
        name = getattr(step['type'], '__name__', step['type'])
        return name.rpartition('.')[2] == 'LoadAnnotations'

    kept = []
    for step in (dict(step) for step in steps if not annotates(step)):
        if 'transforms' in step:  # TestTimeAug: lists of alternatives
            choices = [[t for t in some if not annotates(t)] for some in step['transforms']]
            step['transforms'] = [some for some in choices if some]
        kept.append(step)
    return kept


@dataclass
class Labeller:
    """Predicts one image at a time, at its own size.

    Attributes:
        model: a segmentor in evaluation mode.
        load: the pipeline, from ``dict(img_path=...)``.
        scores: how its outputs become probabilities.
        num_classes: of the labels.
        threshold: probability of the predicted class from which on a pixel is kept.
        cut: probability above which a binary head says class 1.
    """

    model: nn.Module
    load: Compose
    scores: Scores
    num_classes: int
    threshold: float
    cut: float | None = None

    @torch.no_grad()
    def probabilities(self, data: dict) -> Tensor:
        """Mean probabilities over the views of an image.

        Returns:
            (C, H, W) at the size of the image file; C is 1 for a binary head.
        """
        inputs, samples = data['inputs'], data['data_samples']
        if isinstance(inputs, Tensor):
            inputs, samples = [inputs], [samples]
        total = None
        for view, sample in zip(inputs, samples):
            result = self.model.test_step(dict(inputs=[view], data_samples=[sample]))[0]
            scores = result.seg_logits.data.float()
            # Of a binary head mmseg returns probabilities already.
            if self.scores != 'binary':
                scores = scores.softmax(0) if self.scores == 'softmax' else scores.sigmoid()
            total = scores if total is None else total.add_(scores)
        return total.div_(len(inputs))

    def label(self, data: dict) -> tuple[np.ndarray, np.ndarray]:
        """What is predicted and how much of it is kept.

        Returns:
            The label, (H, W), uint8, and the prediction before the threshold, in the same form.

        Raises:
            FloatingPointError: the model's outputs are not finite.
        """
        scores = self.probabilities(data)
        if not scores.isfinite().all():
            raise FloatingPointError('the model predicts numbers that are not finite')
        if self.scores == 'binary':
            predicted = scores[0] > self.cut
            confidence = torch.where(predicted, scores[0], 1 - scores[0])
        else:
            confidence, predicted = scores.max(0)
        predicted = predicted.byte()
        label = predicted.masked_fill(confidence < self.threshold, IGNORE)
        return label.cpu().numpy(), predicted.cpu().numpy()


def labeller_of(cfg: Config, checkpoint: str, tta: bool, threshold: float, device: str) -> Labeller:
    """Loads the model and its pipeline.

    Raises:
        InputError: the checkpoint is another model's, the head has more classes than a label can
            hold, or its outputs cannot be told to be probabilities.
    """
    steps = pipeline_of(cfg, tta)
    model = load_segmentor(cfg, checkpoint, device)
    name, head = last_head(model)
    scores = kind_of_scores(head)
    num_classes = max(2, head.num_classes) if scores == 'binary' else head.num_classes
    if num_classes > IGNORE:
        raise InputError(
            f'{name} has {num_classes} classes; an 8-bit label holds at most {IGNORE} (0 to '
            f'{IGNORE - 1}) beside {IGNORE}, which is ignored'
        )
    cut = head.threshold if scores == 'binary' else None
    return Labeller(model, Compose(steps), scores, num_classes, threshold, cut)


def settings_of(args: argparse.Namespace, cfg: Config) -> dict:
    """The settings that labels of one set share; files count by their content, not their path."""
    if '://' in args.checkpoint:
        checkpoint = args.checkpoint
    else:
        digest = hashlib.sha256()
        with open(args.checkpoint, 'rb') as file:
            for block in iter(lambda: file.read(1 << 20), b''):
                digest.update(block)
        checkpoint = digest.hexdigest()[:16]
    model = repr((cfg.model.to_dict(), pipeline_of(cfg, args.tta)))
    return dict(
        checkpoint=checkpoint,
        model=hashlib.sha256(model.encode()).hexdigest()[:16],
        threshold=args.threshold,
        tta=args.tta,
    )


def class_names(cfg: Config, num_classes: int) -> list[str]:
    """Names from a data set of the config that has as many classes."""
    for split in ('test', 'val', 'train'):
        with contextlib.suppress(InputError):
            names = data_info(cfg, split).classes
            if len(names) == num_classes:
                return list(names)
    return [f'class {i}' for i in range(num_classes)]


# -------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """The record of one run of the tool.

    Attributes:
        outputs: the lists and the summary.
        labels: what it writes of labels; each says itself whether this tool made it.
        made: by image, for every label that is there now.
        written: how many of them this run wrote.
        problems: by image, why it has no label.
    """

    outputs: Outputs = field(default_factory=lambda: Outputs('pseudo_labels'))
    labels: Outputs = field(default_factory=lambda: Outputs('pseudo_labels', overwrite=True))
    made: dict[str, Made] = field(default_factory=dict)
    written: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def labels_there(labels: dict[str, str], out: Path, settings: dict, overwrite: bool) -> dict:
    """The labels that need not be made again.

    Raises:
        InputError: some were made by another model or with another threshold.
    """
    there: dict[str, Made] = {}
    for name, label in labels.items():
        made = Made.read(out / label) if (out / label).exists() else None
        if made is None or overwrite:
            continue
        if made.settings != settings:
            changes = ', '.join(
                f'{key} {made.settings.get(key)}, now {settings[key]}'
                for key in settings
                if made.settings.get(key) != settings[key]
            )
            raise InputError(
                f'{out / label} was made otherwise ({changes}); choose another OUT, or --overwrite '
                'to make every label again'
            )
        there[name] = made
    return there


def label_folder(
    labeller: Labeller, images: Path, out: Path, labels: dict[str, str], settings: dict, run: Run
) -> None:
    """Writes the labels that are missing; one image that fails does not end the run.

    Raises:
        RuntimeError: the model fails before it has predicted any image.
    """
    missing = [name for name in labels if name not in run.made]
    if not missing:
        return
    for name in track_iter_progress(missing):
        try:
            data = read_sample(labeller.load, dict(img_path=str(images / name)))
        except InputError as error:
            run.problems[name] = str(error).removeprefix(f'{images / name}: ')
            continue
        try:
            label, predicted = labeller.label(data)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            run.problems[name] = (
                'does not fit into the memory of the GPU; try --device cpu, or windows: '
                '--cfg-options model.test_cfg.mode=slide with crop_size and stride'
            )
            continue
        except FloatingPointError as error:
            run.problems[name] = str(error)
            continue
        except (RuntimeError, ValueError) as error:
            # A model that predicts no image at all is not the fault of one of them.
            if not run.written:
                raise RuntimeError(f'{images / name} cannot be predicted, see above') from error
            run.problems[name] = f'cannot be predicted ({type(error).__name__}: {error})'
            continue
        counts = [
            np.bincount(a.ravel(), minlength=IGNORE + 1)[: labeller.num_classes].tolist()
            for a in (predicted, label)
        ]
        made = Made(settings, *counts)
        write_label(run.labels, out / labels[name], label, made)
        run.made[name] = made
        run.written += 1
    print()


def list_name(suffix: str) -> str:
    """Of the list of images with a suffix."""
    return f'images{suffix}.txt'


def write_lists(outputs: Outputs, out: Path, made: dict[str, Made]) -> dict[str, str]:
    """Writes the images whose labels hold any class, as ``ann_file`` of a data set takes them.

    Returns:
        The files by the suffix of their images, since a data set reads images of one suffix.
    """
    lines: dict[str, list[str]] = {}
    for name, label in sorted(made.items()):
        stem, dot, suffix = name.rpartition('.')
        names = lines.setdefault(dot + suffix, [])
        if any(label.kept):
            names.append(stem)
    files = {}
    for suffix, names in lines.items():
        path = out / list_name(suffix)
        if not names:  # of which no data set can be built
            outputs.remove(path)
            continue
        files[suffix] = path.name
        outputs.write(path, ''.join(f'{name}\n' for name in names))
    return files


def class_rows(names: Sequence[str], made: dict[str, Made]) -> list[dict]:
    """Per class: pixels predicted and kept, over all labels that are there."""
    zeros = np.zeros(len(names), np.int64)
    predicted = sum((np.array(m.predicted) for m in made.values()), zeros)
    kept = sum((np.array(m.kept) for m in made.values()), zeros)
    return [
        dict(
            id=i,
            name=name,
            predicted=int(predicted[i]),
            kept=int(kept[i]),
            kept_share=float(kept[i] / predicted[i]) if predicted[i] else None,
        )
        for i, name in enumerate(names)
    ]


def print_table(rows: list[dict], threshold: float) -> None:
    pixels = sum(row['predicted'] for row in rows)
    kept = sum(row['kept'] for row in rows)
    if not pixels:
        return
    table = PrettyTable(['id', 'class', 'predicted', 'of it kept', 'of all kept'])
    table.align['class'] = 'l'
    for row in rows:
        share = row['kept_share']
        table.add_row(
            [
                row['id'],
                row['name'],
                f'{row["predicted"] / pixels:.2%}',
                '-' if share is None else f'{share:.2%}',
                f'{row["kept"] / kept:.2%}' if kept else '-',
            ]
        )
    print(table)
    print(f'{kept / pixels:.2%} of {pixels} pixels kept: probability at least {threshold:g}')


@exits_on_input_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options, ['model.decode_head'])
    check_checkpoint(args.checkpoint)
    MMLogger.get_instance('pseudo_labels', log_level='WARNING')
    labels = find_images(args.images, args.out)
    inputs = [
        *model_files([args.config, args.checkpoint]),
        *(args.images / name for name in labels),
    ]
    run = Run(
        Outputs('pseudo_labels', inputs, args.overwrite),
        # Whose label is there is known from the label itself: another's was refused by then.
        Outputs('pseudo_labels', inputs, overwrite=True),
    )
    suffixes = sorted({Path(name).suffix for name in labels})
    run.outputs.check(args.out / SUMMARY, *(args.out / list_name(s) for s in suffixes))
    run.labels.check(*(args.out / label for label in labels.values()))
    settings = settings_of(args, cfg)
    # Asked before the model is loaded: what is wrong with OUT is said at once.
    run.made = labels_there(labels, args.out, settings, args.overwrite)
    labeller = labeller_of(cfg, args.checkpoint, args.tta, args.threshold, args.device)
    there = len(run.made)
    if there:
        print(f'{there} of {len(labels)} labels are there already')
    label_folder(labeller, args.images, args.out, labels, settings, run)

    rows = class_rows(class_names(cfg, labeller.num_classes), run.made)
    empty = sorted(name for name, made in run.made.items() if not any(made.kept))
    files = write_lists(run.outputs, args.out, run.made)
    summary = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        settings=settings,
        ignore_index=IGNORE,
        images=len(labels),
        written=run.written,
        there_before=there,
        pixels=sum(row['predicted'] for row in rows),
        kept=sum(row['kept'] for row in rows),
        classes=rows,
        lists=files,
        without_any_class=empty,
        problems=run.problems,
    )
    run.outputs.write(args.out / SUMMARY, json.dumps(summary, indent=1) + '\n')
    print_table(rows, args.threshold)
    if empty:
        print(f'{len(empty)} labels hold no class and are in no list')
    if run.made and not files:
        print('nothing to train on: lower --threshold, or train the model further')
    for suffix, name in files.items():
        print(f'{args.out / name}: ann_file of a data set with img_suffix={suffix!r}')
    print(f'{run.written} labels written to {args.out}, {args.out / SUMMARY}')
    if run.problems:
        print(f'{len(run.problems)} images without a label:', file=sys.stderr)
        for name, problem in run.problems.items():
            print(f'  {args.images / name}: {problem}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
