"""Converts published WiderResNet-38 (A2) weights to a checkpoint of the backbone, and checks them.

    python tools/model_converters/wider_resnet.py wider_resnet38.pth.tar wider_resnet38.pth

SRC is a checkpoint for image classification, or of a segmentation model on this backbone. Its names
may have any prefix (``module.``, ``backbone.``, ...); its classifier and heads are left out. DST
loads with ``init_cfg=dict(type='Pretrained', checkpoint=DST)``.

WiderResNet-38 without A2, which pools in front of modules 4 to 6, has the same names and shapes.
Its weights cannot be recognized, and do not work here.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
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
)

import torch

from mmseg_fusion.checkpoints import read_checkpoint, some, weights_of
from mmseg_fusion.errors import InputError
from mmseg_fusion.models.backbones.wider_resnet import WiderResNet

#: The parameter by which the backbone is found in a checkpoint.
FIRST = 'mod1.conv1.weight'


def parse_args(
    argv: Sequence[str] | None = None, doc: str = __doc__, tool: str = 'wider_resnet'
) -> argparse.Namespace:
    """The arguments of a converter, and under ``outputs`` what it may write."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('src', help='the published file, e.g. wider_resnet38.pth.tar')
    parser.add_argument('dst', type=Path, help='where to write the checkpoint')
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if '://' in args.src:
        parser.error(f'SRC must be a file, got {args.src}; download it first')
    if args.dst.is_dir():
        parser.error(f'DST must be a file to write, but {args.dst} is a folder')
    if args.dst.exists() and Path(args.src).exists() and args.dst.samefile(args.src):
        parser.error(f'DST is SRC itself, {args.dst}')
    if not args.dst.resolve().parent.is_dir():
        parser.error(f'there is no folder {args.dst.parent} to write to')
    args.outputs = Outputs(tool, [args.src], args.overwrite)
    try:
        args.outputs.check(args.dst)
    except InputError as error:
        parser.error(str(error))
    return args


def backbone_state(
    state: dict[str, torch.Tensor], what: str
) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """The backbone's part of ``state``, under the names of this package.

    Args:
        state: tensors by name.
        what: the file, for messages.

    Returns:
        The state of a :class:`WiderResNet` with all modules, and how many tensors of each other
        part of the model were left out.

    Raises:
        SystemExit: ``state`` does not hold exactly such a backbone; the message says why.
    """
    prefixes = [key[: -len(FIRST)] for key in state if f'.{key}'.endswith(f'.{FIRST}')]
    if len(prefixes) != 1:
        candidates = some([f'{p}{FIRST}' for p in prefixes]) or f'none in: {some(list(state))}'
        raise SystemExit(
            f'{what} is not a checkpoint with one WiderResNet: expected one tensor {FIRST} with '
            f'any prefix, found {candidates}'
        )
    (prefix,) = prefixes
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if 'mod2.block1.bn1.weight' in own:
        raise SystemExit(
            f'{what} is a WiderResNet with in-place activated batch norm: its norms are followed '
            'by leaky ReLU and scale by |weight|, another network; get the one with plain batch '
            'norm and ReLU'
        )
    with torch.device('meta'):
        expected = WiderResNet(out_indices=(7,)).state_dict()
    # Older than PyTorch 0.4.1, which began to count.
    counters = {name: torch.tensor(0) for name in expected if name.endswith('num_batches_tracked')}
    taken = {name: own.get(name, counters.get(name)) for name in expected}
    missing = [name for name, value in taken.items() if value is None]
    modules = tuple({f'{name.partition(".")[0]}.' for name in expected})
    foreign = [name for name in own if name.startswith(modules) and name not in expected]
    shapes = [
        f'{name} {tuple(value.shape)} instead of {tuple(expected[name].shape)}'
        for name, value in taken.items()
        if value is not None and value.shape != expected[name].shape
    ]
    wrong = [
        f'{kind}: {some(names)}'
        for kind, names in (('missing', missing), ('unknown', foreign), ('shape', shapes))
        if names
    ]
    if wrong:
        raise SystemExit('\n  '.join([f'{what} does not fit WiderResNet-38 A2:', *wrong]))
    broken = [name for name, value in taken.items() if not value.isfinite().all()]
    if broken:
        raise SystemExit(f'{what} has values that are NaN or infinite in {some(broken)}')
    names = (key[len(prefix) :] if key.startswith(prefix) else key for key in state)
    parts = Counter(name.partition('.')[0] for name in names if name not in expected)
    return taken, parts


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_checkpoint(args.src)
    weights = weights_of(read_checkpoint(args.src), args.src)
    state, left_out = backbone_state(weights, args.src)
    meta = dict(backbone='WiderResNet', depth=38)
    args.outputs.save(args.dst, dict(meta=meta, state_dict=state))
    counts = ', '.join(f'{part} ({count})' for part, count in sorted(left_out.items()))
    print(
        f'{len(state)} tensors of the backbone taken; left out: {counts or "nothing"}\n'
        f'{args.dst} written; it loads with '
        f"init_cfg=dict(type='Pretrained', checkpoint='{args.dst}') of a WiderResNet"
    )


if __name__ == '__main__':
    main()
