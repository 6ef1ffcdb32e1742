"""The small surroundings that a tested class is put into: a backbone, a data set, a config."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.utils.data import Dataset

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def level_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size of a level of that stride: every backbone with padded strided convolutions rounds up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def toy_features(
    channels: Sequence[int], strides: Sequence[int], size: tuple[int, int], batch: int = 2
) -> list[Tensor]:
    """Random levels (batch, channels, *level_size), negative too: an in-place ReLU must show."""
    return [torch.randn(batch, c, *level_size(size, s)) for c, s in zip(channels, strides)]


def toy_samples(
    num_classes: int, size: tuple[int, int], batch: int = 2, ignore_index: int = 255
) -> list[SegDataSample]:
    """Random labels (1, *size), of which about a fifth is ignored."""
    samples = []
    for _ in range(batch):
        label = torch.randint(num_classes, (1, *size))
        label[torch.rand(1, *size) < 0.2] = ignore_index
        samples.append(
            SegDataSample(
                gt_sem_seg=PixelData(data=label),
                metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size),
            )
        )
    return samples


@MODELS.register_module()
class TinyPyramid(BaseModule):
    """A backbone of one 3x3 convolution per level, of any channels and strides.

    Args:
        channels: channels of each level.
        strides: stride of each level relative to the image, rising, each a multiple of the last.
    """

    def __init__(
        self,
        channels: Sequence[int] = (8, 16, 32, 64),
        strides: Sequence[int] = (4, 8, 16, 32),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        ins, before = (3, *channels[:-1]), (1, *strides[:-1])
        self.stages = nn.ModuleList(
            ConvModule(i, o, 3, stride=s // b, padding=1, norm_cfg=dict(type='BN'))
            for i, o, s, b in zip(ins, channels, strides, before)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(accumulate(self.stages, lambda y, stage: stage(y), initial=x))[1:]


@DATASETS.register_module()
class ToyScenes(Dataset):
    """A few random images whose label is the brightest channel; flips use numpy's random state.

    Args:
        length: number of images.
        size: height and width.
        num_classes: at most 3.
    """

    METAINFO = dict(classes=('r', 'g', 'b'), palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]])

    def __init__(
        self, length: int = 8, size: tuple[int, int] = (32, 32), num_classes: int = 3
    ) -> None:
        self.length, self.size, self.num_classes = length, tuple(size), num_classes
        self.metainfo = dict(self.METAINFO)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if index >= self.length:
            raise IndexError(index)
        random = np.random.RandomState(index)
        # Coarse colours make regions, so that labels are not noise.
        coarse = random.randint(0, 256, (3, -(-self.size[0] // 8), -(-self.size[1] // 8)))
        image = np.kron(coarse, np.ones((8, 8), int))[:, : self.size[0], : self.size[1]]
        label = image[: self.num_classes].argmax(0)[None]
        if np.random.rand() < 0.5:
            image, label = image[..., ::-1], label[..., ::-1]
        sample = SegDataSample(
            gt_sem_seg=PixelData(data=torch.from_numpy(label.copy())),
            metainfo=dict(img_shape=self.size, ori_shape=self.size, img_path=f'{index}.png'),
        )
        return dict(
            inputs=torch.from_numpy(image.astype(np.uint8).copy()),
            data_samples=sample,
        )


def segmentor_config(
    head: dict, backbone: dict | None = None, neck: dict | None = None, **test_cfg
) -> Config:
    """A whole config, of which mmseg's inference functions can make a model.

    Args:
        head: config of the decode head.
        backbone: config of the backbone; default :class:`TinyPyramid`.
        neck: config of the neck, if any.
        test_cfg: the model's ``test_cfg``; whole images if nothing is given.
    """
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackSegInputs')
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=MEAN,
            std=STD,
            bgr_to_rgb=True,
            pad_val=0,
            seg_pad_val=255,
            size_divisor=1,
        ),
        backbone=backbone or dict(type='TinyPyramid'),
        decode_head=head,
        train_cfg=dict(),
        test_cfg=test_cfg or dict(mode='whole'),
    )
    if neck is not None:
        model['neck'] = neck
    return Config(
        copy.deepcopy(
            dict(
                default_scope='mmseg',
                model=model,
                test_pipeline=[load, pack],
                test_dataloader=dict(dataset=dict(pipeline=[load, pack])),
                visualizer=dict(type='SegLocalVisualizer', vis_backends=[], name='toy'),
                tta_model=dict(type='SegTTAModel'),
                tta_pipeline=[
                    load,
                    dict(
                        type='TestTimeAug',
                        transforms=[
                            [
                                dict(type='Resize', scale_factor=r, keep_ratio=True)
                                for r in (1.0, 1.5)
                            ],
                            [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
                            [pack],
                        ],
                    ),
                ],
            )
        )
    )
