"""ESeg's configs are the published rows, count as published, and differ where they say."""

from __future__ import annotations

import ast
import copy
import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmseg.registry import DATASETS, MODELS, TASK_UTILS
from PIL import Image
from torch import nn

from mmseg_fusion.analysis import count
from mmseg_fusion.models.backbones import ScaledEfficientNet
from mmseg_fusion.models.necks import BiFPN
from mmseg_fusion.models.necks.bifpn import BATCH_NORM

from .files import BASE, CONFIGS, ROOT, models_of, plain, read, without
from .test_base import RUNS
from .test_models import for_a_cpu

FOLDER = 'configs/eseg'
CITYSCAPES = '4xb4-90k_cityscapes-1024x2048'
ADE20K = '4xb4-80k_ade20k-512x512'
SHAPE = (1024, 2048)

#: Table 3 of the slides: width, depth, channels, repeats.
SIZES = {
    'lite-s': (0.4, 0.6, 64, 1),
    'lite-m': (0.6, 1.0, 80, 2),
    'lite-l': (1.0, 1.0, 96, 3),
    's': (1.0, 1.1, 96, 4),
    'm': (1.4, 1.8, 192, 5),
    'l': (2.0, 3.1, 288, 6),
}
#: Published: (config, mIoU, parameters in M, multiply-adds in G), None where there is no number.
ROWS = [
    (f'eseg-lite-s_{CITYSCAPES}', 76.0, None, None),
    (f'eseg-lite-m_{CITYSCAPES}', None, None, None),
    (f'eseg-lite-l_{CITYSCAPES}', 80.1, None, None),
    (f'eseg-s_{CITYSCAPES}', 80.1, 6.9, 34.5),
    (f'eseg-m_{CITYSCAPES}', 81.6, 20.0, 112.0),
    (f'eseg-l_{CITYSCAPES}', 82.6, 70.5, 343.0),
    (f'eseg-m_{ADE20K}', 46.0, None, None),
    (f'eseg-l_{ADE20K}', 48.2, None, None),
    (f'deeplabv3plus_efficientnet-b1-d16_{CITYSCAPES}', 79.4, None, 91.8),
    (f'deeplabv3plus_efficientnet-b1_no-atrous_{CITYSCAPES}', 78.8, None, 49.9),
    (f'eseg-s_r50_{CITYSCAPES}', 78.9, None, 188.0),
    (f'deeplabv3plus_r50-d16_{CITYSCAPES}', 77.8, None, 324.3),
    (f'deeplabv3plus_r50_no-atrous_{CITYSCAPES}', 77.4, None, 230.3),
    (f'eseg-s_p2-p5_{CITYSCAPES}', None, None, None),
    (f'eseg-s_p2-p7_{CITYSCAPES}', None, None, None),
    *((f'eseg-{size}_pseudo-labels_{CITYSCAPES}', None, None, None) for size in 'sml'),
]
NAMES = [row[0] for row in ROWS]
METADATA = {m['Name']: m for m in models_of(f'{FOLDER}/metafile.yaml')}
README = (CONFIGS / 'eseg/README.md').read_text(encoding='utf-8')


ACTS = RUNS | {'custom_hooks', 'train_dataloader'}


def content(name: str, folder: str = 'eseg') -> dict[str, Any]:
    """What a Runner acts on in a config."""
    return {k: v for k, v in plain(CONFIGS / folder / f'{name}.py').items() if k in ACTS}


def differing(ours: Any, theirs: Any, key: str = '') -> set[str]:
    """Dotted names of what is not the same; a list is compared as a whole."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return set().union(
            *(
                differing(ours.get(k), theirs.get(k), f'{key}.{k}' if key else k)
                for k in ours.keys() | theirs.keys()
            )
        )
    return set() if ours == theirs else {key}


# --- rows ----------------------------------------------------------------------------------------


def test_every_row_has_its_config_and_no_config_is_without_row() -> None:
    assert {p.stem for p in (CONFIGS / 'eseg').glob('*.py')} == set(NAMES) == set(METADATA)


@pytest.mark.parametrize(('name', 'miou'), [row[:2] for row in ROWS])
def test_metafile_has_the_published_results(name: str, miou: float | None) -> None:
    results = METADATA[name].get('Results')
    if miou is None:
        assert results is None
    else:
        assert (results['Metrics']['mIoU'], results['Source']) == (miou, 'paper')


def test_readme_has_the_published_numbers_and_the_counts() -> None:
    rows = re.findall(r'^\|(.*)\[config\]\(\./(\S+)\.py\) \|$', README, re.MULTILINE)
    # S is a row of three tables; the self-training config stands in none.
    assert sorted(name for _, name in rows) == sorted(
        [n for n in NAMES if '_pseudo-labels_' not in n] + [f'eseg-s_{CITYSCAPES}'] * 2
    )
    published = {name: rest for name, *rest in ROWS}
    for line, name in rows:
        cells = [cell.strip() for cell in line.split('|')]
        said = METADATA[name]['Metadata']
        assert f'{said["Parameters"] / 1e6:.2f} M' in cells, name
        flops = said['FLOPs'] / 1e9
        assert {f'{flops:.1f} G', f'{flops:.2f} G'} & set(cells), name
        assert 'not run' in cells
        if ' to P' in cells[0]:
            continue
        miou, _, giga = published[name]
        assert miou is None or f'{miou:.1f}' in cells
        assert giga is None or {f'{giga:.1f} G', f'{giga:.0f} G'} & set(cells)
        for cell in cells:
            if cell.endswith('%'):
                assert cell == f'{(flops / giga - 1) * 100:+.1f} %'


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'params', 'flops', 'tolerance'),
    [
        # What a counter shows that knows neither batch statistics nor element-wise work.
        ('eseg-s', 6.78, 33.8, 0.01),
        ('eseg-m', 19.81, 110.3, 0.01),
        ('eseg-l', 70.12, 339.7, 0.01),
        ('eseg-lite-s', 1.77, 11.4, 0.01),
        ('eseg-lite-m', 4.64, 27.0, 0.01),
        ('eseg-lite-l', 13.3, 65.4, 0.01),
        ('eseg-s_p2-p5', None, 33.68, 0.001),
        ('eseg-s_p2-p7', None, 33.81, 0.001),
        ('eseg-s_r50', None, 187.6, 0.02),
        # Published; the last row of the table is the one that this form of DeepLabV3+ misses.
        ('deeplabv3plus_efficientnet-b1-d16', None, 91.8, 0.03),
        ('deeplabv3plus_efficientnet-b1_no-atrous', None, 49.9, 0.01),
        ('deeplabv3plus_r50-d16', None, 324.3, 0.01),
    ],
)
def test_counts_are_the_published_ones(
    name: str, params: float | None, flops: float, tolerance: float
) -> None:
    # tests/configs/test_models.py recomputes what the metafile says.
    found = METADATA[f'{name}_{CITYSCAPES}']['Metadata']
    assert found['FLOPs'] / 1e9 == pytest.approx(flops, rel=tolerance)
    if params is not None:
        assert found['Parameters'] / 1e6 == pytest.approx(params, rel=tolerance)


@pytest.mark.parametrize('levels', [4, 6, 8])
def test_neck_and_head_as_a_formula(levels: int) -> None:
    """ESeg-S behind its backbone, at 1024 x 2048: everything is multiplied out."""
    name = f'eseg-s_{CITYSCAPES}' if levels == 8 else f'eseg-s_p2-p{levels + 1}_{CITYSCAPES}'
    found = count(read(f'{FOLDER}/{name}.py'), SHAPE)
    ins, c, repeats, classes = [24, 40, 112, 320], 96, 4, 19
    area = [(1024 // s) * (2048 // s) for s in (4 << i for i in range(levels))]
    assert area[0] == 131072
    assert levels < 8 or area[-1] == 2 * 4

    norm, separable = 2 * c, 9 * c + c * c
    # 1x1 convolutions of the backbone's levels, and of the pooled ones.
    params = sum((i + 2) * c for i in ins) + (levels - 4) * (c * c + norm)
    flops = sum(i * c * a for i, a in zip(ins, area)) + c * c * sum(area[4:])
    # Top-down nodes on all levels but the last, bottom-up nodes on all but the first. Edges: two
    # into each top-down node and into the last bottom-up one, three into the others.
    edges = 2 * (levels - 1) + 3 * (levels - 2) + 2
    params += repeats * (2 * (levels - 1) * (separable + c + norm) + edges)
    flops += repeats * separable * (sum(area[:-1]) + sum(area[1:]))
    # One weight per level, one separable convolution, the classifier.
    params += levels + separable + norm + (c + 1) * classes
    flops += (separable + c * classes) * area[0]

    behind = ('neck', 'decode_head')
    assert sum(found.params_by_module[part] for part in behind) == params
    assert sum(found.flops_by_module[part] for part in behind) == flops


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('size', 'name'),
    [(s, f'eseg-{s}_{CITYSCAPES}') for s in SIZES] + [(s, f'eseg-{s}_{ADE20K}') for s in 'ml'],
)
def test_size_is_the_one_of_table_3(size: str, name: str) -> None:
    width, depth, channels, repeats = SIZES[size]
    model = read(f'{FOLDER}/{name}.py').model
    backbone, neck, head = model.backbone, model.neck, model.decode_head
    assert (backbone.width, backbone.depth) == (width, depth)
    assert (neck.channels, neck.num_repeats, neck.num_levels) == (channels, repeats, 8)
    assert (head.channels, head.in_channels) == (channels, [channels] * 8)
    assert head.in_index == list(range(8))
    lite = size.startswith('lite')
    assert backbone.get('variant', 'default') == ('lite' if lite else 'default')
    activations = {neck.act_cfg.type, head.act_cfg.type}
    assert activations == ({'ReLU'} if lite else {'Swish'})


@pytest.mark.parametrize('size', SIZES)
def test_neck_takes_the_levels_of_the_backbone(size: str) -> None:
    cfg = for_a_cpu(plain(BASE / f'models/eseg-{size}.py')['model'])
    model = MODELS.build(cfg)
    assert isinstance(model.backbone, ScaledEfficientNet)
    assert list(model.backbone.out_channels) == cfg['neck']['in_channels']
    assert model.backbone.out_strides == (4, 8, 16, 32)
    # No atrous convolution anywhere.
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.dilation for conv in convs} == {(1, 1)}
    # The published parameters contain the running statistics, in units of 0.1 M.
    learned = sum(p.numel() for p in model.parameters())
    running = sum(b.numel() for name, b in model.named_buffers() if 'running' in name)
    published = {name: row for name, _, row, _ in ROWS}[f'eseg-{size}_{CITYSCAPES}']
    if published is not None:
        assert round((learned + running) / 1e6, 1) == published
        assert f'{(learned + running) / 1e6:.2f} M ({size.upper()})' in README


@pytest.mark.parametrize(('size', 'arch'), [('s', 'b1'), ('m', 'b4'), ('l', 'b7')])
def test_weights_are_of_the_network_with_this_scaling(size: str, arch: str) -> None:
    from mmpretrain.models.backbones import EfficientNet

    backbone = plain(BASE / f'models/eseg-{size}.py')['model']['backbone']
    # The third entry is the resolution.
    assert EfficientNet.arch_settings[arch][:2] == (backbone['width'], backbone['depth'])
    checkpoint = backbone['init_cfg']['checkpoint'].rsplit('/', 1)[1]
    assert checkpoint.startswith(f'efficientnet-{arch}_')
    assert 'aa_in1k' in checkpoint
    assert backbone['init_cfg']['prefix'] == 'backbone.'


@pytest.mark.parametrize('name', [n for n in NAMES if 'no-atrous' in n])
def test_no_atrous_has_none(name: str) -> None:
    model = MODELS.build(for_a_cpu(plain(CONFIGS / f'eseg/{name}.py')['model']))
    assert {m.dilation for m in model.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    with_atrous = {
        'deeplabv3plus_r50_no-atrous': 'deeplabv3plus_r50-d16',
        'deeplabv3plus_efficientnet-b1_no-atrous': 'deeplabv3plus_efficientnet-b1-d16',
    }[name.replace(f'_{CITYSCAPES}', '')]
    model = MODELS.build(for_a_cpu(plain(CONFIGS / f'eseg/{with_atrous}_{CITYSCAPES}.py')['model']))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.dilation[0] for conv in convs} == {1, 2, 6, 12, 18}


# --- differences ---------------------------------------------------------------------------------

DECODER_LISTS = {'model.decode_head.in_channels', 'model.decode_head.in_index'}
SIZE = {
    'model.backbone.width',
    'model.backbone.depth',
    'model.backbone.init_cfg.checkpoint',
    'model.neck.in_channels',
    'model.neck.channels',
    'model.neck.num_repeats',
    'model.decode_head.in_channels',
    'model.decode_head.channels',
}
RATES = {'model.decode_head.dilations'}


@pytest.mark.parametrize(
    ('name', 'other', 'keys'),
    [
        ('eseg-m', 'eseg-s', SIZE),
        ('eseg-l', 'eseg-m', SIZE),
        ('eseg-lite-m', 'eseg-lite-s', SIZE - {'model.backbone.init_cfg.checkpoint'}),
        ('eseg-lite-l', 'eseg-lite-s', SIZE - {'model.backbone.init_cfg.checkpoint'}),
        ('eseg-s_p2-p5', 'eseg-s', {'model.neck.num_levels', *DECODER_LISTS}),
        ('eseg-s_p2-p7', 'eseg-s', {'model.neck.num_levels', *DECODER_LISTS}),
        ('eseg-s_pseudo-labels', 'eseg-s', {'train_dataloader.dataset'}),
        ('eseg-m_pseudo-labels', 'eseg-m', {'train_dataloader.dataset'}),
        ('eseg-l_pseudo-labels', 'eseg-l', {'train_dataloader.dataset'}),
        ('eseg-m_pseudo-labels', 'eseg-s_pseudo-labels', SIZE),
        ('eseg-l_pseudo-labels', 'eseg-s_pseudo-labels', SIZE),
        (
            'deeplabv3plus_efficientnet-b1_no-atrous',
            'deeplabv3plus_efficientnet-b1-d16',
            {'model.backbone.output_stride', *RATES},
        ),
        (
            'deeplabv3plus_r50_no-atrous',
            'deeplabv3plus_r50-d16',
            {'model.backbone.strides', 'model.backbone.dilations', *RATES},
        ),
    ],
)
def test_differs_in_these_words_alone(name: str, other: str, keys: set[str]) -> None:
    found = differing(content(f'{name}_{CITYSCAPES}'), content(f'{other}_{CITYSCAPES}'))
    dataset = 'train_dataloader.dataset'
    found = {dataset if key.startswith(dataset) else key for key in found}
    assert found == keys


def test_the_rows_of_table_8_share_their_recipe() -> None:
    names = [f'eseg-s_{CITYSCAPES}', f'eseg-s_r50_{CITYSCAPES}']
    names += [name for name in NAMES if name.startswith('deeplabv3plus')]
    first, *others = (content(name) for name in names)
    assert len(others) == 5
    loss = ('sampler', 'loss_decode', 'dropout_ratio', 'align_corners')
    for other in others:
        assert {key.split('.')[0] for key in differing(other, first)} == {'model'}
        for key in loss:
            assert other['model']['decode_head'][key] == first['model']['decode_head'][key]
    with_bifpn = others[0]
    apart = differing(with_bifpn['model'], first['model'])
    assert {k.split('.')[0] for k in apart} == {'backbone', 'neck'}
    assert {k for k in apart if k.startswith('neck')} == {'neck.in_channels'}


@pytest.mark.parametrize('size', ['m', 'l'])
def test_ade20k_differs_in_data_length_and_kept_pixels(size: str) -> None:
    found = differing(content(f'eseg-{size}_{ADE20K}'), content(f'eseg-{size}_{CITYSCAPES}'))
    assert {k for k in found if k.startswith(('model', 'optim', 'custom'))} == {
        'model.data_preprocessor.size',
        'model.decode_head.num_classes',
        'model.decode_head.sampler.min_kept',
    }


# --- recipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_recipe(name: str) -> None:
    cfg = read(f'{FOLDER}/{name}.py')
    # Published: batches of 16 (four processes), cosine decay, OHEM.
    assert 4 * cfg.train_dataloader.batch_size == 16
    warm, cosine = cfg.param_scheduler
    assert (warm.type, cosine.type) == ('LinearLR', 'CosineAnnealingLR')
    assert (warm.begin, warm.end) == (0, cosine.begin)
    # To 0 at the end, once.
    assert (cosine.begin + cosine.T_max, cosine.end, cosine.eta_min) == (
        cfg.train_cfg.max_iters,
        cfg.train_cfg.max_iters,
        0,
    )
    sampler = cfg.model.decode_head.sampler
    height, width = cfg.model.data_preprocessor.size
    assert (sampler.type, sampler.min_kept * 16) == ('OHEMPixelSampler', height * width)
    (hook,) = cfg.custom_hooks
    assert (hook.type, hook.ema_type, hook.update_buffers) == (
        'EMAHook',
        'MomentumAnnealingEMA',
        True,
    )
    assert 1 - hook.momentum == 0.9998
    assert not cfg.model.get('auxiliary_head')


@pytest.mark.parametrize('name', NAMES)
def test_the_other_mean_of_ohem_is_one_option_away(name: str) -> None:
    option = 'model.decode_head.sampler.type=KeptMeanOHEMPixelSampler'
    assert f'--cfg-options {option}`' in README
    cfg = copy.deepcopy(read(f'{FOLDER}/{name}.py'))
    cfg.merge_from_dict(dict([option.split('=')]))
    head = nn.Module()
    head.ignore_index = 255
    head.loss_decode = MODELS.build(cfg.model.decode_head.loss_decode)
    sampler = TASK_UTILS.build(cfg.model.decode_head.sampler, default_args=dict(context=head))
    # Every pixel is unsure, and counts once.
    weight = sampler.sample(torch.zeros(1, 19, 16, 32), torch.zeros(1, 1, 16, 32))
    assert weight.mean() == 1


@pytest.mark.parametrize('name', [n for n in NAMES if n.startswith('eseg')])
def test_norm_is_bifpns(name: str) -> None:
    model = read(f'{FOLDER}/{name}.py').model
    expected = dict(BATCH_NORM, type='SyncBN', requires_grad=True)
    parts = [model.neck, model.decode_head]
    parts += [model.backbone] if model.backbone.type == 'ScaledEfficientNet' else []
    assert all(part.norm_cfg == expected for part in parts)


@pytest.mark.stack
def test_kernels_alone_decay() -> None:
    cfg = Config(for_a_cpu(read(f'{FOLDER}/eseg-lite-s_{CITYSCAPES}.py').to_dict()))
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (4e-5 if parameter.dim() == 4 else 0.0), name


# --- bases ---------------------------------------------------------------------------------------


def test_crop() -> None:
    expected = plain(BASE / 'datasets/cityscapes_769x769.py')
    ours = plain(BASE / 'datasets/cityscapes_1024x2048.py')
    train = copy.deepcopy(expected['train_pipeline'])
    for step in train:
        if step['type'] == 'RandomResize':
            step['scale'] = (2048, 1024)
        if step['type'] == 'RandomCrop':
            step['crop_size'] = SHAPE
    assert ours['crop_size'] == SHAPE
    assert ours['train_pipeline'] == ours['train_dataloader']['dataset']['pipeline'] == train
    # The rest is that of Cityscapes, images of 2048 x 1024 in the tests.
    theirs = plain(BASE / 'datasets/cityscapes.py')
    train_keys = ('crop_size', 'train_pipeline', 'train_dataloader')
    assert without(ours, *train_keys) == without(theirs, *train_keys)
    assert (ours['train_dataloader']['batch_size'], theirs['train_dataloader']['batch_size']) == (
        4,
        2,
    )


def test_schedules_differ_in_their_length_alone() -> None:
    long = plain(BASE / 'schedules/schedule_90k_cosine-ema.py')
    short = plain(BASE / 'schedules/schedule_80k_cosine-ema.py')
    for step in (*long['param_scheduler'], *short['param_scheduler']):
        step.pop('end')
        step.pop('T_max', None)
    assert differing(long, short) == {
        'train_cfg.max_iters',
        'train_cfg.val_interval',
        'default_hooks.checkpoint.interval',
    }


# --- self-training -------------------------------------------------------------------------------


CROP = 64
STEPS = 3


def write_two_data_sets(root: Path) -> None:
    """Images in the folders of Cityscapes, and others as tools/pseudo_labels.py labels them."""
    label = np.full((CROP, CROP), 255, np.uint8)
    label[: CROP // 4] = 18
    files = {
        'cityscapes/leftImg8bit/train/ulm/a_leftImg8bit.png': np.zeros((CROP, CROP, 3), np.uint8),
        'cityscapes/gtFine/train/ulm/a_gtFine_labelTrainIds.png': np.full_like(label, 3),
        'pseudo/images/night/kept.jpg': np.zeros((CROP, CROP, 3), np.uint8),
        'pseudo/images/night/empty.jpg': np.zeros((CROP, CROP, 3), np.uint8),
        'pseudo/labels/night/kept.png': label,
        'pseudo/labels/night/empty.png': np.full_like(label, 255),
    }
    for name, array in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / name)
    # Without suffix, and those alone that have a label.
    (root / 'pseudo/labels/images.jpg.txt').write_text('night/kept\n')


def self_training(root: Path) -> Config:
    """The config with its two data sets in ``root``, nothing of which is cropped."""
    cfg = read(f'{FOLDER}/eseg-s_pseudo-labels_{CITYSCAPES}.py').to_dict()
    cfg = Config(for_a_cpu(copy.deepcopy(cfg)))
    keep = ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs')
    for part, folder in zip(cfg.train_dataloader.dataset.datasets, ('cityscapes', 'pseudo')):
        steps = [step for step in part.pipeline if step.type in keep]
        part.update(data_root=str(root / folder), pipeline=steps)
    return cfg


def test_pseudo_labels_stand_beside_cityscapes(tmp_path: Path) -> None:
    """Both data sets: the classes, their ids, what is ignored, what is left out."""
    dataset = read(f'{FOLDER}/eseg-s_pseudo-labels_{CITYSCAPES}.py').train_dataloader.dataset
    labelled, pseudo = dataset.datasets
    own = read(f'{FOLDER}/eseg-s_{CITYSCAPES}.py').train_dataloader.dataset
    assert labelled == own
    assert pseudo.pipeline == own.pipeline

    write_two_data_sets(tmp_path)
    joined = DATASETS.build(self_training(tmp_path).train_dataloader.dataset)
    assert len(joined) == 2
    assert len(joined.metainfo['classes']) == 19
    found = [joined[i]['data_samples'].gt_sem_seg.data.unique().tolist() for i in range(2)]
    assert found == [[3], [18, 255]]


@pytest.mark.stack
def test_trains_through_the_runner(tmp_path: Path) -> None:
    """Warm-up, cosine, OHEM, and an average of the weights that is what a checkpoint holds."""
    write_two_data_sets(tmp_path)
    cfg = self_training(tmp_path)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.data_preprocessor.size = (CROP, CROP)
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.train_cfg.max_iters = STEPS
    cfg.default_hooks.checkpoint.update(interval=STEPS)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == STEPS
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    # The rate rises from a tenth.
    rates = list(runner.message_hub.get_scalar('train/lr').data[0])
    assert rates[0] == pytest.approx(0.002)
    assert rates == sorted(set(rates))
    saved = torch.load(tmp_path / f'work/iter_{STEPS}.pth', weights_only=False)
    weight = 'decode_head.conv_seg.weight'
    trained = runner.model.state_dict()[weight]
    assert torch.equal(saved['ema_state_dict'][f'module.{weight}'], trained)
    assert not torch.equal(saved['state_dict'][weight], trained)
    # Batch statistics are averaged, too.
    mean = 'decode_head.conv.pointwise_conv.bn.running_mean'
    assert not torch.equal(saved['state_dict'][mean], runner.model.state_dict()[mean])


# --- small pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('folder', 'trained'),
    [
        ('camvid', '1xb16-4k_camvid-360x480'),
        ('fusion_shapes', '1xb4-1k_fusion-shapes-128x128'),
    ],
)
@pytest.mark.parametrize(('size', 'width'), [('lite-s', 16), ('s', 28)])
def test_deeplab_beside_it_costs_as_much(folder: str, trained: str, size: str, width: int) -> None:
    names = [f'eseg-{size}_{trained}', f'deeplabv3plus_r18-d16-w{width}_{trained}']
    ours, theirs = (content(name, folder) for name in names)
    # One recipe: the models differ alone, and none starts from weights.
    assert {key.split('.')[0] for key in differing(ours, theirs)} == {'model'}
    for model in (ours['model'], theirs['model']):
        assert not model['backbone'].get('init_cfg')
        assert not model.get('pretrained')
        assert not model.get('auxiliary_head')
        assert not model['decode_head'].get('sampler')
        assert 'SyncBN' not in str(model)
    metadata = {m['Name']: m['Metadata'] for m in models_of(f'configs/{folder}/metafile.yaml')}
    flops = [metadata[name]['FLOPs'] for name in names]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
    # The network of the published size.
    model = plain(BASE / f'models/eseg-{size}.py')['model']
    apart = ('norm_cfg', 'init_cfg', 'sampler', 'num_classes', 'data_preprocessor')
    assert without(ours['model'], *apart) == without(model, *apart)


@pytest.mark.stack
def test_small_models_give_logits_of_odd_images() -> None:
    model = content('eseg-lite-s_1xb4-1k_fusion-shapes-128x128', 'fusion_shapes')['model']
    model = MODELS.build(model).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 65, 97), mode='tensor').shape == (1, 8, 17, 25)


def test_readmes_of_the_small_pairs_name_them() -> None:
    for folder in ('camvid', 'fusion_shapes'):
        text = (ROOT / f'configs/{folder}/README.md').read_text(encoding='utf-8')
        for size, width in (('lite-s', 16), ('s', 28)):
            row = rf'deeplabv3plus_r18-d16-w{width}_\S+\) \|.*\(\./eseg-{size}_'
            assert re.search(row, text), (folder, size)


# --- page ----------------------------------------------------------------------------------------

PAGE = (ROOT / 'docs/methods/eseg.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('cls', [BiFPN, ScaledEfficientNet])
def test_page_has_the_arguments_and_defaults(cls: type) -> None:
    # The table behind the class' name.
    section = PAGE.split(f'\n`{cls.__name__}`:\n')[1].lstrip('\n').split('\n\n')[0]
    table = dict(re.findall(r'^\| (`.+?`) \| (.+?) \|', section, re.MULTILINE))
    written = {}
    for names, defaults in table.items():
        values = ast.literal_eval(f'[{defaults.replace("`", "")}]')
        written.update(zip(re.findall(r'`(\w+)`', names), values))
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
        # Every class has these.
        and name not in ('norm_cfg', 'act_cfg', 'init_cfg')
    }
    assert written == own


@pytest.mark.parametrize('text', [PAGE, README], ids=['page', 'readme'])
def test_example_gives_logits(text: str) -> None:
    block = next(b for b in re.findall(r'```python\n(.*?)```', text, re.DOTALL) if 'BiFPN' in b)
    cfg = Config(for_a_cpu(Config.fromstring(block, '.py').model.to_dict()))
    assert cfg.decode_head.pop('_delete_')
    levels = [
        torch.zeros(1, c, 33 // s, 40 // s) for c, s in zip(cfg.neck.in_channels, (1, 2, 4, 8))
    ]
    with torch.device('meta'):
        neck, head = MODELS.build(cfg.neck).eval(), MODELS.build(cfg.decode_head).eval()
        assert head(neck([x.to('meta') for x in levels])).shape == (1, 19, 33, 40)


def test_page_says_what_the_upper_levels_cost() -> None:
    flops = [METADATA[f'eseg-s{k}_{CITYSCAPES}']['Metadata']['FLOPs'] for k in ('', '_p2-p5')]
    assert f'add {(flops[0] / flops[1] - 1) * 100:.1f} %' in PAGE
