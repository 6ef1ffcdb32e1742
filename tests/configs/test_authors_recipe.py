"""The recipe of the authors of CAR, CAA, HFGD and KSAC: who has it, and to which letter."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from ..testers.toys import segmentor_config
from .files import CONFIGS, TRAINABLE, read
from .test_models import for_a_cpu, heads

FOLDERS = ('car', 'caa', 'hfgd', 'ksac')
README = (CONFIGS / 'car/README.md').read_text(encoding='utf-8')
#: The rows whose every setting is the authors'.
FLAGSHIP = [
    f'configs/car/sa_r{depth}-d8{car}_4xb4-30k_pascal-context-59-513x513.py'
    for depth in (50, 101)
    for car in ('', '_car')
]
STEPS = [0.1 * step for step in range(5, 21)]


def of(*folders: str) -> list[str]:
    """Configs of these folders."""
    return [path for path in TRAINABLE if Path(path).parent.name in folders]


def values(cfg: Any, key: str, above: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted place, value) of every entry named ``key``."""
    if isinstance(cfg, dict):
        for name, value in cfg.items():
            if name == key:
                yield above, value
            yield from values(value, key, f'{above}.{name}')
    elif isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            yield from values(value, key, f'{above}.{i}')


def all_heads(cfg: Any) -> list[Any]:
    """Decode heads, and auxiliary ones."""
    auxiliary = cfg.model.get('auxiliary_head')
    return heads(cfg.model) + ([auxiliary] if auxiliary else [])


def training(cfg: Any) -> list[Any]:
    """The training pipeline; of the first set where several are joined."""
    data = cfg.train_dataloader.dataset
    while 'datasets' in data:
        data = data.datasets[0]
    return data.pipeline


# --- every config --------------------------------------------------------------------------------


@pytest.mark.parametrize('path', of(*FOLDERS), ids=lambda p: Path(p).stem)
def test_corners_are_aligned(path: str) -> None:
    cfg = read(path)
    found = list(values(cfg.model.to_dict(), 'align_corners'))
    assert [place for place, value in found if value is not True] == []
    assert all('align_corners' in head for head in all_heads(cfg))
    # What makes it exact: crops of a multiple of the stride plus one.
    assert {side % 8 for side in cfg.model.data_preprocessor.size} == {1}


@pytest.mark.parametrize('path', of('car', 'hfgd'), ids=lambda p: Path(p).stem)
def test_heads_have_no_dropout_and_the_authors_eps(path: str) -> None:
    cfg = read(path)
    for head in all_heads(cfg):
        assert head.get('dropout_ratio', 0.1) == 0
        norms = [v for _, v in values(head.to_dict(), 'norm_cfg')]
        assert {(norm['type'], norm.get('eps')) for norm in norms} == {('SyncBN', 1e-3)}


@pytest.mark.parametrize('path', of('car', 'hfgd', 'caa'), ids=lambda p: Path(p).stem)
def test_grids_of_the_dilated_resnets(path: str) -> None:
    backbone = read(path).model.backbone
    if backbone.type != 'ResNetV1c':
        return
    last = backbone.dilations[-1]
    conflict = 'dual-attention' in path or 'caa/danet' in path  # MMSegmentation's DANet
    grids = None if last == 1 or conflict else tuple(last * rate for rate in (1, 2, 4))
    assert backbone.get('multi_grid') == grids


@pytest.mark.parametrize(
    'path',
    [p for p in of('car', 'caa', 'hfgd') if '-513x513' in p],
    ids=lambda p: Path(p).stem,
)
def test_data_of_the_crops_of_513(path: str) -> None:
    cfg = read(path)
    steps = {step.type: step for step in training(cfg)}
    names = ['LoadImageFromFile', 'LoadAnnotations', 'RandomChoice', 'RandomCrop', 'RandomFlip']
    if 'caa/' not in path:
        strongest = 'convnext-l' in path and 'hfgd/' in path
        place = 5 if strongest else 3
        names.insert(place, 'PhotoMetricDistortion')
        delta = steps['PhotoMetricDistortion'].get('brightness_delta', 32)
        assert delta == 32
        assert ('contrast_range' in steps['PhotoMetricDistortion']) == (not strongest)
    assert list(steps) == [*names, 'PackSegInputs']
    scales = [resize.scale_factor for (resize,) in steps['RandomChoice'].transforms]
    assert scales == pytest.approx(STEPS)
    assert dict(steps['RandomCrop']) == dict(type='RandomCrop', crop_size=(513, 513))
    assert tuple(cfg.model.data_preprocessor.test_cfg.size) == (513, 513)
    tests = [step.type for step in cfg.test_dataloader.dataset.pipeline]
    assert tests == ['LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs']
    assert cfg.model.test_cfg == dict(mode='whole')


# --- the flagship, line by line ------------------------------------------------------------------


def optimizer(cfg: Any) -> Any:
    return cfg.optim_wrapper.optimizer


def named(steps: list[Any], name: str) -> Any:
    return next(step for step in steps if step.type == name)


def norms(cfg: Any, key: str) -> set[Any]:
    found = (cfg.model.backbone.norm_cfg, cfg.model.decode_head.norm_cfg)
    return {norm.get(key) for norm in found}


#: Setting; the authors' value, of facts that their configs and library show; what ours holds.
AUTHORS: list[tuple[str, str, Any]] = [
    ('optimizer', 'SGD', lambda c: optimizer(c).type),
    ('momentum', '0.9', lambda c: optimizer(c).momentum),
    ('learning rate, of backbone and head', '0.01', lambda c: optimizer(c).lr),
    (
        'factors of the learning rate',
        'none',
        lambda c: [k for k, _ in values(c.optim_wrapper.to_dict(), 'lr_mult')] or 'none',
    ),
    (
        'decay of the learning rate',
        'poly 0.9 to 0, no warm-up',
        lambda c: ' + '.join(
            f'{s.type[:-2].lower()} {s.power} to {s.eta_min:g}, '
            f'{"no warm-up" if s.begin == 0 else f"from {s.begin}"}'
            for s in c.param_scheduler
        ),
    ),
    (
        'weight decay',
        "0.0002 (Keras' l2(0.0001))",
        lambda c: f"{optimizer(c).weight_decay} (Keras' l2({optimizer(c).weight_decay / 2}))",
    ),
    (
        'layers that decay',
        "the head's kernels but CAR's",
        lambda c: {
            ('backbone', 'out_conv.linear', 'out_conv.project', 0.0, 0.0): (
                "the head's kernels but CAR's"
            )
        }[
            (
                *sorted(
                    k
                    for k, v in c.optim_wrapper.paramwise_cfg.custom_keys.items()
                    if v.decay_mult == 0
                ),
                c.optim_wrapper.paramwise_cfg.norm_decay_mult,
                c.optim_wrapper.paramwise_cfg.bias_decay_mult,
            )
        ],
    ),
    ('iterations', '30000', lambda c: c.train_cfg.max_iters),
    ('batch', '16', lambda c: 4 * c.train_dataloader.batch_size),
    ('norm', 'SyncBN', lambda c: c.model.decode_head.norm_cfg.type),
    ('eps of the norms of the head', '0.001', lambda c: c.model.decode_head.norm_cfg.eps),
    (
        'momentum of the norms',
        "0.9997, PyTorch's 0.0003",
        lambda c: ' '.join(f"{1 - m:g}, PyTorch's {m:g}" for m in norms(c, 'momentum')),
    ),
    ('output stride', '8', lambda c: 4 * int(np.prod(c.model.backbone.strides))),
    (
        'dilations of the last stage',
        '4, 8, 16',
        lambda c: ', '.join(map(str, c.model.backbone.multi_grid)),
    ),
    ('dropout', 'none', lambda c: c.model.decode_head.dropout_ratio or 'none'),
    (
        'start of the classifier',
        "Xavier uniform, no bias (Keras' default)",
        lambda c: '{type} {distribution}, no bias (Keras\' default)'.format(
            **c.model.decode_head.init_cfg
        ) * (c.model.decode_head.init_cfg.override == dict(name='conv_seg')),
    ),
    (
        'resizing',
        'corners aligned',
        lambda c: 'corners aligned' * c.model.decode_head.align_corners,
    ),
    ('auxiliary loss', 'none', lambda c: c.model.get('auxiliary_head') or 'none'),
    (
        'crop',
        '513 x 513, plain',
        lambda c: '{} x {}, '.format(*named(training(c), 'RandomCrop').crop_size)
        + ('chosen' if 'cat_max_ratio' in named(training(c), 'RandomCrop') else 'plain'),
    ),
    (
        'scales',
        "0.5 to 2 in steps of 0.1 of the image's own size",
        lambda c: (
            lambda s: f'{s[0]:g} to {s[-1]:g} in steps of {np.diff(s).mean():g} '
            f"of the image's own size"
        )([r.scale_factor for (r,) in named(training(c), 'RandomChoice').transforms]),
    ),
    (
        'brightness',
        'half of the images, by up to 32 of 255',
        lambda c: 'half of the images, by up to '
        f'{named(training(c), "PhotoMetricDistortion").brightness_delta} of 255',
    ),
    ('flip', 'half of the images', lambda c: {0.5: 'half of the images'}[
        named(training(c), 'RandomFlip').prob
    ]),
    (
        'test',
        'whole image, scale 1, padded to 513 x 513',
        lambda c: f'{c.model.test_cfg.mode} image, scale '
        + ('1' if 'Resize' not in str(c.test_dataloader.dataset.pipeline) else 'changed')
        + ', padded to {} x {}'.format(*c.model.data_preprocessor.test_cfg.size),
    ),
]  # fmt: skip


@functools.cache
def dumped(path: str) -> Config:
    """A config dumped and read again: what a run leaves in its folder; not to be changed."""
    return Config.fromstring(read(path).pretty_text, '.py')


@pytest.mark.parametrize('path', FLAGSHIP, ids=lambda p: Path(p).stem)
@pytest.mark.parametrize(('name', 'theirs', 'ours'), AUTHORS, ids=[row[0] for row in AUTHORS])
def test_flagship_is_the_authors_recipe(path: str, name: str, theirs: str, ours: Any) -> None:
    assert str(ours(dumped(path))) == theirs


def test_readme_has_the_same_table() -> None:
    section = README.partition("### The authors' recipe")[2].partition('\n## ')[0]
    rows = re.findall(r'^\| ([^|]+?) \| ([^|]+?) \|$', section, re.MULTILINE)
    assert rows.pop(0)[0] == 'setting'
    assert rows == [row[:2] for row in AUTHORS]


@pytest.mark.parametrize('car', [False, True])
def test_weight_decay_reaches_the_authors_layers(car: bool) -> None:
    cfg = Config(for_a_cpu(read(FLAGSHIP[int(car)]).to_dict()))
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    assert {group['lr'] for group in groups} == {0.01}
    decays = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    found = {name for name, p in model.named_parameters() if decays[id(p)] == 2e-4}
    assert {decays[id(p)] for p in model.parameters()} == {0.0, 2e-4}
    attention = [n for n, _ in model.decode_head.attention.named_parameters() if 'weight' in n]
    expected = {f'decode_head.attention.{name}' for name in attention}
    assert len(expected) == 3  # query, key, value
    expected |= {'decode_head.in_conv.conv.weight', 'decode_head.conv_seg.weight'}
    if not car:
        expected.add('decode_head.out_conv.conv.weight')
    assert found == expected
    assert [block.conv2.dilation[0] for block in model.backbone.layer4] == [4, 8, 16]


@pytest.mark.parametrize('car', [False, True])
def test_only_the_classifier_starts_as_keras_has_it(car: bool) -> None:
    cfg = for_a_cpu(read(FLAGSHIP[int(car)]).to_dict())['model']
    cfg['backbone']['init_cfg'] = None
    starts = {}
    for own in (True, False):
        if not own:
            cfg['decode_head'].pop('init_cfg')
        model = MODELS.build(cfg)
        set_random_seed(0)
        model.decode_head.init_weights()
        starts[own] = model.decode_head.state_dict()
    weight, bias = (starts[True][f'conv_seg.{key}'] for key in ('weight', 'bias'))
    bound = (6 / (512 + 59)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not bias.any()
    # MMSegmentation's, which the other rows keep.
    assert starts[False]['conv_seg.weight'].std().item() == pytest.approx(0.01, rel=0.02)
    other = [name for name in starts[True] if 'weight' in name and 'conv_seg' not in name]
    for name in other:
        spread = [starts[own][name].std().item() for own in (True, False)]
        assert spread[0] == pytest.approx(spread[1], rel=0.05, abs=1e-6), name


# --- what the settings do ------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    files = [str(tmp_path / name) for name in ('image.png', 'label.png')]
    cv2.imwrite(files[0], rng.integers(40, 200, (30, 50, 3), dtype=np.uint8))
    cv2.imwrite(files[1], rng.integers(1, 60, (30, 50), dtype=np.uint8))
    return dict(img_path=files[0], seg_map_path=files[1], seg_fields=[], reduce_zero_label=True)


def test_training_pipeline_scales_in_steps_and_changes_brightness(photo: dict[str, Any]) -> None:
    init_default_scope('mmseg')
    steps = training(read(FLAGSHIP[0]))
    sizes = set()
    for seed in range(60):
        set_random_seed(seed)
        # In front of flip and packing.
        result = Compose(list(steps[:3]))(dict(photo))
        assert result['img'].shape[:2] == result['gt_seg_map'].shape
        sizes.add(result['img'].shape[:2])
    assert sizes == {(int(30 * s + 0.5), int(50 * s + 0.5)) for s in STEPS}
    changed = 0
    load = Compose(list(steps[:2]))
    brighten = Compose([steps[3]])
    for seed in range(60):
        np.random.seed(seed)
        before = load(dict(photo))
        after = brighten({**before, 'img': before['img'].copy()})['img'].astype(float)
        mean = (after - before['img']).mean()
        assert abs(mean) < 33
        changed += abs(mean) > 2
    assert 20 < changed < 40


def test_an_image_is_padded_for_the_test_and_the_result_is_not() -> None:
    """Through the data preprocessor: a Pad in the pipeline would stretch the result instead."""
    head = dict(
        type='FCNHead', in_channels=64, in_index=3, channels=8, num_convs=1, num_classes=5,
        concat_input=False, align_corners=True, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    cfg = segmentor_config(head).model
    cfg['data_preprocessor'] = dict(
        read(FLAGSHIP[0]).model.data_preprocessor.to_dict(), size=(65, 65),
        test_cfg=dict(size=(65, 65)),
    )  # fmt: skip
    model = MODELS.build(cfg).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sample = SegDataSample(metainfo=dict(ori_shape=(40, 50), img_shape=(40, 50)))
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    with torch.no_grad():
        (result,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
        (padded,) = seen
        logits = model.decode_head(model.backbone(padded))
    assert padded.shape[2:] == (65, 65)
    assert not padded[..., 40:, :].any()
    assert not padded[..., 50:].any()
    whole = torch.nn.functional.interpolate(logits, (65, 65), mode='bilinear', align_corners=True)
    expected = whole[0, :, :40, :50]
    torch.testing.assert_close(result.seg_logits.data, expected)
