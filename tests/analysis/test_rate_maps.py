"""Maps per rate: against the pyramids computed by hand, and what is drawn of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_fusion.analysis.layer_features import InputError
from mmseg_fusion.analysis.rate_maps import (
    RateMaps,
    captured_rates,
    choose_channels,
    draw_rate_maps,
    find_pyramid,
    mosaic,
    rate_maps,
    rate_rows,
)
from mmseg_fusion.models.layers.kernel_sharing import KernelSharingAtrousConv
from tests.testers.toys import segmentor_config

RATES = (1, 2, 4)
HEAD = dict(
    in_channels=32, in_index=3, channels=6, num_classes=3, norm_cfg=dict(type='BN'), dilations=RATES
)
BACKBONE = dict(
    type='MobileNetV2', widen_factor=0.1, out_indices=(1, 2, 4, 6), norm_cfg=dict(type='BN')
)


def segmentor(head: str, **changes) -> nn.Module:
    cfg = segmentor_config(dict(HEAD, type=head, **changes), BACKBONE)
    model = MODELS.build(cfg.model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


def batch(height: int = 64, width: int = 80) -> dict:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    shape = (height, width)
    meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape, img_path='a/b.png')
    return dict(inputs=[image], data_samples=[SegDataSample(metainfo=meta)])


def features(model: nn.Module, data: dict) -> torch.Tensor:
    prepared = model.data_preprocessor(dict(data), False)
    with torch.no_grad():
        return model.extract_feat(prepared['inputs'])[3]


@pytest.mark.stack
@pytest.mark.parametrize('head', ['ASPPHead', 'DepthwiseSeparableASPPHead'])
def test_branches_of_aspp(head: str) -> None:
    changes = {} if head == 'ASPPHead' else dict(c1_in_channels=0, c1_channels=0)
    model, data = segmentor(head, **changes), batch()
    found = rate_maps(model, data)
    assert (found.module, found.rates, found.shared) == ('decode_head.aspp_modules', RATES, False)
    x = features(model, data)
    with torch.no_grad():
        for branch, maps in zip(model.decode_head.aspp_modules, found.maps):
            torch.testing.assert_close(maps, branch(x)[0])
    # RGB, as it is looked at; the model's BGR stays as it was.
    assert found.image.shape == (64, 80, 3)
    np.testing.assert_array_equal(found.image[..., 0], data['inputs'][0][2].numpy())


@pytest.mark.stack
@pytest.mark.parametrize('implementation', ['shared_taps', 'dilated'])
def test_rates_of_one_kernel(implementation: str) -> None:
    model, data = segmentor('KSACHead', implementation=implementation), batch()
    found = rate_maps(model, data)
    pyramid = model.get_submodule(found.module)
    assert isinstance(pyramid, KernelSharingAtrousConv)
    assert (found.rates, found.shared) == (RATES, True)
    x = features(model, data)
    for rate, bn, maps in zip(RATES, pyramid.norms, found.maps):
        out = F.conv2d(x, pyramid.conv.weight, dilation=rate, padding=rate)
        out = F.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        torch.testing.assert_close(maps, out.clamp_min(0)[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sum(found.maps), pyramid(x)[0], rtol=1e-4, atol=1e-5)


def test_looking_changes_nothing() -> None:
    model, data = segmentor('KSACHead'), batch()
    prepared = model.data_preprocessor(dict(data), False)
    metas = [data['data_samples'][0].metainfo]
    with torch.no_grad():
        before = model.encode_decode(prepared['inputs'], metas)
        pyramid = model.get_submodule(find_pyramid(model))
        with captured_rates(pyramid) as kept:
            during = model.encode_decode(prepared['inputs'], metas)
    assert torch.equal(before, during)
    assert len(kept) == 1
    assert not any(m._forward_hooks for m in model.modules())


def test_what_has_no_pyramid() -> None:
    cfg = segmentor_config(
        dict(type='FCNHead', in_channels=32, in_index=3, channels=4, num_classes=3), BACKBONE
    )
    with pytest.raises(InputError, match=r"decode head FCNHead .* 'KSACHead'"):
        find_pyramid(MODELS.build(cfg.model))
    with pytest.raises(InputError, match=r'there are: decode_head\.aspp_modules'):
        find_pyramid(segmentor('ASPPHead'), 'decode_head.bottleneck')


def test_several_pyramids_have_to_be_named() -> None:
    model = nn.Sequential(
        KernelSharingAtrousConv(4, 4, (1, 2)), KernelSharingAtrousConv(4, 4, (1,))
    )
    with pytest.raises(InputError, match=r'with --layer: 0, 1'):
        find_pyramid(model)
    assert find_pyramid(model, '1') == '1'


def maps_with_spread(*spreads: float) -> torch.Tensor:
    """(C, 2, 2) maps of mean 0 whose standard deviations over the four cells are given."""
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    return torch.stack([s * pattern for s in spreads])


def made(shared: bool, *maps: torch.Tensor) -> RateMaps:
    image = np.zeros((8, 8, 3), np.uint8)
    return RateMaps('p', shared, tuple(range(1, 1 + len(maps))), maps, image)


def test_channels_that_vary_most() -> None:
    first, second = maps_with_spread(1, 5, 3), maps_with_spread(4, 1, 2)
    own = made(False, first, second)
    assert choose_channels(own, 2) == [[1, 2], [0, 2]]
    # Sums 5, 6, 5: of equals the first.
    assert choose_channels(made(True, first, second), 9) == [[1, 0, 2]] * 2
    rows = rate_rows('m', own)
    assert [r['spread'] for r in rows] == pytest.approx([3, 7 / 3])
    assert [r['mean'] for r in rows] == pytest.approx([0, 0])
    assert rate_rows('m', made(True, maps_with_spread(0, 2, 0, 0)))[0]['dead'] == 0.75


def test_mosaic() -> None:
    maps = torch.arange(12.0).reshape(3, 2, 2)
    sheet = mosaic(maps, [2, 0, 1], columns=2)
    assert sheet.shape == (5, 5)
    one = np.array([[0, 1], [2, 3]]) / 3
    for top, left in ((0, 0), (0, 3), (3, 0)):
        np.testing.assert_allclose(sheet[top : top + 2, left : left + 2], one, atol=1e-6)
    assert np.isnan(sheet[2]).all()
    assert np.isnan(sheet[3:, 3:]).all()
    # A map without any contrast is no division by zero.
    assert (mosaic(torch.ones(1, 2, 2), [0], 1) == 0).all()


def test_draws_models_with_different_rates(tmp_path: Path) -> None:
    torch.manual_seed(1)
    aspp = made(False, *torch.rand(4, 9, 5, 6))
    ksac = RateMaps('q', True, (2, 6), tuple(torch.rand(2, 30, 5, 6)), aspp.image)
    path = tmp_path / 'maps.png'
    draw_rate_maps([aspp, ksac], ['ASPP', 'KSAC'], path)
    picture = cv2.imread(str(path))
    assert picture.shape[1] > picture.shape[0] / 2
    assert picture.std() > 10
    with pytest.raises(InputError, match='ASPP: channel 9 was asked for, but there are 9'):
        draw_rate_maps([aspp], ['ASPP'], path, channels=[3, 9])
    draw_rate_maps([ksac], ['KSAC'], path, channels=[3, 29])
