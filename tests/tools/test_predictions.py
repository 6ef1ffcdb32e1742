"""tools/analysis_tools/predictions.py as a user runs it, on FusionShapes."""

from __future__ import annotations

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import inference_model
from mmseg.registry import MODELS

from mmseg_fusion.datasets.fusion_shapes import draw_scene

from .running import TOOLS, load_tool, run, run_again, small_config

TOOL = TOOLS / 'analysis_tools' / 'predictions.py'


@pytest.mark.stack
def test_draws_and_says_what_each_model_has_right(tmp_path):
    config = small_config(tmp_path)
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    with torch.no_grad():
        model.decode_head.conv_seg.bias[3] += 100
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'b.pth')

    found = run(
        TOOL, config, 'a.pth', config, 'b.pth', '--indices', 2, 0, '--names', 'first', 'second',
        '--out', 'new/picture.png', cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / 'new' / 'picture.png').stat().st_size > 5000
    # The second model has class 3 everywhere.
    shares = re.findall(r'second ([\d.]+) %', found.stdout)
    model.cfg = cfg
    for share, index in zip(shares, (2, 0)):
        image, label = draw_scene(index, split='test', size=(64, 64))[:2]
        assert (inference_model(model, image).pred_sem_seg.data == 3).all()
        assert float(share) == pytest.approx(100 * (label[label != 255] == 3).mean(), abs=0.06)
    assert len(shares) == 2

    wrong = run_again(TOOL, config, 'a.pth', '--out', 'x.jpg', cwd=tmp_path, check=False)
    assert 'expected a file name in .png' in wrong.stderr


def test_largest_gain_is_told_with_all_that_was_lost(tmp_path, capsys, monkeypatch):
    """On request the images are chosen by their gain; the mean over the split goes with them."""
    config = small_config(tmp_path)
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    for name, best in (('a', 0), ('b', 3)):
        # One class everywhere, so that gain and loss are shares of the truth.
        with torch.no_grad():
            model.decode_head.conv_seg.bias.zero_()[best] += 1000
        torch.save(dict(state_dict=model.state_dict()), tmp_path / f'{name}.pth')
    net, gained, lost = {}, {}, {}
    for i in range(6):
        label = draw_scene(i, split='test', size=(64, 64))[1]
        labelled = label[label != 255]
        gained[i], lost[i] = (labelled == 3).mean(), (labelled == 0).mean()
        net[i] = gained[i] - lost[i]
    order = sorted(net, key=lambda i: -net[i])
    assert min(net.values()) < 0  # some became worse
    tool, drawn = load_tool(TOOL), []
    draw = tool.draw_predictions
    monkeypatch.setattr(tool, 'draw_predictions', lambda *a: (drawn.append(a), draw(*a)))
    pairs = [str(config), str(tmp_path / 'a.pth'), str(config), str(tmp_path / 'b.pth')]
    options = ['--names', 'a', 'b', '--out', str(tmp_path / 'x.png'), '--device', 'cpu']
    six = ['--cfg-options', 'test_dataloader.dataset.length=6']
    tool.main([*pairs, *options, '--largest-gain', '2', *six])
    out = capsys.readouterr().out
    mean = [100 * sum(share.values()) / 6 for share in (gained, lost, net)]
    worse, better = (sum(s * n > 0 for n in net.values()) for s in (-1, 1))
    words = (
        f'{mean[0]:.2f} % gained, {mean[1]:.2f} % lost, net {mean[2]:+.2f}; images better: '
        f'{better}, worse: {worse}, the same: {6 - better - worse}'
    )
    assert f'b against a, mean over the 6 images of the split: {words}' in out
    (views, _, _, _, title), shares = drawn[0], re.findall(r'; ([\d.]+) % gained, ([\d.]+)', out)
    # The picture says it too.
    assert title.endswith(
        f'2 images with the largest gain.\nMean over the 6 images of the split: {words}'
    )
    for view, i, (gain, loss) in zip(views, order, shares):
        assert (view.label == draw_scene(i, split='test', size=(64, 64))[1]).all()
        assert (float(gain), float(loss)) == pytest.approx(
            (100 * gained[i], 100 * lost[i]), abs=0.06
        )
    assert len(views) == len(shares) == 2
    # Without it the images are not chosen by their look: the mean is over those that are drawn.
    tool.main([*pairs, *options, '--indices', '1', '4', *six])
    assert drawn[1][-1] == ''
    over = f'mean over the 2 images drawn: {50 * (gained[1] + gained[4]):.2f} % gained'
    assert over in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--largest-gain', '2', '--num-samples', '3'], 'not allowed with argument'),
        (['--largest-gain', '0'], '--largest-gain must be at least 1, got 0'),
        (['config.py', 'none', '--largest-gain', '2'], '--largest-gain compares two models, got 3'),
    ],
)
def test_what_largest_gain_takes(arguments, message, capsys):
    with pytest.raises(SystemExit):
        load_tool(TOOL).parse_args(['a.py', 'none', 'b.py', 'none', *arguments])
    assert message in capsys.readouterr().err
