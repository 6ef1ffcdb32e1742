"""Figure 3 of the scale equalization paper: the effect of bilinear upsampling on the variance.

The tool upsamples a normal random feature of mean 1 / sqrt(2 pi) and measures its variance, for
variances from 0.01 to 0.99. The plot and the table compare the measurement with the closed form::

    python tools/analysis_tools/upsampling_variance.py [--align-corners] [--paper]

The default takes 64 maps of 128 x 128 and 12 variances, a few seconds; ``--paper`` the paper's
4096 maps and 99 variances.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    exits_on_input_error,
)

import torch
from mmengine.utils import ProgressBar

from mmseg_fusion.analysis.upsampling import (
    FEATURE_VARIANCE,
    Measurement,
    interior_variance_ratio,
    measure_upsampling,
    variance_ratio,
)

SHAPE, NUM_SIGMAS = (4, 16, 128, 128), 12
PAPER_SHAPE, PAPER_NUM_SIGMAS = (16, 256, 128, 128), 99


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Variance of a random feature before and after bilinear upsampling.'
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs=4,
        metavar=('N', 'C', 'H', 'W'),
        help=f'images, channels, height, width; default: {" ".join(map(str, SHAPE))}',
    )
    parser.add_argument(
        '--ratios',
        type=float,
        nargs='+',
        default=[2, 4, 8],
        metavar='R',
        help='upsampling ratios; default: 2 4 8',
    )
    parser.add_argument(
        '--num-sigmas',
        type=int,
        metavar='K',
        help=f'number of variances between 0.01 and 0.99; default: {NUM_SIGMAS}',
    )
    parser.add_argument(
        '--align-corners', action='store_true', help='interpolate with align_corners=True'
    )
    parser.add_argument(
        '--paper',
        action='store_true',
        help=f'full size: shape {" ".join(map(str, PAPER_SHAPE))}, {PAPER_NUM_SIGMAS} variances',
    )
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=Path('work_dirs/upsampling_variance'),
        help='folder for the plot and the table; default: %(default)s',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    parser.add_argument(
        '--device', default='cpu', help='where the feature lies, as cuda:0; default: cpu'
    )
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.paper and (args.shape or args.num_sigmas):
        parser.error('--paper sets --shape and --num-sigmas: give either')
    if args.shape is None:
        args.shape = PAPER_SHAPE if args.paper else SHAPE
    if args.num_sigmas is None:
        args.num_sigmas = PAPER_NUM_SIGMAS if args.paper else NUM_SIGMAS
    if min(args.shape) < 1:
        parser.error(f'argument --shape: expected positive numbers, got {args.shape}')
    if min(args.ratios) < 1:
        parser.error(f'argument --ratios: expected at least 1, got {min(args.ratios):g}')
    if args.num_sigmas < 2:
        parser.error(f'argument --num-sigmas: expected at least 2, got {args.num_sigmas}')
    return args


def rows_of(variance: float, measured: Sequence[Measurement], align_corners: bool) -> list[dict]:
    """One row of the table per ratio."""
    rows = []
    for m in measured:
        whole = float(m.ratio).is_integer() and not align_corners
        rows.append(
            {
                'ratio': f'{m.ratio:g}',
                'align_corners': align_corners,
                'variance': round(variance, 6),
                'mean_before': m.mean_before,
                'variance_before': m.variance_before,
                'mean_after': m.mean_after,
                'variance_after': m.variance_after,
                'measured_ratio': m.variance_after / m.variance_before,
                'closed_form': variance_ratio(m.size, m.out_size, align_corners),
                # The formula of the docs is for whole ratios and corners that are not aligned.
                'closed_form_interior': interior_variance_ratio(int(m.ratio)) if whole else '',
            }
        )
    return rows


def plot(rows: Sequence[dict], shape: Sequence[int], path: Path) -> None:
    """Variance after over variance before, and their ratio beside the closed form."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), layout='constrained')
    left.plot([0, 1], [0, 1], color='0.6', linewidth=1, label='no upsampling')
    for i, ratio in enumerate(dict.fromkeys(row['ratio'] for row in rows)):
        of_ratio = [row for row in rows if row['ratio'] == ratio]
        closed, color = of_ratio[0]['closed_form'], f'C{i}'
        x = [row['variance_before'] for row in of_ratio]
        left.plot([0, 1], [0, closed], color=color, linewidth=1)
        marker = dict(linestyle='none', marker='osD^v'[i % 5], markersize=4, color=color)
        left.plot(x, [row['variance_after'] for row in of_ratio], **marker, label=f'r = {ratio}')
        right.axhline(closed, color=color, linewidth=1, label=f'r = {ratio}: {closed:.4f}')
        right.plot(x, [row['measured_ratio'] for row in of_ratio], **marker)
    left.set(ylabel='variance after', title='Variance before and after upsampling')
    right.set(ylabel='variance after / variance before', title='Their ratio')
    for axes in (left, right):
        axes.axvline(FEATURE_VARIANCE, color='black', linestyle=':', linewidth=1)
        axes.annotate(
            r'$(\pi - 1) / 2\pi$',
            (FEATURE_VARIANCE, 0.02),
            xycoords=('data', 'axes fraction'),
            xytext=(4, 0),
            textcoords='offset points',
        )
        axes.set(xlabel='variance before', xlim=(-0.02, 1.02))
    left.set_ylim(-0.02, 1.02)
    left.legend(loc='upper left')
    # Without a lower limit to the range, aligned corners would show nothing but noise.
    low, high = right.get_ylim()
    more = max(0.0, 0.06 - (high - low)) / 2
    right.set_ylim(low - more, high + more)
    right.legend(title='closed form', loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
    corners = 'True' if rows[0]['align_corners'] else 'False'
    figure.suptitle(
        f'Bilinear upsampling of normal noise {" x ".join(map(str, shape))}, '
        f'align_corners={corners}: measured (markers), closed form (lines)',
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


@exits_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    stem = args.out_dir / ('figure3_align_corners' if args.align_corners else 'figure3')
    numbers, picture = stem.with_suffix('.csv'), stem.with_suffix('.png')
    outputs = Outputs('upsampling_variance', (), args.overwrite)
    outputs.check(numbers, picture)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    variances = torch.linspace(0.01, 0.99, args.num_sigmas, dtype=torch.float64).tolist()
    rows: list[dict] = []
    bar = ProgressBar(len(variances))
    for variance in variances:
        measured = measure_upsampling(
            variance, args.ratios, args.shape, args.align_corners, generator=generator
        )
        rows += rows_of(variance, measured, args.align_corners)
        bar.update()
    outputs.write_rows(numbers, rows)
    with outputs.path(picture) as file:
        plot(rows, args.shape, file)
    print('\nratio  measured (mean, largest deviation)  closed form  away from borders')
    for ratio in dict.fromkeys(row['ratio'] for row in rows):
        of_ratio = [row for row in rows if row['ratio'] == ratio]
        ratios = [row['measured_ratio'] for row in of_ratio]
        closed, interior = of_ratio[0]['closed_form'], of_ratio[0]['closed_form_interior']
        print(
            f'{ratio:>5}  {sum(ratios) / len(ratios):.4f}, '
            f'{max(abs(f - closed) for f in ratios):.4f}{"":20}  {closed:.4f}'
            f'       {interior if interior == "" else format(interior, ".4f")}'
        )
    print(f'{picture}\n{numbers}')


if __name__ == '__main__':
    main()
