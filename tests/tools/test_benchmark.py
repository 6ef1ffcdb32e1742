"""tools/analysis_tools/benchmark.py: what it times, how it counts memory, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from .running import ROOT, TOOLS, load_tool, run_again, small_config

TOOL = TOOLS / 'analysis_tools' / 'benchmark.py'


@pytest.fixture(scope='module')
def benchmark():
    return load_tool(TOOL)


@pytest.fixture
def config(tmp_path) -> Path:
    return small_config(tmp_path)


def test_the_table_holds_median_extremes_and_ratio(benchmark):
    args = benchmark.parse_args(['a.py', '--device', 'cpu', '--mode', 'train', '--repeat', '3'])
    args.shape, args.batch_size = (32, 64), 4
    first = benchmark.Timing('x/a.py', [0.1, 0.4, 0.2], 4, 2**20, 'float32')
    second = benchmark.Timing('x/b.py', [0.3, 0.3, 0.3], 4, 3 * 2**20, 'float32')
    text = benchmark.report([first, second], args)
    row = next(line for line in text.splitlines() if line.startswith('| a '))
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells == ['a', '200.00', '100.00', '400.00', '20.00', '1 MiB', 'float32']
    assert 'time, second / first: 1.500' in text
    assert 'memory, second / first: 3.000' in text
    assert '4 image(s) of 32 x 64' in text


def test_an_inference_step_labels_every_pixel(benchmark, config):
    cfg = Config.fromfile(config)
    step, precision = benchmark.make_step(cfg, 'inference', (48, 64), 2, 'cpu')
    samples = step()
    assert [sample.pred_sem_seg.data.shape for sample in samples] == [(1, 48, 64)] * 2
    assert precision == 'float32'


def test_a_training_step_changes_the_weights(benchmark, config, monkeypatch):
    models = []
    build = benchmark.build_optim_wrapper
    monkeypatch.setattr(
        benchmark, 'build_optim_wrapper', lambda m, c: (models.append(m), build(m, c))[1]
    )
    # Smaller than the crop: it is not padded to it.
    step, _ = benchmark.make_step(Config.fromfile(config), 'train', (32, 48), 2, 'cpu')
    (model,) = models
    seen = []
    model.backbone.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].shape))
    before = model.decode_head.conv_seg.weight.clone()
    losses = step()
    assert torch.isfinite(losses['loss'])
    assert seen == [(2, 3, 32, 48)]
    assert not torch.equal(model.decode_head.conv_seg.weight, before)


@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_mixed_precision_reaches_the_convolutions(benchmark, config, mode):
    cfg = Config.fromfile(config)
    step, precision = benchmark.make_step(cfg, mode, (32, 32), 2, 'cpu', amp=True)
    seen = []

    def remember(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(remember)
    try:
        step()
    finally:
        handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert precision == 'mixed with bfloat16'
    # The config that was given is as before.
    assert cfg.optim_wrapper.type == 'OptimWrapper'


def test_two_configs_side_by_side(config, tmp_path):
    other = tmp_path / 'wider.py'
    other.write_text("_base_ = './small.py'\nmodel = dict(decode_head=dict(channels=256))\n")
    result = run_again(
        TOOL, config, '--compare', other, '--mode', 'train', '--batch-size', 2, '--repeat', 3,
        '--warmup', 1, '--json', 'out/numbers.json', '--cfg-options', 'model.auxiliary_head=None',
        cwd=tmp_path,
    )  # fmt: skip
    assert 'the two configs in turn' in result.stdout
    numbers = json.loads((tmp_path / 'out' / 'numbers.json').read_text())
    assert (numbers['mode'], numbers['shape'], numbers['device']) == ('train', [64, 64], 'cpu')
    small, wide = numbers['configs']
    assert [len(small['seconds']), len(wide['seconds'])] == [3, 3]
    assert small['images_per_second'] == pytest.approx(2 / small['median'])
    # Weights, gradients and two states of AdamW, four bytes each; the option reached the process
    # that measures memory, or there would be the auxiliary head's as well.
    for row, path in ((small, config), (wide, other)):
        cfg = Config.fromfile(path)
        cfg.model.auxiliary_head = None
        assert row['peak_memory'] > 16 * _parameters(cfg)
        assert row['peak_memory'] < 16 * _parameters(cfg) + 200 * 2**20
    assert wide['peak_memory'] - small['peak_memory'] > 16 * 2**20


def _parameters(cfg: Config) -> int:
    from mmseg.registry import MODELS

    return sum(p.numel() for p in MODELS.build(cfg.model).parameters())


def test_weights_of_a_checkpoint_are_taken(benchmark, config, tmp_path):
    cfg = Config.fromfile(config)
    cfg.model.decode_head.num_classes = 8
    from mmseg.registry import MODELS

    model = MODELS.build(cfg.model)
    with torch.no_grad():
        model.decode_head.conv_seg.weight.zero_()
        model.decode_head.conv_seg.bias.copy_(torch.eye(8)[5])
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    step, _ = benchmark.make_step(
        cfg, 'inference', (32, 32), 1, 'cpu', checkpoint=str(tmp_path / 'weights.pth')
    )
    assert (step()[0].pred_sem_seg.data == 5).all()


def test_a_single_value_per_channel_names_the_option(config, tmp_path, benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, 'memory_on_cpu', lambda *arguments: None)
    with pytest.raises(SystemExit, match='--batch-size 2 or more, got 1'):
        benchmark.main([str(config), '--mode', 'train', '--batch-size', '1', '--device', 'cpu'])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shape', '1', '2', '3'], 'expected H W or one side, positive, got 1 2 3'),
        (['--batch-size', '0'], '--batch-size: expected at least 1, got 0'),
        (['--repeat', '0'], '--repeat: expected at least 1, got 0'),
        (['--warmup', '-1'], '--warmup: expected at least 0, got -1'),
    ],
)
def test_wrong_options_say_what_was_expected(benchmark, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark.parse_args(['config.py', *options])
    assert message in capsys.readouterr().err


def test_a_config_without_a_crop_asks_for_the_shape(benchmark, config):
    cfg = Config.fromfile(config)
    del cfg.model.data_preprocessor['size']
    with pytest.raises(SystemExit, match='give --shape H W'):
        benchmark.image_shape(cfg, None)
    assert benchmark.image_shape(cfg, [48]) == (48, 48)
    assert benchmark.image_shape(cfg, [48, 96]) == (48, 96)


def test_a_config_that_is_not_there_is_kindly_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match='is not a file'):
        benchmark.main([str(ROOT / 'configs' / 'nothing.py')])


def test_a_base_file_is_no_config(benchmark):
    base = ROOT / 'configs' / '_base_' / 'models' / 'upernet_r18.py'
    with pytest.raises(SystemExit, match=r'upernet_r18\.py has no optim_wrapper'):
        benchmark.main([str(base), '--mode', 'train'])


@pytest.mark.gpu
@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_memory_and_time_on_a_gpu(benchmark, config, mode):
    arguments = [str(config), '--mode', mode, '--device', 'cuda', '--repeat', '2']
    (timing,) = benchmark.main([*arguments, '--batch-size', '2'])
    copies = 4 if mode == 'train' else 1
    assert timing.peak_memory > 4 * copies * _parameters(Config.fromfile(config))
    assert min(timing.seconds) > 0
