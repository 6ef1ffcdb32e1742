"""Writes the papers' results into the front page and the methods' pages, from the metafiles.

    python docs/paper_numbers.py

A block between two marked lines of a page is replaced. mIoU is the paper's or the thesis';
parameters and multiply-adds are counted, and a test counts them again.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml

DOCS = Path(__file__).resolve().parent
BEGIN, END = '<!-- paper: begin -->', '<!-- paper: end -->'

# Per method: its name, the model, and rows of (label, config). The first row is the baseline, and
# the last one stands on the front page.
CONTEXT = '4xb4-30k_pascal-context-59-513x513'
CITYSCAPES = '4xb4-90k_cityscapes-1024x2048'
METHODS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    'scale_equalizer': (
        'Scale equalization',
        'UPerNet, Swin-T',
        [
            ('UPerNet', 'upernet_swin-t_4xb4-160k_ade20k-512x512'),
            ('+ scale equalization', 'upernet_swin-t_scale-eq_4xb4-160k_ade20k-512x512'),
        ],
    ),
    'gff': (
        'GFF',
        'PSPNet, ResNet-101',
        [
            ('PSPNet', 'pspnet_r101-d8_4xb2-100k_cityscapes-864x864'),
            ('+ concatenation', 'pspnet-concat_r101-d8_4xb2-100k_cityscapes-864x864'),
            ('+ FPN', 'pspnet-fpn_r101-d8_4xb2-100k_cityscapes-864x864'),
            ('+ GFF', 'gff_r101-d8_4xb2-100k_cityscapes-864x864'),
            ('+ GFF and DFP', 'gff-dfp_r101-d8_4xb2-100k_cityscapes-864x864'),
        ],
    ),
    'ksac': (
        'KSAC',
        'DeepLabV3, ResNet-50',
        [
            ('ASPP', 'deeplabv3_r50-d16_4xb4-40k_voc12aug-513x513'),
            ('KSAC', 'ksac_r50-d16_4xb4-40k_voc12aug-513x513'),
        ],
    ),
    'caa': (
        'CAA',
        'axial attention, ResNet-101',
        [
            ('axial attention', 'caa_r101-d16_axial_4xb4-40k_pascal-context-59-513x513'),
            (
                '+ squeeze and excitation behind it',
                'caa_r101-d16_axial-se_4xb4-40k_pascal-context-59-513x513',
            ),
            ('channelized', 'caa_r101-d16_4xb4-40k_pascal-context-59-513x513'),
        ],
    ),
    'car': (
        'CAR',
        'self-attention, ResNet-50',
        [
            ('self-attention', f'sa_r50-d8_{CONTEXT}'),
            ('+ CAR', f'sa_r50-d8_car_{CONTEXT}'),
        ],
    ),
    'eseg': (
        'ESeg',
        'EfficientNet-B1',
        [
            ('DeepLabV3+', f'deeplabv3plus_efficientnet-b1-d16_{CITYSCAPES}'),
            (
                'DeepLabV3+, nothing dilated',
                f'deeplabv3plus_efficientnet-b1_no-atrous_{CITYSCAPES}',
            ),
            ('ESeg-S', f'eseg-s_{CITYSCAPES}'),
        ],
    ),
    'hfgd': (
        'HFGD',
        'Semantic FPN, ResNet-50',
        [
            ('Semantic FPN', f'sfpn_r50_{CONTEXT}'),
            ('+ guidance', f'hfgd-sfpn_r50_guidance_{CONTEXT}'),
            ('HFGD, output stride 4', f'hfgd_r50_{CONTEXT}'),
        ],
    ),
}


@functools.cache
def models(method: str) -> dict[str, dict]:
    """The entries of a metafile by name."""
    path = DOCS.parent / 'configs' / method / 'metafile.yaml'
    return {m['Name']: m for m in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']}


def figures(model: dict) -> tuple[float, str, float, float]:
    """mIoU at one scale as the paper has it, data set, parameters in M, multiply-adds in G."""
    results, data = model['Results'], model['Metadata']
    found = [
        result['Metrics']['mIoU']
        for result in (results if isinstance(results, list) else [results])
        if 'mIoU' in result['Metrics']
    ]
    return found[0], data['Training Data'], data['Parameters'] / 1e6, data['FLOPs'] / 1e9


def table(method: str) -> str:
    """The rows of one method, for its page."""
    found = models(method)
    lines = [
        '| | data | mIoU, paper | parameters | multiply-adds |',
        '| --- | --- | --- | --- | --- |',
    ]
    for label, name in METHODS[method][2]:
        miou, data, parameters, flops = figures(found[name])
        lines.append(f'| {label} | {data} | {miou:.2f} | {parameters:.2f} M | {flops:.2f} G |')
    model = METHODS[method][1]
    return '\n'.join([f'{model}; the other rows are in {{doc}}`../model_zoo`.', '', *lines])


def overview() -> str:
    """Baseline and method of each paper, for the front page."""
    lines = [
        '| method, on | mIoU, paper | parameters, multiply-adds |',
        '| --- | --- | --- |',
    ]
    for method, (title, model, rows) in METHODS.items():
        found = models(method)
        before, after = (figures(found[name]) for _, name in (rows[0], rows[-1]))
        # No line breaks but those that are set: a phone has room for so much.
        cells = [
            f'[{title}](methods/{method}.md)<br>{model}, {before[1]}',
            f'{before[0]:.2f}<br>→ {after[0]:.2f}',
            f'{before[2]:.1f} → {after[2]:.1f} M<br>{before[3]:.1f} → {after[3]:.1f} G',
        ]
        lines.append(
            f'| {" | ".join([cells[0], *(c.replace(" ", "&nbsp;") for c in cells[1:])])} |'
        )
    return '\n'.join(lines)


def inserted(text: str, block: str) -> str:
    """``text`` with ``block`` between its two marked lines."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f'expected one line {BEGIN} and one line {END}')
    return re.sub(f'{BEGIN}.*?{END}', lambda _: f'{BEGIN}\n{block}\n{END}', text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Every page with what belongs between its marked lines."""
    blocks = {DOCS / 'methods' / f'{method}.md': table(method) for method in METHODS}
    return {DOCS / 'index.md': overview(), **blocks}


def main() -> None:
    for path, block in pages().items():
        path.write_text(inserted(path.read_text(encoding='utf-8'), block), encoding='utf-8')
        print(path)


if __name__ == '__main__':
    main()
