"""The gallery has a small picture of every tool that draws, beside the command that drew it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / 'docs' / 'gallery.py'))
PICTURES = SCRIPT['PICTURES']


def test_page_is_what_the_script_writes() -> None:
    written = (ROOT / 'docs' / 'gallery.md').read_text(encoding='utf-8')
    assert SCRIPT['page']() == written, 'python docs/gallery.py'


@pytest.mark.parametrize('path', sorted(SCRIPT['METHODS'].glob('*.md')), ids=lambda p: p.stem)
def test_page_of_a_method_has_its_pictures_with_their_commands(path: Path) -> None:
    text = path.read_text(encoding='utf-8')
    assert SCRIPT['with_pictures'](text) == text, 'python docs/gallery.py'
    if path.stem == 'scale_equalizer':  # it has larger ones, with their commands
        assert all(name in text for name in ('scale_report.py', 'predictions.py', 'figure3.png'))
        return
    # All of the method, in whatever order.
    shown = SCRIPT['BLOCK'].findall(text)
    assert sorted(shown) == sorted(n for n, p in PICTURES.items() if p.page == path.stem)
    assert shown


def test_every_picture_has_its_place_and_no_other_is_there() -> None:
    assert {path.stem for path in SCRIPT['FOLDER'].iterdir()} == set(PICTURES)


@pytest.mark.parametrize('name', PICTURES)
def test_picture_is_small_and_can_be_seen(name: str) -> None:
    path = SCRIPT['FOLDER'] / f'{name}.png'
    assert path.stat().st_size <= SCRIPT['MAX_BYTES']
    with Image.open(path) as image:
        assert image.width >= 400
        # Not blank.
        assert len(image.convert('RGB').getcolors(2**24)) > 10


def test_every_tool_that_draws_is_in_the_gallery() -> None:
    tools = (ROOT / 'tools' / 'analysis_tools').glob('[!_]*.py')
    drawing = {
        str(path.relative_to(ROOT)) for path in tools if '.png' in path.read_text(encoding='utf-8')
    }
    assert drawing
    assert drawing <= {picture.command.split()[1] for picture in PICTURES.values()}


def test_a_picture_that_does_not_fit_is_made_smaller(tmp_path: Path) -> None:
    noise = Image.effect_noise((1600, 900), 120)
    noise.save(tmp_path / 'large.png')
    assert (tmp_path / 'large.png').stat().st_size > 10 * SCRIPT['MAX_BYTES']
    Image.new('RGB', (1600, 900), 'red').save(tmp_path / 'plain.png')
    SCRIPT['shrink'](tmp_path / 'plain.png', tmp_path / 'small.png')
    with Image.open(tmp_path / 'small.png') as image:
        assert image.size[0] == 1100
    with pytest.raises(SystemExit, match='does not fit'):
        SCRIPT['shrink'](tmp_path / 'large.png', tmp_path / 'small.png')
