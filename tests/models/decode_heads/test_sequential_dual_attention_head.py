"""Dual attention in sequence: the equations, and a branch that changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_fusion.models.decode_heads import SequentialDualAttentionHead
from tests.testers import HeadTester
from tests.testers.toys import toy_features, toy_samples

ORDERS = ('channel_spatial', 'spatial_channel')
BASE = dict(in_channels=6, in_index=0, channels=8, pam_channels=3, num_classes=5)


def build(**changes) -> SequentialDualAttentionHead:
    """A head in float64 whose attentions are open: their gates start at 0."""
    cfg = dict(type='SequentialDualAttentionHead', norm_cfg=dict(type='BN'), **BASE)
    head = MODELS.build(copy.deepcopy({**cfg, **changes})).double().train()
    for attention in (head.cam, head.pam):
        torch.nn.init.constant_(attention.gamma.scale, 0.7)
    return head


class TestSequentialDualAttentionHead(HeadTester):
    head = dict(type='SequentialDualAttentionHead', pam_channels=4, in_index=3)
    stride = 32
    channels, strides = (8, 16, 32, 64), (4, 8, 16, 32)
    plain_convolutions = ('pam.*', 'branch_conv_seg')
    # On 2 x 2 cells a ReLU may be shut everywhere.
    image_sizes = ((160, 160), (33, 47), (50, 31))
    # Behind a gate that starts at 0, as in DAHead.
    zero_gradients = ('pam.*_project.*',)

    def check_outputs(self, outputs, size, batch) -> None:
        super().check_outputs(outputs, size, batch)
        assert outputs[1].shape == outputs[0].shape


def naive_channel_attention(x: Tensor, gamma: float) -> Tensor:
    """DANet's equations 3 and 4, channel by channel; the softmax is over the distance to the
    largest similarity."""
    out = torch.empty_like(x)
    for n, image in enumerate(x):
        rows = [channel.flatten() for channel in image]
        for i, row in enumerate(rows):
            similar = torch.stack([row @ other for other in rows])
            weight = torch.softmax(similar.max() - similar, 0)
            mixed = sum(w * other for w, other in zip(weight, rows))
            out[n, i] = (gamma * mixed + row).view_as(image[i])
    return out


def naive_spatial_attention(head: SequentialDualAttentionHead, x: Tensor, gamma: float) -> Tensor:
    """DANet's equations 1 and 2, pixel by pixel."""
    query, key, value = (
        getattr(head.pam, f'{name}_project')(x) for name in ('query', 'key', 'value')
    )
    out = torch.empty_like(x)
    _, _, height, width = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    for n in range(len(x)):
        for i, j in places:
            similar = torch.stack([query[n, :, i, j] @ key[n, :, k, m] for k, m in places])
            weight = torch.softmax(similar, 0)
            mixed = sum(w * value[n, :, k, m] for w, (k, m) in zip(weight, places))
            out[n, :, i, j] = gamma * mixed + x[n, :, i, j]
    return out


@pytest.mark.stack
@pytest.mark.parametrize('order', ORDERS)
def test_equations(order: str) -> None:
    head = build(order=order).eval()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    found, found_branch = head([x])
    feat = head.in_conv(x)
    if order == 'channel_spatial':
        first = head.cam_out_conv(naive_channel_attention(feat, 0.7))
        second = head.pam_out_conv(naive_spatial_attention(head, first, 0.7))
    else:
        first = head.pam_out_conv(naive_spatial_attention(head, feat, 0.7))
        second = head.cam_out_conv(naive_channel_attention(first, 0.7))
    torch.testing.assert_close(found, head.conv_seg(second))
    torch.testing.assert_close(found_branch, head.branch_conv_seg(first))


@pytest.mark.parametrize('order', ORDERS)
def test_branch_reaches_nothing_but_itself(order: str) -> None:
    head, x = build(order=order), torch.randn(2, 6, 9, 7, dtype=torch.float64)
    x.requires_grad_()
    losses = head.loss([x], toy_samples(5, (17, 13)), Config())
    branch = losses[f'{head.branch}.loss_ce']
    named = dict(head.named_parameters(), x=x)
    gradients = torch.autograd.grad(branch, list(named.values()), allow_unused=True)
    reached = {name for name, g in zip(named, gradients) if g is not None}
    assert reached == {'branch_conv_seg.weight', 'branch_conv_seg.bias'}
    # And the head's own loss reaches all the rest.
    gradients = torch.autograd.grad(losses['loss_ce'], list(named.values()), allow_unused=True)
    assert {name for name, g in zip(named, gradients) if g is None or not g.any()} == reached


def trained(branch: bool) -> SequentialDualAttentionHead:
    """Three steps, with the branch's loss or without; dropout is on."""
    torch.manual_seed(0)
    head = build(dropout_ratio=0.5)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        inputs = [torch.randn(2, 6, 5, 6, dtype=torch.float64)]
        losses = head.loss(inputs, toy_samples(5, (10, 12)), Config())
        optimizer.zero_grad()
        (losses['loss_ce'] + branch * losses['cam.loss_ce']).backward()
        optimizer.step()
    return head


def test_training_is_the_same_to_the_bit_without_the_branch() -> None:
    with_branch, without = trained(True).state_dict(), trained(False).state_dict()
    differ = {name for name in without if not torch.equal(with_branch[name], without[name])}
    assert differ == {'branch_conv_seg.weight', 'branch_conv_seg.bias'}


def test_predicts_the_second_attention() -> None:
    head = build().eval()
    x = [torch.randn(1, 6, 4, 5, dtype=torch.float64)]
    meta = [dict(img_shape=(4, 5), pad_shape=(4, 5))]
    torch.testing.assert_close(head.predict(x, meta, Config()), head(x)[0])


def test_parts_are_danets() -> None:
    """The weights of DAHead's attentions load."""
    ours = build()
    theirs = MODELS.build(dict(type='DAHead', norm_cfg=dict(type='BN'), **BASE)).double()
    for name in ('cam', 'pam', 'cam_out_conv', 'pam_out_conv', 'conv_seg'):
        state = getattr(theirs, name).state_dict()
        getattr(ours, name).load_state_dict(state, strict=True)


def test_channel_attention_of_large_features_in_float16() -> None:
    # Sums of 64 x 64 products of 10 by 10 exceed float16.
    head = build().float().eval()
    torch.nn.init.constant_(head.in_conv.bn.bias, 10.0)
    x = toy_features((6,), (1,), (64, 64), batch=1)
    with torch.no_grad():
        expected = head(x)
        with torch.autocast('cpu', dtype=torch.float16):
            found = head(x)
    for f, e in zip(found, expected):
        assert f.isfinite().all()
        torch.testing.assert_close(f.float(), e, rtol=0.02, atol=0.02 * e.abs().max().item())


def test_unknown_order() -> None:
    with pytest.raises(
        ValueError, match=r"channel_spatial, spatial_channel, but got 'both'.*order"
    ):
        build(order='both')


def test_runs_on_shapes_alone() -> None:
    # FLOPs are counted on the meta device, which has no autocast.
    head = build().to('meta').eval()
    logits, branch = head([torch.empty(1, 6, 5, 4, dtype=torch.float64, device='meta')])
    assert logits.shape == branch.shape == (1, 5, 5, 4)
