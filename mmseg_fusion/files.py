"""Output files of a tool: complete, and never over its inputs or over files of others.

A tool lists the files that it wrote in a hidden file in the same folder, :data:`MADE`: a line per
file with its SHA-256, the tool and the name. A file counts as the tool's own as long as it matches
its line. A file that somebody else put there, or edited since, is only replaced with
``--overwrite``.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import csv
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

#: The configs of this package.
CONFIGS = Path(__file__).parent / '.mim' / 'configs'
#: What a tool wrote into a folder, and what it was when it was written.
MADE = '.mmseg_fusion_made'
#: What ``--overwrite`` does.
OVERWRITE = 'replace files that are there and that this tool did not write'


def config_file(name: str) -> str:
    """The file of a config that is named as in ``_base_``: ``mmseg_fusion::camvid/NAME``.

    Args:
        name: ``PACKAGE::FOLDER/NAME``, with ``.py`` or without, of an installed package that
            carries its configs, as ``mmseg::pspnet/...``; any other name is returned unchanged.

    Raises:
        InputError: there is no such package, or it has no configs.
    """
    package, separator, rest = name.partition('::')
    if not separator:
        return name
    root: Path | None = CONFIGS
    if package != 'mmseg_fusion':
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        places = spec.submodule_search_locations if spec is not None else None
        root = Path(next(iter(places)), '.mim', 'configs') if places else None
    if root is None or not root.is_dir():
        raise InputError(
            f'config {name!r}: {package!r} is no installed package with configs. Expected '
            'PACKAGE::FOLDER/NAME, as mmseg_fusion::camvid/... or mmseg::pspnet/..., or a file'
        )
    return str(root.resolve() / (rest if rest.endswith('.py') else f'{rest}.py'))


def add_overwrite(parser: argparse.ArgumentParser, help: str = OVERWRITE) -> None:
    """Adds ``--overwrite``, which every tool that writes a file takes."""
    parser.add_argument('--overwrite', action='store_true', help=help)


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What two names of one file share, links included; None where there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def what_it_is(path: Path) -> str | None:
    """A guess at the type of a file that is not of the expected type; None if unknown."""
    with path.open('rb') as file:
        start = file.read(512)
    if not start:
        return 'the file is empty'
    if start.startswith(b'version https://git-lfs'):
        return 'it is a pointer of Git LFS (git lfs pull brings the file itself)'
    if start.lstrip()[:14].lower().startswith((b'<!doctype html', b'<html')):
        return 'it is a web page'
    if all(byte in b'\t\n\r\f' or byte >= 32 for byte in start) and b'\x7f' not in start:
        # A letter of several bytes may be cut at the end.
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder('utf-8')().decode(start)
            return 'it is a text file'
    return None


@contextlib.contextmanager
def beside(path: Path, name: str = '') -> Iterator[Path]:
    """A temporary name in the folder of ``path``, for :func:`put`; an old file there is removed.

    Args:
        path: final place of the file; its folder is made.
        name: default: a hidden name of this process, without the suffix of an image or a label, so
            that a file of a killed process is not taken for one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(name or f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def put(temporary: Path, path: Path) -> None:
    """Moves a complete file to its place, after it is on the disk.

    A full disk is noticed here, while the old file is still there.
    """
    with temporary.open('rb+') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it appears at ``path`` only when it is complete.

    It does not check the old file: use it to edit a file, and :class:`Outputs` for everything else.
    """
    with beside(path) as temporary:
        with temporary.open('wb') as file:
            yield file
        put(temporary, path)


class Outputs:
    """The files that one run of a tool writes.

    Args:
        tool: name of the tool; files of another tool are not its own.
        inputs: files that it reads, as paths or strings; None and URLs are skipped.
        overwrite: whether files that it did not write may be replaced. Inputs never are.
    """

    def __init__(
        self, tool: str, inputs: Iterable[str | Path | None] = (), overwrite: bool = False
    ) -> None:
        self.tool = tool
        self.overwrite = overwrite
        self._inputs: dict[tuple[int, int], str] = {}
        self._announced: list[str | Path] = []
        self._written: set[Path] = set()
        self.add_inputs(inputs)

    def add_inputs(self, paths: Iterable[str | Path | None]) -> None:
        """Names further files that the tool reads.

        Raises:
            InputError: one is a file that :meth:`check` was told of.
        """
        for path in paths:
            identity = None if path is None else _identity(path)
            if identity is not None:
                self._inputs.setdefault(identity, str(path))
        for path in self._announced:
            self._target(path)

    def check(self, *paths: str | Path | None) -> None:
        """Raises an error before the work if a file could not be written afterwards.

        Args:
            *paths: files that will be written; None among them are skipped.

        Raises:
            InputError: one is an input, a folder, another's file, in a place that cannot be written
                to, or named twice.
        """
        seen: dict[Path, str] = {}
        for path in paths:
            if path is None:
                continue
            target = self._target(path)
            if target in seen:
                raise InputError(
                    f'{seen[target]} and {path} are one file, but two are to be written: name '
                    'another one'
                )
            seen[target] = str(path)
            self._check_folder(target, path)
            self._check_content(target, path)
            self._announced.append(path)

    def _target(self, path: str | Path) -> Path:
        """Where a path leads: a link stays, and the file behind it is written."""
        try:
            target = Path(path).resolve()
        except (OSError, RuntimeError) as error:
            raise InputError(f'{path} cannot be written: {error}; name another file') from error
        read = self._inputs.get(_identity(target) or (-1, -1))
        if read is not None:
            same = '' if str(path) == read else f', by another name ({read})'
            raise InputError(
                f'{path} is read by this tool{same} and would be lost: name another file to write'
            )
        if target.is_dir():
            raise InputError(f'{path} is a folder: expected the name of a file to write')
        return target

    def _check_folder(self, target: Path, path: str | Path) -> None:
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise InputError(
                f'{path} cannot be written: {above} is a file, not a folder; name another place'
            )
        if not os.access(above, os.W_OK):
            raise InputError(
                f'{path} cannot be written: no permission to write in {above}; name another place'
            )

    def _check_content(self, target: Path, path: str | Path) -> None:
        if target.exists() and not self.overwrite and not self._made(target):
            raise InputError(
                f'{path} exists, and {self.tool} did not write it (or it was changed since): name '
                'another file or add --overwrite to replace it'
            )

    def _line(self, target: Path, digest: str) -> str:
        return f'{digest} {self.tool} {target.name}'

    def _note(self, target: Path, digest: str) -> None:
        with (target.parent / MADE).open('ab') as made:
            made.write(f'{self._line(target, digest)}\n'.encode())

    def _made(self, target: Path) -> bool:
        """Whether this tool wrote the file as it is now."""
        try:
            lines = (target.parent / MADE).read_text(encoding='utf-8').splitlines()
            return self._line(target, _digest(target)) in lines
        except (OSError, UnicodeDecodeError):
            return False

    def path(self, path: str | Path) -> contextlib.AbstractContextManager[Path]:
        """A name to write to, with the suffix of ``path``; at the end its file moves to ``path``.

        Args:
            path: where the file is to be.

        Raises:
            InputError: as :meth:`check`, or the file could not be written, as on a full disk. What
                was at ``path`` is still there.
        """
        return self._beside(path, Path(path).suffix)

    @contextlib.contextmanager
    def _beside(self, path: str | Path, suffix: str) -> Iterator[Path]:
        target = self._target(path)
        if target in self._written:
            raise InputError(f'{path} was already written in this run: name another file')
        self._check_folder(target, path)
        try:
            with beside(target, f'.{target.name}.{os.getpid()}.tmp{suffix}') as temporary:
                yield temporary
                self._put(temporary, target, path)
        except OSError as error:
            if error.filename is None or Path(error.filename).parent == target.parent:
                raise InputError(f'{path} cannot be written: {error}') from error
            raise

    def _put(self, temporary: Path, target: Path, path: str | Path) -> None:
        digest = _digest(temporary)
        # The very same file may be there, whoever wrote it.
        if not (target.is_file() and _digest(target) == digest):
            self._check_content(target, path)
            # Noted first: who is killed in between finds a file of his own when he comes again.
            self._note(target, digest)
            put(temporary, target)
        self._written.add(target)

    @contextlib.contextmanager
    def file(self, path: str | Path) -> Iterator[BinaryIO]:
        """As :meth:`path`, a file to write bytes to."""
        with self._beside(path, '') as temporary, temporary.open('wb') as file:
            yield file

    def write_rows(self, path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes a CSV file; the keys of the first row are its head."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        self.write(path, text.getvalue())

    def save(self, path: str | Path, checkpoint: dict) -> None:
        """Writes a checkpoint."""
        import torch

        # Into memory first: torch's own writer hides why a file could not be written.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with self.file(path) as file:
            file.write(content.getbuffer())

    def remove(self, path: str | Path) -> None:
        """Removes a file of an earlier run, if there is one; files of others are kept."""
        target = self._target(path)
        if target.exists():
            self._check_content(target, path)
            target.unlink()

    def note(self, *paths: str | Path) -> None:
        """Lists files that a library wrote for this tool as the tool's own."""
        for path in paths:
            target = Path(path).resolve()
            self._note(target, _digest(target))

    def write(self, path: str | Path, content: str | bytes) -> None:
        """Writes a complete file; text in UTF-8."""
        with self.file(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
