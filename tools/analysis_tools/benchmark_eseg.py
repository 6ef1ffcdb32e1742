"""Frames per second and latency of ESeg's six sizes, DeepLabV3+ and PSPNet beside them.

    python tools/analysis_tools/benchmark_eseg.py [--shape H W] [--precision fp16]
    python tools/analysis_tools/benchmark_eseg.py --backend onnxruntime --device cpu
    python tools/analysis_tools/benchmark_eseg.py --head-saving

The images are normalized noise, the results logits as the head forms them, or with ``--argmax``
labels in the size of the image. Pretrained weights are not loaded: they change no speed.
``--head-saving`` compares the decode head of ESeg, which scales each level before it enlarges it,
with the order of the equation: enlarge, then scale.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import _harness as harness  # isort: skip  (beside this script, and first: it finds the package)

sys.path.append(str(Path(__file__).resolve().parents[1] / 'deployment'))

import torch
from export_onnx import (  # in tools/deployment
    Deployed,
    build,
    check_packages,
    choose_exporters,
    export,
    export_and_compare,
    open_session,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_fusion.analysis.counting import count
from mmseg_fusion.channels import image_channels
from mmseg_fusion.cli import CONFIGS, read_config
from mmseg_fusion.models.decode_heads import ESegHead

SIZES = ('lite-s', 'lite-m', 'lite-l', 's', 'm', 'l')
#: Files of configs/_base_/models, without .py.
DEFAULT = (*(f'eseg-{size}' for size in SIZES), 'deeplabv3plus_r50-d8', 'pspnet_r50-d8')
REFERENCE = 'eseg-s'
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
#: The two orders of the decode head's sum.
FORMS = ('scaled first', 'enlarged first')
#: What they are compared in, the smaller part first.
PARTS = ('sum', 'head')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, repeat=20, warmup=3, batch_size=1, shape=(1024, 2048))
    add = parser.add_argument
    what = 'configs, or names of files in configs/_base_/models; default: ' + ' '.join(DEFAULT)
    add('--models', nargs='+', default=list(DEFAULT), metavar='MODEL', help=what)
    add('--precision', choices=list(DTYPES), default='fp32')
    add('--backend', choices=['torch', 'onnxruntime'], default='torch')
    add('--argmax', action='store_true', help='to labels in the size of the image')
    add('--channels-last', action='store_true', help="torch's memory format")
    add('--head-saving', action='store_true', help="ESegHead's sum in both orders")
    args = harness.parse(parser, argv)
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
    configs = {}
    for name in names:
        base = CONFIGS.resolve() / '_base_' / 'models' / f'{name}.py'
        path = base if base.is_file() else Path(name)
        if not path.is_file() and path.suffix != '.py':
            known = ', '.join(sorted(p.stem for p in base.parent.glob('*.py')))
            raise SystemExit(f'--models: {name!r} is neither a config nor one of {known}')
        configs[path.stem] = read_config(str(path))
    return configs


def noise(shapes: Sequence[Sequence[int]], args: argparse.Namespace) -> list[Tensor]:
    """Inputs in the precision that is asked for."""
    tensors = harness.noise(shapes, args.device, False, torch.randn)
    return [x.to(DTYPES[args.precision]) for x in tensors]


def torch_step(module: Deployed, image: Tensor, channels_last: bool = False) -> harness.Step:
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
) -> harness.Step:
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


def times_case(configs: dict[str, Config], args: argparse.Namespace) -> harness.Case:
    """All models."""
    counts = {name: count(cfg, args.shape) for name, cfg in configs.items()}

    def step(name: str) -> harness.Step:
        shape = (args.batch_size, image_channels(configs[name].model), *args.shape)
        (image,) = noise([shape], args)
        torch.manual_seed(0)
        module = Deployed(build(configs[name]), args.shape, argmax=args.argmax)
        if args.backend == 'torch':
            return torch_step(module, image, args.channels_last)
        with tempfile.TemporaryDirectory() as folder:
            made = onnxruntime_step(module, image, Path(folder), args.threads)
        print(f'{name} exported', file=sys.stderr)
        return made

    return harness.Case(
        'model',
        tuple(configs),
        step,
        # Where ESeg-S is not measured, the first model takes its place.
        base=REFERENCE if REFERENCE in configs else next(iter(configs)),
        columns=harness.count_columns(counts),
        images=args.batch_size,
        memory=False,
    )


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
    strides = [2**level for level in range(2, 2 + len(head.in_channels))]
    sizes = [[-(-side // stride) for side in args.shape] for stride in strides]
    return noise([(args.batch_size, head.channels, *size) for size in sizes], args)


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


def saving_cases(configs: dict[str, Config], args: argparse.Namespace) -> list[harness.Case]:
    """Both orders of every ESegHead, of the sum alone and of the whole head.

    Raises:
        SystemExit: no model has one.
    """
    ours = {n: c for n, c in configs.items() if c.model.decode_head.get('type') == 'ESegHead'}
    if not ours:
        raise SystemExit(f'--head-saving: none of {", ".join(configs)} has an ESegHead')

    def step(cfg: Config, part: str, form: str) -> harness.Step:
        head = build_heads(cfg, args)[form]
        levels = pyramid(head, args)
        forward = head.fuse if part == 'sum' else head

        def run() -> Tensor:
            with torch.no_grad():
                return forward(levels)

        return run

    return [
        harness.Case(
            f'{name}, {cfg.model.decode_head.channels} channels, {part}',
            FORMS,
            functools.partial(step, cfg, part),
            base=FORMS[1],
            same=FORMS[:1],
            compare=(FORMS,),
            info=dict(model=name, part=part),
        )
        for name, cfg in ours.items()
        for part in PARTS
    ]


# --- report --------------------------------------------------------------------------------------


def describe(args: argparse.Namespace) -> str:
    """What runs."""
    what = "ESegHead's two orders" if args.head_saving else 'image to logits'
    what = 'image to labels' if args.argmax and not args.head_saving else what
    height, width = args.shape
    what += f': {args.batch_size} image(s) of {height} x {width}, {args.precision}'
    what += ', channels last' * args.channels_last
    if args.backend == 'onnxruntime':
        import onnxruntime

        what += f', onnxruntime {onnxruntime.__version__}'
    return what


def main(argv: Sequence[str] | None = None) -> list[harness.Result]:
    args = parse_args(argv)
    MMLogger.get_instance('benchmark_eseg', log_level='ERROR')
    warnings.filterwarnings('ignore', module='mm')
    configs = read_models(args.models)
    if args.backend == 'onnxruntime':
        check_packages()
    cases = saving_cases(configs, args) if args.head_saving else [times_case(configs, args)]
    return harness.run(cases, args, __file__, describe(args))


if __name__ == '__main__':
    main()
