"""Following a feature from a head's convolutions to its classifier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_activation_layer, build_norm_layer
from torch import Tensor, nn

from mmseg_fusion.models.layers.last_convolution import LastConvolutionTracer, takes_one_tensor

ACTIVATIONS = {
    'ReLU': dict(inplace=True),
    'LeakyReLU': {},
    'PReLU': dict(num_parameters=4),
    'RReLU': {},
    'ReLU6': {},
    'ELU': {},
    'Sigmoid': {},
    'Tanh': {},
    'GELU': {},
    'SiLU': {},
    'Swish': {},
    'HSwish': {},
    'HSigmoid': {},
    'Clamp': {},
}
NORMS = {'BN': {}, 'IN': {}, 'GN': dict(num_groups=2), 'SyncBN': {}}


class SquaredReLU(nn.Module):
    """An activation that no registry has."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * x.relu()


class Head(nn.Module):
    """Two convolutions, and a function between them and the classifier."""

    def __init__(self, between: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.conv_seg = nn.Conv2d(4, 2, 1)
        self.between = nn.ModuleList(modules)
        self.function = between

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.function(self, self.first(x), self.second(x), x))


def trace(head: nn.Module) -> LastConvolutionTracer:
    convs = {n: m for n, m in head.named_modules() if n in ('first', 'second')}
    with torch.no_grad(), LastConvolutionTracer(head.eval(), head.conv_seg, convs) as tracer:
        head(tracer.own_input(torch.zeros(1, 4, 6, 6)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())
    assert tracer.reached
    return tracer


def reaches(between: Callable[..., Tensor], *modules: nn.Module) -> tuple[set[str], set[str]]:
    tracer = trace(Head(between, *modules))
    return tracer.sources, tracer.blocked


@pytest.mark.stack
@pytest.mark.parametrize('name', ACTIVATIONS)
def test_registered_activations_are_passed(name: str) -> None:
    module = build_activation_layer(dict(type=name, **ACTIVATIONS[name]))
    found = reaches(lambda head, a, b, x: head.between[0](b), module)
    assert found == ({'second'}, set())


@pytest.mark.stack
@pytest.mark.parametrize('name', NORMS)
def test_registered_norms_are_passed(name: str) -> None:
    module = build_norm_layer(dict(type=name, **NORMS[name]), 4)[1]
    assert reaches(lambda head, a, b, x: head.between[0](a), module) == ({'first'}, set())


@pytest.mark.parametrize(
    'module', [nn.Dropout2d(0.3), nn.Dropout(0.3), nn.Identity(), SquaredReLU(), nn.Sequential()]
)
def test_other_modules_that_change_each_element_by_itself(module: nn.Module) -> None:
    assert reaches(lambda head, a, b, x: head.between[0](a), module) == ({'first'}, set())


@pytest.mark.parametrize(
    'function',
    [
        lambda a: F.relu(a, inplace=True),
        lambda a: F.silu(a),
        lambda a: F.hardswish(a),
        lambda a: F.prelu(a, torch.full((4,), 0.1)),
        lambda a: F.rrelu(a),
        lambda a: F.logsigmoid(a),
        lambda a: F.mish(a),
        lambda a: F.interpolate(a, size=(9, 5), mode='bilinear'),
        lambda a: F.interpolate(a, scale_factor=2, mode='nearest'),
        lambda a: F.interpolate(a, size=(9, 5), mode='bicubic', antialias=True),
        lambda a: a.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda a: a.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (6, 6)),
        lambda a: F.batch_norm(a, torch.zeros(4), torch.ones(4)),
        lambda a: F.dropout(a, training=True),
        lambda a: 3 * a.clone() - 1,
        lambda a: a * torch.ones(4, 1, 1),
        lambda a: torch.zeros_like(a).copy_(a),
        lambda a: a.double().float().detach(),
    ],
)
def test_functions_are_passed(function: Callable[[Tensor], Tensor]) -> None:
    assert reaches(lambda head, a, b, x: function(a)) == ({'first'}, set())


def test_sums_have_all_their_terms() -> None:
    both = {'first', 'second'}, set()
    assert reaches(lambda head, a, b, x: a + b) == both
    assert reaches(lambda head, a, b, x: b.sub_(a)) == both

    def into_a_slice(head: Head, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        a[..., 1:] += b[..., :-1]
        return a

    assert reaches(into_a_slice) == both
    assert reaches(lambda head, a, b, x: a + x) == ({'first'}, {"the head's own input"})


@pytest.mark.parametrize(
    ('between', 'blocked'),
    [
        (lambda head, a, b, x: a * b.sigmoid(), 'mul'),
        (lambda head, a, b, x: a.mul_(a.sigmoid()), 'mul'),
        (lambda head, a, b, x: torch.cat([a[:, :2], b[:, 2:]], 1), 'cat'),
        (lambda head, a, b, x: head.between[0](a), 'softmax'),
        (lambda head, a, b, x: a + b.mean((2, 3), keepdim=True), 'mean'),
        (lambda head, a, b, x: F.max_pool2d(a, 2), 'max_pool2d_with_indices'),
        (lambda head, a, b, x: a @ b, 'bmm'),
        (lambda head, a, b, x: head.between[1](a), 'convolution'),
        (lambda head, a, b, x: torch.zeros_like(a), 'a constant'),
    ],
)
def test_what_mixes_is_named(between: Callable[..., Tensor], blocked: str) -> None:
    _, names = reaches(between, nn.Softmax(1), nn.Conv2d(4, 4, 1))
    assert names == {blocked}


def test_a_module_that_only_looks_like_an_activation() -> None:
    """The same shape, and one element reaches others."""

    class Swap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.flip(1)

    assert reaches(lambda head, a, b, x: head.between[0](a), Swap())[1] == {'mul'}


def test_activation_and_norm_of_a_block_are_passed_whatever_they_are() -> None:
    block = ConvModule(4, 4, 1, act_cfg=dict(type='ReLU'), norm_cfg=dict(type='BN'))
    block.activate = nn.Softmax(1)
    block.conv = nn.Identity()
    assert reaches(lambda head, a, b, x: head.between[0](a), block) == ({'first'}, set())


def test_what_ran_on_every_image_once() -> None:
    def windows(head: Head, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        head.second(x.view(4, 4, 3, 3))
        return a

    head = Head(windows)
    head.second.register_forward_hook(lambda m, x, y: None).remove()
    with torch.no_grad(), LastConvolutionTracer(head, head.conv_seg, {'w': head.second}) as tracer:
        x = tracer.own_input(torch.zeros(1, 4, 6, 6))
        head.conv_seg(windows(head, head.first(x), x, x))
    assert tracer.ran == set()


def test_a_kernel_that_takes_more_than_a_feature() -> None:
    class Shared(nn.Conv2d):
        def forward(self, x, rates):
            return [super(Shared, self).forward(x) for _ in rates]

    assert takes_one_tensor(nn.Conv2d(1, 1, 1))
    assert not takes_one_tensor(Shared(1, 1, 1))
