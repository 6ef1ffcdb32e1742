"""``python -m mmseg_fusion``: what is installed, what works, what to do, and the methods.

The exit code is 0 if the package can be used, and 1 if something is missing. The report imports
none of the packages that it checks, so that it works without them.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import sys
from pathlib import Path

import mmseg_fusion
from mmseg_fusion import compat

CONFIGS = Path(__file__).parent / '.mim' / 'configs'
#: What the package itself depends on, as in pyproject.toml: module -> requirement.
DEPENDENCIES = {'torch': 'torch>=2.0', 'numpy': 'numpy', 'packaging': 'packaging'}


def tested_versions(kind: str) -> dict[str, str]:
    """The pins of the tested stack ``kind``, by distribution name."""
    text = (compat.REQUIREMENTS / f'{kind}.txt').read_text(encoding='utf-8')
    pins = re.findall(r'^([\w.-]+)\s*(?:==\s*)?([^\s#]*)', text, flags=re.MULTILINE)
    return dict(pins)


def missing_dependencies() -> list[str]:
    """Requirements of this package whose modules cannot be imported."""
    return [
        need for module, need in DEPENDENCIES.items() if importlib.util.find_spec(module) is None
    ]


def versions(kind: str) -> list[tuple[str, str, str]]:
    """One row (distribution, version found, version tested) per package of the stack.

    A full mmcv instead of mmcv-lite is listed under its own name, with the pin that it replaces.
    """
    tested = tested_versions(kind)
    instead = {'mmcv-lite': ('mmcv', 'mmcv-lite'), 'mmengine': ('mmengine', 'mmengine-lite')}
    text = (compat.REQUIREMENTS / f'{kind}.txt').read_text(encoding='utf-8')
    tried = re.search(r'Python ([\d.]+)', text)
    rows = [('python', platform.python_version(), tried.group(1) if tried else '')]
    for name in dict.fromkeys((*tested, *DEPENDENCIES)):
        installed = compat.installed(instead.get(name, (name,)))
        pin = tested.get(name, '')
        # The row is named as what is there, the pin as what it is.
        if installed and name not in installed:
            name, pin = next(iter(installed)), f'{name} {pin}'
        text = ', '.join(v if n == name else f'{n} {v}' for n, v in installed.items())
        rows.append((name, text or '-', pin))
    return rows


def _importable(module: str) -> str | None:
    """Why ``module`` cannot be imported, None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it likes
        return f'no, {type(error).__name__}: {error}'.splitlines()[0]
    return None


def capabilities() -> list[tuple[str, str]]:
    """One row (name, state) for CUDA, compiled ops, torchvision and mmpretrain."""
    import torch

    met = {quirk.name: quirk.what for quirk in compat.APPLIED}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f'yes: {len(names)} x {", ".join(dict.fromkeys(names))}, CUDA {torch.version.cuda}'
    else:
        cuda = 'no device found by torch: everything runs on the CPU'

    if 'mmcv_without_ops' in met:
        ops = 'no, see mmcv_without_ops below'
    else:
        ops = _importable('mmcv._ext')
    if 'torchvision_build_mismatch' in met:
        vision = 'its Python part only, see torchvision_build_mismatch below'
    else:
        vision = _importable('torchvision')
    pretrain = _importable('mmpretrain.models')
    return [
        ('CUDA', cuda),
        ('compiled ops of mmcv', f'{ops} (mmseg_fusion needs none)' if ops else 'yes'),
        ('torchvision', vision or 'yes'),
        ('mmpretrain', f'{pretrain} (some backbones need it)' if pretrain else 'yes'),
    ]


def methods() -> list[tuple[str, int, str]]:
    """One row (config folder, number of configs, paper) per folder with a metafile."""
    rows = []
    for metafile in sorted(CONFIGS.glob('*/metafile.yaml')):
        title = re.search(r'^\s*Title:\s*(.+)$', metafile.read_text('utf-8'), re.MULTILINE)
        count = len(list(metafile.parent.glob('*.py')))
        rows.append((metafile.parent.name, count, title.group(1).strip('\'" ') if title else ''))
    return rows


def _table(rows: list[tuple], head: tuple[str, ...] = ()) -> str:
    rows = [tuple(map(str, row)) for row in ([head] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ('  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return '\n'.join('  ' + line.rstrip() for line in lines)


def _install() -> tuple[list[str], list[str]]:
    """Problems, and the commands that solve them."""
    missing = missing_dependencies()
    problems = [f'{re.split("[>=<]", need)[0]}: found nothing, needed {need}' for need in missing]
    commands = [f'pip install {" ".join(map(repr, missing))}'] if missing else []
    if 'packaging' in missing:  # versions cannot be compared without it
        return problems, [*commands, compat.remedy([])[-1]]
    wrong = [package for package in compat.stack() if package.state != 'ok']
    problems += map(str, wrong)
    if wrong or missing:
        commands += compat.remedy(wrong)
    return problems, commands


def main() -> int:
    """Prints the report.

    Returns:
        0 if the package can be used, else 1.
    """
    kind, error = compat.family(), mmseg_fusion.import_error
    print(f'mmseg_fusion {mmseg_fusion.__version__} ({Path(__file__).parent})')
    print(f'\nVersions, stack {kind}')
    print(_table(versions(kind), ('package', 'found', 'tested')))

    problems, commands = _install()
    if error is None:
        print('\nWhat works')
        print(_table([('mmseg_fusion', 'yes'), *capabilities()]))
        print('\nThird-party quirks met')
        rows = [
            line for q in compat.APPLIED for line in ((q.name, q.what), ('', f'until {q.until}'))
        ]
        print(_table(rows) if rows else '  none')
    else:
        print('\nmmseg_fusion cannot be used')
        if not problems:
            problems, commands = [f'{type(error).__name__}: {error}'], compat.remedy([])
    if problems:
        print('\nMissing' if error else '\nMissing, and only needed by some models')
        print('\n'.join(f'  {line}' for line in problems))
        print('\nInstall')
        print('\n'.join(f'  {line}' for line in commands))

    print(f'\nMethods (configs in {CONFIGS})')
    rows = methods()
    print(_table(rows, ('folder', 'configs', 'paper')) if rows else '  none')
    return 0 if error is None else 1


if __name__ == '__main__':
    sys.exit(main())
