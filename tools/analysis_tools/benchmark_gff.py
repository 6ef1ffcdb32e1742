"""Time and peak memory of a training step with each fusion of GFF's table 1, and with DFP.

::

    python tools/analysis_tools/benchmark_gff.py [--config CONFIG] [--shape H W] [--mode inference]
    python tools/analysis_tools/benchmark_gff.py --whole

The variants are the GFFHead of a config (configs/_base_/models/gff_r50-d8.py) with ``fusion`` and
``dfp`` exchanged, and its context alone, which is the baseline. They take turns in one process.
Measured is the decode head on noise in the shapes of the backbone's levels, forward and backward,
to the weights and to the levels; with ``--whole`` a step of the whole model, backbone, auxiliary
head, loss and optimizer included. Pretrained weights are not loaded: they change no speed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import CONFIGS, check_at_least, check_config  # noqa: E402  isort: skip

import torch  # noqa: E402
from benchmark import (  # noqa: E402  (the script beside this one)
    load_what_a_step_loads,
    make_step,
    measure,
    resident_peak,
)
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from prettytable import PrettyTable  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmseg_fusion.analysis.counting import count_call, forget_pretrained  # noqa: E402
from mmseg_fusion.models.decode_heads import GFFHead  # noqa: E402

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


@dataclass(frozen=True)
class Row:
    """What was measured of one variant.

    Attributes:
        variant: its name.
        params: learnable tensors' elements of the decode head.
        flops: multiply-adds of the decode head for one image.
        seconds: of each turn, one batch.
        memory: bytes at the peak, see :func:`header`; None where it was not measured.
    """

    variant: str
    params: int
    flops: int
    seconds: list[float]
    memory: int | None

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    def ratio(self, base: Row) -> float:
        """Median, over the turns, of this variant's time over another's."""
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--config',
        default=str(CONFIGS.resolve() / '_base_' / 'models' / 'gff_r50-d8.py'),
        help='with a GFFHead; default: configs/_base_/models/gff_r50-d8.py',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=list(VARIANTS),
        default=list(VARIANTS),
        metavar='VARIANT',
        help='of: ' + ', '.join(map(repr, VARIANTS)) + '; default: all',
    )
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(512, 512), metavar=('H', 'W'),
        help='of an image; default: 512 512',
    )  # fmt: skip
    parser.add_argument('--batch-size', type=int, default=2, help='default: 2')
    parser.add_argument('--whole', action='store_true', help='the whole model, not the head alone')
    parser.add_argument('--mode', choices=['train', 'inference'], default='train')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--threads', type=int, help='CPU threads of torch')
    parser.add_argument('--amp', action='store_true', help='float16; bfloat16 on the CPU')
    parser.add_argument('--repeat', type=int, default=10, help='turns that are timed; default: 10')
    parser.add_argument('--warmup', type=int, default=2, help='turns before them; default: 2')
    parser.add_argument('--no-memory', action='store_true', help='time only')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    # One variant's peak of resident memory, measured in a process of its own.
    parser.add_argument('--only-memory', choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shape = tuple(args.shape)
    if min(args.shape) < 1:
        found = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W, positive, got {found}')
    check_at_least(parser, args, batch_size=1, repeat=1, warmup=0, threads=1)
    if args.mode == 'train' and args.batch_size < 2:
        parser.error(
            'argument --batch-size: expected at least 2 with --mode train, got 1: the context is '
            'pooled to one cell, and batch norm needs two values'
        )
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    return args


# --- variants ------------------------------------------------------------------------------------


def read(path: str, head_type: str = 'GFFHead') -> ConfigDict:
    """The model of a config whose decode head is of a type.

    Raises:
        SystemExit: there is no such file, or its decode head is another one.
    """
    check_config(path)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    head = (cfg.get('model') or {}).get('decode_head')
    if not isinstance(head, dict) or head.get('type') != head_type:
        found = head.get('type') if isinstance(head, dict) else head
        raise SystemExit(f'{path}: model.decode_head must be of type {head_type}, got {found}')
    forget_pretrained(cfg.model)
    return cfg.model


def vary(model: ConfigDict, variant: str) -> ConfigDict:
    """The model with the variant's decode head."""
    model = Config(model.to_dict())._cfg_dict
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


def level_shapes(model: ConfigDict, args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Shapes of the backbone's levels."""
    with torch.device('meta'):
        backbone = revert_sync_batchnorm(MODELS.build(model.backbone))
        # Not chained: the train() of some backbones returns nothing.
        backbone.eval()
        levels = backbone(torch.empty(args.batch_size, 3, *args.shape))
    return [tuple(level.shape) for level in levels]


def build_head(model: ConfigDict) -> nn.Module:
    return revert_sync_batchnorm(MODELS.build(model.decode_head))


# --- one step ------------------------------------------------------------------------------------


def noise(shapes: Sequence[tuple[int, ...]], args: argparse.Namespace) -> list[Tensor]:
    """Levels, without negative values as behind ReLU."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.rand(shape, generator=generator).to(args.device) for shape in shapes]
    return [level.requires_grad_(args.mode == 'train') for level in levels]


def head_step(
    head: nn.Module, levels: Sequence[Tensor], args: argparse.Namespace
) -> Callable[[], object]:
    """A function that runs one step of a decode head."""
    half = torch.bfloat16 if args.device == 'cpu' else torch.float16
    head = head.to(args.device).train(args.mode == 'train')

    def forward() -> Tensor:
        with torch.autocast(torch.device(args.device).type, half, enabled=args.amp):
            return head(levels)

    def train() -> None:
        head.zero_grad(set_to_none=True)
        for level in levels:
            level.grad = None
        logits = forward()
        logits.backward(torch.ones_like(logits))

    @torch.no_grad()
    def infer() -> None:
        forward()

    return train if args.mode == 'train' else infer


def whole_step(model: ConfigDict, args: argparse.Namespace) -> Callable[[], object]:
    """A function that runs one step of a model, as benchmark.py has it."""
    optimizer = dict(type='SGD', lr=1e-3, momentum=0.9, weight_decay=1e-4)
    cfg = Config(dict(model=model, optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer)))
    # A base of a config has none, and training pads to it.
    cfg.model.data_preprocessor.size = args.shape
    return make_step(cfg, args.mode, args.shape, args.batch_size, args.device, args.amp)[0]


def build_step(
    model: ConfigDict, shapes: Sequence[tuple[int, ...]], args: argparse.Namespace
) -> Callable[[], object]:
    """A function that runs one step of what is asked for; heads get levels of their own."""
    if args.whole:
        return whole_step(model, args)
    return head_step(build_head(model), noise(shapes, args), args)


# --- memory --------------------------------------------------------------------------------------


def memory_here(
    model: ConfigDict, shapes: Sequence[tuple[int, ...]], args: argparse.Namespace
) -> int | None:
    """Growth of this process's peak (CPU), or of torch's allocations (GPU), by two steps."""
    on_gpu = args.device.startswith('cuda')
    if on_gpu:
        torch.cuda.synchronize(args.device)
        before = torch.cuda.memory_allocated(args.device)
        torch.cuda.reset_peak_memory_stats(args.device)
    else:
        load_what_a_step_loads()
        before = resident_peak()
    step = build_step(model, shapes, args)
    for _ in range(2):
        step()
    if on_gpu:
        return torch.cuda.max_memory_allocated(args.device) - before
    return None if before is None else resident_peak() - before


def memory_apart(variant: str, args: argparse.Namespace) -> int | None:
    """The same in a process of its own, as a CPU's peak never falls."""
    command = [sys.executable, __file__, '--only-memory', variant, '--device', args.device]
    command += ['--config', args.config, '--shape', *map(str, args.shape), '--mode', args.mode]
    command += ['--batch-size', str(args.batch_size)]
    command += ['--whole'] * args.whole + ['--amp'] * args.amp
    command += ['--threads', str(args.threads)] if args.threads else []
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f'measuring the memory of {variant} failed: {result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


# --- report --------------------------------------------------------------------------------------


def header(args: argparse.Namespace) -> str:
    """What is measured, and where."""
    on_gpu = args.device.startswith('cuda')
    if on_gpu:
        device = torch.cuda.get_device_name(args.device)
        how = "torch's largest allocation in two steps"
    else:
        device = f'{args.device}, {torch.get_num_threads()} thread(s)'
        how = 'growth of the largest resident set by two steps, in a process of its own'
    what = 'whole model' if args.whole else 'decode head'
    what += ', training step' if args.mode == 'train' else ', inference'
    height, width = args.shape
    return (
        f'{Path(args.config).stem}, {what}: {args.batch_size} image(s) of {height} x {width}, '
        f'{"mixed precision" if args.amp else "float32"}, {device}, torch {torch.__version__}\n'
        f'medians of {args.repeat} turns; peak MiB: {how}, weights and levels included; '
        'parameters and multiply-adds: of the decode head, for one image'
    )


def report(rows: Sequence[Row]) -> str:
    """The printed text: a row per variant, and whether GFF keeps to its limit."""
    base = next((row for row in rows if row.variant == BASE), None)
    table = PrettyTable(
        ['variant', 'M parameters', 'G multiply-adds', 'median ms', 'min', 'max']
        + [f'/ {BASE}', 'peak MiB', f'/ {BASE} ']
    )
    table.align = 'r'
    table.align['variant'] = 'l'
    for row in rows:
        cells = [row.variant, f'{row.params / 1e6:.2f}', f'{row.flops / 1e9:.2f}']
        cells += [f'{1000 * s:.2f}' for s in (row.median, min(row.seconds), max(row.seconds))]
        cells.append(f'{row.ratio(base):.3f}' if base else '-')
        cells.append('-' if row.memory is None else f'{row.memory / 2**20:.0f}')
        known = base and base.memory and row.memory is not None
        table.add_row([*cells, f'{row.memory / base.memory:.3f}' if known else '-'])
    lines = [str(table)]
    gff = next((row for row in rows if row.variant == 'gff'), None)
    if base and gff:
        ratio = gff.ratio(base)
        kept = 'within' if ratio <= LIMIT else 'above'
        lines.append(f'gff takes {ratio:.3f} times as long as {BASE}, {kept} {LIMIT}')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Advice for training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    model = read(args.config)
    shapes = level_shapes(model, args)
    if args.only_memory:
        print(json.dumps(memory_here(vary(model, args.only_memory), shapes, args)))
        return []
    print(header(args), flush=True)
    # In the given order, each once.
    models = {variant: vary(model, variant) for variant in args.variants}
    single = [torch.empty(1, *shape[1:], device='meta') for shape in shapes]
    counts = {variant: count_call(build_head(m), single) for variant, m in models.items()}
    on_gpu = args.device.startswith('cuda')
    try:
        # Before anything large lives here: Linux counts it into the peak of a child process.
        peaks = dict.fromkeys(models)
        if not args.no_memory:
            for variant, m in models.items():
                here = memory_here(m, shapes, args) if on_gpu else memory_apart(variant, args)
                peaks[variant] = here
        steps = [build_step(m, shapes, args) for m in models.values()]
        synchronize = (lambda: torch.cuda.synchronize(args.device)) if on_gpu else (lambda: None)
        seconds = measure(steps, args.repeat, args.warmup, synchronize)
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(
            f'out of memory ({str(error).splitlines()[0]}): give a smaller --batch-size, --shape '
            'or fewer --variants'
        ) from error
    rows = [
        Row(variant, counts[variant].params, counts[variant].flops, times, peaks[variant])
        for variant, times in zip(models, seconds)
    ]
    print(report(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = [dict(asdict(row), median=row.median) for row in rows]
        args.json.write_text(json.dumps(dict(setup=header(args), rows=found), indent=2) + '\n')
    return rows


if __name__ == '__main__':
    main()
