"""Deterministic runs on a GPU.

mmengine 0.10.7 asks torch to stop at operations that have no deterministic form there. Ends with an
mmengine that passes ``warn_only``.
"""

from __future__ import annotations

import functools
import os

from .quirk import Quirk


def deterministic_on_cuda() -> Quirk | None:
    """``randomness=dict(deterministic=True)`` on a GPU.

    mmengine only switches torch's deterministic algorithms on. On CUDA torch then stops at
    operations without a deterministic form. One of them is the cross entropy of an image, which
    every model here has. Torch also stops at cuBLAS unless ``CUBLAS_WORKSPACE_CONFIG`` is set. Here
    the variable is set if it is not, and operations without a deterministic form warn and run.
    mmseg's cross entropy computes the sum itself, and is repeatable in spite of the warning.
    Adaptive pooling and bilinear resizing sum their gradients in any order.
    """
    from mmengine.device import get_device
    from mmengine.runner import runner

    if get_device() != 'cuda':
        return None
    original = runner.set_random_seed

    @functools.wraps(original)
    def set_random_seed(seed=None, deterministic=False, diff_rank_seed=False):
        import torch

        if deterministic:
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        seed = original(seed, deterministic, diff_rank_seed)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        return seed

    runner.set_random_seed = set_random_seed
    return Quirk(
        'deterministic_on_cuda',
        'deterministic=True: operations without a deterministic form on CUDA warn instead of stop',
        'mmengine that passes warn_only',
    )
