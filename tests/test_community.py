"""What a visitor of the repository expects: citations, tools of contributors, workflows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
METHODS = ('scale_equalizer', 'gff', 'ksac', 'caa', 'car', 'eseg', 'hfgd')


@pytest.mark.parametrize('method', METHODS)
def test_readme_cites_every_paper(method: str) -> None:
    page = (ROOT / 'configs' / method / 'README.md').read_text(encoding='utf-8')
    (entry,) = re.findall(r'```bibtex\n(.*?)```', page, re.DOTALL)
    assert entry in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_every_yaml_file_loads() -> None:
    paths = [ROOT / 'CITATION.cff', ROOT / '.pre-commit-config.yaml']
    paths += sorted((ROOT / '.github').rglob('*.yml'))
    assert len(paths) >= 5
    for path in paths:
        assert yaml.safe_load(path.read_text(encoding='utf-8')), path.name


def test_pre_commit_has_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))['repos']
    (rev,) = (repo['rev'] for repo in hooks if 'ruff' in repo['repo'])
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert rev == f'v{pinned.group(1)}'


def test_the_workflow_runs_what_runs_everywhere_else() -> None:
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text(encoding='utf-8'))
    steps = [step.get('run') for job in workflow['jobs'].values() for step in job['steps']]
    assert 'bash .ci/run' in steps
    assert (ROOT / '.ci' / 'run').is_file()


def test_files_that_contributing_names_are_there() -> None:
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    named = [name for name in re.findall(r'`([\w./-]+)`', text) if '/' in name]
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_bug_reports_ask_for_the_environment() -> None:
    assert 'python -m mmseg_fusion' in (ROOT / '.github/ISSUE_TEMPLATE/bug.yml').read_text()
