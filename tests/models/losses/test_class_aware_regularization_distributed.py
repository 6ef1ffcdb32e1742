"""CAR in two processes with gloo: centres of the whole batch, and the gradients of one process."""

from __future__ import annotations

import pytest
import torch
from mmengine.dist import init_dist
from torch.nn.parallel import DistributedDataParallel

from mmseg_fusion.models.losses import ClassAwareRegularization

from ...distributed import in_processes

pytestmark = [pytest.mark.stack, pytest.mark.filterwarnings('ignore')]

CLASSES, CHANNELS = 5, 6


def batch(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images and their labels, of which each process sees two."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 7, 5, generator=generator)
    label = torch.randint(CLASSES, (4, 7, 5), generator=generator)
    label[torch.rand(label.shape, generator=generator) < 0.2] = 255
    if case == 'one ignores all':
        label[2:] = 255
    elif case == 'other classes':
        label[:2] = label[:2].where(label[:2] == 255, label[:2] % 2)
        label[2:] = label[2:].where(label[2:] == 255, 2 + label[2:] % 2)
    return images, label


MOVING = dict(moving_average=0.9, channels=CHANNELS, moving_average_gradient=True)
CASES = {
    'mixed': {},
    'other classes': {},
    'one ignores all': {},
    'moving average': MOVING,
}


def train_step(case: str, rank: int, world: int) -> dict:
    """Losses, centres and gradients of c2c, as one of ``world`` processes sees them."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, CHANNELS, 1)
    loss = ClassAwareRegularization(CLASSES, **CASES[case])
    images, label = (x.chunk(world)[rank] for x in batch(case))
    model = DistributedDataParallel(layer) if world > 1 else layer
    feat = model(images)
    losses = loss(feat, label)
    c2c = losses['loss_car_inter_c2c']
    (feature,) = torch.autograd.grad(c2c, feat, retain_graph=True)
    c2c.backward()

    x, index = feat.detach().flatten(2), label.flatten(1)
    index = index.masked_fill(index == 255, CLASSES)
    centers, present = loss.eval()._centers(x, index)
    return dict(
        losses={k: v.detach() for k, v in losses.items()},
        feature=feature,
        gradients={k: p.grad.clone() for k, p in layer.named_parameters()},
        centers=centers,
        state=loss.state_dict(),
        # What each half of the batch costs about these centres.
        halves=[
            dict(
                loss_car_intra_c2p=loss._intra_c2p(a, b, centers),
                loss_car_inter_c2p=loss._inter_c2p(a, b, centers, present),
            )
            for a, b in zip(x.split(2), index.split(2))
        ],
    )


def work(rank: int, world: int) -> dict[str, dict]:
    init_dist('pytorch', backend='gloo')
    return {case: train_step(case, rank, world) for case in CASES}


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> list[dict]:
    """What each of two processes found, by case."""
    return in_processes(work, 2, tmp_path_factory.mktemp('two'))


@pytest.mark.parametrize('case', [c for c in CASES if c != 'moving average'])
def test_two_processes_give_centres_and_c2c_of_one(two, case):
    one, processes = train_step(case, 0, 1), [process[case] for process in two]
    key = 'loss_car_inter_c2c'
    assert one['losses'][key] > 1e-4
    assert one['gradients']['weight'].abs().max() > 1e-4
    for process in processes:
        torch.testing.assert_close(process['centers'], one['centers'], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(process['losses'][key], one['losses'][key], rtol=1e-6, atol=0)
        # Averaged over the processes by DistributedDataParallel.
        torch.testing.assert_close(process['gradients'], one['gradients'], rtol=1e-6, atol=1e-7)
    features = torch.cat([process['feature'] for process in processes]) / 2
    torch.testing.assert_close(features, one['feature'], rtol=1e-6, atol=1e-8)

    # The two losses of pixels are squares of each process' own mean, about the shared centres.
    for process, half in zip(processes, one['halves']):
        for name, expected in half.items():
            torch.testing.assert_close(process['losses'][name], expected, rtol=1e-5, atol=1e-8)


def test_moving_average_is_the_same_in_all_processes(two):
    one = train_step('moving average', 0, 1)
    first, second = (process['moving average'] for process in two)
    assert one['state']['moving_centers'].any()
    assert torch.equal(first['state']['moving_centers'], second['state']['moving_centers'])
    torch.testing.assert_close(first['state'], one['state'], rtol=1e-6, atol=1e-7)
    assert one['gradients']['weight'].any()
    torch.testing.assert_close(first['gradients'], one['gradients'], rtol=1e-5, atol=1e-9)
