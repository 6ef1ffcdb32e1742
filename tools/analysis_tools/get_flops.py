"""Counts multiply-adds and parameters of a config's model, for any image size, in seconds.

::

    python tools/analysis_tools/get_flops.py CONFIG [--shape H W] [--per-module DEPTH]
    python tools/analysis_tools/get_flops.py --update configs/*/metafile.yaml

The second form writes the counts of every config that a metafile lists into it.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# First of all: it meets the third-party quirks before anything of mmengine is imported.
from mmseg_fusion.cli import whole_file  # isort: skip

import yaml
from mmengine.config import Config, DictAction

from mmseg_fusion.analysis.counting import Counts, count, human, read_config

COUNTED = (
    'FLOPs are multiply-adds of convolutions, linear layers, matrix and attention products;\n'
    'element-wise work, norm layers and auxiliary heads are left out.'
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Count multiply-adds and parameters of a model.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=COUNTED,
    )
    parser.add_argument('config', nargs='?', help='config file, or package::path')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the image, or one side; default: the training crop',
    )
    parser.add_argument(
        '--per-module',
        type=int,
        default=1,
        metavar='DEPTH',
        help='list modules down to this depth; default: 1 (backbone, neck, head)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change the config first, as model.decode_head.channels=256',
    )
    parser.add_argument(
        '--update',
        nargs='+',
        metavar='METAFILE',
        help='write Parameters and FLOPs of every model into these metafiles',
    )
    args = parser.parse_args(argv)
    if (args.config is None) == (args.update is None):
        parser.error('give a config, or --update with metafiles')
    if args.update and (args.shape or args.cfg_options):
        parser.error('--update takes the shapes and the configs that the metafile names')
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        given = ' '.join(map(str, args.shape))
        parser.error(f'argument --shape: expected H W or one side, positive, got {given}')
    if args.per_module < 1:
        parser.error(f'argument --per-module: expected at least 1, got {args.per_module}')
    for path in [args.config] if args.config else args.update:
        if '::' not in path and not Path(path).is_file():
            parser.error(f'no such file: {path}')
    return args


def training_crop(cfg: Config) -> tuple[int, int] | None:
    """Height and width of a training image, if the data preprocessor says so."""
    model = cfg.get('model') or {}
    size = (model.get('data_preprocessor') or {}).get('size')
    return None if size is None else tuple(size)


def report(counts: Counts, config: str, depth: int) -> str:
    channels, height, width = counts.shape
    lines = [
        f'config      {config}',
        f'input       {channels} x {height} x {width} (channels x height x width)',
        f'FLOPs       {human(counts.flops)} multiply-adds ({counts.flops:,})',
        f'parameters  {human(counts.params)} ({counts.params:,})',
        '',
        counts.table(depth),
        '',
        COUNTED,
    ]
    if counts.uncounted:
        lines.append(f'Not counted, since unknown here: {", ".join(counts.uncounted)}')
    return '\n'.join(lines)


# --- metafiles -----------------------------------------------------------------------------------


def _child(node: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((value for name, value in node.value if name.value == key), None)


def update_metafile(path: str | Path) -> int:
    """Writes Parameters, FLOPs and FLOPs Shape of each model into a metafile.

    The rest of the file, comments and order included, stays as it is. The image is the one that
    ``FLOPs Shape`` names, or else the config's training crop.

    Args:
        path: a metafile in the folder of its configs, whose paths start at the folder that holds
            ``configs/``.

    Returns:
        How many places of the file changed.

    Raises:
        ValueError: there are no models, or one lacks Name, Config, Metadata or a crop.
        FileNotFoundError: a config that the metafile names is not there.
    """
    path = Path(path).resolve()
    # newline='' keeps the line ends, and with them the positions of the nodes.
    with path.open(encoding='utf-8', newline='') as file:
        text = file.read()
    root_node = yaml.compose(text)
    models = _child(root_node, 'Models') if isinstance(root_node, yaml.MappingNode) else None
    if not isinstance(models, yaml.SequenceNode):
        raise ValueError(f'{path.name}: expected a list of models under the key Models')
    edits: list[tuple[int, int, str]] = []
    known: dict[str, Counts] = {}
    for model in models.value:
        parts = {key: _child(model, key) for key in ('Name', 'Config', 'Metadata')}
        missing = [key for key, node in parts.items() if node is None]
        if missing:
            line = model.start_mark.line + 1
            raise ValueError(f'{path.name}, line {line}: the model has no {", ".join(missing)}')
        config = parts['Config'].value
        root = next((p for p in path.parents if (p / config).is_file()), None)
        if root is None:
            raise FileNotFoundError(
                f'{path.name}: {parts["Name"].value} names Config: {config}, which is in none of '
                'the folders above the metafile'
            )
        cfg = read_config(root / config)
        shape = _child(parts['Metadata'], 'FLOPs Shape')
        crop = training_crop(cfg) if shape is None else [int(side.value) for side in shape.value]
        if crop is None:
            raise ValueError(
                f'{path.name}: {parts["Name"].value} has no training crop (data_preprocessor.size)'
                '; add FLOPs Shape: [height, width] to its Metadata'
            )
        # Configs that differ in data, schedule or hooks share their model.
        same = json.dumps([cfg.model.to_dict(), list(crop)], sort_keys=True, default=str)
        if same not in known:
            known[same] = count(cfg, tuple(crop))
        counts = known[same]
        print(f'{human(counts.params):>11} {human(counts.flops):>11}  {parts["Name"].value}')
        numbers = {
            'Parameters': counts.params,
            'FLOPs': counts.flops,
            'FLOPs Shape': list(crop),
        }
        added = ''
        first = parts['Metadata'].value[0][0].start_mark
        for key, number in numbers.items():
            node = _child(parts['Metadata'], key)
            if node is None:
                added += f'{key}: {number}\n{" " * first.column}'
            elif key != 'FLOPs Shape' and node.value != str(number):
                edits.append((node.start_mark.index, node.end_mark.index, str(number)))
        if added:
            edits.append((first.index, first.index, added))
    for start, end, new in sorted(edits, key=lambda edit: edit[0], reverse=True):
        text = text[:start] + new + text[end:]
    # A metafile is changed in its place: that is what --update is for.
    with whole_file(path) as file:
        file.write(text.encode())
    return len(edits)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # Advice of mmseg for training, which would stand above the answer.
    warnings.filterwarnings('ignore', module='mmseg')
    try:
        if args.update:
            for metafile in args.update:
                changed = update_metafile(metafile)
                print(f'{metafile}: {changed} places changed')
            return 0
        cfg = read_config(args.config)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
        shape = args.shape or training_crop(cfg)
        if shape is None:
            raise ValueError('no training crop (data_preprocessor.size) in it: give --shape H W')
        counts = count(cfg, shape[0] if len(shape) == 1 else tuple(shape))
    except (FileNotFoundError, RuntimeError, ValueError, yaml.YAMLError) as error:
        print(f'{args.config or metafile}: {error}', file=sys.stderr)
        return 1
    print(report(counts, args.config, args.per_module))
    return 0


if __name__ == '__main__':
    sys.exit(main())
