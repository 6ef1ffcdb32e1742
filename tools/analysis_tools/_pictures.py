"""Shared parts of the tools that draw features of models: arguments, models, images, tables.

A tool imports this file first, because it finds the package of a source checkout. The tool adds its
own arguments to a :class:`PictureParser`, and gets its models from :func:`load` and its images from
:func:`image_sets`. It writes all of its files through ``args.outputs``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    check_at_least,
    check_checkpoint,
    check_config,
    model_files,
    read_config,
)

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from prettytable import PrettyTable
from torch import nn

from mmseg_fusion.analysis.layer_features import (
    DataInfo,
    ImageSet,
    check_alike,
    check_same_images,
    data_info,
    find_layer,
    load_segmentor,
    model_names,
)


class PictureParser(argparse.ArgumentParser):
    """The arguments of a tool that draws features of models.

    Args:
        tool: its name, which is also that of its output.
        doc: of its module; the first line says what it does.
        **kwargs: of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, tool: str, doc: str, **kwargs: Any) -> None:
        super().__init__(description=doc.splitlines()[0], **kwargs)
        self.tool = tool
        self._count: int | None = None
        self._default = ''
        self._suffixes: tuple[str, ...] = ()

    def add_models(
        self,
        models: str = 'any MMSegmentation config and its checkpoint, or none for the initial '
        'weights; several pairs are drawn side by side',
        layer: str = 'layer whose feature it is, one for all models or one for each; default: '
        'auto, the classifier of the last decode head',
    ) -> None:
        """Pairs of config and checkpoint, their names and layers."""
        add = self.add_argument
        add('models', nargs='+', metavar='CONFIG CHECKPOINT', help=models)
        add('--names', nargs='+', help='of the models; default: those of the configs')
        add('--layer', nargs='+', default=['auto'], metavar='NAME', help=layer)

    def add_model(self, config: str, checkpoint: str = 'its weights, or none for the initial ones'):
        """A single pair of config and checkpoint, for tools that draw one model."""
        self.add_argument('config', help=config)
        self.add_argument('checkpoint', help=checkpoint)

    def add_side(self) -> None:
        """Whether the input or the output of the layer is used."""
        self.add_argument(
            '--side',
            choices=('input', 'output'),
            default='input',
            help='whether the feature is what the layer takes or gives; default: input',
        )

    def add_images(
        self, count: int | None, split: str = 'val', files: bool = True, labels: bool = True
    ) -> None:
        """Which images are used.

        Args:
            count: how many of the data set; None for all.
            split: of the data set.
            files: whether files may be given instead.
            labels: whether labels of such files may be given.
        """
        self._count = count
        add = self.add_argument
        add('--split', choices=('val', 'test'), default=split, help=f'default: {split}')
        if files:
            text = 'image files or folders, not the data set'
            add('--images', nargs='+', default=[], help=text)
        if files and labels:
            add('--ann-dir', help='folder of the labels of --images')
        add('--indices', nargs='+', type=int, help='which images, by their number')
        default = count or 'all'
        add(
            '--num-samples',
            type=int,
            help=f'images, evenly over the set; default: {default}, or all that are given',
        )

    def add_workers(self) -> None:
        """For tools that read a whole data set."""
        text = 'processes that read images; default: 0'
        self.add_argument('--num-workers', type=int, default=0, help=text)

    def add_output(self, default: str = '', suffixes: Sequence[str] = ('.png',)) -> None:
        """Where the tool writes, and what every tool takes.

        Args:
            default: the picture, below ``work_dirs/CONFIG``, with other arguments in braces; none
                where the tool writes into a folder of its name.
            suffixes: that the picture may have.
        """
        self._default, self._suffixes = default, tuple(suffixes)
        shown = re.sub(r'{(\w+)}', lambda match: match[1].upper(), default) or self.tool
        add, place = self.add_argument, f'default: work_dirs/CONFIG/{shown}'
        add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        if default:
            add('--out', type=Path, help=f'picture ({", ".join(suffixes)}); {place}')
        else:
            add('--out-dir', type=Path, help=place)
        add_overwrite(self)
        add('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')

    def parse(
        self, argv: Sequence[str] | None = None, intermixed: bool = False, **least: int
    ) -> argparse.Namespace:
        """What was given, checked.

        Args:
            argv: of the command line.
            intermixed: whether options may stand between the positional arguments.
            **least: the smallest value of numbers.

        Returns:
            The arguments; ``models`` are pairs and ``layer`` has one name for each, ``outputs`` is
            what the tool writes with.
        """
        args = self.parse_intermixed_args(argv) if intermixed else self.parse_args(argv)
        if 'models' not in args:
            args.models = [args.config, args.checkpoint or 'none']
            args.names, args.layer = None, [getattr(args, 'layer', 'auto')]
        self._check_models(args)
        known = {name: 0 if name == 'num_workers' else 1 for name in ('num_samples', 'num_workers')}
        check_at_least(self, args, **{k: v for k, v in known.items() if k in args}, **least)
        self._check_images(args)
        work_dir = Path('work_dirs') / Path(args.models[0]).stem
        if self._default:
            args.out = args.out or work_dir / self._default.format(**vars(args))
            if args.out.suffix.lower() not in self._suffixes:
                expected = ', '.join(self._suffixes)
                self.error(f'--out: expected a file name in {expected}, got {args.out}')
        else:
            args.out_dir = args.out_dir or work_dir / self.tool
        files = [file for key in ('images', 'label') for file in getattr(args, key, None) or ()]
        inputs = [*model_files(args.models), *files]
        args.outputs = Outputs(self.tool, inputs, args.overwrite)
        # init_weights would log a line per parameter.
        MMLogger.get_instance(self.tool, log_level='WARNING')
        return args

    def _check_models(self, args: argparse.Namespace) -> None:
        if len(args.models) % 2:
            self.error(
                'expected pairs of CONFIG CHECKPOINT (none for the initial weights), got '
                f'{len(args.models)}: {" ".join(args.models)}'
            )
        pairs = len(args.models) // 2
        if args.names and len(args.names) != pairs:
            self.error(f'--names: expected {pairs}, one per model, got {len(args.names)}')
        if len(args.layer) not in (1, pairs):
            self.error(f'--layer: expected 1 or {pairs}, one per model, got {len(args.layer)}')
        args.layer *= pairs if len(args.layer) == 1 else 1

    def _check_images(self, args: argparse.Namespace) -> None:
        images = getattr(args, 'images', None)
        if getattr(args, 'ann_dir', None) and not images:
            named = '--images' if '--images' in self._option_string_actions else 'images'
            self.error(f'--ann-dir belongs to {named}: give both')
        if getattr(args, 'num_samples', None) and args.indices:
            self.error('--indices says which images, --num-samples how many: give either')
        if 'num_samples' in args and args.num_samples is None and not images:
            args.num_samples = self._count


@dataclass
class Observed:
    """Models that are compared; every list has an entry for each."""

    cfgs: list[Config]
    names: list[str]
    infos: list[DataInfo]
    models: list[nn.Module]
    #: What is hooked, as :func:`find_layer` gives it.
    layers: list[str]


def load(
    args: argparse.Namespace,
    device: str | None = None,
    find: Callable[[nn.Module, str], str] = find_layer,
    alike: bool = True,
) -> Observed:
    """The models of a command line.

    Args:
        args: of :meth:`PictureParser.parse`.
        device: where the models are put; default: ``args.device``.
        find: returns the name of a layer, from a model and the value of ``--layer``.
        alike: whether all models must have the classes of their data, and the same classes.

    Raises:
        SystemExit: a config or checkpoint is not there.
        InputError: a checkpoint or layer does not fit, or the models have different classes.
    """
    pairs = list(zip(args.models[::2], args.models[1::2]))
    for config, checkpoint in pairs:
        check_config(config)
        if checkpoint != 'none':
            check_checkpoint(checkpoint)
    cfgs = [read_config(config, args.cfg_options) for config, _ in pairs]
    infos = [data_info(cfg, args.split) for cfg in cfgs]
    models = [
        load_segmentor(cfg, None if checkpoint == 'none' else checkpoint, device or args.device)
        for cfg, (_, checkpoint) in zip(cfgs, pairs)
    ]
    names = args.names or model_names(*zip(*pairs))
    if alike:
        check_alike(names, infos, models)
    layers = [find(model, layer) for model, layer in zip(models, args.layer)]
    return Observed(cfgs, names, infos, models, layers)


def image_sets(args: argparse.Namespace, seen: Observed, **kwargs: Any) -> list[ImageSet]:
    """The images for every model; the tool never overwrites them.

    Args:
        args: of :meth:`PictureParser.parse`.
        seen: the models.
        **kwargs: of :class:`ImageSet`, beside what ``args`` says.

    Raises:
        InputError: an image is missing, or the models see different numbers of them.
    """
    given = {name: getattr(args, name, None) for name in ('ann_dir', 'num_samples', 'indices')}
    given = {**given, 'images': getattr(args, 'images', None) or (), **kwargs}
    sets = [ImageSet(cfg, args.split, **given) for cfg in seen.cfgs]
    check_same_images(seen.names, sets, args.split)
    for images in sets:
        args.outputs.add_inputs(images.files())
    return sets


def say_layers(seen: Observed, side: str) -> None:
    """Prints the names of the layers."""
    for name, layer in zip(seen.names, seen.layers):
        print(f'{name}: {side} of {layer}')


def rows_table(rows: Sequence[Mapping[str, Any]]) -> PrettyTable:
    """Rows of one kind as text; four digits of every number."""
    table = PrettyTable(list(rows[0]))
    for row in rows:
        table.add_row([f'{v:.4g}' if isinstance(v, float) else v for v in row.values()])
    return table
