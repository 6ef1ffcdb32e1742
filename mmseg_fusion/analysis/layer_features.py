"""The features of a layer of a segmentor on whole images: loading, hooks and cells.

The modules that draw the last features share it, such as :mod:`.class_dependency` and
:mod:`.pixel_relation`. Nothing is trained, and no weight is changed.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mmcv.transforms import Compose, LoadAnnotations
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from torch import Tensor, nn

from ..checkpoints import fit, read_checkpoint
from ..errors import InputError
from ..images import FILES, read_sample

Side = Literal['input', 'output']

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
#: Pixels of a label that belong to no class and to no image.
IGNORE = 255


# ------------------------------------------------------------------------------------- the model


def load_segmentor(cfg: Config, checkpoint: str | None, device: str = 'cpu') -> nn.Module:
    """The segmentor of a config with the weights of a checkpoint, in evaluation mode.

    It is stricter than :func:`mmseg.apis.init_model`, which continues with random weights if the
    checkpoint is of another model.

    Args:
        cfg: an MMSegmentation config.
        checkpoint: file or URL; None for the initial weights.
        device: where the model runs.

    Raises:
        InputError: the checkpoint cannot be read, lacks weights that the model has at test time,
            or has them in another shape or not finite; or, without one, the pretrained weights of
            the config cannot be read.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    settings = cfg.model.copy()
    if checkpoint is not None:
        settings.pretrained = None
    model = MODELS.build(settings)
    if checkpoint is None:
        try:
            model.init_weights()
        except OSError as error:
            raise InputError(
                f'the pretrained weights that the config starts from cannot be read ({error}); '
                'give a checkpoint, or --cfg-options model.pretrained=None for random weights '
                '(model.backbone.init_cfg=None where that names them)'
            ) from error
    else:
        fit(model, read_checkpoint(checkpoint), checkpoint)
    return revert_sync_batchnorm(model).to(device).eval()


def last_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the decode head that predicts; the last one of a cascade."""
    head = getattr(model, 'decode_head', None)
    if head is None:
        raise InputError(
            f'{type(model).__name__} has no decode_head; expected an EncoderDecoder or a '
            'CascadeEncoderDecoder'
        )
    if isinstance(head, nn.ModuleList):
        return f'decode_head.{len(head) - 1}', head[-1]
    return 'decode_head', head


def find_layer(model: nn.Module, name: str = 'auto') -> str:
    """Name of a layer of a segmentor.

    Args:
        model: a segmentor.
        name: dotted name of a module; ``'auto'`` for the classifier of the (last) decode head.

    Raises:
        InputError: there is no such module; the message lists near matches.
    """
    names = [n for n, _ in model.named_modules() if n]
    if name == 'auto':
        prefix, head = last_head(model)
        if isinstance(getattr(head, 'conv_seg', None), nn.Module):
            return f'{prefix}.conv_seg'
        near = [n for n in names if n.startswith(prefix) and _outputs(model, n) == _classes(model)]
        listed = f' Layers with that many outputs: {", ".join(near)}.' if near else ''
        raise InputError(
            f"{type(head).__name__} has no classifier 'conv_seg'; name the layer to look at with "
            f'--layer.{listed}'
        )
    if name in names:
        return name
    near = [n for n in names if n.endswith(f'.{name}')]
    near += [n for n in difflib.get_close_matches(name, names, n=5, cutoff=0.4) if n not in near]
    listed = f' Did you mean one of these? {", ".join(near[:5])}' if near else ''
    raise InputError(f'the model has no layer {name!r} (--layer).{listed}')


def _outputs(model: nn.Module, name: str) -> int | None:
    layer = model.get_submodule(name)
    return getattr(layer, 'out_channels', getattr(layer, 'out_features', None))


def _classes(model: nn.Module) -> int:
    return last_head(model)[1].num_classes


@contextlib.contextmanager
def captured(layer: nn.Module, side: Side = 'input') -> Iterator[list[Any]]:
    """Inside of the context, every call of ``layer`` appends its first input or output to the list.

    Args:
        layer: a module.
        side: whether the input or the output is kept.
    """
    kept: list[Any] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        kept.append(output if side == 'output' else next(iter((*args, *kwargs.values())), None))

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


# ------------------------------------------------------------------------- where a pixel is on it


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input: resized, then padded.

    Attributes:
        size: height and width of the image file.
        box: top, left, height and width of the resized image in the network's input.
        input_size: height and width of the network's input.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    input_size: tuple[int, int]

    def _inside(self, axis: int, cells: int) -> np.ndarray:
        """Centres of the cells as shares of the image's height or width."""
        places = (np.arange(cells) + 0.5) * self.input_size[axis] / cells
        return (places - self.box[axis]) / self.box[2 + axis]

    def on_grid(self, label: np.ndarray, grid: Sequence[int], fill: int = IGNORE) -> np.ndarray:
        """The label of each cell of a feature: that of the pixel under the centre of the cell.

        Args:
            label: (h, w), of the whole image, in any resolution.
            grid: height and width of the feature.
            fill: for cells whose centre is in the padding.

        Returns:
            (grid height, grid width).
        """
        index, valid = [], []
        for axis in (0, 1):
            share = self._inside(axis, grid[axis])
            valid.append((share >= 0) & (share < 1))
            places = np.floor(share * label.shape[axis]).astype(np.int64)
            index.append(places.clip(0, label.shape[axis] - 1))
        values = label[np.ix_(*index)]
        return np.where(np.logical_and.outer(*valid), values, fill)

    def cell(self, point: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
        """Row and column of the cell that covers a pixel.

        Args:
            point: x and y of the pixel in the image file.
            grid: height and width of the feature.

        Raises:
            InputError: the pixel is outside the image.
        """
        self.check(point)
        result = []
        for axis, value in enumerate(reversed(list(point))):
            place = self.box[axis] + (value + 0.5) * self.box[2 + axis] / self.size[axis]
            result.append(min(int(place * grid[axis] / self.input_size[axis]), grid[axis] - 1))
        return result[0], result[1]

    def check(self, point: Sequence[int], path: str = '') -> None:
        """Raises :class:`InputError` if a pixel (x, y) is outside the image file."""
        x, y = point
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(
                f'--point {x} {y} is outside the image{path and " " + path} of width {width} and '
                f'height {height}: expected 0 <= X < {width} and 0 <= Y < {height}'
            )


@dataclass
class Observation:
    """A layer on one image.

    Attributes:
        path: of the image.
        image: (h, w, 3), RGB, as the network sees it but for normalization and padding.
        feature: (C, h, w), float32, over the whole network input.
        prediction: (H, W) class ids at the size of the image file; None if not asked for.
        label: (h, w) class ids in the resolution of the data set; None if it has none.
        placement: where the image lies in the network's input.
    """

    path: str
    image: np.ndarray
    feature: Tensor
    prediction: np.ndarray | None
    label: np.ndarray | None
    placement: Placement


@torch.no_grad()
def observe(
    model: nn.Module,
    batch: Mapping[str, Any],
    layer: str = 'auto',
    side: Side = 'input',
    predict: bool = True,
    ignore_index: int = IGNORE,
) -> Observation:
    """Runs a segmentor on one image and keeps the input or output of a layer.

    The image is processed as a whole, whatever ``test_cfg.mode`` is, because windows would have
    separate features. If a layer runs several times, the last call counts.

    Args:
        model: a segmentor in evaluation mode.
        batch: one collated sample of a test pipeline.
        layer: dotted name, ``'auto'`` for the classifier.
        side: whether the feature is the layer's input or output.
        predict: whether to predict as well.
        ignore_index: of the data set; such pixels hold 255 in what is returned.

    Raises:
        InputError: the layer does not run at test time, or its feature is no map.
    """
    name = find_layer(model, layer)
    if not hasattr(model, 'encode_decode'):
        raise InputError(
            f'{type(model).__name__} has no encode_decode; expected an EncoderDecoder or a '
            'CascadeEncoderDecoder'
        )
    if len(batch['inputs']) != 1:
        raise ValueError(f'expected a batch of one image, got {len(batch["inputs"])}')
    # As mmcv reads images.
    image = batch['inputs'][0].cpu().numpy()[::-1].transpose(1, 2, 0)
    data = model.data_preprocessor(batch, False)
    inputs, samples = data['inputs'], data['data_samples']
    meta = samples[0].metainfo
    with captured(model.get_submodule(name), side) as kept:
        logits = model.encode_decode(inputs, [meta])
    if not kept:
        raise InputError(
            f'layer {name!r} does not run when {type(model).__name__} predicts; name another one '
            'with --layer'
        )
    feature = kept[-1]
    if not isinstance(feature, Tensor) or feature.dim() != 4 or len(feature) != 1:
        given = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise InputError(
            f'the {side} of layer {name!r} is no feature map: expected a tensor of shape '
            f'(1, C, H, W), got {given}; name another layer with --layer'
        )
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', [0] * 4))
    height, width = inputs.shape[2:]
    label = None
    if 'gt_sem_seg' in samples[0]:
        label = samples[0].gt_sem_seg.data[0].cpu().numpy().astype(np.int64)
        label[label == ignore_index] = IGNORE
    prediction = None
    if predict:
        predicted = model.postprocess_result(logits, samples)[0].pred_sem_seg.data[0]
        prediction = predicted.cpu().numpy().astype(np.int64)
    return Observation(
        path=str(meta.get('img_path', '')),
        image=np.ascontiguousarray(image),
        feature=feature[0].float(),
        prediction=prediction,
        label=label,
        placement=Placement(
            size=tuple(meta['ori_shape'][:2]),
            box=(top, left, height - top - bottom, width - left - right),
            input_size=(height, width),
        ),
    )


# ------------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class DataInfo:
    """The properties of a config's data set, read from the config alone.

    Attributes:
        classes: names of the classes.
        palette: an RGB colour per class.
        ignore_index: label of the pixels that are not counted.
        label_map: old to new class ids, None if they are the same.
        reduce_zero_label: whether label 0 is none and the others count from 1.
        suffixes: of images and of labels.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]
    ignore_index: int
    label_map: dict[int, int] | None
    reduce_zero_label: bool
    suffixes: tuple[str, str]


def _dataset(cfg: Config, split: str) -> dict:
    loader = cfg.get(f'{split}_dataloader')
    if not loader:
        raise InputError(
            f'{cfg.filename or "the config"} has no {split}_dataloader; add one, or choose '
            'another with --split'
        )
    return loader['dataset']


def _leaf(dataset: dict) -> dict:
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    return dataset


def data_info(cfg: Config, split: str = 'val') -> DataInfo:
    """Classes and label conventions of a config's data set; its files need not exist.

    Args:
        cfg: an MMSegmentation config.
        split: which of its data loaders.

    Raises:
        InputError: there is no such data loader, or the data set has no class names.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    leaf = _leaf(_dataset(cfg, split))
    kind = DATASETS.get(leaf['type']) if isinstance(leaf['type'], str) else leaf['type']
    if kind is None:
        raise InputError(
            f'{split}_dataloader.dataset.type: no data set is registered as {leaf["type"]!r}; '
            'check custom_imports of the config'
        )
    meta = kind._load_metainfo(leaf.get('metainfo'))
    classes = tuple(meta.get('classes') or ())
    if not classes:
        raise InputError(
            f'{kind.__name__} has no class names; set '
            f"{split}_dataloader.dataset.metainfo=dict(classes=('first', 'second', ...))"
        )
    old = dict(zip(kind.METAINFO.get('classes') or (), kind.METAINFO.get('palette') or ()))
    palette = meta.get('palette') or ()
    if len(palette) != len(classes):
        palette = [old.get(name, _colour(i)) for i, name in enumerate(classes)]
    parameters = inspect.signature(kind.__init__).parameters

    def option(name: str, default: Any) -> Any:
        if name in leaf:
            return leaf[name]
        value = parameters[name].default if name in parameters else inspect.Parameter.empty
        return default if value is inspect.Parameter.empty else value

    return DataInfo(
        classes=classes,
        palette=tuple(tuple(int(v) for v in colour) for colour in palette),
        ignore_index=option('ignore_index', IGNORE),
        label_map=kind.get_label_map(list(classes)),
        reduce_zero_label=bool(option('reduce_zero_label', False)),
        suffixes=(option('img_suffix', '.jpg'), option('seg_map_suffix', '.png')),
    )


def _colour(index: int) -> tuple[int, ...]:
    """A colour per number: neighbours differ."""
    from matplotlib.colors import hsv_to_rgb

    hue = index * 0.618034 % 1
    return tuple(int(255 * v) for v in hsv_to_rgb((hue, 0.45 + 0.2 * (index % 3), 0.9)))


class ImageSet(torch.utils.data.Dataset):
    """Images of a config's data set, or image files, through the config's test pipeline.

    Args:
        cfg: an MMSegmentation config.
        split: which of its data loaders.
        images: image files, or folders of them; empty for the data set itself.
        ann_dir: folder of the labels of ``images``.
        num_samples: number of images, evenly spaced over the whole set; None for all.
        indices: numbers of the images instead.
        labels: files of the labels of ``images``, one for each, instead of ``ann_dir``.

    Raises:
        InputError: a file or folder is missing, or a number is out of range.
    """

    def __init__(
        self,
        cfg: Config,
        split: str = 'val',
        images: Sequence[str] = (),
        ann_dir: str | None = None,
        num_samples: int | None = None,
        indices: Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.info = data_info(cfg, split)
        settings = _dataset(cfg, split)
        self._infos: list[dict] = []
        if images:
            files = image_files(images)
            if ann_dir is not None:
                labels = [self._label_of(path, ann_dir) for path in files]
            self._infos = self._of_files(files, labels)
            steps = [TRANSFORMS.build(dict(step)) for step in _leaf(settings).get('pipeline', ())]
            reads = [isinstance(step, LoadAnnotations) for step in steps]
            if labels is None:
                steps = [step for step, annotates in zip(steps, reads) if not annotates]
            elif not any(reads):
                steps.insert(len(steps) - 1, TRANSFORMS.build(dict(type='LoadAnnotations')))
            self._source = Compose(steps)
            total = len(self._infos)
        else:
            try:
                self._source = DATASETS.build(settings)
                total = len(self._source)
            except (FileNotFoundError, AssertionError) as error:
                raise InputError(
                    f'{error}\nThe images of {split}_dataloader are not there; point at them with '
                    f'--cfg-options {split}_dataloader.dataset.data_root=FOLDER, or name images '
                    'with --images'
                ) from error
        if total == 0:
            raise InputError(f'{split}_dataloader.dataset holds no image')
        if indices is not None:
            wrong = [i for i in indices if not 0 <= i < total]
            if wrong:
                raise InputError(
                    f'image {wrong[0]} was asked for, but there are {total}: expected a number '
                    f'from 0 to {total - 1}'
                )
            self.indices = list(indices)
        else:
            count = total if num_samples is None else min(num_samples, total)
            self.indices = [i * total // count for i in range(count)]

    def _label_of(self, path: Path, ann_dir: str) -> str:
        img_suffix, seg_suffix = self.info.suffixes
        stem = path.stem
        if path.name.endswith(img_suffix):
            stem = path.name[: len(path.name) - len(img_suffix)]
        label = Path(ann_dir) / f'{stem}{seg_suffix}'
        if not label.is_file():
            raise InputError(
                f'{path} has no label: {label} is not a file (--ann-dir, and '
                f"seg_map_suffix={seg_suffix!r} of the config's data set)"
            )
        return str(label)

    def _of_files(self, files: list[Path], labels: Sequence[str] | None) -> list[dict]:
        if labels is not None and len(labels) != len(files):
            raise InputError(
                f'--label: expected a label per image, {len(files)}, got {len(labels)}'
            )
        infos = [
            dict(
                img_path=str(path),
                label_map=self.info.label_map,
                reduce_zero_label=self.info.reduce_zero_label,
                seg_fields=[],
            )
            for path in files
        ]
        for info, label in zip(infos, labels or ()):
            info['seg_map_path'] = str(label)
        return infos

    def files(self) -> list[str]:
        """The files of images and labels; empty for a data set that draws its images."""
        infos = [self._info(index) for index in self.indices]
        return [str(info[key]) for info in infos for key in FILES if info.get(key)]

    def _info(self, index: int) -> dict:
        return self._infos[index] if self._infos else self._source.get_data_info(index)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict:
        index = self.indices[item]
        if self._infos:
            return read_sample(self._source, self._infos[index])
        return read_sample(lambda _: self._source[index], self._info(index))


def image_files(images: Sequence[str]) -> list[Path]:
    """Image files, and those in folders, in order.

    Raises:
        InputError: there is no such file or folder, or no image in a folder.
    """
    files: list[Path] = []
    for name in images:
        path = Path(name)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not pictures:
                raise InputError(
                    f'--images {name!r}: the folder holds no image; expected files that end in '
                    f'{", ".join(IMAGE_SUFFIXES)}'
                )
            files += pictures
        else:
            raise InputError(f'--images {name!r} is neither an image file nor a folder')
    return files


def batches(images: ImageSet, num_workers: int = 0) -> torch.utils.data.DataLoader:
    """Collated samples of one image each, since any two may differ in size.

    Args:
        images: the images.
        num_workers: processes that read them.
    """
    from mmengine.dataset import pseudo_collate

    return torch.utils.data.DataLoader(
        images, batch_size=1, num_workers=num_workers, collate_fn=pseudo_collate
    )


def model_names(configs: Sequence[str], checkpoints: Sequence[str]) -> list[str]:
    """Names of models: that of the config, and the checkpoint if needed to distinguish them.

    Args:
        configs: files.
        checkpoints: files, one per config.
    """
    names = [Path(config).stem for config in configs]
    if len(set(names)) < len(names):
        names = [f'{name}, {Path(path).stem}' for name, path in zip(names, checkpoints)]
    if len(set(names)) < len(names):
        names = [f'{name} ({i})' for i, name in enumerate(names, 1)]
    return names


def check_alike(
    names: Sequence[str], infos: Sequence[DataInfo], models: Sequence[nn.Module]
) -> None:
    """Checks that models that are drawn side by side have the same classes.

    Args:
        names: what the models are called.
        infos: of their data.
        models: the segmentors.

    Raises:
        InputError: a head has not as many classes as the data set, or two data sets differ.
    """
    for name, info, model in zip(names, infos, models):
        if _classes(model) != len(info.classes):
            raise InputError(
                f'{name}: model.decode_head.num_classes is {_classes(model)}, but the data set '
                f'has {len(info.classes)} classes'
            )
    for name, info in zip(names, infos):
        if len(info.classes) != len(infos[0].classes):
            raise InputError(
                f'models side by side need the same classes: {names[0]} has '
                f'{len(infos[0].classes)}, {name} has {len(info.classes)} (num_classes)'
            )
        if info.classes != infos[0].classes:
            pair = next((a, b) for a, b in zip(infos[0].classes, info.classes) if a != b)
            raise InputError(
                f'models side by side need the same classes in the same order: where {names[0]} '
                f'has {pair[0]!r}, {name} has {pair[1]!r}'
            )


def check_classes(path: str, label: np.ndarray, num_classes: int) -> None:
    """Checks that the classes of a label are classes of the model.

    Args:
        path: of the image, for the message.
        label: class ids of any shape; 255 is none.
        num_classes: number of classes.

    Raises:
        InputError: another id is below 0, or ``num_classes`` or more.
    """
    wrong = label[(label != IGNORE) & ((label < 0) | (label >= num_classes))]
    if len(wrong):
        raise InputError(
            f'the label of {path} holds class {wrong[0]}, but there are {num_classes} classes; '
            'check num_classes of the head, and reduce_zero_label of the data set'
        )


def check_same_images(names: Sequence[str], sets: Sequence[ImageSet], split: str) -> None:
    """Checks that models that are compared see the same number of images.

    Raises:
        InputError: they do not.
    """
    for name, images in zip(names, sets):
        if len(images) != len(sets[0]):
            raise InputError(
                f'models side by side need the same images: {names[0]} has {len(sets[0])}, {name} '
                f'has {len(images)} in {split}_dataloader'
            )
