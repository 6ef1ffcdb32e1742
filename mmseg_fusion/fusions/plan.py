"""The changes to the fusion layers of a model, as plain numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from .fold import fold_plan, is_transposed
from .statistics import BranchStatistics
from .trace import Fusion


def plan_equalization(
    fusion: Fusion,
    statistics: BranchStatistics | None,
    equalize_mean: Literal['auto'] | bool = 'auto',
) -> dict[str, Any]:
    """The changes to one fusion layer, as plain numbers.

    Args:
        fusion: the layer.
        statistics: moments of its branches; None for a layer that is not changed and was not
            measured.
        equalize_mean: whether the means go into the layer's bias, if it has one and is no
            transposed convolution: ``'auto'`` if no batch or instance norm behind it removes them,
            True always, False never.

    Returns:
        ``name``, ``channels``, ``sizes`` and ``reason`` of the fusion; per branch the measured
        ``mean`` and ``std``, the ``ratio`` of the std to the largest of the layer, and the
        ``divisor`` of the weight block and the ``offset`` subtracted from the feature, which are 1
        and 0 for a branch that is not changed; and ``bias``, whether the offsets are folded into
        the layer's bias. Without statistics the lists per branch are empty.

    Raises:
        FloatingPointError: a moment is not finite; layer and branch are named.
    """
    mean, std = (statistics.mean, statistics.std) if statistics is not None else ([], [])
    for index, values in enumerate(zip(mean, std)):
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f'Scale equalization: branch {index} of {fusion.name} has mean {values[0]} and '
                f'standard deviation {values[1]}; no weight was changed. Check the training '
                'images for NaN and the loaded weights, or leave the layer out with layers=[...].'
            )
    takes_means = getattr(fusion.conv, 'bias', None) is not None and not is_transposed(fusion.conv)
    bias = not fusion.normalized if equalize_mean == 'auto' else equalize_mean
    done = [fusion.equalizable and s > 0 for s in std]
    return {
        'name': fusion.name,
        'channels': list(fusion.channels),
        'sizes': [list(s) for s in fusion.sizes],
        'mean': mean,
        'std': std,
        'ratio': [s / max(std) if max(std) > 0 else 0.0 for s in std],
        'divisor': [s if d else 1.0 for s, d in zip(std, done)],
        'offset': [m if d else 0.0 for m, d in zip(mean, done)],
        'bias': bool(fusion.equalizable and takes_means and bias),
        'reason': fusion.reason,
    }


def plan_layers(
    fusions: Sequence[Fusion],
    measure: Callable[[], dict[str, BranchStatistics]],
    equalize_mean: Literal['auto'] | bool = 'auto',
    remeasure: bool = False,
) -> list[dict[str, Any]]:
    """Plans the fusion layers of a model, in the order in which they run.

    If the outputs of every fusion go through a norm, which rescales them, one measurement is enough
    for all layers. This is not exact to the last per cent: a norm does not change how smooth a
    feature is, and resizing removes more variance from a rough feature. If the raw output of a
    fusion is used, equalizing the layer changes the input of later layers. These are then measured
    again with the layer equalized (chosen: the paper's heads all have norms, and its algorithm 1
    has one fusion). The weights are restored at the end. Nothing is measured if no layer is to be
    equalized.

    Args:
        fusions: the layers.
        measure: measures all branches of the model as it is, by name of the layer.
        equalize_mean: as for :func:`plan_equalization`.
        remeasure: whether to measure again after every fusion, norm or not.

    Returns:
        The result of :func:`plan_equalization`, per layer.
    """
    before = [(f.conv, copy.deepcopy(f.conv.state_dict())) for f in fusions]
    plans: list[dict[str, Any]] = []
    statistics: dict[str, BranchStatistics] = {}
    try:
        while len(plans) < len(fusions):
            rest = fusions[len(plans) :]
            if any(f.equalizable for f in rest):
                statistics = measure()
            for fusion in rest:
                plan = plan_equalization(fusion, statistics.get(fusion.name), equalize_mean)
                plans.append(plan)
                if plan['reason']:
                    continue
                fold_plan(plan, fusion.conv)
                if remeasure or not fusion.rescaled:
                    break
    finally:
        for layer, state in before:
            layer.load_state_dict(state)
    return plans
