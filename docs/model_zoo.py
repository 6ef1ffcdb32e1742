"""Writes docs/model_zoo.md from metafiles and results: ``python docs/model_zoo.py``."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from mmseg_fusion.analysis.comparison import mean_and_std

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGE = DOCS / 'model_zoo.md'
RESULTS = ROOT / 'results' / 'camvid.json'

INTRO = """# Model zoo

Every config of the project: {models} models, {reported} of them with a result in a paper. The page
is made from the metafiles (`configs/*/metafile.yaml`) and from `results/camvid.json` by
`python docs/model_zoo.py`.

- **Parameters** and **FLOPs** are ours, without auxiliary heads and for the input size that is
  given; a test computes them again. FLOPs are multiply-adds; the files hold the exact numbers.
- **paper** is the mIoU in per cent that the paper or thesis reports for this row, with the table
  or section where the metafile names it; "ms" is its figure for several scales, "ms + flip" for
  flipped images, too. **No model with a paper's figure was trained here**, and there are no
  weights to download.
- **ours** is the mean over seeds on CamVid's test split, with the standard deviation;
  {{doc}}`results` says what these runs can tell.
"""

METRICS = {'mIoU': '', 'mIoU(ms)': ' (ms)', 'mIoU(ms+flip)': ' (ms + flip)'}


def ours() -> dict[str, str]:
    """Name of a config -> mean, deviation and number of seeds of our own runs."""
    values: dict[str, list[float]] = {}
    for run in json.loads(RESULTS.read_text(encoding='utf-8'))['runs']:
        values.setdefault(run['config'], []).append(run['mIoU'])
    return {name: spread(miou) for name, miou in values.items()}


def spread(values: list[float]) -> str:
    """Mean, deviation and number of the seeds of one config."""
    mean, std = mean_and_std(values)
    return f'{mean:.2f}, 1 seed' if std is None else f'{mean:.2f} ± {std:.2f}, {len(values)} seeds'


def reported(model: dict) -> str:
    """The paper's figures of one model of a metafile, with their source."""
    results = model.get('Results') or []
    cells = []
    for result in results if isinstance(results, list) else [results]:
        figures = [
            f'{result["Metrics"][key]}{text}'
            for key, text in METRICS.items()
            if key in result['Metrics']
        ]
        if figures:
            source = result['Source']
            where = source.partition(', ')[2]
            cells.append(', '.join(figures) + (f' [{where}]' if where else ''))
    return '; '.join(cells)


def section(metafile: Path, runs: dict[str, str]) -> tuple[list[str], int, int]:
    """Lines of one folder, its number of models, and how many of them have a paper's figure."""
    content = yaml.safe_load(metafile.read_text(encoding='utf-8'))
    folder, models = metafile.parent.name, content['Models']
    cells = []
    for model in models:
        data = model['Metadata']
        shape = data['FLOPs Shape']
        size = shape if isinstance(shape, str) else ' x '.join(map(str, shape))
        cells.append(
            dict(
                config=f'`{model["Name"]}`',
                data=data['Training Data'],
                parameters=f'{data["Parameters"] / 1e6:.2f} M',
                FLOPs=f'{data["FLOPs"] / 1e9:.2f} G',
                size=size,
                paper=reported(model),
                ours=runs.get(model['Name'], ''),
            )
        )
    title = content['Collections'][0]
    paper = title.get('Paper', {})
    lines = [f'## {title["Name"]}', '']
    source = f'[{paper["Title"]}]({paper["URL"]}). ' if paper else ''
    lines += [f'{source}`configs/{folder}/README.md` says what the rows are.', '']
    # A column that no row of this folder fills is left out.
    columns = [key for key in cells[0] if any(cell[key] for cell in cells)]
    lines.append(f'| {" | ".join(columns)} |')
    lines.append('|' + ' --- |' * len(columns))
    lines += [f'| {" | ".join(str(cell[key]) for key in columns)} |' for cell in cells]
    return [*lines, ''], len(models), sum(bool(cell['paper']) for cell in cells)


def page() -> str:
    """The whole page."""
    runs = ours()
    sections = [section(path, runs) for path in sorted(ROOT.glob('configs/*/metafile.yaml'))]
    head = INTRO.format(models=sum(s[1] for s in sections), reported=sum(s[2] for s in sections))
    return '\n'.join([head, *(line for lines, _, _ in sections for line in lines)]).rstrip() + '\n'


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
    print(f'{PAGE}')
