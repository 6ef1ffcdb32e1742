"""Proposition 3.1 on a real model: scales before and after equalization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmseg_fusion.analysis.scale_report import (
    BEFORE,
    EXPLICIT,
    FOLDED,
    draw_report,
    gradient_scales,
    model_and_batches,
    report_rows,
    scale_report,
)
from mmseg_fusion.fusions import Fusion

from ..engine.small import config
from ..engine.test_scale_equalizer_hook import BIASED

pytestmark = pytest.mark.filterwarnings('ignore')


class Linear(nn.Module):
    """y = w1 x1 + w2 x2, the fusion of proposition 3.1."""

    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1, groups=groups)

    def forward(self, x):
        return self.conv(torch.cat([x, x], 1))


@pytest.mark.parametrize('groups', [1, 4])
def test_gradient_of_each_block_against_autograd(groups):
    model = Linear(groups)
    fusion = Fusion('conv', model.conv, (2, 6), ((5, 5), (5, 5)))
    batches = [torch.randn(3, 8, 5, 5) for _ in range(3)]

    def loss(x):
        return model.conv(x).square().mean()

    found = gradient_scales(model, batches, loss, [fusion])['conv']
    torch.stack([loss(x) for x in batches]).mean().backward()
    # Input channel by input channel, whatever the groups.
    per_channel = [[] for _ in range(8)]
    for out in range(4):
        for j in range(8 // groups):
            channel = out // (4 // groups) * (8 // groups) + j
            per_channel[channel].append(model.conv.weight.grad[out, j].item())
    for value, channels in zip(found, (range(2), range(2, 8))):
        expected = torch.tensor([g for c in channels for g in per_channel[c]])
        assert value == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-4)


def test_gradient_leaves_the_model_as_it_is():
    model = Linear()
    model.conv.bias.requires_grad_(False)
    fusion = Fusion('conv', model.conv, (4, 4), ((5, 5), (5, 5)))
    gradient_scales(model, [torch.randn(1, 8, 5, 5)], lambda x: model.conv(x).sum(), [fusion])
    assert model.conv.weight.requires_grad
    assert not model.conv.bias.requires_grad
    assert model.conv.weight.grad is None


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    model, batches = model_and_batches(
        config(tmp_path_factory.mktemp('report'), length=16), num_images=9
    )
    assert [len(b['inputs']) for b in batches] == [4, 5]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = scale_report(model, batches)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return made


def test_unequal_before_and_equal_after(report):
    assert [(e.layer, e.branch) for e in report] == [
        *(('decode_head.bottleneck.conv', i) for i in range(3)),
        *(('decode_head.fpn_bottleneck.conv', i) for i in range(4)),
    ]
    last = report[3:]
    assert max(e.std[BEFORE] for e in last) / min(e.std[BEFORE] for e in last) > 1.1
    for entry in report:
        assert entry.std[EXPLICIT] == pytest.approx(1, abs=0.1)
        # Folding leaves the feature as it is.
        assert entry.std[FOLDED] == pytest.approx(entry.std[BEFORE], rel=0.1)


def test_folded_gradient_is_that_of_the_explicit_one_times_std(report):
    """The same function of the weights, so dL/dw' = dL/dw * std: facts of the two forms."""
    for entry in report:
        expected = entry.gradient[EXPLICIT] * entry.std[BEFORE]
        assert entry.gradient[FOLDED] == pytest.approx(expected, rel=0.05)


def test_rows_and_chart(report, tmp_path):
    rows = report_rows(report)
    assert len(rows) == 7
    assert rows[0]['size'] == '2x2'
    draw_report(report, tmp_path / 'chart.png', 'a title')
    assert (tmp_path / 'chart.png').read_bytes()[:4] == b'\x89PNG'


def test_layers_by_name_of_a_module_around_them(tmp_path):
    model, batches = model_and_batches(config(tmp_path, length=4))
    made = scale_report(model, batches, ['decode_head.fpn_bottleneck'])
    assert {e.layer for e in made} == {'decode_head.fpn_bottleneck.conv'}
    with pytest.raises(ValueError, match=r"'decode_head.nothing' is no fusion layer"):
        scale_report(model, batches, ['decode_head.nothing'])


def test_linear_fusion_behind_one_without_norm(tmp_path):
    model, batches = model_and_batches(config(tmp_path, head=BIASED, length=6, batch_size=3))
    made = {(e.layer, e.branch): e for e in scale_report(model, batches)}
    for branch in range(2):
        assert made['decode_head.linear', branch].std[EXPLICIT] == pytest.approx(1, abs=0.05)


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(ValueError, match='at least 2'):
        model_and_batches(config(tmp_path), num_images=1)


def test_no_fusion(tmp_path):
    head = dict(type='FCNHead', in_channels=32, in_index=3, channels=6, num_convs=1, num_classes=8)
    model, batches = model_and_batches(config(tmp_path, head=dict(head, concat_input=False)))
    with pytest.raises(RuntimeError, match='concatenated along the channels'):
        scale_report(model, batches)
