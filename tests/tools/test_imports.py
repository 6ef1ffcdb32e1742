"""How a tool starts: it finds the package of its checkout, and that meets others' quirks first.

``run_again`` saves a tool that beginning, so it is looked at here for every tool.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from .running import ROOT, SITE, TOOLS, environment, forked_python, run, run_again

FILES = sorted(path for path in TOOLS.rglob('*.py') if not path.name.startswith('_'))
INSERTED = "if (ROOT / 'mmseg_fusion').is_dir():\n    sys.path.insert(0, str(ROOT))"
#: What else a tool does before its first import of the package, and why.
BEFORE = {
    # Read when torch is loaded.
    'demo.py': ["os.environ.setdefault('OMP_WAIT_POLICY', 'passive')"],
}


@functools.cache
def pythons_own(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    origin = str(spec.origin)
    library = sysconfig.get_paths()['stdlib']
    return not Path(origin).is_absolute() or (
        origin.startswith(library) and not re.search('(site|dist)-packages', origin)
    )


def imported(node: ast.stmt) -> list[str]:
    """The modules of an import statement that are not Python's own."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or '']
    else:
        return []
    return [name for name in names if not pythons_own(name.partition('.')[0])]


def wrong(path: Path, text: str | None = None) -> Iterator[str]:
    """What is wrong with the beginning of a tool, up to its first import of the package.

    Args:
        path: of the tool.
        text: of the tool, where it is another one than the file has.
    """
    body = ast.parse(path.read_text(encoding='utf-8') if text is None else text).body
    allowed, inserted = BEFORE.get(path.name, []), False
    for number, node in enumerate(body):
        source = ast.unparse(node)
        if names := imported(node):
            beside = path.with_name(f'{names[0]}.py')
            if beside.is_file():
                # A module of the same folder, where Python looks first: it begins in its turn.
                yield from wrong(beside)
            elif names != ['mmseg_fusion.cli']:
                yield f'line {node.lineno}: imports {names} before mmseg_fusion.cli'
            elif not inserted:
                yield f'line {node.lineno}: imports the package before its folder is on sys.path'
            return
        docstring = number == 0 and isinstance(node, ast.Expr)
        if source == INSERTED:
            inserted = True
        elif source.startswith('ROOT = '):
            here = path.resolve()
            if eval(source.removeprefix('ROOT = '), {'Path': Path, '__file__': here}) != ROOT:
                yield f'line {node.lineno}: ROOT is not the folder of the checkout'
        elif not (docstring or isinstance(node, (ast.Import, ast.ImportFrom)) or source in allowed):
            yield f'line {node.lineno}: runs code before the package is imported: {source}'
    yield 'never imports the package'


def test_every_tool_is_there() -> None:
    assert len(FILES) > 25
    assert {path.name for path in FILES} > {'train.py', 'test.py', 'camvid.py', *BEFORE}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_the_package_of_the_checkout_comes_first(path: Path) -> None:
    assert list(wrong(path)) == []


@pytest.mark.parametrize(
    ('old', 'new', 'words'),
    [
        ('parents[1]', 'parents[2]', 'ROOT is not the folder'),
        (INSERTED, 'pass', 'runs code before'),
        (INSERTED, '', 'before its folder is on sys.path'),
        ('import sys\n', 'import sys\nimport numpy as np\n', "imports ['numpy'] before"),
        (
            'import sys\n',
            'import sys\nfrom mmengine import Config\n',
            "imports ['mmengine'] before",
        ),
        ('from mmseg_fusion', 'from not_mmseg_fusion', "imports ['not_mmseg_fusion.cli'] before"),
        ('import sys\n', 'import sys\nsys.argv.pop()\n', 'runs code before'),
    ],
)
def test_what_is_wrong_is_seen(old: str, new: str, words: str) -> None:
    # Without its comments, as the statements are compared.
    text = ast.unparse(ast.parse(TOOLS.joinpath('train.py').read_text()))
    assert old in text
    assert words in ' '.join(wrong(TOOLS / 'train.py', text.replace(old, new)))


# --- the process that is forked ------------------------------------------------------------------

#: What it imports before the tools, beside mmseg_fusion.cli.
OF_ITS_OWN = {'runpy', 'tests', 'tests.cheaper', 'json', 'json.decoder', 'json.scanner'}

BEGINS = """
import sys
sys.path.insert(0, {root!r})
# As forking.py: torch 2.4 imports it.
sys.modules.setdefault('onnxruntime', None)
import mmseg_fusion.cli
# tests.cheaper wraps it; onedl-mmengine imports it only where it formats.
import yapf.yapflib.yapf_api
print(*sys.modules)
"""

NOT_ON_THE_PATH = """
import mmengine
import mmseg_fusion.cli
"""


@pytest.mark.stack
def test_a_fork_has_what_the_first_import_brings(tmp_path: Path) -> None:
    (tmp_path / 'begins.py').write_text(BEGINS.format(root=str(ROOT)))
    whole, forked = (
        {*start('begins.py', cwd=tmp_path).stdout.splitlines()[-1].split()}
        for start in (run, run_again)
    )
    assert 'mmseg_fusion.analysis' in whole
    assert whole <= forked
    assert forked - whole <= OF_ITS_OWN


def test_a_fork_finds_the_package_on_the_path_alone(tmp_path: Path) -> None:
    (tmp_path / 'lost.py').write_text(NOT_ON_THE_PATH)
    done = run_again('lost.py', cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "No module named 'mmseg_fusion'" in done.stderr


ANSWERS = """
import json, os, signal, sys
import not_there_from_nothing
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['A_WORD'], sys.stdin.read()]))
print(not_there_from_nothing.__name__, file=sys.stderr)
if sys.argv[1] == 'die':
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == 'wait':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    sys.stdout.flush()
    signal.pause()
sys.exit(7)
"""


def test_the_python_that_forks_is_one_to_those_who_start_it(tmp_path: Path) -> None:
    (tmp_path / 'answers.py').write_text(ANSWERS)
    (tmp_path / 'beside').mkdir()
    (tmp_path / 'beside' / 'not_there_from_nothing.py').touch()
    paths = os.pathsep.join([str(tmp_path / 'beside'), *SITE])

    def start(*words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [forked_python(), *words], cwd=tmp_path, env=environment(A_WORD='x', PYTHONPATH=paths),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    for words, code in ((['answers.py'], 7), (['-u', '-m', 'answers'], 7), (['answers.py'], None)):
        last = 'die' if code is None else 'end'
        process = start(*words, last)
        out, error = process.communicate('typed')
        assert process.returncode == (-signal.SIGKILL if code is None else code)
        assert error == 'not_there_from_nothing\n'
        if code:
            assert json.loads(out) == [[last], str(tmp_path), 'x', 'typed']
    process = start('answers.py', 'wait')
    process.stdin.close()
    assert json.loads(process.stdout.readline())[0] == ['wait']
    process.terminate()
    assert process.wait() == 5
    # Killed, it takes its program with it: that has the other end of the pipe.
    process = start('answers.py', 'wait')
    process.stdin.close()
    process.stdout.readline()
    process.kill()
    assert process.stdout.read() == ''
    assert start('-c', 'print(6 * 7)').communicate()[0] == '42\n'
    code = 'import mmseg_fusion, sys; print(sys.argv, __name__)'
    lost = start('-c', code, 'a b')
    assert "No module named 'mmseg_fusion'" in lost.communicate()[1]
    paths = os.pathsep.join([str(ROOT), paths])
    assert start('-c', code, 'a b').communicate()[0] == "['-c', 'a b'] __main__\n"
