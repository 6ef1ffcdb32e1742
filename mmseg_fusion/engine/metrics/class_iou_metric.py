"""IoU of every class as a number that a program can read."""

from __future__ import annotations

import numpy as np
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """MMSegmentation's ``IoUMetric`` that also returns the IoU of every class.

    It takes the same arguments. In addition to ``aAcc``, ``mIoU`` and the other metrics, which are
    rounded to two digits, it returns the IoU of every class as ``IoU.<class>``, in per cent and not
    rounded; a class that is neither in a label nor in a prediction has NaN.

    Example:
        >>> metric = ClassIoUMetric(iou_metrics=['mIoU'])
        >>> metric.dataset_meta = dict(classes=['sky', 'road'])
        >>> hit, union = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])
        >>> predicted, labelled = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0])
        >>> scores = metric.compute_metrics([(hit, union, predicted, labelled)])
        >>> [scores[key] for key in sorted(scores) if key.startswith('IoU')]
        [75.0, 50.0]
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics over all images.

        Args:
            results: of ``process``, one entry per image.

        Returns:
            Per cent by the metric's name.
        """
        metrics = super().compute_metrics(results)
        if self.format_only or 'mIoU' not in self.metrics:
            return metrics
        areas = [sum(column) for column in zip(*results)]
        iou = self.total_area_to_metrics(*areas, ['mIoU'], self.nan_to_num, self.beta)['IoU']
        names = self.dataset_meta['classes']
        metrics.update((f'IoU.{n}', float(v)) for n, v in zip(names, np.asarray(iou) * 100))
        return metrics
