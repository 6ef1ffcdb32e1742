"""Converts the authors' released GFF model to a checkpoint of configs/gff/gff-dfp_wrn38-d8_*.

    python tools/model_converters/gff_wrn38.py released.pth gff-dfp_wrn38.pth

SRC is a checkpoint of DeepWV3PlusGFFNet from the authors' repository (lxtGH/DecoupleSegNets). Its
names may have any prefix (``module.``, ...). DST loads strictly into the model of the config with
as many classes. The authors' classifier has no bias; here its bias is set to zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    CONFIGS,
    check_checkpoint,
    exits_on_input_error,
)

import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from wider_resnet import backbone_state, parse_args

import mmseg_fusion.models  # noqa: F401
from mmseg_fusion.checkpoints import read_checkpoint, some, weights_of

#: The parameter by which the head is found in a checkpoint.
FIRST = 'gff_head.d_in1.0.weight'
#: Their classifier.
CLASSIFIER = 'gff_head.cls.6.weight'
#: The model of the configs.
MODEL = CONFIGS / '_base_' / 'models' / 'gff_wrn38-d8.py'


def layers() -> Iterator[tuple[str, str]]:
    """Names of the layers in the authors' model, and in ``GFFHead``."""
    conv_norm = (('0', 'conv'), ('1', 'bn'))
    for theirs, ours in conv_norm:
        yield f'aspp.img_conv.{theirs}', f'context.image_pool.1.{ours}'
        for i in range(4):
            yield f'aspp.features.{i}.{theirs}', f'context.aspp_modules.{i}.{ours}'
        for i in range(3):
            yield f'gff_head.d_in{i + 1}.{theirs}', f'neck.reduce.{i}.{ours}'
    yield 'bot_aspp', 'context.bottleneck.conv'
    for i in range(3):
        yield f'gff_head.gate{i + 1}.0', f'neck.gates.{i}.0'
        for j in range(2):
            block, layer = f'gff_head.dense_{3 * (i + 1)}', f'pyramid.layers.{i}.{j}'
            yield f'{block}.norm{j + 1}', f'{layer}.bn'
            yield f'{block}.conv{j + 1}', f'{layer}.conv'
    for i in range(2):
        yield f'gff_head.cls.{3 * i}', f'final.{i}.conv'
        yield f'gff_head.cls.{3 * i + 1}', f'final.{i}.bn'
    yield CLASSIFIER.rpartition('.')[0], 'conv_seg'


def head_state(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """The state of the ``GFFHead`` that is equivalent to the head in ``state``.

    Args:
        state: tensors of the authors' model by name.
        what: the file, for messages.

    Raises:
        SystemExit: ``state`` does not hold exactly such a head; the message says why.
    """
    prefixes = [key[: -len(FIRST)] for key in state if f'.{key}'.endswith(f'.{FIRST}')]
    if len(prefixes) != 1:
        candidates = some([f'{p}{FIRST}' for p in prefixes]) or f'none in: {some(list(state))}'
        raise SystemExit(
            f'{what} is not a checkpoint of the released GFF model: expected one tensor {FIRST} '
            f'with any prefix, found {candidates}'
        )
    (prefix,) = prefixes
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    own = {k: v for k, v in own.items() if k.startswith(('gff_head.', 'aspp.', 'bot_aspp.'))}
    if CLASSIFIER not in own:
        raise SystemExit(f'{what} does not fit the released GFF model:\n  missing: {CLASSIFIER}')
    cfg = Config.fromfile(MODEL).model.decode_head
    with torch.device('meta'):
        expected = MODELS.build(dict(cfg, num_classes=len(own[CLASSIFIER]))).state_dict()
    names = {ours: theirs for theirs, ours in layers()}
    taken, wrong = {}, dict(missing=[], shape=[])
    for name, value in expected.items():
        layer, _, kind = name.rpartition('.')
        theirs = f'{names[layer]}.{kind}'
        if theirs in own:
            taken[name] = own.pop(theirs)
        elif name == 'conv_seg.bias' or kind == 'num_batches_tracked':
            # Files older than PyTorch 0.4.1 have no counters.
            taken[name] = torch.zeros(value.shape, dtype=value.dtype)
        else:
            wrong['missing'].append(theirs)
            continue
        if taken[name].shape != value.shape:
            shapes = f'{tuple(taken[name].shape)} instead of {tuple(value.shape)}'
            wrong['shape'].append(f'{theirs} {shapes}')
    wrong['unknown'] = list(own)
    lines = [f'{kind}: {some(names)}' for kind, names in wrong.items() if names]
    if lines:
        raise SystemExit('\n  '.join([f'{what} does not fit the released GFF model:', *lines]))
    broken = [name for name, value in taken.items() if not value.isfinite().all()]
    if broken:
        raise SystemExit(f'{what} has values that are NaN or infinite in {some(broken)}')
    return taken


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv, __doc__, 'gff_wrn38')
    check_checkpoint(args.src)
    state = weights_of(read_checkpoint(args.src), args.src)
    head = head_state(state, args.src)
    backbone, _ = backbone_state(state, args.src)
    parts = dict(backbone=backbone, decode_head=head)
    whole = {f'{part}.{name}': v for part, tensors in parts.items() for name, v in tensors.items()}
    classes = len(head['conv_seg.weight'])
    args.outputs.save(args.dst, dict(meta=dict(num_classes=classes), state_dict=whole))
    print(
        f'{len(backbone)} tensors of the backbone and {len(head)} of the head taken, for {classes} '
        f'classes\n{args.dst} written; it loads into the model of '
        'configs/gff/gff-dfp_wrn38-d8_4xb2-100k_cityscapes-864x864.py'
    )


if __name__ == '__main__':
    main()
