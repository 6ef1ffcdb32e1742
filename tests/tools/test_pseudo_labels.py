"""tools/pseudo_labels.py: what it writes, what it leaves alone, and a training step on it."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.apis import inference_model, init_model
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.models import SegTTAModel
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

from mmseg_fusion.datasets.fusion_shapes import FusionShapesDataset, draw_scene

from .running import TOOLS, run_again, small_config

pytestmark = pytest.mark.filterwarnings('ignore')
TOOL = TOOLS / 'pseudo_labels.py'
SIZES = {'a.png': (64, 64), 'street/b.png': (51, 77), 'street/far/c.png': (96, 65)}
BINARY = """
model = dict(
    decode_head=dict(
        num_classes=2, out_channels=1, threshold=0.3,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)),
    auxiliary_head=None)
"""
SIGMOID = """
model = dict(decode_head=dict(loss_decode=dict(_delete_=True, type='FocalLoss')))
"""


@pytest.fixture(scope='module')
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location('pseudo_labels', TOOL)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by this name.
    sys.modules['pseudo_labels'] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules['pseudo_labels']


def trained(folder: Path, more: str = '', name: str = 'model') -> tuple[Path, Path]:
    """A config, and a checkpoint whose model is sure of some pixels and unsure of others."""
    config = folder / f'{name}.py'
    # As wide as ResNet-18: a narrow one tells the scenes' pixels apart too little.
    config.write_text(f"_base_ = './{small_config(folder, width=64).name}'\n{more}")
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(config).model)
    with torch.no_grad():
        # The initial classifier hardly tells classes apart.
        classifier = model.decode_head.conv_seg
        scene = torch.from_numpy(draw_scene(0, size=(64, 64))[0]).permute(2, 0, 1)
        logits = model.eval()(model.data_preprocessor(dict(inputs=[scene]))['inputs']).flatten(2)
        scale = 2 / logits.std(2)[0]
        classifier.weight *= scale[:, None, None, None]
        classifier.bias -= scale * logits.mean(2)[0]
    meta = dict(dataset_meta=FusionShapesDataset.METAINFO)
    torch.save({'meta': meta, 'state_dict': model.state_dict()}, folder / f'{name}.pth')
    return config, folder / f'{name}.pth'


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> tuple[Path, Path]:
    return trained(tmp_path_factory.mktemp('small'))


@pytest.fixture
def images(tmp_path) -> Path:
    """Scenes of several sizes, in folders."""
    for index, (name, size) in enumerate(SIZES.items()):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_scene(index, size=size)[0]).save(path)
    return tmp_path / 'images'


@pytest.fixture
def label(tool, images, tmp_path, capsys):
    """Runs the tool in this process; returns the exit status and what it printed."""

    def label_it(model, *arguments, out=tmp_path / 'out', folder=images):
        argv = [*model, folder, out, '--device', 'cpu', *arguments]
        status = tool.main([str(a) for a in argv])
        return status, SimpleNamespace(**capsys.readouterr()._asdict())

    return label_it


@pytest.fixture
def complaint(label, capsys):
    """What the tool says when it stops."""

    def complain(*arguments, **more) -> str:
        with pytest.raises(SystemExit) as stopped:
            label(*arguments, **more)
        # argparse stops with 2 after printing.
        return capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code

    return complain


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def logits_of(model: nn.Module, path: Path) -> np.ndarray:
    return inference_model(model, str(path)).seg_logits.data.double().numpy()


def assert_thresholded(found: np.ndarray, probability: np.ndarray, threshold: float) -> np.ndarray:
    """``found`` is the likeliest class where its probability reaches the threshold.

    Returns:
        The likeliest class of every pixel.
    """
    assert found.dtype == np.uint8
    assert found.shape == probability.shape[1:]
    likeliest, confidence = probability.argmax(0), probability.max(0)
    # In single precision a pixel may be on the other side of the threshold, or another class.
    sure = np.abs(confidence - threshold) > 1e-5
    second, first = np.sort(probability, 0)[-2:]
    sure &= first - second > 1e-5
    assert sure.mean() > 0.99
    expected = np.where(confidence >= threshold, likeliest, 255)
    np.testing.assert_array_equal(found[sure], expected[sure])
    return likeliest


def read(path: Path) -> np.ndarray:
    """As MMSegmentation reads a label that counts from 0."""
    results = dict(seg_map_path=str(path), reduce_zero_label=False, seg_fields=[])
    return LoadAnnotations()(results)['gt_seg_map']


@pytest.mark.stack
def test_confident_predictions_of_a_folder(small, images, tmp_path):
    out = tmp_path / 'out'
    done = run_again(TOOL, *small, images, out, '--device', 'cpu', cwd=tmp_path)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob('*.png')) == sorted(SIZES)
    assert not list(out.rglob('*.tmp'))
    model = init_model(str(small[0]), str(small[1]), device='cpu')
    predicted, kept = np.zeros(8, int), np.zeros(8, int)
    for name, size in SIZES.items():
        with Image.open(out / name) as image:
            assert image.mode == 'L'
            assert image.size == size[::-1]
            found = np.array(image)
        np.testing.assert_array_equal(read(out / name), found)
        likeliest = assert_thresholded(found, softmax(logits_of(model, images / name)), 0.5)
        predicted += np.bincount(likeliest.ravel(), minlength=8)
        kept += np.bincount(found.ravel(), minlength=256)[:8]
    # Otherwise the test would say little.
    assert 0.1 < kept.sum() / predicted.sum() < 0.9
    assert (kept > 0).sum() > 2

    summary = json.loads((out / 'pseudo_labels.json').read_text())
    assert summary['pixels'] == sum(h * w for h, w in SIZES.values())
    assert summary['kept'] == kept.sum()
    assert [c['name'] for c in summary['classes']] == list(FusionShapesDataset.METAINFO['classes'])
    assert [c['kept'] for c in summary['classes']] == kept.tolist()
    assert np.abs([c['predicted'] for c in summary['classes']] - predicted).sum() < 10
    for row in summary['classes']:
        if row['predicted']:
            assert row['kept_share'] == row['kept'] / row['predicted']
            assert f'{row["kept_share"]:.2%}' in done.stdout
        else:
            assert row['kept_share'] is None
    assert (out / 'images.png.txt').read_text().split() == [n[:-4] for n in sorted(SIZES)]


@pytest.mark.parametrize('threshold', [0, 0.75])
def test_threshold(small, images, tmp_path, label, threshold):
    label(small, '--threshold', threshold)
    model = init_model(str(small[0]), str(small[1]), device='cpu')
    for name in SIZES:
        found = read(tmp_path / 'out' / name)
        assert_thresholded(found, softmax(logits_of(model, images / name)), threshold)
        assert threshold or (found < 8).all()
    summary = json.loads((tmp_path / 'out' / 'pseudo_labels.json').read_text())
    listed = (tmp_path / 'out' / 'images.png.txt').read_text().split()
    assert len(listed) + len(summary['without_any_class']) == len(SIZES)


def test_probabilities_of_augmented_images(small, images, tmp_path, label):
    label(small, '--tta', '--threshold', 0.5)
    label(small, '--tta', '--threshold', 0, out=tmp_path / 'all')
    model = init_model(str(small[0]), str(small[1]), device='cpu')
    merging = SegTTAModel(module=model)
    steps = model.cfg.tta_pipeline.copy()
    steps[-1] = dict(
        steps[-1],
        transforms=[t for t in steps[-1]['transforms'] if len(t) > 1]
        + [[dict(type='PackSegInputs')]],
    )
    pipeline = Compose(steps)
    for name in SIZES:
        data = pseudo_collate([pipeline(dict(img_path=str(images / name)))])
        # Three scales, with and without flip.
        assert len(data['inputs']) == 6
        views = []
        for view, sample in zip(data['inputs'], data['data_samples']):
            with torch.no_grad():
                result = model.test_step(dict(inputs=list(view), data_samples=list(sample)))[0]
            views.append(softmax(result.seg_logits.data.double().numpy()))
        assert_thresholded(read(tmp_path / 'out' / name), np.mean(views, 0), 0.5)
        with torch.no_grad():
            merged = merging.test_step(data)
        same = read(tmp_path / 'all' / name) == merged[0].pred_sem_seg.data.squeeze(0).numpy()
        assert same.mean() > 0.999
    # Not merely the image as it is.
    alone = logits_of(model, images / 'a.png').argmax(0)
    assert (read(tmp_path / 'all' / 'a.png') != alone).any()


def test_binary_head(images, tmp_path, label):
    model = trained(tmp_path, BINARY, 'binary')
    label(model, '--threshold', 0.6)
    segmentor = init_model(str(model[0]), str(model[1]), device='cpu')
    seen = set()
    for name in SIZES:
        result = inference_model(segmentor, str(images / name))
        # Probabilities of class 1 already, as mmseg returns them.
        positive = result.seg_logits.data[0].double().numpy()
        decided = result.pred_sem_seg.data[0].numpy()
        confidence = np.where(decided == 1, positive, 1 - positive)
        found = read(tmp_path / 'out' / name)
        sure = np.abs(confidence - 0.6) > 1e-5
        np.testing.assert_array_equal(found[sure], np.where(confidence >= 0.6, decided, 255)[sure])
        seen |= set(np.unique(found))
        # Called class 1 with a probability below one half: not sure enough.
        doubtful = (positive > 0.31) & (positive < 0.49)
        assert doubtful.any()
        assert (found[doubtful] == 255).all()
    assert seen == {0, 1, 255}
    summary = json.loads((tmp_path / 'out' / 'pseudo_labels.json').read_text())
    assert len(summary['classes']) == 2


def test_head_trained_with_sigmoid(images, tmp_path, label):
    model = trained(tmp_path, SIGMOID, 'sigmoid')
    label(model, '--threshold', 0.8)
    segmentor = init_model(str(model[0]), str(model[1]), device='cpu')
    for name in SIZES:
        probability = 1 / (1 + np.exp(-logits_of(segmentor, images / name)))
        found = read(tmp_path / 'out' / name)
        assert_thresholded(found, probability, 0.8)
        # The classes do not compete: a softmax would be less sure.
        assert (found < 8).any()


def test_scores_of_heads(tool):
    def head(*losses: bool, out_channels: int = 8) -> nn.Module:
        made = nn.Module()
        made.out_channels = out_channels
        made.loss_decode = nn.ModuleList(nn.Module() for _ in losses)
        for loss, sigmoid in zip(made.loss_decode, losses):
            loss.use_sigmoid = sigmoid
        return made

    assert tool.kind_of_scores(head(False)) == 'softmax'
    assert tool.kind_of_scores(head(True, True)) == 'sigmoid'
    assert tool.kind_of_scores(head(False, True)) == 'softmax'
    assert tool.kind_of_scores(head(True, out_channels=1)) == 'binary'
    with pytest.raises(tool.InputError, match='has no loss_decode'):
        tool.kind_of_scores(nn.Conv2d(8, 8, 1))


class Says(nn.Module):
    """A segmentor that predicts what it was given, or fails."""

    def __init__(self, logits: torch.Tensor | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.logits, self.error = logits, error

    def test_step(self, data: dict) -> list[SegDataSample]:
        if self.error:
            raise self.error
        return [SegDataSample(seg_logits=PixelData(data=self.logits.clone()))]


def test_threshold_itself_is_kept(tool):
    # Probabilities 1/2 and 1/2, then less than that.
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]], [[-np.inf, 0.0]]]).clamp_min(-1e4)
    labeller = tool.Labeller(Says(logits), Compose([]), 'softmax', 3, 0.5)
    found, predicted = labeller.label(dict(inputs=torch.zeros(3, 1, 2), data_samples=None))
    assert found.tolist() == [[0, 255]]
    assert predicted.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ('model', 'words'),
    [
        (Says(torch.full((3, 4, 4), np.nan)), 'not finite'),
        (Says(error=torch.cuda.OutOfMemoryError('out')), 'does not fit into the memory'),
    ],
    ids=['nan', 'memory'],
)
def test_failing_images_are_named(tool, images, tmp_path, model, words):
    load = lambda data: dict(inputs=torch.zeros(3, 4, 4), data_samples=None)  # noqa: E731
    labeller = tool.Labeller(model, load, 'softmax', 3, 0.5)
    labels, done = {name: name for name in SIZES}, tool.Run()
    tool.label_folder(labeller, images, tmp_path / 'out', labels, {}, done)
    assert list(done.problems) == list(SIZES)
    assert all(words in problem for problem in done.problems.values())
    assert not (tmp_path / 'out').exists()


def test_a_failing_model_and_a_failing_image_differ(tool, images, tmp_path):
    said = Says(torch.zeros(3, 4, 4))
    failures = {}

    def load(data: dict) -> dict:
        said.error = failures.get(Path(data['img_path']).name)
        return dict(inputs=torch.zeros(3, 4, 4), data_samples=None)

    labeller = tool.Labeller(said, load, 'softmax', 3, 0.5)
    labels = {name: name for name in SIZES}
    failures['a.png'] = RuntimeError('no kernel')
    with pytest.raises(RuntimeError, match=r'images/a.png cannot be predicted') as failed:
        tool.label_folder(labeller, images, tmp_path / 'out', labels, {}, tool.Run())
    assert failed.value.__cause__ is failures['a.png']
    assert not (tmp_path / 'out').exists()

    failures = {'b.png': ValueError('too small')}
    done = tool.Run()
    tool.label_folder(labeller, images, tmp_path / 'out', labels, {}, done)
    assert done.problems == {'street/b.png': 'cannot be predicted (ValueError: too small)'}
    assert sorted(done.made) == ['a.png', 'street/far/c.png']


@pytest.mark.stack
def test_goes_on_and_loses_nothing(small, images, tmp_path, label, complaint):
    out, broken = tmp_path / 'out', images / 'street' / 'aa.png'
    whole = (images / 'a.png').read_bytes()
    broken.write_bytes(whole[:30])
    (images / 'notes.txt').write_text('no image')
    done = run_again(TOOL, *small, images, out, '--device', 'cpu', cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert f'{broken}: cannot be read' in done.stderr
    assert 'Traceback' not in done.stderr
    # What comes after the broken one is there.
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob('*.png')) == sorted(SIZES)
    first = json.loads((out / 'pseudo_labels.json').read_text())
    assert list(first['problems']) == ['street/aa.png']
    assert first['written'] == 3
    assert 'street/aa' not in (out / 'images.png.txt').read_text().split()

    # What a power failure may leave, and what was not there.
    (out / 'a.png').write_bytes((out / 'a.png').read_bytes()[:20])
    broken.write_bytes(whole)
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*.png')}
    status, printed = label(small)
    assert status == 0
    assert '2 of 4 labels are there already' in printed.out
    changed = {p for p in before if p.stat().st_mtime_ns != before[p]}
    assert changed == {out / 'a.png'}
    np.testing.assert_array_equal(read(out / 'a.png'), read(out / 'street' / 'aa.png'))
    second = json.loads((out / 'pseudo_labels.json').read_text())
    assert (second['written'], second['there_before'], second['problems']) == (2, 2, {})
    # The measure is that of the whole folder, as if it had been made in one go.
    label(small, out=tmp_path / 'at_once')
    at_once = json.loads((tmp_path / 'at_once' / 'pseudo_labels.json').read_text())
    assert second['classes'] == at_once['classes']
    for path in out.rglob('*.png'):
        assert path.read_bytes() == (tmp_path / 'at_once' / path.relative_to(out)).read_bytes()

    words = complaint(small, '--threshold', '0.7')
    assert 'threshold 0.5, now 0.7' in words
    assert '--overwrite' in words
    status, _ = label(small, '--threshold', '0.7', '--overwrite')
    assert status == 0
    assert json.loads((out / 'pseudo_labels.json').read_text())['written'] == 4
    assert (read(out / 'a.png') == 255).sum() > (read(tmp_path / 'at_once/a.png') == 255).sum()


def test_another_checkpoint_or_model_is_another_set(small, tmp_path, label, complaint):
    label(small)
    other = tmp_path / 'other.pth'
    saved = torch.load(small[1], weights_only=False)
    saved['state_dict']['decode_head.conv_seg.bias'] += 1
    torch.save(saved, other)
    assert 'made otherwise (checkpoint' in complaint((small[0], other))
    assert 'tta False, now True' in complaint(small, '--tta')
    options = ('--cfg-options', 'model.data_preprocessor.size_divisor=32')
    assert 'made otherwise (model' in complaint(
        small, *options, 'model.data_preprocessor.size=None'
    )
    # The same file under another name is the same checkpoint.
    moved = tmp_path / 'moved.pth'
    moved.write_bytes(small[1].read_bytes())
    _, printed = label((small[0], moved))
    assert '3 of 3 labels are there already' in printed.out


@pytest.mark.parametrize('overwrite', [(), ('--overwrite',)], ids=['', 'overwrite'])
def test_labels_of_others_are_left_alone(small, tmp_path, complaint, overwrite):
    (tmp_path / 'out').mkdir()
    mine = tmp_path / 'out' / 'a.png'
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(mine)
    before = mine.read_bytes()
    assert f'{mine} was not written by this tool' in complaint(small, *overwrite)
    assert mine.read_bytes() == before
    assert os.listdir(tmp_path / 'out') == ['a.png']


def test_one_list_per_suffix(small, images, tmp_path, label, complaint):
    Image.open(images / 'a.png').save(images / 'street' / 'photo.v2.JPG')
    status, _ = label(small)
    assert status == 0
    out = tmp_path / 'out'
    assert (out / 'street' / 'photo.v2.png').is_file()
    assert (out / 'images.JPG.txt').read_text() == 'street/photo.v2\n'
    assert len((out / 'images.png.txt').read_text().split()) == 3
    # A data set of no images cannot be built: no list then.
    status, printed = label(small, '--threshold', 1, '--overwrite')
    assert status == 0
    assert 'nothing to train on: lower --threshold' in printed.out
    assert not list(out.glob('*.txt'))
    Image.open(images / 'a.png').save(images / 'a.jpg')
    assert 'a.jpg and a.png would both have the label a.png' in complaint(small)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--threshold', '1.5'], '--threshold is a probability from 0 to 1, got 1.5'),
        (['--threshold', 'nan'], '--threshold is a probability from 0 to 1, got nan'),
        (['--tta', '--cfg-options', 'tta_pipeline=None'], 'the config has no tta_pipeline'),
        (['--cfg-options', 'test_pipeline=None'], 'the config has no test_pipeline'),
        (['--cfg-options', 'model.decode_head.channels=8'], 'does not fit the model'),
    ],
    ids=['threshold', 'nan', 'tta', 'test', 'checkpoint'],
)
def test_wrong_arguments(small, tmp_path, complaint, arguments, words):
    assert words in complaint(small, *arguments)
    assert not (tmp_path / 'out').exists()


def test_wrong_folders(small, images, tmp_path, complaint):
    (tmp_path / 'empty').mkdir()
    assert 'expected files that end in .jpg' in complaint(small, folder=tmp_path / 'empty')
    assert 'is no folder' in complaint(small, folder=tmp_path / 'nowhere')
    assert 'is a file; give the folder' in complaint(small, folder=images / 'a.png')
    assert 'is in IMAGES' in complaint(small, out=images / 'labels')
    assert 'is in IMAGES' in complaint(small, out=images)
    assert 'is in OUT' in complaint(small, out=tmp_path)
    (tmp_path / 'file').write_text('')
    assert 'is a file; give the folder to write' in complaint(small, out=tmp_path / 'file')
    assert 'is not a file' in complaint((tmp_path / 'no.py', small[1]))
    assert 'is not a file' in complaint((small[0], tmp_path / 'no.pth'))


def test_too_many_classes(tmp_path, images, label, complaint):
    more = 'model = dict(decode_head=dict(num_classes={}), auxiliary_head=None)\n'
    model = trained(tmp_path, more.format(256), 'many')
    assert 'decode_head has 256 classes; an 8-bit label holds at most 255' in complaint(model)
    status, printed = label(trained(tmp_path, more.format(255), 'most'), '--threshold', 0)
    assert status == 0
    # The data set has 8 names, the head 255 classes.
    assert 'class 254' in printed.out


@pytest.mark.stack
def test_training_on_the_labels(small, images, tmp_path, label):
    (images / 'broken.png').write_bytes(b'no image')
    out = tmp_path / 'out'
    assert label(small)[0] == 1
    cfg = Config.fromfile(small[0])
    crop = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomCrop', crop_size=(48, 48)),
        dict(type='PackSegInputs'),
    ]
    pseudo = dict(
        type='BaseSegDataset',
        metainfo=dict(FusionShapesDataset.METAINFO),
        img_suffix='.png',
        seg_map_suffix='.png',
        data_prefix=dict(img_path=str(images), seg_map_path=str(out)),
        ann_file=str(out / 'images.png.txt'),
        reduce_zero_label=False,
        pipeline=crop,
    )
    labelled = cfg.train_dataloader.dataset.to_dict()
    labelled.update(length=3, pipeline=crop)
    cfg.train_dataloader.batch_size = 6
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[labelled, pseudo])
    cfg.merge_from_dict(
        dict(
            train_cfg=dict(max_iters=1, val_interval=10),
            work_dir=str(tmp_path / 'work'),
            load_from=str(small[1]),
        )
    )
    runner = Runner.from_cfg(cfg)
    dataset = runner.build_dataloader(cfg.train_dataloader).dataset
    assert len(dataset) == 6
    assert {Path(dataset.get_data_info(i)['img_path']).name for i in (3, 4, 5)} == {
        'a.png', 'b.png', 'c.png',
    }  # fmt: skip
    sample = dataset[3]['data_samples']
    file = read(Path(sample.seg_map_path))
    # The crop is one of the file, and holds nothing but classes and the ignored label.
    crops = np.lib.stride_tricks.sliding_window_view(file, (48, 48))
    found = sample.gt_sem_seg.data[0].numpy()
    assert (crops == found).all((2, 3)).any()
    assert set(np.unique(found)) <= {*range(8), 255}

    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    trained_model = runner.train()
    assert runner.iter == 1
    after = trained_model.state_dict()
    weight = 'decode_head.conv_seg.weight'
    # Of the checkpoint, and moved by one step.
    start = torch.load(small[1], weights_only=False)['state_dict'][weight]
    assert not torch.equal(before[weight], start)
    moved = (after[weight] - start).abs()
    assert 0 < moved.max() < 0.1
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())


def test_self_training_config_reads_what_the_tool_writes(small, repo_root, images, tmp_path, label):
    for path in list(images.rglob('*.png')):
        Image.open(path).save(path.with_suffix('.jpg'))
        path.unlink()
    (images / 'street' / 'broken.jpg').write_bytes(b'no image')
    out = tmp_path / 'labels'
    label(small, out=out)
    (config,) = (repo_root / 'configs' / 'eseg').glob('eseg-s_pseudo-labels_*.py')
    pseudo = Config.fromfile(config).train_dataloader.dataset.datasets[1]
    assert (pseudo.data_prefix.img_path, pseudo.data_prefix.seg_map_path) == ('images', 'labels')
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    steps.append(dict(type='PackSegInputs'))
    dataset = DATASETS.build(dict(pseudo, data_root=str(tmp_path), pipeline=steps))
    assert len(dataset) == 3
    for i in range(3):
        sample = dataset[i]
        name = Path(sample['data_samples'].img_path).relative_to(images).with_suffix('.png')
        assert sample['inputs'].shape[1:] == SIZES[name.as_posix()]
        np.testing.assert_array_equal(sample['data_samples'].gt_sem_seg.data[0], read(out / name))
