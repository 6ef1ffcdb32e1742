"""tools/dataset_converters/coco_voc.py on a few annotations that are drawn by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mmseg.datasets import PascalVOCDataset
from mmseg.registry import DATASETS
from PIL import Image

from .running import TOOLS, run_again

TOOL = TOOLS / 'dataset_converters' / 'coco_voc.py'
HEIGHT, WIDTH = 60, 80
CATEGORIES = {1: 'person', 2: 'bicycle', 5: 'airplane', 18: 'dog', 53: 'apple', 72: 'tv'}
PERSON, AEROPLANE, DOG, TV = 15, 1, 12, 20


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('coco_voc', TOOL)
    module = sys.modules['coco_voc'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules['coco_voc']


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    """The polygon around these pixels, right and bottom not among them."""
    return [left, top, right, top, right, bottom, left, bottom]


def counts(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, of 0 first: COCO's crowds."""
    runs, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def annotation(image: int, category: int, segmentation, crowd: int = 0) -> dict:
    return dict(image_id=image, category_id=category, segmentation=segmentation, iscrowd=crowd)


@pytest.fixture
def coco(tmp_path):
    """Seven images, of which two are to be taken; what their labels are, made without COCO."""
    folder = tmp_path / 'train2017'
    folder.mkdir()
    names = {i: f'{i:012d}.jpg' for i in range(1, 8)}
    for i, name in names.items():
        if i != 5:
            Image.new('RGB', (WIDTH, HEIGHT), (i, 0, 0)).save(folder / name)
    crowd = np.zeros((HEIGHT, WIDTH), int)
    crowd[40:60, 0:60] = 1
    crowd[50, 10:20] = 0
    annotations = [
        # 1: two polygons of one instance, and another class over a corner of it.
        annotation(1, 1, [box(0, 0, 40, 30), box(50, 10, 60, 20)]),
        annotation(1, 72, [box(30, 20, 50, 40)]),
        # The same class again is no conflict, nor is one that VOC does not have.
        annotation(1, 1, [box(35, 0, 45, 10)]),
        annotation(1, 53, [box(0, 0, 20, 20)]),
        # 2: a crowd.
        annotation(2, 1, dict(counts=counts(crowd), size=[HEIGHT, WIDTH]), crowd=1),
        annotation(2, 18, [box(70, 0, 80, 10)]),
        # 3: 1000 pixels, not more. 4: a class that VOC does not have.
        annotation(3, 5, [box(0, 0, 40, 25)]),
        annotation(4, 53, [box(0, 0, 80, 60)]),
        # 5: its image is missing. 6: no annotation. 7: too few, and a broken one of no class.
        annotation(5, 18, [box(0, 0, 80, 60)]),
        annotation(7, 53, [[1, 2]]),
        annotation(7, 2, [box(0, 0, 30, 30)]),
    ]
    first = np.zeros((HEIGHT, WIDTH), np.uint8)
    first[0:30, 0:40] = first[10:20, 50:60] = first[0:10, 35:45] = PERSON
    first[20:40, 30:50] = TV
    first[20:30, 30:40] = 255
    second = np.where(crowd, PERSON, 0).astype(np.uint8)
    second[0:10, 70:80] = DOG
    data = dict(
        images=[
            dict(id=i, file_name=name, height=HEIGHT, width=WIDTH) for i, name in names.items()
        ],
        categories=[dict(id=i, name=name) for i, name in CATEGORIES.items()],
        annotations=annotations,
    )
    path = tmp_path / 'instances.json'
    path.write_text(json.dumps(data))
    return SimpleNamespace(
        path=path,
        data=data,
        images=folder,
        out=tmp_path / 'voc_train2017',
        expected={'000000000001': first, '000000000002': second},
    )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_classes_are_vocs_in_its_order(tool) -> None:
    assert ('background', *tool.VOC_OF_COCO.values()) == PascalVOCDataset.METAINFO['classes']


@pytest.mark.parametrize('options', [[], ['--nproc', 2]])
def test_converts(coco, tmp_path, options) -> None:
    result = run_again(TOOL, coco.path, coco.images, coco.out, *options, cwd=tmp_path, check=False)
    # The missing image.
    assert result.returncode == 1
    assert '1 problems' in result.stderr
    assert f'{coco.images}/000000000005.jpg: cannot be read as an image' in result.stderr
    assert '7 images, 5 with a class of VOC, 2 of them with more than 1000' in result.stdout
    assert "ANNOTATIONS has no category 'bird', 'boat', 'bottle', 'bus'" in result.stdout
    assert {p.stem for p in coco.out.glob('*.png')} == coco.expected.keys()
    for name, expected in coco.expected.items():
        np.testing.assert_array_equal(np.array(Image.open(coco.out / f'{name}.png')), expected)
    assert not list(coco.out.rglob('*.tmp'))
    summary = json.loads((coco.out / 'coco_voc.json').read_text())
    both = np.stack(list(coco.expected.values()))
    for id_, name in enumerate(PascalVOCDataset.METAINFO['classes']):
        assert summary['pixels'][name] == (both == id_).sum()
    assert (summary['images'], summary['with a class of VOC'], summary['taken']) == (7, 5, 2)


def test_is_read_as_the_config_reads_it(tool, coco, tmp_path) -> None:
    tool.main([str(coco.path), str(coco.images), str(coco.out)])
    data = DATASETS.build(
        dict(
            type='PascalVOCDataset',
            data_root=str(tmp_path),
            data_prefix=dict(img_path='train2017', seg_map_path='voc_train2017'),
            ann_file='voc_train2017/images.txt',
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
        )
    )
    found = {Path(sample['img_path']).stem: sample['gt_seg_map'] for sample in data}
    assert found.keys() == coco.expected.keys()
    for name, expected in coco.expected.items():
        np.testing.assert_array_equal(found[name], expected)


def test_compressed_masks_and_the_threshold(tool, coco, tmp_path) -> None:
    from pycocotools import mask as coco_mask

    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order='F')
    mask[5:8, 3:10] = 1
    packed = coco_mask.encode(mask)
    packed['counts'] = packed['counts'].decode()
    coco.data['annotations'] = [annotation(6, 5, packed)]
    coco.path.write_text(json.dumps(coco.data))
    argv = [str(coco.path), str(coco.images), str(coco.out), '--min-pixels']
    assert tool.main([*argv, '21']) == 0
    assert not list(coco.out.glob('*.png'))
    assert (coco.out / 'images.txt').read_text() == ''
    assert tool.main([*argv, '20', '--overwrite']) == 0
    label = np.array(Image.open(coco.out / '000000000006.png'))
    np.testing.assert_array_equal(label, AEROPLANE * mask)


@pytest.mark.parametrize(
    ('broken', 'words'),
    [
        (dict(segmentation=[[0, 0, 50, 50]]), 'expected polygons of three points or more'),
        (dict(segmentation=[]), 'expected polygons of three points or more'),
        (dict(segmentation=dict(counts=[4800], size=[80, 60])), 'its mask is of size [80, 60]'),
        (dict(segmentation=7), 'a segmentation cannot be read'),
        (dict(image_id=99), 'no image has the id 99'),
    ],
)
def test_names_what_is_wrong_and_converts_the_rest(
    tool, coco, capsys, broken: dict, words: str
) -> None:
    coco.data['annotations'][4].update(broken)
    del coco.data['annotations'][8]  # of the missing image
    coco.path.write_text(json.dumps(coco.data))
    assert tool.main([str(coco.path), str(coco.images), str(coco.out)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert '1 problems' in error
    assert (coco.out / 'images.txt').read_text() == '000000000001\n'


def test_an_image_of_another_size(tool, coco, capsys) -> None:
    Image.new('RGB', (HEIGHT, WIDTH)).save(coco.images / '000000000001.jpg')
    assert tool.main([str(coco.path), str(coco.images), str(coco.out)]) == 1
    assert 'is 80 x 60 (height x width), but its annotations are for 60 x 80' in (
        capsys.readouterr().err
    )
    assert [p.stem for p in coco.out.glob('*.png')] == ['000000000002']


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda data: data.pop('categories'), "a list 'categories' of entries with id, name"),
        (lambda data: data['images'][3].pop('height'), "a list 'images' of entries with"),
        (lambda data: data.update(annotations=[]), "a list 'annotations' of entries with"),
        (lambda data: data.update(categories=[dict(id=1, name='Person')]), "none of VOC's classes"),
        (lambda data: data['images'][0].update(file_name='../a.jpg'), 'is not a path inside'),
        (
            lambda data: data['images'][0].update(file_name='000000000002.png'),
            '000000000002.png and 000000000002.jpg would both have the label',
        ),
    ],
)
def test_refuses_another_kind_of_file(tool, coco, change, words: str) -> None:
    change(coco.data)
    coco.path.write_text(json.dumps(coco.data))
    with pytest.raises(SystemExit, match=words):
        tool.main([str(coco.path), str(coco.images), str(coco.out)])
    assert not coco.out.exists()


def test_refuses_what_is_no_json(tool, coco) -> None:
    with pytest.raises(SystemExit, match='cannot be read as JSON'):
        tool.main([str(coco.images / '000000000001.jpg'), str(coco.images), str(coco.out)])


def test_refuses_folders_in_each_other(tool, coco, tmp_path) -> None:
    before = contents(tmp_path)
    for images, out in (
        (coco.images, coco.images),
        (coco.images, coco.images / 'labels'),
        (coco.images, tmp_path),
        (coco.images, coco.path),
        (coco.path, coco.out),
        (tmp_path / 'nothing', coco.out),
    ):
        with pytest.raises(SystemExit, match=r'IMAGES|OUT'):
            tool.main([str(coco.path), str(images), str(out)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize('name', ['000000000006.png', 'images.txt', 'coco_voc.json'])
@pytest.mark.parametrize('option', [[], ['--overwrite']])
def test_leaves_files_alone_that_it_did_not_write(tool, coco, name: str, option) -> None:
    coco.out.mkdir()
    path = coco.out / name
    if path.suffix == '.png':
        Image.new('L', (WIDTH, HEIGHT)).save(path)
    else:
        path.write_text('{"made by": "hand"}\n')
    before = contents(coco.out)
    with pytest.raises(SystemExit, match='were not written by this tool'):
        tool.main([str(coco.path), str(coco.images), str(coco.out), *option])
    assert contents(coco.out) == before


def test_writes_its_own_again_only_when_told(tool, coco) -> None:
    argv = [str(coco.path), str(coco.images), str(coco.out)]
    tool.main(argv)
    before = contents(coco.out)
    with pytest.raises(SystemExit, match='--overwrite to make them again'):
        tool.main(argv)
    assert contents(coco.out) == before
    tool.main([*argv, '--overwrite'])
    assert contents(coco.out) == before


def test_without_pycocotools_nothing_is_written(tool, coco, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    monkeypatch.setitem(sys.modules, 'pycocotools.mask', None)
    with pytest.raises(SystemExit, match=r"pip install 'mmseg-fusion\[coco\]'"):
        tool.main([str(coco.path), str(coco.images), str(coco.out)])
    assert not coco.out.exists()
