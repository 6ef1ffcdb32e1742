"""The gallery: pictures that the tools draw, each beside the command that draws it.

    python docs/gallery.py                    writes docs/gallery.md, and picture and command into
                                              the pages of the methods
    python docs/gallery.py --draw gate_maps   runs the command and makes docs/gallery/gate_maps.png
                                              of what it draws, small; --draw alone: all of them

The models are trained by the commands that stand at the end of the page.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGE = DOCS / 'gallery.md'
FOLDER = DOCS / 'gallery'
METHODS = DOCS / 'methods'
MAX_BYTES = 90_000

CAMVID = 'configs/camvid/{0}_1xb4-1k_camvid-180x240.py'
CAMVID_WEIGHTS = 'work_dirs/compare/{0}_1xb4-1k_camvid-180x240/seed-0/iter_1000.pth'


def camvid(name: str) -> str:
    return f'{CAMVID.format(name)} \\\n    {CAMVID_WEIGHTS.format(name)}'


BOTH = f"""{camvid('upernet_lite0')} \\
    {camvid('upernet_lite0_car')} \\
    --names UPerNet CAR"""


LATENCY = 'configs/camvid/*_lite0*.py'
#: Method -> baseline and method of the picture, as their configs begin, and what they are called.
PAIRS = {
    'gff': ('pspnet_lite0-d16', 'gff-dfp_lite0-d16', 'PSPNet', 'GFF+DFP'),
    'ksac': ('deeplabv3_lite0-d16', 'ksac_lite0-d16', 'ASPP', 'KSAC'),
    'caa': ('aa_lite0-d16', 'caa_lite0-d16', 'axial', 'CAA'),
    'car': ('upernet_lite0', 'upernet_lite0_car', 'UPerNet', 'CAR'),
    'eseg': ('deeplabv3plus_lite0-d16', 'bifpn_lite0', 'DeepLabV3+', 'BiFPN'),
    'hfgd': ('sfpn_lite0', 'hfgd-sfpn_lite0', 'SemanticFPN', 'HFGD'),
}


@dataclass
class Picture:
    """One picture of the gallery.

    Args:
        title: what it is.
        shows: what one sees in it, a sentence or two.
        command: the shell command that draws it.
        made: the file that the command leaves.
        page: of the method that it belongs to.
    """

    title: str
    shows: str
    command: str
    made: str
    page: str = ''


PICTURES = {
    'scale_report': Picture(
        'Scales of branches and gradients',
        'The standard deviation of every branch of a fusion and the gradient of its weights, '
        'before and after scale equalization. CamVid.',
        f"""python tools/analysis_tools/scale_report.py \\
    {CAMVID.format('upernet_lite0')} \\
    --num-images 64 --out-dir work_dirs/gallery/scale_report""",
        'work_dirs/gallery/scale_report/scale_report.png',
        'scale_equalizer',
    ),
    'upsampling_variance': Picture(
        'What upsampling does to the variance',
        'Figure 3 of the scale equalization paper: variance after bilinear upsampling divided by '
        'the variance before, as measured and from the closed form.',
        """python tools/analysis_tools/upsampling_variance.py \\
    --out-dir work_dirs/gallery/upsampling_variance""",
        'work_dirs/gallery/upsampling_variance/figure3.png',
        'scale_equalizer',
    ),
    'gate_maps': Picture(
        'Gates of GFF',
        'Figures 6 and 7 of GFF: the gate of every level as a heat map, and below it the pixels '
        'that become wrong when this gate is set to 0. CamVid.',
        f"""python tools/analysis_tools/gate_maps.py \\
    {camvid('gff-dfp_lite0-d16')} \\
    --num-samples 1 --zero-gate all --out work_dirs/gallery/gate_maps.png""",
        'work_dirs/gallery/gate_maps.png',
        'gff',
    ),
    'rate_maps': Picture(
        'Feature maps per dilation rate',
        'Figure 2.4 of the thesis: feature maps of ASPP and of KSAC at each rate. KSAC has the '
        'same kernel at every rate. CamVid.',
        f"""python tools/analysis_tools/rate_maps.py \\
    {camvid('deeplabv3_lite0-d16')} \\
    {camvid('ksac_lite0-d16')} \\
    --names ASPP KSAC --num-samples 1 --count 4 --out-dir work_dirs/gallery/rate_maps""",
        'work_dirs/gallery/rate_maps/*.png',
        'ksac',
    ),
    'attention_conflicts': Picture(
        'Attentions that contradict each other',
        'Figures 3.3 and 3.4 of the thesis: where spatial or channel attention alone was right '
        'and their sum is wrong, here in a DANet. CamVid.',
        f"""python tools/analysis_tools/attention_conflicts.py \\
    {camvid('danet_lite0-d16')} \\
    --num-images 16 --rows 2 --out-dir work_dirs/gallery/attention_conflicts""",
        'work_dirs/gallery/attention_conflicts/attention_conflicts.png',
        'caa',
    ),
    'class_dependency': Picture(
        'Class dependency',
        'Figure 4.5 of the thesis: how much every class depends on the others, without and '
        'with CAR. Smaller values off the diagonal are better. CamVid.',
        f"""python tools/analysis_tools/class_dependency.py \\
    {BOTH} --num-samples 24 \\
    --out-dir work_dirs/gallery/class_dependency""",
        'work_dirs/gallery/class_dependency/*.png',
        'car',
    ),
    'pixel_relation': Picture(
        'Relation of one pixel to all others',
        'Figure 4.4 of the thesis: the dot product of the feature of one pixel with those of all '
        'others, without and with CAR. CamVid.',
        f"""python tools/analysis_tools/pixel_relation.py \\
    {BOTH} --num-samples 1 --max-points 3 \\
    --out-dir work_dirs/gallery/pixel_relation""",
        'work_dirs/gallery/pixel_relation/*.png',
        'car',
    ),
    'feature_umap': Picture(
        'Last features in the plane',
        'Figure 4 of HFGD: UMAP of features, coloured by class. Two numbers show how compact the '
        'classes are. Teacher and student of one HFGD model. CamVid.',
        f"""python tools/analysis_tools/feature_umap.py \\
    {camvid('hfgd_lite0')} \\
    {camvid('hfgd_lite0')} \\
    --layer decode_head.encoder.out_conv decode_head.axial_attention --side output \\
    --names teacher student --num-samples 24 --pixels-per-class 200 \\
    --out work_dirs/gallery/feature_umap.png""",
        'work_dirs/gallery/feature_umap.png',
        'hfgd',
    ),
    **{
        f'predictions_{page}': Picture(
            f'{method} beside {baseline}',
            f'Image, truth, the prediction of {baseline} and of {method}, and the pixels on which '
            'only one of them is right, for images evenly spaced over the test split. CamVid.',
            f"""python tools/analysis_tools/predictions.py \\
    {camvid(first)} \\
    {camvid(second)} \\
    --names {baseline} {method} --num-samples 3 \\
    --out work_dirs/gallery/predictions_{page}.png""",
            f'work_dirs/gallery/predictions_{page}.png',
            page,
        )
        for page, (first, second, baseline, method) in PAIRS.items()
    },
    'latency': Picture(
        'Accuracy against latency',
        'The mIoU of {doc}`results` against the time for one image of 180 x 240 on one CPU core, '
        'measured in turns. A line joins each model with its baseline. CamVid.',
        f"""python tools/analysis_tools/benchmark_eseg.py --threads 1 --shape 180 240 \\
    --models {LATENCY} --repeat 30 \\
    --json work_dirs/gallery/latency.json
python tools/compare.py --from results/camvid.json \\
    --latency work_dirs/gallery/latency.json --plot work_dirs/gallery/latency.png""",
        'work_dirs/gallery/latency.png',
        'eseg',
    ),
    'compare': Picture(
        'Several configs over seeds',
        'A point per run, the mean and its 95 % interval: the runs of {doc}`results` that were '
        'finished when the picture was made. CamVid.',
        """python tools/compare.py --from results/camvid.json \\
    --plot work_dirs/gallery/compare.png""",
        'work_dirs/gallery/compare.png',
    ),
    'demo': Picture(
        'The demo',
        'The output of `make demo`: images, truth and predictions of a model that was trained for '
        '400 iterations. FusionShapes.',
        """python tools/demo.py --work-dir work_dirs/gallery/demo""",
        'work_dirs/gallery/demo/scenes.png',
    ),
}

HEAD = """# Gallery

Pictures that the tools draw, each with the command that drew it. All pictures are of small models
after a short training, with one seed. They show what each tool draws; {doc}`results` says how good
the methods are there, and {doc}`tools` describes every option.
"""

TRAINING = """## The models behind the pictures

All models are trained on CamVid at half size for 1000 iterations of four images, from ImageNet
weights, with seed 0; {doc}`results` has the recipe. This trains a pair, for example:

```shell
python tools/compare.py configs/camvid/deeplabv3_lite0-d16_1xb4-1k_camvid-180x240.py \\
    configs/camvid/ksac_lite0-d16_1xb4-1k_camvid-180x240.py --seeds 0
```
"""

#: A block of a method's page, of the name that stands in it.
BLOCK = re.compile(r'^% picture: (\w+)\n.*?^% end of picture\n', re.M | re.S)


def with_pictures(text: str) -> str:
    """A method's page with each of its blocks filled: the picture, and its command below it."""

    def block(match: re.Match) -> str:
        name = match[1]
        picture = PICTURES[name]
        return (
            f'% picture: {name}\n\n![{picture.title}](../gallery/{name}.png)\n\n'
            f'```shell\n{picture.command}\n```\n\n% end of picture\n'
        )

    return BLOCK.sub(block, text)


def page() -> str:
    """The whole page: thumbnails, then every picture with its command."""
    cards, sections = [], []
    for name, picture in PICTURES.items():
        image = f'gallery/{name}.png'
        cards.append(
            f':::{{grid-item-card}} {picture.title}\n:link: gallery-{name.replace("_", "-")}\n'
            f':link-type: ref\n:img-top: {image}\n:::\n'
        )
        lines = [f'(gallery-{name.replace("_", "-")})=', f'## {picture.title}', '', picture.shows]
        if picture.page:
            lines[-1] += f' More on the page of {{doc}}`methods/{picture.page}`.'
        lines += ['', f'```shell\n{picture.command}\n```', '']
        lines += [':::{div} wide-picture', f'![{picture.title}]({image})', ':::', '']
        sections.append('\n'.join(lines))
    grid = '\n'.join(
        ['::::{grid} 2 2 3 4', ':gutter: 2', ':class-container: thumbnails', '', *cards, '::::', '']
    )
    return '\n'.join([HEAD, grid, *sections, TRAINING])


def shrink(source: Path, target: Path) -> None:
    """A PNG of ``MAX_BYTES`` at most, of fewer colours and fewer pixels."""
    from PIL import Image

    image = Image.open(source).convert('RGB')
    image.thumbnail((1100, 1400))
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        size = [round(side * share) for side in image.size]
        for colours in (256, 128, 64):
            small = image.resize(size, Image.LANCZOS).quantize(colours)
            buffer = io.BytesIO()
            small.save(buffer, 'PNG', optimize=True)
            if buffer.tell() <= MAX_BYTES:
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(buffer.getvalue())
                return
    raise SystemExit(f'{source} does not fit into {MAX_BYTES} bytes')


def draw(name: str) -> None:
    """Runs the command of a picture and keeps a small copy of what it draws."""
    picture = PICTURES[name]
    for line in picture.command.replace('\\\n', ' ').splitlines():
        words = [
            path
            for word in shlex.split(line)
            for path in (sorted(map(str, ROOT.glob(word))) if '*' in word else [word])
        ]
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
    made = sorted(ROOT.glob(picture.made))
    if not made:
        raise SystemExit(f'{picture.made} is not there')
    shrink(made[0], FOLDER / f'{name}.png')
    print(FOLDER / f'{name}.png')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--draw', nargs='*', choices=list(PICTURES), help='none named: all')
    args = parser.parse_args()
    if args.draw is not None:
        for name in args.draw or PICTURES:
            draw(name)
    PAGE.write_text(page(), encoding='utf-8')
    for path in METHODS.glob('*.md'):
        path.write_text(with_pictures(path.read_text(encoding='utf-8')), encoding='utf-8')
    print(PAGE)


if __name__ == '__main__':
    main()
