"""What a tool may write over, and that it writes whole files."""

from __future__ import annotations

import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmseg_fusion.errors import InputError
from mmseg_fusion.files import MADE, Outputs, whole_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('kind', ['itself', 'relative', 'symbolic', 'hard', 'folder'])
def test_an_input_is_never_written(tmp_path, monkeypatch, kind, overwrite):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in').mkdir()
    source = tmp_path / 'in' / 'a.png'
    source.write_bytes(b'mine')
    out = tmp_path / 'b.png'
    if kind == 'itself':
        out = source
    elif kind == 'relative':
        out = Path('in/../in/a.png')
    elif kind == 'symbolic':
        out.symlink_to(source)
    elif kind == 'hard':
        os.link(source, out)
    else:
        (tmp_path / 'link').symlink_to(tmp_path / 'in', target_is_directory=True)
        out = tmp_path / 'link' / 'a.png'
    outputs = Outputs('test', [None, 'https://example.org/a.png', source], overwrite)
    # Not even if it is of the tool's own making.
    outputs.note(source)
    with pytest.raises(InputError, match='is read by this tool'):
        outputs.check(out)
    with pytest.raises(InputError, match='is read by this tool'):
        outputs.write(out, b'lost')
    assert source.read_bytes() == b'mine'
    assert out.is_symlink() is (kind == 'symbolic')


def test_only_what_the_tool_wrote_is_replaced(tmp_path):
    out = tmp_path / 'a.json'
    Outputs('one').write(out, 'first')
    Outputs('one').check(out)
    Outputs('one').write(out, 'second')
    assert out.read_text() == 'second'
    # Another tool's, one that was edited since, one that was copied, one that was always there.
    copy, foreign = tmp_path / 'copy.json', tmp_path / 'foreign.json'
    copy.write_text('second')
    foreign.write_text('mine')
    edited = tmp_path / 'edited.json'
    Outputs('one').write(edited, 'made')
    edited.write_text('made, and edited')
    for tool, path in (('two', out), ('one', edited), ('one', copy), ('one', foreign)):
        before = path.read_bytes()
        with pytest.raises(InputError, match='add --overwrite'):
            Outputs(tool).check(path)
        with pytest.raises(InputError, match='add --overwrite'):
            Outputs(tool).write(path, 'lost')
        assert path.read_bytes() == before
        # The same bytes again: nothing is lost, whoever wrote them.
        Outputs(tool).write(path, before)
        Outputs(tool, overwrite=True).write(path, 'told')
        assert path.read_bytes() == b'told'
    assert names(tmp_path) == [MADE, 'a.json', 'copy.json', 'edited.json', 'foreign.json']


def test_a_link_stays_a_link(tmp_path):
    link, behind = tmp_path / 'link.txt', tmp_path / 'behind.txt'
    link.symlink_to(behind)
    Outputs('one').write(link, 'text')
    assert link.is_symlink()
    assert behind.read_text() == 'text'


def test_two_outputs_are_two_files(tmp_path):
    out = tmp_path / 'a.png'
    outputs = Outputs('one')
    with pytest.raises(InputError, match='are one file'):
        outputs.check(out, tmp_path / '.' / 'a.png')
    outputs.write(out, 'first')
    with pytest.raises(InputError, match='already written in this run'):
        outputs.write(out, 'second')
    assert out.read_text() == 'first'


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('mine')
    outputs = Outputs('one', overwrite=True)
    with pytest.raises(InputError, match='is a folder: expected'):
        outputs.check(tmp_path)
    with pytest.raises(InputError, match='is a file, not a folder'):
        outputs.check(tmp_path / 'file' / 'a' / 'b.png')
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    with pytest.raises(InputError, match='loop cannot be written'):
        outputs.write(tmp_path / 'loop', b'')
    outputs.check(tmp_path / 'new' / 'folder' / 'a.png', None)
    assert names(tmp_path) == ['file', 'loop']


def test_what_fails_leaves_the_old_file(tmp_path):
    out = tmp_path / 'a.txt'
    Outputs('one').write(out, 'old')
    for way in (Outputs('one').file, whole_file):

        def half(way=way) -> None:
            with way(out) as file:
                file.write(b'half')
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half()
    assert out.read_text() == 'old'
    assert names(tmp_path) == [MADE, 'a.txt']


@pytest.mark.parametrize(
    ('way', 'content'), [('write', bytes(1 << 20)), ('save', {'a': bytes(1 << 20)})]
)
def test_a_full_disk(tmp_path, way, content):
    """As a disk without room: no file may grow past 64 KiB."""
    out = tmp_path / 'a.pth'
    Outputs('one').write(out, 'old')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(InputError, match=r'a\.pth cannot be written: .*File too large'):
            getattr(Outputs('one'), way)(out, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_text() == 'old'
    assert names(tmp_path) == [MADE, 'a.pth']


def test_many_at_once(tmp_path):
    """Processes that write into one folder each find their own files again."""

    def write(number: int) -> None:
        Outputs('one').write(tmp_path / f'{number}.txt', str(number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    Outputs('one').check(*(tmp_path / f'{number}.txt' for number in range(200)))
    assert len((tmp_path / MADE).read_text().splitlines()) == 200


def test_killed_between_note_and_file(tmp_path, monkeypatch):
    """A process that ends right before the new file is in place: the old one is still its own."""
    out = tmp_path / 'a.txt'
    Outputs('one').write(out, 'old')
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Outputs('one').write(out, 'new')
    monkeypatch.undo()
    assert out.read_text() == 'old'
    Outputs('one').write(out, 'new')
    assert out.read_text() == 'new'


def test_removed_only_if_its_own(tmp_path):
    own, foreign = tmp_path / 'own.txt', tmp_path / 'foreign.txt'
    Outputs('one').write(own, 'a')
    foreign.write_text('mine')
    outputs = Outputs('one')
    outputs.remove(own)
    outputs.remove(tmp_path / 'absent.txt')
    with pytest.raises(InputError, match='add --overwrite'):
        outputs.remove(foreign)
    assert names(tmp_path) == [MADE, 'foreign.txt']
