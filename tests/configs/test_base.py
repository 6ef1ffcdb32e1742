"""configs/_base_ and the baselines hold the settings of MMSegmentation's own files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mmseg
import pytest
from mmseg.registry import MODELS

from .files import BASE, CONFIGS, plain, without_host

pytestmark = pytest.mark.stack

THEIRS = Path(mmseg.__file__).parent / '.mim' / 'configs'
OURS_ALONE = {
    # They draw on other files of mmseg, see below.
    'datasets/cityscapes_513x1025.py',
    'models/upernet_twins-svt.py',
    'schedules/schedule_160k_adamw.py',
    'schedules/schedule_160k_adamw-amp_layer-decay.py',
    # mmseg has nothing like these: tests/datasets and tests/configs/test_models.py.
    'datasets/camvid.py',
    'datasets/fusion_shapes.py',
    # CamVid from pretrained weights: tests/configs/test_lite0.py.
    'datasets/camvid_180x240.py',
    'models/lite0.py',
    'schedules/schedule_1k_pretrained.py',
    'models/r18-d8.py',
    'models/upernet_r18.py',
    # A quarter as wide as theirs: test_unet_is_theirs_at_a_quarter_of_the_width.
    'models/unet_s5-d16.py',
    'schedules/schedule_1k.py',
    'schedules/schedule_4k.py',
    # KSAC and its baselines: tests/configs/test_ksac.py.
    'datasets/ade20k_513x513.py',
    'datasets/cityscapes_769x769_ksac.py',
    'datasets/coco-voc12aug_513x513.py',
    'datasets/pascal_voc12_513x513.py',
    'datasets/pascal_voc12_aug_513x513.py',
    'models/deeplabv3plus_xception65-d16.py',
    'models/ksac_r50-d16.py',
    'models/ksac_xception65-d16.py',
    'schedules/schedule_300k_wd1e-4.py',
    # CAA: tests/configs/test_caa.py.
    'datasets/coco-stuff10k_513x513.py',
    'datasets/coco-stuff164k_513x513.py',
    'datasets/pascal_context_59_513x513.py',
    'models/caa_efficientnet-b7-d8.py',
    'models/caa_r101-d16.py',
    'schedules/schedule_40k_wd1e-4.py',
    # CAR's models and recipes: tests/configs/test_car.py.
    'models/caa_convnext-l-jpu.py',
    'models/caa_swin-l-jpu.py',
    'models/cpnet_r50-d8.py',
    'models/sa_r50-d8.py',
    'datasets/coco-stuff10k_513x513_brightness.py',
    'datasets/pascal_context_59_513x513_brightness.py',
    'schedules/schedule_30k_adamw.py',
    'schedules/schedule_30k_car.py',
    'schedules/schedule_30k_wd1e-4.py',
    # HFGD's models and recipes: tests/configs/test_hfgd.py.
    'datasets/ade20k_641x641.py',
    'datasets/cityscapes_513x1025_plain.py',
    'datasets/coco-stuff10k_513x513_photometric.py',
    'datasets/coco-stuff164k_513x513_photometric.py',
    'datasets/pascal_context_59_513x513_photometric.py',
    'models/hfgd_convnext-l.py',
    'models/hfgd_r50.py',
    'models/hfgd_swin-l.py',
    'schedules/schedule_40k_adamw_wd0.05.py',
    # ESeg and the DeepLabV3+ beside it: tests/configs/test_eseg.py.
    'datasets/cityscapes_1024x2048.py',
    'models/deeplabv3plus_efficientnet-b1-d16.py',
    'models/eseg-l.py',
    'models/eseg-lite-l.py',
    'models/eseg-lite-m.py',
    'models/eseg-lite-s.py',
    'models/eseg-m.py',
    'models/eseg-s.py',
    'schedules/schedule_80k_cosine-ema.py',
    'schedules/schedule_90k_cosine-ema.py',
    # GFF, its recipe, DenseASPP and WiderResNet-38: tests/configs/test_gff.py.
    'datasets/ade20k_512x512_gff.py',
    'datasets/cityscapes-trainval_864x864_gff.py',
    'datasets/cityscapes_864x864_gff.py',
    'datasets/coco-stuff10k_512x512_gff.py',
    'datasets/pascal_context_59_512x512_gff.py',
    'models/denseaspp_densenet121-d8.py',
    'models/gff_densenet121-d8.py',
    'models/gff_r50-d8.py',
    'models/gff_wrn38-d8.py',
    'schedules/schedule_100k_lr1e-3_wd1e-4.py',
    'schedules/schedule_150k_lr1e-3_wd1e-4.py',
}
NAMES = sorted(str(p.relative_to(BASE)) for p in BASE.rglob('*.py'))


def test_what_has_no_counterpart_is_listed() -> None:
    alone = {name for name in NAMES if not (THEIRS / '_base_' / name).is_file()}
    assert alone == OURS_ALONE


@pytest.mark.parametrize('name', [n for n in NAMES if n not in OURS_ALONE])
def test_same_as_mmseg(name: str) -> None:
    ours, theirs = plain(BASE / name), plain(THEIRS / '_base_' / name)
    # Ours stand in default_runtime.py, and beside it in the configs that need more.
    ours_imports, _ = ours.pop('custom_imports', None), theirs.pop('custom_imports', None)
    assert (ours_imports is not None) == (name == 'default_runtime.py')
    assert without_host(ours) == without_host(theirs)


def test_further_cityscapes_crop() -> None:
    crop, scale = (513, 1025), (2049, 1025)
    expected = plain(THEIRS / '_base_/datasets/cityscapes_769x769.py')

    def change(pipeline: list[dict[str, Any]]) -> None:
        for step in pipeline:
            if 'scale' in step:
                step['scale'] = scale
            if 'crop_size' in step:
                step['crop_size'] = crop

    expected['crop_size'] = crop
    # Own copies: plain() may give one list to the pipeline and to the dataset.
    expected = copy.deepcopy(expected)
    for pipeline in (
        expected['train_pipeline'],
        expected['test_pipeline'],
        *(expected[f'{s}_dataloader']['dataset']['pipeline'] for s in ('train', 'val', 'test')),
    ):
        change(pipeline)
    assert plain(BASE / f'datasets/cityscapes_{crop[0]}x{crop[1]}.py') == expected


def test_twins_model() -> None:
    ours = plain(BASE / 'models/upernet_twins-svt.py')['model']
    theirs = plain(THEIRS / 'twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512.py')['model']
    assert theirs['data_preprocessor'].pop('size') == (512, 512)  # of the dataset
    assert without_host(ours) == without_host(theirs)


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        (
            'schedule_160k_adamw.py',
            'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        ),
        ('schedule_160k_adamw.py', 'twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512.py'),
        (
            'schedule_160k_adamw-amp_layer-decay.py',
            'convnext/convnext-base_upernet_8xb2-amp-160k_ade20k-512x512.py',
        ),
    ],
)
def test_adamw_schedules(ours: str, theirs: str) -> None:
    our, their = plain(BASE / 'schedules' / ours), plain(THEIRS / theirs)
    keys = our['optim_wrapper']['paramwise_cfg'].pop('custom_keys', {})
    their_keys = their['optim_wrapper']['paramwise_cfg'].pop('custom_keys', {})
    assert our == {key: their[key] for key in our}
    assert their_keys == {key: keys[key] for key in their_keys}
    # The other family's keys do nothing.
    backbone = dict(their['model']['backbone'], init_cfg=None)
    names = [name for name, _ in MODELS.build(backbone).named_parameters()] if keys else []
    assert not [n for n in names for key in set(keys) - set(their_keys) if key in n]


COUNTERPARTS = {
    f'{name}_r101-d8_{rest}': f'{name}/{name}_r101-d8_{rest}'
    for name in ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
    for rest in ('4xb2-80k_cityscapes-512x1024', '4xb4-160k_ade20k-512x512')
}
COUNTERPARTS.update(
    {
        f'upernet_swin-{size[0]}_4xb4-160k_ade20k-512x512': (
            f'swin/swin-{size}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512'
        )
        for size in ('tiny', 'small', 'base')
    }
)
COUNTERPARTS.update(
    {
        f'upernet_twins-svt-{size}_4xb4-160k_ade20k-512x512': (
            f'twins/twins_svt-{size}_uperhead_8xb2-160k_ade20k-512x512'
        )
        for size in 'sbl'
    }
)
COUNTERPARTS.update(
    {
        f'upernet_convnext-{size[0]}_4xb4-amp-160k_ade20k-512x512': (
            f'convnext/convnext-{size}_upernet_8xb2-amp-160k_ade20k-512x512'
        )
        for size in ('tiny', 'small', 'base')
    }
)


# Keys that a Runner acts on; the rest are variables of the files.
RUNS = {
    'default_hooks',
    'default_scope',
    'env_cfg',
    'load_from',
    'log_processor',
    'model',
    'optim_wrapper',
    'param_scheduler',
    'resume',
    'test_cfg',
    'test_dataloader',
    'test_evaluator',
    'train_cfg',
    'train_dataloader',
    'tta_model',
    'tta_pipeline',
    'val_cfg',
    'val_dataloader',
    'val_evaluator',
    'visualizer',
}


@pytest.mark.parametrize('name', sorted(COUNTERPARTS))
def test_baselines_are_mmsegs(name: str) -> None:
    """The same training: four GPUs with four images instead of eight with two."""
    ours = plain(CONFIGS / 'scale_equalizer' / f'{name}.py')
    theirs = plain(THEIRS / f'{COUNTERPARTS[name]}.py')
    if '8xb2' in COUNTERPARTS[name]:
        loader = theirs['train_dataloader']
        assert loader['batch_size'] * 8 == ours['train_dataloader']['batch_size'] * 4
        loader.update(batch_size=4, num_workers=4)
    for cfg in (ours, theirs):
        # test_adamw_schedules has the keys.
        cfg['optim_wrapper'].get('paramwise_cfg', {}).pop('custom_keys', None)
        for key in set(cfg) - RUNS:
            del cfg[key]
    assert without_host(ours) == without_host(theirs)


def test_unet_is_theirs_at_a_quarter_of_the_width() -> None:
    theirs = plain(THEIRS / '_base_/models/fcn_unet_s5-d16.py')
    model = theirs['model']
    theirs['norm_cfg']['type'] = 'BN'
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        model[part]['norm_cfg']['type'] = 'BN'
    for head in ('decode_head', 'auxiliary_head'):
        for key in ('in_channels', 'channels'):
            model[head][key] //= 4
        model[head]['num_classes'] = 11
    model['backbone']['base_channels'] //= 4
    # Their defaults of UNet, written out.
    assert model['backbone'].pop('with_cp') is False
    assert model['backbone'].pop('conv_cfg') is None
    model['test_cfg'] = {'mode': 'whole'}
    assert plain(BASE / 'models/unet_s5-d16.py') == theirs
