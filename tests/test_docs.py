"""README and docs name only what is there, and their examples run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS, HOOKS, MODELS, TRANSFORMS

import mmseg_fusion
from mmseg_fusion import cli, compat
from mmseg_fusion.cli import installed_tool

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
PAGES = [page for page in PAGES if '_build' not in page.parts and '_generated' not in page.parts]
pages = pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))

# Every page that people read, as HTML or where the repository is hosted.
LINKED = [*PAGES, *sorted((ROOT / 'configs').rglob('README.md')), ROOT / 'CONTRIBUTING.md']
METHODS = sorted((ROOT / 'docs' / 'methods').glob('*.md'))
# What a page about a method has first, in this order; more may follow.
HEADINGS = ['Idea', 'Use', 'Options', 'Results', 'Pictures', 'Differences from the paper']

FOLDERS = 'configs|tools|tests|requirements|docs|mmseg_fusion'


def code_blocks(page: Path, language: str) -> list[str]:
    fence = re.compile(rf'^```{language}\n(.*?)^```', re.MULTILINE | re.DOTALL)
    return fence.findall(page.read_text(encoding='utf-8'))


def without_code(page: Path) -> str:
    """The text of a page as it is read: no blocks of code, no code in a line, no comments."""
    text = page.read_text(encoding='utf-8')
    text = re.sub(r'^(`{3,})(?!\{).*?^\1`*$', '', text, flags=re.MULTILINE | re.DOTALL)
    # A role, such as {doc}`page`, is no code.
    code = r'(\{\w+\}`[^`]*`)|`[^`\n]+`|<!--.*?-->'
    return re.sub(code, lambda m: m[1] or '', text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page get, on its host and in the HTML."""
    text = page.read_text(encoding='utf-8')
    text = re.sub(r'^(`{3,}).*?^\1`*$', '', text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    # Deeper headings have none in the HTML: `myst_heading_anchors`.
    for heading in re.findall(r'^#{1,3} (.+)$', text, re.MULTILINE):
        heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).replace('`', '')
        slug = re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')
        number = 0
        while (name := f'{slug}-{number}' if number else slug) in found:
            number += 1
        found.add(name)
    return found


def broken_links(page: Path) -> list[str]:
    """Links inside the repository that lead nowhere."""
    text, broken = without_code(page), []
    # A title stands behind the address of some.
    links = re.findall(r'\]\(([^)\s]+)[^)]*\)', text)
    links += [f'{name}.md' for name in re.findall(r'\{doc\}`(?:[^`<]*<)?([^`>]+)>?`', text)]
    for link in links:
        if re.match(r'[a-z]+:', link):
            continue
        name, _, anchor = link.partition('#')
        target = (page.parent / name if name else page).resolve()
        # The HTML has the pages in docs/ alone.
        outside = ROOT / 'docs' in page.parents and ROOT / 'docs' not in target.parents
        if outside and target.suffix == '.md':
            broken.append(f'{link} (name the file as code instead)')
        elif not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize('page', LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / 'other.md').write_text('# A `b`, c\n\n## Twice\n\n## Twice\n', encoding='utf-8')
    page = tmp_path / 'page.md'
    page.write_text(
        '# Here\n\n[a](other.md#a-b-c) [b](other.md#twice-1) [c](#here) {doc}`other`\n'
        '{doc}`text <other>` [far](https://example.org/none#x) `[code](none.md)`\n'
        '```python\n# [code](none.md)\n```\n',
        encoding='utf-8',
    )
    assert broken_links(page) == []
    page.write_text('[a](other.md#b) [b](none.md) [c](#there) {doc}`none`\n', encoding='utf-8')
    assert broken_links(page) == ['other.md#b', 'none.md', '#there', 'none.md']


@pages
def test_included_parts_are_there(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    for name, options in re.findall(r'^```\{include\} (\S+)\n(.*?)^```', text, re.M | re.S):
        included = (page.parent / name).read_text(encoding='utf-8')
        for option in ('start-after', 'end-before'):
            (mark,) = re.findall(rf'^:{option}: "(.*)"$', options, re.MULTILINE)
            assert mark in included, f'{page.name}: {name} has no {mark}'
            included = included.split(mark, 1)[1]


@pytest.mark.parametrize('page', METHODS, ids=lambda p: p.stem)
def test_pages_of_methods_have_one_order(page: Path) -> None:
    text = re.sub(
        r'^```.*?^```$', '', page.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL
    )
    headings = re.findall(r'^## (.+)$', text, re.MULTILINE)
    assert headings[: len(HEADINGS)] == HEADINGS
    # None of them is empty, and the drawing is part of the idea.
    parts = re.split(r'^## .+$', page.read_text(encoding='utf-8'), flags=re.MULTILINE)
    assert all(len(part.strip()) > 80 for part in parts[1:])
    assert f'](drawings/{page.stem}.svg)' in parts[1 + HEADINGS.index('Idea')]
    assert '```python' in parts[1 + HEADINGS.index('Use')]
    for what in ('<!-- paper: begin -->', '{include} ../results.md'):
        assert what in parts[1 + HEADINGS.index('Results')]


@pages
def test_named_files_are_there(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    named = re.findall(rf'(?<![\w/.-])((?:{FOLDERS})/[\w./-]+)', text)
    named += re.findall(r'\]\((?!https?:|#)([\w./-]+)', text)
    for name in named:
        name = name.rstrip('.')
        found = (ROOT / name).exists() or (page.parent / name).exists()
        assert found or name.startswith('docs/_build'), f'{page.name} names {name}'


@pages
def test_python_compiles_and_configs_load(page: Path, tmp_path: Path) -> None:
    for i, block in enumerate(code_blocks(page, 'python')):
        ast.parse(block)
        if re.match(r'(custom_|_base_|model)', block):
            path = tmp_path / f'block{i}.py'
            path.write_text(block, encoding='utf-8')
            # An example may import a project of the reader's.
            assert Config.fromfile(path, import_custom_modules=False)


@pages
def test_named_types_are_registered(page: Path) -> None:
    for block in code_blocks(page, 'python'):
        for name in re.findall(r"type='(\w+)'", block):
            if name.startswith(('My', 'SumFusion', 'LoadTIFF')):  # the reader's own
                continue
            found = any(registry.get(name) for registry in (DATASETS, HOOKS, MODELS, TRANSFORMS))
            assert found, f'{page.name}: nothing is registered as {name}'


@pages
def test_named_make_targets_are_there(page: Path) -> None:
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'^([a-z][\w-]*):', makefile, re.MULTILINE))
    named = re.findall(r'(?:^|`)make ([a-z-]+)', page.read_text(encoding='utf-8'), re.MULTILINE)
    assert set(named) <= targets


def options_of(tool: str) -> set[str]:
    """Options in the source of a tool, or of MMSegmentation's tool that it calls."""
    source = (ROOT / tool).read_text(encoding='utf-8')
    called = re.search(r"run_installed_tool\('(\w+)'", source)
    if called:
        source = Path(installed_tool(called.group(1)).__file__).read_text(encoding='utf-8')
        # What this package adds.
        source += inspect.getsource(cli._with_our_options)
    # What is imported from a module beside the tool.
    for module in re.findall(r'^(?:import|from) (_[a-z]\w*)', source, re.MULTILINE):
        source += (ROOT / tool).with_name(f'{module}.py').read_text(encoding='utf-8')
    return set(re.findall(r"'(--[a-z-]+)'", source))


def test_named_options_are_there() -> None:
    """Every --option that stands behind a tool's name in a command."""
    used: dict[str, set[str]] = {}
    for page in PAGES:
        for block in code_blocks(page, '(?:shell|bash)'):
            for line in block.replace('\\\n', ' ').splitlines():
                tool = re.search(r'python (tools/[\w/]+\.py)', line)
                if tool:
                    options = re.findall(r'(?<=\s)--[a-z-]+', line.split('#')[0])
                    used.setdefault(tool.group(1), set()).update(options)
    assert used
    for tool, options in used.items():
        missing = options - options_of(tool)
        assert not missing, f'{tool} has no {missing}'


def test_every_quirk_is_on_the_page() -> None:
    text = (ROOT / 'docs' / 'compatibility.md').read_text(encoding='utf-8')
    for quirk in compat.QUIRKS:
        assert f'`{quirk.__name__}`' in text, f'compatibility.md lacks {quirk.__name__}'


def test_every_tool_is_on_the_page() -> None:
    text = (ROOT / 'docs' / 'tools.md').read_text(encoding='utf-8')
    tools = [p for p in (ROOT / 'tools').rglob('*') if p.suffix in ('.py', '.sh')]
    # A module that tools share is none.
    tools = [p for p in tools if not p.name.startswith('_')]
    assert tools
    for tool in tools:
        assert str(tool.relative_to(ROOT)) in text, f'tools.md lacks {tool.name}'


def test_stacks_table_has_the_pins() -> None:
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    for stack in ('openmmlab', 'onedl'):
        pins = (ROOT / 'requirements' / f'{stack}.txt').read_text(encoding='utf-8')
        for name, version in re.findall(r'^((?:onedl-)?mm[\w-]+|torch)==(\S+)', pins, re.MULTILINE):
            assert f'{name} {version}' in readme, f'README lacks {name} {version}'


def test_arguments_of_the_hook_are_on_its_page() -> None:
    hook = mmseg_fusion.engine.hooks.ScaleEqualizerHook
    text = (ROOT / 'docs' / 'methods' / 'scale_equalizer.md').read_text(encoding='utf-8')
    for name in list(inspect.signature(hook).parameters):
        assert f'`{name}' in text, f'the page lacks {name}'
