"""README and docs name only what is there, and their examples run."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS, HOOKS, MODELS

import mmseg_fusion
from mmseg_fusion import cli, compat
from mmseg_fusion.cli import installed_tool

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
PAGES = [page for page in PAGES if '_build' not in page.parts and '_generated' not in page.parts]
pages = pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))

FOLDERS = 'configs|tools|tests|requirements|docs|mmseg_fusion'


def code_blocks(page: Path, language: str) -> list[str]:
    fence = re.compile(rf'^```{language}\n(.*?)^```', re.MULTILINE | re.DOTALL)
    return fence.findall(page.read_text(encoding='utf-8'))


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
            if name.startswith(('My', 'SumFusion')):  # the reader's own
                continue
            found = any(registry.get(name) for registry in (DATASETS, HOOKS, MODELS))
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
    if 'add_models(' in source:
        # The options of every tool that takes several models stand in one place.
        source += inspect.getsource(cli.add_models)
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
