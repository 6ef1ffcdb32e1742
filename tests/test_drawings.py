"""The drawings of the methods are what their script draws, whole, small and on every page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / 'docs' / 'methods'


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location('drawings', ROOT / 'docs' / 'drawings.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawings = load()
every = pytest.mark.parametrize('name', sorted(drawings.DRAWINGS))


def test_every_method_has_one() -> None:
    pages = sorted(page.stem for page in METHODS.glob('*.md'))
    assert sorted(drawings.DRAWINGS) == pages
    assert sorted(path.stem for path in drawings.FOLDER.iterdir()) == pages


@every
def test_file_is_what_the_script_draws(name: str) -> None:
    written = (drawings.FOLDER / f'{name}.svg').read_text(encoding='utf-8')
    assert drawings.DRAWINGS[name]().svg() == written, 'python docs/drawings.py'
    assert len(written.encode()) < 60_000


@every
def test_it_is_an_svg_on_a_card_of_its_own(name: str) -> None:
    root = ElementTree.parse(drawings.FOLDER / f'{name}.svg').getroot()
    space = '{http://www.w3.org/2000/svg}'
    assert root.tag == f'{space}svg'
    # In dark mode a picture without a ground is dark on dark.
    card = root.find(f'{space}rect')
    assert (card.get('fill'), card.get('width')) == ('#ffffff', root.get('width'))
    assert card.get('height') == root.get('height') == root.get('viewBox').split()[3]
    # What a screen reader says.
    assert len(root.find(f'{space}title').text) > 40


@every
def test_no_text_is_cut_or_too_small_on_a_phone(name: str) -> None:
    drawing = drawings.DRAWINGS[name]()
    assert drawing.extents
    for text, left, right, middle in drawing.extents:
        assert left > 4, text
        assert right < drawings.WIDTH - 4, text
        assert 8 < middle < drawing.height - 8, text
    # A page of 390 pixels leaves about 350 for a picture: ten pixels and more for a text.
    root = ElementTree.fromstring(drawing.svg())
    sizes = [
        int(element.get('font-size')) for element in root.iter() if element.tag.endswith('text')
    ]
    assert min(sizes) * 350 / drawings.WIDTH >= 10


@every
def test_it_stands_on_its_page(name: str) -> None:
    text = (METHODS / f'{name}.md').read_text(encoding='utf-8')
    assert f'](drawings/{name}.svg)' in text


def test_an_index_is_lowered_and_comes_back() -> None:
    assert drawings.spans('a < X_l b') == (
        'a &lt; X<tspan dy="4" font-size="72%">l</tspan><tspan dy="-4"> b</tspan>'
    )
    assert drawings.spans('BN_{12}') == 'BN<tspan dy="4" font-size="72%">12</tspan>'
    assert drawings.number(-0.04) == '0'
    assert drawings.number(2.5) == '2.5'
