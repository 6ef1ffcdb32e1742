"""HFGD's configs: every row of the paper, and nothing else than its row says."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from pathlib import Path
from typing import Any

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.decode_heads import ContextAugmentedEncoder, HFGDHead, USFPNHead

from ..testers.toys import toy_samples
from .files import BASE, CONFIGS, ROOT, models_of, plain, read
from .test_eseg import content, differing
from .test_models import for_a_cpu

FOLDER = CONFIGS / 'hfgd'
CONTEXT = '4xb4-30k_pascal-context-59-513x513'
CONTEXT_40K = '4xb4-40k_pascal-context-59-513x513'
STUFF = '4xb4-30k_coco-stuff10k-513x513'
CITYSCAPES = '4xb4-30k_cityscapes-513x1025'

#: The paper's numbers, by table or section; a row that stands in several is named in the first.
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    'table 1': {
        f'fcn_r50_{CONTEXT}': (45.87,),
        f'sfpn_r50_{CONTEXT}': (47.14,),
        f'deeplabv3_r50_{CONTEXT}': (46.41,),
        f'sfpn_r50_aspp_{CONTEXT}': (47.81,),
        f'ocrnet_r50_{CONTEXT}': (45.50,),
        f'ocrnet_r50-d8_{CONTEXT}': (48.23,),
        f'sfpn_r50_ocr_{CONTEXT}': (47.39,),
        f'sa_r50_{CONTEXT}': (45.02,),
        f'sfpn_r50_sa_{CONTEXT}': (45.90,),
        f'sa_r50_car_{CONTEXT}': (47.18,),
        f'sfpn_r50_sa_car_{CONTEXT}': (48.51,),
    },
    'section 5.1': {
        f'fcn_r50_aux-sfpn_{CONTEXT}': (44.35,),
        f'fcn-detached_r50_aux-sfpn_{CONTEXT}': (40.04,),
    },
    'section 5.2': {f'hfgd-sfpn_r50_no-stop_{CONTEXT}': (48.50,)},
    'table 2': {
        f'fcn_r50_scratch_{CONTEXT}': (26.13,),
        f'fcn_r50_scratch_{CONTEXT.replace("30k", "90k")}': (31.38,),
        f'fcn_r50_scratch_{CONTEXT.replace("30k", "180k")}': (34.00,),
    },
    'table 3': {
        f'hfgd-sfpn_r50_guidance_{CONTEXT}': (47.67,),
        f'hfgd-sfpn_r50_aa_{CONTEXT}': (47.88,),
        f'hfgd-sfpn_r50_{CONTEXT}': (48.94,),
    },
    'table 4': {
        f'cae_r50_{CONTEXT}': (47.35,),
        f'sfpn_r50_cae_{CONTEXT}': (48.76,),
        f'hfgd-sfpn_r50_sa_car_{CONTEXT}': (50.00,),
        f'hfgd-sfpn_r50_cae_{CONTEXT}': (50.28,),
    },
    'table 5': {
        f'hfgd-sfpn_r50_cae_guidance_{CONTEXT}': (49.22,),
        f'hfgd-sfpn_r50_cae_aa_{CONTEXT}': (49.06,),
    },
    'table 6': {
        f'hfgd_r50_{CONTEXT}': (50.76,),
        f'hfgd-sfpn_swin-l_cae_{CONTEXT_40K}': (59.32,),
        f'hfgd_swin-l_{CONTEXT_40K}': (60.46,),
    },
    'table 7': {
        f'usfpn_r50_{CONTEXT}': (46.99,),
        f'usfpn_r50_cae_{CONTEXT}': (48.67,),
        f'sfpn_swin-l_cae_{CONTEXT_40K}': (56.78,),
        f'usfpn_swin-l_{CONTEXT_40K}': (58.69,),
        f'usfpn_swin-l_cae_{CONTEXT_40K}': (55.76,),
    },
    'table 8': {
        f'fapn_r50_{CONTEXT}': (47.50,),
        f'hfgd-fapn_r50_{CONTEXT}': (49.87,),
        f'upernet_r50_{CONTEXT}': (48.25,),
        f'hfgd-upernet_r50_{CONTEXT}': (49.96,),
        f'deeplabv3plus_r50-d8_{CONTEXT}': (48.11,),
        f'hfgd-deeplabv3plus_r50-d8_{CONTEXT}': (49.70,),
    },
    'table 9': {f'hfgd-os2_r50_{CONTEXT}': (51.00,)},
    # One scale, then several with flips.
    'table 10': {f'hfgd_convnext-l_{CONTEXT_40K}': (63.8, 64.9)},
    'table 11': {'hfgd_convnext-l_4xb4-40k_coco-stuff164k-513x513': (49.0, 49.4)},
    'table 12': {
        f'sfpn_r50_{CITYSCAPES}': (76.44,),
        f'hfgd_r50_{CITYSCAPES}': (79.11,),
        f'hfgd-os2_r50_{CITYSCAPES}': (79.81,),
    },
    'table 13': {
        'hfgd_convnext-l_4xb4-60k_cityscapes-513x1025': (83.1, 83.8),
        'hfgd-os2_convnext-l_4xb4-80k_cityscapes-513x1025': (83.2, 84.0),
    },
    'table 15': {'hfgd_convnext-l_4xb4-40k_ade20k-641x641': (54.3, 55.4)},
    'table 16': {'hfgd_convnext-l_4xb4-40k_coco-stuff10k-513x513': (49.5, 50.3)},
    'table 17': {
        f'fcn_r50_{STUFF}': (32.92,),
        f'fcn_r50_scratch_{STUFF}': (16.70,),
        f'fcn_r50_scratch_{STUFF.replace("30k", "90k")}': (22.62,),
        f'fcn_r50_scratch_{STUFF.replace("30k", "180k")}': (24.62,),
    },
}
NAMES = [name for rows in PAPER.values() for name in rows]
#: Table 1's column of dilation, in the folder of CAR.
DILATED = {'fcn_r50-d8': 47.72, 'deeplabv3_r50-d8': 48.59, 'sa_r50-d8': 48.32}
DILATED['sa_r50-d8_car'] = 50.50
METADATA = {model['Name']: model for model in models_of('configs/hfgd/metafile.yaml')}
README = (FOLDER / 'README.md').read_text(encoding='utf-8')
PAGE = (ROOT / 'docs/methods/hfgd.md').read_text(encoding='utf-8')


def load(stem: str) -> dict[str, Any]:
    return content(stem, 'hfgd')


def context(model: str) -> str:
    """The config of a model on Pascal Context."""
    return f'{model}_{CONTEXT_40K if "swin" in model else CONTEXT}'


# --- rows ----------------------------------------------------------------------------------------


def test_every_row_has_its_config() -> None:
    assert len(NAMES) == len(set(NAMES)) == 54
    assert {path.stem for path in FOLDER.glob('*.py')} == set(NAMES)
    assert all((CONFIGS / 'car' / f'{name}_{CONTEXT}.py').is_file() for name in DILATED)


@pytest.mark.parametrize('source', PAPER)
def test_metafile_has_the_published_results(source: str) -> None:
    for name, numbers in PAPER[source].items():
        results = METADATA[name]['Results']
        assert tuple(results['Metrics'].values()) == numbers
        assert results['Source'] == f'paper, {source}'


def test_readme_has_the_published_results() -> None:
    links = re.findall(r'\[(\d+\.\d+)\]\(\./(\S+)\.py\)', README)
    published = {name: row for rows in PAPER.values() for name, row in rows.items()}
    assert {name for _, name in links} == set(NAMES)
    assert not [name for number, name in links if float(number) != published[name][0]]
    # SS with its link, then MF.
    both = re.findall(r'\./(\S+)\.py\) \| (\d+\.\d+) \|$', README, re.MULTILINE)
    assert {name: (float(number),) for name, number in both} == {
        name: row[1:] for name, row in published.items() if len(row) == 2
    }
    dilated = re.findall(r'\[(\d+\.\d+)\]\(\.\./car/(\S+)_4xb4-30k\S+\.py\)', README)
    assert {name: float(number) for number, name in dilated} == DILATED


def test_readme_has_the_differences_of_table_8() -> None:
    rows = re.findall(r'\[([\d.]+)\]\(\S+\) \| \[([\d.]+)\]\(\S+\) \| ([+][\d.]+) \|', README)
    assert len(rows) == 4
    for alone, guided, difference in rows:
        assert f'{float(guided) - float(alone):+.2f}' == difference


# --- what rows differ in -------------------------------------------------------------------------

HEAD = 'model.decode_head.'
GUIDANCE, AXIAL = f'{HEAD}guidance', f'{HEAD}axial_attention'
STOP, ENCODER, UPSAMPLER = f'{HEAD}stop_gradient', f'{HEAD}encoder', f'{HEAD}upsampler'
USFPN, STRIDE = f'{UPSAMPLER}.type', f'{UPSAMPLER}.output_stride'
CAR = {'model.type', 'model.car'}
DILATION = {f'model.backbone.{key}' for key in ('strides', 'dilations', 'multi_grid')}
FAPN = f'{UPSAMPLER}.pyramid'
LENGTH = {'param_scheduler', 'train_cfg.max_iters', 'train_cfg.val_interval'}
LENGTH |= {'default_hooks.checkpoint.interval'}

#: Two rows, and all that is between them.
STEPS: list[tuple[str, str, set[str]]] = [
    # Tables 3, 4 and 5, section 5.2.
    ('sfpn_r50', 'hfgd-sfpn_r50_guidance', {GUIDANCE}),
    ('sfpn_r50', 'hfgd-sfpn_r50_aa', {AXIAL}),
    ('sfpn_r50', 'hfgd-sfpn_r50', {GUIDANCE, AXIAL}),
    ('hfgd-sfpn_r50', 'hfgd-sfpn_r50_no-stop', {STOP}),
    ('sfpn_r50', 'sfpn_r50_aspp', {ENCODER}),
    ('sfpn_r50', 'sfpn_r50_sa', {ENCODER}),
    ('sfpn_r50_sa', 'sfpn_r50_sa_car', CAR),
    ('sa_r50', 'sa_r50_car', CAR),
    ('sfpn_r50', 'sfpn_r50_cae', {ENCODER, *CAR}),
    ('sfpn_r50_sa_car', 'hfgd-sfpn_r50_sa_car', {GUIDANCE, AXIAL}),
    ('sfpn_r50_cae', 'hfgd-sfpn_r50_cae_guidance', {GUIDANCE}),
    ('sfpn_r50_cae', 'hfgd-sfpn_r50_cae_aa', {AXIAL}),
    ('sfpn_r50_cae', 'hfgd-sfpn_r50_cae', {GUIDANCE, AXIAL}),
    # Tables 6, 7 and 9.
    ('sfpn_r50', 'usfpn_r50', {USFPN}),
    ('usfpn_r50', 'usfpn_r50_cae', {ENCODER, *CAR}),
    ('usfpn_r50_cae', 'hfgd_r50', {GUIDANCE, AXIAL}),
    ('hfgd-sfpn_r50_cae', 'hfgd_r50', {USFPN}),
    ('hfgd_r50', 'hfgd-os2_r50', {STRIDE}),
    ('sfpn_swin-l_cae', 'usfpn_swin-l_cae', {USFPN}),
    ('usfpn_swin-l', 'usfpn_swin-l_cae', {ENCODER, *CAR}),
    ('usfpn_swin-l_cae', 'hfgd_swin-l', {GUIDANCE, AXIAL}),
    ('hfgd-sfpn_swin-l_cae', 'hfgd_swin-l', {USFPN}),
    # Table 8.
    ('sfpn_r50', 'fapn_r50', {FAPN}),
    ('fapn_r50', 'hfgd-fapn_r50', {GUIDANCE, AXIAL}),
    ('sfpn_r50', 'upernet_r50', {USFPN, f'{UPSAMPLER}.pool_scales'}),
    ('upernet_r50', 'hfgd-upernet_r50', {GUIDANCE, AXIAL}),
    ('deeplabv3plus_r50-d8', 'hfgd-deeplabv3plus_r50-d8', {GUIDANCE, AXIAL}),
    # Section 5.1.
    ('fcn_r50', 'fcn_r50_aux-sfpn', {'model.auxiliary_head'}),
    ('fcn_r50_aux-sfpn', 'fcn-detached_r50_aux-sfpn', {'model.decode_head.type'}),
]


@pytest.mark.parametrize(('less', 'more', 'switches'), STEPS, ids=lambda x: x if x else None)
def test_differs_in_the_switches_alone(less: str, more: str, switches: set[str]) -> None:
    assert differing(load(context(less)), load(context(more))) == switches


def test_switches_go_from_off_to_on() -> None:
    for less, more, switches in STEPS:
        heads = [load(context(name))['model']['decode_head'] for name in (less, more)]
        for key in {GUIDANCE, AXIAL} & switches:
            assert [head[key.removeprefix(HEAD)] for head in heads] == [False, True]
    assert load(context('hfgd-sfpn_r50_no-stop'))['model']['decode_head']['stop_gradient'] is False


@pytest.mark.parametrize('name', DILATED)
def test_dilation_is_all_that_table_1_changes(name: str) -> None:
    dilated = content(f'{name}_{CONTEXT}', 'car')
    found = differing(load(context(name.replace('-d8', ''))), dilated)
    if name.startswith('sa_'):
        # CAR's flagship, to the letter: tests/configs/test_authors_recipe.py.
        recipe = {key for key in found if key.startswith('optim_wrapper.')}
        recipe |= {f'model.{part}.norm_cfg.momentum' for part in ('backbone', 'decode_head')}
        recipe.add('model.decode_head.init_cfg')
        assert recipe <= found
        found -= recipe
    assert found == DILATION | ({'model.decode_head.dilations'} if 'deeplab' in name else set())


def test_ocr_takes_the_last_level_where_the_third_has_another_size() -> None:
    coarse, dilated, upsampled = (
        load(context(n))['model']['decode_head'][0]
        for n in ('ocrnet_r50', 'ocrnet_r50-d8', 'sfpn_r50_ocr')
    )
    assert coarse == upsampled
    assert differing(coarse, dilated) == {'in_channels', 'in_index'}
    assert differing(load(context('ocrnet_r50')), load(context('ocrnet_r50-d8'))) == {
        *DILATION,
        'model.decode_head',
    }


@pytest.mark.parametrize('data', [CONTEXT, STUFF])
def test_scratch_rows_start_from_nothing_and_train_longer(data: str) -> None:
    weights = load(f'fcn_r50_{data}')['model']['pretrained']
    assert weights == 'open-mmlab://resnet50_v1c'
    scratch = load(f'fcn_r50_scratch_{data}')
    assert differing(load(f'fcn_r50_{data}'), scratch) == {'model.pretrained'}
    for thousands in (30, 90, 180):
        cfg = load(f'fcn_r50_scratch_{data.replace("30k", f"{thousands}k")}')
        assert cfg['model']['pretrained'] is None
        assert not cfg['model']['backbone'].get('init_cfg')
        assert cfg['train_cfg']['max_iters'] == thousands * 1000
        if thousands > 30:
            assert differing(scratch, cfg) == LENGTH


def test_probe_sees_the_level_and_the_upsampler_trains_the_backbone() -> None:
    torch.manual_seed(0)
    levels = [torch.rand(2, c, 32 // s, 32 // s) for c, s in zip((4, 8, 16, 32), (1, 2, 4, 8))]
    for name, moved in (('fcn_r50_aux-sfpn', True), ('fcn-detached_r50_aux-sfpn', False)):
        model = for_a_cpu(load(context(name))['model'])
        probe, upsampler = model['decode_head'], model['auxiliary_head']
        probe.update(in_channels=32, channels=8)
        upsampler.update(in_channels=[4, 8, 16, 32], channels=8)
        for part, expected in ((probe, [False] * 3 + [moved]), (upsampler, [True] * 4)):
            inputs = [x.clone().requires_grad_() for x in levels]
            MODELS.build(part)(inputs).sum().backward()
            assert [x.grad is not None for x in inputs] == expected


@pytest.mark.parametrize('name', NAMES)
def test_car_regularizes_the_encoder_where_it_is_said(name: str) -> None:
    model = load(name)['model']
    heads = model['decode_head']
    encoder = None if isinstance(heads, list) else heads.get('encoder')
    regularized = (encoder or {}).get('type') == 'ContextAugmentedEncoder' or '_car_' in name
    regularized |= name.startswith('cae_')
    assert (model['type'] == 'CAREncoderDecoder') == regularized
    if regularized:
        layers = {'cae_r50': 'out_conv', 'sa_r50_car': 'auto'}
        layer = layers.get(name.rsplit('_', 2)[0], 'encoder.out_conv')
        assert model['car'].get('layer', 'auto') == layer
        assert set(model['car']) <= {'layer'}


# --- recipe --------------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize('name', NAMES)
def test_recipe(name: str) -> None:
    cfg = load(name)
    advanced = 'convnext-l' in name
    optimizer = cfg['optim_wrapper']['optimizer']
    if advanced:
        assert (optimizer['type'], optimizer['lr'], optimizer['weight_decay']) == (
            'AdamW',
            4e-5,
            0.05,
        )
    else:
        assert optimizer == dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4)
    (decay,) = cfg['param_scheduler']
    assert (decay['type'], decay['power'], decay['eta_min']) == ('PolyLR', 0.9, 0)
    assert (decay['begin'], decay['end']) == (0, cfg['train_cfg']['max_iters'])
    # Validated and saved ten times.
    tenth = cfg['train_cfg']['max_iters'] // 10
    assert cfg['train_cfg']['val_interval'] == tenth
    assert cfg['default_hooks']['checkpoint']['interval'] == tenth
    assert 4 * cfg['train_dataloader']['batch_size'] == 16
    steps = cfg['train_dataloader']['dataset']['pipeline']
    # The plain recipe changes the brightness alone, on Cityscapes nothing.
    distorted = [s for s in steps if s['type'] == 'PhotoMetricDistortion']
    assert any('contrast_range' not in s for s in distorted) == advanced
    crop = tuple(map(int, name.rsplit('-', 1)[1].split('x')))
    assert [tuple(s['crop_size']) for s in steps if s['type'] == 'RandomCrop'] == [crop]
    assert tuple(cfg['model']['data_preprocessor']['size']) == crop
    assert str(cfg['model']).count('SyncBN') >= 1
    assert "'type': 'BN'" not in str(cfg['model'])
    assert (cfg['model'].get('auxiliary_head') is not None) == ('aux-sfpn' in name)
    # MF of the tables: six scales, each flipped.
    scales, flips, *_ = cfg['tta_pipeline'][1]['transforms']
    assert [s['scale_factor'] for s in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [f['prob'] for f in flips] == [0.0, 1.0]


def test_iterations() -> None:
    found = {name: load(name)['train_cfg']['max_iters'] // 1000 for name in NAMES}
    ablations = [n for n in NAMES if '_r50' in n and '_scratch_' not in n]
    assert {found[name] for name in ablations} == {30}
    assert {found[name] for name in NAMES if 'swin-l' in name} == {40}
    strongest = {n: k for n, k in found.items() if 'convnext-l' in n}
    assert {k for n, k in strongest.items() if 'cityscapes' not in n} == {40}
    assert strongest['hfgd_convnext-l_4xb4-60k_cityscapes-513x1025'] == 60
    assert strongest['hfgd-os2_convnext-l_4xb4-80k_cityscapes-513x1025'] == 80


@pytest.mark.parametrize('backbone', ['swin', 'convnext'])
def test_norms_positions_and_scales_do_not_decay(backbone: str) -> None:
    backbones = {
        'swin': dict(
            type='SwinTransformer', embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
        ),
        'convnext': dict(
            type='mmpretrain.ConvNeXt',
            arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 32, 64]),
            out_indices=[0, 1, 2, 3],
            gap_before_final_norm=False,
        ),
    }
    head = dict(
        type='HFGDHead', in_channels=[8, 16, 32, 64], channels=8, num_classes=3,
        encoder=dict(type='ContextAugmentedEncoder', wide_channels=8, attention_channels=8),
        norm_cfg=dict(type='BN'),
    )  # fmt: skip
    cfg = dict(type='EncoderDecoder', backbone=backbones[backbone], decode_head=head)
    read('configs/hfgd/hfgd_convnext-l_4xb4-40k_ade20k-641x641.py')  # imports mmpretrain
    model = MODELS.build(dict(cfg, train_cfg={}, test_cfg=dict(mode='whole')))
    schedule = Config.fromfile(BASE / 'schedules/schedule_40k_adamw_wd0.05.py')
    groups = build_optim_wrapper(model, schedule.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    free = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    found = {id(p): decay[id(p)] for p in model.parameters()}
    assert {found[key] for key in free} == {0.0}
    others = {n: found[id(p)] for n, p in model.named_parameters() if id(p) not in free}
    tables = {n for n in others if n.endswith(('.gamma', 'relative_position_bias_table'))}
    assert tables
    assert {n for n, value in others.items() if value == 0.0} == tables
    assert set(others.values()) == {0.0, 0.05}


# --- bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'other', 'distorted'),
    [
        ('pascal_context_59_513x513_photometric', 'pascal_context_59_513x513', True),
        ('coco-stuff10k_513x513_photometric', 'coco-stuff10k_513x513', True),
        ('coco-stuff164k_513x513_photometric', 'coco-stuff164k_513x513', True),
        ('cityscapes_513x1025_plain', 'cityscapes_513x1025', False),
    ],
)
def test_data_differ_in_photometric_distortion_alone(
    name: str, other: str, distorted: bool
) -> None:
    ours, theirs = (copy.deepcopy(plain(BASE / f'datasets/{n}.py')) for n in (name, other))
    assert ours['train_pipeline'] == ours['train_dataloader']['dataset']['pipeline']
    with_it = ours if distorted else theirs
    step = dict(type='PhotoMetricDistortion')
    for steps in (with_it['train_pipeline'], with_it['train_dataloader']['dataset']['pipeline']):
        if step in steps:
            # Behind the flip, in front of packing.
            assert steps[-2] == step
            steps.remove(step)
    assert ours == theirs


@pytest.mark.stack
def test_ade20k_is_mmsegs_of_640_with_a_pixel_more() -> None:
    theirs = Path(mmseg.__file__).parent / '.mim/configs/_base_/datasets/ade20k_640x640.py'
    ours, theirs = plain(BASE / 'datasets/ade20k_641x641.py'), copy.deepcopy(plain(theirs))
    theirs['crop_size'] = (641, 641)
    for steps in (theirs['train_pipeline'], theirs['train_dataloader']['dataset']['pipeline']):
        for step in steps:
            if step['type'] == 'RandomCrop':
                step['crop_size'] = (641, 641)
    assert ours == theirs


def test_models_differ_in_their_backbones() -> None:
    models = {
        n: plain(BASE / f'models/hfgd_{n}.py')['model'] for n in ('r50', 'swin-l', 'convnext-l')
    }
    heads = {name: model['decode_head'] for name, model in models.items()}
    assert heads['r50'].pop('in_channels') == [256, 512, 1024, 2048]
    large = [heads[n].pop('in_channels') for n in ('swin-l', 'convnext-l')]
    assert large == [[192, 384, 768, 1536]] * 2
    assert heads['r50'] == heads['swin-l'] == heads['convnext-l']
    for name, other in (('swin-l', 'caa_swin-l-jpu'), ('convnext-l', 'caa_convnext-l-jpu')):
        theirs = plain(BASE / f'models/{other}.py')['model']['backbone']
        assert differing(models[name]['backbone'], theirs) == {'out_indices'}
    usual = plain(BASE / 'models/fcn_r50-d8.py')['model']
    for key in ('pretrained', 'data_preprocessor'):
        assert models['r50'][key] == usual[key]
    assert differing(models['r50']['backbone'], usual['backbone']) == {'strides', 'dilations'}


# --- counts --------------------------------------------------------------------------------------


def counts(stem: str) -> tuple[int, int]:
    metadata = METADATA[stem]['Metadata']
    return metadata['Parameters'], metadata['FLOPs']


def table_9() -> dict[str, float]:
    """Multiply-adds with CAR merged, by the paper's number of G."""
    linear = 512 * 512
    car = {model['Name']: model for model in models_of('configs/car/metafile.yaml')}
    dilated = car[f'sa_r50-d8_car_{CONTEXT}']['Metadata']['FLOPs']
    return {
        '158.96': dilated - linear * 65 * 65,
        '45.65': counts(context('sfpn_r50'))[1],
        '71.63': counts(context('hfgd_r50'))[1] - linear * 17 * 17,
        '153.62': counts(context('hfgd-os2_r50'))[1] - linear * 17 * 17,
    }


def test_costs_are_to_each_other_as_published() -> None:
    _, sfpn, hfgd, half = table_9().items()
    for (said, found), (base_said, base) in ((hfgd, sfpn), (half, hfgd)):
        ratio, published = found / base, float(said) / float(base_said)
        assert ratio == pytest.approx(published, rel=0.1)
        assert f'{ratio:.2f} times' in README
        assert f'(paper: {published:.2f})' in README


def test_readme_has_the_costs_of_table_9() -> None:
    table = README.partition('### Table 9')[2].partition('###')[0]
    rows = re.findall(r'\| (\d+\.\d+) \| (\d+\.\d+) \| (\d+\.\d+) \| \[', table)
    assert rows == [(k, f'{v / 1e9:.2f}', f'{v / 2**30:.2f}') for k, v in table_9().items()]


def test_guidance_costs_nothing_at_test() -> None:
    for head in ('sfpn_r50', 'sfpn_r50_cae'):
        assert counts(context(head))[1] == counts(context(f'hfgd-{head}_guidance'))[1]
    # Query, key and value of 256 channels; two passes of two products each.
    cells = 129 * 129
    axial = 3 * 256 * 256 * cells + 2 * 2 * 256 * cells * 129
    for less, more in (
        ('sfpn_r50', 'hfgd-sfpn_r50_aa'),
        ('hfgd-sfpn_r50_guidance', 'hfgd-sfpn_r50'),
        ('usfpn_r50_cae', 'hfgd_r50'),
        ('upernet_r50', 'hfgd-upernet_r50'),
    ):
        assert counts(context(more))[1] - counts(context(less))[1] == axial
    assert f'{axial / 1e9:.2f} at output stride 4' in README


def test_readme_has_the_costs() -> None:
    table = README.partition('## Parameters and FLOPs')[2].partition('```')[0]
    rows = re.findall(r'\| (\d+\.\d+) M \| (\d+\.\d+) G \| (\d+) x (\d+) \|', table)
    expected = {
        (f'{params / 1e6:.2f}', f'{flops / 1e9:.2f}', *name.rsplit('-', 1)[1].split('x'))
        for name in NAMES
        for params, flops in [counts(name)]
        # Of the same model: other data, other lengths.
        if 'coco-stuff' not in name
    }
    assert set(rows) == expected


# --- small models --------------------------------------------------------------------------------

SMALL = {'camvid': '1xb16-4k_camvid-360x480', 'fusion_shapes': '1xb4-1k_fusion-shapes-128x128'}
SMALL_STEPS = [
    ('sfpn_r18', 'hfgd-sfpn_r18_guidance', {GUIDANCE}),
    ('sfpn_r18', 'hfgd-sfpn_r18_aa', {AXIAL}),
    ('sfpn_r18', 'hfgd-sfpn_r18', {GUIDANCE, AXIAL}),
    ('hfgd-sfpn_r18', 'hfgd_r18', {USFPN, ENCODER, *CAR}),
]


@pytest.mark.parametrize('folder', SMALL)
@pytest.mark.parametrize(('less', 'more', 'switches'), SMALL_STEPS, ids=lambda x: x if x else None)
def test_small_models_differ_in_the_switches_alone(
    folder: str, less: str, more: str, switches: set[str]
) -> None:
    names = [f'{name}_{SMALL[folder]}' for name in (less, more)]
    ours, theirs = (content(name, folder) for name in names)
    assert differing(ours, theirs) == switches
    assert not ours['model']['pretrained']
    readme = (CONFIGS / folder / 'README.md').read_text(encoding='utf-8')
    assert all(f'(./{name}.py)' in readme for name in names)


@pytest.mark.stack
@pytest.mark.parametrize('name', ['sfpn_r18', 'hfgd_r18'])
def test_small_models_give_logits_of_odd_images(name: str) -> None:
    cfg = content(f'{name}_{SMALL["fusion_shapes"]}', 'fusion_shapes')['model']
    model = MODELS.build(cfg).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 65, 97), mode='tensor').shape == (1, 8, 17, 25)


# --- page ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('cls', [HFGDHead, USFPNHead, ContextAugmentedEncoder])
def test_page_has_the_arguments_and_defaults(cls: type) -> None:
    # The table behind the class' name.
    section = re.split(rf'`{cls.__name__}`[^|`]*:\n', PAGE)[1].lstrip('\n').split('\n\n')[0]
    table = dict(re.findall(r'^\| `(\w+)` \| `(.+?)` \|', section, re.MULTILINE))
    parameters = inspect.signature(cls).parameters.values()
    own = {p.name: p.default for p in parameters if p.default is not p.empty}
    if cls is USFPNHead:
        del own['channels']  # HFGDHead's
    for name, default in table.items():
        kind = re.match(r'dict\((.*)\)$', default)
        value = dict(re.findall(r"(\w+)='(\w+)'", kind[1])) if kind else ast.literal_eval(default)
        assert value == own.pop(name)
    assert not own


@pytest.fixture
def my_head():
    @MODELS.register_module(name='MyHead')
    class MyHead(FCNHead):
        """As a project of its own would write it."""

        def __init__(self, my_option: int, **kwargs: Any) -> None:
            super().__init__(input_transform='resize_concat', num_convs=my_option, **kwargs)

    yield
    MODELS.module_dict.pop('MyHead')


EXAMPLES = [
    block
    for text in (PAGE, README)
    for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    if 'HFGDHead' in block
]


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize('block', EXAMPLES, ids=['hfgd', 'upernet', 'my-head', 'readme'])
def test_example_trains_a_step(block: str, my_head: None) -> None:
    block = block.replace(", 'my_project'", '')
    head = for_a_cpu(Config.fromstring(block, '.py').model.decode_head.to_dict())
    assert head.pop('_delete_')
    torch.manual_seed(0)
    model = MODELS.build(head)
    levels = [
        torch.rand(2, c, 16 // s, 16 // s, requires_grad=True)
        for c, s in zip(head['in_channels'], (1, 2, 4, 8))
    ]
    losses = model.loss(levels, toy_samples(head['num_classes'], (32, 32)), {})
    assert {name for name in losses if 'loss' in name} == {'loss_ce', 'teacher_loss_ce'}
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # The backbone learns from its last level.
    assert levels[-1].grad.abs().sum() > 0
    assert all(x.grad is None or not x.grad.any() for x in levels[:-1])
