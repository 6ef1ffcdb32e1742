"""Cross entropy with class weights and ignored pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_fusion import compat

WEIGHT = (0.5, 2.0, 1.0, 0.1)


def _logits_and_label() -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.randint(0, 4, (2, 5, 5))
    label[:, :2] = 255
    return torch.randn(2, 4, 5, 5, requires_grad=True), label


@pytest.mark.stack
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``')
@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_class_weights_with_ignored_pixels_give_torchs_mean(avg_non_ignore):
    loss = MODELS.build(
        dict(type='CrossEntropyLoss', class_weight=WEIGHT, avg_non_ignore=avg_non_ignore)
    )
    logits, label = _logits_and_label()
    ours = loss(logits, label, ignore_index=255)
    expected = F.cross_entropy(logits, label, torch.tensor(WEIGHT), ignore_index=255)
    torch.testing.assert_close(ours, expected)
    ours, expected = (torch.autograd.grad(x, logits)[0] for x in (ours, expected))
    torch.testing.assert_close(ours, expected)


@pytest.mark.stack
@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``')
@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_class_weights_with_every_pixel_ignored_give_zero(avg_non_ignore):
    loss = MODELS.build(
        dict(type='CrossEntropyLoss', class_weight=WEIGHT, avg_non_ignore=avg_non_ignore)
    )
    logits, label = _logits_and_label()
    ours = loss(logits, torch.full_like(label, 255), ignore_index=255)
    ours.backward()
    assert ours == 0
    assert (logits.grad == 0).all()


@pytest.mark.stack
@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_cross_entropy_without_class_weights_is_unchanged(avg_non_ignore):
    from mmseg.models.losses import cross_entropy

    logits, label = _logits_and_label()
    total = F.cross_entropy(logits, label, ignore_index=255, reduction='sum')
    pixels = (label != 255).sum() if avg_non_ignore else label.numel()
    ours = cross_entropy(logits, label, ignore_index=255, avg_non_ignore=avg_non_ignore)
    torch.testing.assert_close(ours, total / pixels)


@pytest.mark.stack
def test_other_reductions_with_class_weights_are_unchanged():
    from mmseg.models.losses import cross_entropy

    logits, label = _logits_and_label()
    weight = torch.tensor(WEIGHT)
    for reduction in ('none', 'sum'):
        ours = cross_entropy(
            logits, label, class_weight=weight, ignore_index=255, reduction=reduction
        )
        expected = F.cross_entropy(logits, label, weight, ignore_index=255, reduction=reduction)
        torch.testing.assert_close(ours, expected)
    ours = cross_entropy(logits, label, class_weight=weight, ignore_index=255, avg_factor=7)
    expected = F.cross_entropy(logits, label, weight, ignore_index=255, reduction='sum') / 7
    torch.testing.assert_close(ours, expected)


@pytest.mark.stack
def test_a_cross_entropy_that_works_is_left_alone():
    from mmseg.models.losses import cross_entropy_loss

    before = cross_entropy_loss.cross_entropy
    assert compat.cross_entropy_class_weight() is None
    assert cross_entropy_loss.cross_entropy is before
