"""tools/analysis_tools/benchmark_gff.py: what it measures, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from mmseg.models.decode_heads import PSPHead

from mmseg_fusion.models.decode_heads import GFFHead

from .running import TOOLS, forked_python, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_gff.py'
VARIANTS = ['no fusion', 'concat', 'add', 'fpn', 'gated_fpn', 'gff', 'gff + dfp']

#: A backbone of four narrow levels at strides 4, 8, 8, 8.
SMALL = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        type='ResNet', depth=18, base_channels=4, stem_channels=4, strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4), norm_cfg=norm_cfg,
        init_cfg=dict(type='Pretrained', checkpoint='https://nowhere.invalid/a.pth')),
    decode_head=dict(
        type='GFFHead', in_channels=[4, 8, 16, 32], channels=8, neck=dict(num_convs=1),
        context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)), dropout_ratio=0.1,
        num_classes=5, norm_cfg=norm_cfg,
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


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


@pytest.mark.stack
def test_as_a_user_runs_it(small, tmp_path):
    done = run_again(
        TOOL, '--config', small, '--shape', 32, 40, '--repeat', 3, '--warmup', 0, '--device',
        'cpu', '--variants', 'concat', 'gff', '--json', 'out/numbers.json', cwd=tmp_path,
        python=forked_python(),
    )  # fmt: skip
    rows = json.loads((tmp_path / 'out' / 'numbers.json').read_text())['results']
    assert [row['variant'] for row in rows] == ['concat', 'gff']
    for row in rows:
        assert len(row['seconds']) == 3
        assert row['median'] == sorted(row['seconds'])[1] > 0
        assert 'memory' in row
    assert 'decode head, training step: 2 image(s) of 32 x 40' in done.stdout
    assert [row[0] for row in cells(done.stdout)] == ['small', 'concat', 'gff']
    # A 1x1 convolution of four levels with norm, for each of four levels; a gate with bias on each
    # level as it comes.
    concat, gff = (row['M parameters'] * 1e6 for row in rows)
    assert concat - gff == pytest.approx(4 * (32 * 8 + 16) - (4 + 8 + 16 + 32 + 4))


def test_the_variants_are_what_they_are_called(tool, small):
    model = tool.read_model(small, 'GFFHead')
    heads = {variant: tool.build_head(tool.vary(model, variant)) for variant in VARIANTS}
    assert list(tool.VARIANTS) == VARIANTS
    assert type(heads['no fusion']) is PSPHead
    assert heads['no fusion'].in_channels == 32
    assert heads['no fusion'].in_index == 3
    for variant in VARIANTS[1:]:
        head = heads[variant]
        assert type(head) is GFFHead
        assert head.neck.fusion == variant.split(' ')[0]
        assert (head.pyramid is not None) == variant.endswith('dfp')
        # What is not exchanged stays the config's.
        assert [len(convs) for convs in head.neck.refine] == [1] * len(head.neck.refine)
    # The config's own model is not changed.
    assert 'fusion' not in tool.read_model(small, 'GFFHead').decode_head.neck
    assert 'fusion' not in model.decode_head.neck


def test_levels_have_the_backbones_shapes(tool, small):
    args = tool.parse_args(['--shape', '33', '40', '--batch-size', '3'])
    assert tool.level_shapes(tool.read_model(small, 'GFFHead'), args.shape, args.batch_size) == [
        (3, 4, 9, 10),
        (3, 8, 5, 5),
        (3, 16, 5, 5),
        (3, 32, 5, 5),
    ]


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('mode', ['train', 'inference'])
def test_a_step_runs_backward_to_levels_and_weights(tool, small, mode, amp):
    options = ['--config', small, '--shape', '16', '16', '--mode', mode, '--device', 'cpu']
    args = tool.parse_args(options + ['--amp'] * amp)
    model = tool.read_model(small, 'GFFHead')
    head = tool.build_head(tool.vary(model, 'gff + dfp'))
    shapes = tool.level_shapes(model, args.shape, args.batch_size)
    levels = tool.noise(shapes, 'cpu', mode == 'train')
    tool.head_step(head, levels, args)()
    reached = [x.grad is not None for x in [*levels, *head.parameters()]]
    assert all(reached) if mode == 'train' else not any(reached)
    assert head.training == (mode == 'train')


def test_a_whole_step_changes_the_backbone(tool, small, monkeypatch):
    args = tool.parse_args(['--config', small, '--shape', '32', '32', '--whole', '--device', 'cpu'])
    built = []
    build = tool.make_step.__globals__['MODELS'].build

    def note(cfg, *rest, **more):
        built.append(build(cfg, *rest, **more))
        return built[-1]

    monkeypatch.setattr(tool.make_step.__globals__['MODELS'], 'build', note)
    step = tool.whole_step(tool.vary(tool.read_model(small, 'GFFHead'), 'gff'), args)
    (model,) = [m for m in built if type(m).__name__ == 'EncoderDecoder']
    weight = next(model.backbone.parameters())
    before = weight.detach().clone()
    step()
    assert not torch.equal(weight, before)


def test_memory_is_that_of_the_features(tool, harness, small):
    options = ['--config', small, '--shape', '512', '512', '--device', 'cpu', '--threads', '1']
    args = tool.parse_args([*options, '--batch-size', '2'])
    peak = harness.all_memory_apart(str(TOOL), args.argv)[0]['concat']
    # The first level and its gradient; reduced, stacked, mixed, refined and resized.
    level = 2 * 4 * 128**2 * 4
    assert 7 * level < peak < 200 * level


def test_gff_is_held_to_its_limit(tool, harness):
    def judged(**seconds):
        case = harness.Case('gff', tuple(seconds), lambda variant: None, base='concat')
        return tool.judge(
            harness.Result(case, [harness.Measured(*item) for item in seconds.items()])
        )

    # The second turn met a busy machine, in both variants.
    kept = judged(concat=[1.0, 9.0, 2.0], gff=[1.1, 9.0, 2.4])
    assert kept == 'gff takes 1.100 times as long as concat, within 1.15'
    slow = judged(concat=[1.0, 9.0, 2.0], gff=[1.2, 10.8, 2.4])
    assert slow == 'gff takes 1.200 times as long as concat, above 1.15'
    assert judged(add=[1.0], gff=[1.0]) is None


def test_the_default_is_the_papers_head(tool):
    args = tool.parse_args([])
    head = tool.read_model(args.config, 'GFFHead').decode_head
    assert (head.channels, head.in_channels) == (256, [256, 512, 1024, 2048])
    assert args.shape == (512, 512)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shape', '0', '64'], 'argument --shape: expected H W, positive, got 0 64'),
        (['--repeat', '0'], '--repeat must be at least 1, got 0'),
        (['--batch-size', '0'], '--batch-size must be at least 1, got 0'),
        (['--batch-size', '1'], 'expected at least 2 with --mode train, got 1'),
        (['--warmup', '-1'], '--warmup must be at least 0, got -1'),
        (['--variants', 'sum'], "invalid choice: 'sum'"),
    ],
)
def test_wrong_options(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(options)
    assert message in capsys.readouterr().err


def test_another_head_is_refused(tool, tmp_path):
    path = tmp_path / 'psp.py'
    path.write_text("model = dict(decode_head=dict(type='PSPHead'))")
    with pytest.raises(SystemExit, match=r'must be of type GFFHead, got PSPHead'):
        tool.read_model(str(path), 'GFFHead')


@pytest.mark.gpu
def test_on_a_gpu(tool, small):
    options = ['--config', small, '--shape', '64', '64', '--repeat', '2', '--amp']
    (result,) = tool.main([*options, '--device', 'cuda'])
    rows = result.rows
    assert [row.variant for row in rows] == VARIANTS
    assert all(row.memory > 0 and min(row.seconds) > 0 for row in rows)
