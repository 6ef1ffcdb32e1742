"""Scales of features and gradients at every fusion of a config, before and after equalization.

    python tools/analysis_tools/scale_report.py CONFIG [--checkpoint CKPT]

Prints a table and writes ``scale_report.csv`` and ``scale_report.png``.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
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
    model_files,
    read_config,
)

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from prettytable import PrettyTable

from mmseg_fusion.analysis.scale_report import (
    draw_report,
    model_and_batches,
    report_rows,
    scale_report,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='any MMSegmentation config')
    parser.add_argument('--checkpoint', help='weights to look at; default: the initial ones')
    parser.add_argument('--num-images', type=int, default=32, help='to measure, at least 2')
    parser.add_argument('--batch-size', type=int, help="default: the config's")
    parser.add_argument('--layers', nargs='+', help='fusion layers to look at; default: all')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out-dir', type=Path, help='default: work_dirs/CONFIG/scale_report')
    add_overwrite(parser)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='key=value overrides')
    args = parser.parse_args()
    if args.num_images < 2:
        parser.error(f'--num-images must be at least 2, got {args.num_images}')
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f'--batch-size must be at least 1, got {args.batch_size}')
    return args


@exits_on_input_error
def main() -> None:
    args = parse_args()
    cfg = read_config(args.config, args.cfg_options, ['model', 'train_dataloader.dataset'])
    if args.checkpoint:
        check_checkpoint(args.checkpoint)
    # init_weights would log a line per parameter.
    MMLogger.get_instance('scale_report', log_level='WARNING')
    name = Path(args.config).stem
    out_dir = args.out_dir or Path('work_dirs') / name / 'scale_report'
    table_file, picture = out_dir / 'scale_report.csv', out_dir / 'scale_report.png'
    inputs = model_files([args.config, args.checkpoint])
    outputs = Outputs('scale_report', inputs, args.overwrite)
    outputs.check(table_file, picture)
    try:
        model, batches = model_and_batches(
            cfg, args.checkpoint, args.num_images, args.batch_size, args.device, args.seed
        )
    except FileNotFoundError as error:
        raise SystemExit(
            f'{error}\nThe training images of the config are not there; point it at them with '
            '--cfg-options train_dataloader.dataset.data_root=FOLDER'
        ) from error
    try:
        report = scale_report(model, batches, args.layers)
    except (RuntimeError, ValueError) as error:
        if 'fusion layer' in str(error) or 'concatenated' in str(error):
            raise SystemExit(str(error)) from error
        raise
    rows = report_rows(report)
    table = PrettyTable(list(rows[0]))
    for row in rows:
        table.add_row([f'{v:.4g}' if isinstance(v, float) else v for v in row.values()])
    print(table)
    images = sum(len(batch['inputs']) for batch in batches)
    print(
        f'{images} training images. The gradient is the root mean square over a weight block: '
        "with explicit equalizers ('equalized') and with their constants in the weight ('folded')."
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    title = f'{name}, {images} images' + (f', {args.checkpoint}' if args.checkpoint else '')
    outputs.write(table_file, text.getvalue())
    with outputs.path(picture) as file:
        draw_report(report, file, title)
    print(f'{table_file}\n{picture}')


if __name__ == '__main__':
    main()
