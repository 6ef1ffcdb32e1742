"""Every config file: loads, finds its names, keeps what its name says, stands in its metafile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from mmengine import registry as engine_registries
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, Registry

from .files import (
    CONFIGS,
    FOLDERS,
    METAFILES,
    ROOT,
    TRAINABLE,
    models_of,
    plain,
    read,
)

stem = pytest.mark.parametrize('path', TRAINABLE, ids=lambda p: Path(p).stem)

# --- names ---------------------------------------------------------------------------------------

# Where a dict with a type is looked up, by the innermost of these keys above it.
LOOKUP = {
    'model': 'MODELS',
    'tta_model': 'MODELS',
    'init_cfg': 'WEIGHT_INITIALIZERS',
    'dataset': 'DATASETS',
    'datasets': 'DATASETS',
    'pipeline': 'TRANSFORMS',
    'transforms': 'TRANSFORMS',
    'tta_pipeline': 'TRANSFORMS',
    'sampler': 'DATA_SAMPLERS',
    'pixel_sampler': 'TASK_UTILS',
    'batch_sampler': 'DATA_SAMPLERS',
    'collate_fn': 'FUNCTIONS',
    'val_evaluator': 'METRICS',
    'test_evaluator': 'METRICS',
    'optim_wrapper': 'OPTIM_WRAPPERS',
    'optimizer': 'OPTIMIZERS',
    'constructor': 'OPTIM_WRAPPER_CONSTRUCTORS',
    'param_scheduler': 'PARAM_SCHEDULERS',
    'train_cfg': 'LOOPS',
    'val_cfg': 'LOOPS',
    'test_cfg': 'LOOPS',
    'default_hooks': 'HOOKS',
    'custom_hooks': 'HOOKS',
    'visualizer': 'VISUALIZERS',
    'vis_backends': 'VISBACKENDS',
}


def names(cfg: Any, top: str | None = None, above: str | None = None) -> Iterator[tuple[str, str]]:
    """(registry, type) of everything that a Runner would build from ``cfg``."""
    if isinstance(cfg, (list, tuple)):
        for item in cfg:
            yield from names(item, top, above)
    if not isinstance(cfg, dict):
        return
    if 'type' in cfg and above in LOOKUP:
        yield LOOKUP[above], cfg['type']
        if 'constructor' in cfg:
            yield LOOKUP['constructor'], cfg['constructor']
    for key, value in cfg.items():
        if top is None:
            # Variables of the file are not built.
            if key in LOOKUP or key.endswith('_dataloader'):
                yield from names(value, key, key)
        else:
            # A model's own train_cfg is no loop, a hook named param_scheduler no scheduler.
            inner = key in LOOKUP and not (top == 'model' and key.endswith('_cfg'))
            inner = (inner and not top.endswith('_hooks')) or key == 'init_cfg'
            # A head's sampler chooses pixels, a loader's chooses images.
            kind = 'pixel_sampler' if (top, key) == ('model', 'sampler') else key
            yield from names(value, top, kind if inner else above)


@pytest.mark.stack
@stem
def test_every_name_is_registered(path: str) -> None:
    found = set(names(read(path).to_dict()))
    kinds = {kind for kind, _ in found}
    assert {'MODELS', 'DATASETS', 'TRANSFORMS', 'HOOKS', 'LOOPS', 'OPTIMIZERS', 'METRICS'} <= kinds
    missing = []
    for kind, name in sorted(found):
        root: Registry = getattr(engine_registries, kind)
        with root.switch_scope_and_registry(None) as child:
            if child.get(name) is None:
                missing.append(f'{name} in {kind}')
    assert not missing


def test_names_sees_a_wrong_name() -> None:
    cfg = {'model': {'type': 'A', 'head': {'type': 'B', 'init_cfg': {'type': 'C'}}}}
    cfg['train_dataloader'] = {'dataset': {'type': 'D', 'pipeline': [{'type': 'E'}]}}
    cfg['optim_wrapper'] = {'type': 'F', 'optimizer': {'type': 'G'}, 'constructor': 'H'}
    assert {t for _, t in names(cfg)} == set('ABCDEFGH')
    assert {t: k for k, t in names(cfg)}['E'] == 'TRANSFORMS'


@stem
def test_imports(path: str) -> None:
    imports = read(path).custom_imports
    assert imports['allow_failed_imports'] is False
    assert 'mmseg_fusion' in imports['imports']
    # mmengine knows a package's names once it has been imported.
    scopes = {n.split('.')[0] for _, n in names(read(path).to_dict()) if '.' in n}
    assert scopes <= {name.split('.')[0] for name in imports['imports']}


@stem
def test_at_most_three_levels(path: str) -> None:
    def depth(file: Path) -> int:
        bases = Config._get_base_files(str(file))
        return 1 + max((depth(file.parent / base) for base in bases), default=0)

    assert depth(ROOT / path) <= 3


def heads_of(model: Any) -> list[Any]:
    """Configs of all decode heads, of a cascade too, and of the auxiliary ones."""
    found = []
    for key in ('decode_head', 'auxiliary_head'):
        heads = model.get(key) or []
        found += heads if isinstance(heads, list) else [heads]
    return found


@stem
def test_does_what_its_name_says(path: str) -> None:
    name = Path(path).stem
    match = re.search(r'_(\d+)xb(\d+)(-amp)?-(\d+)k_([a-z0-9-]+)-(\d+)x(\d+)$', name)
    assert match, 'expected {model}_..._{gpus}xb{batch}-{iterations}k_{dataset}-{height}x{width}'
    _, batch, amp, iterations, dataset, height, width = match.groups()
    cfg = read(path)
    assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.train_cfg.max_iters == int(iterations) * 1000
    assert max(s.end for s in cfg.param_scheduler) == cfg.train_cfg.max_iters
    assert cfg.optim_wrapper.type == ('AmpOptimWrapper' if amp else 'OptimWrapper')
    assert tuple(cfg.model.data_preprocessor.size) == (int(height), int(width))
    data = cfg.train_dataloader.dataset
    data = data.datasets[0] if 'datasets' in data else data
    expected = {
        'ade20k': ('ADE20KDataset', 150),
        'voc12aug': ('PascalVOCDataset', 21),
        'voc12': ('PascalVOCDataset', 21),
        'coco-voc12aug': ('PascalVOCDataset', 21),
        'pascal-context-59': ('PascalContextDataset59', 59),
        'coco-stuff10k': ('COCOStuffDataset', 171),
        'coco-stuff164k': ('COCOStuffDataset', 171),
        'cityscapes': ('CityscapesDataset', 19),
        'camvid': ('CamVidDataset', 11),
        'fusion-shapes': ('FusionShapesDataset', 8),
    }
    assert data.type == expected[dataset][0]
    assert {head.num_classes for head in heads_of(cfg.model)} == {expected[dataset][1]}
    hooks = [hook['type'] for hook in cfg.get('custom_hooks', [])]
    assert ('scale-eq' in name) == ('ScaleEqualizerHook' in hooks)


STARTING = [path for path in TRAINABLE if read(path).get('load_from')]


@pytest.mark.parametrize('path', STARTING, ids=lambda p: Path(p).stem)
def test_starts_from_the_last_checkpoint_of_a_config(path: str) -> None:
    """``load_from`` is where that config's training saves, and its weights fit."""
    match = re.fullmatch(r'work_dirs/(.+)/iter_(\d+)\.pth', read(path).load_from)
    assert match, read(path).load_from
    name, iterations = match.group(1), int(match.group(2))
    (before,) = (p for p in TRAINABLE if Path(p).stem == name)
    cfg = read(before)
    assert before != path
    assert cfg.train_cfg.max_iters == iterations
    assert iterations % cfg.default_hooks.checkpoint.interval == 0
    # The same backbone, and the same classes.
    assert cfg.model.backbone == read(path).model.backbone
    classes = [{h.num_classes for h in heads_of(c.model)} for c in (cfg, read(path))]
    assert classes[0] == classes[1]


@pytest.mark.parametrize(
    'path', [p for p in TRAINABLE if '_scale-eq_' in p], ids=lambda p: Path(p).stem
)
def test_pair_differs_by_the_hook_alone(path: str) -> None:
    baseline = path.replace('_scale-eq_', '_')
    assert baseline in TRAINABLE
    with_hook = plain(ROOT / path)
    # U-Net's decoder lies in MMSegmentation's backbone: 'auto' finds no fusion, so it is named.
    named = (
        {'layers': ['backbone.decoder']} if with_hook['model']['backbone']['type'] == 'UNet' else {}
    )
    assert with_hook.pop('custom_hooks') == [{'type': 'ScaleEqualizerHook', **named}]
    assert with_hook == plain(ROOT / baseline)


def test_all_rows_of_the_paper_are_there() -> None:
    upernet = [f'swin-{s}' for s in 'tsb'] + [f'twins-svt-{s}' for s in 'sbl']
    convnext = [f'convnext-{s}' for s in 'tsb']
    data = ('ade20k', 'voc12aug')
    rows = [f'upernet_{b}{{}}_4xb4-160k_{d}-512x512' for b, d in product(upernet, data)]
    rows += [f'upernet_{b}{{}}_4xb4-amp-160k_{d}-512x512' for b, d in product(convnext, data)]
    heads = ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
    trained = ('4xb2-80k_cityscapes-512x1024', '4xb4-160k_ade20k-512x512')
    rows += [f'{h}_r101-d8{{}}_{t}' for h, t in product(heads, trained)]
    assert len(rows) == 26
    expected = {row.format(key) for row in rows for key in ('', '_scale-eq')}
    assert {p.stem for p in (CONFIGS / 'scale_equalizer').glob('*.py')} == expected


@pytest.mark.parametrize(
    ('part', 'algorithm', 'lr', 'decay', 'wrapper'),
    [
        ('swin', 'AdamW', 6e-5, 1e-2, 'OptimWrapper'),
        ('twins', 'AdamW', 6e-5, 1e-2, 'OptimWrapper'),
        ('convnext', 'AdamW', 1e-4, 5e-2, 'AmpOptimWrapper'),
        ('r101', 'SGD', 1e-2, 5e-4, 'OptimWrapper'),
    ],
)
def test_recipes_of_the_paper(
    part: str, algorithm: str, lr: float, decay: float, wrapper: str
) -> None:
    # Section 4 of arXiv 2402.01149.
    paths = [p for p in TRAINABLE if 'scale_equalizer' in p and part in Path(p).stem]
    assert len(paths) == (16 if part == 'r101' else 12)
    for path in paths:
        cfg = read(path)
        optimizer = cfg.optim_wrapper.optimizer
        found = (optimizer.type, optimizer.lr, optimizer.weight_decay, cfg.optim_wrapper.type)
        assert found == (algorithm, lr, decay, wrapper), path
        assert cfg.model.decode_head.norm_cfg.type == 'SyncBN'
        if algorithm == 'SGD':
            assert optimizer.momentum == 0.9
            assert [s.type for s in cfg.param_scheduler] == ['PolyLR']
        else:
            assert optimizer.betas == (0.9, 0.999)
            assert [s.type for s in cfg.param_scheduler] == ['LinearLR', 'PolyLR']


# --- metafiles and READMEs -----------------------------------------------------------------------


@pytest.mark.parametrize('folder', FOLDERS)
def test_metafile_lists_its_folder(folder: str) -> None:
    metafile = f'{folder}/metafile.yaml'
    assert metafile in METAFILES
    listed = [model['Config'] for model in models_of(metafile)]
    assert sorted(listed) == [p for p in TRAINABLE if str(Path(p).parent) == folder]
    collections = yaml.safe_load((ROOT / metafile).read_text(encoding='utf-8'))['Collections']
    for collection in collections:
        assert (ROOT / collection['README']).is_file()
    for model in models_of(metafile):
        assert model['Name'] == Path(model['Config']).stem
        assert model['In Collection'] in [c['Name'] for c in collections]
        assert {'Training Data', 'Batch Size', 'Architecture'} <= set(model['Metadata'])
        cfg = read(model['Config'])
        gpus = int(re.search(r'_(\d+)xb', model['Name']).group(1))
        assert model['Metadata']['Batch Size'] == gpus * cfg.train_dataloader.batch_size
        # A number that nobody here has measured says whose it is.
        results = model.get('Results', [])
        for result in results if isinstance(results, list) else [results]:
            assert result.get('Source'), f'{model["Name"]}: whose number is it?'


def test_model_index_lists_every_metafile() -> None:
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    assert sorted(index['Import']) == METAFILES
    names_ = [model['Name'] for metafile in METAFILES for model in models_of(metafile)]
    assert len(names_) == len(set(names_))


@pytest.mark.parametrize('folder', FOLDERS)
def test_readme(folder: str) -> None:
    readme = ROOT / folder / 'README.md'
    text = readme.read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)#]+)[^)]*\)', text)
    local = [link for link in links if '://' not in link]
    assert not [link for link in local if not (readme.parent / link).exists()]
    linked = {(readme.parent / link).resolve().name for link in local}
    configs = {Path(p).name for p in TRAINABLE if str(Path(p).parent) == folder}
    assert configs <= linked
    # Commands name files that exist.
    files = re.findall(r'(?:configs|tools)/[\w./-]+\.(?:py|sh|yaml)', text)
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_readme_has_the_metafiles_numbers() -> None:
    folder = 'configs/scale_equalizer'
    miou = {
        m['Name']: m['Results']['Metrics']['mIoU'] for m in models_of(f'{folder}/metafile.yaml')
    }
    rows = re.findall(
        r'\| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \|[^|]*\./(\S+)\.py\)[^|]*\|[^|]*\./(\S+)\.py\)',
        (ROOT / folder / 'README.md').read_text(encoding='utf-8'),
    )
    assert len(rows) == 26
    for without, with_, difference, baseline, scale_eq in rows:
        assert scale_eq == re.sub(r'_(\d+xb)', r'_scale-eq_\1', baseline)
        assert (float(without), float(with_)) == (miou[baseline], miou[scale_eq])
        assert f'{miou[scale_eq] - miou[baseline]:+.3f}' == difference
    # The sums over the columns of the paper's tables 1 and 2.
    totals = [sum(float(row[i]) for row in rows) for i in (0, 1)]
    assert totals == pytest.approx([1643.202, 1649.582])


# --- as configs of an installed package ----------------------------------------------------------


@pytest.mark.stack
def test_inheritance_by_package_name(tmp_path: Path) -> None:
    found = next(p for p in TRAINABLE if 'fusion_shapes' in p and '_scale-eq_' in p)
    name = found.partition('/')[2]
    child = tmp_path / 'child.py'
    child.write_text(f"_base_ = 'mmseg_fusion::{name}'\nmodel = dict(decode_head=dict(channels=8))")
    cfg = Config.fromfile(child)
    expected = plain(CONFIGS / name)
    assert cfg.model.decode_head.pop('channels') == 8
    expected['model']['decode_head'].pop('channels')

    def unscoped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: unscoped(v) for k, v in value.items() if k != '_scope_'}
        return [unscoped(v) for v in value] if isinstance(value, list) else value

    assert unscoped(cfg._cfg_dict.to_dict()) == unscoped(expected)
    # The names are found in mmseg's registries, where this package's are too.
    cfg.model.decode_head.channels = 8
    assert MODELS.build(cfg.model).decode_head.channels == 8


@pytest.mark.stack
@pytest.mark.parametrize('path', [next(p for p in TRAINABLE if p.startswith(f)) for f in FOLDERS])
def test_hub_finds_it(path: str) -> None:
    found = get_config('mmseg_fusion::' + path.partition('/')[2])
    assert found._cfg_dict.to_dict() == plain(ROOT / path)
