"""The installed mm* packages: family, versions, and the commands that repair them.

MMSegmentation 1.2.2 refuses mmcv 2.2 and does not declare all of its dependencies; the fork onedl-*
has the same module names, and the two families overwrite each other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Family = Literal['openmmlab', 'onedl']

#: What MMSegmentation itself needs, per family: module -> (distributions, lowest, below). The last
#: distribution is the one to install: mmcv-lite needs no compiler.
FAMILIES: dict[Family, dict[str, tuple[tuple[str, ...], str | None, str | None]]] = {
    'openmmlab': {
        'mmengine': (('mmengine-lite', 'mmengine'), '0.10.5', '0.11'),
        'mmcv': (('mmcv', 'mmcv-lite'), '2.0.1', '2.2'),
        'mmseg': (('mmsegmentation',), '1.2.2', '1.3'),
        'mmpretrain': (('mmpretrain',), '1.2.0', '1.3'),
        # mmpretrain imports it and does not declare it.
        'torchvision': (('torchvision',), None, None),
        # mmseg.models imports them, mmsegmentation does not declare them.
        'ftfy': (('ftfy',), None, None),
        'regex': (('regex',), None, None),
    },
    'onedl': {
        'mmengine': (('onedl-mmengine',), '0.10.12', None),
        'mmcv': (('onedl-mmcv',), '2.3.6', None),
        'mmseg': (('onedl-mmsegmentation',), '1.4.2', None),
        'mmpretrain': (('onedl-mmpretrain',), '1.3.6', None),
        'torchvision': (('torchvision',), None, None),
    },
}
#: Modules that a stack may lack: only some backbones come from there.
OPTIONAL = ('mmpretrain', 'torchvision')
#: Pinned, tested versions, one file per family; a wheel carries them.
REQUIREMENTS = Path(__file__).parents[1] / '.mim' / 'requirements'


@dataclass(frozen=True)
class Package:
    """The installed state of one module that MMSegmentation needs.

    Attributes:
        module: the name to import.
        distribution: the name to install.
        found: versions by distribution name; empty for a source checkout, which has no metadata.
        needed: one requirement, as pip takes it.
        state: ``'missing'``, ``'wrong'`` (a version that MMSegmentation refuses) or ``'ok'``.
    """

    module: str
    distribution: str
    found: dict[str, str]
    needed: str
    state: Literal['ok', 'missing', 'wrong']

    def __str__(self) -> str:
        versions = ' and '.join(f'{name} {version}' for name, version in self.found.items())
        return f'{self.module}: found {versions or "nothing"}, needed {self.needed}'


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those of ``distributions`` that are installed, by distribution name."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _of_family(kind: Family) -> dict[str, str]:
    """The installed mm* distributions of one family."""
    return installed(
        name for names, _, _ in FAMILIES[kind].values() for name in names if 'mm' in name
    )


def family() -> Family:
    """``'openmmlab'`` or ``'onedl'``: the family that the installed mmseg belongs to.

    Without mmseg it is the family of the other mm* packages; without these it is ``'openmmlab'``.
    """
    for kind in FAMILIES:
        if installed(FAMILIES[kind]['mmseg'][0]):
            return kind
    return 'onedl' if _of_family('onedl') and not _of_family('openmmlab') else 'openmmlab'


def stack() -> list[Package]:
    """Every module of :data:`FAMILIES` for the installed family, with what is installed of it."""
    from packaging.version import Version

    packages = []
    for module, (names, low, below) in FAMILIES[family()].items():
        versions = installed(names)
        bounds = [f'>={low}'] * bool(low) + [f'<{below}'] * bool(below)
        needed = names[-1] + ','.join(bounds)
        state = 'ok'
        if not versions and importlib.util.find_spec(module) is None:
            state = 'missing'
        for version in map(Version, versions.values()):
            if (low and version < Version(low)) or (below and version >= Version(below)):
                state = 'wrong'
        packages.append(Package(module, names[-1], versions, needed, state))
    return packages


def remedy(packages: Iterable[Package]) -> list[str]:
    """The commands that install what ``packages`` lack, then the one for the tested stack."""
    packages = list(packages)
    replaced = [
        name for package in packages for name in package.found if name != package.distribution
    ]
    commands = [f'pip uninstall -y {" ".join(replaced)}'] if replaced else []
    wanted = ' '.join(f"'{package.needed}'" for package in packages)
    if wanted:
        commands.append(f'pip install {wanted}')
    return [*commands, f'pip install -r {REQUIREMENTS / (family() + ".txt")}  # the tested stack']


def check_stack() -> list[str]:
    """Compares the installed mm* packages with what MMSegmentation needs.

    Returns:
        One line per problem that does not stop the import: packages that overwrite each other,
        optional ones that are missing.

    Raises:
        ImportError: a package is missing or of a version that MMSegmentation refuses; the message
            lists the installed version, the needed version and the command.
    """
    packages = stack()
    wrong = [p for p in packages if p.state != 'ok' and p.module not in OPTIONAL]
    if wrong:
        lines = [str(p) for p in wrong] + ['Install:', *(f'  {line}' for line in remedy(wrong))]
        raise ImportError(
            'mmseg_fusion cannot use the installed OpenMMLab packages:\n  ' + '\n  '.join(lines)
        )
    notes = [str(p) for p in packages if p.state != 'ok']
    for package in packages:
        if len(package.found) > 1:
            notes.append(
                f'{" and ".join(package.found)} are both installed and overwrite each other: '
                f'pip uninstall -y {" ".join(package.found)}, then install the one you want'
            )
    kind = family()
    other = _of_family('openmmlab' if kind == 'onedl' else 'onedl')
    if other:
        both = ' '.join([*_of_family(kind), *other])
        notes.append(
            f'{", ".join(other)} of the other family overwrite modules of the {kind} family: '
            f'pip uninstall -y {both}; {remedy([])[0]}'
        )
    return notes
