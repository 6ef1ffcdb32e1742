"""KSAC's configs have the recipe of the thesis' chapter 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mmseg.registry import TRANSFORMS

from .files import CONFIGS, read

FOLDER = 'configs/ksac'
NAMES = sorted(path.stem for path in (CONFIGS / 'ksac').glob('*.py'))

every_config = pytest.mark.parametrize('name', NAMES)


def pipelines(name: str) -> Iterator[list[dict[str, Any]]]:
    """Those of all training sets of a config."""
    data = read(f'{FOLDER}/{name}.py').train_dataloader.dataset
    for part in data.get('datasets', [data]):
        yield part.pipeline


def sizes(step: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Every size that a transform which chooses one of several scales can make of an image."""
    if step.type == 'RandomChoice':
        choices = [resize for (resize,) in step.transforms]
    else:
        choices = [dict(type='Resize', scale=s, keep_ratio=step.keep_ratio) for s in step.scales]
    image = np.zeros((height, width, 3), np.uint8)
    return [
        TRANSFORMS.build(dict(c))(dict(img=image, img_shape=(height, width)))['img'].shape[:2]
        for c in choices
    ]


# Height and width of an image, and what its scales are relative to.
IMAGES = {
    'voc12aug': ((375, 500), (375, 500)),
    'voc12': ((375, 500), (375, 500)),
    'ade20k': ((768, 1024), (512, 683)),
    'cityscapes': ((1024, 2048), (1024, 2048)),
}


@every_config
def test_augmentation_of_section_2_3_1_5(name: str) -> None:
    """Scales from 0.5 to 2 in steps of 0.25, crop, flip; nothing else."""
    dataset, crop = name.rsplit('_', 1)[1].rsplit('-', 1)
    (height, width), (base_height, base_width) = IMAGES[dataset]
    size = tuple(map(int, crop.split('x')))
    for pipeline in pipelines(name):
        load, labels, scale, cut, flip, pack = pipeline
        kinds = [step.type for step in (load, labels, cut, flip, pack)]
        assert kinds == [
            'LoadImageFromFile', 'LoadAnnotations', 'RandomCrop', 'RandomFlip', 'PackSegInputs'
        ]  # fmt: skip
        found = sizes(scale, height, width)
        factors = np.arange(0.5, 2.01, 0.25)
        expected = np.outer(factors, [base_height, base_width])
        # A pixel is whole, and mmcv keeps the ratio of the sides.
        assert np.abs(np.array(found) - expected).max() <= 1.5
        assert (size, flip.prob) == (tuple(cut.crop_size), 0.5)
        assert size == ((769, 769) if dataset == 'cityscapes' else (513, 513))
        # 1: no crop is drawn again for what is in it.
        assert TRANSFORMS.build(dict(cut)).cat_max_ratio == 1.0
    # What a crop lacks is padded: the mean colour and a label that is ignored.
    preprocessor = read(f'{FOLDER}/{name}.py').model.data_preprocessor
    assert tuple(preprocessor.size) == size
    assert (preprocessor.pad_val, preprocessor.seg_pad_val) == (0, 255)


def test_cityscapes_is_tested_at_1025_x_2049() -> None:
    found = [name for name in NAMES if 'cityscapes' in name]
    assert len(found) == 2
    for name in found:
        cfg = read(f'{FOLDER}/{name}.py')
        _, resize, _, _ = cfg.test_dataloader.dataset.pipeline
        image = dict(img=np.zeros((1024, 2048, 3), np.uint8), img_shape=(1024, 2048))
        assert TRANSFORMS.build(dict(resize))(image)['img'].shape[:2] == (1025, 2049)
        assert cfg.model.test_cfg.mode == 'whole'
