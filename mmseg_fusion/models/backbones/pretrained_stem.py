"""Common base of all backbones here: pretrained weights for any number of image channels."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...channels import adapt_stem


class PretrainedStem(BaseModule):
    """A backbone that adapts pretrained RGB weights of its first convolution to other images.

    This happens only in ``init_weights``, if ``init_cfg`` names a checkpoint. A checkpoint of a
    whole model either has the channels of its config or does not fit.
    :func:`~mmseg_fusion.channels.adapt_stem` changes the weights, and the log reports it.

    Raises:
        CheckpointError: the checkpoint's first convolution takes neither 1 nor 3 channels, nor
            those of this one.
    """

    _pretraining = False

    def init_weights(self) -> None:
        """Initializes the weights according to ``init_cfg``."""
        self._pretraining = True
        try:
            super().init_weights()
        finally:
            self._pretraining = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self._pretraining:
            stem = next((name, m) for name, m in self.named_modules() if isinstance(m, nn.Conv2d))
            self._adapt(state_dict, f'{prefix}{stem[0]}.weight', stem[1])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @staticmethod
    def _adapt(state_dict: dict[str, Any], name: str, stem: nn.Conv2d) -> None:
        weight, wanted = state_dict.get(name), tuple(stem.weight.shape)
        # Another width or kernel is another network: mmengine says what does not fit.
        if not isinstance(weight, Tensor) or weight.dim() != 4:
            return
        if (weight.shape[0], *weight.shape[2:]) != (wanted[0], *wanted[2:]):
            return
        state_dict[name] = adapt_stem(weight, stem.in_channels, name)
        if state_dict[name] is not weight:
            print_log(
                f'{name} of the pretrained weights takes {weight.shape[1]} channels, '
                f'{"summed" if stem.in_channels == 1 else "repeated and scaled"} for images of '
                f'{stem.in_channels}',
                logger='current',
            )
