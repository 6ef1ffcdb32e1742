"""``python -m mmseg_fusion``: the report, also where packages are missing or of a wrong version."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mmseg_fusion
from mmseg_fusion import __main__ as report
from mmseg_fusion import compat

FAMILY = compat.family()
#: Distribution names of the installed family, as they are installed.
NAMES = {
    package.module: next(iter(package.found), package.distribution) for package in compat.stack()
}


def run(
    *path: Path, bare: bool = False, command: tuple[str, ...] = ('-m', 'mmseg_fusion')
) -> subprocess.CompletedProcess:
    """The report; with ``bare``, in an interpreter that sees nothing but ``path``."""
    root = Path(mmseg_fusion.__file__).parents[1]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [*path, root])))
    full = [sys.executable, *(['-S'] if bare else []), *command]
    return subprocess.run(full, env=env, capture_output=True, text=True)


@pytest.fixture
def site(tmp_path) -> Path:
    """A copy of the installed packages, in links, that a test may change."""
    for folder in sys.path:
        if folder.endswith(('site-packages', 'dist-packages')) and Path(folder).is_dir():
            for entry in Path(folder).iterdir():
                if not entry.name.endswith('.pth') and not (tmp_path / entry.name).exists():
                    (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def metadata_folder(site: Path, name: str) -> Path:
    folder = importlib.metadata.distribution(name).locate_file('')
    pattern = re.compile(re.sub(r'[-_.]+', '[-_.]', name) + r'-\d.*\.dist-info', re.IGNORECASE)
    return site / next(p.name for p in Path(str(folder)).iterdir() if pattern.fullmatch(p.name))


def remove(site: Path, module: str) -> None:
    metadata_folder(site, NAMES[module]).unlink()
    (site / module).unlink()


def change_version(site: Path, module: str, version: str) -> None:
    folder = metadata_folder(site, NAMES[module])
    folder.unlink()
    folder.mkdir()
    (folder / 'METADATA').write_text(
        f'Metadata-Version: 2.1\nName: {NAMES[module]}\nVersion: {version}\n'
    )


@pytest.mark.stack
def test_the_report_where_all_is_there():
    result = run()
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert (
        f'mmseg_fusion {mmseg_fusion.__version__} ({Path(mmseg_fusion.__file__).parent})' in lines
    )
    for module, name in NAMES.items():
        version = importlib.metadata.version(name)
        assert any(line.split()[:2] == [name, version] for line in lines), module
    for quirk in compat.APPLIED:
        assert any(line.split()[:1] == [quirk.name] and quirk.what in line for line in lines)
    for name in ('CUDA', 'compiled ops of mmcv', 'torchvision', 'mmpretrain'):
        assert any(line.startswith(f'  {name}  ') for line in lines)
    assert any(line.split() == ['mmseg_fusion', 'yes'] for line in lines)
    assert 'pip install' not in result.stdout


@pytest.mark.parametrize('other', ['mmcv', 'mmengine-lite'])
def test_what_stands_in_for_a_pinned_package_has_a_row_of_its_own(monkeypatch, other):
    pinned = {'mmcv': 'mmcv-lite', 'mmengine-lite': 'mmengine'}[other]
    tested = report.tested_versions('openmmlab')[pinned]

    def rows(versions):
        def lookup(names):
            return {n: versions[n] for n in names if n in versions}

        monkeypatch.setattr(compat, 'installed', lookup)
        return report.versions('openmmlab')

    assert (other, '2.0.9', f'{pinned} {tested}') in rows({other: '2.0.9'})
    assert (pinned, '2.0.8', tested) in rows({pinned: '2.0.8'})
    assert (pinned, '-', tested) in rows({})
    both = {'mmcv': 'mmcv 2.0.9, 2.0.8', 'mmengine-lite': '2.0.8, mmengine-lite 2.0.9'}[other]
    assert (pinned, both, tested) in rows({other: '2.0.9', pinned: '2.0.8'})


@pytest.mark.stack
def test_a_missing_package_gives_the_command_and_no_traceback(site):
    remove(site, 'mmseg')
    result = run(site, bare=True)
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    assert 'mmseg_fusion cannot be used' in result.stdout
    assert 'mmseg: found nothing, needed ' in result.stdout
    assert re.search(r"pip install '(onedl-)?mmsegmentation>=", result.stdout)
    assert f'pip install -r {compat.REQUIREMENTS / FAMILY}.txt' in result.stdout


@pytest.mark.stack
def test_a_wrong_version_gives_found_needed_and_command(site):
    change_version(site, 'mmcv', '1.7.2')
    result = run(site, bare=True)
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    assert f'mmcv: found {NAMES["mmcv"]} 1.7.2, needed ' in result.stdout
    assert re.search(r"pip install '(onedl-mmcv|mmcv-lite)>=", result.stdout)


@pytest.mark.stack
def test_a_missing_optional_package_is_named_and_the_rest_works(site):
    remove(site, 'mmpretrain')
    result = run(site, bare=True)
    assert result.returncode == 0, result.stderr
    assert 'Missing, and only needed by some models' in result.stdout
    assert 'mmpretrain: found nothing' in result.stdout
    assert re.search(r"pip install '(onedl-)?mmpretrain>=", result.stdout)


@pytest.mark.stack
def test_a_broken_package_is_reported_without_traceback(site):
    (site / 'mmengine').unlink()
    (site / 'mmengine').mkdir()
    (site / 'mmengine' / '__init__.py').write_text('raise RuntimeError("half an installation")')
    result = run(site, bare=True)
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    assert 'RuntimeError: half an installation' in result.stdout
    assert 'pip install -r' in result.stdout


def test_an_interpreter_without_any_package():
    result = run(bare=True)
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    for requirement in report.DEPENDENCIES.values():
        assert f'found nothing, needed {requirement}' in result.stdout
    assert f'pip install -r {compat.REQUIREMENTS / "openmmlab.txt"}' in result.stdout
    assert 'scale_equalizer' in result.stdout


def test_an_import_that_is_not_the_report_still_raises(site):
    remove(site, 'mmseg')
    result = run(site, bare=True, command=('-c', 'import mmseg_fusion'))
    assert result.returncode == 1
    assert 'ImportError: mmseg_fusion cannot use the installed' in result.stderr


@pytest.mark.parametrize('kind', list(compat.FAMILIES))
def test_tested_versions_are_the_pins(kind, repo_root):
    text = (repo_root / 'requirements' / f'{kind}.txt').read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith('#')]
    pins = {r.name: str(r.specifier).replace('==', '') for r in map(Requirement, lines)}
    assert report.tested_versions(kind) == pins
    # The pins are versions that compat accepts.
    for names, _, _ in compat.FAMILIES[kind].values():
        assert names[-1] in pins


@pytest.mark.stack
def test_methods_are_the_config_folders_with_a_metafile(repo_root):
    rows = {folder: (count, title) for folder, count, title in report.methods()}
    folders = {p.parent.name for p in (repo_root / 'configs').glob('*/metafile.yaml')}
    assert set(rows) == folders
    assert 'scale_equalizer' in rows
    for folder, (count, _) in rows.items():
        names = [f for f in os.listdir(repo_root / 'configs' / folder) if f.endswith('.py')]
        assert count == len(names) > 0
