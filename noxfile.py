"""The tests in the environments that people have, and the table of them.

    make matrix                                  all that this machine has an interpreter for
    nox -s 'tests(py39-torch2.0)' -- -m stack    one, with pytest's arguments behind `--`
    nox -s 'tests(py39-torch2.0)' -- -n 1        one, in one process instead of two
    nox -s table                                 the table alone, from docs/environments.json

Every run writes what it found into docs/environments.json: versions, what was run, what came out.
An interpreter that is not there is looked for by nox and, with `--download-python auto`, fetched;
one that cannot be had leaves its line at "not run".
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nox

ROOT = Path(__file__).parent
RECORD = ROOT / 'docs' / 'environments.json'
PAGE = ROOT / 'docs' / 'compatibility.md'
BEGIN, END = '<!-- environments: begin -->', '<!-- environments: end -->'

#: name -> interpreter, the extra that brings the mm* packages, and what is pinned beside it.
ENVIRONMENTS = {
    'py39-torch2.0': ('3.9', 'openmmlab', ['torch==2.0.1', 'numpy==1.26.4']),
    'py310-torch2.1': ('3.10', 'openmmlab', ['torch==2.1.2', 'numpy==1.26.4']),
    'py311-torch2.4': ('3.11', 'openmmlab', ['torch==2.4.1', 'numpy==2.0.2']),
    'py312-torch2.11': ('3.12', 'openmmlab', ['torch==2.11.0', 'numpy>=2']),
    'py312-torch2.14': ('3.12', 'openmmlab', ['torch==2.14.1', 'numpy>=2']),
    'py313-torch2.13': ('3.13', 'openmmlab', ['torch==2.13.0', 'numpy>=2']),
    'py314-torch2.13': ('3.14', 'onedl', ['torch==2.13.0', 'numpy>=2']),
    'openmmlab': ('3.11', 'openmmlab', ['-r', 'requirements/openmmlab.txt']),
    'onedl': ('3.11', 'onedl', ['-r', 'requirements/onedl.txt']),
    'mmcv-full': ('3.11', 'openmmlab', ['torch==2.13.0', 'numpy>=2', 'mmcv==2.1.0']),
}
#: What a run names besides the tests' outcome.
PACKAGES = ['torch', 'numpy', 'mmcv', 'mmcv-lite', 'onedl-mmcv', 'mmengine', 'onedl-mmengine']
PACKAGES += ['mmsegmentation', 'onedl-mmsegmentation', 'mmpretrain', 'onedl-mmpretrain']
VERSIONS = f"""
import importlib.metadata as m, json, platform
found = {{'python': platform.python_version()}}
for name in {PACKAGES}:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""

nox.options.sessions = ['tests', 'table']
nox.options.default_venv_backend = 'venv'
nox.options.error_on_missing_interpreters = False


def record() -> dict:
    return json.loads(RECORD.read_text(encoding='utf-8')) if RECORD.exists() else {}


def outcome(report: Path) -> dict[str, int]:
    """Counts of a JUnit report."""
    suite = ElementTree.parse(report).getroot().find('testsuite')
    counts = {key: int(suite.get(key)) for key in ('tests', 'failures', 'errors', 'skipped')}
    failed = counts['failures'] + counts['errors']
    return dict(
        passed=counts['tests'] - failed - counts['skipped'],
        failed=failed,
        skipped=counts['skipped'],
    )


def arguments(given: list[str]) -> tuple[list[str], list[str]]:
    """What pytest-xdist gets, and what chooses the tests, which is what the record names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-n', default='2')
    workers, chosen = parser.parse_known_args(given)
    return ['-n', workers.n], chosen or ['-m', 'stack']


@nox.session
@nox.parametrize(
    'python,name',
    [(python, name) for name, (python, _, _) in ENVIRONMENTS.items()],
    ids=list(ENVIRONMENTS),
)
def tests(session: nox.Session, name: str) -> None:
    """The tests that depend on the stack, in one environment."""
    _, extra, pins = ENVIRONMENTS[name]
    # The extra `dev` has what test files import: one that cannot be collected stops the whole run.
    tools = ['scipy', 'rich', 'tifffile']
    if 'mmcv==2.1.0' in pins:  # its operators are compiled, against the torch that is there
        session.install('torch==2.13.0', 'setuptools<81', 'wheel', 'ninja', 'psutil')
        build = dict(MMCV_WITH_OPS='1', FORCE_CUDA='0')
        session.install('--no-build-isolation', '--no-deps', 'mmcv==2.1.0', env=build)
        need = ['mmengine<0.11', 'mmsegmentation<1.3', 'mmpretrain<1.3', 'torchvision', 'ftfy']
        session.install(*pins, *need, 'regex', 'setuptools<81', 'einops', 'addict', 'yapf')
        session.install('-e', '.[dev]', *tools)
    else:
        session.install(*pins)
        # The pins once more: what comes later must not lift them.
        session.install(*pins, '-e', f'.[{extra},dev]', *tools)
    workers, chosen = arguments(session.posargs)
    report = Path(session.create_tmp()) / 'report.xml'
    report.unlink(missing_ok=True)
    session.run(
        *('python', '-m', 'pytest', *workers, *chosen, f'--junitxml={report}'),
        success_codes=[0, 1],
    )
    printed = session.run('python', '-c', VERSIONS, silent=True)
    if printed is None:  # with --install-only nothing runs
        return
    versions = json.loads(printed)
    entry = dict(versions=versions, run=' '.join(['pytest', *chosen]), **outcome(report))
    everything = {**record(), name: entry}
    ordered = {key: everything[key] for key in ENVIRONMENTS if key in everything}
    RECORD.write_text(json.dumps(ordered, indent=2) + '\n', encoding='utf-8')
    session.log('%s: %s', name, {key: entry[key] for key in ('passed', 'failed', 'skipped')})
    if entry['failed']:
        session.error(f'{entry["failed"]} tests failed')


def rows(entries: dict) -> list[str]:
    """The table's lines, one for every environment, also for those that were not run."""
    lines = [
        '| environment | Python | torch | numpy | packages | run | passed | failed | skipped |'
    ]
    lines.append('|' + ' --- |' * 9)
    for name, (python, extra, pins) in ENVIRONMENTS.items():
        if name not in entries:
            want = ' '.join(pin for pin in pins if '==' in pin)
            lines.append(f'| {name} | {python} | {want} | | {extra} | not run | | | |')
            continue
        entry = entries[name]
        found = dict(entry['versions'])
        cells = [found.pop(key) for key in ('python', 'torch', 'numpy')]
        packages = ', '.join(f'{package} {version}' for package, version in found.items())
        ran = f'`{entry["run"]}`'
        counts = [str(entry[key]) for key in ('passed', 'failed', 'skipped')]
        lines.append(f'| {" | ".join([name, *cells, packages, ran, *counts])} |')
    return lines


def inserted(text: str, entries: dict) -> str:
    """``text`` of the page with the table between its two marked lines."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return '\n'.join([before + BEGIN, *rows(entries), END + after])


@nox.session(venv_backend='none')
def table(session: nox.Session) -> None:
    """Writes the table of docs/compatibility.md from docs/environments.json."""
    PAGE.write_text(inserted(PAGE.read_text('utf-8'), record()), encoding='utf-8')
    session.log('docs/compatibility.md')
