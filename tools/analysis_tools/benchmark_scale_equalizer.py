"""Time of one training step of a config's model with each form of scale equalization.

    python tools/analysis_tools/benchmark_scale_equalizer.py CONFIG [--shape H W] [--repeat N]

Four variants take turns in one process: the plain model, the equalizers folded into the fusion
layers, as explicit modules, and batch norm after upsampling in their place. Synthetic images, no
pretrained weights. Prints medians and ratios to the plain model.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from benchmark import build_model, synthetic_batch
from mmcv.cnn import ConvModule
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.models.utils import resize
from torch import Tensor, nn

from mmseg_fusion.channels import image_channels
from mmseg_fusion.cli import read_config
from mmseg_fusion.fusions import (
    Fusion,
    FusionTracer,
    constants,
    fold_plan,
    install_equalizer,
    measure_branches,
    plan_equalization,
)

VARIANTS = ('plain', 'fold', 'module', 'batch norm after upsampling')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, repeat=20, warmup=3, batch_size=4, shape=(128, 128))
    add = parser.add_argument
    part = 'the whole model, or its decode head alone on fixed features'
    add('config', help='any MMSegmentation config whose decode head concatenates')
    add('--part', choices=('model', 'head'), default='model', help=part)
    add('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    return harness.parse(parser, argv)


def branch_ends(head: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the ConvModules whose outputs, upsampled, are branches of the head's fusions."""
    outputs: dict[str, Tensor] = {}
    ends: dict[str, None] = {}

    def compare(fusion: Fusion, x: Tensor) -> None:
        if not fusion.equalizable:
            return
        for part in fusion.split(x):
            for name, out in outputs.items():
                if out.shape[:2] != part.shape[:2]:
                    continue
                up = resize(out, part.shape[2:], mode='bilinear', align_corners=head.align_corners)
                if torch.equal(up, part):
                    ends[name] = None

    handles = [
        module.register_forward_hook(lambda m, x, y, name=name: outputs.__setitem__(name, y))
        for name, module in head.named_modules()
        if isinstance(module, ConvModule) and module.with_norm
    ]
    try:
        with torch.no_grad(), FusionTracer(head, compare):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(ends)


def variants(cfg: Config, args: argparse.Namespace) -> tuple[dict[str, nn.Module], dict]:
    """The four models, and the batch that they train on."""
    torch.manual_seed(0)
    head = cfg.model.decode_head
    if not isinstance(head, dict):
        raise SystemExit('model.decode_head must be one head, not a cascade')
    plain = build_model(cfg.model, args.shape, args.device)
    channels = image_channels(plain)
    batch = synthetic_batch(args.shape, args.batch_size, plain.num_classes, args.device, channels)

    def run(_=None) -> None:
        plain._run_forward(plain.data_preprocessor(batch, True), mode='loss')

    traced, measured = measure_branches(plain, [batch], run)
    fusions = [f for f in traced.values() if f.name.startswith('decode_head.') and f.equalizable]
    if not fusions:
        raise SystemExit(f'{head.type} has no layer that takes concatenated features')
    folded, explicit = copy.deepcopy(plain), copy.deepcopy(plain)
    for fusion in fusions:
        plan = plan_equalization(fusion, measured[fusion.name])
        fold_plan(plan, folded.get_submodule(plan['name']))
        install_equalizer(explicit.get_submodule(plan['name']), *constants(plan))
    normed = dict(
        head,
        type='BatchNormAfterUpsampling',
        head=head.type,
        layers=[f.name.partition('.')[2] for f in fusions],
        branches=branch_ends(plain.decode_head, run),
    )
    other = build_model(ConfigDict(cfg.model, decode_head=normed), args.shape, args.device)
    models = dict(zip(VARIANTS, (plain, folded, explicit, other)))
    return {name: model.train() for name, model in models.items()}, batch


def make_step(model: nn.Module, batch: dict, cfg: Config, part: str) -> harness.Step:
    """A training step of the model, or of its decode head on fixed features."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    if part == 'model':
        return lambda: model.train_step(batch, wrapper)
    data = model.data_preprocessor(batch, True)
    with torch.no_grad():
        features = model.extract_feat(data['inputs'])

    def step() -> None:
        losses = model.decode_head.loss(features, data['data_samples'], model.train_cfg)
        wrapper.update_params(model.parse_losses(losses)[0])

    return step


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options, ['model', 'optim_wrapper'])
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    models = functools.lru_cache(None)(lambda: variants(cfg, args))

    def build_step(variant: str) -> harness.Step:
        built, batch = models()
        return make_step(built[variant], batch, cfg, args.part)

    case = harness.Case('training step', VARIANTS, build_step, base='plain', memory=False)
    h, w = args.shape
    what = f'{Path(args.config).stem}, {args.part}: batch {args.batch_size}, {h} x {w}'
    return harness.run([case], args, __file__, what)


if __name__ == '__main__':
    main()
