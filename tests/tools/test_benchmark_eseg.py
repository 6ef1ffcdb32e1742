"""tools/analysis_tools/benchmark_eseg.py: its tables, its two orders, what it refuses."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config

from .running import ROOT, TOOLS, load_tool, run_again

TOOL = TOOLS / 'analysis_tools' / 'benchmark_eseg.py'
HEAD = ROOT / 'configs' / '_base_' / 'models' / 'eseg-lite-s.py'
QUICK = ('--shape', '64', '96', '--repeat', '2', '--warmup', '1', '--device', 'cpu')


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module')
def harness():
    return load_tool(TOOL.parent / '_harness.py')


def cells(text: str, name: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f'| {name} '))
    return [cell.strip() for cell in row.strip('|').split('|')]


@pytest.mark.stack
def test_as_a_user_runs_it(tmp_path):
    models = ('--models', 'eseg-s', 'eseg-lite-s', 'pspnet_r50-d8')
    done = run_again(TOOL, *models, *QUICK, '--json', 'a/out.json', cwd=tmp_path)
    assert '1 image(s) of 64 x 96, fp32\nCPU, 1 thread(s)' in done.stdout
    assert 'time / eseg-s' in done.stdout
    assert cells(done.stdout, 'eseg-s')[-1] == '1.000'
    assert cells(done.stdout, 'eseg-lite-s')[1] == '1.77'
    rows = json.loads((tmp_path / 'a' / 'out.json').read_text())['results']
    assert [row['variant'] for row in rows] == list(models[1:])
    for row in rows:
        assert len(row['seconds']) == 2
        assert row['memory'] is None
    # ESeg-S is what the others are measured by, wherever it stands; else the first is.
    assert cells(done.stdout, 'model')[-2:] == ['images/s', 'time / eseg-s']


def test_all_eight_are_there(tool):
    configs = tool.read_models(tool.DEFAULT)
    assert list(configs) == list(tool.DEFAULT)
    assert len(configs) == 8
    assert tool.REFERENCE in configs


@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'bf16'])
def test_precision_reaches_the_logits(tool, harness, precision):
    args = tool.parse_args([*QUICK, '--precision', precision, '--channels-last'])
    case = tool.times_case(tool.read_models([str(HEAD)]), args)
    assert (case.base, case.images) == (HEAD.stem, 1)
    (row,) = harness.measure_case(case, args).rows
    assert len(row.seconds) == 2
    logits = case.build(HEAD.stem)()
    assert logits.dtype == tool.DTYPES[precision]
    assert logits.shape == (1, 19, 16, 24)


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_onnxruntime_runs_the_same_network(tool, tmp_path, precision):
    dtype = tool.DTYPES[precision]
    image = torch.randn(2, 3, 64, 96).to(dtype)
    module = tool.Deployed(tool.build(Config.fromfile(HEAD)), (64, 96))
    with torch.no_grad():
        expected = module(image.float())
    sessions = []
    open_session = tool.open_session

    def remember(*arguments):
        sessions.append(open_session(*arguments))
        return sessions[-1]

    tool.open_session = remember
    try:
        step = tool.onnxruntime_step(module, image, tmp_path, 1)
    finally:
        tool.open_session = open_session
    step()
    (out,) = sessions[0].run(None, {'image': image.numpy()})
    assert out.dtype == image.numpy().dtype
    tolerance = 1e-4 if precision == 'fp32' else 2e-2
    assert (
        torch.from_numpy(out).float() - expected
    ).abs().max() <= tolerance * expected.abs().max()


# --- the head ------------------------------------------------------------------------------------


def test_both_orders_are_the_equation(tool):
    args = SimpleNamespace(shape=(100, 132), batch_size=2, device='cpu', precision='fp32')
    heads = tool.build_heads(Config.fromfile(HEAD), args)
    levels = tool.pyramid(heads['scaled first'], args)
    sizes = [tuple(x.shape[2:]) for x in levels]
    assert sizes == [(25, 33), (13, 17), (7, 9), (4, 5), (2, 3), (1, 2), (1, 1), (1, 1)]
    w = heads['scaled first'].level_weights.double()
    assert len(w.unique()) == 8
    total = sum(math.exp(v) for v in w)
    expected = sum(
        math.exp(v) / total * F.interpolate(x.double(), size=(25, 33), mode='bilinear')
        for v, x in zip(w, levels)
    )
    with torch.no_grad():
        for head in heads.values():
            found = head.fuse(levels).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert heads['enlarged first'].fuse.func is tool.enlarge_then_scale


def test_the_saving_as_a_user_runs_it(tool, tmp_path):
    options = ('--models', 'eseg-lite-s', '--head-saving', '--shape', 512, 768, '--json', 'o.json')
    done = run_again(TOOL, *options, '--repeat', 2, '--device', 'cpu', cwd=tmp_path)
    titles = re.findall(r'^\| eseg-lite-s, 64 channels, (\w+) +\|', done.stdout, re.M)
    assert titles == ['sum', 'head']
    whole = json.loads((tmp_path / 'o.json').read_text())['results']
    names = [(row['model'], row['part'], row['variant']) for row in whole]
    assert names == [('eseg-lite-s', p, v) for p in ('sum', 'head') for v in tool.FORMS]
    for row in whole:
        assert row['error'] is None if row['variant'] == 'enlarged first' else row['error'] < 1e-5
        assert len(row['seconds']) == 2
    # Two maps of the finest level against at least three: what is scaled, enlarged, and the sum.
    memory = {row['variant']: row['memory'] for row in whole if row['part'] == 'sum'}
    size = 64 * 128 * 192 * 4
    assert memory['scaled first'] < memory['enlarged first']
    assert memory['enlarged first'] > 2.5 * size


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shape', '0', '8'], 'expected H W, positive, got 0 8'),
        (['--batch-size', '0'], '--batch-size must be at least 1, got 0'),
        (['--backend', 'onnxruntime', '--precision', 'bf16'], 'takes fp32 or fp16, got bf16'),
        (['--backend', 'onnxruntime', '--head-saving'], '--head-saving: measured in torch alone'),
    ],
)
def test_wrong_options_say_what_was_expected(tool, capsys, options, message):
    with pytest.raises(SystemExit):
        tool.parse_args(options)
    assert message in capsys.readouterr().err


def test_unknown_models(tool):
    with pytest.raises(SystemExit, match=r"'eseg-xl' is neither a config nor one of .*eseg-s"):
        tool.main(['--models', 'eseg-xl'])
    with pytest.raises(SystemExit, match='is not a file'):
        tool.main(['--models', 'nothing.py'])
    with pytest.raises(SystemExit, match='none of pspnet_r50-d8 has an ESegHead'):
        tool.main(['--models', 'pspnet_r50-d8', '--head-saving', *QUICK])


@pytest.mark.gpu
@pytest.mark.parametrize('option', ['--argmax', '--head-saving'])
def test_on_a_gpu(tool, option):
    options = ['--models', 'eseg-lite-s', '--shape', '256', '512', '--repeat', '3', option]
    found = tool.main([*options, '--device', 'cuda', '--precision', 'fp16'])
    assert found
