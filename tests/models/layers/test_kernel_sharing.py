"""Kernel-sharing atrous convolution: against loops over pixels, and one form against the other."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.aspp_head import ASPPModule
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import prune

from mmseg_fusion.analysis.counting import count_call
from mmseg_fusion.models.layers import KernelSharingAtrousConv, kernel_sharing
from mmseg_fusion.models.layers.kernel_sharing import (
    choose_implementation,
    dilated_convolutions,
    shared_tap_convolutions,
)

EXACT = dict(rtol=1e-12, atol=1e-12)
CLOSE = dict(rtol=1e-4, atol=1e-4)
FORMS = ('dilated', 'shared_taps')


def naive_convolution(x, weight, rate):
    """A zero-padded dilated convolution, pixel by pixel, from its definition."""
    n, _, height, width = x.shape
    out = x.new_zeros(n, weight.shape[0], height, width)
    for y in range(height):
        for z in range(width):
            for i in range(3):
                for j in range(3):
                    v, u = y + (i - 1) * rate, z + (j - 1) * rate
                    if 0 <= v < height and 0 <= u < width:
                        out[:, :, y, z] += torch.einsum(
                            'nc,oc->no', x[:, :, v, u], weight[..., i, j]
                        )
    return out


def naive_algorithm1(x, weight, rates, scales, shifts, eps):
    """Algorithm 1 of the thesis with the batch's own statistics."""
    total = 0
    for rate, scale, shift in zip(rates, scales, shifts):
        t = naive_convolution(x, weight, rate)
        mean = t.mean((0, 2, 3), keepdim=True)
        variance = ((t - mean) ** 2).mean((0, 2, 3), keepdim=True)
        b = (t - mean) / (variance + eps).sqrt() * scale[:, None, None] + shift[:, None, None]
        total = total + b.clamp(min=0)
    return total


def run(convolve, x, weight, rates, gradients, bias=None):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    maps = convolve(*leaves, rates, bias)
    return [*maps, *torch.autograd.grad(maps, leaves, gradients)]


def case(n=2, cin=5, cout=4, height=7, width=6, rates=(1, 2, 5), dtype=torch.float64):
    x, weight = torch.randn(n, cin, height, width), torch.randn(cout, cin, 3, 3)
    gradients = [torch.randn(n, cout, height, width).to(dtype) for _ in rates]
    return x.to(dtype), weight.to(dtype), rates, gradients


def build(rates=(1, 2, 3), cin=6, cout=4, **kwargs):
    pyramid = KernelSharingAtrousConv(cin, cout, rates, **kwargs)
    pyramid.init_weights()
    return pyramid


# --- the maths ----------------------------------------------------------------------------------


@pytest.mark.stack
@pytest.mark.parametrize('implementation', FORMS)
def test_algorithm_1(implementation):
    rates = (1, 3, 3, 8)
    pyramid = build(rates, implementation=implementation).double()
    for norm in pyramid.norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = naive_algorithm1(
        x,
        pyramid.conv.weight,
        rates,
        [norm.weight for norm in pyramid.norms],
        [norm.bias for norm in pyramid.norms],
        pyramid.norms[0].eps,
    )
    torch.testing.assert_close(pyramid(x), expected, **EXACT)


@given(
    n=st.integers(1, 3),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    rates=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    channels_last=st.booleans(),
    portion=st.sampled_from([1, 3000, 2**24]),
)
def test_both_forms_are_equal_forward_and_backward(n, height, width, rates, channels_last, portion):
    x, weight, rates, gradients = case(n, 3, 5, height, width, tuple(rates))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        gradients = [g.contiguous(memory_format=torch.channels_last) for g in gradients]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_sharing, 'PORTION_BYTES', portion)
        found = run(shared_tap_convolutions, x, weight, rates, gradients)
    expected = run(dilated_convolutions, x, weight, rates, gradients)
    assert len(found) == len(rates) + 2
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, **EXACT)


@pytest.mark.parametrize('rates', [(1, 2), (3, 3, 6)])
def test_gradients_of_shared_taps_by_finite_differences(rates):
    x, weight, *_ = case(1, 2, 2, 5, 4)

    def convolve(*tensors):
        return tuple(shared_tap_convolutions(*tensors[:2], rates, tensors[2]))

    inputs = [t.requires_grad_() for t in (x, weight, torch.randn(2, dtype=torch.float64))]
    assert gradcheck(convolve, inputs)
    assert gradgradcheck(convolve, inputs)


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, rates, _ = case()
    x.requires_grad_()
    # One of the maps is not used, as where a picture of a single rate is drawn.
    shared_tap_convolutions(x, weight, rates)[1].sum().backward()
    found, x.grad = x.grad, None
    dilated_convolutions(x, weight, rates)[1].sum().backward()
    torch.testing.assert_close(found, x.grad, **EXACT)


@pytest.mark.parametrize('rate', [5, 7, 100])
def test_a_rate_beyond_the_map_leaves_the_centre_tap(rate):
    x, weight, *_ = case(height=5, width=4)
    (found,) = shared_tap_convolutions(x, weight, (rate,))
    centre = torch.einsum('oc,nchw->nohw', weight[:, :, 1, 1], x)
    torch.testing.assert_close(found, centre, **EXACT)


@pytest.mark.parametrize(
    ('shape', 'portions'),
    [((4, 3, 8, 8), [9 * 8] * 4), ((1, 3, 12, 14), [9 * 3, 9 * 3, 9 * 2]), ((2, 3, 4, 4), [9 * 8])],
)
def test_products_are_made_in_portions_on_a_cpu(monkeypatch, shape, portions):
    """A sample at a time, or some of its channels, so that the nine maps stay small."""
    limit = 9 * 8 * 8 * 8 * 4  # nine float32 maps of one sample of the first shape
    seen = []
    convolve = F.conv2d

    def watched(*args, **kwargs):
        out = convolve(*args, **kwargs)
        seen.append(out)
        return out

    monkeypatch.setattr(kernel_sharing, 'PORTION_BYTES', limit)
    monkeypatch.setattr(kernel_sharing.F, 'conv2d', watched)
    x, weight = torch.randn(shape), torch.randn(8, 3, 3, 3)
    (found,) = shared_tap_convolutions(x, weight, (2,))
    assert [out.shape[1] for out in seen] == portions
    assert all(out.numel() * 4 <= limit for out in seen)
    torch.testing.assert_close(found, convolve(x, weight, padding=2, dilation=2), **CLOSE)


def test_float32():
    x, weight, rates, gradients = case(2, 40, 24, 17, 15, (2, 6, 12), torch.float32)
    found = run(shared_tap_convolutions, x, weight, rates, gradients)
    expected = run(dilated_convolutions, x, weight, rates, gradients)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, **CLOSE)


@pytest.mark.parametrize('implementation', FORMS)
def test_the_bias_is_shared_where_there_is_no_norm(implementation):
    pyramid = build(norm_cfg=None, act_cfg=None, implementation=implementation).double()
    nn.init.normal_(pyramid.conv.bias)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    maps = [naive_convolution(x, pyramid.conv.weight, rate) for rate in (1, 2, 3)]
    expected = sum(maps) + 3 * pyramid.conv.bias[:, None, None]
    torch.testing.assert_close(pyramid(x), expected, **EXACT)
    # In-place ReLU right behind the convolution.
    relu = build(norm_cfg=None, implementation=implementation).double()
    relu.load_state_dict(pyramid.state_dict())
    out = relu(x)
    expected = sum((m + pyramid.conv.bias[:, None, None]).clamp(min=0) for m in maps)
    torch.testing.assert_close(out, expected, **EXACT)
    out.sum().backward()
    assert relu.conv.bias.grad.isfinite().all()


# --- half precision, formats, compilation ---------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_rounds_no_more_than_separate_convolutions(dtype):
    x, weight, rates, gradients = case(1, 64, 16, 9, 9, (1, 3, 6), torch.float32)
    exact = run(
        dilated_convolutions, x.double(), weight.double(), rates, [g.double() for g in gradients]
    )
    errors = {}
    for convolve in (dilated_convolutions, shared_tap_convolutions):
        with torch.autocast('cpu', dtype=dtype):
            found = run(convolve, x, weight, rates, [g.to(dtype) for g in gradients])
        assert [f.dtype for f in found] == [dtype] * 3 + [torch.float32] * 2
        errors[convolve] = [
            float((f - e).detach().norm() / e.detach().norm()) for f, e in zip(found, exact)
        ]
    # Nine products are rounded instead of one sum.
    for shared, separate in zip(errors[shared_tap_convolutions], errors[dilated_convolutions]):
        assert shared < 2 * separate


def test_the_nine_products_are_not_summed_in_half_precision():
    # 1 + 8 * 2^-9 is 1 if every sum is rounded to bfloat16, whose next number is 1 + 2^-7.
    weight = torch.full((1, 1, 3, 3), 2.0**-9)
    weight[..., 1, 1] = 1
    with torch.autocast('cpu', dtype=torch.bfloat16):
        (found,) = shared_tap_convolutions(torch.ones(1, 1, 3, 3), weight, (1,))
    assert found[0, 0, 1, 1] == 1 + 2.0**-6


def test_the_gradients_of_the_rates_are_not_summed_in_half_precision():
    # The same numbers backwards: a rate of 9 reaches a map of 3 x 3 with its centre alone.
    weight, x = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3, requires_grad=True)
    weight[..., 1, 1] = 1
    gradients = [torch.full((1, 1, 3, 3), g, dtype=torch.bfloat16) for g in (1, *[2.0**-9] * 8)]
    maps = shared_tap_convolutions(x.bfloat16(), weight.bfloat16(), (9,) * 9)
    torch.autograd.backward(maps, gradients)
    assert x.grad[0, 0, 1, 1] == 1 + 2.0**-6


@pytest.mark.parametrize('implementation', FORMS)
def test_channels_last_stays(implementation):
    pyramid = build(cin=16, cout=8, implementation=implementation)
    x = torch.randn(2, 16, 9, 7)
    out = pyramid(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, pyramid(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('implementation', FORMS)
def test_compiles_whole_with_its_backward_pass(implementation):
    torch._dynamo.reset()
    pyramid = build(implementation=implementation)
    compiled = torch.compile(pyramid, backend='aot_eager', fullgraph=True)
    x = torch.randn(2, 6, 7, 5, requires_grad=True)
    leaves = [x, *pyramid.parameters()]
    expected = torch.autograd.grad((pyramid(x) ** 2).sum(), leaves)
    found = torch.autograd.grad((compiled(x) ** 2).sum(), leaves)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, **CLOSE)


def test_copies_after_use():
    pyramid = build(implementation='shared_taps')
    x = torch.randn(2, 6, 7, 5)
    pyramid(x).sum().backward()
    for twin in (copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
        assert torch.equal(twin(x), pyramid(x))


@pytest.mark.parametrize('implementation', FORMS)
def test_batch_of_one_in_eval_mode(implementation):
    pyramid = build(implementation=implementation).eval()
    x = torch.randn(3, 6, 1, 4)
    with torch.no_grad():
        torch.testing.assert_close(pyramid(x[:1]), pyramid(x)[:1], rtol=1e-5, atol=1e-6)


def test_functional_gradients():
    pyramid = build(implementation='shared_taps', norm_cfg=None).double()
    parameters, x = dict(pyramid.named_parameters()), torch.randn(2, 6, 7, 5).double()

    def loss(parameters):
        return (torch.func.functional_call(pyramid, parameters, (x,)) ** 2).sum()

    found = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for f, e in zip(found.values(), expected):
        torch.testing.assert_close(f, e, **EXACT)


# --- the module -----------------------------------------------------------------------------------


@pytest.mark.parametrize('rates', [(6,), (6, 12, 18), (1, 6, 12, 18, 24)])
def test_one_kernel_however_many_rates(rates):
    cin, cout = 32, 8
    pyramid = build(rates, cin, cout)
    kernels = [p for p in pyramid.parameters() if p.dim() == 4]
    assert [tuple(k.shape) for k in kernels] == [(cout, cin, 3, 3)]
    params = sum(p.numel() for p in pyramid.parameters())
    assert params == 9 * cin * cout + len(rates) * 2 * cout
    aspp = ASPPModule(rates, cin, cout, None, dict(type='BN'), dict(type='ReLU'))
    separate = sum((1 if rate == 1 else 9) * cin * cout + 2 * cout for rate in rates)
    assert sum(p.numel() for p in aspp.parameters()) == separate


@pytest.mark.parametrize('number', [1, 3, 5])
def test_multiply_adds_of_shared_taps_do_not_depend_on_the_rates(number):
    cin, cout, height, width = 256, 8, 9, 7
    rates = (1, 6, 12, 18, 24)[:number]
    x = torch.zeros(2, cin, height, width)
    once = 2 * 9 * cin * cout * height * width
    pyramid = build(rates, cin, cout, implementation='shared_taps')
    assert count_call(pyramid, x).flops == once
    pyramid.implementation = 'dilated'
    assert count_call(pyramid, x).flops == number * once
    # `auto` is counted by the rule for a CPU.
    pyramid.implementation = 'auto'
    assert count_call(pyramid, x).flops == once


def test_every_rate_has_running_statistics_of_its_own():
    pyramid = build((1, 9), implementation='shared_taps')
    pyramid(torch.randn(2, 6, 8, 8) + 1)
    first, second = (norm.running_mean for norm in pyramid.norms)
    assert not torch.allclose(first, second)


def test_branches_sum_up_to_the_output():
    pyramid = build().eval()
    x = torch.randn(2, 6, 5, 5)
    branches = pyramid.branches(x)
    assert len(branches) == 3
    assert all((b >= 0).all() for b in branches)
    torch.testing.assert_close(sum(branches), pyramid(x))


def test_initialized_as_a_convolution_of_mmcv():
    torch.manual_seed(0)
    kernel = build((6, 12), 64, 64).conv.weight.detach()
    reference = ConvModule(64, 64, 3, norm_cfg=dict(type='BN')).conv.weight.detach()
    assert float(kernel.std() / reference.std()) == pytest.approx(1, abs=0.02)


def test_weights_fit_both_forms():
    one, other = (build(implementation=form).eval() for form in FORMS)
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(1, 6, 9, 9)
    torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-5)


def test_auto_follows_the_rule(monkeypatch):
    called = []
    for name in ('dilated_convolutions', 'shared_tap_convolutions'):
        function = getattr(kernel_sharing, name)
        monkeypatch.setattr(
            kernel_sharing,
            name,
            lambda *args, name=name, function=function: called.append(name) or function(*args),
        )
    for cin, rates in ((1024, (1, 2, 3)), (1024, (2,)), (4, (1, 2, 3))):
        rule = choose_implementation('cpu', cin, len(rates))
        build(rates, cin, 2).eval()(torch.zeros(1, cin, 3, 3))
        assert called.pop().startswith(rule[:6])
    assert choose_implementation('cpu', 2048, 3) == 'shared_taps'
    assert choose_implementation('cpu', 2048, 1) == 'dilated'
    assert choose_implementation('cpu', 320, 2) == 'dilated'
    assert choose_implementation('meta', 320, 3) == 'shared_taps'
    assert choose_implementation('cuda:0', 2048, 3) == 'dilated'


@pytest.mark.stack
@pytest.mark.parametrize('implementation', FORMS)
def test_the_kernel_is_called_like_any_layer(implementation):
    pyramid = build(implementation=implementation).eval()
    x, seen = torch.randn(2, 6, 7, 5), []
    pyramid.conv.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    expected = pyramid(2 * x)
    handle = pyramid.conv.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0], *inputs[1:]))
    torch.testing.assert_close(pyramid(x), expected)
    handle.remove()
    assert len(seen) == 2
    assert seen[1] is x


@pytest.mark.parametrize('implementation', FORMS)
def test_pruned_kernels_train(implementation):
    pyramid = build(implementation=implementation)
    prune.l1_unstructured(pyramid.conv, 'weight', 0.5)
    optimizer = torch.optim.SGD(pyramid.parameters(), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (pyramid(torch.randn(2, 6, 7, 5)) ** 2).sum().backward()
        optimizer.step()
    pyramid(torch.randn(2, 6, 7, 5))
    expected = pyramid.conv.weight_orig * pyramid.conv.weight_mask
    torch.testing.assert_close(pyramid.conv.weight, expected)


def test_rates_of_numpy():
    rates = np.arange(1, 4)
    pyramid = build(list(rates))
    assert pyramid.dilations == (1, 2, 3)
    assert all(type(rate) is int for rate in pyramid.dilations)
    assert pyramid(torch.randn(2, 6, 4, 5)).shape == (2, 4, 4, 5)


@pytest.mark.parametrize('dilations', [(), (0, 6), (6, -1), (6.0, 12), (True,), 6, '12', None])
def test_wrong_rates(dilations):
    with pytest.raises(ValueError, match=r'dilations must be a sequence of positive'):
        KernelSharingAtrousConv(4, 4, dilations)


def test_wrong_implementation_and_input():
    with pytest.raises(ValueError, match=r"'auto', 'shared_taps', 'dilated', got 'fast'"):
        KernelSharingAtrousConv(4, 4, (6,), 'fast')
    with pytest.raises(ValueError, match=r'expected a feature \(N, 6, H, W\), got \(2, 5, 4, 4\)'):
        build()(torch.zeros(2, 5, 4, 4))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize('amp', [False, True])
def test_both_forms_are_equal_on_cuda(amp):
    x, weight, rates, gradients = case(2, 64, 32, 17, 15, (2, 6, 20), torch.float32)
    x, weight, gradients = x.cuda(), weight.cuda(), [g.cuda() for g in gradients]
    results = []
    for convolve in (shared_tap_convolutions, dilated_convolutions):
        with torch.autocast('cuda', dtype=torch.float16, enabled=amp):
            given = [g.half() for g in gradients] if amp else gradients
            results.append(run(convolve, x, weight, rates, given))
    for f, e in zip(*results):
        assert float((f.float() - e.float()).norm() / e.float().norm()) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(('cin', 'size'), [(2048, 33), (2048, 65), (320, 33)])
def test_auto_is_not_slower_than_dilated_on_cuda(cin, size):
    auto = build((6, 12, 18), cin, 256).cuda()
    dilated = copy.deepcopy(auto)
    dilated.implementation = 'dilated'
    x = torch.randn(4, cin, size, size, device='cuda', requires_grad=True)
    times = {auto: [], dilated: []}
    for turn in range(25):
        for pyramid, seen in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            pyramid(x).sum().backward()
            end.record()
            end.synchronize()
            if turn >= 5:
                seen.append(start.elapsed_time(end))
    medians = [sorted(seen)[len(seen) // 2] for seen in times.values()]
    # What one and the same program differs by from turn to turn.
    assert medians[0] < 1.1 * medians[1]
