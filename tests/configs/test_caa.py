"""CAA's configs are the rows of the thesis' tables 3.1 to 3.11, and differ where the rows do."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS

from mmseg_fusion.models.backbones import DilatedEfficientNet
from mmseg_fusion.models.decode_heads import CAAHead

from .files import BASE, CONFIGS, ROOT, models_of, plain, read, signature, without
from .test_base import RUNS

FOLDER = 'configs/caa'
PASCAL = '4xb4-40k_pascal-context-59-513x513'
COCO10K = '4xb4-40k_coco-stuff10k-513x513'
COCO164K = '4xb4-40k_coco-stuff164k-513x513'
CITYSCAPES = '4xb2-80k_cityscapes-769x769'

ONE, MANY = 'mIoU', 'mIoU(ms+flip)'
#: (table, config, metric, the thesis' number); a config can be a row of several tables.
ROWS = [
    ('3.1', f'caa_r101-d16_axial_{PASCAL}', ONE, 50.27),
    ('3.1', f'caa_r101-d16_gate-1x128_{PASCAL}', ONE, 50.75),
    ('3.1', f'caa_r101-d16_gate-3x128_{PASCAL}', ONE, 50.85),
    ('3.1', f'caa_r101-d16_{PASCAL}', ONE, 51.06),
    ('3.1', f'caa_r101-d16_gate-7x128_{PASCAL}', ONE, 50.40),
    ('3.1', f'caa_r101-d16_gate-5x64_{PASCAL}', ONE, 50.12),
    ('3.1', f'caa_r101-d16_gate-5x256_{PASCAL}', ONE, 50.35),
    ('3.2', f'caa_r101-d16_axial_{PASCAL}', ONE, 50.27),
    ('3.2', f'caa_r101-d16_axial-se_{PASCAL}', ONE, 50.37),
    ('3.2', f'caa_r101-d16_{PASCAL}', ONE, 51.06),
    ('3.3', f'caa_r101-d16_axial_{PASCAL}', ONE, 50.27),
    ('3.3', f'caa_r101-d16_{PASCAL}', ONE, 51.06),
    ('3.3', f'caa_r101-d16_self_{PASCAL}', ONE, 50.42),
    ('3.3', f'caa_r101-d16_channelized-self_{PASCAL}', ONE, 51.09),
    ('3.4', f'caa_r101-d16_{PASCAL}', ONE, 51.06),
    ('3.4', f'caa_r101-d16_aux_{PASCAL}', MANY, 53.7),
    ('3.4', f'caa_r101-d8_{PASCAL}', None, None),
    ('3.4', f'caa_r101-d8_aux_{PASCAL}', MANY, 55.0),
    ('3.5', f'caa_r50-d16_axial_{PASCAL}', ONE, 49.73),
    ('3.5', f'caa_r50-d16_{PASCAL}', ONE, 50.23),
    ('3.5', f'caa_xception65-d16_axial_{PASCAL}', ONE, 52.42),
    ('3.5', f'caa_xception65-d16_{PASCAL}', ONE, 52.65),
    ('3.5', f'caa_efficientnet-b7-d16_axial_{PASCAL}', ONE, 57.24),
    ('3.5', f'caa_efficientnet-b7-d16_{PASCAL}', ONE, 57.93),
    ('3.5', f'caa_efficientnet-b7-d8_{PASCAL}', ONE, 58.40),
    ('3.6', f'caa_r101-d16_aux_{PASCAL}', MANY, 53.7),
    ('3.6', f'caa_r101-d8_aux_{PASCAL}', MANY, 55.0),
    ('3.7', f'caa_efficientnet-b7-d8_aux_{PASCAL}', MANY, 60.12),
    ('3.7', f'caa_efficientnet-b7-d8_aux-decoder_{PASCAL}', MANY, 60.50),
    ('3.8', f'caa_r101-d8_aux_{COCO10K}', MANY, 41.2),
    ('3.9', f'caa_efficientnet-b7-d8_aux_{COCO10K}', MANY, 45.4),
    ('3.10', f'caa_r101-d8_aux_{CITYSCAPES}', MANY, 82.6),
    ('3.11', f'caa_efficientnet-b5-d8_aux_{COCO164K}', MANY, 47.30),
]
NAMES = sorted({name for _, name, _, _ in ROWS})


def content(name: str) -> dict[str, Any]:
    """What a Runner acts on in a config of the folder."""
    return {k: v for k, v in plain(CONFIGS / 'caa' / f'{name}.py').items() if k in RUNS}


def flat(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested dicts and lists."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value)) if any(isinstance(v, dict) for v in value) else value
    if not isinstance(value, dict):
        yield key, value
        return
    for name, part in value.items():
        yield from flat(part, f'{key}.{name}' if key else str(name))


def difference(name: str, baseline: str) -> dict[str, tuple[Any, Any]]:
    """Keys whose leaves differ, with the leaves of ``baseline`` and of ``name``."""
    ours, theirs = dict(flat(content(name))), dict(flat(content(baseline)))
    keys = ours.keys() | theirs.keys()
    return {
        key: (theirs.get(key), ours.get(key)) for key in keys if ours.get(key) != theirs.get(key)
    }


# --- rows ----------------------------------------------------------------------------------------


def test_every_row_has_its_config_and_no_config_is_without_row() -> None:
    assert {p.stem for p in (CONFIGS / 'caa').glob('caa_*.py')} == set(NAMES)


def test_metafile_has_the_thesis_numbers() -> None:
    found = {m['Name']: m for m in models_of(f'{FOLDER}/metafile.yaml')}
    for _, name, metric, number in ROWS:
        results = found[name].get('Results')
        if metric is None:
            assert results is None
        else:
            assert results['Metrics'] == {metric: number}
            assert results['Source'] == 'thesis'


def test_readme_has_the_thesis_numbers_and_the_counts() -> None:
    counts = {m['Name']: m['Metadata'] for m in models_of(f'{FOLDER}/metafile.yaml')}
    text = (CONFIGS / 'caa/README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\|(.*)\[config\]\(\./(caa_\S+)\.py\) \|$', text, re.MULTILINE)
    # Tables 3.4 and 3.6 share the two rows that carry a number of both.
    assert sorted(name for _, name in rows) == sorted(name for _, name, _, _ in ROWS)
    numbers = {name: number for _, name, _, number in ROWS}
    baseline = counts[f'caa_r101-d16_axial_{PASCAL}']['FLOPs']
    for cells, name in rows:
        cells = [cell.strip() for cell in cells.split('|')]
        written = {float(n) for cell in cells for n in re.findall(r'^(\d\d\.\d+)\b(?! [GM])', cell)}
        assert written == ({numbers[name]} if numbers[name] else set()), name
        said = counts[name]
        assert f'{said["Parameters"] / 1e6:.2f} M' in cells, name
        whole, added = f'{said["FLOPs"] / 1e9:.2f} G', f'{(said["FLOPs"] - baseline) / 1e9:+.5f} G'
        assert whole in cells or added in cells, name


# --- differences ---------------------------------------------------------------------------------

ATTENTION = 'model.decode_head.attention'
OURS = 'channelized_axial'
TO_STRIDE_8 = {
    'model.backbone.strides': ([1, 2, 2, 1], [1, 2, 1, 1]),
    'model.backbone.dilations': ([1, 1, 1, 2], [1, 1, 2, 4]),
    'model.backbone.multi_grid': ([2, 4, 8], [4, 8, 16]),
}


def of_pascal(*pairs: tuple[str, str, dict[str, tuple[Any, Any]]]) -> list[Any]:
    return [(f'caa_{a}_{PASCAL}', f'caa_{b}_{PASCAL}', keys) for a, b, keys in pairs]


@pytest.mark.stack
@pytest.mark.parametrize(
    ('name', 'baseline', 'expected'),
    of_pascal(
        ('r101-d16_axial', 'r101-d16', {ATTENTION: (OURS, 'axial')}),
        ('r101-d16_axial-se', 'r101-d16_axial', {ATTENTION: ('axial', 'axial_se')}),
        ('r101-d16_self', 'r101-d16', {ATTENTION: (OURS, 'self')}),
        ('r101-d16_channelized-self', 'r101-d16_self', {ATTENTION: ('self', 'channelized_self')}),
        ('r101-d16_gate-1x128', 'r101-d16', {'model.decode_head.gate_layers': (5, 1)}),
        ('r101-d16_gate-3x128', 'r101-d16', {'model.decode_head.gate_layers': (5, 3)}),
        ('r101-d16_gate-7x128', 'r101-d16', {'model.decode_head.gate_layers': (5, 7)}),
        ('r101-d16_gate-5x64', 'r101-d16', {'model.decode_head.gate_channels': (128, 64)}),
        ('r101-d16_gate-5x256', 'r101-d16', {'model.decode_head.gate_channels': (128, 256)}),
        ('r101-d8', 'r101-d16', TO_STRIDE_8),
        ('r101-d8_aux', 'r101-d16_aux', TO_STRIDE_8),
        ('r50-d16_axial', 'r50-d16', {ATTENTION: (OURS, 'axial')}),
        (
            'r50-d16',
            'r101-d16',
            {
                'model.backbone.depth': (101, 50),
                'model.pretrained': ('open-mmlab://resnet101_v1c', 'open-mmlab://resnet50_v1c'),
            },
        ),
        ('xception65-d16_axial', 'xception65-d16', {ATTENTION: (OURS, 'axial')}),
        ('efficientnet-b7-d16_axial', 'efficientnet-b7-d16', {ATTENTION: (OURS, 'axial')}),
        (
            'efficientnet-b7-d16',
            'efficientnet-b7-d8',
            {'model.backbone.output_stride': (8, 16)},
        ),
        (
            'efficientnet-b7-d8_aux-decoder',
            'efficientnet-b7-d8_aux',
            {
                'model.decode_head.c1_in_channels': (None, 48),
                'model.decode_head.c1_channels': (None, 48),
            },
        ),
    ),
    ids=lambda value: value.split(f'_{PASCAL}')[0] if isinstance(value, str) else '',
)
def test_differs_in_these_words_alone(
    name: str, baseline: str, expected: dict[str, tuple[Any, Any]]
) -> None:
    found = difference(name, baseline)
    assert {k: tuple(list(v) if isinstance(v, tuple) else v for v in pair)
            for k, pair in found.items()} == expected  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'baseline'),
    [
        (f'caa_r101-d16_aux_{PASCAL}', f'caa_r101-d16_{PASCAL}'),
        (f'caa_r101-d8_aux_{PASCAL}', f'caa_r101-d8_{PASCAL}'),
        (f'caa_efficientnet-b7-d8_aux_{PASCAL}', f'caa_efficientnet-b7-d8_{PASCAL}'),
    ],
)
def test_differs_in_the_auxiliary_head_alone(name: str, baseline: str) -> None:
    assert {key.split('.')[1] for key in difference(name, baseline)} == {'auxiliary_head'}
    assert content(baseline)['model']['auxiliary_head'] is None
    head = content(name)['model']['auxiliary_head']
    decode = content(name)['model']['decode_head']
    assert head['loss_decode']['loss_weight'] == 0.4
    for key in ('in_index', 'in_channels', 'num_classes'):
        assert head[key] == decode[key]


@pytest.mark.parametrize(
    ('name', 'baseline'),
    [
        (f'caa_r101-d8_aux_{COCO10K}', f'caa_r101-d8_aux_{PASCAL}'),
        (f'caa_efficientnet-b7-d8_aux_{COCO10K}', f'caa_efficientnet-b7-d8_aux_{PASCAL}'),
    ],
)
def test_differs_in_the_data_alone(name: str, baseline: str) -> None:
    keys = difference(name, baseline)
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    assert {k for k in keys if not k.startswith(loaders)} == {
        'model.decode_head.num_classes',
        'model.auxiliary_head.num_classes',
    }
    assert {k.split('.')[1] for k in keys if k.startswith(loaders)} == {'dataset'}


def test_models_of_the_comparison_differ_in_the_backbone_alone() -> None:
    # Windows on Cityscapes alone, whose images are larger than the crop; the others are padded.
    apart = ('backbone', 'pretrained', 'size', 'num_classes', 'test_cfg')
    of_backbone = ('in_channels', 'in_index', 'c1_in_channels', 'c1_channels')
    names = [name for name in NAMES if '_aux' in name]
    models = {signature(without(content(n)['model'], *apart, *of_backbone)) for n in names}
    assert (len(names), len(models)) == (8, 1)


# --- recipe --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
def test_recipe_of_section_3_4_1(name: str) -> None:
    cfg = read(f'{FOLDER}/{name}.py')
    city = 'cityscapes' in name
    steps = 80000 if city else 40000
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum) == ('SGD', 0.01, 0.9)
    assert optimizer.weight_decay == 1e-4
    (schedule,) = cfg.param_scheduler
    assert (schedule.type, schedule.power, schedule.eta_min) == ('PolyLR', 0.9, 0)
    assert (schedule.begin, schedule.end, cfg.train_cfg.max_iters) == (0, steps, steps)
    # Four processes.
    assert 4 * cfg.train_dataloader.batch_size == (8 if city else 16)
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert [step.type for step in pipeline] == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'RandomChoice',
        'RandomCrop',
        'RandomFlip',
        'PackSegInputs',
    ]
    scales = [resize.scale_factor for (resize,) in pipeline[2].transforms]
    assert scales == pytest.approx([0.1 * step for step in range(5, 21)])
    assert pipeline[3].get('cat_max_ratio', 1.0) == 1.0
    assert pipeline[3].crop_size == cfg.model.data_preprocessor.size
    assert cfg.model.decode_head.norm_cfg == dict(type='SyncBN', eps=1e-3, requires_grad=True)
    # "MF" is --tta.
    _, flips = cfg.tta_pipeline[1].transforms[:2]
    assert len(cfg.tta_pipeline[1].transforms[0]) == 6
    assert [flip.prob for flip in flips] == [0.0, 1.0]


@pytest.mark.parametrize('stride', [8, 16])
def test_dilations_of_the_resnets(stride: int) -> None:
    cfg = content(f'caa_r101-d{stride}_{PASCAL}')['model']['backbone']
    # The blocks of the last stage are the same three in ResNet-50.
    with torch.device('meta'):
        backbone = MODELS.build(dict(cfg, depth=50, norm_cfg=dict(type='BN')))
        levels = backbone(torch.zeros(1, 3, 65, 65))
    assert levels[-1].shape[2:] == (65 // stride + 1,) * 2
    dilations = [block.conv2.dilation[0] for block in backbone.layer4]
    # DeepLab: 1, 2, 4 times the rate of the stage.
    assert dilations == [rate * 32 // stride for rate in (1, 2, 4)]


# --- what channelization costs -------------------------------------------------------------------


def gate_products(layers: int, width: int, channels: int = 512) -> int:
    """Multiply-adds of both gates for one position each."""
    return 2 * (2 * channels * width + (layers - 1) * width * width)


@pytest.mark.parametrize(
    ('layers', 'width', 'thesis'),
    # Table 3.1, in units of 2 ** 30. It says 0.00027 for 3 x 128 and 0.00030 for 5 x 128, which
    # are the products of 2 and 3 layers.
    [
        (1, 128, 0.00024),
        (3, 128, None),
        (5, 128, None),
        (7, 128, 0.00043),
        (5, 64, 0.00015),
        (5, 256, 0.00098),
    ],
)
def test_what_channelization_adds(layers: int, width: int, thesis: float | None) -> None:
    flops = {m['Name']: m['Metadata']['FLOPs'] for m in models_of(f'{FOLDER}/metafile.yaml')}
    gate = '' if (layers, width) == (5, 128) else f'gate-{layers}x{width}_'
    added = flops[f'caa_r101-d16_{gate}{PASCAL}'] - flops[f'caa_r101-d16_axial_{PASCAL}']
    # 513 pixels at output stride 16: 33 rows, 33 columns.
    assert added == 33 * gate_products(layers, width)
    if thesis is not None:
        assert round(gate_products(layers, width) / 2**30, 5) == thesis


# --- bases ---------------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize('name', ['pascal_context_59', 'coco-stuff10k', 'coco-stuff164k'])
def test_crops_of_513(name: str) -> None:
    expected = plain(BASE / f'datasets/{name}.py')
    ours = plain(BASE / f'datasets/{name}_513x513.py')
    expected['crop_size'] = (513, 513)
    expected.pop('img_scale', None)
    for key in ('train_pipeline', 'test_pipeline'):
        del expected[key]
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        del expected[key]['dataset']['pipeline']
    train, test = ours.pop('train_pipeline'), ours.pop('test_pipeline')
    for key, steps in (('train', train), ('val', test), ('test', test)):
        assert ours[f'{key}_dataloader']['dataset'].pop('pipeline') == steps
    assert ours == expected
    # At the images' own size; tests/configs/test_authors_recipe.py has the training.
    zero = {} if '164k' in name else dict(reduce_zero_label=True)
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', **zero)]
    assert test == [*load, dict(type='PackSegInputs')]
    assert train[:2] == load


def test_schedule() -> None:
    expected = plain(BASE / 'schedules/schedule_40k.py')
    expected['optimizer']['weight_decay'] = 1e-4
    expected['optim_wrapper']['optimizer']['weight_decay'] = 1e-4
    expected['param_scheduler'][0]['eta_min'] = 0.0
    assert plain(BASE / 'schedules/schedule_40k_wd1e-4.py') == expected


@pytest.mark.parametrize('name', [n for n in NAMES if 'efficientnet' in n])
def test_efficientnet_weights_and_channels_fit(name: str) -> None:
    model = content(name)['model']
    backbone = model['backbone']
    arch = re.search(r'efficientnet-(b\d)-d(\d+)_', name)
    assert (backbone['arch'], str(backbone['output_stride'])) == arch.groups()
    assert f'efficientnet-{backbone["arch"]}_' in Path(backbone['init_cfg']['checkpoint']).name
    # The list starts at layer 2, of stride 4.
    channels = [DilatedEfficientNet.level_channels[backbone['arch']][i - 2] for i in (2, 6)]
    assert backbone['out_indices'] == (2, 6)
    for head in (model['decode_head'], model['auxiliary_head']):
        if head is not None:
            assert channels[head['in_index']] == head['in_channels']
    assert model['decode_head'].get('c1_in_channels') in (None, channels[0])


# --- page ----------------------------------------------------------------------------------------

PAGE = (ROOT / 'docs/methods/caa.md').read_text(encoding='utf-8')


def test_page_has_the_heads_arguments_and_defaults() -> None:
    table = dict(re.findall(r'^\| (`.+?`) \| (.+?) \|', PAGE, re.MULTILINE))
    written = {}
    for names, defaults in table.items():
        written.update(zip(re.findall(r'`(\w+)`', names), re.split(', ', defaults)))
    for name, parameter in inspect.signature(CAAHead).parameters.items():
        # BaseDecodeHead's.
        if name in ('channels', 'kwargs'):
            continue
        assert ast.literal_eval(written[name].strip('`')) == parameter.default, name


def test_page_examples_give_logits() -> None:
    use, jpu, block = re.findall(r'^```python\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
    head = Config.fromstring(use, '.py').model.decode_head
    assert head.pop('_delete_')
    with torch.device('meta'):
        head = MODELS.build(dict(head, norm_cfg=dict(type='BN')))
        assert head([torch.zeros(2, 2048, 5, 7)] * 4).shape == (2, 19, 5, 7)

        cfg = Config.fromstring(jpu, '.py').model
        levels = [torch.zeros(2, c, s, s) for c, s in zip(cfg.neck.in_channels, (17, 9, 5))]
        head = MODELS.build(dict(cfg.decode_head, num_classes=19))
        assert head(MODELS.build(cfg.neck)(levels)).shape == (2, 19, 17, 17)

        names: dict[str, Any] = {}
        *lines, last = block.splitlines()
        exec('\n'.join(lines), names)
        assert str(eval(last, names)) == last.split('# ')[1]
