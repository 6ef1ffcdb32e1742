"""Time of class-aware regularization: the sums of the classes in both ways, and all its losses.

::

    python tools/analysis_tools/benchmark_car.py [--shapes 4x512x65x65 ...] [--classes 59 171]

Forward and backward to the feature, on labels in patches as real ones are. The variants take turns
in one process:

- ``sums, scatter``: every feature added at its class' place;
- ``sums, one_hot``: the product with a dense matrix of pixels and classes, as the authors' code;
- ``all losses``: ``ClassAwareRegularization`` with its defaults.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
import mmseg_fusion  # noqa: E402, F401  isort: skip

import torch  # noqa: E402
from benchmark import measure  # noqa: E402  (the script beside this one)
from prettytable import PrettyTable  # noqa: E402
from torch import Tensor  # noqa: E402

from mmseg_fusion.models.losses import ClassAwareRegularization  # noqa: E402
from mmseg_fusion.models.losses.class_aware_regularization import class_sums  # noqa: E402

Shape = tuple[int, int, int, int]

IGNORED = 255
#: Patches of one class along each side of a label.
PATCHES = 6


def shape_of(text: str) -> Shape:
    """``'4x512x65x65'`` as numbers."""
    parts = text.lower().split('x')
    if len(parts) != 4 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f'expected NxCxHxW such as 4x512x65x65, got {text!r}')
    return tuple(map(int, parts))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--shapes',
        type=shape_of,
        nargs='+',
        default=[(4, 512, 65, 65)],
        metavar='NxCxHxW',
        help='of the feature; default: 4x512x65x65',
    )
    parser.add_argument('--classes', type=int, nargs='+', default=[59, 171], help='default: 59 171')
    parser.add_argument('--repeat', type=int, default=10, help='steps that are timed; default: 10')
    parser.add_argument('--warmup', type=int, default=2, help='steps before them; default: 2')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='CPU threads of torch')
    args = parser.parse_args(argv)
    limits = [('repeat', args.repeat, 1), ('warmup', args.warmup, 0)]
    limits += [('classes', number, 1) for number in args.classes]
    limits += [] if args.threads is None else [('threads', args.threads, 1)]
    for name, value, least in limits:
        if value < least:
            parser.error(f'argument --{name}: expected at least {least}, got {value}')
    if max(args.classes) > IGNORED:
        parser.error(f'argument --classes: {IGNORED} is the ignored label, got {max(args.classes)}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    return args


def make_label(shape: Shape, classes: int, device: str) -> Tensor:
    """(N, H, W) in patches of one class each, every sixth ignored."""
    n, _, h, w = shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(classes, (n, 1, PATCHES, PATCHES), generator=generator)
    coarse.view(-1)[::6] = IGNORED
    label = torch.nn.functional.interpolate(coarse.float(), (h, w), mode='nearest')
    return label[:, 0].long().to(device)


def make_steps(shape: Shape, classes: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """By name, a function that runs one variant forward and backward and gives its result."""
    torch.manual_seed(0)
    feat = torch.randn(shape, device=device).requires_grad_()
    label = make_label(shape, classes, device)
    index = label.flatten(1).masked_fill(label.flatten(1) == IGNORED, classes)
    loss = ClassAwareRegularization(classes)

    def sums(implementation: str) -> Tensor:
        found = class_sums(feat.flatten(2), index, classes, implementation)
        torch.autograd.grad(found, feat, torch.ones_like(found))
        return found.detach()

    def losses() -> Tensor:
        found = sum(loss(feat, label).values())
        torch.autograd.grad(found, feat)
        return found.detach()

    return {
        'sums, scatter': lambda: sums('scatter'),
        'sums, one_hot': lambda: sums('one_hot'),
        'all losses': losses,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith('cuda')

    def synchronize() -> None:
        if on_gpu:
            torch.cuda.synchronize(args.device)

    device = torch.cuda.get_device_name(args.device) if on_gpu else 'CPU'
    print(f'forward and backward, float32, {device}, {torch.get_num_threads()} thread(s)')
    for shape in args.shapes:
        for classes in args.classes:
            steps = make_steps(shape, classes, args.device)
            seconds = measure(list(steps.values()), args.repeat, args.warmup, synchronize)
            times = dict(zip(steps, seconds))
            title = f'{" x ".join(map(str, shape))}, {classes} classes'
            table = PrettyTable([title, 'median ms', 'min', 'max'])
            table.align = 'r'
            table.align[title] = 'l'
            for name, values in times.items():
                row = (statistics.median(values), min(values), max(values))
                table.add_row([name, *(f'{1000 * v:.2f}' for v in row)])
            print(table)
            # Of the pairs of each turn, so that a slow moment of the machine counts for both.
            pairs = zip(times['sums, one_hot'], times['sums, scatter'])
            ratio = statistics.median(slow / fast for slow, fast in pairs)
            print(f'one_hot takes {ratio:.2f} times as long as scatter')


if __name__ == '__main__':
    main()
