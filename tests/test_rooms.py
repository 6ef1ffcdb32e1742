"""The rooms of the package: imports go down only, and the lowest rooms know the least."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'mmseg_fusion'

# From the bottom; rooms of one floor do not know each other.
FLOORS = (
    ('version', 'errors'),
    ('files', 'channels'),
    ('compat', 'cli'),
    ('fusions', 'checkpoints', 'images'),
    ('models.layers', 'models.backbones', 'datasets'),
    ('models.necks', 'models.losses'),
    ('models.decode_heads',),
    ('models.segmentors',),
    ('engine',),
    ('analysis',),
    ('tools',),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# They open the doors of the rooms below them, and are read by nobody inside.
FACADES = {'', 'models', '__main__'}
# The lowest room stands without MMSegmentation.
OUTSIDE = {'fusions': {'torch', 'numpy'}}


def name_of(path: Path) -> str:
    """The name below mmseg_fusion: 'models.layers.attention', '' for the package itself."""
    parts = list(path.relative_to(PACKAGE).with_suffix('').parts)
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {
    name_of(path): path
    for path in sorted(PACKAGE.rglob('*.py'))
    if '.mim' not in path.relative_to(PACKAGE).parts
}
TOOLS = sorted((ROOT / 'tools').rglob('*.py'))


def room_of(name: str) -> str | None:
    """The room in which a module stands, None for a facade."""
    for room in FLOOR_OF:
        if name == room or name.startswith(f'{room}.'):
            return room
    assert name in FACADES, f'{name} stands in no room: name its floor in FLOORS'
    return None


def imported(path: Path, name: str = '') -> Iterator[tuple[int, str]]:
    """All modules that a file imports, wherever in it, with the line: full names."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                above = ['mmseg_fusion', *(package.split('.') if package else [])]
                above = above[: len(above) - node.level + 1]
                base = '.'.join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f'{base}.{alias.name}'
                inside = full.removeprefix('mmseg_fusion.') in FILES
                yield node.lineno, full if inside else base


def inside(full: str) -> str | None:
    """The name below mmseg_fusion of an imported module, None for somebody else's."""
    if full == 'mmseg_fusion':
        return ''
    return full.removeprefix('mmseg_fusion.') if full.startswith('mmseg_fusion.') else None


def arrows() -> Iterator[tuple[str, str, str]]:
    """(where, room, room that it imports), for files of the package and tools."""
    for name, path in FILES.items():
        for line, full in imported(path, name):
            if name not in FACADES and inside(full) is not None:
                yield f'{path.relative_to(ROOT)}:{line}', room_of(name), room_of(inside(full))
    for path in TOOLS:
        for line, full in imported(path):
            if inside(full) is not None:
                yield f'{path.relative_to(ROOT)}:{line}', 'tools', room_of(inside(full))


def test_imports_go_down_only() -> None:
    seen, up = set(), []
    for where, room, other in arrows():
        if room == other or (room == 'tools' and other is None):
            continue
        if other is None or FLOOR_OF[other] >= FLOOR_OF[room]:
            up.append(f'{where}: {room} imports {other or "the package itself"}')
        seen.add((room, other))
    assert not up, '\n'.join(up)
    # The walk sees relative imports, nested ones and those of names.
    assert {
        ('models.segmentors', 'fusions'),
        ('models.decode_heads', 'models.layers'),
        ('engine', 'fusions'),
        ('analysis', 'models.necks'),
        ('tools', 'analysis'),
    } <= seen


def test_every_floor_is_there() -> None:
    rooms = {room_of(name) for name in FILES} | {'tools'}
    assert rooms - {None} == FLOOR_OF.keys()


@pytest.mark.parametrize('room', OUTSIDE)
def test_the_lowest_rooms_know_the_least(room: str) -> None:
    files = {name: path for name, path in FILES.items() if room_of(name) == room}
    assert len(files) > 1
    for name, path in files.items():
        for line, full in imported(path, name):
            top = full.split('.')[0]
            if top in OUTSIDE[room] | {'mmseg_fusion'}:
                continue
            # The standard library has nothing in site-packages.
            origin = importlib.util.find_spec(top).origin
            assert 'site-packages' not in origin, f'{path.name}:{line} imports {full}'


def test_fusions_load_without_mmsegmentation() -> None:
    """Without the package around it, which meets MMSegmentation's quirks first."""
    code = (
        'import importlib.util, sys\n'
        f'path = {str(PACKAGE / "fusions" / "__init__.py")!r}\n'
        "spec = importlib.util.spec_from_file_location('fusions', path,"
        " submodule_search_locations=[path.rpartition('/')[0]])\n"
        'module = importlib.util.module_from_spec(spec)\n'
        "sys.modules['fusions'] = module\n"
        'spec.loader.exec_module(module)\n'
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'mmcv', 'mmengine', 'mmseg', 'mmseg_fusion'}))\n"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr


MOVED = {
    'mmseg_fusion.analysis.fusion': ('Fusion', 'FusionTracer', 'kept_state', 'select_fusions'),
    'mmseg_fusion.analysis.branch_statistics': ('BranchStatistics', 'measuring'),
    'mmseg_fusion.models.layers.scale_equalizer': ('ScaleEqualizer', 'fold_scale_equalizer'),
    'mmseg_fusion.engine.hooks.scale_equalizer_hook': ('plan_equalization',),
}


@pytest.mark.parametrize('old', MOVED)
def test_old_imports_work_and_say_where_it_is_now(old: str) -> None:
    from mmseg_fusion import fusions

    if 'hooks' not in old:
        # The hook's module registers a class: only the others may be imported anew.
        sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=r'import (it )?from mmseg_fusion\.fusions'):
        values = {name: getattr(importlib.import_module(old), name) for name in MOVED[old]}
    for name, value in values.items():
        assert value is getattr(fusions, name)
        assert value.__module__.startswith('mmseg_fusion.fusions.')


def test_public_names_stay_where_they_were() -> None:
    from mmseg_fusion import analysis, fusions
    from mmseg_fusion.models import layers

    assert analysis.trace_fusions is fusions.trace_fusions
    assert analysis.Fusion is fusions.Fusion
    assert layers.ScaleEqualizer is fusions.ScaleEqualizer
    assert layers.fold_scale_equalizer is fusions.fold_scale_equalizer
