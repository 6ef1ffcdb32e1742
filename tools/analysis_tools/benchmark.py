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
import copy
import io
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner.amp import autocast
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_fusion.analysis.counting import forget_pretrained
from mmseg_fusion.channels import image_channels
from mmseg_fusion.checkpoints import fit, read_checkpoint
from mmseg_fusion.cli import (
    Outputs,
    check_checkpoint,
    config_files,
    exits_on_input_error,
    read_config,
)
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
    parser = harness.make_parser(__doc__, repeat=20, warmup=3, amp=True)
    add = parser.add_argument
    side = 'height and width of an image, or one side; default: the training crop'
    batch = "default: 1 for inference, the config's for training"
    add('config', help='any MMSegmentation config')
    add('--compare', metavar='CONFIG2', help='a second config, in turn')
    add('--checkpoint', help='weights of CONFIG; they change no speed')
    add('--mode', choices=['inference', 'train'], default='inference')
    add('--shape', type=int, nargs='+', metavar='N', help=side)
    add('--batch-size', type=int, help=batch)
    add('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    # What a process of its own is started with: parsed options could not be handed on.
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        given = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W or one side, positive, got {given}')
    for name, least in (('batch_size', 1), ('repeat', 1), ('warmup', 0), ('threads', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            option = '--' + name.replace('_', '-')
            parser.error(f'argument {option}: expected at least {least}, got {value}')
    harness.check_device(parser, args)
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


def build_model(model: ConfigDict, shape: tuple[int, int], device: str) -> nn.Module:
    """A model for one process, on images of a shape, without its pretrained weights."""
    model = copy.deepcopy(model)
    forget_pretrained(model)
    if (model.get('data_preprocessor') or {}).get('size'):
        # In training it pads smaller images to the size of the crop.
        model.data_preprocessor.size = shape
    return revert_sync_batchnorm(MODELS.build(model)).to(device)


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
    model = build_model(cfg.model, shape, device)
    if checkpoint:
        fit(model, read_checkpoint(checkpoint), checkpoint)
    batch = synthetic_batch(shape, batch_size, model.num_classes, device, image_channels(model))
    model.train(mode == 'train')

    if mode == 'inference':

        def step():
            with torch.no_grad(), autocast(enabled=amp):
                return model.test_step(batch)
    else:
        optim_wrapper = copy.deepcopy(cfg.optim_wrapper)
        if amp and optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
            optim_wrapper.type = 'AmpOptimWrapper'
        # Constructors with a decay per layer print every parameter.
        with contextlib.redirect_stdout(io.StringIO()):
            wrapper = build_optim_wrapper(model, optim_wrapper)
        amp = isinstance(wrapper, AmpOptimWrapper)

        def step():
            return model.train_step(batch, wrapper)

    half = 'bfloat16' if device == 'cpu' else 'float16'
    return step, f'mixed with {half}' if amp else 'float32'


# --- decode heads alone ---------------------------------------------------------------------------


def read_model(path: str, head_type: str) -> ConfigDict:
    """The model of a config whose decode head is of a type, without its pretrained weights.

    Raises:
        SystemExit: there is no such file, or its decode head is another one.
    """
    # Advice for training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    cfg = read_config(path)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    head = (cfg.get('model') or {}).get('decode_head')
    if not isinstance(head, dict) or head.get('type') != head_type:
        given = head.get('type') if isinstance(head, dict) else head
        raise SystemExit(f'{path}: model.decode_head must be of type {head_type}, got {given}')
    forget_pretrained(cfg.model)
    return cfg.model


def level_shapes(
    model: ConfigDict, shape: tuple[int, int], batch_size: int
) -> list[tuple[int, ...]]:
    """Shapes of the backbone's levels for a batch of images."""
    with torch.device('meta'):
        backbone = revert_sync_batchnorm(MODELS.build(model.backbone))
        # Not chained: the train() of some backbones returns nothing.
        backbone.eval()
        levels = backbone(torch.empty(batch_size, image_channels(model), *shape))
    return [tuple(level.shape) for level in levels]


def build_head(model: ConfigDict) -> nn.Module:
    """The decode head, for one process."""
    return revert_sync_batchnorm(MODELS.build(model.decode_head))


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


def step_of(
    cfg: Config, checkpoint: str | None, args: argparse.Namespace
) -> tuple[Callable[[], object], str]:
    """:func:`make_step` as the command line has it."""
    shape, size = args.shape, args.batch_size
    return make_step(cfg, args.mode, shape, size, args.device, args.amp, checkpoint)


def memory_here(cfg: Config, checkpoint: str | None, args: argparse.Namespace) -> int | None:
    """Builds the model of one config and runs it in this process."""

    def work() -> None:
        step, _ = step_of(cfg, checkpoint, args)
        # The second step is the first with the states of the optimizer.
        for _ in range(harness.MEMORY_STEPS):
            step()

    return harness.peak_of(work, args.device, fresh=True)


def memory_on_cpu(args: argparse.Namespace, number: int) -> int | None:
    """Runs this script on the first or second config in a process of its own."""
    return harness.all_memory_apart(__file__, args.argv, number)


# --- report --------------------------------------------------------------------------------------


def report(timings: Sequence[Timing], args: argparse.Namespace) -> str:
    """The printed text."""
    what = 'training step' if args.mode == 'train' else 'inference'
    height, width = args.shape
    device = harness.device_name(args.device)
    lines = [
        f'{what}: {args.batch_size} image(s) of {height} x {width}, {device}, torch '
        f'{torch.__version__}',
        f'{args.repeat} repeats after {args.warmup} to warm up'
        + (', the two configs in turn' if len(timings) > 1 else ''),
    ]
    columns = {
        'config': (lambda t: Path(t.config).stem, '{}'),
        'median ms': (lambda t: 1000 * t.median, '{:.2f}'),
        'min ms': (lambda t: 1000 * min(t.seconds), '{:.2f}'),
        'max ms': (lambda t: 1000 * max(t.seconds), '{:.2f}'),
        'images/s': (lambda t: t.images_per_second, '{:.2f}'),
        'peak memory': (lambda t: t.peak_memory and t.peak_memory / 2**20, '{:.0f} MiB'),
        'precision': (lambda t: t.precision, '{}'),
    }
    lines.append(harness.text_table(timings, columns))
    if len(timings) > 1:
        first, second = timings
        lines.append(f'time, second / first: {second.median / first.median:.3f} (of the medians)')
        if first.peak_memory and second.peak_memory:
            lines.append(f'memory, second / first: {second.peak_memory / first.peak_memory:.3f}')
    if not args.no_memory:
        lines.append(memory_note(args.device))
    return '\n'.join(lines)


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> list[Timing]:
    args = parse_args(argv)
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
    if args.threads:
        torch.set_num_threads(args.threads)

    # The weights are the first config's.
    chosen = list(zip(loaded, [args.checkpoint, None]))
    try:
        with harness.memory_for('--batch-size or --shape'):
            if args.only_memory:
                print(json.dumps(memory_here(*chosen[args.only_memory - 1], args)))
                return []
            peaks: list[int | None] = [None] * len(chosen)
            if not args.no_memory and harness.on_gpu(args.device):
                peaks = [memory_here(*one, args) for one in chosen]
            elif not args.no_memory:
                peaks = [memory_on_cpu(args, number) for number in range(1, 1 + len(chosen))]
            steps, precisions = zip(*(step_of(*one, args) for one in chosen))
            seconds = harness.measure(steps, args.repeat, args.warmup, args.device)
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
