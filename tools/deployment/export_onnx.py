"""Exports a segmentor to ONNX, for any batch and one image size, and compares it in onnxruntime.

::

    python tools/deployment/export_onnx.py CONFIG [CHECKPOINT] OUT --shape H W [--argmax]

The network takes normalized images, (N, C, H, W) in float32 with the channels that the config
normalizes. It gives logits in the size of the head's output; ``--upsample`` gives them in the size
of the image, as the test of a whole image does, and ``--argmax`` gives labels. The metadata of the
file holds the constants of the normalization.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    exits_on_input_error,
    model_files,
    read_config,
)

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_fusion.analysis.counting import forget_pretrained
from mmseg_fusion.channels import image_channels
from mmseg_fusion.checkpoints import fit, read_checkpoint
from mmseg_fusion.models.layers import KernelSharingAtrousConv
from mmseg_fusion.models.segmentors import merge_car

Exporter = Literal['torchscript', 'dynamo']
PACKAGES = ('onnx', 'onnxruntime')


class Deployed(nn.Module):
    """What is exported: a segmentor from normalized images to logits or labels.

    Args:
        model: any MMSegmentation segmentor.
        shape: height and width of the image.
        upsample: logits in the size of the image, as the head resizes them in testing.
        argmax: labels in the size of the image.

    Shape:
        - image: (N, ``channels``, H, W), normalized.
        - output: (N, classes, h, w) in the head's own size, (N, classes, H, W) with ``upsample``,
          or (N, H, W) with ``argmax``, in uint8 up to 256 classes and int32 above.
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, int], upsample: bool = False, argmax: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.shape = tuple(shape)
        self.channels = image_channels(model)
        self.upsample = upsample or argmax
        self.argmax = argmax
        # torch puts back the mode that it finds here after an export, down to the last layer.
        self.train(model.training)

    def logits(self, image: Tensor) -> Tensor:
        """The logits, in the image's size where they are to be upsampled."""
        if self.upsample:
            # One entry says it for all images: heads look at the first alone.
            meta = dict(img_shape=self.shape, ori_shape=self.shape, pad_shape=self.shape)
            return self.model.encode_decode(image, [meta])
        logits = self.model(image, mode='tensor')
        # Heads with side outputs give theirs first, which is what their `predict` takes as well.
        return logits[0] if isinstance(logits, (tuple, list)) else logits

    def forward(self, image: Tensor) -> Tensor:
        logits = self.logits(image)
        if not self.argmax:
            return logits
        classes = logits.shape[1]
        if classes == 1:
            return (logits.sigmoid() > _threshold(self.model)).squeeze(1).to(torch.uint8)
        return logits.argmax(1).to(torch.uint8 if classes <= 256 else torch.int32)

    @property
    def output_name(self) -> str:
        """Name of the output in the file."""
        return 'labels' if self.argmax else 'logits'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='any MMSegmentation config')
    parser.add_argument('checkpoint', nargs='?', help='default: initial weights')
    parser.add_argument('out', type=Path, help='the .onnx file to write')
    parser.add_argument(
        '--shape', type=int, nargs=2, required=True, metavar=('H', 'W'), help='size of the image'
    )
    parser.add_argument('--upsample', action='store_true', help='logits in the size of the image')
    parser.add_argument('--argmax', action='store_true', help='labels in the size of the image')
    parser.add_argument(
        '--merge-car', action='store_true', help='a model with CAR: each of its pairs as one conv'
    )
    parser.add_argument(
        '--exporter',
        choices=['auto', 'torchscript', 'dynamo'],
        default='auto',
        help='of torch; auto: torchscript, which is faster, and dynamo where that fails',
    )
    parser.add_argument('--opset', type=int, help="default: the exporter's own")
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference of a logit, relative to the largest logit; default: 1e-4',
    )
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    # Options may stand between the positional arguments, of which one can be missing.
    args = parser.parse_intermixed_args(argv)
    if min(args.shape) < 1:
        given = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W, positive, got {given}')
    if not args.tolerance > 0:
        parser.error(f'argument --tolerance: expected more than 0, got {args.tolerance}')
    if args.out.is_dir() or args.out.suffix != '.onnx':
        parser.error(f'OUT must be a file that ends in .onnx, got {args.out}')
    if not args.out.resolve().parent.is_dir():
        parser.error(f'there is no folder {args.out.parent} to write to')
    return args


def check_packages(packages: Sequence[str] = PACKAGES) -> None:
    """Stops the program where a package is missing.

    Raises:
        SystemExit: its message names the extra that brings it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f'{" and ".join(missing)} must be installed to export to ONNX and to compare: '
            "pip install 'mmseg-fusion[onnx]'"
        )


# --- the model -----------------------------------------------------------------------------------


def build(cfg: Config, checkpoint: str | None = None, merge: bool = False) -> nn.Module:
    """The config's segmentor in eval mode on the CPU.

    Args:
        cfg: a whole config, or one of the model alone.
        checkpoint: its weights; None for initial ones.
        merge: replaces what CAR left by plain convolutions.

    Raises:
        SystemExit: no model, nothing to merge, or a checkpoint of another model.
    """
    if 'model' not in cfg:
        raise SystemExit(f'{cfg.filename} has no model: give a whole config, not a base of one')
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    config = Config(cfg.to_dict()).model
    forget_pretrained(config)
    merged = bool((config.get('car') or {}).get('merged'))
    if merge and (config.type != 'CAREncoderDecoder' or merged):
        raise SystemExit(
            f"--merge-car needs model.type='CAREncoderDecoder' with model.car.merged=False; got "
            f'model.type={config.type!r}' + ', merged already' * merged
        )
    model = revert_sync_batchnorm(MODELS.build(config))
    for module in model.modules():
        if isinstance(module, KernelSharingAtrousConv):
            # The same maps; the other form splits a batch, which no exporter follows.
            module.implementation = 'dilated'
    if checkpoint:
        fit(model, read_checkpoint(checkpoint), checkpoint, exact=True)
    if merge:
        try:
            merge_car(model)
        except ValueError as error:
            raise SystemExit(f'--merge-car: {error}') from error
    return model.eval().requires_grad_(False)


def noise(batch: int, shape: tuple[int, int], channels: int, seed: int = 0) -> Tensor:
    """Images, (batch, channels, H, W), with as much noise in coarse patches as in fine ones.

    Those of a smaller batch, up to four, are the first of a larger one.

    White noise looks the same everywhere: if a network pools it over large areas, hardly anything
    differs from image to image.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = max(batch, 4)
    image, sides = torch.zeros(drawn, channels, *shape), shape
    while True:
        x = torch.randn(drawn, channels, *sides, generator=generator)
        image += resize(x, size=shape, mode='nearest')
        if max(sides) == 1:
            return (image / image.std())[:batch]
        sides = tuple(-(-side // 4) for side in sides)


@torch.no_grad()
def settle(module: Deployed) -> None:
    """Gives the batch norms of an untrained model statistics of noise, in place.

    With the initial statistics, the influence of the image fades from layer to layer: the logits
    would be one constant, and equal in any runtime.
    """

    def take(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], unbiased=False)
        norm.running_mean.copy_(mean)
        # A channel that hardly varies is not blown up: hundreds of layers would make of the
        # rounding of float32 a difference of the logits.
        norm.running_var.copy_(var + 3 * var.mean())

    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    handles = [norm.register_forward_pre_hook(take) for norm in norms]
    try:
        # Four images: pooled to one cell, two can have almost the same value. Those that are
        # compared are among them; others drift away through a deep network that nobody trained,
        # until float32 no longer determines its logits.
        module.model(noise(4, module.shape, module.channels), mode='tensor')
    finally:
        for handle in handles:
            handle.remove()


# --- export --------------------------------------------------------------------------------------


def exporters() -> list[Exporter]:
    """The exporters that this torch has, in the order in which they are tried."""
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        return ['torchscript', 'dynamo']
    # The argument came with 2.5; once it goes, the older exporter has gone.
    return ['torchscript'] if Version(torch.__version__) < Version('2.5') else ['dynamo']


def choose_exporters(wanted: str = 'auto') -> list[Exporter]:
    """The exporters to try, in order.

    Raises:
        SystemExit: this torch has not the one that is wanted, or it lacks a package.
    """
    available = exporters()
    if wanted != 'auto' and wanted not in available:
        raise SystemExit(
            f'--exporter {wanted}: torch {torch.__version__} has only {", ".join(available)}'
        )
    chosen = available if wanted == 'auto' else [wanted]
    if 'dynamo' in chosen and importlib.util.find_spec('onnxscript') is None:
        if 'torchscript' not in chosen:
            check_packages(['onnxscript'])
        chosen = ['torchscript']
    return chosen


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's advice and the exporters' reports."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.stdout.flush()
    # The TorchScript exporter prints the whole graph of a failure from C++.
    kept = os.dup(1)
    with open(os.devnull, 'w') as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        logger.setLevel(level)


def export(
    module: Deployed, path: Path, exporter: Exporter = 'torchscript', opset: int | None = None
) -> None:
    """Writes ``module`` as ONNX, with any batch and the module's image size.

    Args:
        module: in the precision in which it is to run.
        path: of the file; the weights are in it.
        exporter: one of :func:`exporters`.
        opset: version of the operators; None for the exporter's own.
    """
    parameter = next(module.parameters())
    # Two images: a batch of one may be taken for a constant.
    image = torch.zeros(2, module.channels, *module.shape).to(parameter)
    options: dict = dict(
        input_names=['image'], output_names=[module.output_name], opset_version=opset
    )
    known = inspect.signature(torch.onnx.export).parameters
    if exporter == 'torchscript':
        names = ['image', module.output_name]
        options['dynamic_axes'] = {name: {0: 'batch'} for name in names}
    else:
        options['dynamic_shapes'] = ({0: torch.export.Dim('batch', min=1)},)
        if 'external_data' in known:
            options['external_data'] = False
    if 'dynamo' in known:
        options['dynamo'] = exporter == 'dynamo'
    with torch.no_grad(), _quiet():
        torch.onnx.export(module, (image,), str(path), **options)


def open_session(path: Path, device: str = 'cpu', threads: int | None = None):
    """An onnxruntime session of the file.

    Raises:
        SystemExit: this build of onnxruntime does not run on ``device``.
    """
    import onnxruntime

    provider = 'CUDAExecutionProvider' if device.startswith('cuda') else 'CPUExecutionProvider'
    if provider not in onnxruntime.get_available_providers():
        raise SystemExit(
            f'onnxruntime {onnxruntime.__version__} has no {provider} for --device {device}: '
            'pip install onnxruntime-gpu in place of onnxruntime, or take --device cpu'
        )
    options = onnxruntime.SessionOptions()
    # What fails comes as an exception.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=[provider])


@dataclass(frozen=True)
class Difference:
    """How far onnxruntime is from PyTorch.

    Attributes:
        batch: images.
        relative: largest difference of a logit over the largest logit. Of labels: by how much the
            logit of a label that differs lies below the largest of its pixel, over the same.
        pixels: labels that differ; None for logits.
    """

    batch: int
    relative: float
    pixels: int | None = None

    def __str__(self) -> str:
        shown = f'batch {self.batch}: {self.relative:.1e} of the largest logit'
        return shown if self.pixels is None else f'{shown}, {self.pixels} label(s) differ'


def compare(module: Deployed, path: Path, batches: Sequence[int] = (1, 2)) -> list[Difference]:
    """Runs both on noise, once per batch size.

    Raises:
        ValueError: onnxruntime gives another shape or type, or a value that is not finite.
    """
    session = open_session(path)
    differences = []
    for batch in batches:
        image = noise(batch, module.shape, module.channels)
        with torch.no_grad():
            logits = module.logits(image)
            expected = module(image) if module.argmax else logits
        out = torch.from_numpy(session.run(None, {'image': image.numpy()})[0])
        if out.shape != expected.shape or out.dtype != expected.dtype:
            raise ValueError(
                f'batch {batch}: expected {tuple(expected.shape)} in {expected.dtype}, onnxruntime '
                f'gives {tuple(out.shape)} in {out.dtype}'
            )
        largest = logits.abs().max()
        if not module.argmax:
            if not torch.isfinite(out).all():
                raise ValueError(f'batch {batch}: onnxruntime gives values that are not finite')
            differences.append(Difference(batch, float((out - expected).abs().max() / largest)))
            continue
        if logits.shape[1] == 1:
            # Twice the distance to where the label changes, written as two classes.
            threshold = torch.tensor(_threshold(module.model)).logit()
            logits = torch.cat([threshold.expand_as(logits), logits], 1)
        if int(out.max()) >= logits.shape[1]:
            raise ValueError(f'batch {batch}: onnxruntime gives label {int(out.max())}')
        lost = logits.amax(1) - logits.gather(1, out[:, None].long())[:, 0]
        differences.append(
            Difference(batch, float(lost.max() / largest), int((out != expected).sum()))
        )
    return differences


def _threshold(model: nn.Module) -> float:
    """From which probability on the single class of a binary model is taken."""
    heads = model.decode_head
    return (heads[-1] if isinstance(heads, nn.ModuleList) else heads).threshold


def write_metadata(path: Path, module: Deployed, classes: Sequence[str] | None) -> None:
    """Adds metadata for the user of the file: image, classes, sides of the output."""
    import onnx

    proto = onnx.load(str(path))
    with torch.no_grad():
        sides = module(torch.zeros(1, module.channels, *module.shape)).shape[1:]
    # The TorchScript exporter leaves sides open that it cannot follow, or names them "batch".
    for dim, side in zip(proto.graph.output[0].type.tensor_type.shape.dim[1:], sides):
        dim.dim_value = side
    preprocessor = module.model.data_preprocessor
    entries = dict(mmseg_fusion='export_onnx')
    if getattr(preprocessor, '_enable_normalize', False):
        entries['mean'] = json.dumps(preprocessor.mean.flatten().tolist())
        entries['std'] = json.dumps(preprocessor.std.flatten().tolist())
    # onedl-mmsegmentation keeps it under mmengine's name, with an underscore.
    for name in ('channel_conversion', '_channel_conversion'):
        if module.channels == 3 and hasattr(preprocessor, name):
            # mmseg reads images as BGR.
            entries['channels'] = 'RGB' if getattr(preprocessor, name) else 'BGR'
    if classes:
        entries['classes'] = json.dumps(list(classes))
    onnx.helper.set_model_props(proto, entries)
    onnx.save(proto, str(path))


def export_and_compare(
    module: Deployed,
    path: Path,
    candidates: Sequence[Exporter],
    tolerance: float = 1e-4,
    opset: int | None = None,
    batches: Sequence[int] = (1, 2),
) -> tuple[Exporter, list[Difference]]:
    """Takes the first exporter whose file gives the same results as PyTorch.

    Returns:
        The exporter, and the comparisons.

    Raises:
        SystemExit: none does; no file is left. Its message has a line per exporter.
    """
    import onnx

    failures = []
    for exporter in candidates:
        try:
            export(module, path, exporter, opset)
            onnx.checker.check_model(str(path))
            differences = compare(module, path, batches)
        except Exception as error:
            # Each operator that is missing comes as another class of error.
            while error.__cause__ is not None:
                error = error.__cause__
            reason = next((line for line in str(error).splitlines() if line.strip()), '')
            failures.append(f'{exporter}: {type(error).__name__}: {reason[:300]}')
            continue
        if all(d.relative <= tolerance for d in differences):
            return exporter, differences
        failures.append(
            f'{exporter}: the outputs differ by more than {tolerance:.0e}: '
            + '; '.join(map(str, differences))
        )
    path.unlink(missing_ok=True)
    hint = ''
    if 'dynamo' not in candidates:
        hint = '\n--exporter dynamo (torch 2.5 or newer) knows more operators'
    raise SystemExit(
        'no exporter gave a file that computes the same\n' + '\n'.join(failures) + hint
    )


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> list[Difference]:
    args = parse_args(argv)
    check_packages()
    cfg = read_config(args.config, args.cfg_options)
    if args.checkpoint:
        check_checkpoint(args.checkpoint)
    inputs = model_files([args.config, args.checkpoint])
    outputs = Outputs('export_onnx', inputs, args.overwrite)
    outputs.check(args.out)
    MMLogger.get_instance('export_onnx', log_level='ERROR')
    warnings.filterwarnings('ignore', module='mm')
    candidates = choose_exporters(args.exporter)
    # Initial weights are the same in every run, and so is what they compute.
    torch.manual_seed(0)
    model = build(cfg, args.checkpoint, args.merge_car)
    module = Deployed(model, tuple(args.shape), args.upsample, args.argmax)
    if not args.checkpoint:
        settle(module)
    with outputs.path(args.out) as unfinished:
        exporter, differences = export_and_compare(
            module, unfinished, candidates, args.tolerance, args.opset
        )
        write_metadata(unfinished, module, _classes(args.checkpoint))
    print(describe(args.out, exporter))
    if not args.checkpoint:
        print("no checkpoint was given: initial weights, batch norms with noise's statistics")
    print('onnxruntime and PyTorch on noise, largest difference:')
    for difference in differences:
        print(f'  {difference}')
    return differences


def _classes(checkpoint: str | None) -> Sequence[str] | None:
    if not checkpoint:
        return None
    meta = (read_checkpoint(checkpoint).get('meta') or {}).get('dataset_meta') or {}
    return meta.get('classes') or meta.get('CLASSES')


def describe(path: Path, exporter: Exporter) -> str:
    """One line per file: its input and output, operators, size."""
    import onnx

    proto = onnx.load(str(path))

    def signature(value) -> str:
        dims = value.type.tensor_type.shape.dim
        sides = ', '.join(d.dim_param or str(d.dim_value) for d in dims)
        return f'{value.name} ({sides})'

    ends = [signature(v) for v in (proto.graph.input[0], proto.graph.output[0])]
    opset = next(o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx'))
    return (
        f'{path}: {ends[0]} -> {ends[1]}; {len(proto.graph.node)} nodes, opset {opset}, '
        f'{path.stat().st_size / 2**20:.1f} MiB, by the {exporter} exporter of torch '
        f'{torch.__version__}'
    )


if __name__ == '__main__':
    main()
