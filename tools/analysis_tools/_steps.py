"""Models of configs, and decode heads on noise, as the benchmarks of GFF and HFGD time them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis.counting import forget_pretrained
from mmseg_fusion.channels import image_channels
from mmseg_fusion.cli import read_config


def read_model(path: str, head_type: str) -> ConfigDict:
    """The model of a config whose decode head is of a type, without its pretrained weights.

    Raises:
        SystemExit: there is no such file, or its decode head is another one.
    """
    # Advice for training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    cfg = read_config(path)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    head = (cfg.get('model') or {}).get('decode_head')
    if not isinstance(head, dict) or head.get('type') != head_type:
        given = head.get('type') if isinstance(head, dict) else head
        raise SystemExit(f'{path}: model.decode_head must be of type {head_type}, got {given}')
    forget_pretrained(cfg.model)
    return cfg.model


def copy_model(model: ConfigDict) -> ConfigDict:
    """A copy that can be changed."""
    return Config(model.to_dict())._cfg_dict


def level_shapes(
    model: ConfigDict, shape: tuple[int, int], batch_size: int
) -> list[tuple[int, ...]]:
    """Shapes of the backbone's levels for a batch of images."""
    with torch.device('meta'):
        backbone = revert_sync_batchnorm(MODELS.build(model.backbone))
        # Not chained: the train() of some backbones returns nothing.
        backbone.eval()
        levels = backbone(torch.empty(batch_size, image_channels(model), *shape))
    return [tuple(level.shape) for level in levels]


def build_head(model: ConfigDict) -> nn.Module:
    """The decode head, for one process."""
    return revert_sync_batchnorm(MODELS.build(model.decode_head))


def noise(shapes: Sequence[tuple[int, ...]], device: str, gradient: bool) -> list[Tensor]:
    """Levels, without negative values as behind ReLU."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.rand(shape, generator=generator).to(device) for shape in shapes]
    return [level.requires_grad_(gradient) for level in levels]


def module_step(
    module: nn.Module,
    inputs: Sequence[Tensor],
    forward: Callable[[], object],
    backward: Callable[[object], None] | None,
) -> Callable[[], None]:
    """A step: forward, and backward to weights and inputs where ``backward`` is given."""

    def train() -> None:
        module.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None
        backward(forward())

    @torch.no_grad()
    def infer() -> None:
        forward()

    module.train(backward is not None)
    return infer if backward is None else train
