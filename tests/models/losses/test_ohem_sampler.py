"""Hard pixels whose losses are averaged over their own number."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.registry import MODELS, TASK_UTILS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_fusion.models.losses import KeptMeanOHEMPixelSampler, ohem_sampler

CROSS_ENTROPY = dict(type='CrossEntropyLoss', loss_weight=1.0)
SIZE = (16, 32)
PIXELS = 2 * SIZE[0] * SIZE[1]


def build(kind: str, loss=CROSS_ENTROPY, **sampler) -> nn.Module:
    torch.manual_seed(0)
    head = dict(
        type='FCNHead', in_channels=8, channels=8, num_classes=5, num_convs=1, dropout_ratio=0,
        in_index=0, norm_cfg=dict(type='BN'), loss_decode=loss,
        sampler=dict(type=kind, **sampler),
    )  # fmt: skip
    return MODELS.build(head).double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    features = [3 * torch.randn(2, 8, *SIZE, dtype=torch.float64)]
    labels = torch.randint(5, (2, 1, *SIZE))
    labels[:, :, :2] = 255
    return features, [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]


def pixel_losses(head: nn.Module, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and probabilities of the labels that are known."""
    features, samples = batch
    label = torch.cat([sample.gt_sem_seg.data for sample in samples])
    logits = F.interpolate(head(features), SIZE, mode='bilinear')
    losses = F.cross_entropy(logits, label, ignore_index=255, reduction='none')
    losses = losses[label != 255]
    return losses, (-losses).exp()


def test_is_registered() -> None:
    assert TASK_UTILS.get('KeptMeanOHEMPixelSampler') is KeptMeanOHEMPixelSampler


@pytest.mark.parametrize('loss', [CROSS_ENTROPY, [CROSS_ENTROPY]])
def test_mean_over_the_hardest(batch, loss) -> None:
    kept = PIXELS // 16
    options = dict(loss=loss, min_kept=kept // 2)
    heads = [build(k, **options) for k in ('KeptMeanOHEMPixelSampler', 'OHEMPixelSampler')]
    hardest = pixel_losses(heads[0], batch)[0].topk(kept).values
    found, theirs = (head.loss(*batch, Config())['loss_ce'] for head in heads)
    torch.testing.assert_close(found, hardest.mean())
    # A sixteenth is kept, and MMSegmentation's loss is a sixteenth.
    torch.testing.assert_close(theirs, hardest.mean() / 16)


def test_mean_over_those_below_the_threshold(batch) -> None:
    head = build('KeptMeanOHEMPixelSampler', thresh=0.3, min_kept=10)
    losses, probability = pixel_losses(head, batch)
    hard = probability < 0.3
    assert 20 < hard.sum() < len(losses)
    loss = head.loss(*batch, Config())['loss_ce']
    torch.testing.assert_close(loss, losses[hard].mean())


def test_gradient_is_that_of_the_mean(batch) -> None:
    head = build('KeptMeanOHEMPixelSampler', thresh=0.3, min_kept=10)
    losses, probability = pixel_losses(head, batch)
    weights = list(head.parameters())
    expected = torch.autograd.grad(losses[probability < 0.3].mean(), weights)
    found = torch.autograd.grad(head.loss(*batch, Config())['loss_ce'], weights)
    torch.testing.assert_close(found, expected)


def test_nothing_is_known(batch) -> None:
    features, samples = batch
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    head = build('KeptMeanOHEMPixelSampler', thresh=0.7, min_kept=10)
    loss = head.loss(features, samples, Config())['loss_ce']
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_many_pixels_in_half_precision() -> None:
    head = build('KeptMeanOHEMPixelSampler', thresh=0.7, min_kept=10)
    logits = torch.zeros(1, 5, 512, 512, dtype=torch.float16)
    weight = head.sampler.sample(logits, torch.zeros(1, 1, 512, 512))
    # All are kept, more than float16 counts.
    assert weight.dtype == torch.float32
    assert (weight == 1).all()


@pytest.mark.parametrize(
    ('key', 'value'), [('avg_non_ignore', True), ('class_weight', [1.0, 1.0, 1.0, 1.0, 2.0])]
)
def test_refuses_losses_with_another_mean(batch, key: str, value) -> None:
    head = build('KeptMeanOHEMPixelSampler', dict(CROSS_ENTROPY, **{key: value}), min_kept=10)
    with pytest.raises(ValueError, match=rf'CrossEntropyLoss with {key} .*loss_decode.{key}'):
        head.loss(*batch, Config())


def test_example() -> None:
    assert doctest.testmod(ohem_sampler).failed == 0
