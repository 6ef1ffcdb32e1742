"""CamVid from pretrained weights: one recipe, and pairs that differ in the method alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from .files import BASE, ROOT, TRAINABLE, plain

TRAINED = '1xb4-1k_camvid-180x240'
PATHS = {
    Path(p).stem.removesuffix(f'_{TRAINED}'): p
    for p in TRAINABLE
    if p.startswith('configs/camvid/') and 'lite0' in p
}


def flat(value: Any, name: str = '') -> dict[str, Any]:
    """Dotted keys of a config, without its variables."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(flat(inner, f'{name}.{key}' if name else key))
    return found


def differing(less: str, more: str) -> set[str]:
    a, b = (flat(plain(ROOT / PATHS[name])) for name in (less, more))
    return {key for key in {*a, *b} if a.get(key) != b.get(key)}


HEAD = 'model.decode_head.'
#: Baseline, method, and every key in which they may differ.
PAIRS = [
    ('upernet_lite0', 'upernet_lite0_scale-eq', {'custom_hooks'}),
    ('upernet_lite0', 'upernet_lite0_scale-eq-module', {'custom_hooks'}),
    ('upernet_lite0', 'upernet_lite0_car', {'model.type', 'model.car.channels', 'model.car.pool'}),
    # Its loss=None reads as absent.
    ('upernet_lite0', 'upernet_lite0_conv1x1', {'model.type', 'model.car.linear'}),
    ('upernet_lite0_car', 'upernet_lite0_scale-eq_car', {'custom_hooks'}),
    ('deeplabv3_lite0-d16', 'ksac_lite0-d16', {f'{HEAD}type', f'{HEAD}dilations'}),
    ('aa_lite0-d16', 'caa_lite0-d16', {f'{HEAD}attention'}),
    ('sa_lite0-d16', 'sa_lite0-d16_car', {'model.type', 'model.car.channels'}),
    ('danet_lite0-d16', 'sequential-dual-attention_lite0-d16', {f'{HEAD}type'}),
    ('sfpn_lite0', 'hfgd-sfpn_lite0_guidance', {f'{HEAD}guidance'}),
    ('sfpn_lite0', 'hfgd-sfpn_lite0_aa', {f'{HEAD}axial_attention'}),
    ('sfpn_lite0', 'hfgd-sfpn_lite0', {f'{HEAD}guidance', f'{HEAD}axial_attention'}),
    ('hfgd-sfpn_lite0', 'hfgd-sfpn_lite0_no-stop', {f'{HEAD}stop_gradient'}),
    *(
        (f'pspnet-{name}_lite0-d16', 'gff_lite0-d16', {f'{HEAD}neck.fusion'})
        for name in ('concat', 'add', 'fpn', 'gated-fpn')
    ),
    ('gff_lite0-d16', 'gff-dfp_lite0-d16', {f'{HEAD}dfp'}),
]


@pytest.mark.parametrize(('less', 'more', 'keys'), PAIRS, ids=[m for _, m, _ in PAIRS])
def test_pair_differs_in_the_method_alone(less: str, more: str, keys: set[str]) -> None:
    assert differing(less, more) == keys


#: Other heads on the same backbone: what they share is the recipe.
HEADS = [
    ('pspnet_lite0-d16', 'gff_lite0-d16'),
    ('deeplabv3plus_lite0-d16', 'bifpn_lite0'),
    ('hfgd-sfpn_lite0', 'hfgd_lite0'),
]


@pytest.mark.parametrize(('less', 'more'), HEADS, ids=[m for _, m in HEADS])
def test_other_heads_share_recipe_and_loss(less: str, more: str) -> None:
    found = differing(less, more)
    assert {key.split('.')[0] for key in found} == {'model'}
    assert not [key for key in found if 'loss_decode' in key and 'auxiliary' not in key]


def test_every_row_is_in_a_pair() -> None:
    paired = {n for less, more, *_ in [*PAIRS, *HEADS] for n in (less, more)}
    assert paired == set(PATHS)
    assert len(PATHS) == 29


@pytest.mark.parametrize('name', PATHS)
def test_one_recipe(name: str) -> None:
    ours, first = (plain(ROOT / PATHS[n]) for n in (name, 'upernet_lite0'))
    for cfg in (ours, first):
        for key in ('model', 'custom_hooks'):
            cfg.pop(key, None)
    assert ours == first
    model, base = plain(ROOT / PATHS[name])['model'], plain(BASE / 'models/lite0.py')['model']
    stride = model['backbone'].pop('output_stride', 32)
    assert stride == (16 if '-d16' in name else 32)
    assert model['backbone'] == base['backbone']
    assert model['decode_head']['channels'] == 64
    assert model['decode_head']['loss_decode'] == base['decode_head']['loss_decode']


def test_class_weights_are_the_roots_of_median_frequency_balancing(camvid_root: Path) -> None:
    # Of a class: its pixels, over those of the images that it is in (Eigen and Fergus 2015).
    pixels, seen = np.zeros(11), np.zeros(11)
    for path in (camvid_root / 'ann_dir' / 'train').glob('*.png'):
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        counts = np.bincount(label.ravel(), minlength=256)[:11]
        pixels += counts
        seen[counts > 0] += counts.sum()
    frequency = pixels / seen
    weights = np.sqrt(np.median(frequency) / frequency)
    written = plain(BASE / 'models/lite0.py')['class_weight']
    assert written == pytest.approx(weights, abs=0.006)


def test_readme_puts_each_method_beside_its_baseline() -> None:
    text = (ROOT / 'configs/camvid/README.md').read_text(encoding='utf-8')
    rows = [line for line in text.splitlines() if line.startswith('|') and 'lite0' in line]
    for less, more in [(p[0], p[1]) for p in PAIRS if p[0] in ('upernet_lite0', 'sfpn_lite0')]:
        row = next(r for r in rows if r.startswith(f'| [{_label(r)}](./{less}_'))
        assert f'(./{more}_{TRAINED}.py)' in row


def _label(row: str) -> str:
    return re.match(r'\| \[([^]]+)\]', row)[1]
