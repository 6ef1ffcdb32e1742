"""CamVid: street scenes seen from a moving car."""

from __future__ import annotations

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid (Brostow et al., 2009) with the 11 classes and the split that SegNet uses.

    367, 101 and 233 images of 360 x 480 pixels. Unlabelled pixels have the ignore index;
    ``tools/dataset_converters/camvid.py`` makes the folders from the SegNet layout.

    Args:
        img_suffix: ``'.jpg'``, or ``'.png'`` if the original images were kept.
        seg_map_suffix: suffix of the label files.
        **kwargs: of :class:`mmseg.datasets.BaseSegDataset`.

    Example:
        >>> CamVidDataset.METAINFO['classes'][:3]
        ('Sky', 'Building', 'Pole')
    """

    METAINFO = {
        'classes': (
            'Sky',
            'Building',
            'Pole',
            'Road',
            'Pavement',
            'Tree',
            'SignSymbol',
            'Fence',
            'Car',
            'Pedestrian',
            'Bicyclist',
        ),
        'palette': [
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    }

    def __init__(
        self,
        img_suffix: str = '.jpg',
        seg_map_suffix: str = '.png',
        **kwargs,
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
