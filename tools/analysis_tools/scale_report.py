"""Scales of features and gradients at every fusion of a config, before and after equalization.

    python tools/analysis_tools/scale_report.py CONFIG [--checkpoint CKPT]

Prints a table and writes ``scale_report.csv`` and ``scale_report.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

# First: it finds the package, and meets the third-party quirks.
from _pictures import PictureParser, rows_table  # isort: skip

from mmseg_fusion.analysis.scale_report import (
    draw_report,
    model_and_batches,
    report_rows,
    scale_report,
)
from mmseg_fusion.cli import check_checkpoint, exits_on_input_error, read_config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PictureParser('scale_report', __doc__)
    parser.add_argument('config', help='any MMSegmentation config')
    parser.add_argument('--checkpoint', help='weights to look at; default: the initial ones')
    parser.add_argument('--num-images', type=int, default=32, help='to measure, at least 2')
    parser.add_argument('--batch-size', type=int, help="default: the config's")
    parser.add_argument('--layers', nargs='+', help='fusion layers to look at; default: all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_output()
    return parser.parse(argv, num_images=2, batch_size=1)


@exits_on_input_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args.config, args.cfg_options, ['model', 'train_dataloader.dataset'])
    if args.checkpoint:
        check_checkpoint(args.checkpoint)
    name = Path(args.config).stem
    table_file, picture = (args.out_dir / f'scale_report.{kind}' for kind in ('csv', 'png'))
    outputs = args.outputs
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
    print(rows_table(rows))
    images = sum(len(batch['inputs']) for batch in batches)
    print(
        f'{images} training images. The gradient is the root mean square over a weight block: '
        "with explicit equalizers ('equalized') and with their constants in the weight ('folded')."
    )
    title = f'{name}, {images} images' + (f', {args.checkpoint}' if args.checkpoint else '')
    outputs.write_rows(table_file, rows)
    with outputs.path(picture) as file:
        draw_report(report, file, title)
    print(f'{table_file}\n{picture}')


if __name__ == '__main__':
    main()
