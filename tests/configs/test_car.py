"""CAR's configs: every row of the thesis' tables 4.1 to 4.8, and nothing else than its row says."""

from __future__ import annotations

import copy
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from mmseg.registry import MODELS

from ..testers.toys import segmentor_config, toy_samples
from .files import BASE, CONFIGS, models_of, plain, read

FOLDER = CONFIGS / 'car'
CONTEXT = '4xb4-30k_pascal-context-59-513x513'
STUFF = '4xb4-30k_coco-stuff10k-513x513'

# Thesis table 4.5: Pascal Context without and with CAR, COCO-Stuff 10k without and with, and
# whether the last has the sign § for a smaller margin between centres.
TABLE_4_5 = {
    'fcn_r50-d8': (47.72, 48.40, 34.10, 34.91, True),
    'fcn_r101-d8': (50.93, 51.39, 35.93, 36.88, True),
    'deeplabv3_r50-d8': (48.59, 49.53, 34.96, 35.13, False),
    'deeplabv3_r101-d8': (51.69, 52.58, 36.92, 37.39, False),
    'sa_r50-d8': (48.32, 50.50, 34.35, 36.58, True),
    'sa_r101-d8': (51.59, 52.49, 36.53, 38.15, False),
    'ccnet_r50-d8': (49.15, 49.56, 35.10, 36.39, False),
    'ccnet_r101-d8': (51.41, 51.97, 36.88, 37.56, False),
    'danet_r101-d8': (51.45, 52.57, 35.80, 37.47, False),
    'cpnet_r101-d8': (51.29, 51.98, 36.92, 37.12, True),
    'ocrnet_hr48': (54.37, 54.99, 38.22, 39.53, False),
    'upernet_swin-t': (49.62, 50.78, 36.07, 36.63, True),
    'upernet_swin-l': (57.48, 58.97, 44.25, 44.88, False),
    'caa_efficientnet-b5-d8': (57.79, 58.96, 43.40, 43.93, False),
    'caa_swin-l-jpu': (58.31, 59.84, 44.22, 45.48, False),
    'caa_convnext-l-jpu': (60.48, 61.40, 46.49, 46.70, False),
}
# Tables 4.1, 4.2, 4.3 and 4.8 on Pascal Context, for the two models: the part of the name between
# model and schedule, and what model.car says beyond the model's own row of table 4.5.
ABLATED = ('sa_r50-d8', 'upernet_swin-t')
INTRA = dict(inter_c2c_weight=0.0, inter_c2p_weight=0.0)
INTRA_C2C = dict(inter_c2p_weight=0.0)
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    'conv1x1': (dict(linear=False), None),
    'car-intra-3x3': (dict(kernel_size=3), INTRA),
    'car-intra-c2c-3x3': (dict(kernel_size=3), INTRA_C2C),
    'car-3x3': (dict(kernel_size=3), {}),
    'car-intra': ({}, INTRA),
    'car-intra-c2c': ({}, INTRA_C2C),
    'car-ma08': ({}, dict(moving_average=0.8, channels=512)),
    'car-ma09': ({}, dict(moving_average=0.9, channels=512)),
    'car-ma099': ({}, dict(moving_average=0.99, channels=512)),
    'car-image-centers': ({}, dict(centers='image')),
}
SEEDS = [f'{variant}seed{seed}' for variant in ('', 'car-') for seed in range(3)]
# Tables 4.6 and 4.7: what stands in no other table.
ADVANCED = [
    f'caa_swin-l-jpu_car_adamw_{CONTEXT}',
    f'caa_convnext-l-jpu_car_adamw_{CONTEXT}',
    f'caa_convnext-l-jpu_car_adamw-aux_{CONTEXT}',
    f'caa_convnext-l-jpu_car_adamw-aux_{CONTEXT.replace("30k", "40k")}',
    f'caa_convnext-l-jpu_car_adamw_{STUFF}',
    f'caa_convnext-l-jpu_car_adamw-aux_{STUFF}',
]
# Section 4.4.2.3: what stands in no table, and what changes in the decode head.
DETAILS = {
    'sa_r50-d8_car-256': dict(channels=256, attention_channels=512),
    'upernet_swin-t_car-ppm1x1': dict(type='PointwiseUPerHead'),
    'upernet_swin-l_car-ppm1x1': dict(type='PointwiseUPerHead'),
}
# The authors' code: cap on the width and cells that are averaged, where not 512 and 1.
OPTIONS = {
    'deeplabv3': dict(channels=256),
    'caa': dict(channels=256),
    'ocrnet': dict(pool=2),
    'upernet': dict(pool=2),
}
PAIRED = [
    *(f'{m}_car_{d}' for m, d in product(TABLE_4_5, (CONTEXT, STUFF))),
    *(f'{m}_{v}_{CONTEXT}' for m, v in product(ABLATED, ABLATIONS)),
    *(f'{m}_car-seed{s}_{CONTEXT}' for m, s in product(ABLATED, range(3))),
]


def load(stem: str) -> dict[str, Any]:
    return read(f'configs/car/{stem}.py').to_dict()


def baseline_of(stem: str) -> str:
    """The config of the same model and schedule that has nothing between their names."""
    return '_'.join(stem.split('_')[:2] + stem.rsplit('_', 2)[1:])


def flat(value: Any, key: str = '') -> dict[str, Any]:
    """Leaves of a config by their dotted names; a list is a leaf where it is empty."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    else:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in items:
        found.update(flat(item, f'{key}.{name}' if key else str(name)))
    return found


def changed(stem: str, other: str) -> set[str]:
    """Names of the leaves in which two configs differ."""
    ours, theirs = flat(load(stem)), flat(load(other))
    missing = object()
    keys = ours.keys() | theirs.keys()
    return {key for key in keys if ours.get(key, missing) != theirs.get(key, missing)}


def test_every_row_has_its_config() -> None:
    rows = [f'{m}{v}_{d}' for m, v, d in product(TABLE_4_5, ('', '_car'), (CONTEXT, STUFF))]
    rows += [f'{m}_{v}_{CONTEXT}' for m, v in product(ABLATED, [*ABLATIONS, *SEEDS])]
    rows += ADVANCED
    rows += [f'{m}_{CONTEXT}' for m in DETAILS]
    assert len(rows) == len(set(rows)) == 105
    assert {path.stem for path in FOLDER.glob('*.py')} == set(rows)


@pytest.mark.parametrize('stem', PAIRED)
def test_differs_from_the_baseline_in_the_segmentor_alone(stem: str) -> None:
    keys = changed(stem, baseline_of(stem))
    allowed = ('model.type', 'model.car')
    allowed += ('randomness.',) if '-seed' in stem else ()
    assert 'model.type' in keys
    assert not [key for key in keys if not key.startswith(allowed)]
    assert load(stem)['model']['type'] == 'CAREncoderDecoder'


@pytest.mark.parametrize(('model', 'data'), product(TABLE_4_5, (CONTEXT, STUFF)))
def test_options_of_table_4_5(model: str, data: str) -> None:
    car = dict(OPTIONS.get(model.split('_')[0], {}))
    if data == STUFF and TABLE_4_5[model][-1]:
        car['loss'] = dict(type='ClassAwareRegularization', inter_c2c_margin=0.25)
    assert load(f'{model}_car_{data}')['model']['car'] == car


@pytest.mark.parametrize(('model', 'variant'), product(ABLATED, ABLATIONS))
def test_options_of_the_ablations(model: str, variant: str) -> None:
    options, loss = ABLATIONS[variant]
    car = {**OPTIONS.get(model.split('_')[0], {}), **options}
    if loss is None:
        car['loss'] = None
    elif loss:
        car['loss'] = dict(type='ClassAwareRegularization', **loss)
    assert load(f'{model}_{variant}_{CONTEXT}')['model']['car'] == car


@pytest.mark.parametrize('model', DETAILS)
def test_details_change_one_convolution(model: str) -> None:
    stem, with_car = f'{model}_{CONTEXT}', f'{model.rpartition("-")[0]}_{CONTEXT}'
    head = load(stem)['model']['decode_head']
    assert {key: head[key] for key in DETAILS[model]} == DETAILS[model]
    assert changed(stem, with_car) == {f'model.decode_head.{key}' for key in DETAILS[model]}
    sizes = [
        {n: p.shape for n, p in head_on_meta(s).named_parameters() if p.dim() == 4}
        for s in (stem, with_car)
    ]
    differ = {n for n in sizes[0] if sizes[0][n] != sizes[1][n]}
    if 'ppm' in model:
        assert differ == {'bottleneck.conv.weight'}
        assert sizes[0]['bottleneck.conv.weight'][2:] == (1, 1)
    else:
        # The classifier takes what the last convolution gives.
        assert differ == {'out_conv.project.conv.weight', 'conv_seg.weight'}
        assert sizes[0]['out_conv.project.conv.weight'] == (256, 512, 1, 1)
        assert sizes[0]['out_conv.linear.weight'] == (512, 512, 1, 1)


def head_on_meta(stem: str) -> torch.nn.Module:
    model = load(stem)['model']
    # Swin's drop path reads numbers, which nothing on meta has; its head alone will do.
    swin = model['backbone']['type'] == 'SwinTransformer'
    with torch.device('meta'):
        if swin:
            return MODELS.build(model['decode_head'])
        return MODELS.build(dict(model, pretrained=None)).decode_head


@pytest.mark.parametrize(('model', 'car', 'seed'), product(ABLATED, (False, True), range(3)))
def test_seeds_differ_in_randomness_alone(model: str, car: bool, seed: int) -> None:
    stem = f'{model}_{"car-" if car else ""}seed{seed}_{CONTEXT}'
    reference = f'{model}{"_car" if car else ""}_{CONTEXT}'
    assert changed(stem, reference) == {'randomness.seed', 'randomness.deterministic'}
    assert load(stem)['randomness'] == dict(seed=seed, deterministic=True)


@pytest.mark.stack
@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.py')), ids=lambda p: p.stem)
def test_recipe(path: Path) -> None:
    # Section 4.4.1; weight decay of the authors' configs.
    cfg, adam = load(path.stem), '_adamw' in path.stem
    optimizer = cfg['optim_wrapper']['optimizer']
    if adam:
        assert (optimizer['type'], cfg['param_scheduler'][0]['type']) == ('AdamW', 'LinearLR')
    else:
        # The flagship rows have the authors' form of it: tests/configs/test_authors_recipe.py.
        decay = 2e-4 if re.match(r'sa_\S+pascal-context', path.stem) else 1e-4
        assert optimizer == dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=decay)
    decay = cfg['param_scheduler'][-1]
    iterations = 40000 if '-40k_' in path.stem else 30000
    assert (decay['type'], decay['power'], decay['eta_min']) == ('PolyLR', 0.9, 0)
    assert decay['end'] == cfg['train_cfg']['max_iters'] == iterations
    loader = cfg['train_dataloader']
    assert loader['batch_size'] == 4
    crops = [s['crop_size'] for s in loader['dataset']['pipeline'] if s['type'] == 'RandomCrop']
    assert crops == [(513, 513)]
    assert cfg['model']['data_preprocessor']['size'] == (513, 513)
    heads = cfg['model']['decode_head']
    heads = heads if isinstance(heads, list) else [heads]
    assert {head['norm_cfg']['type'] for head in heads} == {'SyncBN'}
    # No auxiliary loss but what OCR and CPNet are made of, and where the row has one.
    assert (cfg['model'].get('auxiliary_head') is not None) == ('-aux_' in path.stem)
    assert [head['loss_decode']['loss_weight'] for head in heads[:-1]] == [0.4] * (len(heads) - 1)
    assert len(heads) == (2 if 'ocrnet' in path.stem else 1)
    assert ('loss_prior_decode' in heads[-1]) == ('cpnet' in path.stem)


@pytest.mark.parametrize('stem', ADVANCED)
def test_advanced_recipes_change_optimizer_and_auxiliary_loss(stem: str) -> None:
    same = stem.replace('_adamw-aux', '').replace('_adamw', '').replace('40k', '30k')
    allowed = ('optim_wrapper', 'optimizer', 'param_scheduler', 'train_cfg', 'model.auxiliary')
    keys = {key for key in changed(stem, same) if not key.startswith(allowed)}
    assert not keys
    if '40k' in stem:
        longer = changed(stem, stem.replace('40k', '30k'))
        assert longer == {'param_scheduler.1.end', 'train_cfg.max_iters'}


# --- bases that MMSegmentation does not have ------------------------------------------------------


def test_models_are_the_usual_one_with_another_head() -> None:
    usual = plain(BASE / 'models/fcn_r50-d8.py')
    for name, head in (('sa', 'SAHead'), ('cpnet', 'CPHead')):
        found = plain(BASE / f'models/{name}_r50-d8.py')
        ours, theirs = found['model'].pop('decode_head'), dict(usual['model'])
        # Made for crops of a multiple of 8 plus one.
        assert ours['align_corners']
        assert found['model']['auxiliary_head'].pop('align_corners')
        theirs['auxiliary_head'] = dict(theirs['auxiliary_head'])
        assert not theirs['auxiliary_head'].pop('align_corners')
        shared = theirs.pop('decode_head').keys() & ours.keys()
        assert found['model'] == theirs
        assert (ours['type'], ours['channels']) == (head, 512)
        assert {'in_channels', 'in_index', 'dropout_ratio', 'loss_decode'} <= shared


def test_jpu_takes_the_levels_of_both_backbones() -> None:
    swin, convnext = (
        plain(BASE / f'models/caa_{name}-l-jpu.py')['model'] for name in ('swin', 'convnext')
    )
    width = swin['backbone'].pop('embed_dims')
    assert (width, convnext.pop('backbone')['arch']) == (192, 'large')
    assert swin['neck']['in_channels'] == (2 * width, 4 * width, 8 * width)
    assert swin['decode_head']['in_channels'] == 4 * swin['neck']['mid_channels']
    assert tuple(swin.pop('backbone')['out_indices']) == (1, 2, 3)
    assert swin == convnext


def test_schedules() -> None:
    def without_iterations(name: str, thousand: int) -> dict[str, Any]:
        leaves = flat(plain(BASE / f'schedules/{name}.py'))
        return {k: v for k, v in leaves.items() if v not in (thousand * 1000, thousand * 100)}

    found = without_iterations('schedule_30k_wd1e-4', 30)
    assert found == without_iterations('schedule_40k_wd1e-4', 40)
    assert not {'train_cfg.max_iters', 'param_scheduler.0.end'} & found.keys()

    adamw, long = (plain(BASE / f'schedules/schedule_{n}k_adamw.py') for n in (30, 160))
    for schedule in (adamw, long):
        schedule['optim_wrapper']['paramwise_cfg'].pop('custom_keys')
    assert adamw['optim_wrapper'] == long['optim_wrapper']
    assert adamw['param_scheduler'][0] == long['param_scheduler'][0]


# --- metafile and README -------------------------------------------------------------------------

METADATA = {model['Name']: model for model in models_of('configs/car/metafile.yaml')}
README = (FOLDER / 'README.md').read_text(encoding='utf-8')


def miou(stem: str) -> float:
    return METADATA[stem]['Results']['Metrics']['mIoU']


def test_metafile_has_table_4_5() -> None:
    for model, row in TABLE_4_5.items():
        stems = [f'{model}{v}_{d}' for d, v in product((CONTEXT, STUFF), ('', '_car'))]
        assert tuple(miou(stem) for stem in stems) == row[:4]
        assert {METADATA[stem]['Results']['Source'] for stem in stems} == {'thesis, table 4.5'}


def test_readme_has_the_metafiles_numbers() -> None:
    links = re.findall(r'\[(\d+\.\d+)\]\(\./(\S+)\.py\)', README)
    # Section 4.4.2.3 gives a gain of 0.5 to 1.0 for UPerNet and no mIoU.
    gains = re.findall(r'\[0\.5 to 1\.0 more\]\(\./(\S+)\.py\)', README)
    assert set(gains) == {stem for stem in METADATA if 'Results' not in METADATA[stem]}
    assert set(gains) == {f'{model}_{CONTEXT}' for model in DETAILS if 'ppm' in model}
    assert {stem for _, stem in links} == set(METADATA) - set(gains)
    assert not [stem for number, stem in links if float(number) != miou(stem)]
    # SS with its link, then MF.
    for stem, number in re.findall(r'\./(\S+)\.py\) \| (\d+\.\d+) \|$', README, re.MULTILINE):
        assert METADATA[stem]['Results']['Metrics']['mIoU(ms+flip)'] == float(number)


def test_readme_has_the_differences_of_table_4_5() -> None:
    number, difference = r'\[([\d.]+)\]\(\S+\)(?: §)?', r'([+-][\d.]+)'
    half = rf'\| {number} \| {number} \| {difference} '
    rows = re.findall(rf'{half}{half}\|\n', README)
    assert len(rows) == len(TABLE_4_5)
    for row in rows:
        for without, with_car, printed in (row[:3], row[3:]):
            assert f'{float(with_car) - float(without):+.2f}' == printed
    # The signs stand at their numbers.
    signed = re.findall(r'\./(\S+?)_car_\S+\.py\) §', README)
    assert signed == [model for model, row in TABLE_4_5.items() if row[-1]]


# Input and output of the replaced convolution, width of the features, cells, number of layers.
REPLACED = {
    'fcn': (512, 512, 512, 65**2, 1),
    'deeplabv3': (1280, 256, 256, 65**2, 1),
    'sa': (512, 512, 512, 65**2, 1),
    'ccnet': (2560, 512, 512, 65**2, 1),
    'danet': (512, 512, 512, 65**2, 2),
    'cpnet': (3072, 512, 512, 64**2, 1),
    'ocrnet': (1024, 512, 512, 129**2, 1),
    'upernet': (2048, 512, 512, 129**2, 1),
    'caa_efficientnet-b5-d8': (1024, 256, 256, 65**2, 1),
    'caa_swin-l-jpu': (1024, 256, 256, 65**2, 1),
    'caa_convnext-l-jpu': (1024, 256, 256, 64**2, 1),  # ConvNeXt's stem drops what is left over
}


def counts(stem: str) -> tuple[int, int]:
    metadata = METADATA[stem]['Metadata']
    return metadata['Parameters'], metadata['FLOPs']


def printed(params: int, flops: int) -> str:
    return f'{params / 1e6:.2f} M, {flops / 1e9:.2f} G'


@pytest.mark.parametrize('model', TABLE_4_5)
def test_readme_has_the_costs(model: str) -> None:
    key = model if model in REPLACED else model.split('_')[0]
    taken, given, width, cells, layers = REPLACED[key]
    params, flops = counts(f'{model}_car_{CONTEXT}')
    # Linear with its bias, and the 1x1 behind it, become one matrix.
    saved = layers * (taken * width + width * given - taken * given)
    merged = (params - saved - layers * width, flops - saved * cells)
    row = [printed(*counts(f'{model}_{CONTEXT}')), printed(params, flops), printed(*merged)]
    assert f'| {" | ".join(row)} |\n' in README
    if model in ABLATED:
        assert merged == counts(f'{model}_conv1x1_{CONTEXT}')


def test_readme_has_the_costs_of_table_4_4() -> None:
    stems = [f'sa_r50-d8{v}_{CONTEXT}' for v in ('', '_conv1x1', '_car', '_car-3x3')]
    flops = [counts(stem)[1] for stem in stems]
    assert flops[0] - flops[1] == 8 * 512 * 512 * 65 * 65
    table = README.partition('### Table 4.4')[2].partition('###')[0]
    cells = re.findall(r'(\d+\.\d+)(?: merged, (\d+\.\d+) before)? \|\n', table)
    assert [tuple(filter(None, row)) for row in cells] == [
        (f'{flops[0] / 2**30:.2f}',),
        (f'{flops[1] / 2**30:.2f}',),
        (f'{flops[1] / 2**30:.2f}', f'{flops[2] / 2**30:.2f}'),
        (f'{flops[3] / 2**30:.2f}',),
    ]
    # The unit of the thesis.
    assert (flops[0] - flops[1]) / 2**30 == pytest.approx(167.21 - 158.96, abs=0.005)


def forms() -> dict[str, dict]:
    """One config for every form that `model.car` has in the folder."""
    found: dict[str, dict] = {}
    for path in sorted(FOLDER.glob('*.py')):
        car = load(path.stem)['model'].get('car')
        if car is not None:
            found.setdefault(json.dumps(car, sort_keys=True), (path.stem, car))
    return dict(found.values())


@pytest.mark.parametrize('stem', forms())
def test_every_form_trains_a_step(stem: str) -> None:
    """On a backbone of toy size: the models themselves train in test_models.py."""
    car = forms()[stem]
    head = dict(
        type='FCNHead', in_channels=64, in_index=3, channels=16, num_convs=1, concat_input=False,
        num_classes=5, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    cfg = dict(segmentor_config(head).model, type='CAREncoderDecoder', car=copy.deepcopy(car))
    model = MODELS.build(cfg)
    losses = model.loss(torch.randn(2, 3, 64, 64), toy_samples(5, (64, 64)))
    total, log = model.parse_losses(losses)
    total.backward()
    given = (car.get('loss') or {}) if car.get('loss', True) is not None else None
    expected = set()
    if given is not None:
        names = ('intra_c2p', 'inter_c2c', 'inter_c2p')
        expected = {f'decode.loss_car_{n}' for n in names if given.get(f'{n}_weight', 1.0)}
    assert {key for key in log if 'car' in key} == expected
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
