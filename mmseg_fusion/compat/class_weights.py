"""Class weights together with ignored pixels in the cross entropy.

mmsegmentation 1.2.2 stops with an IndexError, onedl-mmsegmentation 1.4.2 with
``avg_non_ignore=True``. Ends with an mmsegmentation whose cross entropy takes both.
"""

from __future__ import annotations

import functools

from .quirk import Quirk


def cross_entropy_class_weight() -> Quirk | None:
    """Class weights together with ignored pixels in mmseg's cross entropy.

    mmseg 1.2.2 looks up the weight of every label, including the ignore index 255, and raises
    IndexError; onedl-mmsegmentation 1.4.2 does so with ``avg_non_ignore=True``. Here the divisor is
    computed over the pixels that are not ignored, as in torch's ``mean`` reduction, and passed to
    mmseg's function. If every pixel is ignored, the loss is 0.

    Must run after :mod:`mmseg.models` can be imported.
    """
    import torch
    from mmseg.models import losses
    from mmseg.models.losses import cross_entropy_loss as module

    original = module.cross_entropy
    logits, label, weight = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]]), torch.ones(2)
    try:
        for avg_non_ignore in (False, True):
            original(
                logits,
                label,
                class_weight=weight,
                ignore_index=255,
                avg_non_ignore=avg_non_ignore,
            )
        return None
    except IndexError:
        pass

    @functools.wraps(original)
    def cross_entropy(
        pred,
        label,
        weight=None,
        class_weight=None,
        reduction='mean',
        avg_factor=None,
        ignore_index=-100,
        avg_non_ignore=False,
    ):
        if class_weight is not None and avg_factor is None and reduction == 'mean':
            avg_factor = class_weight[label[label != ignore_index]].sum()
        return original(
            pred, label, weight, class_weight, reduction, avg_factor, ignore_index, avg_non_ignore
        )

    for place in (module, losses):
        if getattr(place, 'cross_entropy', None) is original:
            place.cross_entropy = cross_entropy
    return Quirk(
        'cross_entropy_class_weight',
        'class_weight works with ignored pixels: the divisor leaves them out',
        'mmsegmentation whose cross entropy takes the ignore index beside class weights',
    )
