"""The number of image channels of a model, and RGB weights adapted to other images.

Code that makes an image for a model calls :func:`image_channels`. Satellite, medical and depth
images have one, four or twelve channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import CheckpointError, InputError

#: Channels of an image where nothing says another number.
RGB = 3
_NEW = 'Set both to the number of channels of an image'


def image_channels(model: nn.Module | Mapping[str, Any]) -> int:
    """Channels of the images that a segmentor takes.

    This is the number of means in the data preprocessor. If there is none, or a single mean for all
    channels, it is the number of channels that the backbone takes: ``in_channels`` in a config, the
    channels of the first convolution in a model. If neither is given, it is 3.

    Args:
        model: a segmentor, or the ``model`` of a config.
    """
    if isinstance(model, Mapping):
        mean = (model.get('data_preprocessor') or {}).get('mean')
        means = 0 if mean is None else _length(mean)
        channels = _declared(model.get('backbone') or {})[0]
    else:
        mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
        means = 0 if mean is None else mean.numel()
        channels = stem_channels(getattr(model, 'backbone', None))
    return means if means > 1 else channels or RGB


def stem_channels(backbone: nn.Module | None) -> int | None:
    """Input channels of the first convolution of a backbone; None if it has none."""
    if backbone is None:
        return None
    convs = (m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    return next((conv.in_channels for conv in convs), None)


def check_channels(model: Mapping[str, Any]) -> None:
    """Raises an error if data preprocessor and backbone of a config disagree on the channels.

    Torch would fail in the first step, and would not name the keys. The check ignores a segmentor
    or a data preprocessor that may combine channels itself, and a backbone without ``in_channels``.
    A single mean holds for all channels.

    Args:
        model: the ``model`` of a config.

    Raises:
        InputError: ``mean`` and ``std`` differ in length, or ``mean`` and ``backbone.in_channels``.
    """
    preprocessor = model.get('data_preprocessor') or {}
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    if mean is None or not _takes_images_as_they_are(model, preprocessor):
        return
    means = _length(mean)
    if std is not None and means > 1 and _length(std) not in (1, means):
        raise InputError(
            f'model.data_preprocessor.mean has {means} values and std {_length(std)}: expected '
            'one of each per channel of an image'
        )
    channels, how = _declared(model.get('backbone') or {})
    if channels is not None and means not in (1, channels):
        raise InputError(
            f'model.data_preprocessor.mean has {means} values, one per channel of an image, but '
            f'model.backbone.in_channels is {channels}{how}. {_NEW}.'
        )


def check_in_channels(backbone: str, in_channels: Any) -> None:
    """Raises an error if ``in_channels`` of a backbone is not a number of channels.

    Raises:
        ValueError: it is not a whole number of at least 1.
    """
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(
            f'{backbone}: in_channels is the number of channels of an image, at least 1, but got '
            f'{in_channels!r}; change model.backbone.in_channels'
        )


def adapt_stem(weight: Tensor, channels: int, name: str = 'stem') -> Tensor:
    """The weight of a pretrained first convolution for images of another number of channels.

    For one channel the kernels of the channels are summed: a grey image gives the same output as
    with three equal channels. For more channels the kernels are repeated in turn and scaled by the
    old number over the new number, so that the sums stay equal. If the new number is a multiple, an
    RGB image that is repeated in turn gives the same output as before. Both as in timm.

    Args:
        weight: (C_out, 1 or 3, kH, kW).
        channels: of the new images.
        name: of the weight, for the message.

    Returns:
        (C_out, channels, kH, kW); ``weight`` itself where nothing changes.

    Raises:
        CheckpointError: ``weight`` takes neither RGB nor grey images: the channels of other sensors
            have no order that could be repeated.
    """
    given = weight.shape[1]
    if given == channels:
        return weight
    if given not in (1, RGB):
        raise CheckpointError(
            f'the pretrained {name} takes {given} channels and model.backbone.in_channels is '
            f'{channels}: only weights for 1 or 3 channels are summed or repeated. Set '
            f'model.backbone.in_channels={given}, delete {name} from the checkpoint to start with '
            'a random one, or set model.backbone.init_cfg=None.'
        )
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight)
    repeated = weight.float().repeat(1, -(-channels // given), 1, 1)[:, :channels]
    return (repeated * (given / channels)).to(weight)


def _length(value: Any) -> int:
    return len(value) if hasattr(value, '__len__') else 1


def _class_of(name: Any) -> type | None:
    """What a config names as a type."""
    import mmseg.models  # noqa: F401  (registers)
    from mmseg.registry import MODELS

    named = MODELS.get(name) if isinstance(name, str) else name
    return named if inspect.isclass(named) else None


def _declared(backbone: Mapping[str, Any]) -> tuple[int | None, str]:
    """``in_channels`` of a backbone's config, or the default of its class; None without either."""
    if isinstance(backbone.get('in_channels'), int):
        return backbone['in_channels'], ''
    kind = _class_of(backbone.get('type'))
    for base in kind.__mro__ if kind else ():
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        if 'in_channels' in parameters:
            default = parameters['in_channels'].default
            known = default if isinstance(default, int) else None
            return known, f', the default of {base.__name__}'
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return None, ''


def _takes_images_as_they_are(model: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> bool:
    """Whether MMSegmentation's own code brings an image to the backbone."""
    from mmseg.models import EncoderDecoder, SegDataPreProcessor

    segmentor = _class_of(model.get('type'))
    return (
        _class_of(preprocessor.get('type')) is SegDataPreProcessor
        and segmentor is not None
        and getattr(segmentor, 'extract_feat', None) is EncoderDecoder.extract_feat
    )
