"""Functions that heads and necks on several levels share."""

from __future__ import annotations

from collections.abc import Sequence

from mmseg.models.utils import resize
from torch import Tensor


def check_levels(
    head: str, in_channels: Sequence[int], in_index: Sequence[int] | None, kwargs: dict
) -> list[int]:
    """``in_index`` of a head that chooses ``input_transform='multiple_select'`` itself.

    Args:
        head: name of the class, for messages.
        in_channels: channels of the levels, finest first.
        in_index: which of the backbone's levels these are; None for the first ones.
        kwargs: the head's further arguments.

    Raises:
        ValueError: one of the two is no list, they have different lengths, or ``input_transform``
            is given as well.
    """
    if not isinstance(in_channels, (list, tuple)):
        raise ValueError(
            f'{head}: in_channels must list the channels of the levels, finest first, got '
            f'{in_channels!r}'
        )
    if in_index is None:
        in_index = range(len(in_channels))
    elif not isinstance(in_index, (list, tuple)) or len(in_index) != len(in_channels):
        raise ValueError(
            f'{head}: in_index must list one level for each of the {len(in_channels)} entries of '
            f'in_channels, got {in_index!r}'
        )
    if 'input_transform' in kwargs:
        raise ValueError(
            f'{head} takes the levels of in_index one by one: remove input_transform, got '
            f'{kwargs["input_transform"]!r}'
        )
    return list(in_index)


def resize_to(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    r"""Resizes ``x`` bilinearly; returns it as it is if it has that size.

    Args:
        x: a feature.
        size: height and width in cells.
        align_corners: as of :func:`torch.nn.functional.interpolate`.

    Shape:
        (N, C, H, W) to (N, C, \*size).
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return resize(x, tuple(size), mode='bilinear', align_corners=align_corners, warning=False)
