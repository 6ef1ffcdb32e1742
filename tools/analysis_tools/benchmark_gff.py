"""Time and peak memory of a training step with each fusion of GFF's table 1, and with DFP.

    python tools/analysis_tools/benchmark_gff.py [--config CONFIG] [--shape H W] [--mode inference]
    python tools/analysis_tools/benchmark_gff.py --whole

The variants are a config's GFFHead with ``fusion`` and ``dfp`` exchanged, and its context alone,
the baseline. Measured is the decode head on noise in the shapes of the backbone's levels, forward
and backward to weights and levels; with ``--whole`` a step of the whole model, backbone, auxiliary
head, loss and optimizer included. Pretrained weights are not loaded: they change no speed.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Sequence
from pathlib import Path

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from _harness import noise
from benchmark import build_head, level_shapes, make_step, read_model
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from mmseg_fusion.analysis.counting import count_call
from mmseg_fusion.models.decode_heads import GFFHead

#: What is exchanged in the head: arguments of the neck, and of the head itself.
VARIANTS: dict[str, tuple[dict, dict] | None] = {
    'no fusion': None,
    'concat': (dict(fusion='concat'), dict(dfp=None)),
    'add': (dict(fusion='add'), dict(dfp=None)),
    'fpn': (dict(fusion='fpn'), dict(dfp=None)),
    'gated_fpn': (dict(fusion='gated_fpn'), dict(dfp=None)),
    'gff': (dict(fusion='gff'), dict(dfp=None)),
    'gff + dfp': (dict(fusion='gff'), dict(dfp='conv')),
}
#: The ratios are to this one: as many levels see as many others, without gates.
BASE = 'concat'
#: What GFF may take of its time.
LIMIT = 1.15

#: What the context, as a head of its own, takes from the head that it is in.
COMMON = (
    'channels',
    'num_classes',
    'dropout_ratio',
    'norm_cfg',
    'act_cfg',
    'conv_cfg',
    'align_corners',
    'loss_decode',
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    config = ('gff_r50-d8', 'GFFHead')
    parser = harness.make_parser(__doc__, batch_size=2, amp=True, shape=(512, 512), config=config)
    names, choice = list(VARIANTS), 'of: ' + ', '.join(map(repr, VARIANTS)) + '; default: all'
    parser.add_argument(
        '--variants', nargs='+', choices=names, default=names, metavar='VARIANT', help=choice
    )
    parser.add_argument('--whole', action='store_true', help='the whole model, not the head alone')
    parser.add_argument('--mode', choices=['train', 'inference'], default='train')
    args = harness.parse(parser, argv)
    if args.mode == 'train' and args.batch_size < 2:
        parser.error(
            'argument --batch-size: expected at least 2 with --mode train, got 1: the context is '
            'pooled to one cell, and batch norm needs two values'
        )
    return args


def vary(model: ConfigDict, variant: str) -> ConfigDict:
    """The model with the variant's decode head."""
    model = copy.deepcopy(model)
    head, change = model.decode_head, VARIANTS[variant]
    if change is not None:
        neck, own = change
        head.neck = dict(head.get('neck') or {}, **neck)
        head.update(own)
        return model
    # The context with the classifier: what the fusion is added to.
    common = {k: head[k] for k in COMMON if k in head}
    last = dict(in_channels=head.in_channels[-1], in_index=len(head.in_channels) - 1)
    if 'in_index' in head:
        last['in_index'] = head.in_index[-1]
    default = inspect.signature(GFFHead).parameters['context'].default
    model.decode_head = ConfigDict({**common, **last, **head.get('context', default)})
    return model


def head_step(head: nn.Module, levels: Sequence[Tensor], args: argparse.Namespace) -> harness.Step:
    """A function that runs one step of a decode head."""

    def backward(logits: Tensor) -> None:
        logits.backward(torch.ones_like(logits))

    return harness.module_step(
        head, levels, lambda: head(levels), backward if args.mode == 'train' else None, args
    )


def whole_step(model: ConfigDict, args: argparse.Namespace) -> harness.Step:
    """A function that runs one step of a model, as benchmark.py has it."""
    optimizer = dict(type='SGD', lr=1e-3, momentum=0.9, weight_decay=1e-4)
    cfg = Config(dict(model=model, optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer)))
    # A base of a config has none, and training pads to it.
    cfg.model.data_preprocessor.size = args.shape
    return make_step(cfg, args.mode, args.shape, args.batch_size, args.device, args.amp)[0]


def make_case(args: argparse.Namespace) -> harness.Case:
    """All variants that are asked for, each once."""
    model = read_model(args.config, 'GFFHead')
    shapes = level_shapes(model, args.shape, args.batch_size)
    variants = tuple(dict.fromkeys(args.variants))

    def build(variant: str) -> harness.Step:
        if args.whole:
            return whole_step(vary(model, variant), args)
        levels = noise(shapes, args.device, args.mode == 'train')
        return head_step(build_head(vary(model, variant)), levels, args)

    single = [torch.empty(1, *shape[1:], device='meta') for shape in shapes]
    counts = {v: count_call(build_head(vary(model, v)), single) for v in variants}
    return harness.Case(
        Path(args.config).stem,
        variants,
        build,
        base=BASE,
        columns=harness.count_columns(counts),
    )


def judge(result: harness.Result) -> str | None:
    """Whether GFF keeps to its limit; None where it or the base was not measured."""
    if not {'gff', BASE} <= set(result.case.variants):
        return None
    ratio = result.ratio('gff', BASE)
    kept = 'within' if ratio <= LIMIT else 'above'
    return f'gff takes {ratio:.3f} times as long as {BASE}, {kept} {LIMIT}'


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    what = 'whole model' if args.whole else 'decode head'
    what += ', training step' if args.mode == 'train' else ', inference'
    height, width = args.shape
    what += f': {args.batch_size} image(s) of {height} x {width}, '
    what += 'mixed precision' if args.amp else 'float32'
    what += '; counts of the decode head for one image'
    results = harness.run(
        [make_case(args)], args, __file__, what, smaller='--batch-size, --shape or --variants'
    )
    for result in results:
        print(judge(result) or '')
    return results


if __name__ == '__main__':
    main()
