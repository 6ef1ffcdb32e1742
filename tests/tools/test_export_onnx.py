"""tools/deployment/export_onnx.py: what it writes, what it compares, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import save_checkpoint
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.files import MADE

from .running import ROOT, TOOLS, run

TOOL = TOOLS / 'deployment' / 'export_onnx.py'
BASES = ROOT / 'configs' / '_base_' / 'models'
SHAPES = ROOT / 'configs' / 'fusion_shapes'
ESEG = BASES / 'eseg-lite-s.py'
CAR = SHAPES / 'sa_r18-d8_car_1xb4-1k_fusion-shapes-128x128.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('export_onnx', TOOL)
    module = sys.modules['export_onnx'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(path: Path, image: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'image': image.numpy()})[0])


def tiny(folder: Path, **head) -> Path:
    """A network of one convolution, strides 4, whose head is given."""
    path = folder / 'tiny.py'
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[1.0, 2, 3], std=[4.0, 5, 6], bgr_to_rgb=True
        ),
        backbone=dict(type='ResNet', depth=18, out_indices=(0,), num_stages=1, strides=(1,),
                      dilations=(1,), style='pytorch'),
        decode_head=dict(dict(type='FCNHead', in_channels=64, in_index=0, channels=8, num_convs=1,
                              num_classes=5, norm_cfg=dict(type='BN')), **head),
        test_cfg=dict(mode='whole'),
    )  # fmt: skip
    path.write_text(f'model = {model!r}\n')
    return path


# --- ESeg ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', ['lite-s', 'lite-m', 'lite-l', 's'])
def test_eseg_gives_the_same_in_onnxruntime(tool, tmp_path, size):
    out = tmp_path / 'model.onnx'
    config = str(BASES / f'eseg-{size}.py')
    differences = tool.main([config, str(out), '--shape', '128', '256'])
    assert [d.batch for d in differences] == [1, 2]
    assert all(d.relative <= 1e-4 for d in differences)
    # A batch that was never exported or compared; images that give different logits.
    image = tool.noise(3, (128, 256), 3)
    logits = outputs(out, image)
    assert logits.shape == (3, 19, 32, 64)
    assert (logits[0] - logits[1]).abs().mean() > 0.01 * logits.abs().max()
    torch.manual_seed(0)
    module = tool.Deployed(tool.build(Config.fromfile(config)), (128, 256))
    tool.settle(module)
    with torch.no_grad():
        expected = module.model(image)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.stack
def test_odd_sides_and_labels(tool, tmp_path):
    """Levels that halve with a remainder, and the resizing to the image."""
    out = tmp_path / 'model.onnx'
    differences = tool.main([str(ESEG), str(out), '--shape', '97', '129', '--argmax'])
    assert all(d.relative <= 1e-4 and d.pixels <= 5 for d in differences)
    image = tool.noise(1, (97, 129), 3)
    labels = outputs(out, image)
    assert labels.shape == (1, 97, 129)
    assert labels.dtype == torch.uint8
    assert len(labels.unique()) > 1


def test_dynamo_gives_the_same(tool, tmp_path):
    if 'dynamo' not in tool.exporters():
        with pytest.raises(SystemExit, match='has only torchscript'):
            tool.choose_exporters('dynamo')
        return
    out = tmp_path / 'model.onnx'
    options = ['--shape', '64', '96', '--exporter', 'dynamo', '--upsample']
    differences = tool.main([str(ESEG), str(out), *options])
    assert all(d.relative <= 1e-4 for d in differences)
    # Weights and all in the one file; the other is the list of what the tool wrote.
    assert sorted(p.name for p in tmp_path.iterdir()) == [MADE, 'model.onnx']
    assert outputs(out, torch.randn(3, 3, 64, 96)).shape == (3, 19, 64, 96)


# --- other models --------------------------------------------------------------------------------


@pytest.mark.stack
def test_as_a_user_runs_it_with_a_checkpoint(tool, tmp_path):
    config = tiny(tmp_path)
    init_default_scope('mmseg')
    torch.manual_seed(3)
    model = MODELS.build(Config.fromfile(config).model)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 48))
    meta = dict(dataset_meta=dict(classes=('a', 'b', 'c', 'd', 'e')))
    save_checkpoint(dict(state_dict=model.state_dict(), meta=meta), str(tmp_path / 'w.pth'))
    # Options between the positional arguments.
    done = run(TOOL, config, '--shape', 32, 48, '--upsample', 'w.pth', 'o.onnx', cwd=tmp_path)
    assert 'image (batch, 3, 32, 48) -> logits (batch, 5, 32, 48)' in done.stdout
    assert 'batch 1: ' in done.stdout
    assert 'batch 2: ' in done.stdout
    assert 'no checkpoint' not in done.stdout
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        small = model.eval()(image)
    expected = nn.functional.interpolate(small, size=(32, 48), mode='bilinear')
    torch.testing.assert_close(outputs(tmp_path / 'o.onnx', image), expected, rtol=0, atol=1e-4)
    props = {p.key: p.value for p in onnx.load(str(tmp_path / 'o.onnx')).metadata_props}
    assert json.loads(props['mean']) == [1, 2, 3]
    assert json.loads(props['std']) == [4, 5, 6]
    assert props['channels'] == 'RGB'
    assert json.loads(props['classes']) == ['a', 'b', 'c', 'd', 'e']


def test_pooling_that_torchscript_cannot_export_goes_by_dynamo(tool, tmp_path, capfd):
    """PSPNet's pooling to 3 x 3 of a map whose sides are no multiples of 3."""
    cfg = Config.fromfile(tiny(tmp_path))
    cfg.model.decode_head.update(type='PSPHead', pool_scales=(1, 3))
    del cfg.model.decode_head['num_convs']
    config = tmp_path / 'psp.py'
    cfg.dump(config)
    arguments = [str(config), str(tmp_path / 'o.onnx'), '--shape', '32', '64']
    with pytest.raises(SystemExit, match=r'adaptive_avg_pool2d(.|\n)*--exporter dynamo'):
        tool.main([*arguments, '--exporter', 'torchscript'])
    # The exporter's dump of the whole graph is no answer to a user.
    assert 'Torch IR' not in capfd.readouterr().out
    assert not list(tmp_path.glob('*.onnx'))
    if 'dynamo' in tool.exporters():
        differences = tool.main(arguments)
        assert all(d.relative <= 1e-4 for d in differences)
        assert 'dynamo exporter' in capfd.readouterr().out


def test_car_is_merged(tool, tmp_path):
    files = {}
    for name, options in dict(plain=[], merged=['--merge-car']).items():
        files[name] = tmp_path / f'{name}.onnx'
        tool.main([str(CAR), str(files[name]), '--shape', '40', '56', *options])
    image = torch.randn(2, 3, 40, 56)
    plain, merged = (outputs(path, image) for path in files.values())
    assert (plain - merged).abs().max() <= 1e-4 * plain.abs().max()
    convs = [
        sum(node.op_type == 'Conv' for node in onnx.load(str(path)).graph.node)
        for path in files.values()
    ]
    assert convs[1] < convs[0]
    with pytest.raises(SystemExit, match=r"needs model\.type='CAREncoderDecoder'"):
        tool.main([str(ESEG), str(tmp_path / 'o.onnx'), '--shape', '32', '32', '--merge-car'])


def test_kernel_sharing_is_exported(tool, tmp_path):
    config = SHAPES / 'ksac_r18-d8_1xb4-1k_fusion-shapes-128x128.py'
    differences = tool.main([str(config), str(tmp_path / 'o.onnx'), '--shape', '40', '56'])
    assert all(d.relative <= 1e-4 for d in differences)


def test_a_cascade_gives_the_last_heads_labels(tool, tmp_path):
    config = tmp_path / 'cascade.py'
    head = dict(type='FCNHead', in_channels=64, in_index=0, channels=8, num_convs=1, num_classes=5)
    ocr = dict(
        type='OCRHead', in_channels=64, in_index=0, channels=8, ocr_channels=4, num_classes=5
    )
    cfg = Config.fromfile(tiny(tmp_path))
    cfg.model.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=[head, ocr])
    cfg.dump(config)
    out = tmp_path / 'o.onnx'
    tool.main([str(config), str(out), '--shape', '32', '48', '--argmax'])
    torch.manual_seed(0)
    module = tool.Deployed(tool.build(Config.fromfile(config)), (32, 48), argmax=True)
    tool.settle(module)
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        small = module.model(image)
        expected = nn.functional.interpolate(small, size=(32, 48), mode='bilinear').argmax(1)
    assert (outputs(out, image) == expected).float().mean() > 0.999


def test_a_binary_model_gives_its_threshold(tool, tmp_path):
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    head = dict(num_classes=2, out_channels=1, loss_decode=loss)
    torch.manual_seed(0)
    config = tiny(tmp_path, threshold=0.5, **head)
    module = tool.Deployed(tool.build(Config.fromfile(config)), (32, 48), True)
    tool.settle(module)
    image = tool.noise(2, (32, 48), 3)
    with torch.no_grad():
        probability = module(image).sigmoid()[:, 0]
    threshold = float(probability.median())
    config, out = tiny(tmp_path, threshold=threshold, **head), tmp_path / 'o.onnx'
    differences = tool.main([str(config), str(out), '--shape', '32', '48', '--argmax'])
    assert all(d.relative <= 1e-4 for d in differences)
    labels = outputs(out, image)
    assert (labels == (probability > threshold)).float().mean() > 0.999
    assert 0.4 < labels.float().mean() < 0.6


# --- what is compared ----------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_refused(tool, tmp_path, monkeypatch):
    config, out = tiny(tmp_path), tmp_path / 'o.onnx'
    out.write_bytes(b'of before')
    export = tool.export

    def wrong(module, path, exporter, opset=None):
        export(module, path, exporter, opset)
        with torch.no_grad():
            module.model.decode_head.conv_seg.bias[1] += 1

    monkeypatch.setattr(tool, 'export', wrong)
    with pytest.raises(SystemExit, match='the outputs differ by more than 1e-04: batch 1'):
        tool.main(
            [
                str(config),
                str(out),
                '--shape',
                '32',
                '48',
                '--exporter',
                'torchscript',
                '--overwrite',
            ]
        )
    # What was there is still there, and nothing beside it.
    assert out.read_bytes() == b'of before'
    assert {p.name for p in tmp_path.iterdir()} == {'o.onnx', 'tiny.py'}


def test_labels_may_differ_where_two_logits_are_equal(tool, tmp_path):
    module = tool.Deployed(tool.build(Config.fromfile(tiny(tmp_path))), (32, 48), argmax=True)
    tool.export(module, tmp_path / 'o.onnx')
    assert all(d.pixels == 0 for d in tool.compare(module, tmp_path / 'o.onnx'))
    # Now classes 1 and 2 are the largest everywhere, and 2 only just in PyTorch.
    bias = module.model.decode_head.conv_seg
    nn.init.zeros_(bias.weight)
    bias.bias.copy_(torch.tensor([0.0, 1, 1, 0, 0]))
    tool.export(module, tmp_path / 'o.onnx')
    bias.bias[2] += 1e-5
    for d in tool.compare(module, tmp_path / 'o.onnx'):
        assert d.pixels == d.batch * 32 * 48
        assert d.relative == pytest.approx(1e-5, rel=0.05)
    bias.bias[2] += 1
    assert all(d.relative > 0.4 for d in tool.compare(module, tmp_path / 'o.onnx'))


def test_settled_norms_have_the_statistics_of_noise(tool, tmp_path):
    module = tool.Deployed(tool.build(Config.fromfile(tiny(tmp_path))), (32, 48))
    norm = module.model.backbone.bn1
    seen = []
    norm.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    tool.settle(module)
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    variance = seen[0].double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_var.double(), variance + 3 * variance.mean())
    # It takes them once.
    before = norm.running_mean.clone()
    module(torch.randn(1, 3, 32, 48))
    assert torch.equal(norm.running_mean, before)
    assert not norm.training


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['c.py', 'o.onnx', '--shape', '0', '8'], 'expected H W, positive, got 0 8'),
        (['c.py', 'o.pt', '--shape', '8', '8'], r'must be a file that ends in \.onnx, got o\.pt'),
        (['c.py', 'a/b/o.onnx', '--shape', '8', '8'], 'there is no folder'),
        (['c.py', 'o.onnx'], 'required: --shape'),
        (['c.py', 'o.onnx', '--shape', '8', '8', '--tolerance', '0'], 'expected more than 0'),
    ],
)
def test_wrong_options_say_what_was_expected(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.parse_args(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_package_names_the_extra(tool, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name)
    )
    with pytest.raises(SystemExit, match=r"onnxruntime must be .* 'mmseg-fusion\[onnx\]'"):
        tool.main([str(ESEG), str(tmp_path / 'o.onnx'), '--shape', '32', '32'])


def test_wrong_files(tool, tmp_path):
    out = [str(tmp_path / 'o.onnx'), '--shape', '32', '48']
    with pytest.raises(SystemExit, match='is not a file'):
        tool.main([str(tmp_path / 'nothing.py'), *out])
    config = tiny(tmp_path)
    with pytest.raises(SystemExit, match=r"checkpoint .*nothing\.pth' is not a file"):
        tool.main([str(config), str(tmp_path / 'nothing.pth'), *out])
    torch.save(dict(state_dict={'backbone.other': torch.zeros(1)}), tmp_path / 'w.pth')
    with pytest.raises(SystemExit, match=r'w\.pth does not fit the model of the config'):
        tool.main([str(config), str(tmp_path / 'w.pth'), *out])
    (tmp_path / 'schedule.py').write_text('train_cfg = dict(max_iters=1)\n')
    with pytest.raises(SystemExit, match='has no model'):
        tool.main([str(tmp_path / 'schedule.py'), *out])


@pytest.mark.parametrize(
    ('version', 'parameters', 'expected'),
    [
        ('2.0.1', 'model', ['torchscript']),
        ('2.4.1+cu121', 'model', ['torchscript']),
        ('2.5.0', 'model, dynamo', ['torchscript', 'dynamo']),
        ('3.0.0', 'model', ['dynamo']),
    ],
)
def test_exporters_of_each_torch(tool, monkeypatch, version, parameters, expected):
    namespace: dict = {}
    exec(f'def export({parameters}): ...', namespace)
    monkeypatch.setattr(torch.onnx, 'export', namespace['export'])
    monkeypatch.setattr(torch, '__version__', version)
    assert tool.exporters() == expected
