"""Scales of features and gradients at every fusion, before and after scale equalization.

Proposition 3.1 of arXiv 2402.01149 on real images: the gradient of a weight block has the scale of
the feature that it takes, so branches on different scales train at different speeds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from torch import nn

from ..checkpoints import fit, read_checkpoint
from ..fusions import (
    Fusion,
    constants,
    fold_plan,
    install_equalizer,
    measure_branches,
    measuring,
    plan_layers,
    select_fusions,
    split_batches,
)
from ..images import read_sample
from .figures import new_figure

#: The three models that are compared, as they are called in table and chart.
BEFORE, EXPLICIT, FOLDED = 'before', 'equalized', 'folded'


@dataclass
class BranchReport:
    """One branch of one fusion.

    Attributes:
        layer: name of the fusion layer.
        branch: number of the branch in the concatenation.
        channels: its channels.
        size: its spatial size before it was upsampled, in cells.
        mean: its mean at the layer, before equalization.
        std: its standard deviation at the layer; before, and as the weight block sees it behind
            explicit equalizers.
        gradient: root mean square of the loss gradient of its weight block, per variant.
    """

    layer: str
    branch: int
    channels: int
    size: tuple[int, ...]
    mean: float
    std: dict[str, float]
    gradient: dict[str, float]


def gradient_scales(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[Any], torch.Tensor],
    fusions: Sequence[Fusion],
) -> dict[str, list[float]]:
    """Root mean square of the loss gradient of each branch's weight block, per fusion layer.

    The gradient is that of the mean loss over all batches, in the mode of
    :func:`~mmseg_fusion.fusions.measuring`; no ``.grad`` is touched.

    Args:
        model: the model.
        batches: what ``loss`` takes.
        loss: runs the model on one batch and returns the scalar loss.
        fusions: the layers.

    Returns:
        One number per branch, in units of loss per unit of weight, by name of the layer.
    """
    layers = [model.get_submodule(f.name) for f in fusions]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    total = [torch.zeros_like(layer.weight) for layer in layers]
    try:
        # Only these weights: autograd then keeps nothing of the backbone.
        for p, _ in flags:
            p.requires_grad_(False)
        for layer in layers:
            layer.weight.requires_grad_(True)
        with measuring(model), torch.enable_grad():
            for batch in batches:
                # A layer that the loss does not reach has no gradient.
                gradients = torch.autograd.grad(
                    loss(batch), [layer.weight for layer in layers], allow_unused=True
                )
                total = [t if g is None else t + g for t, g in zip(total, gradients)]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    result = {}
    for fusion, gradient in zip(fusions, total):
        gradient = gradient / len(batches)
        groups = getattr(fusion.conv, 'groups', 1)
        if groups > 1:
            # A block of a grouped weight: bring its input channels side by side.
            out, per_group = gradient.shape[:2]
            gradient = gradient.view(groups, out // groups, per_group, -1)
            gradient = gradient.transpose(0, 1).reshape(out // groups, groups * per_group, -1)
        blocks = gradient.split(fusion.channels, 1)
        result[fusion.name] = [b.square().mean().sqrt().item() for b in blocks]
    return result


def scale_report(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Sequence[str] | None = None,
) -> list[BranchReport]:
    """Measures scales of branches and of their gradients before and after equalization.

    The report has two forms of equalization. ``'equalized'`` has explicit equalizers before the
    layer (section 3.2), where proposition 3.1 gives equal scales. ``'folded'`` has their constants
    in the initial weight (equation 9). There the feature, and thus the gradient, is the same as
    before, and the weight is larger by ``1 / std``: a step of SGD moves the effective weight
    ``std^2`` times as far as with explicit equalizers.

    Args:
        model: a segmentor; it is left as it is.
        batches: batches as a data loader gives them, labels included.
        layers: names of fusion layers, or of modules around them, to look at; None for all that
            can be equalized.

    Returns:
        One entry per branch.

    Raises:
        RuntimeError: the decoder fuses nothing by concatenation.
        ValueError: ``layers`` names something that is no fusion layer.
    """

    def total_loss(target: nn.Module) -> Callable[[Any], torch.Tensor]:
        def loss(batch: Any) -> torch.Tensor:
            losses = target._run_forward(target.data_preprocessor(batch, True), mode='loss')
            return target.parse_losses(losses)[0]

        return loss

    traced, statistics = measure_branches(model, batches, total_loss(model))
    candidates = [
        f for f in traced.values() if f.equalizable and f.name.split('.')[0] != 'backbone'
    ]
    if not candidates:
        raise RuntimeError(
            f'the decoder of {type(model).__name__} has no layer that takes features concatenated '
            'along the channels'
        )
    fusions = candidates if layers is None else select_fusions(candidates, layers)
    plans = plan_layers(fusions, lambda: measure_branches(model, batches, total_loss(model))[1])
    gradients = {BEFORE: gradient_scales(model, batches, total_loss(model), fusions)}
    stds = {BEFORE: {f.name: statistics[f.name].std for f in fusions}}
    for variant in (EXPLICIT, FOLDED):
        changed = copy.deepcopy(model)
        for plan in plans:
            layer = changed.get_submodule(plan['name'])
            if variant == EXPLICIT:
                install_equalizer(layer, *constants(plan))
            else:
                fold_plan(plan, layer)
        _, after = measure_branches(changed, batches, total_loss(changed))
        stds[variant] = {name: s.std for name, s in after.items()}
        gradients[variant] = gradient_scales(changed, batches, total_loss(changed), fusions)
    return [
        BranchReport(
            layer=plan['name'],
            branch=i,
            channels=plan['channels'][i],
            size=tuple(plan['sizes'][i]),
            mean=statistics[plan['name']].mean[i],
            std={v: stds[v][plan['name']][i] for v in (BEFORE, EXPLICIT, FOLDED)},
            gradient={v: gradients[v][plan['name']][i] for v in (BEFORE, EXPLICIT, FOLDED)},
        )
        for plan in plans
        for i in range(len(plan['channels']))
    ]


def report_rows(report: Sequence[BranchReport]) -> list[dict[str, Any]]:
    """The report as flat rows, for a table or a CSV file."""
    rows = []
    for entry in report:
        row = {k: v for k, v in asdict(entry).items() if k not in ('std', 'gradient')}
        row['size'] = 'x'.join(map(str, entry.size))
        row.update({f'std {v}': x for v, x in entry.std.items() if v != FOLDED})
        row.update({f'gradient {v}': x for v, x in entry.gradient.items()})
        rows.append(row)
    return rows


def draw_report(report: Sequence[BranchReport], path: str | Path, title: str = '') -> None:
    """Bar chart of the report: one row per fusion layer, feature scale left, gradient right.

    Args:
        report: what :func:`scale_report` returns.
        path: PNG file to write.
        title: of the chart.
    """
    names = list(dict.fromkeys(entry.layer for entry in report))
    figure = new_figure(11, 0.9 + 2.6 * len(names))
    axes = figure.subplots(len(names), 2, squeeze=False)
    colours = {BEFORE: '#9aa5b1', EXPLICIT: '#d9622b', FOLDED: '#2b6ca3'}
    for row, name in zip(axes, names):
        entries = [entry for entry in report if entry.layer == name]
        labels = [f'{e.branch}: {e.channels} ch\n{"x".join(map(str, e.size))}' for e in entries]
        places = range(len(entries))
        for ax, variants, values in (
            (row[0], (BEFORE, EXPLICIT), [e.std for e in entries]),
            (row[1], (BEFORE, EXPLICIT, FOLDED), [e.gradient for e in entries]),
        ):
            width = 0.8 / len(variants)
            for k, variant in enumerate(variants):
                heights = [v[variant] for v in values]
                if ax is row[1]:
                    # A gradient's absolute size says nothing: relative to the layer's largest.
                    heights = [h / (max(heights) or 1.0) for h in heights]
                ax.bar(
                    [p - 0.4 + width * (k + 0.5) for p in places],
                    heights,
                    width * 0.92,
                    color=colours[variant],
                    label=variant,
                )
            ax.set_xticks(list(places), labels, fontsize=8)
            ax.spines[['top', 'right']].set_visible(False)
        row[0].axhline(1.0, color='#444', linewidth=0.8, linestyle=':')
        row[0].set_ylabel('std of the branch', fontsize=9)
        row[1].set_ylabel('gradient of its weights\n(rms, largest = 1)', fontsize=9)
        row[0].set_title(name, fontsize=10, loc='left')
    axes[0][1].legend(fontsize=8, frameon=False, ncols=3, loc='lower right', bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def model_and_batches(
    cfg: Config,
    checkpoint: str | None = None,
    num_images: int = 32,
    batch_size: int | None = None,
    device: str = 'cpu',
    seed: int = 0,
) -> tuple[nn.Module, list[Any]]:
    """The model of a config as training would start it, and batches of its training set.

    Args:
        cfg: an MMSegmentation config.
        checkpoint: weights to load, None for the initial ones.
        num_images: how many training images, drawn without repetition.
        batch_size: images per batch, None for the config's, at least 2.
        device: where the model runs.
        seed: of weights, draw and augmentation.

    Returns:
        Segmentor on ``device`` and a list of collated batches.

    Raises:
        ValueError: fewer than two images are asked for.
        CheckpointError: the checkpoint cannot be read or is that of another model.
        InputError: an image or label cannot be read.
    """
    from mmengine.dataset import pseudo_collate
    from mmengine.model import revert_sync_batchnorm
    from mmengine.runner import set_random_seed

    if num_images < 2:
        raise ValueError(
            f'num_images must be at least 2, got {num_images}: one image alone has no batch '
            'statistics where the decoder pools to 1 x 1'
        )
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    set_random_seed(seed)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint is None:
        model.init_weights()
    else:
        fit(model, read_checkpoint(checkpoint), str(checkpoint))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    size = batch_size or max(2, cfg.train_dataloader.get('batch_size', 2))
    order = torch.randperm(len(dataset))[:num_images].tolist()
    chunks = split_batches(order, size)

    def sample(index: int) -> dict:
        return read_sample(lambda _: dataset[index], dataset.get_data_info(index))

    return model.to(device), [pseudo_collate([sample(i) for i in chunk]) for chunk in chunks]
