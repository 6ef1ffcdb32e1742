"""CPNet's affinity loss: the base tester, the paper's equations as loops, the authors' variant."""

from __future__ import annotations

import math

import pytest
import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.models.losses import AffinityLoss

from ...testers import LossTester


class AffinityTester(LossTester):
    """The prior has a channel per cell where other losses have one per class."""

    # Pairs of cells have no weight of their own, and the loss is one number.
    pixel_weight = False
    reductions = ()
    # It takes the prior of a CPHead: see that head's tests.
    test_inside_a_head = None

    def logits(self, size: tuple[int, int] = (6, 5), batch: int = 2) -> Tensor:
        cells = size[0] * size[1]
        return torch.randn(batch, cells, *size, dtype=torch.float64).requires_grad_()

    def value(self, loss: nn.Module, logits: Tensor, label: Tensor, **kwargs) -> Tensor:
        kwargs.pop('weight', None)
        return loss(logits, label, **kwargs)

    def test_truth_costs_less_than_an_error(self) -> None:
        loss, label = self.build(), self.label()
        cells = label.flatten(1)
        truth = (cells[:, :, None] == cells[:, None]).double().view(2, 30, 6, 5)
        right = self.value(loss, 16 * truth - 8, label)
        wrong = self.value(loss, 8 - 16 * truth, label)
        # A cell is missing from the hits of its own precision: its least cost is not 0.
        assert right < 0.1 * wrong
        assert self.value(self.build(exclude_self=False), 16 * truth - 8, label) < 0.01


class TestAffinityLoss(AffinityTester):
    loss = dict(type='AffinityLoss')
    ignores_pixels = False


class TestAffinityLossWithoutIgnored(AffinityTester):
    loss = dict(type='AffinityLoss', ignored='leave_out')

    def test_ignored_pixels_have_no_influence(self) -> None:
        loss, logits, label = self.build(), self.logits(), self.label()
        ignored = (label == 255).flatten(1)
        pairs = (ignored[:, :, None] | ignored[:, None]).view_as(logits)
        gradient = self.gradient(loss, logits, label)
        assert not gradient[pairs].any(), 'pairs with ignored pixels get a gradient'
        assert gradient[~pairs].all()
        moved = logits.detach().masked_fill(pairs, 3.0)
        torch.testing.assert_close(
            self.value(loss, moved, label), self.value(loss, logits.detach(), label)
        )


def naive(prior: Tensor, label: Tensor, exclude_self: bool, ignored: str) -> float:
    """Unary and global term, one pair at a time, for a label of the prior's size."""
    unary, cells = [], []
    for logits, ids in zip(prior.flatten(2).tolist(), label.flatten(1).tolist()):
        places = [i for i, k in enumerate(ids) if ignored == 'class' or k != 255]
        for i in places:
            hits = total = rejected = 0.0
            same = others = 0
            for j in places:
                # Channel j of cell i.
                p = 1 / (1 + math.exp(-logits[j][i]))
                a = ids[i] == ids[j]
                unary.append(-math.log(p if a else 1 - p))
                total += p
                if a and not (exclude_self and i == j):
                    hits, same = hits + p, same + 1
                elif not a:
                    rejected, others = rejected + 1 - p, others + 1
            cost = 0.0
            if same:
                cost -= math.log(hits / total) + math.log(hits / same)
            if others:
                cost -= math.log(rejected / others)
            cells.append(cost)
    return sum(unary) / len(unary) + sum(cells) / len(cells)


@pytest.mark.stack
@pytest.mark.parametrize('ignored', ['class', 'leave_out'])
@pytest.mark.parametrize('exclude_self', [True, False])
def test_equations(exclude_self, ignored):
    prior = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    label = torch.tensor(
        [
            [[0, 0, 1, 1], [255, 255, 2, 0], [1, 1, 2, 0]],
            # 3 is alone, so that nothing can be recalled.
            [[3, 0, 0, 0], [0, 0, 0, 0], [0, 255, 0, 0]],
        ]
    )
    loss = AffinityLoss(exclude_self=exclude_self, ignored=ignored)
    expected = naive(prior, label, exclude_self, ignored)
    assert loss(prior, label).item() == pytest.approx(expected, rel=1e-12)


def test_authors_formula_with_its_constants():
    """The released code as products of matrices, whose terms without a cell cost 100."""
    prior = torch.randn(2, 12, 3, 4, dtype=torch.float64).requires_grad_()
    label = torch.randint(4, (2, 3, 4))
    label[0, 0] = torch.tensor([7, 255, 255, 0])
    p = prior.flatten(2).sigmoid().transpose(1, 2)
    ids = label.flatten(1)
    ideal = (ids[:, :, None] == ids[:, None]).double()
    without_self = ideal * (1 - torch.eye(12))
    cost = nn.functional.binary_cross_entropy
    expected = cost(p, ideal)
    alone = 0
    for part, whole in (
        ((p * without_self).sum(2), without_self.sum(2)),
        (((1 - p) * (1 - ideal)).sum(2), (1 - ideal).sum(2)),
        ((p * without_self).sum(2), p.sum(2)),
    ):
        ratio = part / whole.where(whole > 0, torch.ones_like(whole))
        alone += (ratio == 0).sum().item()
        expected = expected + cost(ratio, torch.ones_like(ratio))
    assert alone >= 2  # precision and recall of the only 7
    found = AffinityLoss()(prior, label)
    torch.testing.assert_close(found, expected - 100 * alone / label.numel())
    torch.testing.assert_close(
        torch.autograd.grad(found, prior)[0], torch.autograd.grad(expected, prior)[0]
    )


def test_terms_are_weighted():
    prior, label = torch.randn(2, 12, 3, 4), torch.randint(3, (2, 3, 4))
    unary, whole, both = (
        AffinityLoss(unary_weight=u, global_weight=g)(prior, label)
        for u, g in ((1, 0), (0, 1), (2, 3))
    )
    torch.testing.assert_close(both, 2 * unary + 3 * whole)
    assert unary > 0
    assert whole > 0


def test_labels_are_brought_to_the_grid():
    prior, label = torch.randn(2, 12, 3, 4), torch.randint(3, (2, 3, 4))
    large = label.repeat_interleave(5, 1).repeat_interleave(2, 2)
    loss = AffinityLoss()
    assert torch.equal(loss(prior, large), loss(prior, label))
    assert torch.equal(loss(prior, label.to(torch.uint8)), loss(prior, label))


@pytest.mark.parametrize(
    ('prior', 'label', 'message'),
    [
        ((2, 19, 3, 4), (2, 3, 4), r'\(2, 19, 3, 4\).*loss_prior_decode'),
        ((2, 12, 12), (2, 3, 4), r'\(N, h \* w, h, w\)'),
        ((2, 12, 3, 4), (3, 3, 4), r'N=2, got \(3, 3, 4\)'),
        ((2, 12, 3, 4), (2, 1, 3, 4), r'got \(2, 1, 3, 4\)'),
    ],
)
def test_shapes_that_do_not_fit(prior, label, message):
    with pytest.raises(ValueError, match=message):
        AffinityLoss()(torch.randn(prior), torch.zeros(label, dtype=torch.long))


def test_unknown_option():
    with pytest.raises(ValueError, match="ignored must be 'class' or 'leave_out', got 'mask'"):
        MODELS.build(dict(type='AffinityLoss', ignored='mask'))
