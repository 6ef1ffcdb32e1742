"""Time and peak memory of HFGD: its axial attention, and its head against the upsampler alone.

    python tools/analysis_tools/benchmark_hfgd.py [--shapes 1x256x129x257 ...] [--parts attention]
    python tools/analysis_tools/benchmark_hfgd.py --parts train inference [--shape H W]

``attention``: the column and the row pass of axial attention with four heads, forward and backward
to query, key and value; the 1x1 convolutions that make these are left out.

``train`` and ``inference``: a step of the decode head of a config on noise in the shapes of the
backbone's levels; in training with all its losses, and backward to weights and levels. Pretrained
weights are not loaded, class-aware regularization is left out: benchmark_car.py times it.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from _harness import noise
from benchmark import build_head, level_shapes, read_model, synthetic_batch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmseg_fusion.channels import image_channels
from mmseg_fusion.models.layers import AxialAttention
from mmseg_fusion.models.layers.attention import DotProductAttention, attention_map

HEADS = 4
#: Output strides 4 and 2 of a crop of 513 x 1025.
SHAPES: tuple[harness.Shape, ...] = ((1, 256, 129, 257), (1, 256, 258, 514))
PARTS = ('attention', 'train', 'inference')
#: The variants of each part; the ratios are to the first. The layer of the package, on PyTorch's
#: ``scaled_dot_product_attention``, and ``softmax(q k^T / sqrt(D)) v`` written out, with attention
#: maps of W x H x H and H x W x W for each head.
ATTENTION = ('fused', 'plain')
HEAD: dict[str, dict] = {
    'upsampler': dict(encoder=None, guidance=False, axial_attention=False),
    '+ axial attention': dict(encoder=None, guidance=False),
    'HFGD': {},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(
        __doc__, repeat=5, warmup=1, batch_size=1, amp=True, shape=(513, 513),
        shapes=('the value, for attention', SHAPES), config=('hfgd_r50', 'HFGDHead'),
    )  # fmt: skip
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='default: all')
    args = harness.parse(parser, argv)
    for shape in args.shapes:
        if shape[1] % HEADS:
            parser.error(f'argument --shapes: expected a multiple of {HEADS} channels, got {shape}')
    return args


# --- axial attention -----------------------------------------------------------------------------


class PlainAttention(DotProductAttention):
    """The attention with its maps, which autograd keeps for the backward pass."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lines = query.shape[1]
        query, key, value = (self._heads(x) for x in (query, key, value))
        weights = attention_map(query, key, query.shape[-1] ** -0.5)
        out = weights.to(value.dtype) @ value
        return out.unflatten(1, (lines, self.num_heads)).transpose(2, 3).flatten(3)


def build_attention(variant: str, channels: int) -> AxialAttention:
    """The layer as HFGDHead has it; its 1x1 convolutions are not used."""
    options = dict(share_qk=False, share_axes=True, scale=None, norm_cfg=None, act_cfg=None)
    layer = AxialAttention(channels, channels, channels, HEADS, **options)
    if variant == 'plain':
        layer.column_attention = PlainAttention(HEADS, None)
        layer.row_attention = PlainAttention(HEADS, None)
    return layer


def make_inputs(shape: harness.Shape, device: str) -> list[Tensor]:
    """Query, key and value, of one width."""
    return noise([shape] * 3, device, True, torch.randn)


def passes(layer: AxialAttention, inputs: Sequence[Tensor]) -> Tensor:
    """Both passes, forward."""
    query, key, value = inputs
    return layer.row_pass(query, key, layer.column_pass(query, key, value))


def attention_step(
    variant: str, inputs: Sequence[Tensor], args: argparse.Namespace
) -> harness.Step:
    """A function that runs both passes forward and backward and gives their result."""
    layer = build_attention(variant, inputs[0].shape[1]).to(args.device)

    def forward() -> Tensor:
        with harness.autocast(args):
            return passes(layer, inputs)

    return harness.gradient_step(forward, inputs)


def attention_case(shape: harness.Shape, args: argparse.Namespace) -> harness.Case:
    """Both passes at one shape, on one set of inputs."""
    inputs = functools.lru_cache(None)(lambda: make_inputs(shape, args.device))
    return harness.Case(
        f'attention {"x".join(map(str, shape))}',
        ATTENTION,
        lambda variant: attention_step(variant, inputs(), args),
        base='fused',
        same=('plain',),
        compare=(('plain', 'fused'),),
    )


# --- the head ------------------------------------------------------------------------------------


def vary(model: ConfigDict, variant: str) -> ConfigDict:
    """The model with the variant's decode head."""
    model = copy.deepcopy(model)
    model.decode_head.update(HEAD[variant])
    return model


def head_step(
    head: nn.Module, levels: Sequence[Tensor], mode: str, args: argparse.Namespace
) -> harness.Step:
    """A function that runs one step of a decode head: its losses, or its logits."""
    # Of a batch only the labels are taken.
    batch = synthetic_batch(args.shape, args.batch_size, head.num_classes, args.device, channels=1)
    samples = batch['data_samples']

    def forward() -> object:
        return head.loss(levels, samples, {}) if mode == 'train' else head(levels)

    def backward(losses: dict[str, Tensor]) -> None:
        sum(value for name, value in losses.items() if 'loss' in name).backward()

    return harness.module_step(head, levels, forward, backward if mode == 'train' else None, args)


def head_case(mode: str, args: argparse.Namespace) -> harness.Case:
    """A step of the head in one mode."""
    model = read_model(args.config, 'HFGDHead')
    shapes = level_shapes(model, args.shape, args.batch_size)

    def build(variant: str) -> harness.Step:
        levels = noise(shapes, args.device, mode == 'train')
        return head_step(build_head(vary(model, variant)), levels, mode, args)

    height, width = args.shape
    return harness.Case(
        f'{mode} {args.batch_size}x{image_channels(model)}x{height}x{width}',
        tuple(HEAD),
        build,
        base='upsampler',
        compare=tuple((variant, 'upsampler') for variant in list(HEAD)[1:]),
    )


def cases_of(args: argparse.Namespace) -> list[harness.Case]:
    """What is asked for, in the order of :data:`PARTS`."""
    cases = []
    if 'attention' in args.parts:
        cases += [attention_case(shape, args) for shape in args.shapes]
    return cases + [head_case(mode, args) for mode in PARTS[1:] if mode in args.parts]


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    what = 'mixed precision' if args.amp else 'float32'
    smaller = '--shape, --shapes or --batch-size'
    return harness.run(cases_of(args), args, __file__, what, smaller=smaller)


if __name__ == '__main__':
    main()
