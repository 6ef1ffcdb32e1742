"""Finds where a module concatenates features and which layer fuses them.

The search does not depend on the names of heads. A :class:`torch.overrides.TorchFunctionMode`
traces one forward pass, and follows the results of ``torch.cat`` along the channels to the
convolution or linear layer that takes them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .state import kept_state


@dataclass(eq=False)
class Fusion:
    """A layer that fuses concatenated features (equation 5 of arXiv 2402.01149).

    Attributes:
        name: qualified name of the layer below the traced module, e.g. ``fpn_bottleneck.conv``.
        conv: the layer that takes the concatenation, a convolution, transposed or not, or a
            linear layer.
        channels: channels of each branch, in the order of the concatenation.
        sizes: spatial size (h, w) of each branch, in cells, before the resize that brought it to
            the size of the concatenation; a branch that was not resized has that size itself.
        called: whether the layer itself was called; its weight may also be used by other code.
        normalized: whether every output of the layer goes directly into batch or instance norm,
            which removes any constant per channel, and is not used elsewhere.
        rescaled: whether every output goes directly into a norm of any kind, which rescales it, and
            is not used elsewhere.
        reason: why the layer cannot be equalized; empty if it can.
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

    def blocks(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parts of a tensor in the shape of the layer's weight that belong to each branch.

        Returns:
            Per branch, with its channels in dimension 0: (C_i, ...).
        """
        groups = getattr(self.conv, 'groups', 1)
        if not isinstance(self.conv, _ConvTransposeNd):
            # Of a grouped weight: bring its input channels side by side.
            out, per_group = weight.shape[:2]
            weight = weight.reshape(groups, out // groups, per_group, -1)
            weight = weight.transpose(1, 2).flatten(0, 1)
        return weight.split(self.channels)


@dataclass(frozen=True)
class Lost:
    """A concatenation of feature maps along the channels for which no layer was found.

    Attributes:
        name: qualified name of the innermost module whose call contains it, empty for the traced
            module. Methods other than ``__call__`` (a head's ``loss``) are not recognized.
        channels: channels of each branch.
        end: the last operation on it through which it could not be followed; empty if there was
            none.
    """

    name: str
    channels: tuple[int, ...]
    end: str

    def __str__(self) -> str:
        where = self.name or 'the model'
        end = f'its trail ends at {self.end!r}' if self.end else 'no operation on it was seen'
        return f'{" + ".join(map(str, self.channels))} channels, concatenated inside {where}: {end}'


@dataclass(eq=False)
class _Trail:
    """What became of one concatenation."""

    name: str
    channels: tuple[int, ...]
    end: str = ''
    reached: bool = False
    into: _Trail | None = None

    @property
    def lost(self) -> bool:
        return not self.reached and (self.into is None or self.into.lost)


@dataclass(frozen=True)
class _Concatenation:
    dim: int
    channels: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    trail: _Trail
    # Behind a depthwise convolution, which gives each channel a filter of its own.
    filtered: bool = False

    def same_branches(self, other: _Concatenation) -> bool:
        """Whether both are made of the very same features, in the same order."""
        return self.trail is other.trail and (self.dim, self.channels) == (
            other.dim,
            other.channels,
        )


@dataclass(frozen=True)
class _Stack:
    dim: int
    channels: int
    sizes: tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class _Use:
    """Where one output of a fusion layer goes."""

    fusion: Fusion
    norm: bool = False
    channel_norm: bool = False
    raw: bool = False

    @property
    def rescaled(self) -> bool:
        return (self.norm or self.channel_norm) and not self.raw

    @property
    def normalized(self) -> bool:
        return self.channel_norm and not self.norm and not self.raw


# Matched by name, since one operation has several entry points: torch.relu, F.relu, Tensor.relu_.
_CAT = frozenset(('cat', 'concat', 'concatenate'))
_CAT_SECOND = frozenset(('hstack', 'column_stack'))
_TRANSPOSED = frozenset(('conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d'))
_CONV = frozenset(('conv1d', 'conv2d', 'conv3d')) | _TRANSPOSED
_RESIZE = frozenset(('interpolate', 'upsample', 'grid_sample'))
_RESHAPE = frozenset(('reshape', 'view', 'flatten', 'unflatten'))
_MOVE = frozenset(('transpose', 'swapaxes', 'swapdims', 'permute', 'movedim', 'moveaxis'))
_CHANNEL_NORM = frozenset(('batch_norm', 'instance_norm'))
_NORM = _CHANNEL_NORM | {'group_norm', 'layer_norm'}
# The same values in another place or type.
_COPY = frozenset(
    'contiguous clone to float half double bfloat16 type type_as cpu cuda detach __get__'.split()
)
# What leaves every channel in its place, so that the branches can still be told apart.
_UNMIXED = (
    'dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout '
    'relu relu6 leaky_relu elu selu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh '
    'softplus prelu clamp pad max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d '
    'group_norm layer_norm normalize masked_fill mul multiply div __mul__ __rmul__ __imul__ '
    '__truediv__'
)
_IN_PLACE = frozenset(_UNMIXED.split()) | _RESIZE | _CHANNEL_NORM | (_COPY - {'__get__'})
# Likewise, but only with something smaller, or with what is made of the same branches (as in
# z * g + z): the sum of two features is a new feature.
_SHIFT = frozenset('add sub subtract __add__ __sub__ __radd__ __iadd__ __isub__'.split())
_SHIFT |= frozenset(('rsub', '__rsub__'))
# Unmixed unless they go along the channels.
_TURN = frozenset(('flip', 'roll'))
# What gives the same values in another place, and what gives a feature of the same source.
_ELSEWHERE = _COPY | _RESHAPE | _MOVE
_FROM_THERE = _IN_PLACE | _SHIFT


def _name(function: Callable) -> str:
    name = getattr(function, '__name__', '')
    return name if name.startswith('__') else name.strip('_')


def _argument(args: tuple, kwargs: dict, position: int, *names: str, default=None):
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[position] if len(args) > position else default


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@dataclass(frozen=True)
class _Call:
    """An operation that was called: which, with what, and what came out of it."""

    function: Callable
    name: str
    args: tuple
    kwargs: dict
    out: Any

    @property
    def first(self) -> Any:
        """The first argument: the feature, or the list of those that are joined."""
        return self.args[0]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by its place or by one of its names."""
        return _argument(self.args, self.kwargs, position, *names, default=default)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return _tensors((*self.args, *self.kwargs.values()))

    def reads_values(self) -> bool:
        """Whether it makes a tensor from the values of its arguments."""
        if self.name.endswith('_like') or self.name.startswith('new_'):
            return False
        return isinstance(self.out, Tensor) or (
            isinstance(self.out, (list, tuple)) and any(isinstance(o, Tensor) for o in self.out)
        )

    def is_feature(self, value: Any) -> bool:
        """Whether ``value`` is as large as the result, not a factor or shift of its channels."""
        return isinstance(value, Tensor) and value.numel() == self.out.numel()


# Since torch 2.1 a module leaves even if its forward pass raised and the model went on.
_EVEN_IF_IT_RAISES = (
    dict(always_call=True)
    if 'always_call' in inspect.signature(nn.Module.register_forward_hook).parameters
    else {}
)


def _pop_to(entries: list, wanted: Callable[[Any], bool]) -> None:
    """Takes the last wanted entry, and all behind it, off the end."""
    while entries and not wanted(entries.pop()):
        pass


class FusionTracer(TorchFunctionMode):
    """Traces the fusions in the forward passes inside ``with FusionTracer(root):``.

    Args:
        root: the module whose layers are searched; names are relative to it.
        on_input: called as ``on_input(fusion, x)`` whenever a fusion layer takes a concatenation
            ``x`` that splits as ``fusion.channels`` says: (N, C, ...), for a linear layer (..., C).
            With it, :attr:`lost` is not recorded, since there may be many passes.
        count_running: whether a batch norm that uses its running statistics counts as a norm. It
            does if norm layers are in eval mode only for this pass. If they stay in eval mode, it
            is only a factor per channel.

    A layer may compute its maps in a form that hides its input from the tracer. Such a layer has a
    method ``while_traced``, which returns a context manager; the layer is traced inside of it.

    Example:
        >>> conv = nn.Conv2d(5, 4, 1)
        >>> with FusionTracer(conv) as tracer:
        ...     y = conv(torch.cat([torch.rand(1, 2, 8, 8), torch.rand(1, 3, 8, 8)], 1))
        >>> [(fusion.name, fusion.channels) for fusion in tracer.fusions]
        [('', (2, 3))]
    """

    def __init__(
        self,
        root: nn.Module,
        on_input: Callable[[Fusion, Tensor], None] | None = None,
        count_running: bool = True,
    ) -> None:
        super().__init__()
        self._fusions: dict[str, Fusion] = {}
        self._on_input = on_input
        self._count_running = count_running
        named = list(root.named_modules())
        self._owners = {
            id(parameter): (name, module)
            for name, module in named
            for key, parameter in module._parameters.items()
            if key == 'weight' and parameter is not None
        }
        self._other_tensors = {
            id(tensor): f'{name}.{key}' if name else key
            for name, module in named
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and id(tensor) not in self._owners
        }
        self._modules = named
        self._disguised = [m for m in root.modules() if callable(getattr(m, 'while_traced', None))]
        self._inside: list[str] = []
        self._running: list[tuple[str, nn.Module]] = []
        self._alone: set[str] = set()
        self._uses: list[_Use] = []
        self._trails: list[_Trail] = []
        self._depthwise: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._concatenations = WeakTensorKeyDictionary()
        self._stacks = WeakTensorKeyDictionary()
        self._sources = WeakTensorKeyDictionary()
        self._outputs = WeakTensorKeyDictionary()

    @property
    def fusions(self) -> list[Fusion]:
        """The fusions seen so far, in the order in which they ran."""
        uses: dict[str, list[_Use]] = {}
        for use in self._uses:
            uses.setdefault(use.fusion.name, []).append(use)
        for name, fusion in self._fusions.items():
            fusion.normalized = all(use.normalized for use in uses[name])
            fusion.rescaled = all(use.rescaled for use in uses[name])
            if fusion.reason:
                continue
            if name in self._alone:
                fusion.reason = (
                    'it also takes inputs that are not concatenated, as far as they were followed'
                )
            elif name in self._depthwise and fusion.normalized:
                fusion.reason = (
                    'depthwise: it mixes no channels, and the batch or instance norm that its '
                    'output goes into takes out any scale of a channel'
                )
        return list(self._fusions.values())

    @property
    def lost(self) -> list[Lost]:
        """Concatenated feature maps (N, C, H, W) that no layer was seen to take."""
        return [Lost(t.name, t.channels, t.end) for t in self._trails if t.lost]

    def __enter__(self) -> FusionTracer:
        # Names the layer for weights that are computed on the fly (weight standardization,
        # parametrizations), which no parameter's identity gives away.
        self._handles = []
        for name, module in self._modules:
            layer = isinstance(module, (_ConvNd, nn.Linear)) or 'weight' in module._parameters
            enter, leave = self._hooks(name, module if layer else None)
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, **_EVEN_IF_IT_RAISES))
        self._undisguised = contextlib.ExitStack()
        for module in self._disguised:
            self._undisguised.enter_context(module.while_traced())
        return super().__enter__()

    def _hooks(self, name: str, layer: nn.Module | None) -> tuple[Callable, Callable]:
        def enter(*_: Any) -> None:
            self._inside.append(name)
            if layer is not None:
                self._running.append((name, layer))

        def leave(*_: Any) -> None:
            # With torch 2.0 what raised within this module has not left; it leaves now.
            _pop_to(self._inside, lambda entry: entry == name)
            if layer is not None:
                _pop_to(self._running, lambda entry: entry[0] == name)

        return enter, leave

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._undisguised.close()
        self._running.clear()
        self._inside.clear()
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
        call = _Call(func, name, args, kwargs, out)
        if not args or not call.reads_values():
            return out
        self._note_uses(call)
        if isinstance(out, Tensor):
            self._keep_source(call)
            concatenation = self._follow(call)
            if concatenation is not None:
                self._concatenations[out] = concatenation
        self._note_ends(call)
        return out

    # --- what becomes of a fusion layer's output -------------------------------------------------

    def _note_uses(self, call: _Call) -> None:
        for x in call.tensors():
            use = self._outputs.get(x)
            if use is None:
                continue
            if call.name in _NORM and x is call.first and self._is_norm(call):
                use.channel_norm |= call.name in _CHANNEL_NORM
                use.norm |= call.name not in _CHANNEL_NORM
            elif isinstance(call.out, Tensor) and call.name in _ELSEWHERE:
                # Not yet a use; an operation that does nothing returns its argument.
                if call.out is not x:
                    self._outputs[call.out] = use
            else:
                use.raw = True

    def _is_norm(self, call: _Call) -> bool:
        if call.name not in _CHANNEL_NORM or self._count_running:
            return True
        return bool(call.argument(5, 'training', 'use_input_stats', default=True))

    # --- where features come from, and end -------------------------------------------------------

    def _source(self, x: Tensor, dim: int) -> tuple[int, ...]:
        known = self._sources.get(x)
        return known if known is not None else tuple(x.shape[1:dim] + x.shape[dim + 1 :])

    def _keep_source(self, call: _Call) -> None:
        """Remembers the size that a feature had before it was resized."""
        x = call.first
        if not isinstance(x, Tensor) or call.name not in _FROM_THERE:
            return
        if call.name in _SHIFT and call.is_feature(_argument(call.args, {}, 1)):
            return
        source = self._sources.get(x)
        if source is None and call.name in _RESIZE:
            source = tuple(x.shape[2:])
        if source is not None and call.out is not x:
            self._sources[call.out] = source

    def _note_ends(self, call: _Call) -> None:
        if call.name == '__get__':
            return
        if isinstance(call.out, Tensor) and call.out in self._concatenations:
            return
        for x in call.tensors():
            concatenation = self._concatenations.get(x)
            if concatenation is not None:
                concatenation.trail.end = call.name

    # --- concatenations --------------------------------------------------------------------------

    def _follow(self, call: _Call) -> _Concatenation | None:
        """The concatenation that the result of an operation is, None if it is none.

        Each kind of operation has a rule of its own, in ``_JOINS`` where it joins features, in
        ``_RULES`` where it takes one.
        """
        if call.name in self._JOINS:
            return self._JOINS[call.name](self, call)
        rule = self._RULES.get(call.name)
        return rule(self, call) if rule is not None and isinstance(call.first, Tensor) else None

    def _begin(
        self, out: Tensor, dim: int, channels: list[int], sizes: list, inner: Iterable[_Trail]
    ) -> _Concatenation:
        trail = _Trail(self._inside[-1] if self._inside else '', tuple(channels))
        for part in inner:
            part.into = trail
        # Of fewer dimensions nothing tells features side by side from tokens.
        if self._on_input is None and dim == 1 and out.dim() > 3:
            self._trails.append(trail)
        return _Concatenation(dim, tuple(channels), tuple(sizes), trail)

    def _concatenated(self, call: _Call) -> _Concatenation | None:
        if call.name in _CAT:
            dim = call.argument(1, 'dim', 'axis', default=0) % max(call.out.dim(), 1)
        else:
            dim = 1 if call.out.dim() > 1 else 0
        channels, sizes, trails = [], [], []
        for part in call.first:
            inner = self._concatenations.get(part)
            if inner is not None and inner.dim == dim:
                channels += inner.channels
                sizes += inner.sizes
                trails.append(inner.trail)
            elif part.numel():
                channels.append(part.shape[dim])
                sizes.append(self._source(part, dim))
        return self._begin(call.out, dim, channels, sizes, trails) if len(channels) > 1 else None

    def _stacked(self, call: _Call) -> None:
        """No concatenation yet: it is one once the new dimension is merged with the next."""
        dim = call.argument(1, 'dim', 'axis', default=0) % call.out.dim()
        if len(call.first) > 1 and dim < call.out.dim() - 1:
            sizes = tuple(self._source(part, dim) for part in call.first)
            self._stacks[call.out] = _Stack(dim, call.out.shape[dim + 1], sizes)

    def _reshaped(self, call: _Call) -> _Concatenation | None:
        """Followed where the channels, and what is before them, keep their shape."""
        x, out = call.first, call.out
        if x in self._stacks:
            return self._merged(self._stacks[x], x, out)
        known = self._concatenations.get(x)
        if known is None:
            return None
        before = slice(known.dim + 1)
        return known if out.shape[before] == x.shape[before] else None

    def _merged(self, stack: _Stack, x: Tensor, out: Tensor) -> _Concatenation | None:
        """``stack(...).flatten(1, 2)`` is a concatenation."""
        dim = stack.dim
        merged = x.shape[dim] * x.shape[dim + 1]
        if tuple(out.shape) != (*x.shape[:dim], merged, *x.shape[dim + 2 :]):
            return None
        return self._begin(out, dim, [stack.channels] * x.shape[dim], list(stack.sizes), ())

    def _moved(self, call: _Call) -> _Concatenation | None:
        """The channels are in another dimension now."""
        known = self._concatenations.get(call.first)
        if known is None:
            return None
        # Sizes that are all different tell where each dimension goes.
        marked = torch.empty(tuple(range(2, 2 + call.first.dim())), device='meta')
        moved = call.function(marked, *call.args[1:], **call.kwargs)
        return replace(known, dim=moved.shape.index(2 + known.dim))

    def _turned(self, call: _Call) -> _Concatenation | None:
        """Followed where the channels themselves are not turned."""
        known = self._concatenations.get(call.first)
        if known is None:
            return None
        dims = call.argument(2 if call.name == 'roll' else 1, 'dims')
        if call.name == 'flip' and len(call.args) > 2:
            dims = call.args[1:]
        if dims is None or dims == ():
            return None  # roll of the flattened tensor
        dims = dims if isinstance(dims, (list, tuple)) else (dims,)
        turned = known.dim in [d % call.first.dim() for d in dims]
        return None if turned else self._in_place(known, call)

    def _shifted(self, call: _Call) -> _Concatenation | None:
        """Followed where what is added is no other feature."""
        other = call.argument(1, 'other')
        first = self._concatenations.get(call.first)
        second = self._concatenations.get(other) if isinstance(other, Tensor) else None
        if first is not None and second is not None:
            known = first if first.same_branches(second) else None
        elif first is not None:
            known = None if call.is_feature(other) else first
        else:
            known = None if call.is_feature(call.first) else second
        return self._in_place(known, call)

    def _selected(self, call: _Call) -> _Concatenation | None:
        """Of ``where``: the cells that it takes from elsewhere leave the branches in place."""
        values = _tensors((*call.args, call.kwargs.get('other')))
        known = [k for k in map(self._concatenations.get, values) if k is not None]
        same = bool(known) and all(known[0].same_branches(k) for k in known)
        return self._in_place(known[0], call) if same else None

    def _unmixed(self, call: _Call) -> _Concatenation | None:
        """Followed: every channel stays in its place. A gate may come first: gate * x."""
        out = call.out
        others = [a for a in call.args[1:2] if isinstance(a, Tensor) and a.shape == out.shape]
        known = (self._concatenations.get(x) for x in (call.first, *others))
        return self._in_place(next((k for k in known if k is not None), None), call)

    def _normalized(self, call: _Call) -> _Concatenation | None:
        """Batch and instance norm leave the channels in their place, and on one scale."""
        known = self._unmixed(call)
        # Behind a depthwise layer: that was the fusion.
        return None if known is None or known.filtered else known

    @staticmethod
    def _in_place(known: _Concatenation | None, call: _Call) -> _Concatenation | None:
        """``known``, if the result has as many channels in the same dimension."""
        if known is None or call.out.dim() <= known.dim:
            return None
        return known if call.out.shape[known.dim] == sum(known.channels) else None

    _JOINS: ClassVar = {**dict.fromkeys(_CAT | _CAT_SECOND, _concatenated), 'stack': _stacked}
    _RULES: ClassVar = {
        **dict.fromkeys(_RESHAPE, _reshaped),
        **dict.fromkeys(_MOVE, _moved),
        **dict.fromkeys(_TURN, _turned),
        **dict.fromkeys(_SHIFT, _shifted),
        **dict.fromkeys(_IN_PLACE, _unmixed),
        **dict.fromkeys(_CHANNEL_NORM, _normalized),
        'where': _selected,
    }

    # --- layers ----------------------------------------------------------------------------------

    def _consume(self, func, name: str, args: tuple, kwargs: dict):
        x = _argument(args, kwargs, 0, 'input')
        weight = _argument(args, kwargs, 1, 'weight')
        concatenation = self._concatenations.get(x)
        owner = self._owners.get(id(weight))
        foreign = owner is None
        if foreign and self._running:
            owner = self._running[-1]
        if concatenation is not None and concatenation.dim != (1 if name in _CONV else x.dim() - 1):
            concatenation = None
        fusion = None
        if owner is not None and concatenation is not None:
            concatenation.trail.reached = True
            fusion = self._record(*owner, concatenation, weight if foreign else None)
            fusion.called &= bool(self._running) and self._running[-1][0] == owner[0]
            transposed = isinstance(owner[1], _ConvTransposeNd)
            if transposed != (name in _TRANSPOSED) and not fusion.reason:
                fusion.reason = f'its weight is used by {name}, which reads it the other way round'
            if self._on_input is not None and fusion.channels == concatenation.channels:
                self._on_input(fusion, x)
        elif owner is not None:
            self._alone.add(owner[0])
        out = func(*args, **kwargs)
        for value in _tensors((x,)):
            if value in self._outputs:
                self._outputs[value].raw = True
        if fusion is not None:
            use = _Use(fusion)
            self._uses.append(use)
            self._outputs[out] = use
        if concatenation is not None:
            groups = _argument(args, kwargs, 6, 'groups', default=1)
            if name in _CONV and groups == x.shape[1] > 1:
                each = out.shape[1] // groups
                self._concatenations[out] = replace(
                    concatenation,
                    channels=tuple(each * c for c in concatenation.channels),
                    filtered=True,
                )
            elif fusion is None:
                concatenation.trail.end = f"{name} with a weight that is no layer's"
        return out

    def _record(
        self, name: str, module: nn.Module, concatenation: _Concatenation, foreign: Tensor | None
    ) -> Fusion:
        fusion = self._fusions.get(name)
        if fusion is None:
            reason = ''
            groups = getattr(module, 'groups', 1)
            if foreign is not None:
                known = self._other_tensors.get(id(foreign))
                reason = (
                    f'it uses {known}, and only a parameter that is called weight is folded into'
                    if known
                    else 'the weight that it uses is computed, or at least none of its parameters, '
                    'so nothing can be folded in'
                )
            elif groups > 1 and groups == sum(concatenation.channels):
                self._depthwise.add(name)
            fusion = Fusion(
                name, module, concatenation.channels, concatenation.sizes, reason=reason
            )
            self._fusions[name] = fusion
        elif fusion.channels != concatenation.channels and not fusion.reason:
            fusion.reason = (
                f'it takes concatenations that split differently: {fusion.channels} and '
                f'{concatenation.channels}'
            )
        return fusion


def select_fusions(fusions: Iterable[Fusion], names: Iterable[str]) -> list[Fusion]:
    """Selects fusions by their names, or by the names of modules that contain them, in order.

    Args:
        fusions: the fusions to select from.
        names: qualified names, e.g. ``decode_head.fpn_bottleneck`` or
            ``decode_head.fpn_bottleneck.conv``.

    Raises:
        ValueError: a name is not a fusion layer and contains none; the candidates are listed.
    """
    fusions, names = list(fusions), list(names)
    for name in names:
        if not any(f.name == name or f.name.startswith(name + '.') for f in fusions):
            raise ValueError(
                f'{name!r} is no fusion layer and contains none; candidates: '
                f'{", ".join(f.name for f in fusions) or "(none)"}.'
            )
    return [f for f in fusions if any(f.name == n or f.name.startswith(n + '.') for n in names)]


def trace_fusions(module: nn.Module, *inputs, **kwargs) -> list[Fusion]:
    """Finds the fusions of a module: the layers that take features concatenated by channels.

    Runs ``module(*inputs, **kwargs)`` once, without gradient and with running statistics in norm
    layers, so that any batch size works, and restores buffers, training flags and random states. A
    concatenation (``cat``, ``hstack``, ``stack`` and ``flatten``) is followed through dropout,
    activations, norms, resizing, pooling, gating, flipping, transposition and depthwise
    convolutions; a concatenation inside another counts as its parts. Other operations end the
    search (``einsum``, slices, sums with other features ...); :attr:`FusionTracer.lost` lists these
    cases.

    Args:
        module: any module, for instance a decode head.
        *inputs: arguments of its ``forward``; the features of a backbone for a decode head.
        **kwargs: further arguments of ``forward``.

    Returns:
        One :class:`Fusion` per layer, in the order in which they run. Layers that cannot be
        equalized are among them, with the reason.

    Example:
        >>> from mmseg.models import UPerHead
        >>> head = UPerHead(
        ...     in_channels=[8, 16], in_index=[0, 1], channels=4, num_classes=3, pool_scales=(1, 2)
        ... )
        >>> levels = [torch.rand(2, 8, 16, 16), torch.rand(2, 16, 8, 8)]
        >>> [(f.name, f.channels) for f in trace_fusions(head, levels)]
        [('bottleneck.conv', (16, 4, 4)), ('fpn_bottleneck.conv', (4, 4))]
    """
    with torch.no_grad(), kept_state(module), FusionTracer(module) as tracer:
        for norm in module.modules():
            if isinstance(norm, _NormBase) and norm.track_running_stats:
                norm.training = False
        module(*inputs, **kwargs)
        return tracer.fusions
