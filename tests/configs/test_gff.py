"""GFF's configs are the rows of the paper's tables, and differ where the rows do."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from torch import nn

from mmseg_fusion.analysis import count
from mmseg_fusion.models.decode_heads import GFFHead, LinearASPPHead
from mmseg_fusion.models.layers.headless import build_headless
from mmseg_fusion.models.necks import GatedFullyFusion

from .files import BASE, CONFIGS, ROOT, models_of, plain, read, without
from .test_base import RUNS
from .test_eseg import differing
from .test_models import for_a_cpu

FOLDER = 'configs/gff'
CITYSCAPES = '4xb2-100k_cityscapes-864x864'
ADE20K = '4xb4-150k_ade20k-512x512'
PASCAL = '4xb4-150k_pascal-context-59-512x512'
COCO10K = '4xb4-150k_coco-stuff10k-512x512'
VAL, TEST = 'Cityscapes', 'Cityscapes test'
FUSIONS = {'concat': 'concat', 'add': 'add', 'fpn': 'fpn', 'gated-fpn': 'gated_fpn'}
SCALES = [0.75, 1.0, 1.25, 1.5, 1.75]

#: (table, config, data set, metric, the paper's number); a config can be a row of several tables.
ROWS = [
    ('1', f'pspnet_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 78.6),
    ('1', f'pspnet-concat_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 78.8),
    ('1', f'pspnet-add_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 78.7),
    ('1', f'pspnet-fpn_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 79.3),
    ('1', f'pspnet-gated-fpn_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 79.4),
    ('1', f'gff_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 80.4),
    ('2', f'pspnet_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 78.6),
    ('2', f'gff_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 80.4),
    ('2', f'gff-dfp_r101-d8_{CITYSCAPES}', VAL, 'mIoU', 81.2),
    ('2', f'gff-dfp_r101-d8_{CITYSCAPES}', VAL, 'mIoU(ms)', 81.8),
    ('4', f'denseaspp_densenet121-d8_{CITYSCAPES}', VAL, 'mIoU', 78.9),
    ('4', f'gff_densenet121-d8_{CITYSCAPES}', VAL, 'mIoU', 80.1),
    ('4', f'gff-dfp_densenet121-d8_{CITYSCAPES}', VAL, 'mIoU', 80.9),
    ('4', f'pspnet_r18-d8_{CITYSCAPES}', VAL, 'mIoU', 73.0),
    ('4', f'gff_r18-d8_{CITYSCAPES}', VAL, 'mIoU', 76.6),
    ('4', f'gff-dfp_r18-d8_{CITYSCAPES}', VAL, 'mIoU', 78.9),
    ('5', f'gff-dfp_r101-d8_{CITYSCAPES}', TEST, 'mIoU(ms)', 80.9),
    ('5', f'gff-dfp_r101-d8_trainval_{CITYSCAPES}', TEST, 'mIoU(ms)', 82.3),
    ('6', f'gff-dfp_r101-d8_{ADE20K}', 'ADE20K', 'mIoU', 45.33),
    ('6', f'gff-dfp_r101-d8_{ADE20K}', 'ADE20K', 'aAcc', 82.01),
    ('8', f'gff-dfp_wrn38-d8_trainval_{CITYSCAPES}', TEST, 'mIoU(ms)', 83.3),
    ('9', f'gff-dfp_r50-d8_{PASCAL}', 'Pascal Context 59', 'mIoU', 51.0),
    ('9', f'gff-dfp_r101-d8_{PASCAL}', 'Pascal Context 59', 'mIoU', 54.2),
    ('10', f'gff-dfp_r101-d8_{COCO10K}', 'COCO-Stuff 10k', 'mIoU', 39.2),
]
#: The stage before a row of table 8.
WITHOUT_ROW = f'gff-dfp_wrn38-d8_{CITYSCAPES}'
NAMES = sorted({row[1] for row in ROWS} | {WITHOUT_ROW})
METADATA = {m['Name']: m for m in models_of(f'{FOLDER}/metafile.yaml')}
README = (CONFIGS / 'gff/README.md').read_text(encoding='utf-8')
names = pytest.mark.parametrize('name', NAMES)


def content(name: str, folder: str = 'gff') -> dict[str, Any]:
    """What a Runner acts on in a config."""
    return {k: v for k, v in plain(CONFIGS / folder / f'{name}.py').items() if k in RUNS}


def difference(name: str, baseline: str, folder: str = 'gff') -> dict[str, tuple[Any, Any]]:
    """Dotted names of what differs, with the values of ``baseline`` and of ``name``."""

    def value(cfg: Any, key: str) -> Any:
        for part in key.split('.'):
            cfg = None if cfg is None else cfg.get(part)
        return cfg

    ours, theirs = content(name, folder), content(baseline, folder)
    return {key: (value(theirs, key), value(ours, key)) for key in differing(ours, theirs)}


# --- rows ----------------------------------------------------------------------------------------


def test_every_row_has_its_config_and_no_config_is_without_row() -> None:
    assert {p.stem for p in (CONFIGS / 'gff').glob('*.py')} == set(NAMES) == set(METADATA)


def test_metafile_has_the_papers_numbers() -> None:
    expected = {row[1:] for row in ROWS}
    found = set()
    for name, model in METADATA.items():
        results = model.get('Results', [])
        for result in results if isinstance(results, list) else [results]:
            assert result['Source'] == 'paper'
            for metric, number in result['Metrics'].items():
                found.add((name, result['Dataset'], metric, number))
    assert found == expected


def test_readme_has_the_papers_numbers_and_the_counts() -> None:
    rows = re.findall(r'^\|(.*)\[config\]\(\./(\S+)\.py\) \|$', README, re.MULTILINE)
    seen: dict[str, set[float]] = {}
    for line, name in rows:
        cells = [cell.strip() for cell in line.split('|')]
        said = METADATA[name]['Metadata']
        assert f'{said["Parameters"] / 1e6:.2f} M' in cells, name
        assert f'{said["FLOPs"] / 1e9:.2f} G' in cells, name
        assert 'not run' in cells
        numbers = {float(c) for c in cells if re.fullmatch(r'\d\d\.\d+', c)}
        seen.setdefault(name, set()).update(numbers)
    assert seen == {name: {r[4] for r in ROWS if r[1] == name} for name in NAMES}


# --- differences ---------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize('key', FUSIONS)
def test_fusions_differ_in_one_word(key: str) -> None:
    found = difference(f'pspnet-{key}_r101-d8_{CITYSCAPES}', f'gff_r101-d8_{CITYSCAPES}')
    assert found == {'model.decode_head.neck.fusion': ('gff', FUSIONS[key])}


@pytest.mark.parametrize('backbone', ['r101', 'r18', 'densenet121'])
def test_pyramid_differs_in_one_word(backbone: str) -> None:
    names_ = [f'{key}_{backbone}-d8_{CITYSCAPES}' for key in ('gff-dfp', 'gff')]
    assert difference(*names_) == {'model.decode_head.dfp': (None, 'conv')}


@pytest.mark.parametrize(
    ('backbone', 'baseline'),
    [('r101', 'pspnet'), ('r18', 'pspnet'), ('densenet121', 'denseaspp')],
)
def test_fusion_differs_from_the_baseline_in_head_and_start(backbone: str, baseline: str) -> None:
    name, base = (f'{key}_{backbone}-d8_{CITYSCAPES}' for key in ('gff', baseline))
    found = difference(name, base)
    assert {'.'.join(k.split('.')[:2]) for k in found} == {'model.decode_head', 'load_from'}
    # The context is the baseline's head.
    ours, theirs = (content(n)['model']['decode_head'] for n in (name, base))
    for key, value in ours['context'].items():
        assert theirs[key] == value, key
    common = ('num_classes', 'norm_cfg', 'align_corners', 'dropout_ratio', 'loss_decode')
    assert all(ours[key] == theirs[key] for key in common)
    assert ours['in_channels'][-1] == theirs['in_channels']


@pytest.mark.parametrize('backbone', ['r101', 'wrn38'])
def test_trainval_differs_in_data_and_start(backbone: str) -> None:
    trainval, train = (f'gff-dfp_{backbone}-d8{s}_{CITYSCAPES}' for s in ('_trainval', ''))
    parts = {'.'.join(k.split('.')[:2]) for k in difference(trainval, train)}
    parts = {p for p in parts if not p.startswith('test_evaluator')}
    data = {'train_dataloader.dataset', 'test_dataloader.dataset', 'tta_pipeline'}
    assert parts == {*data, 'load_from'}


def test_pascal_context_differs_in_the_backbone() -> None:
    found = difference(f'gff-dfp_r101-d8_{PASCAL}', f'gff-dfp_r50-d8_{PASCAL}')
    assert found == {
        'model.backbone.depth': (50, 101),
        'model.pretrained': ('open-mmlab://resnet50_v1c', 'open-mmlab://resnet101_v1c'),
    }


def test_data_sets_differ_in_data_and_classes() -> None:
    ade, *rest = (f'gff-dfp_r101-d8_{data}' for data in (ADE20K, PASCAL, COCO10K))
    for name in rest:
        parts = {'.'.join(k.split('.')[:3]) for k in difference(name, ade)}
        loaders = {p for p in parts if '_dataloader' in p}
        assert parts - loaders == {
            'model.decode_head.num_classes',
            'model.auxiliary_head.num_classes',
        }
        assert {p.split('.')[1] for p in loaders} == {'dataset'}


# --- recipe --------------------------------------------------------------------------------------


@names
def test_recipe_of_the_paper(name: str) -> None:
    cfg = read(f'{FOLDER}/{name}.py')
    city = 'cityscapes' in name
    crop, steps, batch = ((864, 864), 100000, 8) if city else ((512, 512), 150000, 16)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('SGD', 1e-3, 1e-4)
    (schedule,) = cfg.param_scheduler
    assert (schedule.type, schedule.power, schedule.eta_min) == ('PolyLR', 0.9, 0)
    assert (schedule.begin, schedule.end, cfg.train_cfg.max_iters) == (0, steps, steps)
    # Four processes.
    assert 4 * cfg.train_dataloader.batch_size == batch
    dataset = cfg.train_dataloader.dataset
    for part in dataset.get('datasets', [dataset]):
        steps_ = {step.type: step for step in part.pipeline}
        assert steps_['RandomResize'].ratio_range == (0.75, 2.0)
        assert steps_['RandomCrop'].crop_size == crop
        assert steps_['PhotoMetricDistortion'].brightness_delta == 10
        assert steps_['RandomFlip'].prob == 0.5
    preprocessor = cfg.model.data_preprocessor
    # Zeros behind the normalization, labels ignored.
    assert (preprocessor.size, preprocessor.pad_val, preprocessor.seg_pad_val) == (crop, 0, 255)
    test = cfg.model.test_cfg
    assert (test.mode, test.crop_size, test.stride) == ('slide', crop, (crop[0] * 2 // 3,) * 2)
    assert 'SyncBN' in {head.norm_cfg.type for head in (cfg.model.backbone, cfg.model.decode_head)}


@names
def test_auxiliary_loss_is_on_stage_3_with_weight_04(name: str) -> None:
    model = read(f'{FOLDER}/{name}.py').model
    head = model.get('auxiliary_head')
    if 'wrn38' in name:
        # The authors' model has none.
        assert head is None
        return
    assert (head.type, head.in_index, head.loss_decode.loss_weight) == ('FCNHead', 2, 0.4)
    assert head.num_classes == model.decode_head.num_classes


@names
def test_multi_scale_test_has_the_papers_scales(name: str) -> None:
    scales, *rest = read(f'{FOLDER}/{name}.py').tta_pipeline[1].transforms
    assert [step.scale_factor for step in scales] == SCALES
    assert 'RandomFlip' not in str(rest)


def test_jitter_is_of_brightness_by_ten() -> None:
    steps = read(f'{FOLDER}/{NAMES[0]}.py').train_dataloader.dataset.pipeline
    (step,) = (s for s in steps if s.type == 'PhotoMetricDistortion')
    jitter = TRANSFORMS.build(step)

    def change(colour: tuple[int, int, int]) -> np.ndarray:
        image = np.array([[colour]], np.uint8)
        return jitter(dict(img=image.copy()))['img'].astype(int)[0, 0] - colour

    state = np.random.get_state()
    np.random.seed(0)
    try:
        grey = [change((100, 100, 100)) for _ in range(200)]
        red = [np.abs(change((30, 60, 200))).max() for _ in range(200)]
    finally:
        np.random.set_state(state)
    # A grey pixel has no hue: brightness alone.
    assert all(len(set(d)) == 1 for d in grey)
    shifts = [int(d[0]) for d in grey]
    assert min(shifts) == -10
    assert max(shifts) in (9, 10)
    # About half of the images stay.
    assert 70 < shifts.count(0) < 140
    # Two degrees of hue are 6 of 170 here, and HSV has whole numbers.
    assert max(red) <= 10 + 8


# --- from a baseline -----------------------------------------------------------------------------

STARTED = [name for name in NAMES if read(f'{FOLDER}/{name}.py').load_from]


def test_configs_on_cityscapes_start_from_a_model() -> None:
    first = {n for n in NAMES if n.startswith(('pspnet_', 'denseaspp_'))} | {WITHOUT_ROW}
    assert set(STARTED) == {n for n in NAMES if CITYSCAPES in n} - first


@pytest.mark.parametrize('name', STARTED)
def test_load_from_is_the_last_checkpoint_of_a_config(name: str) -> None:
    folder, before, file = read(f'{FOLDER}/{name}.py').load_from.split('/')
    assert folder == 'work_dirs'
    assert before in NAMES
    expected = f'gff-dfp_{name.split("_")[1]}' if 'trainval' in name else None
    if expected is None:
        kind = 'denseaspp' if 'densenet' in name else 'pspnet'
        expected = f'{kind}_{name.split("_")[1]}'
    assert before == f'{expected}_{CITYSCAPES}'
    cfg = read(f'{FOLDER}/{before}.py')
    steps = cfg.train_cfg.max_iters
    assert file == f'iter_{steps}.pth'
    assert steps % cfg.default_hooks.checkpoint.interval == 0


def on_meta(name: str) -> nn.Module:
    model = for_a_cpu(read(f'{FOLDER}/{name}.py').to_dict()['model'])
    with torch.device('meta'):
        return MODELS.build(Config(dict(model=model)).model)


@pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')
@pytest.mark.parametrize('name', [n for n in STARTED if 'add' not in n and 'fpn' not in n])
def test_the_baselines_weights_fit(name: str) -> None:
    before = read(f'{FOLDER}/{name}.py').load_from.split('/')[1]
    # On shapes alone: other shapes, or parts that are nowhere taken, would stop it.
    found = on_meta(name).load_state_dict(on_meta(before).state_dict(), strict=False)
    assert not found.unexpected_keys
    fresh = {'.'.join(key.split('.')[:2]) for key in found.missing_keys}
    expected = {f'decode_head.{part}' for part in ('neck', 'final', 'conv_seg')}
    expected |= {'decode_head.pyramid'} if 'dfp' in name else set()
    assert fresh == (set() if 'trainval' in name else expected)


# --- counts --------------------------------------------------------------------------------------

#: Table 3: config, FLOPs in G, parameters in M.
COST = [('pspnet', 580.1, 65.6), ('gff', 600.1, 69.7), ('gff-dfp', 625.5, 70.5)]
LEVELS = (256, 512, 1024, 2048)
AREAS = (128**2, 64**2, 64**2, 64**2)


def added(classes: int = 19, width: int = 256, context: int = 512) -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds that GFF, and then DFP, add to PSPNet at 512 x 512."""
    norm = 2 * width
    fine = AREAS[0]
    params = sum(c * width + norm for c in LEVELS)  # reductions
    flops = sum(c * width * a for c, a in zip(LEVELS, AREAS))
    params += sum(c + 1 for c in LEVELS)  # gates, on the levels as they come
    flops += sum(c * a for c, a in zip(LEVELS, AREAS))
    params += 8 * (9 * width**2 + norm)  # two 3x3 convolutions on each level
    flops += 2 * 9 * width**2 * sum(AREAS)
    total = context + 4 * width
    params += total * width + norm  # of the concatenation
    flops += total * width * fine
    params += (width - context) * classes  # classifier
    flops += width * classes * fine - context * classes * AREAS[-1]
    gff = (params, flops)
    seen = [context + i * width for i in range(5)]
    params = sum(c * width + norm for c in seen) + (5 * width - total) * width
    flops = (sum(seen) + 5 * width - total) * width * fine
    return {'gff': gff, 'gff-dfp': (params, flops)}


def test_cost_beside_table_3() -> None:
    counts = {key: count(read(f'{FOLDER}/{key}_r101-d8_{CITYSCAPES}.py'), 512) for key, *_ in COST}
    assert round(counts['pspnet'].params / 1e6, 1) == 65.6
    previous = counts['pspnet']
    for key, more in added().items():
        found = counts[key].params - previous.params, counts[key].flops - previous.flops
        assert found == more, key
        previous = counts[key]
    for key, flops, params in COST:
        row = f'| {params} M | {counts[key].params / 1e6:.2f} M | {flops} G '
        assert f'{row}| {counts[key].flops / 1e9:.2f} G |' in README


def test_what_the_readme_says_of_the_sums() -> None:
    (gff, more), (dfp, dfp_more) = added().values()
    convs = 8 * (9 * 256**2 + 512)
    assert f'+4.1 M reported, +{gff / 1e6:.2f} M here' in README
    assert f'are {convs / 1e6:.2f} M by themselves' in README
    assert convs / 1e6 > 4.1
    assert f'GFF would add {(gff - convs) / 1e6:.2f} M' in README
    assert f'+0.8 M reported, +{dfp / 1e6:.2f} M here' in README
    assert 9 * 512 * 256 / 1e6 > 0.8
    name = f'{FOLDER}/pspnet_r101-d8_{CITYSCAPES}.py'
    base, larger = (count(read(name), side).flops / 1e9 for side in (512, 768))
    assert f'gives {2 * base:.1f} G' in README
    assert f'{580.1 / base:.2f} times our count' in README
    assert f'would have {larger:.1f} G' in README
    assert f'{20 / 580.1 * 100:.1f} % to the paper' in README
    assert f'{more / 1e9 / base * 100:.1f} % to ours' in README
    products = 2 * 9 * 256**2 * sum(AREAS) / 1e9
    assert f'They take {products:.1f} G multiply-adds of the {more / 1e9:.1f} G' in README
    assert products / more * 1e9 == pytest.approx(0.75, abs=0.01)
    # What DFP costs for a parameter beside what GFF costs.
    assert f'+25.4 G reported, +{dfp_more / 1e9:.1f} G multiply-adds here' in README
    assert f'are {2 * 0.8 * AREAS[0] / 1e3:.1f} G operations' in README
    reported = [flops / params for flops, params in ((25.4, 0.8), (20.0, 4.1))]
    assert f'has {reported[0]:.1f} k of it per parameter that DFP adds' in README
    assert f'and {reported[1]:.1f} k per parameter that GFF adds' in README
    assert f'{reported[0] / reported[1]:.1f} times as much' in README
    # Context and levels at their own sizes, the classifier's share as it is.
    seen = [512 + i * 256 for i in range(5)]
    areas = (AREAS[3], AREAS[3], AREAS[2], AREAS[1], AREAS[0])
    own = dfp_more - sum(c * 256 * (AREAS[0] - a) for c, a in zip(seen, areas))
    assert f'would cost {own / dfp / 1e3:.1f} k multiply-adds per parameter here' in README
    assert f'and GFF {more / gff / 1e3:.1f} k' in README


# --- backbones -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['wrn38', 'densenet121', 'r18', 'r101'])
def test_heads_take_the_channels_of_the_levels(name: str) -> None:
    model = on_meta(f'gff-dfp_{name}-d8_{CITYSCAPES}').eval()
    levels = model.backbone(torch.empty(1, 3, 64, 64, device='meta'))
    head = model.decode_head
    assert [levels[i].shape[1] for i in head.in_index] == head.in_channels
    strides = [64 // level.shape[2] for level in levels]
    assert strides == ([2, 8, 8] if name == 'wrn38' else [4, 8, 8, 8])
    assert levels[head.context.in_index].shape[1] == head.context.in_channels
    assert head.context.in_index == len(levels) - 1


def test_wider_resnet_is_the_released_form() -> None:
    head = on_meta(WITHOUT_ROW).decode_head
    neck = head.neck
    assert (neck.channels, neck.update, neck.gate_input) == (128, 'sequential', 'raw')
    assert [gate[0].out_channels for gate in neck.gates] == [128] * 3
    assert not any(len(convs) for convs in neck.refine)
    assert (head.fuse_context, head.pyramid.form) == (True, 'dilated')
    assert head.align_corners
    assert neck.align_corners
    # Counted in the authors' model, whose classifier has no bias.
    own = sum(p.numel() for p in head.parameters())
    own -= sum(p.numel() for p in head.context.parameters())
    assert own == 2_680_704 + 19
    assert [m.dilation[0] for m in head.context.modules() if isinstance(m, nn.Conv2d)] == [
        *(1, 1, 12, 24, 36),  # of the image, 1x1, the rates
        1,
    ]
    # Two convolutions of 256 over a fusion of 128, and nothing behind ASPP's last one.
    assert [m.conv.out_channels for m in head.final] == [256, 256]
    assert head.final[0].conv.in_channels == 4 * 128
    assert isinstance(head.context, LinearASPPHead)


# --- bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        ('cityscapes_864x864_gff', 'cityscapes'),
        ('ade20k_512x512_gff', 'ade20k'),
        ('pascal_context_59_512x512_gff', 'pascal_context_59'),
        ('coco-stuff10k_512x512_gff', 'coco-stuff10k'),
    ],
)
def test_data_differ_in_augmentation_alone(ours: str, theirs: str) -> None:
    expected = plain(BASE / f'datasets/{theirs}.py')
    found = plain(BASE / f'datasets/{ours}.py')
    side = 864 if 'cityscapes' in ours else 512
    train = copy.deepcopy(expected['train_pipeline'])
    for step in train:
        if step['type'] == 'RandomResize':
            step['ratio_range'] = (0.75, 2.0)
        if step['type'] == 'RandomCrop':
            step['crop_size'] = (side, side)
        if step['type'] == 'PhotoMetricDistortion':
            still = dict(contrast_range=(1.0, 1.0), saturation_range=(1.0, 1.0), hue_delta=1)
            step.update(brightness_delta=10, **still)
    assert found['train_pipeline'] == found['train_dataloader']['dataset']['pipeline'] == train
    assert found['crop_size'] == (side, side)
    apart = ('train_pipeline', 'crop_size', 'tta_pipeline', 'img_ratios', 'pipeline')
    assert without(found, *apart) == without(expected, *apart)
    for loader in ('val_dataloader', 'test_dataloader'):
        assert found[loader] == expected[loader]


@pytest.mark.parametrize('steps', [100, 150])
def test_schedule(steps: int) -> None:
    expected = plain(BASE / 'schedules/schedule_40k_wd1e-4.py')
    for optimizer in (expected['optimizer'], expected['optim_wrapper']['optimizer']):
        optimizer['lr'] = 1e-3
    expected['param_scheduler'][0]['end'] = steps * 1000
    expected['train_cfg'].update(max_iters=steps * 1000, val_interval=steps * 100)
    expected['default_hooks']['checkpoint']['interval'] = steps * 100
    assert plain(BASE / f'schedules/schedule_{steps}k_lr1e-3_wd1e-4.py') == expected


def test_model_with_the_pyramid_scheme_of_pspnet() -> None:
    ours = plain(BASE / 'models/gff_r50-d8.py')['model']
    theirs = plain(BASE / 'models/pspnet_r50-d8.py')['model']
    assert {k.split('.')[0] for k in differing(ours, theirs)} == {'decode_head'}


# --- test server ---------------------------------------------------------------------------------


def write_cityscapes(root: Path) -> None:
    """An image of each split, labelled but for that of the server."""
    for split in ('train', 'val', 'test'):
        image = root / f'leftImg8bit/{split}/ulm/{split}_leftImg8bit.png'
        image.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(image)
        if split != 'test':
            label = root / f'gtFine/{split}/ulm/{split}_gtFine_labelTrainIds.png'
            label.parent.mkdir(parents=True)
            Image.fromarray(np.full((32, 64), 3, np.uint8)).save(label)


def test_trainval_reads_both_and_tests_without_labels(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    cfg = read(f'{FOLDER}/gff-dfp_r101-d8_trainval_{CITYSCAPES}.py').copy()
    train, test = (copy.deepcopy(cfg[f'{s}_dataloader'].dataset) for s in ('train', 'test'))
    for part in (*train.datasets, test):
        part.data_root = str(tmp_path)
    joined = DATASETS.build(train)
    found = [joined[i] for i in range(len(joined))]
    assert [Path(x['data_samples'].img_path).stem.split('_')[0] for x in found] == ['train', 'val']
    for x in found:
        # What the image does not fill of a crop is padded by the data preprocessor.
        assert set(x['data_samples'].gt_sem_seg.data.unique().tolist()) == {3}
    (sample,) = DATASETS.build(test)
    assert 'gt_sem_seg' not in sample['data_samples']
    # At the size of Cityscapes' own images.
    assert sample['inputs'].shape == (3, 1024, 2048)
    several = Compose(cfg.tta_pipeline)(dict(img_path=sample['data_samples'].img_path))
    widths = [x.shape[2] for x in several['inputs']]
    assert widths == [int(64 * scale + 0.5) for scale in SCALES]


def test_the_servers_files_are_asked_for() -> None:
    cfg = read(f'{FOLDER}/gff-dfp_r101-d8_trainval_{CITYSCAPES}.py')
    assert cfg.test_evaluator.type == 'CityscapesMetric'
    assert cfg.test_evaluator.format_only
    assert cfg.test_evaluator.keep_results
    assert cfg.test_dataloader.dataset.data_prefix == dict(img_path='leftImg8bit/test')
    # Validation is as ever.
    train = read(f'{FOLDER}/gff-dfp_r101-d8_{CITYSCAPES}.py')
    assert cfg.val_dataloader == train.val_dataloader
    assert cfg.val_evaluator == train.val_evaluator


# --- small pairs ---------------------------------------------------------------------------------

SMALL = [('camvid', '1xb16-4k_camvid-360x480'), ('fusion_shapes', '1xb4-1k_fusion-shapes-128x128')]
small = pytest.mark.parametrize(('folder', 'trained'), SMALL)


@small
def test_small_pairs_differ_in_one_word(folder: str, trained: str) -> None:
    gff = f'gff_r18-d8_{trained}'
    for key, word in FUSIONS.items():
        found = difference(f'pspnet-{key}_r18-d8_{trained}', gff, folder)
        assert found == {'model.decode_head.neck.fusion': ('gff', word)}
    found = difference(f'gff-dfp_r18-d8_{trained}', gff, folder)
    assert found == {'model.decode_head.dfp': (None, 'conv')}
    # One recipe with the baseline, whose head is the context.
    baseline = f'pspnet_r18-d8_{trained}'
    assert {'.'.join(k.split('.')[:2]) for k in difference(gff, baseline, folder)} == {
        'model.decode_head'
    }
    ours, theirs = (content(n, folder)['model']['decode_head'] for n in (gff, baseline))
    assert all(theirs[key] == value for key, value in ours['context'].items())


@small
def test_readmes_of_the_small_pairs_name_them(folder: str, trained: str) -> None:
    text = (ROOT / f'configs/{folder}/README.md').read_text(encoding='utf-8')
    pattern = rf'^\| \[.*?\]\(\./pspnet_r18-d8_{trained}\.py\) \|(.*)$'
    (row,) = re.findall(pattern, text, re.MULTILINE)
    found = re.findall(r'\(\./([\w-]+)_r18-d8_', row)
    assert found == [*(f'pspnet-{key}' for key in FUSIONS), 'gff', 'gff-dfp']


# --- page ----------------------------------------------------------------------------------------

PAGE = (ROOT / 'docs/methods/gff.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('cls', [GFFHead, GatedFullyFusion])
def test_page_has_the_arguments_and_defaults(cls: type) -> None:
    section = PAGE.split(f'`{cls.__name__}`:\n')[1].lstrip('\n').split('\n\n')[0]
    table = dict(re.findall(r'^\| (`.+?`) \| (.+?) \|', section, re.MULTILINE))
    written = {}
    for keys, defaults in table.items():
        values = re.findall(r'`(.+?)`', defaults) or [None]
        written.update(zip(re.findall(r'`(\w+)`', keys), values))
    apart = ('in_channels', 'channels', 'in_index', 'kwargs', 'align_corners', 'conv_cfg',
             'norm_cfg', 'act_cfg', 'init_cfg')  # fmt: skip
    parameters = inspect.signature(cls).parameters
    own = {name: p.default for name, p in parameters.items() if name not in apart}
    context = own.pop('context', None)
    if context is not None:
        assert written.pop('context') is None
        assert table['`context`'] == f"PSPNet's head, {context['channels']} channels"
    assert {k: ast.literal_eval(v) for k, v in written.items()} == own


def examples(text: str) -> list[Config]:
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    return [Config(for_a_cpu(Config.fromstring(b, '.py').to_dict())) for b in blocks]


def test_page_examples_give_logits() -> None:
    head, neck = examples(PAGE)
    (readme,) = examples(README)
    assert readme.model.decode_head.pop('dropout_ratio') == 0.1
    assert readme.model == head.model
    levels = [torch.zeros(1, c, *size, device='meta')
              for c, size in zip(LEVELS, [(17, 20), (9, 10), (9, 10), (9, 10)])]  # fmt: skip
    with torch.device('meta'):
        head.model.decode_head.pop('_delete_')
        neck.model.decode_head.pop('_delete_')
        assert MODELS.build(head.model.decode_head).eval()(levels).shape == (1, 19, 17, 20)
        fused = MODELS.build(neck.model.neck).eval()(levels)
        assert MODELS.build(neck.model.decode_head).eval()(fused).shape == (1, 19, 17, 20)
    assert neck.model.auxiliary_head.in_channels == 256


@pytest.mark.parametrize('kind', ['ASPPHead', 'KSACHead', 'DenseASPPHead'])
def test_contexts_that_the_page_names(kind: str) -> None:
    assert f'`{kind}`' in PAGE
    with torch.device('meta'):
        shared = dict(in_channels=64, in_index=0, channels=16, num_classes=2)
        _, channels = build_headless('', dict(type=kind), **shared)
    assert channels == 16
