"""KSAC's configs are the rows of the thesis' tables 2.1 to 2.3, with the recipe of chapter 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mmseg.registry import TRANSFORMS

from .files import CONFIGS, ROOT, models_of, read

FOLDER = 'configs/ksac'
NAMES = sorted(path.stem for path in (CONFIGS / 'ksac').glob('*.py'))

README = (ROOT / FOLDER / 'README.md').read_text(encoding='utf-8')
METADATA = {model['Name']: model for model in models_of(f'{FOLDER}/metafile.yaml')}

VOC_AUG, VOC = '4xb4-40k_voc12aug-513x513', '4xb4-30k_voc12-513x513'
MOBILE = VOC.replace('4xb4', '4xb8')
ADE = '4xb4-160k_ade20k-513x513'
#: Config, the thesis' mIoU at one scale, with several scales and flip, its G of multiply-adds.
ROWS = [
    (f'fcn_r50-d16_{VOC_AUG}', 70.99, None, 39.94),
    (f'deeplabv3_r50-d16_{VOC_AUG}', 74.91, None, 57.37),
    (f'ksac_r50-d16_{VOC_AUG}', 76.23, None, 54.63),
    (f'deeplabv3_r101-d16_{VOC_AUG}', 77.20, None, 76.61),
    (f'deeplabv3_r101-d8_{VOC_AUG}', 78.51, 79.77, 257.74),
    (f'deeplabv3plus_r101-d8_{VOC_AUG}', 79.35, None, 277.99),
    (f'ksac_r101-d16_{VOC_AUG}', 77.77, 79.63, 73.87),
    (f'ksac_r101-d8_{VOC_AUG}', 78.78, 80.10, 245.09),
    (f'ksac_r101-d8_decoder_{VOC_AUG}', 79.70, None, 265.34),
    (f'deeplabv3plus_xception65-d16_{VOC_AUG}', 79.79, None, 83.50),
    (f'deeplabv3plus_xception65-d16_{VOC}', 82.20, 83.34, 83.50),
    (f'deeplabv3plus_xception65-d8_{VOC}', 82.45, 83.58, 244.54),
    (f'ksac_xception65-d16_decoder_{VOC_AUG}', 80.22, None, 80.77),
    (f'ksac_xception65-d16_decoder_{VOC}', 83.92, 85.96, 80.77),
    (f'ksac_xception65-d8_decoder_{VOC}', 84.13, 86.09, 231.89),
    (f'deeplabv3_m-v2-d16_{MOBILE}', 75.70, None, None),
    (f'ksac_m-v2-d16_{MOBILE}', 76.30, None, None),
    # Table 2.2, whose first two rows are table 2.1's.
    (f'ksac_xception65-d16_decoder-5-rates_{VOC}', 84.50, 87.01, None),
    # Section 2.4.5.
    (f'ksac_xception65-d16_decoder_{ADE}', 43.20, 45.47, None),
]

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
    'coco-voc12aug': ((375, 500), (375, 500)),
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


# --- rows ----------------------------------------------------------------------------------------


def test_readme_and_metafile_have_the_theses_numbers() -> None:
    expected = {name: numbers for name, *numbers in ROWS}
    found = {}
    for name, model in METADATA.items():
        results = model.get('Results', [])
        for result in results if isinstance(results, list) else [results]:
            if not result['Dataset'].endswith('test'):
                found[name] = [result['Metrics'].get(k) for k in ('mIoU', 'mIoU(ms+flip)')]
    assert found == {name: numbers[:2] for name, numbers in expected.items()}

    written = {}
    for line, name in re.findall(r'^\|(.*)\]\(\./(\S+)\.py\) \|$', README, re.MULTILINE):
        cells = [cell.strip() for cell in line.split('|')]
        said = METADATA[name]['Metadata']
        assert f'{said["Parameters"] / 1e6:.2f} M' in cells, name
        assert f'{said["FLOPs"] / 1e9:.2f} G' in cells, name
        i = cells.index('not run')
        numbers = [None if cell == '-' else float(cell) for cell in cells[i - 2 : i]]
        # The tables on VOC have the thesis' multiply-adds as well.
        flops = re.fullmatch(r'([\d.]+) G', cells[i + 1]) if 'voc12' in name else None
        written[name] = [*numbers, float(flops.group(1)) if flops else None]
    assert {n: w for n, w in written.items() if w != [None] * 3} == expected


def test_the_test_set_of_table_2_3() -> None:
    of_test = [
        (name, result['Dataset'], result['Metrics'])
        for name, model in METADATA.items()
        if isinstance(model.get('Results'), list)
        for result in model['Results']
        if result['Dataset'].endswith('test')
    ]
    name = f'ksac_xception65-d16_decoder-5-rates_{VOC}'
    assert of_test == [(name, 'Pascal VOC 2012 test', {'mIoU': 88.1})]
    assert "88.1 mIoU on VOC's test set" in README


# --- stages --------------------------------------------------------------------------------------

FIRST = [name for name in NAMES if name.endswith('300k_coco-voc12aug-513x513')]


def stages(first: str) -> list[str]:
    model, batch = re.fullmatch(r'(.+)_(4xb\d)-300k_coco-voc12aug-513x513', first).groups()
    return [
        first,
        f'{model}_coco_{batch}-40k_voc12aug-513x513',
        f'{model}_{batch}-30k_voc12-513x513',
    ]


def test_every_row_with_coco_has_three_stages() -> None:
    last = {name for name, *_ in ROWS if '_voc12-' in name}
    assert {stages(first)[2] for first in FIRST} == last
    assert len(FIRST) == 7


@pytest.mark.parametrize('first', FIRST)
def test_stages_of_section_2_3_2(first: str) -> None:
    names = stages(first)
    cfgs = [read(f'{FOLDER}/{name}.py') for name in names]
    assert [cfg.optim_wrapper.optimizer.lr for cfg in cfgs] == [1e-3, 4e-4, 2e-4]
    # The last is chosen.
    assert [cfg.train_cfg.max_iters for cfg in cfgs] == [300_000, 40_000, 30_000]
    images = 32 if '_m-v2-' in first else 16
    assert {4 * cfg.train_dataloader.batch_size for cfg in cfgs} == {images}
    assert {cfg.optim_wrapper.optimizer.type for cfg in cfgs} == {'SGD'}
    # One model, and each from the one before.
    assert all(cfg.model == cfgs[0].model for cfg in cfgs)
    assert [cfg.load_from for cfg in cfgs] == [
        None,
        f'work_dirs/{names[0]}/iter_300000.pth',
        f'work_dirs/{names[1]}/iter_40000.pth',
    ]
    coco, sbd, voc = (cfg.train_dataloader.dataset for cfg in cfgs)
    assert coco.datasets[1:] == sbd.datasets
    assert sbd.datasets[0] == voc
    extra = coco.datasets[0]
    assert (extra.type, extra.pipeline) == (voc.type, voc.pipeline)
    assert all(cfg.val_dataloader == cfgs[0].val_dataloader for cfg in cfgs)


def test_coco_is_read_from_where_the_converter_is_told_to_write() -> None:
    data = read(f'{FOLDER}/{FIRST[0]}.py').train_dataloader.dataset.datasets[0]
    root = data.data_root
    for page in (README, (ROOT / 'docs/data.md').read_text(encoding='utf-8')):
        command = re.search(r'coco_voc\.py (\S+) \\\n\s+(\S+) (\S+)\n', page)
        _, images, out = command.groups()
        assert images == f'{root}/{data.data_prefix.img_path}'
        assert out == f'{root}/{data.data_prefix.seg_map_path}'
        assert f'{out}/images.txt' == f'{root}/{data.ann_file}'


# --- recipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [n for n in NAMES if 'ade20k' in n])
def test_ade20k_of_section_2_3_2(name: str) -> None:
    cfg = read(f'{FOLDER}/{name}.py')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum) == ('SGD', 2e-3, 0.9)
    (schedule,) = cfg.param_scheduler
    assert (schedule.type, schedule.gamma) == ('MultiStepLR', 0.5)
    assert schedule.milestones == list(range(30_000, cfg.train_cfg.max_iters, 30_000))
    assert cfg.load_from is None
