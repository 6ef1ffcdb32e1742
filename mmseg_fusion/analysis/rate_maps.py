"""Feature maps of an atrous pyramid at each of its rates (figure 2.4 of KSAC's thesis).

Any :class:`~mmseg.models.decode_heads.aspp_head.ASPPModule` and any
:class:`~mmseg_fusion.models.layers.KernelSharingAtrousConv` of a segmentor is read through forward
hooks, in any head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from mmseg.models.decode_heads.aspp_head import ASPPModule
from torch import Tensor, nn

from ..models.layers.kernel_sharing import KernelSharingAtrousConv
from .figures import new_figure
from .layer_features import InputError

Pyramid = Union[ASPPModule, KernelSharingAtrousConv]


@dataclass(frozen=True)
class RateMaps:
    """The feature maps of a pyramid on one image, rate by rate.

    Attributes:
        module: dotted name of the pyramid.
        shared: whether one kernel makes the maps of all rates.
        rates: dilation rates in pixels of the map; 1 is a 1x1 convolution in mmseg's ASPP.
        maps: per rate (C, h, w), float32, after norm and activation and before any sum.
        image: (H, W, 3), RGB in bytes, as the network sees it, without normalization and padding.
    """

    module: str
    shared: bool
    rates: tuple[int, ...]
    maps: tuple[Tensor, ...]
    image: np.ndarray


def find_pyramid(model: nn.Module, name: str = 'auto') -> str:
    """Dotted name of the pyramid of a segmentor.

    Args:
        model: a segmentor.
        name: which one, if there are several; ``'auto'`` for the only one.

    Raises:
        InputError: there is none, several, or none of that name.
    """
    names = [n for n, module in model.named_modules() if isinstance(module, Pyramid.__args__)]
    if not names:
        head = type(getattr(model, 'decode_head', None)).__name__
        raise InputError(
            f'{type(model).__name__} with decode head {head} has no pyramid of atrous '
            'convolutions: expected an ASPPModule or a KernelSharingAtrousConv, as in '
            "decode_head.type='ASPPHead', 'DepthwiseSeparableASPPHead' or 'KSACHead'"
        )
    if name != 'auto' and name not in names:
        raise InputError(f'{name!r} (--layer) is no pyramid; there are: {", ".join(names)}')
    if name == 'auto' and len(names) > 1:
        raise InputError(f'name one of the pyramids with --layer: {", ".join(names)}')
    return names[0] if name == 'auto' else name


@contextlib.contextmanager
def captured_rates(pyramid: Pyramid) -> Iterator[list[tuple[Tensor, ...]]]:
    """Inside of the context, every call of the pyramid appends its maps, one per rate, to the list.

    Args:
        pyramid: an ``ASPPModule``, or one that derives from it, or a ``KernelSharingAtrousConv``.
    """
    kept: list[tuple[Tensor, ...]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        # A kernel-sharing pyramid gives the sum alone: its parts are computed once more.
        shared = isinstance(pyramid, KernelSharingAtrousConv)
        kept.append(tuple(pyramid.branches(args[0]) if shared else output))

    handle = pyramid.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def rate_maps(model: nn.Module, batch: Mapping[str, Any], layer: str = 'auto') -> RateMaps:
    """Runs a segmentor on one image and keeps its pyramid's maps.

    The image is processed as a whole, whatever ``test_cfg.mode`` is.

    Args:
        model: a segmentor in evaluation mode.
        batch: one collated sample of a test pipeline.
        layer: dotted name of the pyramid, ``'auto'`` for the only one.

    Raises:
        InputError: there is no such pyramid, or it does not run at test time.
    """
    name = find_pyramid(model, layer)
    if len(batch['inputs']) != 1:
        raise ValueError(f'expected a batch of one image, got {len(batch["inputs"])}')
    # As mmcv reads images.
    image = batch['inputs'][0].cpu().numpy()[::-1].transpose(1, 2, 0)
    data = model.data_preprocessor(batch, False)
    pyramid = model.get_submodule(name)
    with captured_rates(pyramid) as kept:
        model.encode_decode(data['inputs'], [data['data_samples'][0].metainfo])
    if not kept:
        raise InputError(f'{name!r} does not run when {type(model).__name__} predicts')
    return RateMaps(
        module=name,
        shared=isinstance(pyramid, KernelSharingAtrousConv),
        rates=tuple(pyramid.dilations),
        maps=tuple(m[0].float().cpu() for m in kept[-1]),
        image=np.ascontiguousarray(image),
    )


def choose_channels(view: RateMaps, count: int = 25) -> list[list[int]]:
    """The channels to draw, per rate: those that vary most over the image, most first.

    In a kernel-sharing pyramid the same kernel computes channel c at every rate. There the sum over
    the rates counts, and all rates get the same channels. With separate kernels, channel c of
    different rates is unrelated, so each rate gets its own channels.

    Args:
        view: the maps.
        count: how many; fewer if there are fewer channels.
    """
    spread = torch.stack([m.flatten(1).std(1, correction=0) for m in view.maps])
    if view.shared:
        spread = spread.sum(0, keepdim=True).expand_as(spread)
    return spread.argsort(dim=1, descending=True, stable=True)[:, :count].tolist()


def rate_rows(name: str, view: RateMaps) -> list[dict[str, Any]]:
    """The numbers of the picture, one row per rate, over all channels.

    ``spread`` is the standard deviation over the image, a mean over the channels; ``dead`` the
    share of channels that are 0 all over it.
    """
    rows = []
    for rate, maps in zip(view.rates, view.maps):
        flat = maps.flatten(1)
        rows.append(
            dict(
                model=name,
                module=view.module,
                rate=int(rate),
                channels=len(maps),
                size=f'{maps.shape[1]}x{maps.shape[2]}',
                mean=flat.mean().item(),
                spread=flat.std(1, correction=0).mean().item(),
                dead=(flat.abs().amax(1) == 0).float().mean().item(),
            )
        )
    return rows


def _scaled(one: Tensor) -> np.ndarray:
    """A map from 0 to 1: a single map is looked at for its shape, not for its size."""
    low, high = one.min(), one.max()
    return ((one - low) / (high - low).clamp_min(1e-12)).numpy()


def mosaic(maps: Tensor, channels: Sequence[int], columns: int) -> np.ndarray:
    """Maps side by side, each from 0 to 1, a line of NaN between them.

    Args:
        maps: (C, h, w).
        channels: which, row by row.
        columns: maps per row.

    Returns:
        (rows (h + gap) - gap, columns (w + gap) - gap).
    """
    height, width = maps.shape[1:]
    gap = max(1, round(0.06 * max(height, width)))
    rows = -(-len(channels) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for i, channel in enumerate(channels):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = _scaled(maps[channel])
    return sheet


def draw_rate_maps(
    views: Sequence[RateMaps],
    names: Sequence[str],
    path: str | Path,
    title: str = '',
    count: int = 25,
    channels: Sequence[int] | None = None,
) -> None:
    """Figure 2.4: per model and rate a grid of maps, with the marked one enlarged above.

    Args:
        views: one entry per model, on the same image.
        names: of the models.
        path: PNG file to write.
        title: of the picture.
        count: maps per rate.
        channels: which ones, the same at every rate; None for :func:`choose_channels`.

    Raises:
        InputError: a model has no such channel.
    """
    from matplotlib.patches import Rectangle

    for name, view in zip(names, views):
        fewest = min(len(m) for m in view.maps)
        wrong = [c for c in channels or () if not 0 <= c < fewest]
        if wrong:
            raise InputError(
                f'{name}: channel {wrong[0]} was asked for, but there are {fewest}: expected '
                f'numbers from 0 to {fewest - 1} (--channels)'
            )
    height, width = views[0].image.shape[:2]
    ratio = min(max(height / width, 0.5), 2.0)
    rates = sorted({rate for view in views for rate in view.rates})
    side = 2.6
    figure = new_figure(side * (len(rates) + 1), 0.5 + len(views) * (0.7 + 2 * side * ratio))
    blocks = np.atleast_1d(figure.subfigures(len(views), 1, squeeze=True))
    for block, name, view in zip(blocks, names, views):
        kernels = 'one kernel for all rates' if view.shared else 'a kernel for each rate'
        block.suptitle(f'{name}: {kernels}', x=0.01, ha='left', fontsize=11, weight='bold')
        axes = block.subplots(2, len(rates) + 1, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        axes[0][0].imshow(view.image)
        axes[0][0].set_title('image', fontsize=9)
        chosen = (
            choose_channels(view, count) if channels is None else [list(channels)] * len(view.rates)
        )
        c, h, w = view.maps[0].shape
        columns = max(1, round(len(chosen[0]) ** 0.5))
        shown = 'the most varied' if channels is None else 'chosen'
        same = 'the same at every rate' if view.shared or channels else 'of each rate'
        note = (
            f'{len(chosen[0])} of {c} channels:\n{shown},\n{same};\nmaps of {h} x {w},\n'
            'each on its own scale,\nafter norm and activation'
        )
        axes[1][0].text(0.5, 0.98, note, ha='center', va='top', fontsize=8, color='#444')
        for rate in set(rates) - set(view.rates):
            column = axes[:, 1 + rates.index(rate)]
            column[0].text(0.5, 0.5, f'no rate {rate}', ha='center', fontsize=9, color='#888')
        for rate, maps, picked in zip(view.rates, view.maps, chosen):
            large, sheet = axes[:, 1 + rates.index(rate)]
            large.imshow(_scaled(maps[picked[0]]), cmap='viridis', vmin=0, vmax=1)
            # What mmseg's ASPP makes of rate 1.
            kind = ' (1x1)' if rate == 1 and not view.shared else ''
            large.set_title(f'rate {rate}{kind}, channel {picked[0]}', fontsize=9)
            large.add_patch(
                Rectangle((-0.5, -0.5), w, h, fill=False, edgecolor='#d62728', linewidth=2.5)
            )
            sheet.imshow(mosaic(maps, picked, columns), cmap='viridis', vmin=0, vmax=1)
            sheet.add_patch(
                Rectangle((-0.5, -0.5), w, h, fill=False, edgecolor='#d62728', linewidth=1.5)
            )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
