"""CPNet's head: the base tester, the paper's formula, its size, the prior's loss."""

from __future__ import annotations

import copy

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.models.decode_heads.cp_head import AggregationModule

from ...testers import HeadTester

SMALL = dict(type='CPHead', in_index=1, prior_channels=8, prior_size=(5, 6), am_kernel_size=5)


class TestCPHead(HeadTester):
    head = SMALL

    def check_outputs(self, outputs, size, batch):
        assert outputs[0].shape == (batch, self.config()['num_classes'], 5, 6)

    def test_losses_have_that_of_the_prior(self):
        size = self.image_sizes[1]
        inputs, samples = self.inputs(size), self.samples(size)
        head = self.build(dropout_ratio=0)
        losses = self.losses(head, inputs, samples)
        assert list(losses) == ['loss_ce', 'acc_seg', 'loss_affinity']
        twice = self._twin(
            head, dropout_ratio=0, loss_prior_decode=dict(type='AffinityLoss', loss_weight=2.0)
        )
        weighted = self.losses(twice, inputs, samples)
        torch.testing.assert_close(weighted['loss_affinity'], 2 * losses['loss_affinity'])
        without = self._twin(head, dropout_ratio=0, loss_prior_decode=None)
        assert 'loss_affinity' not in self.losses(without, inputs, samples)

    def test_prior_learns_which_cells_belong_together(self):
        size = (40, 48)
        head, inputs = self.build(), self.inputs(size)
        samples = self.samples(size)
        for sample in samples:
            sample.gt_sem_seg.data[:] = 0
            sample.gt_sem_seg.data[..., 24:] = 3
        optimizer = torch.optim.Adam(head.parameters(), 0.05)
        history = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = self.losses(head, inputs, samples)['loss_affinity']
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert history[-1] < 0.3 * history[0]
        prior = head._forward_feature(inputs)[1].flatten(2)
        columns = torch.arange(30) % 6 < 3
        ideal = columns[:, None] == columns
        assert ((prior > 0) == ideal).float().mean() > 0.95


def build(**kwargs) -> nn.Module:
    options = dict(in_channels=16, channels=12, num_classes=4, norm_cfg=dict(type='BN'))
    return MODELS.build(copy.deepcopy({**SMALL, **options, **kwargs}))


@pytest.mark.stack
def test_context_is_the_product_with_the_prior_and_its_reverse():
    head = build().double().eval()
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    value = head.aggregation(x)
    prior = head.prior_conv(value)
    # Row i, column j: what cell j is to cell i.
    p = prior.flatten(2).transpose(1, 2).sigmoid()
    v = value.flatten(2).transpose(1, 2)
    intra, inter = (
        conv((q @ v / 30).transpose(1, 2).reshape(2, 8, 5, 6))
        for conv, q in ((head.intra_conv, p), (head.inter_conv, 1 - p))
    )
    expected = head.conv_seg(head.bottleneck(torch.cat([x, intra, inter], 1)))
    torch.testing.assert_close(head([x, x]), expected)
    torch.testing.assert_close(head._forward_feature([x, x])[1], prior)


def test_a_feature_of_the_grids_size_is_not_resized(monkeypatch):
    from mmseg_fusion.models.decode_heads import cp_head

    seen = []
    resize = cp_head.resize

    def spy(x, **kwargs):
        seen.append(tuple(x.shape[2:]))
        return resize(x, **kwargs)

    monkeypatch.setattr(cp_head, 'resize', spy)
    head = build().eval()
    for size in ((5, 6), (9, 4), (6, 5)):
        x = torch.randn(1, 16, *size)
        assert head([x, x]).shape == (1, 4, 5, 6)
    assert seen == [(9, 4), (6, 5)]


def test_cells_of_a_channel_are_numbered_by_rows():
    """A label and the prior that is right for it must agree on the order of the cells."""
    head = build(prior_size=(2, 3), loss_prior_decode=dict(type='AffinityLoss', exclude_self=False))
    label = torch.tensor([[[0, 0, 1], [2, 2, 2]]])
    ids = label.flatten()
    right = (16.0 * (ids[:, None] == ids) - 8).view(1, 6, 2, 3)
    assert head.loss_prior_decode(right, label) < 0.01


def test_parameters_of_the_papers_head():
    with torch.device('meta'):
        head = MODELS.build(
            dict(
                type='CPHead',
                in_channels=2048,
                in_index=3,
                channels=512,
                num_classes=59,
                norm_cfg=dict(type='BN'),
            )
        )
    assert head.bottleneck.conv.in_channels == 3072
    norm = 2 * 512
    aggregation = 9 * 2048 * 512 + norm + 4 * 512 * (11 + 1) + norm
    prior = 512 * 64 * 64 + 2 * 64 * 64
    contexts = 2 * (512 * 512 + norm)
    last = 9 * 3072 * 512 + norm
    classifier = 512 * 59 + 59
    expected = aggregation + prior + contexts + last + classifier
    assert sum(p.numel() for p in head.parameters()) == expected


def test_aggregation_sees_a_square_and_no_more():
    module = AggregationModule(2, 3, kernel_size=5, norm_cfg=None, act_cfg=None).double()
    x = torch.randn(1, 2, 15, 15, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[..., 7, 7].sum(), x)
    seen = gradient.abs().sum((0, 1)) > 0
    expected = torch.zeros(15, 15, dtype=torch.bool)
    expected[4:11, 4:11] = True  # 5 x 5, widened by the 3x3 convolution before
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(am_kernel_size=4), 'am_kernel_size must be odd, got 4'),
        (dict(prior_size=0), 'prior_size'),
        (dict(prior_size=(4, 4, 4)), 'prior_size'),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_sums_over_all_cells_stay_in_half_precisions_range():
    """The product with the prior is a mean: nothing as large as the sum is stored."""
    head = build(norm_cfg=None, prior_size=32).eval()
    x = torch.full((1, 16, 32, 32), 600.0)
    with torch.no_grad():
        value = head.aggregation(x).flatten(2)
        prior = head.prior_conv(value.view(1, 8, 32, 32)).sigmoid().flatten(2)
        assert (value @ prior).max() > torch.finfo(torch.float16).max > value.max()
        with torch.autocast('cpu', dtype=torch.float16):
            logits = head([x, x])
        expected = head([x, x])
        assert (logits - expected).norm() < 0.02 * expected.norm()
