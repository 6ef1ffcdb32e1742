"""Speed and peak memory of a config's model, for inference or a training step, on GPU or CPU.

::

    python tools/analysis_tools/benchmark.py CONFIG [--mode train] [--shape H W] [--batch-size N]
    python tools/analysis_tools/benchmark.py CONFIG --compare CONFIG2 --mode train

The input is synthetic, so that no data set is needed, and pretrained weights are not loaded.
Inference is the model's ``test_step``: normalization, network, whole or slide mode, resizing and
argmax; a training step is ``train_step``: normalization, forward, backward and optimizer. Reading
and augmenting images is no part of either.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    check_checkpoint,
    config_files,
    exits_on_input_error,
    read_config,
)

import torch
from _harness import (  # beside this script
    load_what_a_step_loads,
    measure,
    resident_peak,
)
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner.amp import autocast
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from prettytable import PrettyTable

from mmseg_fusion.analysis.counting import forget_pretrained
from mmseg_fusion.channels import image_channels
from mmseg_fusion.checkpoints import fit, read_checkpoint
from mmseg_fusion.fusions import is_single_value

Mode = Literal['inference', 'train']


@dataclass(frozen=True)
class Timing:
    """What was measured of one config.

    Attributes:
        config: its path.
        seconds: of each repeat, one step over a batch.
        batch_size: images per step.
        peak_memory: bytes, see :func:`memory_note`; None where it cannot be measured.
        precision: what the convolutions compute in.
    """

    config: str
    seconds: list[float]
    batch_size: int
    peak_memory: int | None
    precision: str

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images per second, by the median."""
        return self.batch_size / self.median


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='any MMSegmentation config')
    parser.add_argument('--compare', metavar='CONFIG2', help='a second config, in turn')
    parser.add_argument('--checkpoint', help='weights of CONFIG; they change no speed')
    parser.add_argument('--mode', choices=['inference', 'train'], default='inference')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of an image, or one side; default: the training crop',
    )
    parser.add_argument(
        '--batch-size', type=int, help="default: 1 for inference, the config's for training"
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeat', type=int, default=20, help='steps that are timed; default: 20')
    parser.add_argument('--warmup', type=int, default=3, help='steps before them; default: 3')
    parser.add_argument('--amp', action='store_true', help='mixed precision; bfloat16 on the CPU')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all numbers to FILE too')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    add_overwrite(parser)
    # One config's peak of resident memory, measured in a process of its own.
    parser.add_argument('--only-memory', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        given = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W or one side, positive, got {given}')
    for name, least in (('batch_size', 1), ('repeat', 1), ('warmup', 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = '--' + name.replace('_', '-')
            parser.error(f'argument {option}: expected at least {least}, got {value}')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'argument --device: {args.device} asked for, but torch sees no CUDA device')
    return args


# --- one step ------------------------------------------------------------------------------------


def image_shape(cfg: Config, shape: Sequence[int] | None) -> tuple[int, int]:
    """Height and width to use: those asked for, or the training crop.

    Raises:
        SystemExit: neither is known.
    """
    crop = (cfg.model.get('data_preprocessor') or {}).get('size')
    size = shape or crop
    if not size:
        raise SystemExit('no training crop (model.data_preprocessor.size) here: give --shape H W')
    return (size[0], size[-1])


def synthetic_batch(
    shape: tuple[int, int], batch_size: int, num_classes: int, device: str, channels: int
) -> dict:
    """Noise, and labels of all classes with ignored pixels, as a data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, channels, *shape)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(num_classes, (batch_size, 1, *shape), generator=generator)
    labels[..., : max(1, shape[0] // 16), :] = 255
    samples = []
    for label in labels.to(device):
        meta = dict(ori_shape=shape, img_shape=shape, pad_shape=shape)
        samples.append(SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label)))
    return dict(inputs=list(images.to(device)), data_samples=samples)


def make_step(
    cfg: Config,
    mode: Mode,
    shape: tuple[int, int],
    batch_size: int,
    device: str,
    amp: bool = False,
    checkpoint: str | None = None,
) -> tuple[Callable[[], object], str]:
    """Builds the model of ``cfg`` and a function that runs one step.

    Returns:
        The function, and the precision it computes in.
    """
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    cfg = Config(cfg.to_dict())
    forget_pretrained(cfg.model)
    if mode == 'train' and (cfg.model.get('data_preprocessor') or {}).get('size'):
        # It pads smaller images to the size of the crop.
        cfg.model.data_preprocessor.size = shape
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint:
        fit(model, read_checkpoint(checkpoint), checkpoint)
    model = model.to(device)
    batch = synthetic_batch(shape, batch_size, model.num_classes, device, image_channels(model))

    if mode == 'inference':
        model.eval()

        def step():
            with torch.no_grad(), autocast(enabled=amp):
                return model.test_step(batch)
    else:
        if amp and cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
        # Constructors with a decay per layer print every parameter.
        with contextlib.redirect_stdout(io.StringIO()):
            wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        amp = isinstance(wrapper, AmpOptimWrapper)
        model.train()

        def step():
            return model.train_step(batch, wrapper)

    half = 'bfloat16' if device == 'cpu' else 'float16'
    return step, f'mixed with {half}' if amp else 'float32'


# --- measuring -----------------------------------------------------------------------------------


def memory_note(device: str) -> str:
    """How the column of memory came about."""
    if device == 'cpu':
        how = (
            "growth of the process's largest resident set from before the model is built to after "
            'two steps,\nin a process of its own per config, where freed memory goes back at once'
        )
    else:
        how = "torch's largest allocation during two steps"
    return f'peak memory: {how};\nweights, and in training gradients and optimizer states, included'


def memory_on_cpu(args: argparse.Namespace, config: str, checkpoint: str | None) -> int | None:
    """Runs this script on one config in a process of its own."""
    command = [sys.executable, __file__, config, '--only-memory', '--device', 'cpu']
    command += ['--mode', args.mode, '--batch-size', str(args.batch_size)]
    command += ['--shape', *map(str, args.shape)]
    command += ['--amp'] * args.amp
    command += ['--checkpoint', checkpoint] if checkpoint else []
    # The options as they were typed: parsed ones could not be handed on.
    command += ['--cfg-options', *args.typed_options] if args.typed_options else []
    # glibc would keep what is freed for later: then the peak depends on what came before.
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536')
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f'{config}: {result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


def typed_options(argv: Sequence[str]) -> list[str]:
    """The words after ``--cfg-options`` on a command line."""
    words = list(argv)
    if '--cfg-options' not in words:
        return []
    words = words[words.index('--cfg-options') + 1 :]
    end = next((i for i, word in enumerate(words) if word.startswith('--')), len(words))
    return words[:end]


# --- report --------------------------------------------------------------------------------------


def _size(number: int | None) -> str:
    return '-' if number is None else f'{number / 2**20:.0f} MiB'


def report(timings: Sequence[Timing], args: argparse.Namespace) -> str:
    """The printed text."""
    what = 'training step' if args.mode == 'train' else 'inference'
    if args.device == 'cpu':
        device = f'CPU, {torch.get_num_threads()} thread(s)'
    else:
        device = torch.cuda.get_device_name(args.device)
    height, width = args.shape
    lines = [
        f'{what}: {args.batch_size} image(s) of {height} x {width}, {device}, torch '
        f'{torch.__version__}',
        f'{args.repeat} repeats after {args.warmup} to warm up'
        + (', the two configs in turn' if len(timings) > 1 else ''),
    ]
    table = PrettyTable(
        ['config', 'median ms', 'min ms', 'max ms', 'images/s', 'peak memory', 'precision']
    )
    table.align = 'r'
    table.align['config'] = 'l'
    for t in timings:
        times = [f'{1000 * s:.2f}' for s in (t.median, min(t.seconds), max(t.seconds))]
        row = [Path(t.config).stem, *times, f'{t.images_per_second:.2f}']
        table.add_row([*row, _size(t.peak_memory), t.precision])
    lines.append(str(table))
    if len(timings) > 1:
        first, second = timings
        lines.append(f'time, second / first: {second.median / first.median:.3f} (of the medians)')
        if first.peak_memory and second.peak_memory:
            lines.append(f'memory, second / first: {second.peak_memory / first.peak_memory:.3f}')
    lines.append(memory_note(args.device))
    return '\n'.join(lines)


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> list[Timing]:
    args = parse_args(argv)
    args.typed_options = typed_options(sys.argv[1:] if argv is None else argv)
    # A line per parameter of the optimizer, and advice for training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    warnings.filterwarnings('ignore', module='mm')
    configs = [args.config, *([args.compare] if args.compare else [])]
    loaded = []
    for config in configs:
        needs = ['model', *(['optim_wrapper'] if args.mode == 'train' else [])]
        loaded.append(read_config(config, args.cfg_options, needs))
    if args.checkpoint:
        check_checkpoint(args.checkpoint)
    outputs = Outputs('benchmark', [*config_files(*configs), args.checkpoint], args.overwrite)
    outputs.check(args.json)
    args.shape = image_shape(loaded[0], args.shape)
    if args.batch_size is None:
        loader = loaded[0].get('train_dataloader') or {}
        args.batch_size = loader.get('batch_size', 2) if args.mode == 'train' else 1
    on_gpu = args.device.startswith('cuda')

    steps, peaks, precisions = [], [], []
    try:
        for config, cfg in zip(configs, loaded):
            checkpoint = args.checkpoint if config is args.config else None
            if on_gpu:
                torch.cuda.synchronize(args.device)
                before = torch.cuda.memory_allocated(args.device)
                torch.cuda.reset_peak_memory_stats(args.device)
            elif not args.only_memory:
                peaks.append(memory_on_cpu(args, config, checkpoint))
            else:
                load_what_a_step_loads()
                before = resident_peak()
            step, precision = make_step(
                cfg, args.mode, args.shape, args.batch_size, args.device, args.amp, checkpoint
            )
            if on_gpu or args.only_memory:
                # The second step is the first with the states of the optimizer.
                for _ in range(2):
                    step()
            if on_gpu:
                peaks.append(torch.cuda.max_memory_allocated(args.device) - before)
            elif args.only_memory:
                print(json.dumps(None if before is None else resident_peak() - before))
                return []
            steps.append(step)
            precisions.append(precision)
        seconds = measure(steps, args.repeat, args.warmup, args.device)
    except torch.cuda.OutOfMemoryError as error:
        raise SystemExit(
            f'out of memory ({str(error).splitlines()[0]}): give a smaller --batch-size or --shape'
        ) from error
    except ValueError as error:
        if not is_single_value(error):
            raise
        raise SystemExit(
            'batch norm cannot train on a single value per channel, as pooling to 1 x 1 gives '
            f'with one image: give --batch-size 2 or more, got {args.batch_size}'
        ) from error
    timings = [
        Timing(config, times, args.batch_size, peak, precision)
        for config, times, peak, precision in zip(configs, seconds, peaks, precisions)
    ]
    print(report(timings, args))
    if args.json:
        rows = [
            dict(asdict(t), median=t.median, images_per_second=t.images_per_second) for t in timings
        ]
        setup = dict(mode=args.mode, shape=list(args.shape), device=args.device, configs=rows)
        outputs.write(args.json, json.dumps(setup, indent=2) + '\n')
    return timings


if __name__ == '__main__':
    main()
