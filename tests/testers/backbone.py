"""Base tester of backbones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .module import ModuleTester
from .toys import level_size, segmentor_config


class BackboneTester(ModuleTester):
    """Checks of a backbone: an image in, a tuple of levels out.

    Attributes:
        backbone: config of the backbone, without pretrained weights: tests have no network.
        out_channels: channels of each level.
        out_strides: stride of each level.
        freezes: the backbone has ``frozen_stages``.
        has_norm_eval: the backbone has ``norm_eval``.
    """

    backbone: dict
    out_channels: Sequence[int]
    out_strides: Sequence[int]
    freezes: bool = True
    has_norm_eval: bool = True
    image_sizes = ((64, 64), (65, 47), (98, 63))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.freezes:
            cls.test_frozen_stages = None
        if not cls.has_norm_eval:
            cls.test_norm_eval = None

    def config(self, **changes: Any) -> dict:
        return copy.deepcopy({**self.backbone, **changes})

    def inputs(self, size: tuple[int, int], batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, *size)

    def check_outputs(self, outputs: tuple[Tensor, ...], size: tuple[int, int], batch: int) -> None:
        assert [tuple(out.shape) for out in outputs] == [
            (batch, c, *level_size(size, s)) for c, s in zip(self.out_channels, self.out_strides)
        ]

    def segmentor(self, **test_cfg: Any) -> Config:
        head = dict(
            type='FCNHead',
            in_channels=self.out_channels[-1],
            in_index=len(self.out_channels) - 1,
            channels=8,
            num_convs=1,
            num_classes=5,
            norm_cfg=dict(type='BN'),
        )
        return segmentor_config(head, self.config(), **test_cfg)

    def test_every_level_depends_on_the_image(self) -> None:
        backbone, image = self.build(), self.inputs(self.image_sizes[0])
        for i, level in enumerate(self.outputs(backbone, image.requires_grad_())):
            (gradient,) = torch.autograd.grad(level.square().sum(), image, retain_graph=True)
            assert gradient.any(), f'level {i} does not depend on the image'

    def test_frozen_stages(self) -> None:
        free, frozen = self.build(), self.build(frozen_stages=1)
        held = [name for name, p in frozen.named_parameters() if not p.requires_grad]
        assert held, 'frozen_stages=1 freezes nothing'
        assert len(held) < len(list(free.named_parameters())), 'frozen_stages=1 freezes everything'
        before = copy.deepcopy(frozen.state_dict())
        image = self.inputs(self.image_sizes[0])
        loss = self.loss(frozen, image, self.image_sizes[0])
        loss.backward()
        torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], 0.1).step()
        after = frozen.state_dict()
        moved = [name for name in held if not torch.equal(before[name], after[name])]
        assert not moved, f'{moved} are frozen and change'
        # The running statistics that belong to frozen parameters are frozen with them.
        prefixes = {name.rpartition('.')[0] for name in held}
        moved = [
            name
            for name in after
            if 'running_' in name
            and name.rpartition('.')[0] in prefixes
            and not torch.equal(before[name], after[name])
        ]
        assert not moved, f'{moved} belong to frozen stages and change'

    def test_norm_eval(self) -> None:
        backbone = self.build(norm_eval=True)
        norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
        assert norms, 'no batch norm: set has_norm_eval = False'
        assert not any(m.training for m in norms), 'norm_eval=True leaves batch norms in training'
