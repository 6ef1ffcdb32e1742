"""Attention without residual is tested on images like its crops, or in windows of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from mmseg.registry import MODELS

import mmseg_fusion.models  # noqa: F401
from mmseg_fusion.models.layers.attention import AxialAttention, ChannelizedAxialAttention

from .files import ROOT, TRAINABLE, read

#: Heads whose axial attention has no residual.
HEADS = ('CAAHead', 'HFGDHead')
#: Height to width of a usual image where the short side alone is set.
USUAL = (3, 4)
PAGE = (ROOT / 'docs/methods/hfgd.md').read_text(encoding='utf-8')


def parts(cfg: Any) -> Iterator[dict]:
    """All dicts with a type in a config."""
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield cfg
        for value in cfg.values():
            yield from parts(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from parts(value)


def without_residual(path: str) -> bool:
    for part in parts(read(path).to_dict()['model']):
        if part['type'] == 'HFGDHead' and part.get('axial_attention', True) in (False, None):
            continue
        if part['type'] in HEADS:
            return True
    return False


CONFIGS = [path for path in TRAINABLE if without_residual(path)]


def of_type(pipeline: list[dict], kind: str) -> list[dict]:
    return [step for step in pipeline if step.type == kind]


def test_size(path: str) -> tuple[int, int]:
    """Height and width of a usual image in the test at one scale."""
    cfg = read(path)
    found = of_type(cfg.test_dataloader.dataset.get('pipeline', []), 'Resize')
    if not found:
        if 'coco-stuff' in path:
            # Its images are 640 pixels long; the short side is padded to the crop.
            return cfg.model.data_preprocessor.test_cfg.size[0], 640
        # Made at that size, or not larger than it and padded to it.
        return tuple(cfg.test_dataloader.dataset.get('size', cfg.model.data_preprocessor.size))
    (step,) = found
    assert step.keep_ratio
    height, width = (1, 2) if 'cityscapes' in path else USUAL
    long, short = max(step.scale), min(step.scale)
    factor = min(long / width, short / height)
    return round(height * factor), round(width * factor)


test_size.__test__ = False  # not a test


def tta_scales(path: str) -> list[float]:
    transforms = read(path).tta_pipeline[1].transforms[0]
    return [step.get('scale_factor', step.get('ratio', 1.0)) for step in transforms]


def kind(path: str) -> str:
    """How the page calls the data."""
    names = dict(
        cityscapes='Cityscapes', ade20k='ADE20K', camvid='CamVid', fusion='FusionShapes'
    )  # fmt: skip
    names.update({'pascal-context': 'Pascal Context', 'coco-stuff': 'COCO-Stuff'})
    (name,) = {v for k, v in names.items() if f'_{k}' in path}
    return name


def test_which_heads_have_no_residual() -> None:
    """Those of this package whose module takes one of the axial attentions."""
    axial = {AxialAttention, ChannelizedAxialAttention}
    found = {
        cls.__name__
        for cls in MODELS.module_dict.values()
        if cls.__module__.startswith('mmseg_fusion.models.decode_heads')
        and any(value in axial for value in vars(sys.modules[cls.__module__]).values()
                if isinstance(value, type))
    }  # fmt: skip
    assert found == set(HEADS)
    assert {path.split('/')[1] for path in CONFIGS} >= {'hfgd', 'caa', 'car', 'camvid'}


@pytest.mark.parametrize('path', CONFIGS)
def test_whole_images_are_like_the_crops(path: str) -> None:
    """Or windows are tested that have the crop's size, also with --tta."""
    cfg = read(path)
    crop = tuple(cfg.model.data_preprocessor.size)
    dataset = cfg.train_dataloader.dataset
    for step in of_type(dataset.get('pipeline', []), 'RandomCrop'):
        assert tuple(step.crop_size) == crop
    mode = cfg.model.test_cfg
    if mode.mode == 'slide':
        # What --tta scales is given to the same model.
        assert tuple(mode.crop_size) == crop
        assert all(0 < stride <= side for stride, side in zip(mode.stride, crop))
        return
    largest = max(side / of for side, of in zip(test_size(path), crop))
    said = re.search(
        rf'^\| {kind(path)} \| whole.* \| up to ([\d.]+) \| up to ([\d.]+) \|$', PAGE, re.M
    )
    assert largest <= float(said[1]) < 1.4
    assert largest * max(tta_scales(path)) <= float(said[2])


def test_the_page_says_what_the_configs_do() -> None:
    """Each row of its table is reached by a config, and none is without row."""
    rows = dict(re.findall(r'^\| ([\w -]+) \| (whole|windows)', PAGE, re.M))
    found = {kind(path): read(path).model.test_cfg.mode for path in CONFIGS}
    assert rows == {k: dict(whole='whole', slide='windows')[v] for k, v in found.items()}
    for name, one, several in re.findall(
        r'^\| ([\w -]+) \| whole.* \| up to ([\d.]+) \| up to ([\d.]+) \|$', PAGE, re.M
    ):
        sizes = [
            max(a / b for a, b in zip(test_size(p), read(p).model.data_preprocessor.size))
            for p in CONFIGS
            if kind(p) == name
        ]
        scales = max(s for p in CONFIGS if kind(p) == name for s in tta_scales(p))
        assert max(sizes) == pytest.approx(float(one), abs=0.01)
        assert max(sizes) * scales == pytest.approx(float(several), abs=0.02)
