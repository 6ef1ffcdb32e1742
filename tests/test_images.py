"""What is wrong with an image file, and how a pipeline that reads it says so."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, Compose, ConcatDataset, RepeatDataset
from PIL import Image

from mmseg_fusion.errors import CheckpointError, InputError
from mmseg_fusion.images import (
    ExplainedPipeline,
    check_image,
    explain_reading,
    fault,
    read_image,
    read_sample,
)

PIXELS = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif', 'webp', 'gif', 'ppm'])
@pytest.mark.parametrize('mode', ['RGB', 'L', 'P'])
@pytest.mark.filterwarnings('ignore:.*:UserWarning')
def test_whole_images_have_no_fault(tmp_path, suffix, mode):
    path = tmp_path / f'a.{suffix}'
    try:
        Image.fromarray(PIXELS).convert(mode).save(path)
    except OSError:  # a format without palettes
        Image.fromarray(PIXELS).save(path)
    assert fault(path) is None
    # Half of it is none, whatever is left of it; of a TIFF file Pillow may not know the rest.
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 'truncated or damaged' in (fault(path) or '') or suffix == 'tif'
    with pytest.raises(InputError, match=r'truncated or damaged|in no format that OpenCV knows'):
        read_image(path)


def test_images_that_pillow_does_not_know_are_left_to_the_pipeline(tmp_path):
    np.save(tmp_path / 'a.npy', PIXELS)
    assert fault(tmp_path / 'a.npy') is None
    cv2.imwrite(str(tmp_path / 'a.png'), PIXELS.astype(np.uint16) * 200)
    assert fault(tmp_path / 'a.png') is None
    assert fault('s3://bucket/a.png') is None


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'the file is empty'),
        (b'no image\n', 'it is a text file'),
        ('\u4e00'.encode() * 400, 'it is a text file'),
        (b'<!DOCTYPE html><html>', 'it is a web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    ],
)
def test_what_is_no_image(tmp_path, content, words):
    path = tmp_path / 'a.png'
    path.write_bytes(content)
    assert words in fault(path)
    for call in (check_image, read_image):
        with pytest.raises(InputError, match='cannot be read as an image') as raised:
            call(path)
        assert str(path) in str(raised.value)
        assert words in str(raised.value)
        assert 'Replace the file' in str(raised.value)


def test_folders_and_nothing(tmp_path):
    assert 'folder' in fault(tmp_path)
    assert 'no such file' in fault(tmp_path / 'a.png')


def test_read_image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png'), PIXELS)


def test_a_decoder_that_takes_half_an_image_is_not_asked(tmp_path):
    path = tmp_path / 'a.jpg'
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    info = dict(img_path=str(path))
    with pytest.raises(InputError, match='truncated'):
        read_sample(lambda _: PIXELS, info)
    # Training asks where it fails: it reads every image many times.
    assert read_sample(lambda _: PIXELS, info, check=False) is PIXELS


def test_errors_of_the_pipeline(tmp_path):
    """Of a whole image, only one that names it is the file's; others are what they were."""
    path = tmp_path / 'a.png'
    Image.fromarray(PIXELS).save(path)
    info = dict(img_path=str(path), seg_map_path=None)

    def fails(text):
        def read(_):
            raise AssertionError(text)

        return read

    with pytest.raises(AssertionError, match='too small'):
        read_sample(fails('crop is too small'), info)
    with pytest.raises(InputError, match=r'a\.png: cannot be read: AssertionError: failed to load'):
        read_sample(fails(f'failed to load image: {path}'), info)


class Files(BaseDataset):
    def load_data_list(self) -> list[dict]:
        return [dict(img_path=self.ann_file)]


def load(data: dict) -> dict:
    data['img'] = torch.from_numpy(np.asarray(Image.open(data['img_path'])))
    return data


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize(
    'wrap', [lambda data: data, lambda data: RepeatDataset(data, 2), lambda d: ConcatDataset([d])]
)
def test_data_sets_say_it_out_of_their_wrappers(tmp_path, wrap, workers):
    path = tmp_path / 'a.png'
    Image.fromarray(PIXELS).save(path)
    inner = Files(str(path), pipeline=[load])
    dataset = wrap(inner)
    explain_reading(dataset)
    explain_reading(dataset)
    assert isinstance(inner.pipeline, ExplainedPipeline)
    assert inner.pipeline.transforms == [load]
    assert dataset[0]['img'].shape == PIXELS.shape
    Path(path).write_text('no image')
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers, collate_fn=list)
    with pytest.raises(InputError) as raised:
        next(iter(loader))
    assert str(raised.value).startswith(f'{path}: cannot be read as an image: it is a text file')


def test_pipelines_of_other_kinds_are_left_alone():
    class Mixed:
        pipeline = (load,)

    explain_reading(Mixed())
    assert Mixed.pipeline == (load,)
    assert ExplainedPipeline(Compose([load])).transforms == [load]


@pytest.mark.parametrize('kind', [InputError, CheckpointError])
def test_messages_of_another_process(kind):
    """As torch puts them together."""
    told = kind(
        f'Caught {kind.__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent '
        f'call last):\n  File "a.py", line 1\nmmseg_fusion.errors.{kind.__name__}: a.png is bad\n'
    )
    assert str(told) == 'a.png is bad'
    assert str(kind('a.png: is bad')) == 'a.png: is bad'
