"""Images and masks to try ``tools/start.py`` on: 20 scenes of FusionShapes, masks in colours.

python docs/examples/made_images.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mmseg_fusion.datasets.fusion_shapes import FusionShapesDataset, draw_scene

VOID = (0, 0, 0)


def main(out: Path, count: int = 20) -> None:
    classes, palette = (FusionShapesDataset.METAINFO[key] for key in ('classes', 'palette'))
    colours = np.full((256, 3), VOID, np.uint8)
    colours[: len(palette)] = palette
    for folder in ('images', 'masks'):
        (out / folder).mkdir(parents=True)
    for index in range(count):
        image, label = draw_scene(index)
        # BGR, as OpenCV has it.
        Image.fromarray(image[..., ::-1]).save(out / 'images' / f'scene_{index:02}.jpg')
        Image.fromarray(colours[label]).save(out / 'masks' / f'scene_{index:02}_mask.png')
    lines = [
        '{} {} {} {}'.format(*colour, name)
        for colour, name in [*zip(palette, classes), (VOID, 'void')]
    ]
    (out / 'colours.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print(f'{count} images, masks and the list of colours are in {out}')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
