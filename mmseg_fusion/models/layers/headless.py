"""A decode head inside a decode head: its feature, without its classifier."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from typing import Any

from mmseg.models.decode_heads import DPTHead, EncHead, LRASPPHead, SETRMLAHead
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

#: Settings that act on what is taken off: the head around it has its own.
_TAKEN_OFF = ('loss_decode', 'sampler', 'dropout_ratio')
#: Settings that are those of the head around it.
_SHARED = ('num_classes', 'ignore_index', 'out_channels', 'threshold')
#: What else a head needs that cannot be built.
_NEEDS = {
    LRASPPHead: "LRASPPHead takes several levels: set input_transform='multiple_select', in_index "
    'to a list of three levels (of more: branch_channels to a tuple of one number fewer)',
    SETRMLAHead: 'SETRMLAHead takes several levels, and its channels are their number times '
    'mla_channels: set channels, or mla_channels',
}


def _key(owner: str, name: str) -> str:
    return f'{owner.split()[-1]}.{name}'


def check_head(owner: str, cfg: dict) -> None:
    """``cfg`` is the config of a head.

    Args:
        owner: as of :func:`build_headless`.
        cfg: what was given.

    Raises:
        ValueError: it is no dict with a type.
    """
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(
            f"{owner} must be the config of a decode head, such as dict(type='PSPHead'), "
            f'got {cfg!r}'
        )


def build_headless(
    owner: str, cfg: dict, *, cascaded: bool = False, **defaults: Any
) -> tuple[nn.Module, int]:
    """Builds a decode head that returns the features that it would classify.

    This is for methods that contain another head: pyramid pooling or ASPP as the context of GFF,
    any upsampler or encoder in HFGD. An ``nn.Identity`` replaces the classifier and the dropout
    (``conv_seg``, ``dropout``), which the outer head has. All other weights keep their names.
    :func:`feature_of` runs the head.

    Args:
        owner: class and key of the outer head, for messages, e.g. ``'GFFHead: context'``.
        cfg: config of a ``BaseDecodeHead`` whose forward pass ends in ``cls_seg(features)``. A head
            with additional losses is accepted if it has ``feature_and_losses``, see
            :func:`feature_of`.
        cascaded: whether the head may be one that refines the prediction of another head.
        **defaults: arguments that ``cfg`` need not give.

    Returns:
        The head, and the number of channels of its features.

    Raises:
        ValueError: ``cfg`` is no config of a head; the head has no ``conv_seg``, has additional
            losses that would be lost, or cannot be built; a setting of ``cfg`` would have no
            effect, or contradicts the outer head. The message names the owner, the class and the
            key.
    """
    check_head(owner, cfg)
    kind = cfg['type'] if not isinstance(cfg['type'], str) else MODELS.get(cfg['type'])
    name = getattr(kind, '__name__', str(cfg['type']))
    if kind is None:
        raise ValueError(
            f'{owner}: {cfg["type"]!r} is not registered: set {_key(owner, "type")} to a decode '
            'head'
        )
    if inspect.isclass(kind):
        _check_kind(owner, kind, cfg, cascaded)
    _check_settings(owner, name, cfg, defaults)
    try:
        head = MODELS.build({**defaults, **cfg})
    except Exception as error:
        raise ValueError(_cannot_be_built(owner, name, {**defaults, **cfg}, error)) from error
    if not inspect.isclass(kind):
        # A function that builds a head.
        kind, name = type(head), type(head).__name__
        _check_kind(owner, kind, cfg, cascaded)
    classifier = getattr(head, 'conv_seg', None)
    if not isinstance(classifier, nn.Conv2d):
        raise ValueError(
            f'{owner} must be a decode head that classifies with conv_seg, and {name} does not: '
            f'set {_key(owner, "type")} to another one'
        )
    head.conv_seg = nn.Identity()
    head.dropout = nn.Identity()
    return head, classifier.in_channels


def _check_kind(owner: str, kind: type, cfg: dict, cascaded: bool) -> None:
    """A head of this class can be inside another one."""
    name = kind.__name__
    if not issubclass(kind, BaseDecodeHead):
        raise ValueError(
            f'{owner} must be a decode head that classifies with conv_seg, and {name} is none: set '
            f'{_key(owner, "type")} to one such as PSPHead'
        )
    if issubclass(kind, DPTHead):
        raise ValueError(
            f'{owner}: {name} takes pairs of a feature and a class token, which only a vision '
            'transformer with output_cls_token=True gives; the levels here are features: set '
            f'{_key(owner, "type")} to another head on several levels, such as UPerHead'
        )
    bases = (BaseDecodeHead, BaseCascadeDecodeHead)
    own = [
        method
        for method in ('loss', 'loss_by_feat')
        if all(getattr(kind, method) is not getattr(base, method) for base in bases)
    ]
    silenced = issubclass(kind, EncHead) and not cfg.get('use_se_loss', True)
    if own and not silenced and not hasattr(kind, 'feature_and_losses'):
        remedy = f'{_key(owner, "use_se_loss")}=False, or ' if issubclass(kind, EncHead) else ''
        raise ValueError(
            f'{owner}: {name} has losses of its own ({name}.{own[0]}), which would be lost there: '
            f'set {remedy}{_key(owner, "type")} to another head, or give {name} a method '
            'feature_and_losses(inputs, batch_data_samples), which returns both'
        )
    if issubclass(kind, BaseCascadeDecodeHead) and not cascaded:
        raise ValueError(
            f'{owner}: {name} refines the prediction of another head, and there is none here: set '
            f'{_key(owner, "type")} to a head that needs none'
        )


def _check_settings(owner: str, name: str, cfg: dict, around: dict) -> None:
    """Every setting of ``cfg`` does something, or is that of the head around it."""
    for key in _TAKEN_OFF:
        if key in cfg:
            raise ValueError(
                f'{owner}: {key} of {name} would do nothing, since its classifier, with dropout '
                f'and loss, is taken off: remove {_key(owner, key)}, and set {key} of the head '
                'around it'
            )
    for key in _SHARED:
        if key in cfg and key in around and cfg[key] != around[key]:
            raise ValueError(
                f'{owner}: {key} of {name} is that of the head around it, {around[key]!r}, got '
                f'{cfg[key]!r}: remove {_key(owner, key)}'
            )


def _cannot_be_built(owner: str, name: str, cfg: dict, error: Exception) -> str:
    kind = MODELS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
    needs = [
        text for base, text in _NEEDS.items() if inspect.isclass(kind) and issubclass(kind, base)
    ]
    levels = (
        f'Where the levels are the reason, set {_key(owner, "in_index")} to a number for a head on '
        'one level, to a list for one on several'
    )
    return (
        f'{owner}: {name} cannot be built with in_channels={cfg.get("in_channels")}, '
        f'in_index={cfg.get("in_index")}, channels={cfg.get("channels")}: {_reason(error)}. '
        f'{needs[0] if needs else levels}'
    )


def _reason(error: Exception) -> str:
    """What an error says, which may be nothing."""
    if str(error):
        return str(error)
    if isinstance(error, AssertionError):
        # MMSegmentation's assertions have no message: their source says what was expected.
        line = traceback.extract_tb(error.__traceback__)[-1].line or ''
        if line.startswith('assert '):
            return f'expected {line.removeprefix("assert ")}'
    return type(error).__name__


def with_levels(owner: str, cfg: dict, in_index: Sequence[int], in_channels: Sequence[int]) -> dict:
    """Config of an inner head, completed by the backbone's levels that it takes.

    Args:
        owner: as of :func:`build_headless`.
        cfg: config of the head; its ``in_index`` counts the backbone's levels, and defaults to the
            last level of the outer head. A negative number counts from that level.
        in_index: the backbone's levels that the outer head takes.
        in_channels: their channels.

    Returns:
        ``cfg`` with ``in_index`` and ``in_channels``; ``in_index`` is not changed if both are
        given.

    Raises:
        ValueError: ``cfg`` is no config, or has no ``in_channels`` and an unknown level.
    """
    check_head(owner, cfg)
    index = cfg.get('in_index', in_index[-1])
    if 'in_channels' in cfg:
        return dict(cfg, in_index=index)
    known = dict(zip(in_index, in_channels))
    # From the last level on.
    last = {i: in_index[i] for i in range(-len(in_index), 0)}
    many = isinstance(index, (list, tuple))
    places = [i if i in known else last.get(i) for i in (index if many else [index])]
    if None in places:
        raise ValueError(
            f'{owner}: {cfg["type"]} has in_index={index!r}, and in_index={list(in_index)} of the '
            f'head around it does not say the channels of that: set {_key(owner, "in_channels")}'
        )
    channels = [known[i] for i in places]
    if many:
        return dict(cfg, in_index=places, in_channels=channels)
    return dict(cfg, in_index=places[0], in_channels=channels[0])


def feature_of(
    owner: str, head: nn.Module, inputs: Sequence[Tensor], *previous: Tensor, samples: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Feature and additional losses of a head that :func:`build_headless` made.

    A head with losses in addition to those of its classifier, such as the affinity loss of
    ``CPHead``, has a method ``feature_and_losses(inputs, batch_data_samples)``. It returns the
    input of the classifier, and these losses by name.

    Args:
        owner: as of :func:`build_headless`.
        head: the head.
        inputs: what it takes.
        *previous: the prediction that a cascaded head refines.
        samples: the labels, in training.

    Returns:
        The feature, and the losses, which are empty without ``samples``. Each name begins with the
        last word of ``owner`` and an underscore.

    Raises:
        ValueError: the head has no single output.
        RuntimeError: the head cannot run on these levels, for example because they differ in size.
    """
    try:
        return _run(owner, head, inputs, previous, samples)
    except RuntimeError as error:
        # Subclasses say what they are: no memory, a graph that cannot be compiled.
        if type(error) is not RuntimeError:
            raise
        raise RuntimeError(_cannot_run(owner, head, inputs, error)) from error


def _cannot_run(owner: str, head: nn.Module, inputs: Sequence[Tensor], error: Exception) -> str:
    # A backbone may give pairs of a map and a token.
    maps = [x for x in inputs if isinstance(x, Tensor)]
    levels = ', '.join('x'.join(map(str, x.shape[1:])) for x in maps)
    return (
        f'{owner}: {type(head).__name__} with in_index={getattr(head, "in_index", None)} cannot '
        f'run on levels of {levels} (channels, height, width): {str(error).rstrip(".")}. Where the '
        f'sizes of the levels are the reason, set {_key(owner, "in_index")} to levels that the '
        f'head can take, or {_key(owner, "type")} to another head'
    )


def _run(
    owner: str, head: nn.Module, inputs: Sequence[Tensor], previous: Sequence[Tensor], samples: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    losses: dict[str, Tensor] = {}
    if samples is not None and hasattr(head, 'feature_and_losses'):
        feature, own = head.feature_and_losses(inputs, samples)
        place = owner.split()[-1]
        losses = {f'{place}_{name}': value for name, value in own.items()}
    else:
        feature = head(inputs, *previous)
    if not isinstance(feature, Tensor):
        raise ValueError(
            f'{owner} must be a decode head with one output, and {type(head).__name__} returned '
            f'{type(feature).__name__}: set {_key(owner, "type")} to another one'
        )
    return feature, losses
