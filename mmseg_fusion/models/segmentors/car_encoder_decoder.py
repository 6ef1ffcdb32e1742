"""Class-aware regularization for any decode head."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import add_prefix
from torch import Tensor, nn

from ...channels import image_channels
from ...fusions import kept_state
from ..layers.class_aware_conv import ClassAwareConv
from ..layers.last_convolution import (
    REPLACEABLE,
    LastConvolutionTracer,
    block_of,
    takes_one_tensor,
)

#: Side of the image, in pixels, on which the convolution before the classifier is looked for. Where
#: a model refuses it, the size of its own data preprocessor is next, and then the second: LRASPP
#: pools over 49 x 49 cells, BEiT takes the one size that it was built for.
TRACED_SIZE, LARGE_SIZE = 64, 512


@MODELS.register_module()
class CAREncoderDecoder(EncoderDecoder):
    """An encoder-decoder whose decode head is trained with class-aware regularization (CAR).

    Thesis chapter 4 (ECCV 2022, arXiv 2203.07160), figure 4.3: the convolution in front of the
    classifier of a decode head is replaced by a
    :class:`~mmseg_fusion.models.layers.ClassAwareConv`, and three losses on its features are added
    in training. Add ``model = dict(type='CAREncoderDecoder', car=dict())`` to a config; the head
    must have a convolution in front of its classifier. Once :func:`merge_car` has merged the two
    1x1 convolutions, the method costs nothing at test.

    ``decode_head`` may be a list as well (a cascade, e.g. OCRNet): its last head is regularized.

    Args:
        car: what to regularize and how:

            - ``layer``: ``'auto'`` (default) finds the convolution whose output reaches the
              classifier only through norm, activation, dropout, resizing and sums. If a sum has
              several (DANet has two), each is replaced and regularized. Otherwise give the dotted
              name of a convolution, of a ``ConvModule`` or of a ``DepthwiseSeparableConvModule``,
              in the model (``'decode_head.bottleneck'``) or in its head (``'bottleneck'``), or a
              list of names.
            - ``channels`` (512): cap on the width of the features that are regularized. The
              authors take 256 for DeepLabV3 and CAA.
            - ``pool`` (1): the features are averaged over ``pool`` x ``pool`` cells before the
              losses. The authors take 2 for UPerNet and OCRNet.
            - ``kernel_size`` (1): of the convolution behind the linear layer; the rows without "A"
              of table 4.1 have 3.
            - ``linear`` (True): False leaves out the linear layer, and with it the losses.
            - ``loss``: config of the losses, default ``dict(type='ClassAwareRegularization')``;
              ``num_classes`` and ``ignore_index`` default to those of the head (2 classes for a
              head with ``out_channels=1``, background and foreground), and ``channels`` of a moving
              average the layer's. None: the architecture without the losses.
            - ``merged`` (False): builds the form for deployment that :func:`merge_car` makes.
        **kwargs: arguments of ``EncoderDecoder`` (``num_stages`` too where ``decode_head`` is a
            list; default: its length).

    Shape:
        As ``EncoderDecoder``. Training losses: ``decode.loss_car_intra_c2p``,
        ``decode.loss_car_inter_c2c``, ``decode.loss_car_inter_c2p``; with several layers the
        layer's number is appended to each key (``_0``, ``_1``), and all losses are summed.

    Raises:
        ValueError: unknown key in ``car``, no such layer, or no single layer before the classifier;
            the candidates are listed.

    Differs from the thesis: a depthwise-separable convolution in front of the classifier is
    replaced as a whole (chosen: the thesis has no such head).

    Example:
        >>> model = CAREncoderDecoder(
        ...     backbone=dict(type='mmseg.ResNetV1c', depth=18),
        ...     decode_head=dict(type='mmseg.FCNHead', in_channels=512, channels=16, num_classes=4),
        ...     car=dict(channels=8),
        ...     train_cfg=dict(),
        ...     test_cfg=dict(mode='whole'),
        ... )
        >>> model.car_layers
        ('decode_head.conv_cat',)
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> CAREncoderDecoder:
        if cls is CAREncoderDecoder and isinstance(kwargs.get('decode_head'), (list, tuple)):
            # What configs had before the cascade had a name.
            cls = CARCascadeEncoderDecoder
        elif isinstance(kwargs.get('decode_head'), (list, tuple)) and not issubclass(
            cls, CascadeEncoderDecoder
        ):
            raise ValueError(
                f'{cls.__name__} got a list of decode heads: derive it from CascadeEncoderDecoder '
                'as well, class Mine(CAREncoderDecoder, CascadeEncoderDecoder)'
            )
        return super().__new__(cls)

    def __init__(self, *, car: dict | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        options = dict(
            layer='auto',
            channels=512,
            pool=1,
            kernel_size=1,
            linear=True,
            loss=dict(type='ClassAwareRegularization'),
            merged=False,
        )
        if car is not None and not isinstance(car, dict):
            raise ValueError(f'car must be a dict such as dict(channels=512), got {car!r}')
        car = dict(car or {})
        unknown = sorted(set(car) - set(options))
        if unknown:
            raise ValueError(
                f'car has no key {", ".join(map(repr, unknown))}; it takes {", ".join(options)}'
            )
        options.update(car)
        layer, pool, loss = (options.pop(key) for key in ('layer', 'pool', 'loss'))
        if not options['linear'] and loss is not None:
            raise ValueError('car.linear=False leaves nothing to regularize: set car.loss=None')
        head = self._last_head()
        if not hasattr(head, 'ignore_index'):
            raise ValueError(
                f'{type(head).__name__} has no ignore_index, so it predicts no classes that CAR '
                "could tell apart: set model.type='EncoderDecoder' and leave out model.car"
            )
        self.car_layers = self._replace(layer, options)
        self.car_loss = None
        if loss is not None and not options['merged']:
            loss = copy.deepcopy(dict(loss))
            loss.setdefault('type', 'ClassAwareRegularization')
            # One logit tells two classes apart: the labels are 0 and 1, whatever num_classes says.
            binary = getattr(head, 'out_channels', None) == 1
            loss.setdefault('num_classes', 2 if binary else head.num_classes)
            loss.setdefault('ignore_index', head.ignore_index)
            loss.setdefault('pool', pool)
            # Each layer has class centres of its own, which a moving average keeps in a buffer.
            self.car_loss = nn.ModuleList()
            for name in self.car_layers:
                linear = self.get_submodule(name).linear
                if loss.get('moving_average') is not None:
                    loss['channels'] = linear.out_channels
                self.car_loss.append(MODELS.build(loss))

    # --- the layer that is replaced --------------------------------------------------------------

    def _last_head(self) -> nn.Module:
        head = self.decode_head
        return head[-1] if isinstance(head, nn.ModuleList) else head

    def _replace(self, layer: str | Sequence[str], options: dict) -> tuple[str, ...]:
        """Puts a ClassAwareConv at each place that ``layer`` names; returns the places."""
        if layer == 'auto':
            names = self._find()
        else:
            names = [layer] if isinstance(layer, str) else list(layer)
            names = list(dict.fromkeys(self._qualified(name) for name in names))
        if not names:
            raise ValueError("car.layer names nothing; set 'auto' or the name of a convolution")
        for name in names:
            parent, _, child = name.rpartition('.')
            old = self.get_submodule(name)
            setattr(self.get_submodule(parent), child, _class_aware(name, old, options))
        return tuple(names)

    def _candidates(self) -> tuple[dict[str, nn.Module], str, list[str]]:
        """The model's modules by name, its head's name, and those of the head's convolutions."""
        modules, head = dict(self.named_modules()), self._last_head()
        prefix = next(n for n, m in modules.items() if m is head)
        classifiers = self._classifiers()
        convs = [
            n
            for n, m in modules.items()
            if n.startswith(f'{prefix}.')
            and isinstance(m, nn.Conv2d)
            and id(m) not in classifiers
            and set(m.stride) == {1}
            and takes_one_tensor(m)
        ]
        return modules, prefix, convs

    def _classifiers(self) -> set[int]:
        """The identities of the classifiers: of the heads, and of those that are inside them."""
        classifiers = (getattr(m, 'conv_seg', None) for m in self.decode_head.modules())
        return {id(m) for m in classifiers if m is not None}

    def _qualified(self, name: str) -> str:
        """The name in the model of the convolution that a user names."""
        modules, head, candidates = self._candidates()
        for full in (name, f'{head}.{name}'):
            # Every convolution of the decode heads but the classifiers; no other is in the pass of
            # the decode head, from which the features are taken.
            module = modules.get(full)
            if full.startswith('decode_head.') and isinstance(module, REPLACEABLE):
                convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
                if id(module) not in self._classifiers() and all(map(takes_one_tensor, convs)):
                    return block_of(modules, full)
        close = difflib.get_close_matches(f'{head}.{name}', candidates, n=3, cutoff=0.6)
        module = modules.get(name, modules.get(f'{head}.{name}'))
        what = 'no module of this model' if module is None else type(module).__name__
        if isinstance(module, nn.Conv2d) and not takes_one_tensor(module):
            what += ', which takes more than a feature'
        raise ValueError(
            f"car.layer must name a convolution of the decode head, not its classifier; '{name}' "
            f'is {what}. '
            f'{"Close to it: " if close else "Convolutions of the head: "}'
            f'{", ".join(close or candidates)}'
        )

    def _find(self) -> list[str]:
        """The convolutions whose output reaches the classifier unmixed."""
        head = self._last_head()
        modules, _, candidates = self._candidates()
        classifier = getattr(head, 'conv_seg', None)
        convolutions = {name: modules[name] for name in candidates}
        try:
            # In eval mode nothing is random, no statistic moves, and batch norm takes a 1x1 map.
            with kept_state(self), torch.no_grad():
                self.eval()
                tracer = self._trace(lambda: LastConvolutionTracer(head, classifier, convolutions))
        except Exception as error:
            if classifier is None:
                raise _no_classifier(head, candidates) from error
            raise ValueError(
                f"car.layer='auto' runs the model once, on an image of {TRACED_SIZE} or "
                f'{LARGE_SIZE} pixels a side or as data_preprocessor.size says, to find the '
                'convolution before the classifier, and that failed with '
                f'{type(error).__name__}: {error}\n{_name_one(candidates)}'
            ) from error
        usable = [name for name in candidates if name in tracer.ran]
        if not tracer.reached:
            raise _no_classifier(head, usable)
        if tracer.blocked or not tracer.sources:
            raise ValueError(
                f"car.layer='auto': between the classifier of {type(head).__name__} and the "
                'convolutions before it there is more than norm, activation, resizing and sums: '
                f'{", ".join(sorted(tracer.blocked))}. {_name_one(usable)}'
            )
        reached = [name for name in usable if name in tracer.sources]
        return list(dict.fromkeys(block_of(modules, name) for name in reached))

    def _trace(self, make: Callable[[], LastConvolutionTracer]) -> LastConvolutionTracer:
        """The tracer of a forward pass on zeros, of the first size that the model takes."""
        own = getattr(self.data_preprocessor, 'size', None)
        sizes = [(TRACED_SIZE, TRACED_SIZE), (LARGE_SIZE, LARGE_SIZE)]
        if own is not None and len(own) == 2:
            sizes.insert(1, tuple(own))
        for size in sizes:
            try:
                with make() as tracer:
                    self._run_heads(size, tracer)
                return tracer
            except Exception:
                if size == sizes[-1]:
                    raise

    def _run_heads(self, size: tuple[int, int], tracer: LastConvolutionTracer) -> None:
        parameter = next(self.parameters())
        shape = (1, image_channels(self), *size)
        image = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
        features = self.extract_feat(image)
        heads = self.decode_head
        previous: tuple = ()
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            given = tracer.own_input((features, *previous))
            previous = (head.forward(*given),)

    # --- training --------------------------------------------------------------------------------

    def _decode_head_forward_train(self, inputs: list[Tensor], data_samples: list) -> dict:
        if self.car_loss is None:
            return super()._decode_head_forward_train(inputs, data_samples)
        labels = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1)
        # Before the head's own loss, which says less about a label that is no class. All criteria
        # have the same classes.
        getattr(self.car_loss[0], 'check_labels', lambda label: None)(labels)
        layers = [self.get_submodule(name) for name in self.car_layers]
        for layer in layers:
            layer.keep_features = True
        try:
            losses = super()._decode_head_forward_train(inputs, data_samples)
            kept = [layer.pop_features() for layer in layers]
        finally:
            for layer in layers:
                layer.keep_features = False
                layer.pop_features()
        for number, (features, criterion) in enumerate(zip(kept, self.car_loss)):
            if features is None or len(features) != len(labels):
                shape = None if features is None else tuple(features.shape)
                raise ValueError(
                    f"car.layer: '{self.car_layers[number]}' gave "
                    f'{"nothing" if shape is None else f"a feature of shape {shape}"} in a '
                    f'training step of {len(labels)} images; name a convolution that every image '
                    'passes once'
                )
            regularization = criterion(features, labels)
            if len(layers) > 1:
                regularization = {f'{key}_{number}': value for key, value in regularization.items()}
            losses.update(add_prefix(regularization, 'decode'))
        return losses


@MODELS.register_module()
class CARCascadeEncoderDecoder(CAREncoderDecoder, CascadeEncoderDecoder):
    """:class:`CAREncoderDecoder` of a cascade, e.g. OCRNet: the last head is regularized.

    ``type='CAREncoderDecoder'`` builds it as well if ``decode_head`` is a list.

    Args:
        decode_head: configs of the heads, in the order in which they run.
        num_stages: their number; default: the length of the list.
        **kwargs: arguments of ``CAREncoderDecoder``.

    Shape:
        As ``CascadeEncoderDecoder``.

    Raises:
        ValueError: ``decode_head`` is no list, or as ``CAREncoderDecoder``.

    Example:
        >>> fcn = dict(type='mmseg.FCNHead', in_channels=512, channels=16, num_classes=4)
        >>> ocr = dict(type='mmseg.OCRHead', ocr_channels=8)
        >>> model = CARCascadeEncoderDecoder(
        ...     backbone=dict(type='mmseg.ResNetV1c', depth=18),
        ...     decode_head=[fcn, {**fcn, **ocr}],
        ...     car=dict(channels=8),
        ...     train_cfg=dict(),
        ...     test_cfg=dict(mode='whole'),
        ... )
        >>> model.car_layers
        ('decode_head.1.object_context_block.bottleneck',)
    """

    def __init__(
        self, *, decode_head: Sequence[dict], num_stages: int | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(decode_head, (list, tuple)):
            raise ValueError(
                'CARCascadeEncoderDecoder needs a list of decode heads: set model.type='
                f"'CAREncoderDecoder' for one, or decode_head=[...]; got {decode_head!r}"
            )
        num_stages = len(decode_head) if num_stages is None else num_stages
        super().__init__(decode_head=decode_head, num_stages=num_stages, **kwargs)


def _no_classifier(head: nn.Module, candidates: Sequence[str]) -> ValueError:
    return ValueError(
        f"car.layer='auto' needs a head that calls its classifier conv_seg; {type(head).__name__} "
        f'does not. {_name_one(candidates)}'
    )


def _name_one(candidates: Sequence[str]) -> str:
    if not candidates:
        return 'This head has no other convolution that CAR could take the place of.'
    return f'Set car.layer to the convolution to replace, one of: {", ".join(candidates)}'


def _class_aware(name: str, old: nn.Module, options: dict) -> ClassAwareConv:
    """What takes the place of ``old``, with its channels, norm and activation."""
    convs = [m for m in old.modules() if isinstance(m, nn.Conv2d)]
    if any(conv._forward_hooks or conv._forward_pre_hooks or [*conv.children()] for conv in convs):
        raise ValueError(
            f"car.layer: '{name}' has hooks or modules of its own (spectral norm, a norm in front "
            'of it such as that of BatchNormAfterUpsampling), which CAR would take away with it'
        )
    if any(set(conv.stride) != {1} for conv in convs):
        raise ValueError(
            f"car.layer: '{name}' has a stride of {tuple(convs[0].stride)}; CAR replaces "
            'convolutions that keep the size of the feature'
        )
    block = old.pointwise_conv if isinstance(old, DepthwiseSeparableConvModule) else old
    if isinstance(block, ConvModule):
        parts = dict(conv_cfg=block.conv_cfg, norm_cfg=block.norm_cfg, act_cfg=block.act_cfg)
    else:
        # What follows a bare convolution stays in the head.
        parts = dict(conv_cfg=None, norm_cfg=None, act_cfg=None)
    # A larger kernel, where that is asked for, is spread as the one that was there.
    dilation = convs[0].dilation[0] if options['kernel_size'] > 1 else 1
    new = ClassAwareConv(
        convs[0].in_channels, convs[-1].out_channels, dilation=dilation, **options, **parts
    )
    # A head in float64, on the meta device or half frozen stays so.
    weight = convs[0].weight
    return new.to(device=weight.device, dtype=weight.dtype)


def merge_car(model: nn.Module) -> nn.Module:
    """Makes every :class:`ClassAwareConv` of a model a single 1x1 convolution, in place.

    In eval mode the logits stay the same up to rounding, and parameters, memory and time are those
    of the head with a plain 1x1 convolution. The losses are removed as well; a merged model is only
    for testing. Its checkpoint loads into the config with ``model.car.merged=True``.

    Args:
        model: a model with :class:`CAREncoderDecoder` somewhere in it, or with ClassAwareConvs.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing to merge, or a convolution that is larger than 1x1.
    """
    layers = [m for m in model.modules() if isinstance(m, ClassAwareConv)]
    if not layers:
        raise ValueError(
            f'{type(model).__name__} has no ClassAwareConv: it was not built by '
            "type='CAREncoderDecoder'"
        )
    for layer in layers:
        layer.merge()
    for module in model.modules():
        if isinstance(module, CAREncoderDecoder):
            module.car_loss = None
    return model
