"""Gated fully fusion of feature levels, and the four fusions that it is compared with.

Li et al., "Gated Fully Fusion for Semantic Segmentation", AAAI 2020, arXiv 1904.01803.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule, kaiming_init
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers.levels import resize_to
from ..layers.single_value import explains_single_values

Fusion = Literal['gff', 'concat', 'add', 'fpn', 'gated_fpn']
Update = Literal['simultaneous', 'sequential']
Gate = Literal['map', 'channel']
GateInput = Literal['reduced', 'raw']

#: Fusions that have gates.
GATED = ('gff', 'gated_fpn')
#: Fusions that go from the last level to the first.
TOP_DOWN = ('fpn', 'gated_fpn')


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _sizes(terms: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The sizes that occur, each once."""
    # Compared, not hashed: torch.compile takes sizes that vary as symbols.
    sizes: list[tuple[int, int]] = []
    for term in terms:
        if _size(term) not in sizes:
            sizes.append(_size(term))
    return sizes


def _by_size(terms: Sequence[Tensor]) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """The sizes that occur, and for each the sum of the terms that have it."""
    sizes = _sizes(terms)
    sums: list[Tensor | None] = [None] * len(sizes)
    for term in terms:
        i = sizes.index(_size(term))
        sums[i] = term if sums[i] is None else sums[i] + term
    return sizes, sums


@MODELS.register_module()
@explains_single_values
class GatedFullyFusion(BaseModule):
    r"""Fuses every level of a backbone with every other one (equations 1 to 5).

    A 1x1 convolution reduces each level to ``channels``, which gives :math:`X_l`. The levels are
    fused, and then refined by ``num_convs`` 3x3 convolutions. Norm and activation follow every
    convolution. With gates :math:`G_l` (below), and all levels resized bilinearly to the size of
    level l, the fusions of table 1 are

    - ``'gff'``, equation 5:
      :math:`\tilde X_l = (1 + G_l) X_l + (1 - G_l) \sum_{i \ne l} G_i X_i`
    - ``'concat'``, equation 2: a 1x1 convolution of the concatenation of all :math:`X_i`
    - ``'add'``, equation 3: :math:`\tilde X_l = \sum_i X_i`
    - ``'fpn'``, equation 4: :math:`\tilde X_l = X_l + \tilde X_{l+1}`, :math:`\tilde X_L = X_L`
    - ``'gated_fpn'``: equation 5 with the level above as the only sender (chosen: the paper has no
      formula), :math:`\tilde X_l = (1 + G_l) X_l + (1 - G_l) G_{l+1} \tilde X_{l+1}`, and
      :math:`\tilde X_L = (1 + G_L) X_L`.

    Equation 5 is computed as :math:`(1 + G_l^2) X_l + (1 - G_l) \sum_i G_i X_i`, which is the same;
    all levels of one size can share this sum. Each product is computed once, products of one size
    are summed before they are resized, and a tensor that already has the right size is not resized.
    With strides 4, 8, 8, 8 two tensors are resized instead of six.

    Args:
        in_channels: channels of the levels, finest first.
        channels: of the reduced, fused and returned levels.
        fusion: see above. The configs of table 1 differ only in this argument.
        update: ``'simultaneous'``: every level is fused from the unfused ones, as equation 5 says.
            ``'sequential'``: the levels in front of l, which are already fused, enter its sum as
            :math:`G_i \tilde X_i`, as in the authors' code. Only ``'gff'`` uses this argument.
        gate: one map per level (``'map'``, the paper) or one per channel of a level (``'channel'``,
            the authors' code). Fusions without gates ignore this argument and the next.
        gate_input: input of the convolution :math:`w_l` in
            :math:`G_l = \mathrm{sigmoid}(w_l * X_l)`: the level as the backbone gives it
            (``'raw'``), or after its reduction (``'reduced'``, another reading of the paper). The
            paper and the authors' code support ``'raw'``. Section "Multi-level Feature Fusion"
            introduces :math:`X_i` with :math:`C_i` channels as extracted from the backbone, and its
            notation does not include the 1x1 convolutions of the reduction. Section "Gated Fully
            Fusion" gives :math:`w_i` the shape 1 x 1 x :math:`C_i`. The code computes the gate
            before the reduction.
        num_convs: 3x3 convolutions behind the fusion of each level. The authors' code has none.
        align_corners: of the resizing.
        conv_cfg: of all convolutions but those of the gates.
        norm_cfg: norm behind each convolution.
        act_cfg: activation behind each norm.
        init_cfg: initial weights.

    Shape:
        - inputs: ``len(in_channels)`` tensors (N, in_channels[l], H_l, W_l) of any sizes.
        - output: a tuple of as many tensors (N, channels, H_l, W_l).

    Attributes:
        gates: a ``ModuleList`` with the 1x1 convolution (with bias, chosen: the paper's formula has
            none and the authors' code has one) and the sigmoid of each level; None for fusions
            without gates. The convolutions start as in the authors' code, with Kaiming normal over
            the inputs and a bias of zero. This matters, because no norm follows them; PyTorch's
            default range is 0.41 times as wide.

    Raises:
        ValueError: an option that is none of the above, fewer than two levels, or another number
            of inputs than ``in_channels``.

    Example:
        >>> neck = GatedFullyFusion([16, 32], channels=8)
        >>> [tuple(y.shape) for y in neck((torch.rand(2, 16, 16, 16), torch.rand(2, 32, 8, 8)))]
        [(2, 8, 16, 16), (2, 8, 8, 8)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        fusion: Fusion = 'gff',
        update: Update = 'simultaneous',
        gate: Gate = 'map',
        gate_input: GateInput = 'raw',
        num_convs: int = 2,
        align_corners: bool = False,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = dict(type='BN'),  # noqa: B006
        act_cfg: dict | None = dict(type='ReLU'),  # noqa: B006
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(in_channels, (list, tuple)) or len(in_channels) < 2:
            raise ValueError(
                'GatedFullyFusion: in_channels must list the channels of two levels or more, '
                f'finest first, got {in_channels!r}'
            )
        for name, value, choices in (
            ('fusion', fusion, Fusion),
            ('update', update, Update),
            ('gate', gate, Gate),
            ('gate_input', gate_input, GateInput),
        ):
            if value not in get_args(choices):
                raise ValueError(
                    f'GatedFullyFusion: {name} must be one of {get_args(choices)}, got {value!r}'
                )
        if num_convs < 0:
            raise ValueError(f'GatedFullyFusion: num_convs must not be negative, got {num_convs}')
        self.in_channels = list(in_channels)
        self.channels = channels
        self.fusion = fusion
        self.update = update
        self.gate_input = gate_input
        self.align_corners = align_corners
        conv = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.reduce = nn.ModuleList(ConvModule(c, channels, 1, **conv) for c in in_channels)
        self.gates = self.mix = None
        if fusion in GATED:
            maps = channels if gate == 'channel' else 1
            self.gates = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(c if gate_input == 'raw' else channels, maps, 1), nn.Sigmoid()
                )
                for c in in_channels
            )
            for gate_conv, _ in self.gates:
                kaiming_init(gate_conv, mode='fan_in')
        if fusion == 'concat':
            total = channels * len(in_channels)
            self.mix = nn.ModuleList(ConvModule(total, channels, 1, **conv) for _ in in_channels)
        self.refine = nn.ModuleList(
            nn.Sequential(
                *(ConvModule(channels, channels, 3, padding=1, **conv) for _ in range(num_convs))
            )
            for _ in in_channels
        )

    def forward(
        self, inputs: Sequence[Tensor], with_reduced: bool = False
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The fused and refined levels; ``with_reduced``: and the reduced, unfused ones."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'GatedFullyFusion: expected {len(self.in_channels)} levels '
                f'(in_channels={self.in_channels}), got {len(inputs)}; set the out_indices of the '
                'backbone or in_channels'
            )
        levels = [reduce(x) for reduce, x in zip(self.reduce, inputs)]
        gates = None
        if self.gates is not None:
            seen = inputs if self.gate_input == 'raw' else levels
            gates = [gate(x) for gate, x in zip(self.gates, seen)]
        fused = self._fuse(levels, gates)
        outs = tuple(refine(x) for refine, x in zip(self.refine, fused))
        return (outs, tuple(levels)) if with_reduced else outs

    def _fuse(self, levels: list[Tensor], gates: list[Tensor] | None) -> list[Tensor]:
        if self.fusion == 'concat':
            return self._concatenated(levels)
        if self.fusion == 'add':
            return self._summed(levels)
        if self.fusion == 'fpn':
            fused = levels[-1:]
            for x in reversed(levels[:-1]):
                fused.append(x + self._resized(fused[-1], _size(x)))
            return fused[::-1]
        if self.fusion == 'gated_fpn':
            fused = [(1 + gates[-1]) * levels[-1]]
            for i in range(len(levels) - 2, -1, -1):
                sent = self._resized(gates[i + 1] * fused[-1], _size(levels[i]))
                fused.append(torch.addcmul((1 + gates[i]) * levels[i], 1 - gates[i], sent))
            return fused[::-1]
        if self.update == 'sequential':
            return self._sequential(levels, gates)
        sums = self._summed([gate * x for gate, x in zip(gates, levels)])
        # Equation 5 with the level's own product within the sum.
        return [
            torch.addcmul((1 + gate * gate) * x, 1 - gate, total)
            for x, gate, total in zip(levels, gates, sums)
        ]

    def _resized(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return resize_to(x, size, self.align_corners)

    def _summed(self, terms: list[Tensor]) -> list[Tensor]:
        """For every level the sum of all terms at its size; levels of a size share it."""
        sizes, sums = _by_size(terms)
        totals = [self._total(sizes, sums, size) for size in sizes]
        return [totals[sizes.index(_size(term))] for term in terms]

    def _total(
        self, sizes: list[tuple[int, int]], sums: list[Tensor], size: tuple[int, int]
    ) -> Tensor:
        """The sum of ``sums``, which have ``sizes``, at ``size``."""
        total = self._resized(sums[0], size)
        for other in sums[1:]:
            total = total + self._resized(other, size)
        return total

    def _concatenated(self, levels: list[Tensor]) -> list[Tensor]:
        sizes = _sizes(levels)
        stacks = [torch.cat([self._resized(x, size) for x in levels], 1) for size in sizes]
        return [mix(stacks[sizes.index(_size(x))]) for mix, x in zip(self.mix, levels)]

    def _sequential(self, levels: list[Tensor], gates: list[Tensor]) -> list[Tensor]:
        sent = [gate * x for gate, x in zip(gates, levels)]
        # Sums of what the fused levels send, at the sizes of those that are still to be fused.
        sizes = _sizes(levels)
        arrived: list[Tensor | None] = [None] * len(sizes)
        fused = []
        for i, (x, gate) in enumerate(zip(levels, gates)):
            total = arrived[sizes.index(_size(x))]
            if i + 1 < len(levels):
                unfused = self._total(*_by_size(sent[i + 1 :]), _size(x))
                total = unfused if total is None else total + unfused
            fused.append(torch.addcmul((1 + gate) * x, 1 - gate, total))
            product = gate * fused[i]
            for size in _sizes(levels[i + 1 :]):
                resized, k = self._resized(product, size), sizes.index(size)
                arrived[k] = resized if arrived[k] is None else arrived[k] + resized
        return fused

    def extra_repr(self) -> str:
        text = f'fusion={self.fusion!r}'
        if self.fusion == 'gff':
            text += f', update={self.update!r}'
        return text if self.gates is None else f'{text}, gate_input={self.gate_input!r}'
