"""Plain and channelized attention against the authors' numbers and against the equations."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_fusion.analysis.counting import count_call
from mmseg_fusion.models.layers import (
    AxialAttention,
    ChannelizedAxialAttention,
    ChannelizedSelfAttention,
    SelfAttention,
)
from mmseg_fusion.models.layers.attention import (
    ChannelGate,
    attention_map,
    dot_product_attention,
)

GOLDEN = Path(__file__).parents[2] / 'data' / 'golden' / 'caa_block_2x9x7x24.npz'
CHANNELIZED = [ChannelizedAxialAttention, ChannelizedSelfAttention]
EVERY = [SelfAttention, AxialAttention, *CHANNELIZED]
SIZES = [(5, 7), (1, 6), (4, 1), (1, 1)]


def build(kind, dtype=torch.float64, training=False, **kwargs):
    """A small attention whose batch norm does something in evaluation mode too."""
    options = dict(channels=12, qk_channels=4)
    if kind in CHANNELIZED:
        options.update(gate_channels=6, gate_layers=3)
    module = kind(10, **{**options, **kwargs}).to(dtype).train(training)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for statistic in (m.weight, m.running_var):
                    statistic.uniform_(0.5, 1.5)
                for statistic in (m.bias, m.running_mean):
                    statistic.uniform_(-0.5, 0.5)
    return module


def image(size=(5, 7), batch=2, dtype=torch.float64):
    return torch.randn(batch, 10, *size, dtype=dtype)


def gradients(module, x):
    """Result, and gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    out = module(x)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    wanted = [x, *module.parameters()]
    return [out, *torch.autograd.grad((out * seed).sum(), wanted)]


# --- the authors' numbers ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDEN) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.fixture
def block(golden):
    """The block with the authors' weights; v_ is their column pass, h_ their row pass."""
    module = ChannelizedAxialAttention(24, 32, 8, 8, 5)
    weights = {k[len('w/caa/') :]: v for k, v in golden.items() if k.startswith('w/caa/')}
    convs = dict(
        v_querykey_conv=module.column_query_key.query,
        h_querykey_conv=module.row_query_key.query,
        value_conv=module.value,
    )
    gates = dict(
        v_c_attention=module.column_attention.gate, h_c_attention=module.row_attention.gate
    )
    with torch.no_grad():
        for name, conv in convs.items():
            prefix = f'{name}/{name}'
            kernel = weights.pop(f'{prefix}_conv/kernel')
            conv.conv.weight.copy_(kernel.permute(3, 2, 0, 1))
            for ours, theirs in (
                ('weight', 'gamma'),
                ('bias', 'beta'),
                ('running_mean', 'moving_mean'),
                ('running_var', 'moving_variance'),
            ):
                getattr(conv.bn, ours).copy_(weights.pop(f'{prefix}_bn/{theirs}'))
        for name, gate in gates.items():
            dense = [m for m in gate if isinstance(m, nn.Linear)]
            names = [f'dense{i}' for i in range(5)] + ['dense_end']
            for layer, theirs in zip(dense, names):
                layer.weight.copy_(weights.pop(f'{name}/{theirs}/kernel').T)
    assert not weights, f'weights without a place: {list(weights)}'
    return module.eval()


def assert_golden(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f'off by {error:.2e} of the largest value'


@pytest.mark.stack
@pytest.mark.parametrize('implementation', ['factorized', 'grouped'])
def test_golden_block(golden, block, implementation):
    gates = {}
    for name, attention in (('col', block.column_attention), ('row', block.row_attention)):
        attention.implementation, attention.groups = implementation, 1
        attention.gate.register_forward_hook(lambda m, x, y, name=name: gates.update({name: y}))
    x = nchw(golden['x']).requires_grad_()
    value = block.value(x)
    after_column = block.column_pass(*block.column_query_key(x), value)
    out = block(x)
    (out * nchw(golden['R'])).sum().backward()
    assert_golden(value, nchw(golden['mid/value']))
    assert_golden(after_column, nchw(golden['after_col_eval']))
    assert_golden(after_column, nchw(golden['mid/after_col']))
    assert_golden(gates['col'], golden['mid/gate_col'])
    assert_golden(gates['row'], golden['mid/gate_row'])
    assert_golden(out, nchw(golden['out_eval']))
    assert_golden(x.grad, nchw(golden['grad_x_eval']), 3e-5)


def test_golden_attention_before_the_gates(golden, block):
    x = nchw(golden['x'])
    query, key = (y.permute(0, 3, 2, 1) for y in block.column_query_key(x))
    value = golden['mid/value'].transpose(1, 2)
    assert_golden(attention_map(query, key), golden['mid/attn_col'])
    assert_golden(dot_product_attention(query, key, value), golden['mid/y0_col'].transpose(1, 2))
    query, key = (y.permute(0, 2, 3, 1) for y in block.row_query_key(x))
    assert_golden(attention_map(query, key), golden['mid/attn_row'])
    assert_golden(dot_product_attention(query, key, golden['mid/after_col']), golden['mid/y0_row'])


def test_golden_training_step(golden, block):
    out = block.train()(nchw(golden['x']))
    assert_golden(out, nchw(golden['out_train_bnbatch']))
    pixels = golden['x'][..., 0].numel()
    for name, conv in (
        ('v_querykey_conv', block.column_query_key.query),
        ('h_querykey_conv', block.row_query_key.query),
        ('value_conv', block.value),
    ):
        path = f'caa/{name}/{name}_bn/'
        mean = golden[f'after_train/{path}moving_mean']
        assert_golden(conv.bn.running_mean, mean)
        # Theirs is the biased variance, PyTorch's the unbiased one.
        before, after = (golden[f'{k}/{path}moving_variance'] for k in ('w', 'after_train'))
        step = (after - 0.9 * before) * pixels / (pixels - 1)
        assert_golden(conv.bn.running_var, 0.9 * before + step)


# --- the equations, naively ----------------------------------------------------------------------


def naive_gate(gate: ChannelGate, squeezed: Tensor) -> Tensor:
    weights = [m.weight for m in gate if isinstance(m, nn.Linear)]
    for weight in weights[:-1]:
        squeezed = squeezed @ weight.T
        squeezed = torch.where(squeezed > 0, squeezed, 0.2 * squeezed)
    return 1 / (1 + (-(squeezed @ weights[-1].T)).exp())


def naive_softmax(logits: Tensor, dim: int) -> Tensor:
    e = (logits - logits.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def naive_axial(module: ChannelizedAxialAttention, x: Tensor) -> Tensor:
    """Equations 3.3 to 3.11 with every term of both sums in memory."""
    theta, phi = module.column_query_key(x)[0], module.row_query_key(x)[0]
    g = module.value(x)
    # n image, c channel, i and m rows, j and k columns
    column = naive_softmax(torch.einsum('ncij,ncmj->nijm', theta, theta), -1)
    alpha = torch.einsum('nijm,ncmj->ncijm', column, g)
    gate = naive_gate(module.column_attention.gate, alpha.mean((3, 4)).transpose(1, 2))
    y = torch.einsum('nic,ncijm->ncij', gate, alpha)
    row = naive_softmax(torch.einsum('ncij,ncik->nijk', phi, phi), -1)
    beta = torch.einsum('nijk,ncik->ncijk', row, y)
    gate = naive_gate(module.row_attention.gate, beta.mean((2, 4)).transpose(1, 2))
    return torch.einsum('njc,ncijk->ncij', gate, beta)


def naive_self(module: ChannelizedSelfAttention, x: Tensor) -> Tensor:
    theta, g = module.query_key(x)[0].flatten(2), module.value(x).flatten(2)
    weights = naive_softmax(torch.einsum('ncp,ncq->npq', theta, theta), -1)
    terms = torch.einsum('npq,ncq->ncpq', weights, g)
    gate = naive_gate(module.attention.gate, terms.mean(3).transpose(1, 2))
    return torch.einsum('npc,ncpq->ncp', gate, terms).unflatten(2, x.shape[2:])


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('kind', CHANNELIZED)
def test_equals_the_equations(kind, training, size):
    module, x = build(kind, training=training), image(size, batch=3)
    naive = naive_axial if kind is ChannelizedAxialAttention else naive_self
    found = gradients(module, x)
    module.forward = lambda x: naive(module, x)
    for f, e in zip(found, gradients(module, x)):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_plain_attention_is_the_channelized_one_with_open_gates(size):
    x = image(size)
    for plain, channelized in (
        (SelfAttention, ChannelizedSelfAttention),
        (AxialAttention, ChannelizedAxialAttention),
    ):
        module, gated = build(plain), build(channelized)
        gated.load_state_dict(module.state_dict(), strict=False)
        for m in gated.modules():
            if isinstance(m, ChannelGate):
                m.forward = torch.ones_like
        torch.testing.assert_close(module(x), gated(x))


@pytest.mark.parametrize(('groups', 'recompute'), [(1, False), (3, False), (3, True), (99, False)])
@pytest.mark.parametrize('scale', [1.0, None])
@pytest.mark.parametrize('kind', CHANNELIZED)
def test_algorithm_2_is_the_same_function(kind, scale, groups, recompute):
    options = dict(implementation='grouped', groups=groups, recompute=recompute, scale=scale)
    module, grouped = build(kind, scale=scale), build(kind, **options)
    grouped.load_state_dict(module.state_dict())
    x = image()
    for f, e in zip(gradients(module, x), gradients(grouped, x)):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('kind', EVERY)
def test_gradcheck(kind):
    module, x = build(kind, channels=6), image((3, 2), batch=1).requires_grad_()
    # ReLU has a corner that finite differences must not step over.
    for m in module.modules():
        if isinstance(m, nn.ReLU):
            m.forward = F.softplus
    names, parameters = zip(*module.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


# --- what algorithm 2 promises, and what the factors save ----------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


def largest(module, x) -> int:
    with Largest() as mode, torch.no_grad():
        module(x)
    return mode.elements


def kept(module, x) -> int:
    """Elements that autograd keeps for the backward pass, every storage once."""
    stored = {}

    def pack(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(stored.values())


def test_memory_of_a_group_is_a_share_of_the_terms():
    n, c, h, w = 2, 48, 16, 8
    x = image((h, w), n)
    # The column pass has the larger tensor of terms: N x H x H x W x C.
    for groups, share in ((1, 16), (4, 4), (6, 3), (16, 1)):
        options = dict(channels=c, implementation='grouped', groups=groups)
        assert largest(build(ChannelizedAxialAttention, **options), x) == n * share * h * w * c
    # Nothing is larger than the value itself.
    assert largest(build(ChannelizedAxialAttention, channels=c), x) == n * h * w * c


def test_what_is_kept_for_the_backward_pass():
    n, c, h, w = 2, 48, 16, 8
    x = image((h, w), n)
    terms = n * c * h * w * (h + w)
    options = dict(channels=c, implementation='grouped', groups=16)
    # Algorithm 2 under autograd keeps the terms of all groups.
    assert kept(build(ChannelizedAxialAttention, **options), x) > terms
    assert kept(build(ChannelizedAxialAttention, **options, recompute=True), x) < terms / 4
    assert kept(build(ChannelizedAxialAttention, channels=c), x) < 9 * n * c * h * w


@pytest.mark.parametrize(
    ('kind', 'h', 'w'),
    [(AxialAttention, 6, 9), (ChannelizedAxialAttention, 6, 9), (ChannelizedAxialAttention, 9, 6)],
)
def test_multiply_adds_of_axial_attention(kind, h, w):
    n, i, c, q = 2, 10, 12, 4
    expected = n * h * w * (2 * i * q + i * c)
    expected += n * h * w * (h + w) * (q + c)
    if kind is ChannelizedAxialAttention:
        expected += n * (h + w) * (c * 6 + 6 * 6 + 6 * 6 + 6 * c)
    assert count_call(build(kind), image((h, w), n)).flops == expected


@pytest.mark.parametrize('kind', [SelfAttention, ChannelizedSelfAttention])
def test_multiply_adds_of_self_attention(kind):
    n, i, c, q, p = 2, 10, 12, 4, 5 * 7
    expected = n * p * (i * q + i * c) + n * p * p * (q + c)
    if kind is ChannelizedSelfAttention:
        expected += n * p * (c * 6 + 6 * 6 + 6 * 6 + 6 * c)
    assert count_call(build(kind), image()).flops == expected


@pytest.mark.parametrize(
    ('layers', 'hidden', 'printed'),
    [(1, 128, 0.00024), (7, 128, 0.00043), (5, 64, 0.00015), (5, 256, 0.00098)],
)
def test_table_3_1_counts_each_gate_once_in_units_of_2_to_the_30(layers, hidden, printed):
    gates = [ChannelGate(512, hidden, layers) for _ in range(2)]
    count = sum(p.numel() for gate in gates for p in gate.parameters())
    assert round(count / 2**30, 5) == printed
    assert count_call(gates[0], torch.zeros(1, 512)).flops == count // 2


# --- options of the projections ------------------------------------------------------------------


def naive_heads(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(L, D), (L, D), (L, C): attention of each head by itself, scaled, side by side."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, 1) for x in (query, key, value))):
        parts.append(naive_softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ v)
    return torch.cat(parts, 1)


@pytest.mark.parametrize('share_axes', [True, False])
def test_axial_attention_with_heads(share_axes):
    module = build(
        AxialAttention,
        qk_channels=8,
        num_heads=4,
        share_qk=False,
        share_axes=share_axes,
        scale=None,
        norm_cfg=None,
        act_cfg=None,
    )
    nn.init.normal_(module.column_query_key.key.conv.weight)
    assert all(m.bias is not None for m in module.modules() if isinstance(m, nn.Conv2d))
    x = image((5, 3))
    y = module.value(x).clone()
    query, key = module.column_query_key(x)
    for n in range(2):
        for j in range(3):
            lines = (t[n, :, :, j].T for t in (query, key, y.clone()))
            y[n, :, :, j] = naive_heads(*lines, heads=4).T
    if not share_axes:
        query, key = module.row_query_key(x)
    for n in range(2):
        for i in range(5):
            lines = (t[n, :, i].T for t in (query, key, y.clone()))
            y[n, :, i] = naive_heads(*lines, heads=4).T
    torch.testing.assert_close(module(x), y)


def scaled_axial(dtype) -> AxialAttention:
    """Axial attention as HFGD has it, away from its start, where query and key are one."""
    options = dict(qk_channels=8, num_heads=4, share_qk=False, share_axes=True, scale=None)
    module = build(AxialAttention, dtype, norm_cfg=None, act_cfg=None, **options)
    nn.init.normal_(module.column_query_key.key.conv.weight)
    return module


def naive_scaled_axial(module: AxialAttention, x: Tensor) -> Tensor:
    """The vertical pass, and the horizontal pass on its result, in float64, head by head."""
    convs = module.column_query_key.query, module.column_query_key.key, module.value
    query, key, value = (
        torch.einsum('oc,nchw->nhwo', c.conv.weight[..., 0, 0].double(), x.double())
        + c.conv.bias.double()
        for c in convs
    )
    after_column, out = torch.empty_like(value), torch.empty_like(value)
    for n, j in np.ndindex(len(x), x.shape[3]):
        lines = query[n, :, j], key[n, :, j], value[n, :, j]
        after_column[n, :, j] = naive_heads(*lines, heads=4)
    for n, i in np.ndindex(len(x), x.shape[2]):
        out[n, i] = naive_heads(query[n, i], key[n, i], after_column[n, i], heads=4)
    return out.permute(0, 3, 1, 2)


@pytest.mark.parametrize('size', SIZES)
def test_scaled_axial_attention_written_out(size):
    module, x = scaled_axial(torch.float64), image(size).requires_grad_()
    found, expected = module(x), naive_scaled_axial(module, x)
    torch.testing.assert_close(found, expected)
    wanted = [x, *module.parameters()]
    grads = (torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected))
    for f, e in zip(*grads):
        torch.testing.assert_close(f, e)


@pytest.mark.stack
@pytest.mark.parametrize(
    ('half', 'error'), [(None, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.004)]
)
def test_scaled_attention_keeps_the_type_of_its_operands(monkeypatch, half, error):
    seen, attend = [], F.scaled_dot_product_attention

    def watched(*operands, **options):
        seen.append([x.dtype for x in operands])
        return attend(*operands, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', watched)
    module, x = scaled_axial(torch.float32), image(dtype=torch.float32)
    expected = naive_scaled_axial(module, x)
    with torch.autocast('cpu', dtype=half or torch.bfloat16, enabled=half is not None):
        out = module(x)
        # What a product has there; torch < 2.1 has no float16 autocast on the CPU.
        dtype = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    assert seen == [[dtype] * 3] * 2
    assert out.dtype is dtype
    assert float((out.double() - expected).norm() / expected.norm()) < error
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_scaled_attention_takes_the_type_of_the_value():
    query, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 7)
    key = torch.randn(2, 3, 6, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        expected = naive_softmax(query.double() @ key.double().transpose(2, 3) / 2, -1)
        out = dot_product_attention(query, key, value.to(dtype), None)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), expected @ value.double(), rtol=0.03, atol=0.03)


def test_self_attention_with_heads_is_pytorchs():
    # PyTorch's has one width for all three.
    module = build(
        SelfAttention,
        qk_channels=12,
        num_heads=3,
        share_qk=False,
        scale=None,
        norm_cfg=None,
        act_cfg=None,
    )
    nn.init.normal_(module.query_key.key.conv.weight)
    reference = nn.MultiheadAttention(12, 3, kdim=10, vdim=10, batch_first=True, dtype=torch.double)
    convs = [module.query_key.query.conv, module.query_key.key.conv, module.value.conv]
    weights = [conv.weight.flatten(1) for conv in convs]
    x = image()
    pixels = x.flatten(2).transpose(1, 2)
    expected, _ = F.multi_head_attention_forward(
        *(p.transpose(0, 1) for p in (pixels @ weights[0].T, pixels, pixels)),
        embed_dim_to_check=12,
        num_heads=3,
        in_proj_weight=None,
        in_proj_bias=torch.cat([conv.bias for conv in convs]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0,
        out_proj_weight=torch.eye(12, dtype=torch.double),
        out_proj_bias=torch.zeros(12, dtype=torch.double),
        use_separate_proj_weight=True,
        q_proj_weight=torch.eye(12, dtype=torch.double),
        k_proj_weight=weights[1],
        v_proj_weight=weights[2],
    )
    assert reference.head_dim == 4
    torch.testing.assert_close(module(x), expected.permute(1, 2, 0).unflatten(2, (5, 7)))


def test_the_scale_is_that_of_the_logits():
    query, key, value = (torch.randn(2, 3, 5, d, dtype=torch.float64) for d in (4, 4, 7))
    for scale in (1.0, 0.3, None):
        factor = 0.5 if scale is None else scale
        expected = naive_softmax(factor * query @ key.transpose(2, 3), -1) @ value
        torch.testing.assert_close(dot_product_attention(query, key, value, scale), expected)
        torch.testing.assert_close(attention_map(query, key, factor) @ value, expected)


def test_query_and_key_are_one_convolution_or_start_as_one():
    shared, own = build(SelfAttention), build(SelfAttention, share_qk=False)
    assert shared.query_key.key is None
    query, key = own.query_key.query, own.query_key.key
    assert query is not key
    assert torch.equal(query.conv.weight, key.conv.weight)
    own = build(AxialAttention, share_qk=False)
    keys = [own.column_query_key.key.conv.weight, own.row_query_key.key.conv.weight]
    assert not torch.equal(*keys)


def test_projections_without_norm_start_as_xavier():
    bare = build(SelfAttention, norm_cfg=None, act_cfg=None)
    for conv, fans in ((bare.query_key.query.conv, 10 + 4), (bare.value.conv, 10 + 12)):
        assert conv.weight.abs().max() <= math.sqrt(6 / fans)
        assert not conv.bias.any()
    assert build(SelfAttention, norm_cfg=None, bias=False).value.conv.bias is None


def test_channel_gates_start_as_xavier():
    for step in ChannelGate(512, 128, 2):
        if isinstance(step, nn.Linear):
            bound = math.sqrt(6 / (step.in_features + step.out_features))
            assert step.weight.abs().max() <= bound
            # That of a uniform distribution up to the bound.
            expected = math.sqrt(2 / (step.in_features + step.out_features))
            assert float(step.weight.detach().std()) == pytest.approx(expected, rel=0.02)


def test_batch_norm_is_the_authors_unless_the_config_says_otherwise():
    norms = [m for m in build(AxialAttention).modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(m.eps, m.momentum) for m in norms] == [(1e-3, 0.1)] * 3
    given = build(AxialAttention, norm_cfg=dict(type='BN', eps=1e-4, momentum=0.01))
    norms = [m for m in given.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(m.eps, m.momentum) for m in norms] == [(1e-4, 0.01)] * 3


# --- precision, compilers, copies ----------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_large_features_in_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    query = (60 * torch.randn(1, 3, 6, 64, generator=generator)).to(dtype).requires_grad_()
    value = (100 * torch.randn(1, 3, 6, 16, generator=generator)).to(dtype)
    exact = query.double() @ query.double().transpose(2, 3)
    rounded = exact.to(dtype).double()
    if dtype is torch.float16:
        assert rounded.isinf().any(), 'the case is none: logits fit into float16'
    else:
        assert (rounded - exact).abs().max() > 100, 'the case is none: bfloat16 holds the logits'
    out = dot_product_attention(query, query, value)
    assert out.dtype is dtype
    expected = naive_softmax(exact, -1) @ value.double()
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-2)
    out.float().sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_fused_attention_gets_float32(monkeypatch, dtype):
    # On a CPU it widens by itself, so that results would not tell.
    seen, attend = [], F.scaled_dot_product_attention

    def watched(*operands, **options):
        seen.append([x.dtype for x in operands])
        return attend(*operands, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', watched)
    query, value = torch.randn(1, 2, 5, 4).to(dtype), torch.randn(1, 2, 5, 7).to(dtype)
    assert dot_product_attention(query, query, value).dtype is dtype
    with torch.autocast('cpu', dtype=torch.bfloat16):
        dot_product_attention(query, query, value)
    assert seen == [[torch.float32] * 3] * 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('implementation', ['factorized', 'grouped'])
@pytest.mark.parametrize('kind', CHANNELIZED)
def test_autocast_with_large_features(kind, implementation, dtype):
    # Without norm, the queries are as large as the input makes them.
    options = dict(norm_cfg=None, implementation=implementation)
    module, x = build(kind, torch.float32, **options), 300 * image(dtype=torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        out = module(x)
        # torch < 2.1 has no float16 autocast on the CPU.
        assert out.dtype is (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    assert out.isfinite().all()
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_float32_operands_stay_float32_under_autocast(dtype):
    # Group norm gives them: autocast would narrow them to its type.
    query, value = 20 * torch.randn(2, 3, 5, 64), torch.randn(2, 3, 5, 7)
    for function in (dot_product_attention, lambda q, k, v: attention_map(q, k) @ v):
        expected = function(query, query, value)
        with torch.autocast('cpu', dtype=dtype):
            found = dot_product_attention(query, query, value)
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize('kind', EVERY)
def test_float16_on_cuda(kind):
    module, x = build(kind, torch.float32, norm_cfg=None).cuda(), 300 * image(dtype=torch.float32)
    with torch.autocast('cuda', dtype=torch.float16):
        out = module(x.cuda())
    assert out.dtype is torch.float16
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.stack
@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', EVERY)
def test_compiles_as_one_graph(kind, half):
    torch._dynamo.reset()
    module, x = build(kind, torch.float32, training=True), image(dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(module), backend='eager', fullgraph=True)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=half):
        found, expected = gradients(compiled, x), gradients(module, x)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize('kind', EVERY)
def test_copies_and_pickles(kind):
    module, x = build(kind), image()
    gradients(module, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(implementation='fast'), r"one of \('factorized', 'grouped'\), got 'fast'"),
        (dict(groups=0), 'groups of the attention must be at least 1, got 0'),
        (dict(gate_layers=0), 'gate_layers of the attention must be at least 1, got 0'),
        (dict(gate_channels=-1), 'gate_channels of the attention must be at least 1, got -1'),
        (dict(qk_channels=0), 'qk_channels of the attention must be at least 1, got 0'),
        (dict(channels=0), 'channels of the attention must be at least 1, got 0'),
    ],
)
@pytest.mark.parametrize('kind', CHANNELIZED)
def test_wrong_options_say_what_was_expected(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **options)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match='qk_channels=4 of the attention is no multiple of num_he'):
        build(AxialAttention, num_heads=3)
    with pytest.raises(ValueError, match='num_heads of the attention must be at least 1, got 0'):
        build(SelfAttention, num_heads=0)
    with pytest.raises(TypeError, match='num_heads'):
        build(ChannelizedAxialAttention, num_heads=2)
