"""What the tools that draw have in common: arguments, their checks, and where they write."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from .running import TOOLS, load_tool

FOLDER = TOOLS / 'analysis_tools'
ALL = sorted(p.stem for p in FOLDER.glob('[a-z]*.py') if 'from _pictures' in p.read_text())
PAIRS = {'class_dependency', 'feature_umap', 'pixel_relation', 'predictions', 'rate_maps'}
#: They look at images of a data set as :func:`image_sets` chooses them.
IMAGES = {*PAIRS, 'gate_maps'}
LABELS = {'class_dependency', 'feature_umap', 'gate_maps', 'pixel_relation'}
#: Into one file, where the others write into a folder.
FILE = {
    'feature_umap': 'feature_umap/feature_umap.png',
    'gate_maps': 'gate_maps.png',
    'predictions': 'predictions.png',
}


def parsed(tool: str, *words: str) -> argparse.Namespace:
    pair = ['folder/small.py'] if tool == 'scale_report' else ['folder/small.py', 'none']
    return load_tool(FOLDER / f'{tool}.py').parse_args([*pair, *words])


def test_all_are_here():
    assert set(ALL) == {*IMAGES, 'attention_conflicts', 'scale_report'}


@pytest.mark.parametrize('tool', ALL)
def test_shared_arguments(tool):
    args = parsed(tool, '--device', 'cpu', '--overwrite', '--cfg-options', 'a.b=1')
    assert (args.device, args.overwrite, args.cfg_options) == ('cpu', True, {'a.b': 1})
    assert args.models == ['folder/small.py', 'none']
    assert (args.names, args.layer) == (None, ['auto'])
    assert (args.outputs.tool, args.outputs.overwrite) == (tool, True)
    expected = Path('work_dirs', 'small', FILE.get(tool, tool))
    assert getattr(args, 'out' if tool in FILE else 'out_dir') == expected
    assert not parsed(tool).overwrite


@pytest.mark.parametrize(
    ('tools', 'words', 'message'),
    [
        (PAIRS, ['other.py'], 'expected pairs of CONFIG CHECKPOINT'),
        (PAIRS, ['--names', 'a', 'b'], '--names: expected 1, one per model, got 2'),
        (PAIRS, ['--layer', 'a', 'b'], '--layer: expected 1 or 1, one per model, got 2'),
        (IMAGES - {'predictions'}, ['--indices', '0', '--num-samples', '1'], 'give either'),
        (IMAGES, ['--num-samples', '0'], '--num-samples must be at least 1, got 0'),
        (LABELS, ['--ann-dir', 'labels'], 'belongs to'),
        (FILE, ['--out', 'a.txt'], 'expected a file name in .png'),
    ],
)
def test_shared_complaints(tools, words, message, capsys):
    for tool in sorted(tools):
        with pytest.raises(SystemExit):
            parsed(tool, *words)
        assert message in capsys.readouterr().err, tool


def test_one_layer_is_for_all_models():
    args = parsed('pixel_relation', 'other.py', 'none', '--layer', 'decode_head.conv_seg')
    assert args.layer == ['decode_head.conv_seg'] * 2
    assert args.num_samples == 4
    assert parsed('pixel_relation', '--images', 'a.png').num_samples is None
