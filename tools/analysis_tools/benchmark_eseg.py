"""Frames per second and latency of ESeg's six sizes, DeepLabV3+ and PSPNet beside them.

::

    python tools/analysis_tools/benchmark_eseg.py [--shape H W] [--precision fp16]
    python tools/analysis_tools/benchmark_eseg.py --backend onnxruntime --device cpu
    python tools/analysis_tools/benchmark_eseg.py --head-saving

All models take turns in one process, on noise: from normalized images to logits as the head forms
them, or with ``--argmax`` to labels in the size of the image. Pretrained weights are not loaded:
they change no speed. ``--head-saving`` compares the decode head of ESeg, which scales each level
before it enlarges it, with the order of the equation: enlarge, then scale.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parents[1] / 'deployment'))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import CONFIGS, check_config  # noqa: E402  isort: skip

import torch  # noqa: E402
from benchmark import (  # noqa: E402  (the script beside this one)
    load_what_a_step_loads,
    measure,
    resident_peak,
)
from export_onnx import (  # noqa: E402  (in tools/deployment)
    Deployed,
    build,
    check_packages,
    choose_exporters,
    export,
    export_and_compare,
    open_session,
)
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.models.utils import resize  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from prettytable import PrettyTable  # noqa: E402
from torch import Tensor  # noqa: E402

from mmseg_fusion.analysis.counting import count  # noqa: E402
from mmseg_fusion.models.decode_heads import ESegHead  # noqa: E402

SIZES = ('lite-s', 'lite-m', 'lite-l', 's', 'm', 'l')
#: Files of configs/_base_/models, without .py.
DEFAULT = (*(f'eseg-{size}' for size in SIZES), 'deeplabv3plus_r50-d8', 'pspnet_r50-d8')
REFERENCE = 'eseg-s'
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
#: The two orders of the decode head's sum.
FORMS = ('scaled first', 'enlarged first')


@dataclass(frozen=True)
class Row:
    """What was measured of one model.

    Attributes:
        model: its name.
        params: learnable tensors' elements, without the auxiliary head.
        flops: multiply-adds for one image.
        seconds: of each turn, one batch.
        batch_size: images per batch.
    """

    model: str
    params: int
    flops: int
    seconds: list[float]
    batch_size: int

    @property
    def median(self) -> float:
        """Median seconds per batch."""
        return statistics.median(self.seconds)

    @property
    def frames_per_second(self) -> float:
        """Images per second, by the median."""
        return self.batch_size / self.median

    def ratio(self, base: Row) -> float:
        """Median, over the turns, of this model's time over another's."""
        return statistics.median(a / b for a, b in zip(self.seconds, base.seconds))


@dataclass(frozen=True)
class Saving:
    """Both orders of one head.

    Attributes:
        model: its name.
        channels: of its levels.
        part: 'sum' of the levels, or the whole 'head'.
        seconds: of each turn, per form; the forms took turns.
        memory: bytes at the peak over what the levels take, per form; None where unknown.
        difference: largest of the outputs, relative to the largest output.
    """

    model: str
    channels: int
    part: str
    seconds: dict[str, list[float]]
    memory: dict[str, int | None]
    difference: float

    @property
    def time_ratio(self) -> float:
        """Median, over the turns, of the head's time over that of the equation's order."""
        return statistics.median(a / b for a, b in zip(*(self.seconds[f] for f in FORMS)))

    @property
    def memory_ratio(self) -> float | None:
        """The same of the peaks."""
        ours, theirs = (self.memory[form] for form in FORMS)
        return ours / theirs if ours is not None and theirs else None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--models',
        nargs='+',
        default=list(DEFAULT),
        metavar='MODEL',
        help='configs, or names of files in configs/_base_/models; default: ' + ' '.join(DEFAULT),
    )
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(1024, 2048), metavar=('H', 'W'),
        help='of an image; default: 1024 2048',
    )  # fmt: skip
    parser.add_argument('--batch-size', type=int, default=1, help='default: 1')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--precision', choices=list(DTYPES), default='fp32')
    parser.add_argument('--backend', choices=['torch', 'onnxruntime'], default='torch')
    parser.add_argument('--argmax', action='store_true', help='to labels in the size of the image')
    parser.add_argument('--channels-last', action='store_true', help="torch's memory format")
    parser.add_argument('--head-saving', action='store_true', help="ESegHead's sum in both orders")
    parser.add_argument('--threads', type=int, help='CPU threads')
    parser.add_argument('--repeat', type=int, default=20, help='turns that are timed; default: 20')
    parser.add_argument('--warmup', type=int, default=3, help='turns before them; default: 3')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    # One head's peak of resident memory, measured in a process of its own.
    parser.add_argument('--only-memory', choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.shape = tuple(args.shape)
    if min(args.shape) < 1:
        found = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W, positive, got {found}')
    for name, least in dict(batch_size=1, repeat=1, warmup=0, threads=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            option = '--' + name.replace('_', '-')
            parser.error(f'argument {option}: expected at least {least}, got {value}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    if args.backend == 'onnxruntime':
        if args.precision == 'bf16':
            parser.error('argument --precision: onnxruntime takes fp32 or fp16, got bf16')
        for name in ('channels_last', 'head_saving'):
            if getattr(args, name):
                option = '--' + name.replace('_', '-')
                parser.error(f'argument {option}: measured in torch alone, not in onnxruntime')
    return args


# --- models --------------------------------------------------------------------------------------


def read_models(names: Sequence[str]) -> dict[str, Config]:
    """Configs by name, in the given order.

    Raises:
        SystemExit: a name is neither a file nor one of the package's models.
    """
    found = {}
    for name in names:
        base = CONFIGS.resolve() / '_base_' / 'models' / f'{name}.py'
        path = base if base.is_file() else Path(name)
        if not path.is_file() and path.suffix != '.py':
            known = ', '.join(sorted(p.stem for p in base.parent.glob('*.py')))
            raise SystemExit(f'--models: {name!r} is neither a config nor one of {known}')
        check_config(str(path))
        found[path.stem] = Config.fromfile(path)
    return found


def torch_step(
    module: Deployed, image: Tensor, channels_last: bool = False
) -> Callable[[], Tensor]:
    """A function that runs one batch in the precision and on the device of ``image``."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    module = module.to(device=image.device, dtype=image.dtype, memory_format=form)
    image = image.contiguous(memory_format=form)

    def step() -> Tensor:
        with torch.inference_mode():
            return module(image)

    return step


def onnxruntime_step(
    module: Deployed, image: Tensor, folder: Path, threads: int | None = None
) -> Callable[[], object]:
    """The same in onnxruntime, of a file that gave PyTorch's logits; image and result stay put."""
    import onnxruntime

    path = folder / 'model.onnx'
    exporter, _ = export_and_compare(module, path, choose_exporters(), batches=[len(image)])
    if image.dtype is torch.float16:
        export(module.half(), path, exporter)
    device = image.device.type
    session = open_session(path, device, threads)
    binding = session.io_binding()
    number = image.device.index or 0
    value = onnxruntime.OrtValue.ortvalue_from_numpy(image.cpu().numpy(), device, number)
    binding.bind_ortvalue_input('image', value)
    binding.bind_output(module.output_name, device, number)
    return lambda: session.run_with_iobinding(binding)


def times(
    configs: dict[str, Config], args: argparse.Namespace, synchronize: Callable[[], None]
) -> list[Row]:
    """All models, by turns."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(args.batch_size, 3, *args.shape, generator=generator)
    image = image.to(device=args.device, dtype=DTYPES[args.precision])
    steps, counts = [], []
    for name, cfg in configs.items():
        counts.append(count(cfg, args.shape))
        torch.manual_seed(0)
        module = Deployed(build(cfg), args.shape, argmax=args.argmax)
        if args.backend == 'torch':
            steps.append(torch_step(module, image, args.channels_last))
        else:
            with tempfile.TemporaryDirectory() as folder:
                steps.append(onnxruntime_step(module, image, Path(folder), args.threads))
            print(f'{name} exported', file=sys.stderr)
    seconds = measure(steps, args.repeat, args.warmup, synchronize)
    return [
        Row(name, c.params, c.flops, values, args.batch_size)
        for name, c, values in zip(configs, counts, seconds)
    ]


# --- what the head saves -------------------------------------------------------------------------


def enlarge_then_scale(head: ESegHead, levels: Sequence[Tensor]) -> Tensor:
    """The head's sum as the equation has it: every level is enlarged, and then scaled."""
    # In place wherever the head is, too: the order alone is compared.
    weights = head.level_weights.softmax(0).to(levels[0].dtype).unbind()
    size = tuple(levels[0].shape[2:])
    out = weights[0] * levels[0]
    for weight, level in zip(weights[1:], levels[1:]):
        enlarged = resize(level, size=size, mode='bilinear', align_corners=head.align_corners)
        out.add_(weight * level if tuple(level.shape[2:]) == size else enlarged.mul_(weight))
    return out


def pyramid(head: ESegHead, args: argparse.Namespace) -> list[Tensor]:
    """Noise in the sizes of P2 and the levels above."""
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-side // 4) for side in args.shape)
    levels = []
    for _ in head.in_channels:
        x = torch.randn(args.batch_size, head.channels, height, width, generator=generator)
        levels.append(x.to(device=args.device, dtype=DTYPES[args.precision]))
        height, width = -(-height // 2), -(-width // 2)
    return levels


def build_heads(cfg: Config, args: argparse.Namespace) -> dict[str, ESegHead]:
    """The config's head, by form, with level weights that differ."""
    torch.manual_seed(0)
    init_default_scope('mmseg')
    # Not the whole model: its weights would count into the process's largest resident set.
    head = revert_sync_batchnorm(MODELS.build(cfg.model.decode_head)).eval()
    head.level_weights.data.normal_()
    head = head.to(device=args.device, dtype=DTYPES[args.precision])
    other = copy.deepcopy(head)
    other.fuse = functools.partial(enlarge_then_scale, other)
    return dict(zip(FORMS, (head, other)))


def parts(head: ESegHead, levels: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """What is measured, the smaller part first."""
    return dict(sum=lambda: head.fuse(levels), head=lambda: head(levels))


def memory_here(head: ESegHead, args: argparse.Namespace) -> dict[str, int | None]:
    """Growth of this process's peak (CPU), or of torch's allocations (GPU), per part."""
    levels = pyramid(head, args)
    on_gpu = args.device.startswith('cuda')
    found = {}
    if not on_gpu:
        load_what_a_step_loads()
        with torch.no_grad():
            head([x[..., :8, :8] for x in levels])
    before = torch.cuda.memory_allocated(args.device) if on_gpu else resident_peak()
    for part, step in parts(head, levels).items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(args.device)
        with torch.no_grad():
            step()
        peak = torch.cuda.max_memory_allocated(args.device) if on_gpu else resident_peak()
        found[part] = None if peak is None else peak - before
    return found


def memory_apart(config: Path | str, form: str, args: argparse.Namespace) -> dict[str, int | None]:
    """The same in a process of its own, as a CPU's peak never falls."""
    command = [sys.executable, __file__, '--models', str(config), '--only-memory', form]
    command += ['--shape', *map(str, args.shape), '--batch-size', str(args.batch_size)]
    command += ['--device', args.device, '--precision', args.precision]
    command += ['--threads', str(args.threads)] if args.threads else []
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f'measuring the memory of {config} failed: {result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


def savings(
    configs: dict[str, Config], args: argparse.Namespace, synchronize: Callable[[], None]
) -> list[Saving]:
    """Both orders of every ESegHead.

    Raises:
        SystemExit: no model has one.
    """
    ours = {n: c for n, c in configs.items() if c.model.decode_head.get('type') == 'ESegHead'}
    if not ours:
        raise SystemExit(f'--head-saving: none of {", ".join(configs)} has an ESegHead')
    on_gpu = args.device.startswith('cuda')
    # Before anything large lives here: Linux counts it into the peak of a child process.
    apart = {}
    if not on_gpu:
        apart = {
            name: {form: memory_apart(cfg.filename, form, args) for form in FORMS}
            for name, cfg in ours.items()
        }
    found = []
    for name, cfg in ours.items():
        heads = build_heads(cfg, args)
        memory = apart.get(name) or {form: memory_here(head, args) for form, head in heads.items()}
        levels = pyramid(heads[FORMS[0]], args)
        both = [parts(head, levels) for head in heads.values()]
        for part in both[0]:
            with torch.no_grad():
                seconds = measure([p[part] for p in both], args.repeat, args.warmup, synchronize)
                first, second = (p[part]().float() for p in both)
            found.append(
                Saving(
                    name,
                    heads[FORMS[0]].channels,
                    part,
                    dict(zip(FORMS, seconds)),
                    {form: memory[form][part] for form in FORMS},
                    float((first - second).abs().max() / second.abs().max()),
                )
            )
    return found


# --- report --------------------------------------------------------------------------------------


def header(args: argparse.Namespace) -> str:
    """What ran where."""
    if args.device.startswith('cuda'):
        device = torch.cuda.get_device_name(args.device)
    else:
        device = f'CPU, {torch.get_num_threads()} thread(s)'
    backend = f'torch {torch.__version__}'
    if args.backend == 'onnxruntime':
        import onnxruntime

        backend = f'onnxruntime {onnxruntime.__version__}'
    what = "ESegHead's two orders" if args.head_saving else 'image to logits'
    what = 'image to labels' if args.argmax and not args.head_saving else what
    form = ', channels last' if args.channels_last else ''
    height, width = args.shape
    return (
        f'{what}: {args.batch_size} image(s) of {height} x {width}, {args.precision}{form}, '
        f'{device}, {backend}; {args.repeat} turns after {args.warmup} to warm up'
    )


def report_times(rows: Sequence[Row]) -> str:
    """The table of models."""
    base = next((row for row in rows if row.model == REFERENCE), rows[0])
    table = PrettyTable(
        ['model', 'params', 'FLOPs', 'median ms', 'min', 'max', 'frames/s', f'time / {base.model}']
    )
    table.align = 'r'
    table.align['model'] = 'l'
    for row in rows:
        values = [f'{1000 * s:.2f}' for s in (row.median, min(row.seconds), max(row.seconds))]
        table.add_row(
            [row.model, f'{row.params / 1e6:.2f} M', f'{row.flops / 1e9:.2f} G', *values]
            + [f'{row.frames_per_second:.2f}', f'{row.ratio(base):.3f}']
        )
    return f'{table}\nms: of a batch; time: median over the turns of the ratio; FLOPs: of one image'


def report_savings(found: Sequence[Saving]) -> str:
    """The table of heads."""

    def size(number: int | None) -> str:
        return '-' if number is None else f'{number / 2**20:.1f}'

    units = [f'{form} {unit}' for unit in ('ms', 'MiB') for form in FORMS]
    table = PrettyTable(
        ['model', 'channels', 'part', *units[:2], 'time ratio', *units[2:], 'memory ratio', 'error']
    )
    table.align = 'r'
    table.align['model'] = table.align['part'] = 'l'
    for s in found:
        times = [f'{1000 * statistics.median(s.seconds[form]):.2f}' for form in FORMS]
        memory = [size(s.memory[form]) for form in FORMS]
        ratio = '-' if s.memory_ratio is None else f'{s.memory_ratio:.3f}'
        table.add_row(
            [s.model, s.channels, s.part, *times, f'{s.time_ratio:.3f}', *memory, ratio]
            + [f'{s.difference:.0e}']
        )
    return (
        f'{table}\nratios: {FORMS[0]} / {FORMS[1]}; MiB: at the peak, over levels and weights; '
        'on a CPU\nthe largest resident set, in a process of its own per form'
    )


def main(argv: Sequence[str] | None = None) -> list[Row] | list[Saving]:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    MMLogger.get_instance('benchmark_eseg', log_level='ERROR')
    warnings.filterwarnings('ignore', module='mm')
    configs = read_models(args.models)
    if args.only_memory:
        (cfg,) = configs.values()
        print(json.dumps(memory_here(build_heads(cfg, args)[args.only_memory], args)))
        return []
    if args.backend == 'onnxruntime':
        check_packages()
    on_gpu = args.device.startswith('cuda')
    synchronize = (lambda: torch.cuda.synchronize(args.device)) if on_gpu else (lambda: None)
    print(header(args))
    try:
        found = (savings if args.head_saving else times)(configs, args, synchronize)
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(
            f'out of memory ({str(error).splitlines()[0]}): give a smaller --batch-size or --shape'
        ) from error
    print(report_savings(found) if args.head_saving else report_times(found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        more = (
            ('time_ratio', 'memory_ratio') if args.head_saving else ('median', 'frames_per_second')
        )
        rows = [dict(asdict(f), **{key: getattr(f, key) for key in more}) for f in found]
        args.json.write_text(json.dumps(dict(setup=header(args), results=rows), indent=2) + '\n')
    return found


if __name__ == '__main__':
    main()
