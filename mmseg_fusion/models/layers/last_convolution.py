"""Finds the convolutions whose output reaches a head's classifier unmixed.

The search does not depend on the names of heads. A
:class:`torch.utils._python_dispatch.TorchDispatchMode` traces one forward pass, and marks each
tensor with the origin of its channels: a convolution of the head, the head's input, or an operation
that mixes channels.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule, is_norm
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

#: What a convolution may be part of, all of which can be replaced at once.
REPLACEABLE = (nn.Conv2d, ConvModule, DepthwiseSeparableConvModule)

_ORDER = ('conv', 'norm', 'act')
_OWN_INPUT = "the head's own input"

# Operations that are neither element by element nor views, and leave every channel what it is:
# copies, and norms and dropout that are called as functions. Resizing is told by its prefix.
_COPIES = frozenset(('clone', '_to_copy', 'copy', 'copy_', 'repeat', 'contiguous'))
_NORMS = frozenset(
    (
        'native_batch_norm', '_native_batch_norm_legit', '_native_batch_norm_legit_no_training',
        '_batch_norm_with_update', 'cudnn_batch_norm', 'miopen_batch_norm', 'native_layer_norm',
        'native_group_norm', 'native_dropout',
    )
)  # fmt: skip
# Element by element, which torch 2.13 does not say of them.
_UNTAGGED = frozenset(
    ('hardswish', 'hardswish_', '_prelu_kernel', 'prelu', 'rrelu_with_noise', 'log_sigmoid_forward')
)
_RESIZING = ('upsample_', '_upsample_')
_SUMS = frozenset(('add', 'add_', 'sub', 'sub_', 'rsub'))


class LastConvolutionTracer(TorchDispatchMode):
    """Traces forward passes of a head, ``with LastConvolutionTracer(...) as tracer:``.

    A feature is followed through norms, activations, dropout, resizing, sums, views and copies.
    Norms are recognized by mmcv's test, dropout by PyTorch's base class, and the norm and the
    activation of a ``ConvModule`` as such. Any other module without a convolution or linear layer
    is an activation if it changes each element separately. A function counts as an activation if it
    takes a single feature and PyTorch tags it as pointwise. A product of two features does not
    count: it may be a gate.

    Args:
        head: the decode head.
        classifier: its last convolution, at whose input the search ends; None if it has none.
        convolutions: the candidates by name. Only candidates that return a tensor count.

    Attributes:
        sources: names of the convolutions that the classifier's last input comes from.
        blocked: other origins of this input: names of operations, or "the head's own input".
        reached: whether the classifier was called.
        ran: names of the convolutions that gave one feature per image.
    """

    def __init__(
        self, head: nn.Module, classifier: nn.Module | None, convolutions: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self._head = head
        self._classifier = classifier
        self._convolutions = convolutions
        # By storage, which views share. A weak reference keeps its key from being used again.
        self._origins: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}
        self._entered: list[frozenset[str]] = []
        self._running: list[list[frozenset[str]]] = []
        self._handles: list[Any] = []
        self.sources: set[str] = set()
        self.blocked: set[str] = set()
        self.reached = False
        self.ran: set[str] = set()
        self._batch: int | None = None

    # --- origins ---------------------------------------------------------------------------------

    def _origin(self, x: Tensor) -> frozenset[str]:
        entry = self._origins.get(StorageWeakRef(x.untyped_storage()).cdata)
        return frozenset() if entry is None else entry[1]

    def _set(self, x: Tensor, origin: frozenset[str]) -> None:
        ref = StorageWeakRef(x.untyped_storage())
        self._origins[ref.cdata] = (ref, origin)

    def own_input(self, features: Any) -> Any:
        """Marks all tensors of nested lists as inputs of the head; returns ``features``."""
        for x in _tensors(features):
            self._batch = self._batch or len(x)
            self._set(x, frozenset((_OWN_INPUT,)))
        return features

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = _tensors((args, kwargs))
        # Before it runs: it may work in place.
        origins = [o for o in map(self._origin, inputs) if o]
        out = func(*args, **(kwargs or {}))
        written = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        shared = {StorageWeakRef(x.untyped_storage()).cdata for x in inputs}
        for x in _tensors(out):
            if written or StorageWeakRef(x.untyped_storage()).cdata not in shared:
                self._set(x, _result(func, origins))
        return out

    # --- modules ---------------------------------------------------------------------------------

    def __enter__(self) -> LastConvolutionTracer:
        names = {id(module): name for name, module in self._convolutions.items()}
        parts = [m for m in self._head.modules() if isinstance(m, ConvModule)]
        named = {id(c) for m in parts for c in (m.norm, getattr(m, 'activate', None)) if c}
        for module in self._head.modules():
            if module is self._classifier:
                self._handles.append(module.register_forward_pre_hook(self._enter_classifier))
            elif id(module) in names:
                name = names[id(module)]
                self._handles.append(
                    module.register_forward_hook(lambda m, x, y, name=name: self._mark(y, name))
                )
            elif id(module) in named or _is_transparent(module):
                self._handles.append(module.register_forward_pre_hook(self._before))
                self._handles.append(module.register_forward_hook(self._after))
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._origins.clear()
        if self._entered:
            self.reached = True
            self.sources = self._entered[-1] & self._convolutions.keys()
            self.blocked = set(self._entered[-1] - self.sources)
        return super().__exit__(*exception)

    def _enter_classifier(self, module: nn.Module, inputs: tuple) -> None:
        self._entered.append(self._origin(inputs[0]) or frozenset(('a constant',)))

    def _mark(self, output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            self._set(output, frozenset((name,)))
            # Attention in windows makes a batch of them, which no label fits.
            if output.dim() == 4 and len(output) == self._batch:
                self.ran.add(name)

    def _before(self, module: nn.Module, inputs: tuple) -> None:
        self._running.append([self._origin(x) for x in _tensors(inputs)])

    def _after(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        origins = self._running.pop()
        if len(origins) == 1 and isinstance(output, Tensor):
            self._set(output, origins[0])


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


def _result(func: Any, origins: list[frozenset[str]]) -> frozenset[str]:
    """Where the result of an operation on features of these origins comes from."""
    name = func.overloadpacket.__name__
    if name.endswith('_like') or name.startswith('new_'):
        # A tensor of the same shape, with values of its own.
        return frozenset()
    pointwise = torch.Tag.pointwise in func.tags or name in _UNTAGGED
    unmixed = name in _COPIES or name in _NORMS or name.startswith(_RESIZING)
    if unmixed or name in _SUMS or (pointwise and len(origins) < 2):
        return frozenset().union(*origins)
    if not origins:
        return frozenset()
    # Its kernels have names of their own, by device and version.
    attends = 'scaled_dot_product' in name
    return frozenset(('scaled_dot_product_attention' if attends else name.strip('_'),))


def _is_transparent(module: nn.Module) -> bool:
    """Whether a module is a norm, dropout, or anything that changes each element by itself."""
    if is_norm(module) or isinstance(module, (_DropoutNd, nn.Identity)):
        return True
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return not any(isinstance(m, layers) for m in module.modules()) and _is_pointwise(module)


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a change of one element changes that element of the output alone.

    Tried on a copy, since what is no activation may fail, draw random numbers or count its calls.
    """
    try:
        twin = copy.deepcopy(module).eval()
        slopes = [p for p in twin.parameters() if p.numel() > 1]
        channels = slopes[0].numel() if slopes else 3
        if any(t.is_meta for t in [*twin.parameters(), *twin.buffers()]):
            twin.to_empty(device='cpu')
            for p in twin.parameters():
                nn.init.constant_(p, 0.25)
        twin.to('cpu', torch.float64)
        x = torch.linspace(-1, 1, 2 * channels * 4, dtype=torch.float64, device='cpu')
        x = x.view(2, channels, 2, 2)
        expected = twin.forward(x.clone())
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            return False
        for place in ((0, 0, 0, 0), (1, channels - 1, 1, 0)):
            changed = x.clone()
            changed[place] += 0.5
            differs = twin.forward(changed) != expected
            differs[place] = False
            if differs.any():
                return False
    except Exception:
        # It takes something else than a feature.
        return False
    return True


# --- names -----------------------------------------------------------------------------------


def takes_one_tensor(conv: nn.Module) -> bool:
    """Whether a convolution takes only its feature as an argument.

    The kernel that KSAC's rates share is a ``Conv2d`` that takes the rates as well.
    """
    needed = [
        p
        for p in inspect.signature(conv.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 1


def block_of(modules: Mapping[str, nn.Module], name: str) -> str:
    """The name of the outermost conv-norm-activation block around the convolution ``name``.

    A block in another order keeps its norm and activation: the name is then the convolution's.
    """
    parts = name.split('.')
    for end in range(1, len(parts) + 1):
        candidate = '.'.join(parts[:end])
        block = modules[candidate]
        if isinstance(block, REPLACEABLE) and getattr(block, 'order', _ORDER) == _ORDER:
            return candidate
    return f'{name}.conv' if isinstance(modules[name], ConvModule) else name
