"""Counts of a model: multiply-adds for one image, learnable parameters, both per module.

The forward pass runs on the ``meta`` device, where a tensor has a shape and no values: any model
at any size takes a second and no memory.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Union

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..channels import check_channels, image_channels
from ..errors import InputError
from ..files import config_file

#: A side, (height, width) or (channels, height, width).
Shape = Union[int, Sequence[int]]


@dataclass(frozen=True)
class Counts:
    """Cost of one forward pass of a model, and its number of learnable parameters.

    Attributes:
        flops: multiply-adds of convolutions, linear layers, matrix and attention products;
            element-wise operations, norm layers and biases are not counted.
        params: elements of the parameters (``nn.Parameter``, including frozen ones, without
            buffers), each tensor counted once.
        shape: the input as (channels, height, width); None if the call was given tensors.
        flops_by_module: the same by a module's dotted name; a module includes what it contains,
            ``''`` is the whole.
        params_by_module: likewise.
        uncounted: operators that are neither PyTorch's nor known here; their cost is not counted.
    """

    flops: int
    params: int
    shape: tuple[int, ...] | None = None
    flops_by_module: dict[str, int] = field(default_factory=dict, repr=False)
    params_by_module: dict[str, int] = field(default_factory=dict, repr=False)
    uncounted: tuple[str, ...] = ()

    def table(self, depth: int = 1) -> str:
        """Modules down to ``depth``, with their shares of the whole.

        A row ``(own)`` is the part of a module outside of the modules listed below it.

        Args:
            depth: 1 for backbone, neck and head, 2 for their parts, and so on.

        Raises:
            ValueError: ``depth`` is less than 1.
        """
        if depth < 1:
            raise ValueError(f'depth must be at least 1, got {depth}')
        inside: dict[str, list[str]] = {}
        for name in self.params_by_module:
            if name and (self.params_by_module[name] or self.flops_by_module[name]):
                inside.setdefault(name.rpartition('.')[0], []).append(name)
        rows = [('module', 'params', '', 'FLOPs', '')]

        def add(label: str, params: int, flops: int) -> None:
            rows.append(
                (
                    label,
                    human(params),
                    _share(params, self.params),
                    human(flops),
                    _share(flops, self.flops),
                )
            )

        def visit(parent: str, level: int) -> None:
            params, flops = self.params_by_module[parent], self.flops_by_module[parent]
            for name in inside.get(parent, ()):
                label = '  ' * level + name.rpartition('.')[2]
                add(label, self.params_by_module[name], self.flops_by_module[name])
                params -= self.params_by_module[name]
                flops -= self.flops_by_module[name]
                if level + 1 < depth:
                    visit(name, level + 1)
            # Less than nothing is left where a tensor belongs to two modules.
            if parent in inside and (params > 0 or flops > 0):
                add('  ' * level + '(own)', max(params, 0), max(flops, 0))

        visit('', 0)
        add('total', self.params, self.flops)
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = (
            [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
            for row in rows
        )
        return '\n'.join('  '.join(line).rstrip() for line in lines)


def human(number: int) -> str:
    """A count in k, M, G or T: ``236_123_456_789`` is ``'236.123 G'``."""
    for unit, name in ((10**12, 'T'), (10**9, 'G'), (10**6, 'M'), (10**3, 'k')):
        if number >= unit:
            return f'{number / unit:.3f} {name}'
    return str(number)


def _share(part: int, whole: int) -> str:
    return f'{100 * part / whole:.1f}%' if whole else '-'


def count(config_or_model: str | Path | Config | dict | nn.Module, shape: Shape) -> Counts:
    """Counts the operations of a segmentor for one image: backbone, neck and decode head.

    Auxiliary heads are left out of both counts. Nothing is downloaded, no weight is initialized,
    and a given model is not changed.

    Args:
        config_or_model: a config's path (or ``package::path``), a config, its ``model`` dict, or
            a model; a module that is no segmentor is called with one image.
        shape: the image: a side, (height, width) or (channels, height, width). Channels default
            to :func:`~mmseg_fusion.channels.image_channels`.

    Returns:
        Counts: of the whole and of each module.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: ``shape`` is none of the above, a config has no model, or its parts disagree on
            the channels of an image.
        RuntimeError: the model does not take an image of this shape.
    """
    size = _size(shape)
    if isinstance(config_or_model, nn.Module):
        model, again = config_or_model, None
    else:
        model_cfg, scope = _model_config(config_or_model)
        if len(size) == 2:
            check_channels(model_cfg)

        def again() -> nn.Module:
            with DefaultScope.overwrite_default_scope(scope):
                return MODELS.build(copy.deepcopy(model_cfg))

        try:
            with _EmptyOnMeta():
                model = again()
        except Exception:
            # Either a constructor that reads its weights, or a wrong config: then this raises.
            model = again()
    if len(size) == 2:
        size = (image_channels(model), *size)
    args: tuple[Any, ...] = (torch.empty(1, *size, device='meta'),)
    method = '__call__'
    # What inference runs: unlike forward(mode='tensor'), every segmentor of mmseg has it.
    if hasattr(model, 'encode_decode'):
        meta = dict.fromkeys(('ori_shape', 'img_shape', 'pad_shape'), size[1:])
        args, method = (*args, [meta]), 'encode_decode'
    try:
        counts = _count(model, again, method, args, {}, drop=('auxiliary_head',))
    except ImportError:
        raise
    except Exception as error:
        image = ' x '.join(map(str, size))
        raise RuntimeError(
            f'{type(model).__name__} failed on an image of {image} (channels x height x width): '
            f'{error}. Give a shape that the model takes; many backbones are bound to the crop '
            'size in data_preprocessor.size, or to a multiple of their stride'
        ) from error
    return dataclasses.replace(counts, shape=size)


def count_call(module: nn.Module, *args: Any, **kwargs: Any) -> Counts:
    """Counts one call of any module, in evaluation mode; the module is not changed.

    The call runs on the meta device. A module that reads values (``.item()``, ``nonzero``) cannot
    run there. It then runs on real tensors, and a message says so.

    Args:
        module: any module.
        *args: the call's arguments; of a tensor only shape and dtype matter, it may be on meta.
        **kwargs: the call's keyword arguments.

    Returns:
        Counts: with ``shape=None``.

    Raises:
        ImportError: torch is older than 2.1.

    Example:
        >>> count_call(torch.nn.Linear(8, 4), torch.zeros(10, 8)).flops
        320
    """
    return _count(module, None, '__call__', args, kwargs)


def _size(shape: Shape) -> tuple[int, ...]:
    size = (shape, shape) if isinstance(shape, int) else tuple(shape)
    if len(size) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            'shape must be a side, (height, width) or (channels, height, width), of positive '
            f'integers; got {shape!r}'
        )
    return size


def read_config(path: str | Path) -> Config:
    """The config of a file or of ``package::folder/name``, with ``.py`` or without.

    Raises:
        FileNotFoundError: there is no such file, or the package is not installed.
        ValueError: the file is no config.
    """
    try:
        file = config_file(str(path))
    except InputError as error:
        raise FileNotFoundError(str(error)) from error
    if file != str(path) and not Path(file).is_file():
        raise FileNotFoundError(f'{file} does not exist')
    try:
        return Config.fromfile(file)
    except OSError:
        raise
    # A config is a program: it may end in any kind of error.
    except Exception as error:
        raise ValueError(f'cannot be read: {type(error).__name__}: {error}') from error


def _model_config(config: str | Path | Config | dict) -> tuple[ConfigDict, str]:
    """The model's part of a config, free of what a training needs, and the scope of its names."""
    if isinstance(config, (str, Path)):
        config = read_config(config)
    scope = config.get('default_scope') or 'mmseg'
    model = config.get('model') or config
    if 'type' not in model:
        raise ValueError(
            f'expected a config with model=dict(type=...), got one with {sorted(config)}; is it a '
            'file of configs/_base_ that holds no model?'
        )
    # mmseg reads attributes of the parts: a plain dict has none.
    model = ConfigDict(copy.deepcopy(dict(model)))
    model.pop('auxiliary_head', None)
    forget_pretrained(model)
    return model, scope


def forget_pretrained(value: Any) -> None:
    """Removes ``pretrained`` from a model's config, in place, at every depth.

    Some backbones (TIMMBackbone) download their weights when they are built.
    """
    if isinstance(value, dict):
        if value.get('pretrained'):
            value['pretrained'] = False if value['pretrained'] is True else None
        for v in value.values():
            forget_pretrained(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            forget_pretrained(v)


# --- the call on shapes alone --------------------------------------------------------------------


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters and buffers take no memory; all other tensors are real.

    ``torch.device('meta')`` would stop at a constructor that reads values, as the drop path rates
    in ``[x.item() for x in torch.linspace(...)]`` of many backbones. A constructor may run what it
    has built, as CAR does: then all that a layer holds is on one device.
    """

    def __enter__(self):
        # A parameter that two modules share stays one.
        self.moved: dict[Tensor, Tensor] = {}
        self.hooks = [
            register_module_parameter_registration_hook(self._move),
            register_module_buffer_registration_hook(self._move),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def _move(self, module: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.is_meta:
            return tensor
        if tensor not in self.moved:
            moved = tensor.detach().to('meta')
            if isinstance(tensor, nn.Parameter):
                moved = nn.Parameter(moved, tensor.requires_grad)
            self.moved[tensor] = moved
        return self.moved[tensor]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs['device'] = 'meta'
        return func(*args, **kwargs)


def _count(
    module: nn.Module,
    again: Callable[[], nn.Module] | None,
    method: str,
    args: tuple,
    kwargs: dict[str, Any],
    drop: Sequence[str] = (),
) -> Counts:
    """One call on meta and, if that cannot be, on real tensors.

    Args:
        module: what is called; not changed unless there is ``again``.
        again: builds the module with real weights, where ``module`` is ours to use up.
        method: name of the method that is called.
        args: its arguments, on any device.
        kwargs: likewise.
        drop: sub-modules that are taken away before.
    """
    try:
        # What was built for this alone needs no copy; it is built again where it was in vain.
        moved = _meta_copy(module) if again is None else _on_meta(module)
        with torch.device('meta'):
            return _run(moved, method, _to(args, 'meta'), _to(kwargs, 'meta'), drop)
    except ImportError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print_log(
            f'{type(module).__name__} does not run on shapes alone ({reason}); counting on real '
            'tensors, which takes the time and the memory of one image',
            logger='current',
        )
    copied = copy.deepcopy(module) if again is None else again()
    device = next((str(p.device) for p in copied.parameters()), 'cpu')
    return _run(copied, method, _to(args, device), _to(kwargs, device), drop)


def _run(
    module: nn.Module, method: str, args: tuple, kwargs: dict[str, Any], drop: Sequence[str]
) -> Counts:
    """Counts a call of ``module``, which is used up: parts are dropped, methods replaced."""
    try:
        flop_counter = importlib.import_module('torch.utils.flop_counter')
    except ImportError as error:
        raise ImportError(
            f'counting needs torch >= 2.1 (torch.utils.flop_counter), found {torch.__version__}'
        ) from error
    for name in drop:
        module._modules.pop(name, None)
    # SyncBatchNorm takes no CPU tensors.
    module = revert_sync_batchnorm(module)
    # Not chained: the train() of some backbones returns nothing.
    module.eval()
    formulas = _formulas()
    foreign = _Foreign(formulas)
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)
    seen: dict[str, int] = {}
    for name, part in module.named_modules():
        _watch(name, part, counter.get_total_flops, seen)
    with torch.no_grad(), _unfused_attention(), foreign, counter:
        getattr(module, method)(*args, **kwargs)
    # torch counts two per multiply-add.
    seen[''] = counter.get_total_flops()
    flops, params = {}, {}
    for name, part in reversed(list(module.named_modules())):
        # A container such as ModuleList is never called.
        inside = (f'{name}.{child}' if name else child for child, _ in part.named_children())
        own = seen[name] // 2 if name in seen else sum(flops.get(n, 0) for n in inside)
        flops[name], params[name] = own, sum(p.numel() for p in part.parameters())
    flops, params = (dict(reversed(list(of.items()))) for of in (flops, params))
    return Counts(
        flops=flops[''],
        params=params[''],
        flops_by_module=flops,
        params_by_module=params,
        uncounted=tuple(sorted(foreign.names)),
    )


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """nn.MultiheadAttention in parts: its inference kernel hides them all in one operator."""
    mha = getattr(torch.backends, 'mha', None)
    if mha is None:
        yield
        return
    enabled = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(enabled)


def _watch(name: str, module: nn.Module, total: Callable[[], int], counts: dict[str, int]) -> None:
    """Adds what ``total`` grows by in ``module.forward`` to ``counts[name]``.

    Not a hook: segmentors call ``decode_head.forward(...)``, which runs none.
    """
    forward = module.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before = total()
        result = forward(*args, **kwargs)
        counts[name] = counts.get(name, 0) + total() - before
        return result

    module.forward = watched


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy whose tensors have no values; tensors that two modules share stay shared."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            for tensor in held.values():
                if isinstance(tensor, Tensor):
                    memo[id(tensor)] = _valueless(tensor)
    return copy.deepcopy(module, memo)


def _on_meta(module: nn.Module) -> nn.Module:
    """``module`` itself, its tensors without values; tensors that two modules share stay shared."""
    memo: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    held[name] = memo.setdefault(tensor, _valueless(tensor))
    return module


def _valueless(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to('meta')
    return nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved


def _to(value: Any, device: str) -> Any:
    """Tensors in ``value`` on ``device``; a meta tensor becomes noise where values are needed."""
    if isinstance(value, Tensor):
        if not value.is_meta or device == 'meta':
            return value.to(device)
        if value.is_floating_point():
            return torch.rand(value.shape, dtype=value.dtype, device=device)
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    # Not named tuples and the like: their constructors differ.
    if type(value) in (list, tuple):
        return type(value)(_to(v, device) for v in value)
    return value


# --- what torch's own counter leaves out ---------------------------------------------------------


def _sdpa(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _deform_conv2d(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    # The samples between pixels are element-wise work.
    return 2 * x[0] * prod(out_shape[-2:]) * prod(weight)


def _formulas() -> dict[Any, Any]:
    """Operators and their cost from the shapes of their arguments, in torch's unit."""
    aten = {
        'mv': lambda matrix, vector, *_, **__: 2 * prod(matrix),
        'addmv': lambda bias, matrix, vector, *_, **__: 2 * prod(matrix),
        'dot': lambda a, b, *_, **__: 2 * prod(a),
        'vdot': lambda a, b, *_, **__: 2 * prod(a),
        'addbmm': lambda bias, a, b, *_, **__: 2 * prod(a) * b[-1],
        '_scaled_dot_product_flash_attention_for_cpu': _sdpa,
        '_scaled_dot_product_fused_attention_overrideable': _sdpa,
    }
    formulas = {
        getattr(torch.ops.aten, name): formula
        for name, formula in aten.items()
        if hasattr(torch.ops.aten, name)
    }
    if hasattr(torch.ops.torchvision, 'deform_conv2d'):
        formulas[torch.ops.torchvision.deform_conv2d] = _deform_conv2d
    return formulas


def _shortcuts() -> dict[Any, Callable[..., Any]]:
    """Shapes of the operators that a model calls most, without what PyTorch's own way costs.

    Its shape functions of batch norm and of element-wise operators are written in Python and check
    a lot; for these cases the result has the input's shape. Each takes the operator's arguments and
    returns None where it is not that simple.
    """
    aten = torch.ops.aten

    def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return aten.empty_like.default(x)

    def in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    def sum_of(x: Tensor, y: Any, **__: Any) -> Tensor | None:
        alike = isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)
        return aten.empty_like.default(x) if alike and y.is_meta else None

    def batch_norm(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        saved = aten.new_empty.default(x, [x.shape[1]])
        return aten.empty_like.default(x), saved, saved

    def bilinear(x: Tensor, size: Any, *_: Any, **__: Any) -> Tensor | None:
        return None if size is None else aten.new_empty.default(x, [*x.shape[:-2], *size])

    known = {
        '_native_batch_norm_legit_no_training.default': batch_norm,
        'relu.default': same,
        'gelu.default': same,
        'silu.default': same,
        'relu_.default': in_place,
        'silu_.default': in_place,
        'add.Tensor': sum_of,
        'add_.Tensor': in_place,
        'upsample_bilinear2d.default': bilinear,
        'upsample_bilinear2d.vec': bilinear,
    }
    parts = {name: name.split('.') for name in known}
    return {
        getattr(getattr(aten, packet), overload): known[name]
        for name, (packet, overload) in parts.items()
        if hasattr(aten, packet) and hasattr(getattr(aten, packet), overload)
    }


class _Foreign(TorchDispatchMode):
    """Notes the operators from outside PyTorch that no formula knows; takes shortcuts."""

    # flex_attention and the like are PyTorch's own.
    supports_higher_order_operators = True

    def __init__(self, known: dict[Any, Any]) -> None:
        super().__init__()
        self.known = known
        self.names: set[str] = set()
        self.shortcuts = _shortcuts()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, 'overloadpacket', None)
        own = getattr(func, 'namespace', 'aten') in ('aten', 'prim', 'prims')
        if packet is not None and not own and packet not in self.known:
            self.names.add(str(packet))
        kwargs = kwargs or {}
        if func in self.shortcuts and args[0].is_meta:
            result = self.shortcuts[func](*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)
