"""tools/analysis_tools/benchmark_hfgd.py: what it measures, and what it refuses."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from mmseg.registry import MODELS

from mmseg_fusion.models.decode_heads import HFGDHead

from .running import TOOLS, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_hfgd.py'
HEADS = ['upsampler', '+ axial attention', 'HFGD']

#: A backbone of four narrow levels at strides 4 to 32.
SMALL = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        type='ResNet', depth=18, base_channels=4, stem_channels=4, norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='https://nowhere.invalid/a.pth')),
    decode_head=dict(
        type='HFGDHead', in_channels=[4, 8, 16, 32], channels=8,
        encoder=dict(
            type='ContextAugmentedEncoder', wide_channels=16, attention_channels=8, qk_channels=4),
        dropout_ratio=0.1, num_classes=5, norm_cfg=norm_cfg,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def harness():
    return load_tool(TOOL.parent / '_harness.py')


@pytest.fixture
def small(tmp_path):
    path = tmp_path / 'small.py'
    path.write_text(SMALL)
    return str(path)


@pytest.mark.stack
def test_as_a_user_runs_it(tmp_path, small):
    done = run_again(
        TOOL, '--config', small, '--shape', 32, 40, '--shapes', '1x8x9x17', '--repeat', 3,
        '--warmup', 0, '--device', 'cpu', '--no-memory', '--json', 'out/numbers.json',
        cwd=tmp_path,
    )  # fmt: skip
    rows = json.loads((tmp_path / 'out' / 'numbers.json').read_text())['results']
    found = [(row['case'], row['variant']) for row in rows]
    assert found == [
        *(('attention 1x8x9x17', v) for v in ('fused', 'plain')),
        *((f'{mode} 1x3x32x40', v) for mode in ('train', 'inference') for v in HEADS),
    ]
    for row in rows:
        assert row['memory'] is None
        assert len(row['seconds']) == 3
        assert row['median'] == sorted(row['seconds'])[1] > 0
        assert f'| {row["variant"]} ' in done.stdout
    # One function in two forms.
    assert [row['error'] is not None for row in rows] == [False, True] + [False] * 6
    assert rows[1]['error'] < 1e-5


# --- axial attention -----------------------------------------------------------------------------


def test_what_is_timed_are_both_passes_of_the_heads_layer(tool):
    channels, shape = 8, (2, 8, 5, 4)
    head = dict(type='HFGDHead', in_channels=[4, 8], channels=channels, num_classes=3)
    layer = MODELS.build(dict(head, encoder=None, norm_cfg=dict(type='BN'))).axial_attention
    ours = tool.build_attention('fused', channels)
    assert str(ours) == str(layer)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    inputs = [*ours.column_query_key(x), ours.value(x)]
    with torch.no_grad():
        torch.testing.assert_close(tool.passes(ours, inputs), layer(x))


def test_plain_is_the_same_function(tool):
    inputs = [x.double() for x in tool.make_inputs((2, 8, 5, 7), 'cpu')]
    fused, plain = (tool.passes(tool.build_attention(v, 8), inputs) for v in ('fused', 'plain'))
    torch.testing.assert_close(fused, plain)
    # As it is written, with einsum: four heads of two channels, columns, then rows.
    query, key, value = (x.detach().unflatten(1, (4, 2)) for x in inputs)
    weights = torch.einsum('nadhw,nadkw->nawhk', query, key).div(2**0.5).softmax(-1)
    value = torch.einsum('nawhk,nadkw->nadhw', weights, value)
    weights = torch.einsum('nadhw,nadhk->nahwk', query, key).div(2**0.5).softmax(-1)
    value = torch.einsum('nahwk,nadhk->nadhw', weights, value)
    torch.testing.assert_close(fused, value.flatten(1, 2))


def kept(tool, variant, inputs):
    """Elements of each tensor that is kept for the backward pass of both passes."""
    layer, sizes = tool.build_attention(variant, inputs[0].shape[1]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), id):
        tool.passes(layer, inputs)
    return sizes


def test_no_attention_map_is_kept(tool):
    """On a CPU as well: neither W x H x H nor H x W x W, for four heads."""
    channels, height, width = 8, 33, 47
    inputs = tool.make_inputs((1, channels, height, width), 'cpu')
    maps = [4 * width * height * height, 4 * height * width * width]
    assert max(kept(tool, 'fused', inputs)) == channels * height * width
    # What would be seen otherwise.
    assert set(maps) <= set(kept(tool, 'plain', inputs))


def test_the_fused_kernel_is_taken(tool):
    """With query, key and value of one width; the other form is refused where it is forbidden."""
    inputs = tool.make_inputs((1, 8, 9, 17), 'cpu')
    layer = tool.build_attention('fused', 8)
    graph, names = [tool.passes(layer, inputs).grad_fn], []
    while graph:
        node = graph.pop()
        names.append(node.name())
        graph += [parent for parent, _ in node.next_functions if parent is not None]
    assert sum('ScaledDotProductFlashAttention' in name for name in names) == 2
    assert not any('Softmax' in name for name in names)
    attention = getattr(torch.nn, 'attention', None)  # torch >= 2.3
    with contextlib.ExitStack() as stack:
        if attention is not None:
            backend = attention.SDPBackend.FLASH_ATTENTION
            stack.enter_context(attention.sdpa_kernel(backend))
        tool.attention_step('fused', inputs, tool.parse_args(['--device', 'cpu']))()


def test_gradients_are_made_and_not_kept(tool):
    args = tool.parse_args(['--device', 'cpu'])
    inputs = tool.make_inputs((1, 8, 5, 4), 'cpu')
    for variant in tool.ATTENTION:
        tool.attention_step(variant, inputs, args)()
    assert all(x.grad is None for x in inputs)


@pytest.fixture(scope='module')
def peaks(tool, harness, tmp_path_factory):
    """Of the attention and of a training step of the heads, measured in one process."""
    config = tmp_path_factory.mktemp('peaks') / 'small.py'
    config.write_text(SMALL)
    options = ['--parts', 'attention', 'train', '--shapes', '1x32x129x129', '--shape', '256', '256']
    options += ['--config', str(config), '--device', 'cpu', '--threads', '1']
    return harness.all_memory_apart(str(TOOL), tool.parse_args(options).argv)


def test_memory_is_measured_apart(harness, peaks):
    if not harness.reset_peak():  # it is known on Linux alone
        return
    peaks = peaks[0]
    # Two passes' maps of four heads, in float32.
    maps = 2 * 4 * 129**3 * 4
    assert peaks['fused'] < maps < peaks['plain'] < 4 * maps


def test_memory_of_the_head_is_that_of_its_features(harness, peaks):
    peak = peaks[1]['HFGD']
    # Student's and teacher's logits at the size of the label, and their gradients.
    logits = 4 * 5 * 256**2 * 4
    assert peak is None if not harness.reset_peak() else logits / 2 < peak < 40 * logits


# --- the head ------------------------------------------------------------------------------------


def test_the_variants_are_what_they_are_called(tool, small):
    model = tool.read_model(small, 'HFGDHead')
    heads = {name: tool.build_head(tool.vary(model, name)) for name in HEADS}
    assert list(tool.HEAD) == HEADS
    for name, head in heads.items():
        assert type(head) is HFGDHead
        assert (head.axial_attention is None) == (name == 'upsampler')
        assert (head.encoder is not None) == head.guidance == (name == 'HFGD')
        assert head.conv_seg.out_channels == 5
    # The config's own model is not changed.
    assert model.decode_head.encoder.type == 'ContextAugmentedEncoder'


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('mode', ['train', 'inference'])
def test_a_step_runs_its_losses(tool, small, mode, amp):
    options = ['--config', small, '--shape', '64', '64', '--batch-size', '2', '--device', 'cpu']
    args = tool.parse_args(options + ['--amp'] * amp)
    model = tool.read_model(small, 'HFGDHead')
    head = tool.build_head(tool.vary(model, 'HFGD'))
    shapes = tool.level_shapes(model, args.shape, args.batch_size)
    levels = tool.noise(shapes, 'cpu', mode == 'train')
    assert [tuple(x.shape) for x in levels] == [
        (2, c, 64 // s, 64 // s) for c, s in zip((4, 8, 16, 32), (4, 8, 16, 32))
    ]
    tool.head_step(head, levels, mode, args)()
    reached = [p.grad is not None for p in head.parameters()]
    assert all(reached) if mode == 'train' else not any(reached)
    assert (levels[-1].grad is not None) == (mode == 'train')
    assert head.training == (mode == 'train')


def test_the_default_is_the_papers_head(tool):
    args = tool.parse_args([])
    head = tool.read_model(args.config, 'HFGDHead').decode_head
    assert (head.channels, head.encoder.wide_channels) == (256, 2048)
    assert args.shape == (513, 513)
    # Output stride 4 of a crop of 513 x 1025, and twice that, as output stride 2 is made.
    assert args.shapes == [(1, 256, 129, 257), (1, 256, 258, 514)]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shapes', '2x512x33'], "expected NxCxHxW such as 2x512x33x33, got '2x512x33'"),
        (['--shapes', '1x6x9x9'], 'expected a multiple of 4 channels, got (1, 6, 9, 9)'),
        (['--shape', '0', '64'], 'argument --shape: expected H W, positive, got 0 64'),
        (['--batch-size', '0'], '--batch-size must be at least 1, got 0'),
        (['--repeat', '0'], '--repeat must be at least 1, got 0'),
        (['--warmup', '-1'], '--warmup must be at least 0, got -1'),
        (['--threads', '0'], '--threads must be at least 1, got 0'),
        (['--parts', 'head'], "invalid choice: 'head'"),
    ],
)
def test_wrong_options_say_what_was_expected(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(['--device', 'cpu', *options])
    assert message in capsys.readouterr().err


def test_another_head_is_refused(tool, tmp_path):
    path = tmp_path / 'fcn.py'
    path.write_text("model = dict(decode_head=dict(type='FCNHead'))")
    with pytest.raises(SystemExit, match=r'must be of type HFGDHead, got FCNHead'):
        tool.read_model(str(path), 'HFGDHead')


@pytest.mark.gpu
def test_on_a_gpu(tool, small):
    options = ['--config', small, '--shape', '64', '64', '--shapes', '1x64x65x65', '--repeat', '2']
    rows = [row for r in tool.main([*options, '--device', 'cuda']) for row in r.rows]
    assert [row.variant for row in rows] == ['fused', 'plain', *HEADS, *HEADS]
    assert all(row.memory > 0 and min(row.seconds) > 0 for row in rows)
    assert rows[0].memory < rows[1].memory
