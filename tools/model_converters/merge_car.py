"""Converts a checkpoint trained with CAR for deployment: merges two 1x1 convolutions into one.

    python tools/model_converters/merge_car.py CONFIG CHECKPOINT OUT

OUT loads into the same config with ``--cfg-options model.car.merged=True``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    check_checkpoint,
    exits_on_input_error,
    model_files,
    read_config,
)

import torch
from mmengine.config import Config, DictAction
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import weights_to_cpu
from mmseg.registry import MODELS
from torch import nn

from mmseg_fusion.channels import image_channels
from mmseg_fusion.checkpoints import check_finite, read_checkpoint, weights_of
from mmseg_fusion.models.segmentors import CAREncoderDecoder, merge_car

#: An image that every model takes which the training crop fits.
SQUARE = (512, 512)
#: Largest difference of the logits that rounding explains, relative to the largest logit.
TOLERANCE = 1e-3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help="a config with model.type='CAREncoderDecoder'")
    parser.add_argument('checkpoint', help='what training wrote')
    parser.add_argument('out', type=Path, help='where to write the merged checkpoint')
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args()
    if args.out.exists() and args.out.samefile(args.checkpoint):
        parser.error(f'OUT is the checkpoint itself, {args.out}; merging cannot be undone')
    if not args.out.resolve().parent.is_dir():
        parser.error(f'there is no folder {args.out.parent} to write to')
    return args


def built(cfg: Config, merged: bool) -> nn.Module:
    model = copy.deepcopy(cfg.model)
    model.car = dict(model.get('car') or {}, merged=merged)
    # The weights come from the checkpoint.
    model.pop('pretrained', None)
    for part in ('backbone', 'neck'):
        if part in model:
            model[part].pop('init_cfg', None)
            model[part].pop('pretrained', None)
    return revert_sync_batchnorm(MODELS.build(model)).eval()


def loaded(model: nn.Module, state: dict, what: str) -> nn.Module:
    try:
        wrong = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise SystemExit(f'{what} does not fit the config: {error}') from error
    if wrong.missing_keys or wrong.unexpected_keys:
        raise SystemExit(
            f'{what} does not fit the config: missing {wrong.missing_keys[:5] or "none"}, '
            f'unexpected {wrong.unexpected_keys[:5] or "none"} (of {len(wrong.missing_keys)} and '
            f'{len(wrong.unexpected_keys)}). Give the config that it was trained with; a merged '
            'checkpoint cannot be merged again.'
        )
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """The logits of the model for noise, on a small image or, if it refuses that, a larger one."""
    generator = torch.Generator().manual_seed(0)
    for size in ((97, 129), SQUARE):
        image = torch.rand(1, image_channels(model), *size, generator=generator)
        try:
            out = model(image)
        except (RuntimeError, AssertionError):
            if size == SQUARE:
                raise
        else:
            break
    # DANet and EncNet give more than the prediction, which comes first.
    return out[0] if isinstance(out, (tuple, list)) else out


@exits_on_input_error
def main() -> None:
    args = parse_args()
    cfg = read_config(args.config, args.cfg_options)
    check_checkpoint(args.checkpoint)
    outputs = Outputs('merge_car', model_files([args.config, args.checkpoint]), args.overwrite)
    outputs.check(args.out)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    kind = cfg.model.type if isinstance(cfg.model.type, type) else MODELS.get(cfg.model.type)
    if kind is None or not issubclass(kind, CAREncoderDecoder):
        raise SystemExit(
            f'{args.config} has model.type={cfg.model.type!r}, which has nothing to merge; '
            "expected 'CAREncoderDecoder'"
        )
    checkpoint = read_checkpoint(args.checkpoint)
    state = weights_of(checkpoint, args.checkpoint)
    # Class centres that training keeps have no place in a merged model.
    trained = loaded(built(cfg, merged=False), state, args.checkpoint)
    check_finite(trained, args.checkpoint)
    before = sum(p.numel() for p in trained.parameters())
    try:
        with torch.no_grad():
            expected = logits(trained)
            merge_car(trained)
            merged = loaded(built(cfg, merged=True), trained.state_dict(), 'the merged model')
            actual = logits(merged)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(
            f'the merged model differs: largest difference of the logits {difference:.1e} of the '
            f'largest logit, expected less than {TOLERANCE:.0e}; nothing was written'
        )
    meta = dict(checkpoint.get('meta', {}), car_merged=True)
    whole = dict(meta=meta, state_dict=weights_to_cpu(merged.state_dict()))
    outputs.save(args.out, whole)
    after = sum(p.numel() for p in merged.parameters())
    print(
        f'{len(trained.car_layers)} layer(s) merged: {", ".join(trained.car_layers)}\n'
        f'parameters {before:,} -> {after:,}; largest difference of the logits, relative to the '
        f'largest logit: {difference:.1e}\n'
        f'{args.out} written; it loads with --cfg-options model.car.merged=True'
    )


if __name__ == '__main__':
    main()
