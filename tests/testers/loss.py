"""Base tester of losses that a decode head takes as ``loss_decode``."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor, nn

from .module import relative_error
from .toys import level_size, toy_features, toy_samples


class LossTester:
    """Checks of a loss called ``loss(logits, label, weight=None, ignore_index=255)``.

    Logits are (N, C, H, W), labels (N, H, W) with ids and the ignore index.

    Attributes:
        loss: config of the loss.
        num_classes: C.
        pixel_weight: the loss takes ``weight`` (N, H, W), one factor per pixel.
        ignores_pixels: ignored pixels have no influence at all.
        reductions: those that ``reduction`` takes beside the default; ``'none'`` is checked to
            sum to ``'sum'`` where both are there.
        state: keys of the loss's state on purpose. Anything in there that a plain model lacks
            would keep a checkpoint from loading strictly.
    """

    loss: dict
    num_classes: int = 4
    pixel_weight: bool = True
    ignores_pixels: bool = True
    reductions: tuple[str, ...] = ('none', 'sum', 'mean')
    state: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.pixel_weight:
            cls.test_weight_zero_takes_a_pixel_out = None
        if not cls.ignores_pixels:
            cls.test_ignored_pixels_have_no_influence = None
        if not cls.reductions:
            cls.test_reductions_agree = None

    def build(self, **changes: Any) -> nn.Module:
        return MODELS.build(copy.deepcopy({**self.loss, **changes}))

    def logits(self, size: tuple[int, int] = (6, 5), batch: int = 2) -> Tensor:
        return torch.randn(batch, self.num_classes, *size, dtype=torch.float64).requires_grad_()

    def label(self, size: tuple[int, int] = (6, 5), batch: int = 2) -> Tensor:
        """Random ids of which some are ignored: the left column always is, the right never."""
        label = torch.randint(self.num_classes, (batch, *size))
        ignored = torch.rand(batch, *size) < 0.2
        ignored[..., 0], ignored[..., -1] = True, False
        return label.masked_fill(ignored, 255)

    def value(self, loss: nn.Module, logits: Tensor, label: Tensor, **kwargs: Any) -> Tensor:
        """The loss as a head calls it."""
        return loss(logits, label, **{'weight': None, 'ignore_index': 255, **kwargs})

    def gradient(self, loss: nn.Module, logits: Tensor, label: Tensor, **kwargs: Any) -> Tensor:
        logits = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.value(loss, logits, label, **kwargs).sum(), logits)
        return gradient

    # --- checks --------------------------------------------------------------------------------

    def test_value_is_a_finite_scalar(self) -> None:
        value = self.value(self.build(), self.logits().float(), self.label())
        assert value.shape == ()
        assert value.isfinite()

    def test_gradient_is_the_derivative(self) -> None:
        loss, label = self.build(), self.label((3, 4))
        assert torch.autograd.gradcheck(
            lambda logits: self.value(loss, logits, label), (self.logits((3, 4)),)
        )

    def test_truth_costs_less_than_an_error(self) -> None:
        loss, label = self.build(), self.label()
        known = label.where(label != 255, label.new_zeros(()))
        truth = nn.functional.one_hot(known, self.num_classes).permute(0, 3, 1, 2).double()
        right = self.value(loss, 8 * truth, label)
        wrong = self.value(loss, 8 * truth.roll(1, dims=1), label)
        assert right < wrong

    def test_ignored_pixels_have_no_influence(self) -> None:
        loss, logits, label = self.build(), self.logits(), self.label()
        ignored = (label == 255)[:, None].expand_as(logits)
        gradient = self.gradient(loss, logits, label)
        assert not gradient[ignored].any(), 'ignored pixels get a gradient'
        assert gradient[~ignored].any()
        moved = logits.detach().masked_fill(ignored, 3.0)
        torch.testing.assert_close(
            self.value(loss, moved, label), self.value(loss, logits.detach(), label)
        )

    def test_ignore_index_of_the_head_counts(self) -> None:
        loss, logits, label = self.build(), self.logits(), self.label()
        renamed = label.where(label != 255, label.new_full((), 77))
        torch.testing.assert_close(
            self.value(loss, logits, renamed, ignore_index=77), self.value(loss, logits, label)
        )

    def test_nothing_but_ignored_pixels(self) -> None:
        loss, logits = self.build(), self.logits()
        label = torch.full((2, 6, 5), 255)
        assert self.value(loss, logits, label).isfinite()
        assert self.gradient(loss, logits, label).isfinite().all()

    def test_one_class_only(self) -> None:
        loss, logits = self.build(), self.logits()
        label = torch.zeros(2, 6, 5, dtype=torch.long)
        assert self.value(loss, logits, label).isfinite()
        assert self.gradient(loss, logits, label).isfinite().all()

    @pytest.mark.parametrize('scale', [1e4, 6e4])
    def test_large_logits(self, scale: float) -> None:
        loss, label = self.build(), self.label()
        logits = scale * self.logits().detach().sign().float()
        assert self.value(loss, logits, label).isfinite()
        assert self.gradient(loss, logits, label).isfinite().all()

    def test_bfloat16_autocast(self) -> None:
        loss, logits, label = self.build(), self.logits().float().detach(), self.label()
        half = logits.bfloat16().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            value = self.value(loss, half, label)
        value.backward()
        expected = self.value(loss, logits, label)
        assert value.item() == pytest.approx(expected.item(), rel=0.05, abs=0.02)
        error = relative_error([half.grad], [self.gradient(loss, logits, label)])
        assert error < 0.05, f'the gradient in bfloat16 differs by {error:.3f} from float32'

    def test_name_is_summed(self) -> None:
        assert self.build().loss_name.startswith('loss_'), 'mmengine sums only what is named loss_'
        assert self.build(loss_name='loss_other').loss_name == 'loss_other'

    def test_loss_weight_is_a_factor(self) -> None:
        logits, label = self.logits(), self.label()
        one = self.value(self.build(loss_weight=1.0), logits, label)
        three = self.value(self.build(loss_weight=3.0), logits, label)
        torch.testing.assert_close(three, 3 * one)

    def test_weight_zero_takes_a_pixel_out(self) -> None:
        loss, logits, label = self.build(), self.logits(), self.label()
        weight = torch.ones(label.shape, dtype=torch.float64)
        weight[:, :3] = 0
        gradient = self.gradient(loss, logits, label, weight=weight)
        assert not gradient[:, :, :3].any(), 'a pixel of weight 0 gets a gradient'
        assert gradient[:, :, 3:].any()

    def test_reductions_agree(self) -> None:
        logits, label = self.logits(), self.label()
        value = {r: self.value(self.build(reduction=r), logits, label) for r in self.reductions}
        assert all(v.isfinite().all() for v in value.values())
        if {'none', 'sum'} <= set(value):
            torch.testing.assert_close(value['none'].sum(), value['sum'])
        if {'mean', 'sum'} <= set(value):
            assert value['mean'] < value['sum']

    def test_state_fits_a_plain_model(self) -> None:
        loss = self.build()
        self.value(loss, self.logits(), self.label())
        assert tuple(loss.state_dict()) == self.state

    def test_copies_and_pickles_after_use(self) -> None:
        loss, logits, label = self.build(), self.logits(), self.label()
        expected = self.value(loss, logits, label)
        expected.backward()
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            torch.testing.assert_close(self.value(twin, logits, label), expected)

    def test_inside_a_head(self) -> None:
        head = MODELS.build(
            dict(
                type='FCNHead',
                in_channels=8,
                channels=8,
                num_convs=1,
                num_classes=self.num_classes,
                norm_cfg=dict(type='BN'),
                loss_decode=copy.deepcopy(self.loss),
            )
        )
        size = (33, 47)
        levels = toy_features([8], [4], size)
        assert levels[0].shape[2:] == level_size(size, 4)
        losses = head.loss(levels, toy_samples(self.num_classes, size), train_cfg=Config())
        value = losses[head.loss_decode.loss_name]
        value.sum().backward()
        assert head.conv_seg.weight.grad.any()
        assert head.conv_seg.weight.grad.isfinite().all()
