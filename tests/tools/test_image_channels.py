"""Tools that make an image of their own: it has the channels of the config, whatever they are."""

from __future__ import annotations

import ast
import json
import logging
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS, TRANSFORMS

from .running import ROOT, TOOLS, forked_python

pytestmark = pytest.mark.filterwarnings('ignore')

CHANNELS = 4
HEADS = dict(
    plain="dict(type='UPerHead', pool_scales=(1, 2), in_index=[0, 1, 2, 3], {levels})",
    car="dict(type='UPerHead', pool_scales=(1, 2), in_index=[0, 1, 2, 3], {levels})",
    gff="dict(type='GFFHead', neck=dict(num_convs=0), "
    "context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)), {levels})",
    hfgd="dict(type='HFGDHead', upsampler=dict(type='UPerHead', pool_scales=(1, 2)), "
    'encoder=None, {levels})',
)
CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['mmseg_fusion'], allow_failed_imports=False)
model = dict(
    type={type!r},
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[100.0] * {channels}, std=[50.0] * {channels},
        pad_val=0, seg_pad_val=255, size=(64, 64)),
    backbone=dict(
        type='ResNetV1c', depth=18, in_channels={channels}, base_channels=8, stem_channels=8,
        norm_cfg=dict(type='BN')),
    decode_head={head},
    train_cfg=dict(), test_cfg=dict(mode='whole'))
data = dict(type='FusionShapesDataset', size=(64, 64), length=4, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='MoreChannels', channels={channels}),
    dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'), dataset=data)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
"""


@TRANSFORMS.register_module()
class MoreChannels(BaseTransform):
    """Repeats the channels of an image."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def transform(self, results: dict) -> dict:
        results['img'] = np.resize(results['img'].transpose(2, 0, 1), (self.channels, 64, 64))
        results['img'] = np.ascontiguousarray(results['img'].transpose(1, 2, 0))
        return results


def write(folder: Path, name: str, channels: int = CHANNELS) -> Path:
    """A config of one of :data:`HEADS`, and its checkpoint beside it."""
    path = folder / f'{name}_{channels}.py'
    levels = (
        "in_channels=[8, 16, 32, 64], channels=8, num_classes=8, norm_cfg=dict(type='BN'), "
        "loss_decode=dict(type='CrossEntropyLoss')"
    )
    kind = 'CAREncoderDecoder' if name == 'car' else 'EncoderDecoder'
    head = HEADS[name].format(levels=levels)
    path.write_text(CONFIG.format(type=kind, channels=channels, head=head))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(path).model)
    torch.save(dict(state_dict=model.state_dict()), path.with_suffix('.pth'))
    return path


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp('four channels')
    found = {name: write(folder, name) for name in HEADS}
    found.update({f'{name}_checkpoint': found[name].with_suffix('.pth') for name in HEADS})
    return {name: str(path) for name, path in found.items()}


#: Every tool that makes an image: its arguments. ``{out}`` is a folder that is empty.
MAKERS = {
    'analysis_tools/benchmark.py': [
        '{plain} --shape 32 48 --device cpu --repeat 1 --warmup 0',
        '{plain} --shape 64 64 --device cpu --repeat 1 --warmup 0 --mode train',
    ],
    'analysis_tools/benchmark_eseg.py': [
        '--models {plain} --shape 32 48 --device cpu --repeat 1 --warmup 0 --no-memory'
    ],
    'analysis_tools/benchmark_gff.py': [
        '--config {gff} --shape 64 64 --device cpu --repeat 1 --warmup 0 --no-memory'
        ' --batch-size 2 --mode inference',
        '--config {gff} --shape 64 64 --device cpu --repeat 1 --warmup 0 --no-memory'
        ' --batch-size 2 --whole --variants gff',
    ],
    'analysis_tools/benchmark_hfgd.py': [
        '--config {hfgd} --shape 64 64 --device cpu --repeat 1 --warmup 0 --no-memory'
        ' --batch-size 2 --parts train'
    ],
    'analysis_tools/benchmark_scale_equalizer.py': [
        '{plain} --shape 64 64 --device cpu --repeat 1 --warmup 0 --batch-size 2'
    ],
    'analysis_tools/get_flops.py': ['{plain} --shape 64 64'],
    'analysis_tools/scale_report.py': [
        '{plain} --num-images 2 --batch-size 2 --device cpu --out-dir {out}'
    ],
    'deployment/export_onnx.py': [
        # Whose deepest level can be pooled to 2 x 2 by either exporter.
        '{plain} {plain_checkpoint} {out}/a.onnx --shape 64 128 --argmax',
    ],
    'model_converters/merge_car.py': ['{car} {car_checkpoint} {out}/a.pth'],
}


def run(tool: str, arguments: list[str]) -> object:
    """Runs a tool in this process, as ``python TOOL ARGUMENTS`` does; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [tool, *arguments])
        patch.setattr(sys, 'executable', forked_python())
        patch.syspath_prepend(str((TOOLS / tool).parent))
        patch.syspath_prepend(str(TOOLS / 'deployment'))
        patch.setattr(logging, 'raiseExceptions', False)
        try:
            runpy.run_path(str(TOOLS / tool), run_name='__main__')
        except SystemExit as stopped:
            return stopped.code
    return None


ROWS = [(tool, row) for tool, rows in MAKERS.items() for row in rows]


@pytest.mark.parametrize(('tool', 'row'), ROWS)
def test_four_channels(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tool: str,
    row: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: set[int] = set()
    plain = torch.nn.Conv2d.forward

    def forward(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.in_channels == CHANNELS:
            # A tracer's sizes are no numbers.
            seen.add(int(x.shape[1]))
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', forward)
    code = run(tool, [word.format(**files, out=tmp_path) for word in row.split()])
    assert code in (None, 0), code
    assert seen == {CHANNELS}
    if tool.endswith('get_flops.py'):
        assert f'input       {CHANNELS} x 64 x 64' in capsys.readouterr().out


def test_onnx_file_says_what_it_takes(files: dict[str, str], tmp_path: Path) -> None:
    onnx = pytest.importorskip('onnx', reason='the extra onnx is not installed')
    path = tmp_path / 'a.onnx'
    assert run(
        'deployment/export_onnx.py', [files['plain'], str(path), '--shape', '64', '128']
    ) in (
        None,
        0,
    )
    proto = onnx.load(str(path))
    sides = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sides[1:] == [CHANNELS, 64, 128]
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(entries['mean']) == [100.0] * CHANNELS
    # Neither RGB nor BGR.
    assert 'channels' not in entries


# --- all of them ---------------------------------------------------------------------------------

MAKING = ('empty', 'full', 'ones', 'rand', 'randint', 'randn', 'zeros')


def three_channels(tree: ast.AST) -> list[int]:
    """Lines where torch makes a tensor whose second dimension is written as 3."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in MAKING or ast.unparse(node.func.value) != 'torch':
            continue
        shapes = [node.args, *(a.elts for a in node.args if isinstance(a, (ast.Tuple, ast.List)))]
        if any(len(s) > 2 and isinstance(s[1], ast.Constant) and s[1].value == 3 for s in shapes):
            lines.append(node.lineno)
    return lines


def test_nobody_writes_three_channels() -> None:
    known = 'torch.zeros(1, 3, *s)\ntorch.rand((2, 3, 4, 4), device=d)\ntorch.rand(3, 4)\n'
    assert three_channels(ast.parse(known)) == [1, 2]
    files = [*(ROOT / 'tools').rglob('*.py'), *(ROOT / 'mmseg_fusion').glob('[!.]*/**/*.py')]
    assert len(files) > 100
    found = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if (lines := three_channels(ast.parse(path.read_text(encoding='utf-8'))))
    }
    assert found == {}


def test_every_maker_of_images_has_a_row() -> None:
    """Whoever asks for the channels, or calls what asks, is one of :data:`MAKERS`."""
    asking = ('image_channels', 'synthetic_batch', 'level_shapes', 'count', 'export_and_compare')
    found = set()
    for path in (ROOT / 'tools').rglob('*.py'):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if names & set(asking) and not path.name.startswith('_'):
            found.add(path.relative_to(ROOT / 'tools').as_posix())
    # These make none: one counts as get_flops.py does, the other looks at images that are there.
    assert found - MAKERS.keys() <= {'compare.py', 'analysis_tools/check_dataset.py'}, found


# --- what does not fit together ------------------------------------------------------------------

#: Tools that take a config with a model, and what they need beside it.
READERS = {
    **{tool: rows[0] for tool, rows in MAKERS.items()},
    'analysis_tools/attention_conflicts.py': '{plain} {plain_checkpoint} --device cpu',
    'analysis_tools/class_dependency.py': '{plain} {plain_checkpoint} --device cpu',
    'analysis_tools/feature_umap.py': '{plain} {plain_checkpoint} --device cpu --embedding pca',
    'analysis_tools/gate_maps.py': '{gff} {gff_checkpoint} --device cpu --out {out}/g.png',
    'analysis_tools/pixel_relation.py': '{plain} {plain_checkpoint} --device cpu',
    'analysis_tools/predictions.py': '{plain} {plain_checkpoint} --device cpu',
    'analysis_tools/rate_maps.py': '{plain} {plain_checkpoint} --device cpu',
    'pseudo_labels.py': '{plain} {plain_checkpoint} {images} {out}/labels --device cpu',
    'train.py': '{plain} --work-dir {out}/w',
    'test.py': '{plain} {plain_checkpoint} --work-dir {out}/w',
}


@pytest.fixture(scope='module')
def wrong(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same configs with a mean for RGB, and their checkpoints."""
    folder, found = tmp_path_factory.mktemp('mean of three'), dict(files)
    for name in HEADS:
        text = Path(files[name]).read_text().replace(f'.0] * {CHANNELS}', '.0] * 3')
        path = folder / f'{name}.py'
        # What test.py asks of a config.
        path.write_text(text + 'test_dataloader = train_dataloader\ntest_cfg = dict()\n')
        found[name] = str(path)
    (folder / 'images').mkdir()
    cv2.imwrite(str(folder / 'images' / 'a.png'), np.zeros((64, 64, 3), np.uint8))
    return dict(found, images=str(folder / 'images'))


@pytest.mark.parametrize('tool', READERS)
def test_mean_of_another_length(
    wrong: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tool: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(tool, [word.format(**wrong, out=tmp_path) for word in READERS[tool].split()])
    words = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (None, 0)
    assert 'data_preprocessor.mean has 3 values' in words
    assert 'model.backbone.in_channels is 4' in words
    assert 'Traceback' not in words
