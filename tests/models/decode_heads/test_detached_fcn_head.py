"""DetachedFCNHead: FCNHead, but for the gradient that its inputs do not get."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import Tensor

from tests.testers import HeadTester, segmentor_config
from tests.testers.toys import toy_features, toy_samples

LEVELS, STRIDES, SIZE = (8, 16, 32, 64), (4, 8, 16, 32), (64, 64)


class TestDetachedFCNHead(HeadTester):
    head = dict(type='DetachedFCNHead', in_index=2, num_convs=1)
    stride = 16

    def test_gradient_reaches_every_level(self):
        """It reaches none, and every parameter of the head."""
        head, inputs = self.build(), [x.requires_grad_() for x in self.inputs(SIZE)]
        self.loss(head, inputs, SIZE).backward()
        assert [x.grad for x in inputs] == [None] * 4
        self.check_gradients(head)


def build(kind: str, **changes):
    cfg = dict(type=kind, in_channels=32, in_index=2, channels=6, num_classes=5, dropout_ratio=0)
    head = MODELS.build(copy.deepcopy({**cfg, 'norm_cfg': dict(type='BN'), **changes}))
    head.init_weights()
    return head.train()


@pytest.mark.stack
@pytest.mark.parametrize(
    'changes',
    [
        dict(num_convs=2, concat_input=False, kernel_size=1),
        dict(in_channels=list(LEVELS), in_index=[0, 1, 2, 3], input_transform='resize_concat'),
    ],
    ids=['one level', 'four levels'],
)
def test_is_mmsegs_in_all_else(changes):
    ours, theirs = build('DetachedFCNHead', **changes), build('FCNHead', **changes)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = [x.requires_grad_() for x in toy_features(LEVELS, STRIDES, SIZE)]
    samples, found, gradients = toy_samples(5, SIZE), [], []
    for head in (ours, theirs):
        losses = head.loss(inputs, samples, Config())
        found.append(losses)
        wanted = [*inputs, *head.parameters()]
        gradients.append(torch.autograd.grad(losses['loss_ce'], wanted, allow_unused=True))
    assert list(found[0]) == list(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    (mine, own), (mmsegs, same) = ((g[:4], g[4:]) for g in gradients)
    assert mine == (None,) * 4
    used = {id(inputs[i]) for i in ([2] if ours.in_index == 2 else ours.in_index)}
    assert {id(x) for x, g in zip(inputs, mmsegs) if g is not None and g.any()} == used
    assert all(torch.equal(a, b) for a, b in zip(own, same))
    # Running statistics moved alike.
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    with torch.no_grad():
        assert torch.equal(ours.eval()(inputs), theirs.eval()(inputs))


def model(auxiliary: str | None) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A segmentor with an auxiliary head, and the gradients of its total loss."""
    torch.manual_seed(0)
    common = dict(channels=6, num_classes=5, norm_cfg=dict(type='BN'), dropout_ratio=0)
    main = dict(type='SemanticFPNHead', in_channels=list(LEVELS), **common)
    cfg = segmentor_config(main, dict(type='TinyPyramid')).model
    if auxiliary:
        cfg.auxiliary_head = dict(type=auxiliary, in_channels=64, in_index=3, **common)
    made = MODELS.build(cfg).train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *SIZE, generator=generator)
    torch.manual_seed(2)
    total, _ = made.parse_losses(made.loss(images, toy_samples(5, SIZE)))
    total.backward()
    return made, {name: p.grad for name, p in made.named_parameters()}


def test_beside_an_upsampler_it_changes_nothing():
    """Section 5.1: the probe watches the backbone of a Semantic FPN."""
    alone, watched, trained = (model(kind)[1] for kind in (None, 'DetachedFCNHead', 'FCNHead'))
    probe = set(watched) - set(alone)
    assert all(name.startswith('auxiliary_head.') for name in probe)
    assert all(watched[name] is not None and watched[name].any() for name in probe)
    assert all(torch.equal(watched[name], alone[name]) for name in alone)
    # mmseg's own reaches the backbone, all of it.
    backbone = [name for name in alone if name.startswith('backbone.')]
    assert not any(torch.equal(trained[name], alone[name]) for name in backbone)
