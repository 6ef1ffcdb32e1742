"""Explains why a file cannot be loaded as a checkpoint, and what to do.

torch's own messages advise to switch ``weights_only`` off, or describe the internals of a pickle.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

from ..files import what_it_is


def why_not_loaded(name: str, error: Exception) -> str:
    """Explains why reading the checkpoint ``name`` ended in ``error``."""
    import torch

    foreign = re.search(r'GLOBAL (\S+)', str(error))
    if foreign or (isinstance(error, UnpicklingError) and 'HistoryBuffer' in str(error)):
        what = foreign[1].rstrip('.') if foreign else 'getattr'
        return (
            f'checkpoint {name!r} was not loaded: it holds more than tensors and plain values '
            f'({what}), and reading that runs code of whoever made the file. Get a file of weights '
            'alone. If you trust its maker and need the object, let a module in custom_imports '
            'call torch.serialization.add_safe_globals([...]) with it (torch 2.4 or newer).'
        )
    scheme = re.match(r'(\w[\w-]*)://', name)
    if isinstance(error, KeyError) and scheme and scheme[1] not in ('http', 'https', 'file'):
        return f'checkpoint {name!r}: {scheme[0]} knows no model {error}'
    remedy = 'Give a file that tools/train.py or torch.save wrote, or fetch it again'
    # torch's own advice on weights_only=False is none here.
    what = '' if 'load failed' in str(error) else str(error).split('. ')[0].splitlines()
    what = what[0][:200] if what else ''
    if scheme is None:
        what = _looks_like(Path(name).expanduser()) or what
    elif scheme[1] in ('http', 'https'):
        remedy += f'; the download is kept in {torch.hub.get_dir()}/checkpoints: delete it there'
        kept = Path(torch.hub.get_dir(), 'checkpoints', Path(name.partition('?')[0]).name)
        what = _looks_like(kept) or what
    return (
        f'checkpoint {name!r} cannot be read as a checkpoint: expected tensors and plain '
        f'values as torch.save writes them, but {what or "the file is something else"} '
        f'({type(error).__name__}). {remedy}.'
    )


def _looks_like(path: Path) -> str | None:
    """What a file that is no checkpoint seems to be; None where nothing is known."""
    if not path.is_file():
        return None
    with path.open('rb') as file:
        zipped = file.read(2) == b'PK'
    if zipped and not zipfile.is_zipfile(path):
        return f'it is truncated: {path.stat().st_size:,} bytes that begin like a checkpoint'
    return what_it_is(path)
