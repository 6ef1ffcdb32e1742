"""Images and labels: reads them from any place, and explains why a file cannot be read.

All tools read images through this module. The pipeline of a config decides how a file becomes an
array. The files are checked before, and an error names the file that causes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from PIL import Image, UnidentifiedImageError

from .errors import InputError
from .files import what_it_is

#: Keys of a sample under which mmseg has its files, and what they are.
FILES = {'img_path': 'an image', 'seg_map_path': 'a label'}
_REMEDY = (
    'Replace the file, or leave it out; tools/analysis_tools/check_dataset.py CONFIG lists all '
    'such files of a data set.'
)


def fault(path: str | os.PathLike) -> str | None:
    """What is wrong with an image file.

    Args:
        path: of the file. A path with a scheme (``s3://...``) is not checked.

    Returns:
        The reason in words; None for a complete image, and for a format that Pillow does not know,
        such as a TIFF of twelve channels.
    """
    path = os.fspath(path)
    if '://' in path:
        return None
    if os.path.isdir(path):
        return 'it is a folder, not a file'
    if not os.path.exists(path):
        return f'there is no such file (looked in {os.getcwd()})'
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return what_it_is(Path(path))
    except Image.DecompressionBombError:
        return None
    except Exception as error:  # of a broken file, decoders raise all kinds
        # A decoder that Pillow was built without is no fault of the file.
        if 'not available' in str(error):
            return None
        return f'it is truncated or damaged ({error})'
    return None


def check_image(path: str | os.PathLike, what: str = 'an image') -> None:
    """Raises an error if a file is not a complete image.

    Args:
        path: of the file.
        what: the expected content, for the message.

    Raises:
        InputError: it is missing, a folder, empty, cut off, or something else than an image.
    """
    reason = fault(path)
    if reason is not None:
        raise InputError(f'{os.fspath(path)}: cannot be read as {what}: {reason}. {_REMEDY}')


def read_sample(read: Callable[[dict], Any], info: Mapping[str, Any], check: bool = True) -> Any:
    """The result of a pipeline on a sample's files.

    Args:
        read: the pipeline, or another function that reads the sample.
        info: the sample: ``img_path``, ``seg_map_path`` and other inputs of the pipeline.
        check: whether to check the files before. Some decoders accept a truncated image. If False,
            the files are only checked if ``read`` fails.

    Raises:
        InputError: a file is not a complete image, or ``read`` cannot read it.
    """
    files = [(info[key], what) for key, what in FILES.items() if info.get(key)]
    if check:
        for path, what in files:
            check_image(path, what)
    try:
        return read(dict(info))
    except InputError:
        raise
    except Exception as error:  # every decoder has exceptions of its own
        for path, what in files:
            check_image(path, what)
        path = next((path for path, _ in files if str(path) in str(error)), None)
        if path is not None:
            text = str(error).strip().splitlines()[0]
            raise InputError(
                f'{path}: cannot be read: {type(error).__name__}: {text}. {_REMEDY}'
            ) from error
        raise


def read_image(path: str | os.PathLike, backend_args: dict | None = None) -> np.ndarray:
    """An image file as it is.

    Args:
        path: of the file, or its address in a storage that mmengine knows.
        backend_args: of that storage.

    Returns:
        (H, W, 3), uint8, RGB.

    Raises:
        InputError: it is no whole image.
    """
    import mmcv
    from mmengine.fileio import get

    def read(info: dict) -> np.ndarray:
        image = mmcv.imfrombytes(get(info['img_path'], backend_args=backend_args))
        if image is None:
            raise ValueError(f'{info["img_path"]} is in no format that OpenCV knows')
        return np.ascontiguousarray(image[..., ::-1])

    return read_sample(read, dict(img_path=os.fspath(path)))


class ExplainedPipeline(Compose):
    """A pipeline whose errors name the file that cannot be read, and why.

    Args:
        pipeline: its transforms are shared.
    """

    def __init__(self, pipeline: Compose) -> None:
        super().__init__([])
        self.transforms = pipeline.transforms

    def __call__(self, data: dict) -> Any:
        """As the pipeline; an :class:`InputError` where a file is at fault."""
        return read_sample(super().__call__, data, check=False)


def explain_reading(dataset: Any) -> None:
    """Puts an :class:`ExplainedPipeline` in every data set, in place, out of its wrappers.

    Args:
        dataset: a data set of mmengine, or a wrapper around one or several.
    """
    for inner in (*getattr(dataset, 'datasets', ()), getattr(dataset, 'dataset', None)):
        if inner is not None:
            explain_reading(inner)
    pipeline = getattr(dataset, 'pipeline', None)
    if hasattr(pipeline, 'transforms') and not isinstance(pipeline, ExplainedPipeline):
        dataset.pipeline = ExplainedPipeline(pipeline)
