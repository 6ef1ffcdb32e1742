"""What every tool does with what it cannot use: it stops, without a traceback, and says why.

One row per tool and bad input: the tool's file, its arguments and the words that its message must
have. A row with ``{name}`` takes a file of :func:`files`. Each tool runs in this process, as
``python TOOL ARGUMENTS`` runs it.
"""

from __future__ import annotations

import functools
import http.server
import json
import logging
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import mmengine.config.config
import numpy as np
import pytest
import torch
import yapf.yapflib.yapf_api
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

from .running import ROOT, TOOLS, read_bases_once, small_config

pytestmark = pytest.mark.filterwarnings('ignore')
SHAPES = ROOT / 'configs' / 'fusion_shapes'


@pytest.fixture(scope='module', autouse=True)
def _cheap_configs() -> Iterator[None]:
    """A runner writes its config as formatted text, half a second each, which nobody reads here."""
    with pytest.MonkeyPatch.context() as patch:
        read_bases_once(patch)
        for module in (yapf.yapflib.yapf_api, mmengine.config.config):
            patch.setattr(module, 'FormatCode', lambda text, **_: (text, True), raising=False)
        yield


def complaint(tool: str, arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a tool prints before it stops with an exit code other than 0.

    An exception that is no SystemExit is the traceback that a user would see, and fails the test.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [tool, *arguments])
        # What Python does for a script; run_path does it for folders alone.
        patch.syspath_prepend(str((TOOLS / tool).parent))
        # mmengine's loggers hold on to the standard error of an earlier test.
        patch.setattr(logging, 'raiseExceptions', False)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(TOOLS / tool), run_name='__main__')
    printed = capsys.readouterr()
    code = stopped.value.code
    assert code not in (None, 0), f'{tool} ended with 0: {printed.out[-500:]}'
    words = code if isinstance(code, str) else printed.err or printed.out
    assert 'Traceback' not in words
    return words


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def initial(config: Path) -> dict:
    """A checkpoint with initial weights of a config's model."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(config).model)
    return dict(state_dict=model.state_dict(), meta=dict(experiment_name=config.stem))


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs and checkpoints that fit each other, and those that nothing can use, by name.

    ``plain``, ``gff``, ``ksac``, ``danet``, ``car`` are small configs, ``plain_checkpoint`` and so
    on their checkpoints. Bad ones are named for what is wrong with them.
    """
    folder = tmp_path_factory.mktemp('bad inputs')
    found = dict(plain=small_config(folder))

    def config(name: str, text: str, base: str = 'small.py') -> None:
        found[name] = folder / f'{name}.py'
        found[name].write_text(f'_base_ = {base!r}\n{text}')

    config(
        'gff',
        'model = dict(auxiliary_head=None, decode_head=dict(\n'
        "    _delete_=True, type='GFFHead', in_channels=[8, 16, 32], channels=8,\n"
        '    neck=dict(num_convs=0), num_classes=8,\n'
        "    context=dict(type='PSPHead', channels=8, pool_scales=(1, 2)),\n"
        "    norm_cfg=dict(type='BN')))\n",
    )
    config(
        'ksac',
        'model = dict(auxiliary_head=None, decode_head=dict(\n'
        "    _delete_=True, type='KSACHead', dilations=(2, 3), in_channels=64, in_index=3,\n"
        "    channels=16, num_classes=8, norm_cfg=dict(type='BN')))\n",
    )
    config(
        'hfgd',
        'model = dict(auxiliary_head=None, decode_head=dict(\n'
        "    _delete_=True, type='HFGDHead', in_channels=[8, 16, 32, 64], channels=8,\n"
        "    upsampler=dict(type='UPerHead', pool_scales=(1, 2)), encoder=None, num_classes=8,\n"
        "    norm_cfg=dict(type='BN')))\n",
    )
    small = (
        'model = dict(backbone=dict(base_channels=8, stem_channels=8),\n'
        '    decode_head=dict(channels=16, in_channels={}), auxiliary_head={})\n'
    )
    auxiliary = 'dict(channels=8, in_channels=32)'
    for name, stem, text in (
        ('danet', 'danet_r18-d8', small.format('64, pam_channels=4', None)),
        ('car', 'upernet_r18_car', small.format('[8, 16, 32, 64]', auxiliary)),
    ):
        config(name, text, str(SHAPES / f'{stem}_1xb4-1k_fusion-shapes-128x128.py'))
    for name in list(found):
        found[f'{name}_checkpoint'] = folder / f'{name}.pth'
        torch.save(initial(found[name]), found[f'{name}_checkpoint'])

    def bad(name: str, content: bytes | object, suffix: str = '.pth') -> None:
        found[name] = folder / f'{name}{suffix}'
        if isinstance(content, bytes):
            found[name].write_bytes(content)
        else:
            torch.save(content, found[name])

    whole = found['plain_checkpoint'].read_bytes()
    bad('text', b'These are not weights.\n' * 9)
    bad('empty', b'')
    bad('truncated', whole[: len(whole) // 2])
    bad('no_state', dict(meta=dict(iter=3), optimizer={}))
    bad('nothing_in_common', dict(state_dict=dict(a=torch.zeros(3))))
    bad('a_list', [torch.zeros(3)])
    found['ran'] = folder / 'ran'
    bad('code', dict(state_dict=Payload(found['ran'])))
    for name in ('plain', 'gff', 'ksac', 'danet', 'car'):
        checkpoint = torch.load(found[f'{name}_checkpoint'], weights_only=True)
        checkpoint['state_dict']['backbone.layer1.0.conv1.weight'][0, 0] = float('nan')
        bad(f'{name}_nan', checkpoint)
    other = {
        key.replace('decode_head.', 'decoder.'): value
        for key, value in torch.load(found['plain_checkpoint'])['state_dict'].items()
    }
    bad('other', dict(state_dict=other))
    found['folder'] = folder / 'folder'
    found['folder'].mkdir()
    shutil.copy(found['plain_checkpoint'], found['folder'] / 'iter_9.pth')
    found['missing'] = folder / 'missing.pth'
    bad('syntax', b'model = dict(\n', '.py')
    found['no_config'] = folder / 'no_config.py'
    bad('no_model', b"default_scope = 'mmseg'\n", '.py')
    found['out'] = folder / 'out'
    found['images'] = folder / 'images'
    found['images'].mkdir()
    cv2.imwrite(str(found['images'] / 'a.png'), np.zeros((64, 64, 3), np.uint8))
    return found


def filled(arguments: str, files: dict[str, Path], **more: object) -> list[str]:
    """The words of a row, with names of :func:`files` in braces replaced by paths."""
    return [word.format(**files, **more) for word in arguments.split()]


# --- checkpoints -----------------------------------------------------------------------------

#: Every tool that takes a checkpoint: its file, the config that fits and the arguments.
WITH_CHECKPOINT = {
    'analysis_tools/attention_conflicts.py': ('danet', '{config} {checkpoint} --device cpu'),
    'analysis_tools/benchmark.py': ('plain', '{config} --checkpoint {checkpoint} --only-memory'),
    'analysis_tools/class_dependency.py': ('plain', '{config} {checkpoint} --device cpu'),
    'analysis_tools/feature_umap.py': (
        'plain',
        '{config} {checkpoint} --device cpu --embedding pca',
    ),
    'analysis_tools/gate_maps.py': ('gff', '{config} {checkpoint} --device cpu --out {out}/g.png'),
    'analysis_tools/pixel_relation.py': ('plain', '{config} {checkpoint} --device cpu'),
    'analysis_tools/predictions.py': ('plain', '{config} {checkpoint} --device cpu'),
    'analysis_tools/rate_maps.py': ('ksac', '{config} {checkpoint} --device cpu'),
    'analysis_tools/scale_report.py': ('plain', '{config} --checkpoint {checkpoint}'),
    'deployment/export_onnx.py': (
        'plain',
        '{config} {checkpoint} {out}.onnx --shape 64 64',
    ),
    'pseudo_labels.py': ('plain', '{config} {checkpoint} {images} {out} --device cpu'),
    'model_converters/gff_wrn38.py': ('plain', '{checkpoint} {out}.pth'),
    'model_converters/merge_car.py': ('car', '{config} {checkpoint} {out}.pth'),
    'model_converters/wider_resnet.py': ('plain', '{checkpoint} {out}.pth'),
}

#: These know one model, and find it by name.
ONE_MODEL = ('model_converters/gff_wrn38.py', 'model_converters/wider_resnet.py')
LAUNCHED = {
    'train.py': ('plain', '{config} --work-dir {out} --cfg-options load_from={checkpoint}'),
    'test.py': ('plain', '{config} {checkpoint} --work-dir {out}'),
}
WITH_CHECKPOINT.update(LAUNCHED)

#: What a checkpoint may be, and the words of the message beside its name.
BAD_CHECKPOINTS = {
    'text': 'it is a text file',
    'empty': 'the file is empty',
    'truncated': 'it is truncated',
    'folder': 'iter_9.pth',
    'missing': 'is not a file',
    'no_state': 'holds no weights by name',
    'a_list': 'got list',
    'code': 'holds more than tensors and plain values',
    'other': 'decode_head',
    'nan': 'NaN or infinite',
}


@pytest.mark.parametrize(
    ('tool', 'kind'),
    # A training may begin from the weights that another model has in common with it.
    [(t, k) for t in WITH_CHECKPOINT for k in BAD_CHECKPOINTS if (t, k) != ('train.py', 'other')],
)
def test_checkpoints(files, capsys, monkeypatch, tmp_path, tool, kind):
    monkeypatch.chdir(tmp_path)
    config, arguments = WITH_CHECKPOINT[tool]
    if tool in ONE_MODEL and kind in ('other', 'nan'):
        words = 'is not a checkpoint'
    elif tool == 'model_converters/merge_car.py' and kind == 'other':
        words = 'does not fit the config'
    else:
        words = BAD_CHECKPOINTS[kind]
    checkpoint = files[f'{config}_nan' if kind == 'nan' else kind]
    found = complaint(
        tool, filled(arguments, files, config=files[config], checkpoint=checkpoint), capsys
    )
    assert checkpoint.name in found
    assert words in found
    if words == 'decode_head':
        # What is missing, and what the checkpoint has that is named like it.
        assert 'it lacks weights' in found
        assert 'it has instead decoder.' in found
    assert not files['ran'].exists()
    assert list(tmp_path.rglob('*.png')) == []


@pytest.fixture(scope='module')
def url(files) -> Iterator[str]:
    """The address of ``code``, on a server on this machine."""
    folder = files['code'].parent
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/code.pth'
        server.shutdown()


#: Every way of a URL into a tool: the checkpoint of those that take one, and the keys of a config.
BY_URL = {
    **{tool: row for tool, row in WITH_CHECKPOINT.items() if tool not in ONE_MODEL},
    'train.py --resume': ('plain', '{config} --work-dir {out} --resume={checkpoint}'),
    **{
        f'{tool} {name}': ('plain', f'{arguments} --cfg-options {option}')
        for tool, arguments in (
            ('train.py', '{config} --work-dir {out}'),
            ('analysis_tools/class_dependency.py', '{config} none --device cpu'),
            ('analysis_tools/scale_report.py', '{config}'),
        )
        for name, option in (
            ('pretrained', 'model.pretrained={checkpoint} model.backbone.init_cfg=None'),
            (
                'init_cfg',
                'model.backbone.init_cfg.type=Pretrained '
                'model.backbone.init_cfg.checkpoint={checkpoint}',
            ),
        )
    },
}


@pytest.mark.parametrize('way', BY_URL)
def test_a_url_runs_no_code(files, url, capsys, monkeypatch, tmp_path, way):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    config, arguments = BY_URL[way]
    words = filled(arguments, files, config=files[config], checkpoint=url)
    found = complaint(way.partition(' ')[0], words, capsys)
    assert f'checkpoint {url!r} was not loaded: it holds more than tensors' in found
    assert not files['ran'].exists()


@pytest.mark.parametrize('tool', ONE_MODEL)
def test_a_url_that_a_tool_does_not_take(files, url, capsys, tool):
    arguments = filled(WITH_CHECKPOINT[tool][1], files, checkpoint=url)
    assert 'download it first' in complaint(tool, arguments, capsys)


# --- configs ---------------------------------------------------------------------------------

#: Every tool that takes a config, with ``{config}`` in its place.
WITH_CONFIG = {
    **{
        tool: arguments.replace('{checkpoint}', '{plain_checkpoint}')
        for tool, (_, arguments) in WITH_CHECKPOINT.items()
        if tool not in ONE_MODEL
    },
    'demo.py': '--config {config} --work-dir {out}',
    'analysis_tools/check_dataset.py': '{config}',
    'analysis_tools/get_flops.py': '{config} --shape 64 64',
    'analysis_tools/benchmark_eseg.py': '--models {config} --shape 64 64',
    'analysis_tools/benchmark_gff.py': '--config {config} --shape 64 64',
    'analysis_tools/benchmark_scale_equalizer.py': '{config}',
}
BAD_CONFIGS = {'no_config': 'is not a file', 'no_model': 'has no model', 'syntax': 'be read'}
#: What a few say otherwise.
OTHERWISE = {
    ('analysis_tools/check_dataset.py', 'no_model'): 'has no data to check',
    ('analysis_tools/get_flops.py', 'no_config'): 'no such file',
    ('analysis_tools/get_flops.py', 'no_model'): 'expected a config with model=',
}


@pytest.mark.parametrize('kind', BAD_CONFIGS)
@pytest.mark.parametrize('tool', WITH_CONFIG)
def test_configs(files, capsys, monkeypatch, tmp_path, tool, kind):
    monkeypatch.chdir(tmp_path)
    config = files[kind]
    found = complaint(tool, filled(WITH_CONFIG[tool], files, config=config), capsys)
    assert config.name in found
    assert OTHERWISE.get((tool, kind), BAD_CONFIGS[kind]) in found


# --- images ----------------------------------------------------------------------------------

#: Every tool that takes images as files or folders: the config that fits and the arguments.
WITH_IMAGES = {
    'analysis_tools/attention_conflicts.py': (
        'danet', '{config} {checkpoint} --device cpu --images {image}'
    ),
    'analysis_tools/class_dependency.py': (
        'plain', '{config} {checkpoint} --device cpu --classes-from predictions --images {image}'
    ),
    'analysis_tools/feature_umap.py': (
        'plain',
        '{config} {checkpoint} --device cpu --embedding pca --images {image} --ann-dir {labels}',
    ),
    'analysis_tools/gate_maps.py': ('gff', '{config} {checkpoint} {image} --device cpu'),
    'analysis_tools/pixel_relation.py': (
        'plain', '{config} {checkpoint} --device cpu --images {image}'
    ),
    'analysis_tools/rate_maps.py': ('ksac', '{config} {checkpoint} --device cpu --images {image}'),
    'pseudo_labels.py': ('plain', '{config} {checkpoint} {images} {out} --device cpu'),
    'start.py': ('plain', '{images} {labels} --out {out}'),
    'dataset_converters/camvid.py': ('plain', '{camvid} -o {out}'),
    'dataset_converters/coco_voc.py': ('plain', '{coco} {images} {out} --min-pixels 1'),
}  # fmt: skip
#: Every tool that takes the images, and labels, of the config's data set.
WITH_DATA_SET = {
    **{
        f'analysis_tools/{tool}.py': (config, '{config} {checkpoint} --device cpu')
        for tool, config in (
            ('attention_conflicts', 'danet'),
            ('class_dependency', 'plain'),
            ('gate_maps', 'gff'),
            ('pixel_relation', 'plain'),
            ('predictions', 'plain'),
            ('rate_maps', 'ksac'),
        )
    },
    'analysis_tools/feature_umap.py': (
        'plain', '{config} {checkpoint} --device cpu --embedding pca'
    ),
    'analysis_tools/scale_report.py': ('plain', '{config} --num-images 2'),
    'analysis_tools/check_dataset.py': ('plain', '{config}'),
    'demo.py': ('plain', '--config {config} --work-dir {out} --iters 3'),
    **LAUNCHED,
}  # fmt: skip
#: What a file may be that is to be an image, and words of the message beside its path.
BAD_IMAGES = {
    'text': ('it is a text file',),
    'truncated': ('it is truncated',),
    'empty': ('the file is empty',),
    'missing': ('no such file', 'is neither', 'no images in', 'no image '),
    'folder': ('it is a folder', 'holds no image', 'no images in', 'no image '),
}
#: One of these says what to do; the list of check_dataset.py is what it is asked for.
REMEDIES = ('Replace the file', 'expected', 'looked for', 'neither', 'mend ')


def make_bad(path: Path, kind: str) -> None:
    """Makes a file that is no image out of one that is."""
    whole = path.read_bytes()
    path.unlink()
    if kind == 'folder':
        path.mkdir()
    elif kind != 'missing':
        content = dict(text=b'No image.\n' * 9, truncated=whole[: len(whole) // 2], empty=b'')
        path.write_bytes(content[kind])


def data_of(folder: Path) -> dict[str, Path]:
    """Images with labels in all forms that the tools take."""
    found = dict(images=folder / 'images', labels=folder / 'labels', camvid=folder / 'CamVid')
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    found['image'], found['label'] = found['images'] / 'a.png', found['labels'] / 'a.png'
    pairs = [(found['image'], found['label'])]
    for split in ('train', 'val', 'test'):
        pairs.append(tuple(found['camvid'] / f'{split}{kind}' / 'a.png' for kind in ('', 'annot')))
    for image, label in pairs:
        for path, content in ((image, pixels), (label, pixels[..., 0] % 8)):
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), content)
    (folder / 'list.txt').write_text('a\na\n')
    found['coco'] = folder / 'instances.json'
    polygon = [[0, 0, 60, 0, 60, 60, 0, 60]]
    instances = dict(
        images=[dict(id=1, file_name='a.png', height=64, width=64)],
        categories=[dict(id=1, name='person')],
        annotations=[dict(image_id=1, category_id=1, segmentation=polygon)],
    )
    found['coco'].write_text(json.dumps(instances))
    return found


def with_data_set(config: Path, folder: Path, workers: int = 0) -> Path:
    """A config whose data sets are that of :func:`data_of`."""
    path = folder / 'with_data_set.py'
    classes, palette = [str(i) for i in range(8)], [[i, i, i] for i in range(8)]
    path.write_text(
        f'_base_ = {str(config)!r}\n'
        "data_set = dict(_delete_=True, type='BaseSegDataset', ann_file='list.txt',\n"
        f"    data_root={str(folder)!r}, img_suffix='.png', seg_map_suffix='.png',\n"
        "    data_prefix=dict(img_path='images', seg_map_path='labels'),\n"
        f'    metainfo=dict(classes={classes}, palette={palette}),\n'
        "    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),\n"
        "        dict(type='PackSegInputs')])\n"
        f'train_dataloader = dict(num_workers={workers}, dataset=data_set)\n'
        f'val_dataloader = dict(num_workers={workers}, dataset=data_set)\n'
        f'test_dataloader = dict(num_workers={workers}, dataset=data_set)\n'
    )
    return path


def check_complaint(found: str, path: Path, kind: str, tool: str) -> None:
    """The message names the file, what is wrong with it and what to do, and nothing else."""
    named = path if kind != 'folder' or str(path) in found else path.parent
    assert str(named) in found
    assert any(words in found for words in BAD_IMAGES[kind]), found
    assert any(words in found for words in REMEDIES) or 'check_dataset' in tool, found


@pytest.mark.parametrize('kind', BAD_IMAGES)
@pytest.mark.parametrize('tool', WITH_IMAGES)
def test_images(files, capsys, monkeypatch, tmp_path, tool, kind):
    monkeypatch.chdir(tmp_path)
    config, arguments = WITH_IMAGES[tool]
    data = data_of(tmp_path)
    bad = data['camvid'] / 'train' / 'a.png' if 'camvid' in tool else data['image']
    make_bad(bad, kind)
    words = filled(
        arguments, {**files, **data, 'out': tmp_path / 'out'}, config=files[config],
        checkpoint=files[f'{config}_checkpoint'],
    )  # fmt: skip
    found = complaint(tool, words, capsys)
    if tool in ('pseudo_labels.py', 'start.py') and kind in ('missing', 'folder'):
        bad = bad.parent
    check_complaint(found, bad, kind, tool)


@pytest.mark.parametrize(
    ('what', 'kind'), [*(('image', kind) for kind in BAD_IMAGES), ('label', 'text')]
)
@pytest.mark.parametrize('tool', WITH_DATA_SET)
def test_images_of_a_data_set(files, capsys, monkeypatch, tmp_path, tool, what, kind):
    monkeypatch.chdir(tmp_path)
    config, arguments = WITH_DATA_SET[tool]
    data = data_of(tmp_path)
    make_bad(data[what], kind)
    config_file = with_data_set(files[config], tmp_path)
    words = filled(
        arguments, {**files, 'out': tmp_path / 'out'}, config=config_file,
        checkpoint=files[f'{config}_checkpoint'],
    )  # fmt: skip
    check_complaint(complaint(tool, words, capsys), data[what], kind, tool)


@pytest.mark.parametrize(
    ('tool', 'options'),
    [('train.py', ''), ('test.py', ''), ('analysis_tools/class_dependency.py', '--num-workers 1')],
)
def test_images_read_in_another_process(files, capsys, monkeypatch, tmp_path, tool, options):
    """The traceback of a data loader's process is not printed: complaint() looks for it."""
    monkeypatch.chdir(tmp_path)
    config, arguments = WITH_DATA_SET[tool]
    data = data_of(tmp_path)
    make_bad(data['image'], 'truncated')
    words = filled(
        f'{arguments} {options}', {**files, 'out': tmp_path / 'out'},
        config=with_data_set(files[config], tmp_path, workers=1),
        checkpoint=files[f'{config}_checkpoint'],
    )  # fmt: skip
    check_complaint(complaint(tool, words, capsys), data['image'], 'truncated', tool)


# --- numbers and folders ---------------------------------------------------------------------

#: A tool, its arguments and words of the message.
ROWS = [
    ('train.py', '{plain} --cfg-options train_cfg.max_iters=0', 'train_cfg.max_iters must be'),
    ('train.py', '{plain} --cfg-options train_cfg.max_iters=-3', 'got -3'),
    (
        'train.py',
        '{plain} --work-dir {out} --cfg-options model.decode_head.num_classes=7 '
        'model.auxiliary_head.num_classes=7',
        'the training set has label 7: model.decode_head.num_classes is 7',
    ),
    *(
        (
            'train.py',
            f'{{{name}}} --work-dir {{out}} --cfg-options train_dataloader.batch_size=1',
            'a batch norm layer of the model saw a single value per channel',
        )
        for name in ('plain', 'gff', 'hfgd')
    ),
    ('train.py', '{plain} --cfg-options param_scheduler.9=1', '--cfg-options does not fit'),
    (
        'train.py',
        '{plain} --work-dir {out} --cfg-options load_from={nothing_in_common}',
        'nothing_in_common.pth has none of the weights of the model',
    ),
    ('compare.py', '{no_config} {plain}', 'no_config.py'),
    ('compare.py', '{plain} {gff} --jobs 0', '--jobs'),
    ('compare.py', '{plain} {gff} --iters 0', '--iters'),
    ('compare.py', '{plain} {gff} --latency {text}', '--latency goes with --plot'),
    ('compare.py', '{plain} {gff} --latency {missing} --plot {out}/a.png', 'is not a file'),
    ('start.py', '{missing} {images} --out {out}', 'missing.pth'),
    ('start.py', '{images} {images} --out {out}', 'are the same folder'),
    ('start.py', '{images} {folder} --out {out}', 'no mask in'),
    ('start.py', '{images} {folder} --out {folder}', "folder' is not empty (iter_9.pth)"),
    ('start.py', '{images} {folder} --out {out} --val 2', '--val is a share between 0 and 1'),
    ('start.py', '{images} {folder} --out {out} --colors {missing}', 'missing.pth cannot be read'),
    ('demo.py', '--iters 0', '--iters is at least 1, but got 0'),
    ('demo.py', '--scenes -1', '--scenes is at least 1, but got -1'),
    (
        'analysis_tools/attention_conflicts.py',
        '{danet} {danet_checkpoint} --num-images -1',
        '--num-images must be at least 1, got -1',
    ),
    ('analysis_tools/benchmark.py', '{plain} --batch-size -1', 'at least 1, got -1'),
    ('analysis_tools/benchmark.py', '{plain} --repeat 0', 'at least 1, got 0'),
    ('analysis_tools/benchmark_attention.py', '--groups 0', '--groups'),
    ('analysis_tools/benchmark_car.py', '--classes 0', '--classes'),
    ('analysis_tools/benchmark_eseg.py', '--batch-size -1', 'at least 1, got -1'),
    ('analysis_tools/benchmark_gff.py', '--batch-size -1', 'at least 1, got -1'),
    ('analysis_tools/benchmark_hfgd.py', '--batch-size -1', 'at least 1, got -1'),
    ('analysis_tools/benchmark_ksac.py', '--batch-size -1', 'at least 1, got -1'),
    ('analysis_tools/benchmark_ksac.py', '--channels 0', '--channels'),
    (
        'analysis_tools/benchmark_scale_equalizer.py',
        '{plain} --batch-size -1',
        'at least 1, got -1',
    ),
    ('analysis_tools/check_dataset.py', '{plain} --nproc 0', '--nproc'),
    ('analysis_tools/check_dataset.py', '{plain} --nproc -1', '--nproc'),
    ('analysis_tools/class_dependency.py', '{plain} none --num-samples 0', '--num-samples'),
    ('analysis_tools/class_dependency.py', '{plain} none --num-workers -1', '--num-workers'),
    ('analysis_tools/feature_umap.py', '{plain} none --num-workers -1', '--num-workers'),
    ('analysis_tools/gate_maps.py', '{gff} none --num-samples 0', '--num-samples'),
    ('analysis_tools/get_flops.py', '{plain} --shape 0 64', '--shape'),
    ('analysis_tools/get_flops.py', '{plain} --shape -1', '--shape'),
    ('analysis_tools/pixel_relation.py', '{plain} none --max-points 0', '--max-points'),
    ('analysis_tools/rate_maps.py', '{ksac} none --count 0', '--count'),
    ('analysis_tools/scale_report.py', '{plain} --batch-size -1', 'at least 1, got -1'),
    ('analysis_tools/scale_report.py', '{plain} --num-images 1', 'at least 2, got 1'),
    ('analysis_tools/upsampling_variance.py', '--num-sigmas 0', '--num-sigmas'),
    ('analysis_tools/upsampling_variance.py', '--shape 0 8', '--shape'),
    ('dataset_converters/camvid.py', '{missing} -o {out}', 'missing.pth'),
    ('dataset_converters/camvid.py', '{images} -o {out} --nproc 0', '--nproc'),
    ('dataset_converters/coco_voc.py', '{missing} {images} {out}', 'missing.pth'),
    ('dataset_converters/coco_voc.py', '{text} {images} {out}', 'text.pth'),
    ('dataset_converters/coco_voc.py', '{text} {images} {out} --nproc 0', '--nproc'),
    ('deployment/export_onnx.py', '{plain} {out}.onnx --shape 0 64', '--shape'),
    ('pseudo_labels.py', '{plain} {plain_checkpoint} {missing} {out}', 'missing.pth'),
    ('pseudo_labels.py', '{plain} {plain_checkpoint} {images} {out} --threshold 2', '--threshold'),
]


@pytest.mark.parametrize(('tool', 'arguments', 'words'), ROWS)
def test_numbers_and_folders(files, capsys, monkeypatch, tmp_path, tool, arguments, words):
    monkeypatch.chdir(tmp_path)
    # A folder of its own: what another row has trained there is not in the way.
    files = {**files, 'out': tmp_path / 'out'}
    assert words in complaint(tool, filled(arguments, files), capsys)


def test_every_tool_stands_in_a_table():
    tools = {str(p.relative_to(TOOLS)) for p in TOOLS.rglob('*.py') if not p.name.startswith('_')}
    tables = {*WITH_CHECKPOINT, *WITH_CONFIG, *(tool for tool, _, _ in ROWS)}
    assert tables == tools
    assert {*WITH_IMAGES, *WITH_DATA_SET} <= tools
    for tool in tools:
        source = (TOOLS / tool).read_text()
        if "'checkpoint'" in source or "'--checkpoint'" in source or '.add_model' in source:
            assert tool in WITH_CHECKPOINT, tool
        if re.search(r"add_argument\(\s*'(--)?images'|add_images\((?!.*files=False)", source):
            assert tool in WITH_IMAGES, tool
        if re.search(r'image_sets\(|model_and_batches|Runner\.from_cfg|run_installed_tool', source):
            assert tool in WITH_DATA_SET, tool
