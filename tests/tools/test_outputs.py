"""No tool writes over what it reads, nor over a file that it did not write: every tool there is."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmseg_fusion.analysis import comparison
from mmseg_fusion.cli import CONFIGS, check_work_dir
from mmseg_fusion.files import MADE

from .running import ROOT, TOOLS, run_again
from .test_class_dependency import config_and_checkpoint
from .test_gate_maps import with_gates
from .test_rate_maps import with_head

pytestmark = pytest.mark.filterwarnings('ignore')
ALL = {path.stem: path for path in sorted(TOOLS.rglob('*.py')) if not path.stem.startswith('_')}
#: Tools that write no file that they name themselves.
NOTHING = {
    'check_dataset': 'prints what it found',
    'train': "MMSegmentation's own: see test_work_dir_over_the_config",
}
#: Into a folder that is new, or empty, alone; in one step: see test_a_new_folder_alone.
NEW_FOLDER = {'start'}
#: What a file is changed in its place with, which is what is asked for.
IN_PLACE = {'get_flops': '--update METAFILE'}
#: What each writes, and a command line for it: (arguments, files, inputs).
Case = tuple[list, list[Path], list[Path]]


class Given:
    """Files of a user; configs and checkpoints are copies of those in ``models``, made once."""

    models: Path

    def __init__(self, root: Path) -> None:
        shutil.copytree(self.models, root, dirs_exist_ok=True)
        self.out = root / 'out'
        self.out.mkdir()
        self.config, self.checkpoint = root / 'small.py', root / 'small.pth'
        self.gates, self.aspp = root / 'gff.py', root / 'aspp.py'
        self.images = root / 'images'
        self.images.mkdir()
        self.image = self.images / 'a.png'
        pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(self.image)
        self.record = root / 'record.json'
        self.record.write_text(comparison.text(comparison.empty('Comparison', [])))
        self.camvid = root / 'CamVid'
        for split in ('train', 'val', 'test'):
            for folder, content in ((split, pixels), (f'{split}annot', pixels[..., 0] % 11)):
                (self.camvid / folder).mkdir(parents=True)
                Image.fromarray(content).save(self.camvid / folder / 'a.png')
        self.coco = root / 'instances.json'
        entry = dict(image_id=1, category_id=1, segmentation=[[0, 0, 60, 0, 60, 60, 0, 60]])
        self.coco.write_text(
            json.dumps(
                dict(
                    images=[dict(id=1, file_name='a.png', height=64, width=64)],
                    categories=[dict(id=1, name='person')],
                    annotations=[entry],
                )
            )
        )


@pytest.fixture(scope='module', autouse=True)
def _models(tmp_path_factory: pytest.TempPathFactory) -> None:
    Given.models = tmp_path_factory.mktemp('models')
    config_and_checkpoint(Given.models)
    with_gates(Given.models, width=8)
    with_head(Given.models, 'aspp', 'ASPPHead', dilations=(1, 2))


def one_json(*arguments: str) -> Callable[[Given], Case]:
    def case(given: Given) -> Case:
        out = given.out / 'numbers.json'
        return [*arguments, '--json', out, '--device', 'cpu'], [out], []

    return case


def with_config(
    option: str = 'config', model: str = '', of: str = 'config'
) -> Callable[[Given], Case]:
    def case(given: Given) -> Case:
        config, out = getattr(given, of), given.out / 'numbers.json'
        if model:
            config = given.out.parent / f'{model}.py'
            shutil.copyfile(CONFIGS.resolve() / '_base_' / 'models' / config.name, config)
        named = [config] if option == 'config' else [option, config]
        return [*named, '--json', out, '--device', 'cpu', '--shape', 64, 64], [out], [config]

    return case


def in_folder(*names: str, config: str = 'config') -> Callable[[Given], Case]:
    def case(given: Given) -> Case:
        model = [getattr(given, config), 'none']
        options = ['--images', given.image, '--out-dir', given.out, '--device', 'cpu']
        return [*model, *options], [given.out / n for n in names], [model[0], given.image]

    return case


def camvid(given: Given) -> Case:
    files = [
        given.out / kind / split / f'a.{suffix}'
        for kind, suffix in (('ann_dir', 'png'), ('img_dir', 'jpg'))
        for split in ('train', 'val', 'test')
    ]
    return [given.camvid, '--out-dir', given.out], files, [given.camvid / 'train' / 'a.png']


def pseudo_labels(given: Given) -> Case:
    names = ('a.png', 'images.png.txt', 'pseudo_labels.json')
    arguments = [given.config, given.checkpoint, given.images, given.out, '--device', 'cpu']
    inputs = [given.config, given.checkpoint, given.image]
    return arguments, [given.out / name for name in names], inputs


def converter(given: Given) -> Case:
    out = given.out / 'out.pth'
    return [given.checkpoint, out], [out], [given.checkpoint]


WRITES: dict[str, Callable[[Given], Case]] = {
    'attention_conflicts': lambda g: (
        [g.config, g.checkpoint, '--images', g.image, '--out-dir', g.out],
        [g.out / 'attention_conflicts.csv', g.out / 'attention_conflicts.png'],
        [g.config, g.checkpoint, g.image],
    ),
    'benchmark': with_config(),
    'benchmark_attention': one_json('--shapes', '1x8x4x4'),
    'benchmark_car': one_json('--shapes', '1x8x4x4'),
    'benchmark_eseg': with_config('--models'),
    'benchmark_gff': with_config('--config', of='gates'),
    'benchmark_hfgd': with_config('--config', 'hfgd_r50'),
    'benchmark_ksac': one_json(),
    'benchmark_scale_equalizer': with_config(),
    'camvid': camvid,
    'class_dependency': lambda g: (
        [g.config, 'none', '--of', 'weights', '--matrix', g.out / 'm.npz', '--out-dir', g.out],
        [g.out / 'class_dependency.png', g.out / 'm.npz'],
        [g.config],
    ),
    'coco_voc': lambda g: (
        [g.coco, g.images, g.out],
        [g.out / 'a.png', g.out / 'images.txt', g.out / 'coco_voc.json'],
        [g.coco],
    ),
    'compare': lambda g: (
        ['--from', g.record, '--plot', g.out / 'a.png'], [g.out / 'a.png'], [g.record]
    ),
    'demo': lambda g: (
        ['--config', g.config, '--work-dir', g.out, '--iters', 3],
        [g.out / name for name in ('scenes.png', 'curves.png', 'iter_3.pth', 'small.py')],
        [g.config],
    ),
    'export_onnx': lambda g: (
        [g.config, g.checkpoint, g.out / 'a.onnx', '--shape', 64, 64],
        [g.out / 'a.onnx'],
        [g.config, g.checkpoint],
    ),
    'feature_umap': lambda g: (
        [g.config, 'none', '--images', g.image, '--ann-dir', g.images, '--embedding', 'pca',
         '--out', g.out / 'a.png', '--json', g.out / 'a.json'],
        [g.out / 'a.png', g.out / 'a.json'],
        [g.config, g.image],
    ),
    'gate_maps': lambda g: (
        [g.gates, 'none', g.image, '--out', g.out / 'a.png', '--device', 'cpu'],
        [g.out / 'a.png'],
        [g.gates, g.config, g.image],
    ),
    'gff_wrn38': converter,
    'merge_car': lambda g: (
        [g.config, g.checkpoint, g.out / 'a.pth'], [g.out / 'a.pth'], [g.config, g.checkpoint]
    ),
    'pixel_relation': in_folder('a.png', 'pixel_relation.json'),
    'predictions': lambda g: (
        [g.config, 'none', '--out', g.out / 'a.png', '--num-samples', 1, '--device', 'cpu'],
        [g.out / 'a.png'],
        [g.config],
    ),
    'pseudo_labels': pseudo_labels,
    'rate_maps': in_folder('0000_a.png', 'rate_maps.json', config='aspp'),
    'scale_report': lambda g: (
        [g.config, '--checkpoint', g.checkpoint, '--out-dir', g.out],
        [g.out / 'scale_report.csv', g.out / 'scale_report.png'],
        [g.config, g.checkpoint],
    ),
    'test': lambda g: (
        [g.config, g.checkpoint, '--out', g.out, '--work-dir', g.out.parent / 'work'],
        [g.out / '000000.png'],
        [g.image],
    ),
    'upsampling_variance': lambda g: (
        ['--out-dir', g.out], [g.out / 'figure3.csv', g.out / 'figure3.png'], []
    ),
    'wider_resnet': converter,
}  # fmt: skip
#: They tell their own files by a mark inside, and take no word for another's.
MARKED = {'coco_voc', 'pseudo_labels/a.png', 'test'}
FILES = {
    'attention_conflicts': 2, 'camvid': 6, 'class_dependency': 2, 'coco_voc': 3, 'demo': 4,
    'feature_umap': 2, 'pixel_relation': 2, 'pseudo_labels': 3, 'rate_maps': 2, 'scale_report': 2,
    'upsampling_variance': 2,
}  # fmt: skip
ATTACKS = [(name, number) for name in WRITES for number in range(FILES.get(name, 1))]


def test_every_tool_is_here() -> None:
    assert ALL.keys() == WRITES.keys() | NOTHING.keys() | IN_PLACE.keys() | NEW_FOLDER


def test_no_tool_writes_past_the_helper() -> None:
    """Of what writes a file there is nothing in tools/ but the helper's own ways."""
    writers = {
        'write_text', 'write_bytes', 'imwrite', 'save_checkpoint', 'savez', 'savetxt', 'copyfile',
        'copy2', 'move', 'rename', 'dump', 'whole_file', 'unlink', 'rmtree', 'makedirs',
    }  # fmt: skip
    allowed = {
        'get_flops': {'whole_file'},  # in place, as asked for
        '_harness': {'write_text'},  # a counter of the process, no file
        'export_onnx': {'unlink'},  # what a failed export left
        # A record that is added to, pages that say themselves that they are made, and the folders
        # of its own runs.
        'compare': {'whole_file', 'rename', 'open'},
        'start': {'write_text', 'rmtree'},  # inside its new folder
    }
    found = []
    for path in sorted(TOOLS.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            modes += [k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)]
            opens = name == 'open' and any(
                isinstance(m, str) and set(m) & set('wax+') for m in modes
            )
            if (name in writers and name not in allowed.get(path.stem, ())) or (
                opens
                and 'os.devnull' not in ast.unparse(node)
                and 'open' not in allowed.get(path.stem, ())
            ):
                found.append(f'{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}')
    assert not found, '\n'.join(found)


def start(tool: str, arguments: list, monkeypatch, folder: Path) -> str:
    """Runs a tool that is to stop, in this process; what it says."""
    path = ALL[tool]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name='__main__')
    assert stopped.value.code
    return str(stopped.value.code)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.parametrize(('tool', 'number'), ATTACKS)
def test_another_files_stays(tool, number, tmp_path, monkeypatch, capsys) -> None:
    arguments, files, _ = WRITES[tool](Given(tmp_path))
    assert len(files) == FILES.get(tool, 1)
    file = files[number]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b'mine')
    before = content(tmp_path)
    said = start(tool, arguments, monkeypatch, tmp_path) + capsys.readouterr().err
    assert content(tmp_path).items() >= before.items()
    if {tool, f'{tool}/{file.name}'} & MARKED:
        assert 'not writ' in said.replace('did not', 'not')
    else:
        assert str(file) in said
        assert '--overwrite' in said
    assert str(file.parent) in said


@pytest.mark.parametrize('link', ['symbolic', 'hard'])
@pytest.mark.parametrize(('tool', 'number'), [(t, n) for t, n in ATTACKS if t != 'test'])
def test_an_input_stays(tool, number, link, tmp_path, monkeypatch, capsys) -> None:
    arguments, files, inputs = WRITES[tool](Given(tmp_path))
    file = files[number]
    for read in inputs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(read) if link == 'symbolic' else os.link(read, file)
        before = content(tmp_path)
        words = [*arguments, '--overwrite']
        if tool == 'gate_maps':
            words = [*arguments[:2], '--overwrite', *arguments[2:]]
        said = start(tool, words, monkeypatch, tmp_path) + capsys.readouterr().err
        assert content(tmp_path).items() >= before.items()
        expected = ('is read by this tool', 'is SRC itself', 'is the checkpoint itself')
        if tool == 'coco_voc':
            expected = ('were not written by this tool',)
        assert any(text in said for text in expected), said


@pytest.mark.parametrize('tool', ['pixel_relation', 'gate_maps'])
@pytest.mark.parametrize('overwrite', [False, True])
def test_pictures_into_the_folder_of_the_images(tool, overwrite, tmp_path, monkeypatch) -> None:
    """``--images in --out-dir in``, and ``in/a.png --out in/a.png``."""
    given = Given(tmp_path)
    words = [given.gates, 'none', '--out', given.image, '--device', 'cpu', given.image]
    if tool == 'pixel_relation':
        words = [given.config, 'none', '--images', given.images, '--out-dir', given.images]
    before = content(given.images)
    words += ['--overwrite'] * overwrite
    assert 'a.png is read by this tool' in start(tool, words, monkeypatch, tmp_path)
    assert content(given.images) == before


def test_a_table_over_the_config(tmp_path, monkeypatch) -> None:
    """feature_umap's ``--json CONFIG``, and a base of the config; merge_car's OUT likewise."""
    given = Given(tmp_path)
    heir = tmp_path / 'heir.py'
    heir.write_text("_base_ = './small.py'\n")
    before = content(tmp_path)
    umap = [heir, 'none', '--images', given.image, '--ann-dir', given.images, '--embedding', 'pca']
    for file in (heir, given.config):
        for overwrite in ([], ['--overwrite']):
            words = [*umap, '--json', file, *overwrite]
            assert 'is read by' in start('feature_umap', words, monkeypatch, tmp_path)
            words = [heir, given.checkpoint, file, *overwrite]
            assert 'is read by' in start('merge_car', words, monkeypatch, tmp_path)
    other = tmp_path / 'other.pth'
    torch.save(dict(state_dict={}), other)
    before[other] = other.read_bytes()
    words = [given.config, given.checkpoint, other]
    assert 'add --overwrite' in start('merge_car', words, monkeypatch, tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize('tool', sorted(NEW_FOLDER))
def test_a_new_folder_alone(tool, tmp_path, monkeypatch) -> None:
    given = Given(tmp_path)
    (given.out / 'notes.txt').write_bytes(b'mine')
    before = content(tmp_path)
    for out in (given.out, given.images):
        words = [given.images, given.images, '--out', out]
        assert str(out) in start(tool, words, monkeypatch, tmp_path)
        assert content(tmp_path) == before


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_work_dir_over_the_config(tool, tmp_path, monkeypatch) -> None:
    """MMEngine writes the whole config under its name, and not over the one written by hand."""
    given = Given(tmp_path)
    checkpoint = [given.checkpoint] if tool == 'test' else []
    before = content(tmp_path)
    words = [given.config, *checkpoint, '--work-dir', given.config.parent]
    assert 'give another --work-dir' in start(tool, words, monkeypatch, tmp_path)
    named = tmp_path / 'named.py'
    named.write_text(f"_base_ = './small.py'\nwork_dir = {str(tmp_path)!r}\n")
    before[named] = named.read_bytes()
    assert 'give another --work-dir' in start(tool, [named, *checkpoint], monkeypatch, tmp_path)
    assert content(tmp_path) == before
    # One that MMEngine wrote is there in every work dir, and may be used again.
    dumped = tmp_path / 'dumped.py'
    Config.fromfile(given.config).dump(dumped)
    check_work_dir(str(dumped), str(tmp_path))


def test_a_second_run_replaces_what_the_first_wrote(tmp_path) -> None:
    """Of predictions, which MMSegmentation writes, and of a picture; an edited one stays."""
    given = Given(tmp_path)
    words = [given.config, given.checkpoint, '--out', given.out, '--work-dir', tmp_path / 'work']
    for _ in range(2):
        run_again(ALL['test'], *words, cwd=tmp_path)
    assert sorted(path.name for path in given.out.iterdir()) == [
        MADE, '000000.png', '000001.png', '000002.png'
    ]  # fmt: skip
    (given.out / '000001.png').write_bytes(b'mine')
    refused = run_again(ALL['test'], *words, cwd=tmp_path, check=False)
    assert refused.returncode
    assert 'give a new folder' in refused.stderr
    words = [given.config, 'none', '--of', 'weights', '--out-dir', tmp_path / 'maps']
    for title in ('one', 'two'):
        run_again(ALL['class_dependency'], *words, '--title', title, cwd=tmp_path)
    with Image.open(tmp_path / 'maps' / 'class_dependency.png') as picture:
        picture.load()
