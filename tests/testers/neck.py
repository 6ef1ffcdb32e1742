"""Base tester of necks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .module import ModuleTester, check_convolutions, marked_convolution, places
from .toys import level_size, segmentor_config, toy_features


class NeckTester(ModuleTester):
    """Checks of a neck: a list of levels in, a tuple of levels out.

    Attributes:
        neck: config of the neck; ``in_channels`` may be left out.
        channels: channels of the levels that the backbone gives.
        strides: their strides.
        out_channels: channels of each level that comes out.
        out_strides: stride of each level that comes out; None where the neck promises none.
        unused_levels: levels that the neck leaves out on purpose.
        takes_norm_cfg: the neck has ``norm_cfg`` and must have no other batch norm.
        takes_act_cfg: the neck has ``act_cfg`` and must have no other activation.
        takes_conv_cfg: the neck has ``conv_cfg`` and must have no other convolution.
        plain_convolutions: patterns (fnmatch) of convolutions that ``conv_cfg`` does not reach, as
            the neck says.
        in_channels_type: some necks accept a list, some a tuple only.
    """

    neck: dict
    channels: Sequence[int] = (8, 16, 32, 64)
    strides: Sequence[int] = (4, 8, 16, 32)
    out_channels: Sequence[int]
    out_strides: Sequence[int] | None = None
    unused_levels: tuple[int, ...] = ()
    takes_norm_cfg: bool = True
    takes_act_cfg: bool = True
    takes_conv_cfg: bool = True
    plain_convolutions: tuple[str, ...] = ()
    in_channels_type: type = list

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.takes_norm_cfg:
            cls.test_honours_norm_cfg = None
        if not cls.takes_act_cfg:
            cls.test_honours_act_cfg = None
        if not cls.takes_conv_cfg:
            cls.test_honours_conv_cfg = None

    def config(self, **changes: Any) -> dict:
        cfg = dict(in_channels=self.in_channels_type(self.channels))
        return copy.deepcopy({**cfg, **self.neck, **changes})

    def inputs(self, size: tuple[int, int], batch: int = 2) -> list[Tensor]:
        return toy_features(self.channels, self.strides, size, batch)

    def check_outputs(self, outputs: tuple[Tensor, ...], size: tuple[int, int], batch: int) -> None:
        assert [out.shape[:2] for out in outputs] == [(batch, c) for c in self.out_channels]
        if self.out_strides is not None:
            assert [tuple(out.shape[2:]) for out in outputs] == [
                level_size(size, stride) for stride in self.out_strides
            ]

    def segmentor(self, **test_cfg: Any) -> Config:
        backbone = dict(type='TinyPyramid', channels=self.channels, strides=self.strides)
        head = dict(
            type='FCNHead',
            in_channels=list(self.out_channels),
            in_index=list(range(len(self.out_channels))),
            input_transform='resize_concat',
            channels=8,
            num_convs=1,
            num_classes=5,
            norm_cfg=dict(type='BN'),
        )
        return segmentor_config(head, backbone, self.config(), **test_cfg)

    def test_gradient_reaches_every_level(self) -> None:
        size = self.image_sizes[0]
        neck, inputs = self.build(), [x.requires_grad_() for x in self.inputs(size)]
        self.loss(neck, inputs, size).backward()
        for i, x in enumerate(inputs):
            if i in self.unused_levels:
                continue
            used = x.grad is not None and x.grad.any()
            assert used, f'level {i} is not used'

    def test_honours_norm_cfg(self) -> None:
        neck = self.build(norm_cfg=dict(type='GN', num_groups=2))
        found = places(neck, nn.GroupNorm)
        assert found, 'norm_cfg is not used'
        left = places(neck, _BatchNorm)
        assert not left, f'{left} stay although norm_cfg asks for GN'
        assert found == places(self.build(norm_cfg=dict(type='BN')), _BatchNorm)
        with torch.no_grad():
            self.outputs(neck, self.inputs(self.image_sizes[0]))

    def test_honours_act_cfg(self) -> None:
        neck = self.build(act_cfg=dict(type='LeakyReLU', negative_slope=0.2))
        found = places(neck, nn.LeakyReLU)
        assert found, 'act_cfg is not used'
        assert not places(neck, nn.ReLU), 'a ReLU stays although act_cfg asks for LeakyReLU'
        assert found == places(self.build(act_cfg=dict(type='ReLU')), nn.ReLU)
        with torch.no_grad():
            self.outputs(neck, self.inputs(self.image_sizes[0]))

    def test_honours_conv_cfg(self) -> None:
        with marked_convolution() as marked:
            neck = self.build(conv_cfg=dict(type=marked.__name__))
            with torch.no_grad():
                self.outputs(neck, self.inputs(self.image_sizes[0]))
        check_convolutions(neck, marked, self.plain_convolutions)
