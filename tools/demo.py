"""Trains a small fusion model on FusionShapes, tests it on held-out scenes and draws both.

    python tools/demo.py [--iters 400] [--work-dir work_dirs/demo] [--config CONFIG]

About two minutes on two CPU cores. Exit status 1 if the model is not at least five times as good
as the best constant prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

# Threads that wait without spinning: beside data loading workers or other programs on the same two
# cores, an iteration otherwise takes several times as long. Read when torch is loaded.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

# First of all: it meets the third-party quirks before anything of mmseg is imported.
from mmseg_fusion.cli import (  # isort: skip
    Outputs,
    add_overwrite,
    config_files,
    exits_on_input_error,
    read_config,
)

import matplotlib

matplotlib.use('Agg')

import numpy as np
import torch
from matplotlib import pyplot as plt
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from mmseg_fusion.analysis.figures import WHITE, class_colours, patch
from mmseg_fusion.engine.runner import CheckedRunner

CONFIG = ROOT / 'configs/fusion_shapes/upernet_r18_scale-eq_1xb4-1k_fusion-shapes-128x128.py'
#: The least that the final mIoU has to be, in units of the best constant prediction's.
REQUIRED = 5.0


def shorten(cfg: Config, iters: int) -> None:
    """Shortens a config's schedule to ``iters`` iterations, including the learning rate.

    Args:
        cfg: changed in place.
        iters: number of training iterations.

    Raises:
        SystemExit: the config does not count in iterations.
    """
    if cfg.train_cfg.get('type') != 'IterBasedTrainLoop':
        raise SystemExit(
            'the demo shortens schedules that count iterations; expected '
            f"train_cfg.type='IterBasedTrainLoop', got {cfg.train_cfg.get('type')!r}"
        )
    ratio = iters / cfg.train_cfg.max_iters
    for scheduler in cfg.param_scheduler:
        for key in ('begin', 'end'):
            if key in scheduler:
                scheduler[key] = round(scheduler[key] * ratio)
    # A warm-up may have shrunk to nothing.
    cfg.param_scheduler = [s for s in cfg.param_scheduler if s.get('end') != s.get('begin', 0)]
    cfg.train_cfg.max_iters = iters
    cfg.train_cfg.val_interval = max(1, iters // 5)
    cfg.default_hooks.logger.interval = max(1, min(10, iters // 10))
    cfg.default_hooks.checkpoint.update(interval=iters, save_best=None, save_optimizer=False)


def constant_miou(pixels: np.ndarray) -> tuple[int, float]:
    """The class whose constant prediction has the best mIoU, and that mIoU in per cent.

    Predicting class c everywhere has IoU n_c / N there and 0 for every other class that occurs.

    Args:
        pixels: pixels per class in the labels.
    """
    best = int(pixels.argmax())
    return best, float(100 * pixels[best] / pixels.sum() / np.count_nonzero(pixels))


def count_labels(dataset, ignore_index: int = 255) -> np.ndarray:
    """Pixels per class in the labels of a data set."""
    total = np.zeros(256, np.int64)
    for sample in dataset:
        label = sample['data_samples'].gt_sem_seg.data
        total += np.bincount(label.numpy().ravel(), minlength=256)
    total[ignore_index] = 0
    return total[: len(dataset.metainfo['classes'])]


def read_curves(work_dir: Path, timestamp: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss and mIoU over iterations, from the run's own log.

    Args:
        work_dir: of the run.
        timestamp: of the run; names the folder of its log.

    Returns:
        Arrays of (iteration, loss) and (iteration, mIoU).
    """
    log = work_dir / timestamp / 'vis_data' / 'scalars.json'
    lines = [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]
    return tuple(
        np.array([(line['step'], line[key]) for line in lines if key in line]).reshape(-1, 2)
        for key in ('loss', 'mIoU')
    )


@torch.no_grad()
def predict(model, dataset, count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image (RGB), truth and prediction of the first ``count`` scenes."""
    model.eval()
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    outputs = model.test_step(pseudo_collate(samples))
    return [
        (
            sample['inputs'].numpy()[::-1].transpose(1, 2, 0),
            output.gt_sem_seg.data[0].cpu().numpy(),
            output.pred_sem_seg.data[0].cpu().numpy(),
        )
        for sample, output in zip(samples, outputs)
    ]


def draw_scenes(
    scenes: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    metainfo: dict,
    title: str,
    path: Path,
) -> None:
    """A panel: one column per scene with image, truth and prediction, and the classes below."""
    classes, palette = metainfo['classes'], metainfo['palette']
    colours = class_colours(palette)
    rows = ('image', 'truth', 'prediction')
    width = 1.9 * len(scenes) + 0.6
    figure, axes = plt.subplots(
        3, len(scenes), figsize=(width, 6.9), squeeze=False, layout='constrained'
    )
    for column, (image, truth, prediction) in enumerate(scenes):
        for row, picture in enumerate((image, colours[truth], colours[prediction])):
            axis = axes[row, column]
            axis.imshow(picture, interpolation='nearest')
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(rows[row], fontsize=12)
    handles = [patch(colour, name) for name, colour in zip(classes, palette)]
    handles.append(patch(WHITE, 'ignored'))
    figure.suptitle(title, fontsize=13)
    figure.legend(
        handles=handles,
        loc='outside lower center',
        ncols=min(len(handles), max(3, round(width / 1.3))),
        frameon=False,
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(
    loss: np.ndarray, miou: np.ndarray, constant: float, final: float, path: Path
) -> None:
    """Training loss and validation mIoU, with the best constant prediction for comparison."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout='constrained')
    left.plot(*loss.T, color='#46629e')
    left.set(title='training loss', xlabel='iteration', ylim=(0, None))
    right.plot(*miou.T, 'o-', color='#c8502d', label='model, validation scenes')
    if len(miou):
        right.plot(miou[-1, 0], final, '*', ms=13, color='#7a2a12', label='model, test scenes')
    right.axhline(REQUIRED * constant, color='0.45', ls='--', label=f'{REQUIRED:g} x the constant')
    right.axhline(constant, color='0.45', ls=':', label='best constant prediction')
    right.set(title='mIoU on held-out scenes', xlabel='iteration', ylabel='%', ylim=(0, None))
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.set_xlim(0, None)
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default=str(CONFIG), help='config file to train')
    parser.add_argument('--iters', type=int, default=400, help='training iterations')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--scenes', type=int, default=6, help='columns of the picture')
    add_overwrite(parser)
    args = parser.parse_args(argv)
    for name in ('iters', 'scenes'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} is at least 1, but got {getattr(args, name)}')
    return args


@exits_on_input_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.perf_counter()
    cfg = read_config(args.config, needs=['model', 'train_cfg', 'train_dataloader.dataset'])
    pictures = args.work_dir / 'scenes.png', args.work_dir / 'curves.png'
    # MMEngine writes these two itself.
    written = args.work_dir / f'iter_{args.iters}.pth', args.work_dir / Path(args.config).name
    outputs = Outputs('demo', config_files(args.config), args.overwrite)
    outputs.check(*pictures, *written)
    shorten(cfg, args.iters)
    cfg.work_dir = str(args.work_dir)
    cfg.setdefault('randomness', dict(seed=0))

    runner = CheckedRunner.from_cfg(cfg)
    runner.train()
    outputs.note(*written)
    trained = time.perf_counter() - start
    final = runner.test()['mIoU']

    dataset = runner.test_dataloader.dataset
    loss, miou = read_curves(args.work_dir, runner.timestamp)
    pixels = count_labels(dataset)
    best, constant = constant_miou(pixels)
    ratio = final / constant

    scenes = predict(runner.model, dataset, args.scenes)
    title = (
        f'held-out scenes after {args.iters} iterations\n'
        f'mIoU {final:.1f} % (best constant prediction {constant:.1f} %)'
    )
    with outputs.path(pictures[0]) as file:
        draw_scenes(scenes, dataset.metainfo, title, file)
    with outputs.path(pictures[1]) as file:
        draw_curves(loss, miou, constant, final, file)

    name = dataset.metainfo['classes'][best]
    print(f'\ntrained {args.iters} iterations in {trained:.0f} s')
    print(f'held-out scenes: {len(dataset)}')
    print(f'best constant prediction ({name!r} everywhere): mIoU {constant:.2f} %')
    print(f'model: mIoU {final:.2f} %, {ratio:.1f} times the constant')
    print('pictures:')
    for picture in pictures:
        print(f'  {picture}')
    if not ratio >= REQUIRED:
        print(
            f'\nFAILED: the model should reach {REQUIRED:g} times the constant prediction, but '
            f'reached {ratio:.1f}; train longer with --iters (the default is 400)',
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
