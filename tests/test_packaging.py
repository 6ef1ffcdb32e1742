"""A wheel, an sdist and an editable install: each carries, or finds, configs, tools and index."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from mmseg_fusion import __main__ as report
from mmseg_fusion import compat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

SITE = [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]


@pytest.fixture(scope='module')
def project(repo_root) -> dict:
    return tomllib.loads((repo_root / 'pyproject.toml').read_text(encoding='utf-8'))['project']


def run(*command: str, **kwargs) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def dist(repo_root, tmp_path_factory) -> Path:
    """A folder with an sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '-o', str(folder), str(repo_root))
    return folder


def install(folder: Path, *what: str) -> Path:
    command = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--quiet']
    command += ['--no-build-isolation', '--disable-pip-version-check', '--target', str(folder)]
    run(*command, *what)
    return folder


@pytest.fixture(scope='module')
def wheel_site(dist, tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp('wheel'), str(next(dist.glob('*.whl'))))


@pytest.fixture(scope='module')
def editable_site(repo_root, tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp('editable'), '--editable', str(repo_root))


def python(site: Path, *arguments: str, cwd: Path) -> str:
    """Runs an interpreter that finds this package in ``site`` alone."""
    # -S: the environment's own, perhaps editable, install is not seen.
    code = (
        f'import runpy, site, sys; site.addsitedir({str(site)!r}); sys.argv = {list(arguments)!r}; '
        "runpy.run_module('mmseg_fusion', run_name='__main__') if sys.argv == ['-m'] "
        "else runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(SITE), OMP_NUM_THREADS='1')
    return run(sys.executable, '-S', '-c', code, cwd=cwd, env=env)


def wanted(repo_root: Path) -> set[str]:
    """What a user of the installed package may ask for, as paths inside ``.mim``."""
    folders = [repo_root / name for name in ('configs', 'tools', 'requirements')]
    files = [p for folder in folders for p in folder.rglob('*') if p.is_file()]
    files = [p for p in files if '__pycache__' not in p.parts]
    return {p.relative_to(repo_root).as_posix() for p in [*files, repo_root / 'model-index.yml']}


def test_a_wheel_carries_configs_tools_and_index(dist, repo_root):
    with zipfile.ZipFile(next(dist.glob('*.whl'))) as wheel:
        names = set(wheel.namelist())
    assert 'mmseg_fusion/py.typed' in names
    inside = {name.partition('.mim/')[2] for name in names if '.mim/' in name}
    assert inside == wanted(repo_root)
    assert {'tools/train.py', 'tools/dist_train.sh', 'requirements/onedl.txt'} < inside
    assert {name.split('/')[0].split('-')[0] for name in names} == {'mmseg_fusion'}


def test_an_sdist_carries_the_sources_and_the_tests(dist, repo_root):
    with tarfile.open(next(dist.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert wanted(repo_root) < names
    assert {f'mmseg_fusion/.mim/{name}' for name in wanted(repo_root)} < names
    assert {'pyproject.toml', 'Makefile', 'LICENSE', 'README.md', 'tests/conftest.py'} < names


@pytest.mark.parametrize('kind', ['wheel', 'editable'])
def test_an_install_finds_its_configs_and_tools(kind, request, repo_root, tmp_path):
    site = request.getfixturevalue(f'{kind}_site')
    root = (site if kind == 'wheel' else repo_root) / 'mmseg_fusion'
    (tmp_path / 'config.py').write_text("_base_ = 'mmseg_fusion::_base_/models/upernet_r18.py'\n")
    (tmp_path / 'show.py').write_text(
        'import mmseg_fusion\n'
        'from mmengine.config import Config\n'
        'from mmengine.utils import get_installed_path\n'
        "print(Config.fromfile('config.py').model.decode_head.type)\n"
        "print(get_installed_path('mmseg_fusion'))\n"
    )
    lines = python(site, 'show.py', cwd=tmp_path).splitlines()
    assert lines[-2:] == ['UPerHead', str(root)]
    text = python(site, '-m', cwd=tmp_path)
    assert f'(configs in {root / ".mim" / "configs"})' in text
    assert 'scale_equalizer' in text


def test_the_tools_of_a_wheel_run(wheel_site, tmp_path):
    tool = wheel_site / 'mmseg_fusion' / '.mim' / 'tools' / 'train.py'
    assert '--resume' in python(wheel_site, str(tool), '--help', cwd=tmp_path)


def test_the_dependencies_are_those_of_the_report(project):
    assert sorted(report.DEPENDENCIES.values()) == sorted(project['dependencies'])


@pytest.mark.parametrize('kind', list(compat.FAMILIES))
def test_an_extra_takes_what_compat_takes_and_the_pins_meet_it(kind, project):
    extra = {r.name: r for r in map(Requirement, project['optional-dependencies'][kind])}
    pins = report.tested_versions(kind)
    for names, low, below in compat.FAMILIES[kind].values():
        specifier = extra[names[-1]].specifier
        assert {str(s) for s in specifier} == {
            *([f'>={low}'] if low else []),
            *([f'<{below}'] if below else []),
        }
    for name, requirement in extra.items():
        if pins[name][0].isdigit():
            assert Version(pins[name]) in requirement.specifier
        else:
            assert str(requirement.specifier) in ('', pins[name])
