"""Images of twelve channels: what docs/data.md says about them, run."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import inference_model
from mmseg.datasets.transforms import PhotoMetricDistortion
from mmseg.registry import MODELS, TRANSFORMS
from PIL import Image

from mmseg_fusion.channels import adapt_stem

tifffile = pytest.importorskip('tifffile', reason='requirements/tests/pretrained.txt')

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'data.md'
CHANNELS, SIZE, CLASSES = 12, (64, 64), 3
MEAN, STD = 2000.0, 1150.0


@pytest.fixture(scope='module')
def page() -> types.SimpleNamespace:
    """The transform and the config of the page."""
    section = PAGE.read_text(encoding='utf-8').split('## Images that are not RGB')[1]
    section = section.split('\n## ')[0]
    transform, config = re.findall(r'^```python\n(.*?)^```', section, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(transform, names)
    yield types.SimpleNamespace(transform=names['LoadTIFF'], config=config)
    TRANSFORMS.module_dict.pop('LoadTIFF')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 16 bits; the label is the class of the brightest of three channels."""
    root = tmp_path_factory.mktemp('twelve')
    random = np.random.default_rng(0)
    for folder in ('images', 'planes', 'labels'):
        (root / folder).mkdir()
    for i in range(6):
        image = random.integers(0, 4096, (*SIZE, CHANNELS)).astype(np.uint16)
        form = dict(photometric='minisblack', planarconfig='contig')
        tifffile.imwrite(root / f'images/{i}.tif', image, **form)
        form['planarconfig'] = 'separate'
        tifffile.imwrite(root / f'planes/{i}.tif', image.transpose(2, 0, 1), **form)
        label = image[..., :CLASSES].argmax(2).astype(np.uint8)
        Image.fromarray(label).save(root / f'labels/{i}.png')
    return root


def config(page: types.SimpleNamespace, data: Path, work_dir: Path, backbone: dict) -> Config:
    """The page's config, on a small model with a head of ours under the hook."""
    own = Config.fromstring(page.config, '.py')
    loading, *_ = own.train_pipeline
    load_label, pack = dict(type='LoadAnnotations'), dict(type='PackSegInputs')
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(data),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.tif',
        seg_map_suffix='.png',
        metainfo=dict(classes=('a', 'b', 'c')),
        pipeline=[loading, load_label, pack],
    )
    cfg = Config(
        dict(
            default_scope='mmseg',
            work_dir=str(work_dir),
            experiment_name=work_dir.name,
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(
                    type='SegDataPreProcessor', pad_val=0, seg_pad_val=255, size=SIZE
                ),
                backbone=dict(type='ScaledEfficientNet', width=0.4, depth=0.5, **backbone),
                decode_head=dict(
                    type='GFFHead',
                    in_channels=[16, 16, 48, 128],
                    channels=8,
                    neck=dict(num_convs=0),
                    context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)),
                    num_classes=CLASSES,
                    norm_cfg=dict(type='BN'),
                ),
                train_cfg=dict(),
                test_cfg=dict(mode='whole'),
            ),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='InfiniteSampler', shuffle=True),
                dataset=dataset,
            ),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=2),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
                logger=dict(type='LoggerHook', interval=1),
            ),
            custom_hooks=[dict(type='ScaleEqualizerHook')],
            log_processor=dict(by_epoch=False),
            randomness=dict(seed=0),
            test_pipeline=[loading, pack],
        )
    )
    cfg.merge_from_dict(dict(model=own.model))
    return cfg


def test_the_config_is_for_these_images(page: types.SimpleNamespace) -> None:
    own = Config.fromstring(page.config, '.py')
    assert own.model.backbone.in_channels == CHANNELS
    assert own.model.data_preprocessor.mean == [MEAN] * CHANNELS
    assert own.model.data_preprocessor.std == [STD] * CHANNELS


@pytest.mark.parametrize('folder', ['images', 'planes'])
def test_all_channels_and_bits_arrive(page: types.SimpleNamespace, data: Path, folder: str) -> None:
    load = page.transform(channels_first=folder == 'planes')
    found = load(dict(img_path=str(data / folder / '0.tif')))
    expected = tifffile.imread(data / 'images/0.tif')
    assert found['img'].dtype == np.float32
    assert np.array_equal(found['img'], expected)
    assert found['img_shape'] == found['ori_shape'] == SIZE
    assert found['img'].max() > 4000


def test_mmcv_reads_them_too(data: Path) -> None:
    """Where the channels come last."""
    load = TRANSFORMS.build(
        dict(type='LoadImageFromFile', imdecode_backend='tifffile', to_float32=True)
    )
    found = load(dict(img_path=str(data / 'images/0.tif')))
    assert np.array_equal(found['img'], tifffile.imread(data / 'images/0.tif'))


def test_photometric_distortion_keeps_8_bits() -> None:
    """Why the page says to leave it out."""
    image = np.full((4, 4, 3), 4000.0, np.float32)
    assert PhotoMetricDistortion().convert(image, beta=1).max() == 255


def test_trains_under_the_hook(page: types.SimpleNamespace, data: Path, tmp_path: Path) -> None:
    # Weights of RGB images, as ImageNet's are.
    torch.manual_seed(3)
    rgb = MODELS.build(dict(type='ScaledEfficientNet', width=0.4, depth=0.5))
    rgb.init_weights()
    torch.save(dict(state_dict=rgb.state_dict()), tmp_path / 'rgb.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'rgb.pth'))
    cfg = config(page, data, tmp_path / 'run', dict(init_cfg=pretrained))

    sample = Compose(cfg.train_dataloader.dataset.pipeline)(
        dict(
            img_path=str(data / 'images/0.tif'),
            seg_map_path=str(data / 'labels/0.png'),
            seg_fields=[],
            reduce_zero_label=False,
            label_map=None,
        )
    )
    model = MODELS.build(cfg.model)
    batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
    inputs = model.data_preprocessor(batch, True)['inputs']
    expected = (tifffile.imread(data / 'images/0.tif').astype(np.float32) - MEAN) / STD
    np.testing.assert_allclose(inputs[0].numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)

    runner = Runner.from_cfg(cfg)
    stem = runner.model.backbone.layers[0].conv
    runner.model.init_weights()
    assert torch.equal(stem.weight, adapt_stem(rgb.layers[0].conv.weight, CHANNELS))
    before = stem.weight.detach().clone()
    runner.train()
    assert stem.weight.isfinite().all()
    for channel in (stem.weight - before).unbind(1):
        assert channel.any()
    table = json.loads((tmp_path / 'run' / 'scale_equalizer.json').read_text())
    assert table
    assert (tmp_path / 'run' / 'iter_2.pth').is_file()

    trained = runner.model.eval()
    trained.cfg = cfg
    result = inference_model(trained, str(data / 'images/1.tif'))
    assert result.pred_sem_seg.data.shape == (1, *SIZE)
