"""Finds where a module concatenates features and which layer fuses them.

No head is known by name: one forward pass is watched through a
:class:`torch.overrides.TorchFunctionMode`, and the results of ``torch.cat`` along the channels are
followed to the convolution or linear layer that takes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .state import kept_state


@dataclass(eq=False)
class Fusion:
    """A layer that fuses concatenated features (equation 5 of arXiv 2402.01149).

    Attributes:
        name: qualified name of the layer below the traced module, e.g. ``fpn_bottleneck.conv``.
        conv: the layer that takes the concatenation, a convolution or a linear layer.
        channels: channels of each branch, in the order of the concatenation.
        sizes: spatial size (h, w) of each branch, in cells, before the resize that brought it to
            the size of the concatenation; a branch that was not resized has that size itself.
        called: whether the layer itself was called; its weight may also be used by other code.
        normalized: whether the layer's output goes straight into batch or instance norm, which
            takes out any constant per channel.
        rescaled: whether it goes straight into any norm, which sets its scale anew.
        reason: why the layer is left alone, empty if it can be equalized.
    """

    name: str
    conv: nn.Module
    channels: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    called: bool = True
    normalized: bool = False
    rescaled: bool = False
    reason: str = ''

    @property
    def equalizable(self) -> bool:
        """Whether a scale per branch can be folded into the layer, and matters to it."""
        return not self.reason

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The branches of the layer's input ``x``: (N, C, ...), for a linear layer (..., C)."""
        return x.split(self.channels, dim=1 if self.conv.weight.dim() > 2 else -1)


@dataclass(frozen=True)
class _Concatenation:
    dim: int
    channels: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]

    def moved(self, dim: int) -> _Concatenation:
        return _Concatenation(dim, self.channels, self.sizes)


# Matched by name, since one operation has several entry points: torch.relu, F.relu, Tensor.relu_.
_CAT = frozenset(('cat', 'concat', 'concatenate'))
_TRANSPOSED = frozenset(('conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d'))
_CONV = frozenset(('conv1d', 'conv2d', 'conv3d')) | _TRANSPOSED
_RESIZE = frozenset(('interpolate', 'upsample', 'grid_sample'))
_RESHAPE = frozenset(('reshape', 'view', 'flatten', 'unflatten'))
_MOVE = frozenset(('transpose', 'swapaxes', 'swapdims', 'permute', 'movedim', 'moveaxis'))
_CHANNEL_NORM = frozenset(('batch_norm', 'instance_norm'))
_NORM = _CHANNEL_NORM | {'group_norm', 'layer_norm'}
# What leaves every channel in its place, so that the branches can still be told apart.
_UNMIXED = (
    'dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout '
    'relu relu6 leaky_relu elu selu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh '
    'softplus prelu clamp contiguous clone to float half double bfloat16 type type_as cpu cuda '
    'detach pad max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d group_norm '
    'layer_norm mul multiply div __mul__ __rmul__ __imul__ __truediv__'
)
_IN_PLACE = frozenset(_UNMIXED.split()) | _RESIZE | _CHANNEL_NORM
# Likewise, but only with something smaller: the sum of two features is a new feature.
_SHIFT = frozenset('add sub subtract __add__ __sub__ __radd__ __iadd__ __isub__'.split())


def _name(function: Callable) -> str:
    name = getattr(function, '__name__', '')
    return name if name.startswith('__') else name.strip('_')


def _argument(args: tuple, kwargs: dict, position: int, *names: str, default=None):
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[position] if len(args) > position else default


class FusionTracer(TorchFunctionMode):
    """Watches the forward passes inside ``with FusionTracer(root):`` for fusions.

    Args:
        root: the module whose layers are looked for; names are relative to it.
        on_input: called as ``on_input(fusion, x)`` whenever a fusion layer takes a concatenation
            ``x`` that splits as ``fusion.channels`` says: (N, C, ...), for a linear layer
            (..., C).

    A layer that computes its maps in a form that hides what it takes says so itself: if it has a
    method ``while_traced``, the context manager that this returns is entered meanwhile.
    """

    def __init__(
        self, root: nn.Module, on_input: Callable[[Fusion, Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self._found: dict[str, Fusion] = {}
        self._on_input = on_input
        self._owners = {
            id(parameter): (name, module)
            for name, module in root.named_modules()
            for key, parameter in module._parameters.items()
            if key == 'weight' and parameter is not None
        }
        self._layers = [
            (n, m)
            for n, m in root.named_modules()
            if isinstance(m, (_ConvNd, nn.Linear)) or 'weight' in m._parameters
        ]
        self._disguised = [m for m in root.modules() if callable(getattr(m, 'while_traced', None))]
        self._running: list[tuple[str, nn.Module]] = []
        self._alone: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._concatenations = WeakTensorKeyDictionary()
        self._sources = WeakTensorKeyDictionary()
        self._outputs = WeakTensorKeyDictionary()

    @property
    def fusions(self) -> list[Fusion]:
        """The fusions seen so far, in the order in which they ran."""
        for name in self._alone & self._found.keys():
            if not self._found[name].reason:
                self._found[name].reason = 'it also takes inputs that are not concatenated'
        return list(self._found.values())

    def __enter__(self) -> FusionTracer:
        # Names the layer for weights that are computed on the fly (weight standardization,
        # parametrizations), which no parameter's identity gives away.
        self._handles = []
        for name, module in self._layers:
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda m, _, entry=(name, module): self._running.append(entry)
                )
            )
            self._handles.append(module.register_forward_hook(lambda *_: self._pop()))
        self._undisguised = contextlib.ExitStack()
        for module in self._disguised:
            self._undisguised.enter_context(module.while_traced())
        return super().__enter__()

    def _pop(self) -> None:
        self._running.pop()

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._undisguised.close()
        self._running.clear()
        self._reset()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(func)
        if name in _CONV or name == 'linear':
            return self._consume(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if not args:
            # Compiled functions keep keywords: torch.cat(tensors=...), torch.relu(input=...).
            kwargs = dict(kwargs)
            args = tuple(kwargs.pop(k) for k in ('tensors', 'input') if k in kwargs)
        if not isinstance(out, Tensor) or not args:
            return out
        if name in _CAT:
            self._concatenate(out, args, kwargs)
        elif isinstance(args[0], Tensor):
            self._follow(func, name, out, args, kwargs)
        return out

    def _concatenate(self, out: Tensor, args: tuple, kwargs: dict) -> None:
        dim = _argument(args, kwargs, 1, 'dim', 'axis', default=0) % max(out.dim(), 1)
        channels, sizes = [], []
        for part in args[0]:
            inner = self._concatenations.get(part)
            if inner is not None and inner.dim == dim:
                channels += inner.channels
                sizes += inner.sizes
            elif part.numel():
                channels.append(part.shape[dim])
                sizes.append(self._source(part, dim))
        if len(channels) > 1:
            self._concatenations[out] = _Concatenation(dim, tuple(channels), tuple(sizes))

    def _source(self, x: Tensor, dim: int) -> tuple[int, ...]:
        known = self._sources.get(x)
        return known if known is not None else tuple(x.shape[1:dim] + x.shape[dim + 1 :])

    def _follow(self, func: Callable, name: str, out: Tensor, args: tuple, kwargs: dict) -> None:
        x = args[0]
        if name in _NORM and x in self._outputs:
            self._outputs[x].rescaled = True
            self._outputs[x].normalized |= name in _CHANNEL_NORM
        if name in _SHIFT:
            other = args[1] if len(args) > 1 else kwargs.get('other')
            if isinstance(other, Tensor) and other.numel() == out.numel():
                return
        if name in _IN_PLACE or name in _SHIFT:
            # A gate may come first: gate * x.
            others = [a for a in args[1:2] if isinstance(a, Tensor) and a.shape == out.shape]
            for origin in (x, *others):
                found = self._concatenations.get(origin)
                if found is not None and out.dim() > found.dim:
                    if out.shape[found.dim] == sum(found.channels):
                        self._concatenations[out] = found
                    break
            source = self._sources.get(x)
            if source is None and name in _RESIZE:
                source = tuple(x.shape[2:])
            if source is not None and out is not x:
                self._sources[out] = source
            return
        found = self._concatenations.get(x)
        if found is None:
            return
        if name in _RESHAPE:
            if out.shape[: found.dim + 1] == x.shape[: found.dim + 1]:
                self._concatenations[out] = found
        elif name in _MOVE:
            # Sizes that are all different tell where each dimension goes.
            marked = torch.empty(tuple(range(2, 2 + x.dim())), device='meta')
            moved = func(marked, *args[1:], **kwargs)
            self._concatenations[out] = found.moved(moved.shape.index(2 + found.dim))

    def _consume(self, func, name: str, args: tuple, kwargs: dict):
        x = _argument(args, kwargs, 0, 'input')
        weight = _argument(args, kwargs, 1, 'weight')
        found = self._concatenations.get(x)
        owner = self._owners.get(id(weight))
        computed = owner is None
        if computed and self._running:
            owner = self._running[-1]
        if found is not None and found.dim != (1 if name in _CONV else x.dim() - 1):
            found = None
        fusion = None
        if owner is not None and found is not None:
            fusion = self._record(*owner, found, computed)
            fusion.called &= bool(self._running) and self._running[-1][0] == owner[0]
            if name in _TRANSPOSED and not fusion.reason:
                fusion.reason = 'transposed convolution, whose weight is laid out the other way'
            if self._on_input is not None and fusion.channels == found.channels:
                self._on_input(fusion, x)
        elif owner is not None:
            self._alone.add(owner[0])
        out = func(*args, **kwargs)
        if fusion is not None:
            self._outputs[out] = fusion
        return out

    def _record(
        self, name: str, module: nn.Module, found: _Concatenation, computed: bool
    ) -> Fusion:
        fusion = self._found.get(name)
        if fusion is None:
            reason = ''
            groups = getattr(module, 'groups', 1)
            if computed:
                reason = 'its weight is computed from other tensors, so nothing can be folded in'
            elif groups > 1 and groups == sum(found.channels):
                reason = 'depthwise: it mixes no channels, and a norm after it undoes any scale'
            fusion = Fusion(name, module, found.channels, found.sizes, reason=reason)
            self._found[name] = fusion
        elif fusion.channels != found.channels and not fusion.reason:
            fusion.reason = (
                f'it takes concatenations that split differently: {fusion.channels} and '
                f'{found.channels}'
            )
        return fusion


def select_fusions(fusions: Iterable[Fusion], names: Iterable[str]) -> list[Fusion]:
    """Those of ``fusions`` that are named, or lie in a module that is, in the order they have.

    Args:
        fusions: what was found.
        names: qualified names, e.g. ``decode_head.fpn_bottleneck`` or
            ``decode_head.fpn_bottleneck.conv``.

    Raises:
        ValueError: a name is no fusion layer and contains none; the candidates are listed.
    """
    fusions, names = list(fusions), list(names)
    for name in names:
        if not any(f.name == name or f.name.startswith(name + '.') for f in fusions):
            raise ValueError(
                f'{name!r} is no fusion layer of the decoder and contains none; candidates: '
                f'{", ".join(f.name for f in fusions) or "(none)"}.'
            )
    return [f for f in fusions if any(f.name == n or f.name.startswith(n + '.') for n in names)]


def trace_fusions(module: nn.Module, *inputs, **kwargs) -> list[Fusion]:
    """Finds the fusions of a module: the layers that take features concatenated by channels.

    Runs ``module(*inputs, **kwargs)`` once, without gradient and with running statistics in norm
    layers, so that any batch size will do, and puts buffers, training flags and random states
    back. A concatenation is followed through dropout, activations, norms, resizing, pooling,
    gating and transposition; one inside another counts as its parts. What is
    assembled otherwise (``hstack``, ``einsum``, slices of a concatenation) is not seen.

    Args:
        module: any module, for instance a decode head.
        *inputs: what its ``forward`` takes; the features of a backbone for a decode head.
        **kwargs: further arguments of ``forward``.

    Returns:
        One :class:`Fusion` per layer, in the order in which they run. Layers that cannot be
        equalized are among them, with the reason.

    Example:
        >>> head = MODELS.build(dict(type='UPerHead', in_channels=[8, 16], in_index=[0, 1], ...))
        >>> [(f.name, f.channels) for f in trace_fusions(head, features)]
        [('bottleneck.conv', (16, 4, 4, 4, 4)), ('fpn_bottleneck.conv', (4, 4))]
    """
    with torch.no_grad(), kept_state(module), FusionTracer(module) as tracer:
        for norm in module.modules():
            if isinstance(norm, _NormBase) and norm.track_running_stats:
                norm.training = False
        module(*inputs, **kwargs)
        return tracer.fusions
