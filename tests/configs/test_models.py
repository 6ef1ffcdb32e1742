"""Every model of the configs trains a step, and costs what its metafile says.

Configs that differ in data, schedule or hooks alone share one test: nothing is built twice. A step
is trained with few blocks of one kind in a row: it is the widths that have to fit. At its own
depth every model is built, and run forward on the meta device, to be counted.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.models.backbones.resnet import Bottleneck, ResNet
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_fusion.analysis import count

from .files import METAFILES, TRAINABLE, models_of, read, signature, without

#: Height and width. They differ, so that what mixes them up fails; no level is one pixel, which
#: would fit on any other.
CROP = (64, 32)


def needs(cfg: Config) -> None:
    """Skips the test where a backbone needs timm and it is not installed: an extra of its own."""
    if cfg.model.backbone.type == 'TIMMBackbone':
        pytest.importorskip('timm')


def for_a_cpu(cfg: Any) -> Any:
    """The config without downloads, and without what only CUDA has: SyncBN and mixed precision."""
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(for_a_cpu(item) for item in cfg)
    if not isinstance(cfg, dict):
        return cfg
    changed = {k: for_a_cpu(v) for k, v in cfg.items() if k != 'loss_scale'}
    if changed.get('type') == 'SyncBN':
        changed['type'] = 'BN'
    if changed.get('type') == 'AmpOptimWrapper':
        changed['type'] = 'OptimWrapper'
    if (changed.get('init_cfg') or {}).get('type') == 'Pretrained':
        changed['init_cfg'] = None
    if 'pretrained' in changed:
        changed['pretrained'] = None
    if changed.get('type') == 'CPHead':
        # Its grid is fixed: that of the real crop would be 64 times the cells of this one.
        changed['prior_size'] = tuple(side // 8 for side in CROP)
    return changed


#: Blocks per stage of the ResNets with bottlenecks that ``shallow`` asks for, by depth: one of each
#: width, and three in the last stage where their dilations differ (multi_grid).
SHALLOW_RESNETS = {14: (1, 1, 1, 1), 20: (1, 1, 1, 3)}


def shallow(model: dict[str, Any]) -> dict[str, Any]:
    """A model's config with as few blocks of one kind in a row as it has kinds of them."""
    backbone = dict(model['backbone'])
    if backbone['type'] in ('ResNet', 'ResNetV1c') and backbone['depth'] in (50, 101):
        backbone['depth'] = 20 if 'multi_grid' in backbone else 14
    if 'depths' in backbone:
        # The second block of a Swin stage shifts its windows: once is enough.
        first, *others = backbone['depths']
        backbone['depths'] = [min(first, 2), *(1 for _ in others)]
    if backbone['type'] == 'mmpretrain.ConvNeXt':
        from mmpretrain.models.backbones import ConvNeXt

        arch = ConvNeXt.arch_settings[backbone['arch']]
        backbone['arch'] = dict(depths=[1 for _ in arch['depths']], channels=arch['channels'])
    return dict(model, backbone=backbone)


#: Residual blocks, several of one kind in a row, of backbones whose config has no list of depths.
BLOCKS = (
    *('InvertedResidual', 'FusedBlock', 'XceptionBlock', 'IdentityResidualBlock'),
    *('BasicBlock', 'HRModule'),
)


def leave_out_repeated_blocks(backbone: nn.Module) -> None:
    """Takes out of a backbone the blocks whose layers are those of the block before them."""
    for row in [m for m in backbone.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]:
        kinds = [str(block) for block in row]
        for i in reversed(range(1, len(row))):
            if kinds[i] == kinds[i - 1] and type(row[i]).__name__ in BLOCKS:
                del row[i]


@pytest.fixture
def shallow_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the depths of ``SHALLOW_RESNETS`` known."""
    for depth, blocks in SHALLOW_RESNETS.items():
        monkeypatch.setitem(ResNet.arch_settings, depth, (Bottleneck, blocks))


@pytest.fixture(scope='module')
def drawn() -> dict[str, torch.Tensor]:
    """Random numbers for weights: four million of [0, 1), and of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: getattr(torch.empty(2**22), f'{name}_')(generator=generator)
        for name in ('uniform', 'normal')
    }


@pytest.fixture
def weights_of_drawn_numbers(
    monkeypatch: pytest.MonkeyPatch, drawn: dict[str, torch.Tensor]
) -> None:
    """Lets layers take their random weights from numbers that are drawn once.

    To draw hundreds of millions anew takes a third of the time of a step.
    """

    def fill(weight: torch.Tensor, numbers: torch.Tensor, scale: float, shift: float):
        with torch.no_grad():
            flat = weight.view(-1)
            first = int(torch.randint(len(numbers), ()))
            for start in range(-first, len(flat), len(numbers)):
                part = flat[max(start, 0) : start + len(numbers)]
                part.copy_(numbers[max(-start, 0) :][: len(part)])
            return weight.mul_(scale).add_(shift)

    def uniform(self, low=0.0, high=1.0, generator=None):
        return fill(self, drawn['uniform'], high - low, low)

    def normal(self, mean=0.0, std=1.0, generator=None):
        return fill(self, drawn['normal'], std, mean)

    monkeypatch.setattr(torch.Tensor, 'uniform_', uniform)
    monkeypatch.setattr(torch.Tensor, 'normal_', normal)


def heads(model: Any) -> list[Any]:
    """The decode heads of a model, or of its config: several in a cascade."""
    found = model['decode_head'] if isinstance(model, dict) else model.decode_head
    return list(found) if isinstance(found, (list, tuple, nn.ModuleList)) else [found]


#: What changes no layer and no parameter group.
KNOBS = (
    *('num_classes', 'size', 'lr', 'weight_decay', 'test_cfg', 'min_kept'),
    *('align_corners', 'dropout_ratio', 'drop_path_rate', 'class_weight', 'loss_weight'),
)


def architecture(model: Any) -> dict[str, Any]:
    """A model's config without what CAR's losses are."""
    model = model.to_dict()
    if model.get('car', {}).get('loss') is not None:
        del model['car']['loss']
    return model


def distinct() -> dict[str, str]:
    """One config for every (model, optimizer), whatever their numbers of classes, sizes and rates.

    The losses of CAR neither: tests/configs/test_car.py trains a step with each of their forms.
    """
    found: dict[str, str] = {}
    for path in TRAINABLE:
        cfg = read(path)
        parts = [shallow(architecture(cfg.model)), cfg.optim_wrapper.to_dict()]
        found.setdefault(signature(without(for_a_cpu(parts), *KNOBS)), path)
    return {Path(path).stem: path for path in found.values()}


MODELS_OF_CONFIGS = distinct()
# One per method: these run on every stack.
CHEAP = {
    'gff-dfp_r18-d8_1xb4-1k_fusion-shapes-128x128',
    'hfgd_r18_1xb4-1k_fusion-shapes-128x128',
    'upernet_r18_1xb16-4k_camvid-360x480',
    'upernet_swin-t_4xb4-160k_ade20k-512x512',
}


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=name, marks=[pytest.mark.stack] if name in CHEAP else [])
        for name, path in MODELS_OF_CONFIGS.items()
    ],
)
@pytest.mark.usefixtures('shallow_resnets', 'weights_of_drawn_numbers')
def test_trains_a_step(path: str) -> None:
    cfg = Config(for_a_cpu(read(path).to_dict()))
    needs(cfg)
    cfg.model.data_preprocessor.size = CROP
    model = MODELS.build(shallow(cfg.model))
    leave_out_repeated_blocks(model.backbone)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = optim_wrapper.optimizer.param_groups
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    labels = torch.randint(heads(cfg.model)[-1].num_classes, (2, 1, *CROP))
    labels[:, :, :3] = 255
    data = {
        'inputs': list(torch.randint(256, (2, 3, *CROP), dtype=torch.uint8)),
        'data_samples': [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels],
    }
    model.train()
    loss, log = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    assert math.isfinite(loss.item())
    parts = {key.split('.')[0].split('_')[0] for key in log if '.loss' in key}
    assert parts == ({'decode', 'aux'} if cfg.model.get('auxiliary_head') else {'decode'})
    if cfg.model.type == 'CAREncoderDecoder' and cfg.model.car.get('loss', True):
        assert 'decode.loss_car_intra_c2p' in log or 'decode.loss_car_intra_c2p_0' in log
    optim_wrapper.backward(loss)
    without_gradient = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.sum().isfinite())
    ]
    assert not without_gradient
    weight = heads(model)[-1].conv_seg.weight
    before = weight.detach().clone()
    optim_wrapper.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    'name',
    [
        'caa_efficientnet-b7-d8_4xb4-40k_pascal-context-59-513x513',
        'eseg-l_4xb4-80k_ade20k-512x512',
        'deeplabv3plus_xception65-d8_4xb4-300k_coco-voc12aug-513x513',
        'gff-dfp_wrn38-d8_4xb2-100k_cityscapes-864x864',
        'ocrnet_hr48_car_4xb4-30k_coco-stuff10k-513x513',
    ],
)
@pytest.mark.usefixtures('weights_of_drawn_numbers')
def test_blocks_that_are_left_out_are_repetitions(name: str) -> None:
    backbone = MODELS.build(for_a_cpu(read(MODELS_OF_CONFIGS[name]).model.backbone.to_dict()))

    def blocks() -> list[str]:
        return [str(m) for m in backbone.modules() if type(m).__name__ in BLOCKS]

    before = blocks()
    leave_out_repeated_blocks(backbone)
    after = blocks()
    assert len(after) < len(before)
    # What holds others is another once one of them is gone.
    assert {b for b in before if 'HRModule' not in b} == {b for b in after if 'HRModule' not in b}


def test_distinct_models_stand_for_all() -> None:
    def kind(path: str) -> tuple[str, ...]:
        model = read(path).model
        return (model.type, model.backbone.type, *(head.type for head in heads(model)))

    assert {kind(p) for p in MODELS_OF_CONFIGS.values()} == {kind(p) for p in TRAINABLE}
    # 26 pairs of the paper's rows are 13 models.
    ours = [read(p) for p in TRAINABLE if 'scale_equalizer' in p]
    parts = [[architecture(cfg.model), cfg.optim_wrapper.to_dict()] for cfg in ours]
    assert len({signature(without(p, *KNOBS)) for p in parts}) == 13


@pytest.mark.parametrize(
    ('name', 'rates'),
    [
        # 0.9 to the power of this, for stem, four stages and head.
        ('upernet_convnext-t_4xb4-amp-160k_ade20k-512x512', [7, 6, 5, 4, 3, 0]),
        ('upernet_convnext-b_4xb4-amp-160k_ade20k-512x512', [13, 12, 11, 10, 9, 0]),
    ],
)
def test_layer_decay(name: str, rates: list[int]) -> None:
    cfg = Config(for_a_cpu(read(f'configs/scale_equalizer/{name}.py').to_dict()))
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rate = {id(p): group['lr'] for group in groups for p in group['params']}
    parts = [model.backbone.downsample_layers[0], *model.backbone.stages, model.decode_head]
    for part, power in zip(parts, rates):
        assert [rate[id(p)] / 1e-4 for p in part.parameters()] == pytest.approx(
            [0.9**power] * len(list(part.parameters()))
        )
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert {decay[id(p)] for p in model.parameters() if p.dim() == 1} == {0.0}


# --- counts --------------------------------------------------------------------------------------


def counted() -> dict[str, list[tuple[str, dict]]]:
    """What the metafiles say, (metafile, entry), by the model that it is said of."""
    found: dict[str, list[tuple[str, dict]]] = {}
    for metafile in METAFILES:
        for model in models_of(metafile):
            cfg = read(model['Config'])
            key = signature([architecture(cfg.model), model['Metadata']['FLOPs Shape']])
            found.setdefault(key, []).append((metafile, model))
    return {entries[0][1]['Config']: entries for entries in found.values()}


COUNTED = counted()


@pytest.mark.parametrize('path', COUNTED, ids=lambda path: Path(path).stem)
def test_counts(path: str) -> None:
    needs(read(path))
    shape = COUNTED[path][0][1]['Metadata']['FLOPs Shape']
    found = count(read(path), shape)
    for metafile, model in COUNTED[path]:
        said = model['Metadata']
        assert tuple(shape) == tuple(read(model['Config']).model.data_preprocessor.size)
        assert (said['Parameters'], said['FLOPs']) == (found.params, found.flops), (
            f'{model["Name"]}: python tools/analysis_tools/get_flops.py --update {metafile}'
        )


@pytest.mark.parametrize(
    ('backbone', 'published'),
    # Giga multiply-adds of UPerNet on 512 x 2048, table 4 of the ConvNeXt paper, arXiv 2201.03545.
    [
        ('swin-t', 945),
        ('swin-s', 1038),
        ('swin-b', 1188),
        ('convnext-t', 939),
        ('convnext-s', 1027),
        ('convnext-b', 1170),
    ],
)
def test_counts_agree_with_published_ones(backbone: str, published: int) -> None:
    amp = 'amp-' if 'convnext' in backbone else ''
    cfg = read(f'configs/scale_equalizer/upernet_{backbone}_4xb4-{amp}160k_ade20k-512x512.py')
    assert count(cfg, (512, 2048)).flops / 1e9 == pytest.approx(published, rel=1e-3)


# --- through the runner --------------------------------------------------------------------------


SIDE = 64


def write_ade20k(root: Path, images: int) -> None:
    """Random images in the folders of ADE20K."""
    rng = np.random.default_rng(0)
    for part in ('training', 'validation'):
        for kind, top, suffix in (('images', 256, 'jpg'), ('annotations', 151, 'png')):
            folder = root / kind / part
            folder.mkdir(parents=True)
            shape = (SIDE, SIDE, 3)[: 3 if kind == 'images' else 2]
            for i in range(images):
                array = rng.integers(top, size=shape, dtype=np.uint8)
                cv2.imwrite(str(folder / f'{i}.{suffix}'), array)


@pytest.mark.stack
def test_scale_equalized_config_trains_through_the_runner(tmp_path: Path) -> None:
    """The file of a row of the paper, on four small images in ADE20K's folders."""
    write_ade20k(tmp_path / 'ade', images=4)
    path = 'configs/scale_equalizer/upernet_swin-t_scale-eq_4xb4-160k_ade20k-512x512.py'
    cfg = Config(for_a_cpu(copy.deepcopy(read(path).to_dict())))
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.data_preprocessor.size = (SIDE, SIDE)
    loader = cfg.train_dataloader
    loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    loader.dataset.data_root = str(tmp_path / 'ade')
    for step in loader.dataset.pipeline:
        if step['type'] == 'RandomResize':
            step['scale'] = (2 * SIDE, SIDE)
        if step['type'] == 'RandomCrop':
            step['crop_size'] = (SIDE, SIDE)
    cfg.train_cfg.max_iters = 2
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    # 700 MB of optimizer state that nobody reads.
    cfg.default_hooks.checkpoint = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    assert math.isfinite(runner.message_hub.get_scalar('train/loss').current())
    # The hook ran before.
    assert list((tmp_path / 'work').rglob('scale_equalizer.json'))
