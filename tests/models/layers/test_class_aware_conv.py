"""CAR's convolution: the authors' layer, and the merged form."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from mmseg_fusion.analysis import count_call
from mmseg_fusion.models.layers import ClassAwareConv
from mmseg_fusion.models.losses import ClassAwareRegularization

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden' / 'car_layer_p1.npz'
BN = dict(type='BN')


def images(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def layer(**kwargs) -> ClassAwareConv:
    options = dict(
        in_channels=12, out_channels=7, channels=8, norm_cfg=BN, act_cfg=dict(type='ReLU')
    )
    return ClassAwareConv(**{**options, **kwargs})


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """With weights, scales, shifts and statistics that are neither 0 nor 1."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value.copy_(
                    torch.rand_like(value) + 0.5 if 'var' in name else torch.randn_like(value)
                )
    return module


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


@pytest.fixture
def authors(golden) -> ClassAwareConv:
    """The layer of the golden vectors, with its weights."""
    module = ClassAwareConv(
        24, 16, channels=16, norm_cfg=dict(type='BN', eps=1e-3), act_cfg=dict(type='ReLU')
    )
    kernel = {k[4:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith('w/g/')}
    module.load_state_dict(
        {
            'linear.weight': kernel['linear_conv/kernel'].permute(3, 2, 0, 1),
            'linear.bias': kernel['linear_conv/bias'],
            'project.conv.weight': kernel['end_conv/kernel'].permute(3, 2, 0, 1),
            'project.bn.weight': kernel['end_norm/gamma'],
            'project.bn.bias': kernel['end_norm/beta'],
            'project.bn.running_mean': kernel['end_norm/moving_mean'],
            'project.bn.running_var': kernel['end_norm/moving_variance'],
            'project.bn.num_batches_tracked': torch.tensor(0),
        }
    )
    return module


def close(ours: torch.Tensor, theirs: np.ndarray, share: float) -> None:
    """Within ``share`` of the largest value, the tolerance that the vectors come with."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.detach().numpy() - theirs).max() <= share * np.abs(theirs).max()


def test_authors_output(golden, authors) -> None:
    x = images(golden['x'])
    for mode in ('eval', 'train'):
        authors.train(mode == 'train')
        close(authors(x).permute(0, 2, 3, 1), golden[f'y_{mode}'], 2e-5)
    close(authors.project.bn.running_mean, golden['after/g/end_norm/moving_mean'], 2e-5)
    # TensorFlow keeps the variance over n, PyTorch that over n - 1.
    n = x[:, 0].numel()
    before = torch.from_numpy(golden['w/g/end_norm/moving_variance'])
    step = (authors.project.bn.running_var - before) * torch.tensor(1.0)
    theirs = golden['after/g/end_norm/moving_variance'] - golden['w/g/end_norm/moving_variance']
    # Both moved by a tenth of (variance of the batch - old value).
    batch = step / 0.1 + before
    close((batch * (n - 1) / n - before) * 0.1, theirs, 1e-4)


@pytest.mark.stack
def test_authors_losses_and_gradients(golden, authors) -> None:
    x = images(golden['x']).requires_grad_()
    authors.keep_features = True
    authors(x)
    criterion = ClassAwareRegularization(num_classes=5)
    found = criterion(authors.pop_features(), torch.from_numpy(golden['label_head']).long())
    inter = found['loss_car_inter_c2c'] + found['loss_car_inter_c2p']
    losses = [inter.item(), found['loss_car_intra_c2p'].item()]
    assert losses == pytest.approx(golden['losses'].tolist(), rel=1e-5, abs=1e-7)
    sum(found.values()).backward()
    close(x.grad.permute(0, 2, 3, 1), golden['grad_x'], 3e-5)
    weight = authors.linear.weight.grad.permute(2, 3, 1, 0)
    close(weight, golden['grad/g/linear_conv/kernel'], 3e-5)
    close(authors.linear.bias.grad, golden['grad/g/linear_conv/bias'], 3e-5)


@pytest.mark.parametrize(
    'norm', [BN, dict(type='GN', num_groups=1), None], ids=['bn', 'gn', 'none']
)
@pytest.mark.parametrize('size', [(9, 11), (1, 1)])
def test_merged_gives_the_same(norm: dict | None, size: tuple[int, int]) -> None:
    module = randomized(layer(norm_cfg=norm, act_cfg=None)).double().eval()
    x = torch.randn(2, 12, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        merged = copy.deepcopy(module).merge()
        torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)
    assert merged.merged
    assert merged.project.conv.weight.shape == (7, 12, 1, 1)
    # The state has the keys and shapes of a layer that is built merged.
    fresh = layer(norm_cfg=norm, act_cfg=None, merged=True).double().eval()
    fresh.load_state_dict(merged.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), merged(x))
    # Once more changes nothing.
    state = {k: v.clone() for k, v in merged.state_dict().items()}
    merged.merge()
    assert all(torch.equal(v, state[k]) for k, v in merged.state_dict().items())


def test_merged_costs_what_a_plain_convolution_does() -> None:
    plain = layer(linear=False)
    merged = layer().merge()
    assert [p.shape for p in merged.parameters()] == [p.shape for p in plain.parameters()]
    x = torch.randn(2, 12, 5, 6)
    assert count_call(merged, x) == count_call(plain, x)


def test_width_is_capped() -> None:
    assert layer().linear.out_channels == 8
    assert layer(channels=512).linear.out_channels == 12


def test_features_are_kept_on_demand_and_let_go() -> None:
    module, x = layer(), torch.randn(2, 12, 5, 6)
    module(x)
    assert module.features is None
    module.keep_features = True
    module(x)
    torch.testing.assert_close(module.pop_features(), module.linear(x))
    assert module.features is None


def test_larger_kernels_do_not_merge() -> None:
    module = layer(kernel_size=3)
    assert module(torch.randn(2, 12, 5, 6)).shape == (2, 7, 5, 6)
    with pytest.raises(ValueError, match=r'1x1; car.kernel_size is 3'):
        module.merge()
    with pytest.raises(ValueError, match=r'1x1; car.kernel_size is 3'):
        layer(kernel_size=3, merged=True)


def test_linear_layer_starts_as_xavier_uniform_without_bias() -> None:
    linear = layer(in_channels=512, channels=512).linear.requires_grad_(False)
    bound = (6 / (512 + 512)) ** 0.5
    assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert linear.weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not linear.bias.any()


def test_inter_class_losses_at_the_start() -> None:
    """On features that tell the classes apart the inter-class losses begin near 0.

    59 classes, 512 channels behind a ReLU, noise 1.25 times as wide as the classes lie apart. With
    PyTorch's own start of the linear layer both losses begin large: 0.128 and 0.375.
    """
    label = torch.randint(59, (2, 16, 16)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    centers = torch.randn(59, 512)[label].movedim(-1, 1)
    x = (centers + 1.25 * torch.randn(2, 512, 32, 32)).relu()
    linear = layer(in_channels=512, channels=512).linear
    found = {}
    with torch.no_grad():
        for start in ('authors', 'torch'):
            losses = ClassAwareRegularization(num_classes=59)(linear(x), label)
            found[start] = [losses[f'loss_car_inter_{name}'].item() for name in ('c2c', 'c2p')]
            linear.reset_parameters()
    c2c, c2p = found['authors']
    assert c2c < 0.001
    assert c2p < 0.01
    assert found['torch'] == pytest.approx([0.128, 0.375], rel=0.1)
