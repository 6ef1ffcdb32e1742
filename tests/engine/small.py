"""A segmentor and a runner small enough to train in a second."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import nn

LEVELS = (4, 8, 16, 32)
BN = dict(type='BN')
_RUNS = itertools.count()


@MODELS.register_module()
class FusingBackbone(nn.Module):
    """Four levels; the second one fuses by concatenation inside the backbone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip((4, 4, 8, 16), LEVELS)
        )
        self.fuse = nn.Conv2d(12, 8, 1)

    def forward(self, x):
        x, outs = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            outs.append(x)
        up = F.interpolate(outs[0], size=outs[1].shape[2:], mode='bilinear')
        outs[1] = self.fuse(torch.cat([outs[1], up], 1))
        return tuple(outs)


UPER = dict(
    type='UPerHead',
    in_channels=list(LEVELS),
    in_index=[0, 1, 2, 3],
    pool_scales=(1, 2),
    channels=6,
    num_classes=8,
    norm_cfg=BN,
)


def dataset(length=12, pipeline=(), size=(64, 64)):
    return dict(
        type='FusionShapesDataset',
        size=size,
        length=length,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            *pipeline,
            dict(type='PackSegInputs'),
        ],
    )


def config(work_dir, head=None, hook=None, length=12, max_iters=2, batch_size=4, **changes):
    """Config of a run: hook is a dict of ScaleEqualizerHook's arguments, None for no hook."""
    hooks = [] if hook is None else [dict(type='ScaleEqualizerHook', **hook)]
    changes = copy.deepcopy(changes)
    hooks += changes.pop('more_hooks', [])
    base = dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['mmseg_fusion'], allow_failed_imports=False),
        work_dir=str(work_dir),
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor',
                mean=[127.0] * 3,
                std=[58.0] * 3,
                pad_val=0,
                seg_pad_val=255,
                size=(64, 64),
            ),
            backbone=dict(type='FusingBackbone'),
            decode_head=copy.deepcopy(head or UPER),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        ),
        train_dataloader=dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type='InfiniteSampler', shuffle=True),
            dataset=dataset(length),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max_iters)
        ),
        custom_hooks=hooks,
        randomness=dict(seed=0, deterministic=True),
        # mmengine keeps one logger per name and second: two runs of a name would share a log file.
        experiment_name=f'{work_dir.name}_{next(_RUNS)}',
    )
    cfg = Config(base)
    cfg.merge_from_dict(changes)
    return cfg


def runner(work_dir, **options) -> Runner:
    """The runner of :func:`config`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    return Runner.from_cfg(config(work_dir, **options))
