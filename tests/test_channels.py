"""How many channels an image has: one place, and what does not fit together says so."""

from __future__ import annotations

import copy
from pathlib import Path

import mmseg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config, ConfigDict
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.channels import adapt_stem, check_channels, image_channels
from mmseg_fusion.errors import CheckpointError, InputError

STOCK = sorted((Path(mmseg.__file__).parent / '.mim/configs/_base_/models').glob('*.py'))


def model(backbone: dict | None = None, kind: str = 'EncoderDecoder', **preprocessor) -> ConfigDict:
    """A segmentor's config."""
    return ConfigDict(
        type=kind,
        data_preprocessor=dict(type='SegDataPreProcessor', **preprocessor),
        backbone=backbone or dict(type='WiderResNet', depth=16, base_channels=2),
        decode_head=dict(type='FCNHead', in_channels=128, in_index=2, channels=4, num_classes=3),
        test_cfg=dict(mode='whole'),
    )


def wider(in_channels: int) -> dict:
    return dict(type='WiderResNet', depth=16, base_channels=2, in_channels=in_channels)


@pytest.mark.parametrize(
    ('cfg', 'channels'),
    [
        (model(), 3),
        (model(wider(5)), 5),
        (model(wider(4), mean=[1.0] * 4, std=[2.0] * 4), 4),
        # A single mean is for all channels.
        (model(wider(4), mean=[1.0], std=[2.0]), 4),
        (model(wider(1), mean=[1.0], std=[2.0]), 1),
        (model(mean=[1.0], std=[2.0]), 3),
        (model(dict(type='MobileNetV2'), mean=[1.0] * 3, std=[2.0] * 3), 3),
        (model(dict(type='MobileNetV2'), mean=[1.0], std=[2.0]), 3),
        # The signature of its base class has the default.
        (model(dict(type='ResNetV1c', depth=18)), 3),
        (model(dict(type='ResNetV1c', depth=18, in_channels=6)), 6),
    ],
)
def test_config_and_model_say_the_same(cfg: ConfigDict, channels: int) -> None:
    check_channels(cfg)
    assert image_channels(cfg) == channels
    if cfg.backbone.type == 'WiderResNet':
        assert image_channels(MODELS.build(cfg)) == channels


def test_without_a_word_it_is_rgb() -> None:
    assert image_channels(dict(type='EncoderDecoder')) == 3
    assert image_channels(nn.Identity()) == 3


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (
            model(wider(4), mean=[1.0] * 3, std=[2.0] * 3),
            r'mean has 3 values, .* but model.backbone.in_channels is 4\. Set both',
        ),
        (
            model(mean=[1.0] * 4, std=[2.0] * 4),
            r'mean has 4 values, .* is 3, the default of WiderResNet\.',
        ),
        (
            model(dict(type='ResNetV1c', depth=18), mean=[1.0] * 12, std=[2.0] * 12),
            r'mean has 12 values, .* is 3, the default of ResNet\.',
        ),
        (
            model(wider(4), 'CAREncoderDecoder', mean=[1.0] * 3, std=[2.0] * 3),
            'in_channels is 4',
        ),
        (model(wider(4), mean=[1.0] * 4, std=[2.0] * 3), 'mean has 4 values and std 3'),
    ],
)
def test_what_does_not_fit(cfg: ConfigDict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_channels(cfg)


@MODELS.register_module()
class _Pairs(MODELS.get('EncoderDecoder')):
    """Two images in one, as change detection has them, for a backbone of RGB."""

    def extract_feat(self, inputs):
        return [torch.cat(levels, 1) for levels in zip(*map(self.backbone, inputs.split(3, 1)))]


def test_who_puts_channels_together_is_left_alone() -> None:
    check_channels(model(kind='_Pairs', mean=[1.0] * 6, std=[2.0] * 6))
    cfg = model(mean=[1.0] * 6, std=[2.0] * 6)
    with pytest.raises(InputError):
        check_channels(cfg)
    cfg.data_preprocessor.type = 'PairsPreprocessor'
    check_channels(cfg)
    cfg.backbone.type = 'BackboneOfNobody'
    check_channels(cfg)


@pytest.mark.parametrize('path', STOCK, ids=lambda path: path.stem)
def test_no_model_of_mmsegmentation_is_refused(path: Path) -> None:
    cfg = Config.fromfile(path).model
    check_channels(cfg)
    assert image_channels(cfg) == 3


def test_there_are_models_of_mmsegmentation() -> None:
    assert len(STOCK) > 30


# --- the weights of a stem -----------------------------------------------------------------------


def as_timm(weight: np.ndarray, channels: int) -> np.ndarray:
    """Channel by channel: the sum, or channel i of the new is i mod 3 of the old, scaled."""
    given = weight.shape[1]
    if channels == given:
        return weight
    if channels == 1:
        return sum(weight[:, i] for i in range(given))[:, None]
    return np.stack([weight[:, i % given] * given / channels for i in range(channels)], 1)


@given(
    channels=st.integers(1, 20),
    source=st.sampled_from([1, 3]),
    kernel=st.sampled_from([1, 3, 7]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_stem_as_the_formula(channels: int, source: int, kernel: int, dtype: torch.dtype) -> None:
    torch.manual_seed(channels)
    weight = torch.randn(5, source, kernel, kernel).to(dtype)
    found = adapt_stem(weight, channels)
    assert found.dtype is dtype
    expected = torch.from_numpy(as_timm(weight.double().numpy(), channels))
    torch.testing.assert_close(found.double(), expected, **tolerance(dtype))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return dict(rtol=2 * eps, atol=2 * eps)


def test_stem_as_timm_itself() -> None:
    timm = pytest.importorskip('timm.models', reason='the extra pretrained is not installed')
    weight = torch.randn(5, 3, 7, 7)
    for channels in (1, 2, 3, 4, 12, 13):
        theirs = timm.adapt_input_conv(channels, weight)
        torch.testing.assert_close(adapt_stem(weight, channels), theirs)


def test_equal_images_give_equal_features() -> None:
    weight, image = torch.randn(5, 3, 3, 3), torch.randn(2, 3, 9, 8)
    expected = F.conv2d(image, weight)
    found = F.conv2d(image.repeat(1, 4, 1, 1), adapt_stem(weight, 12))
    torch.testing.assert_close(found, expected)
    grey = image[:, :1]
    torch.testing.assert_close(
        F.conv2d(grey, adapt_stem(weight, 1)), F.conv2d(grey.expand(-1, 3, -1, -1), weight)
    )


def test_what_no_rgb_is_like_is_refused() -> None:
    weight = torch.randn(5, 4, 3, 3)
    assert adapt_stem(weight, 4) is weight
    with pytest.raises(CheckpointError, match=r'stem.conv takes 4 channels .*in_channels is 12'):
        adapt_stem(weight, 12, 'stem.conv')


def test_configs_are_left_as_they_are() -> None:
    cfg = model(wider(4), mean=[1.0] * 4, std=[2.0] * 4)
    before = copy.deepcopy(cfg)
    check_channels(cfg)
    image_channels(cfg)
    assert cfg == before
