"""Checkpoints that are never truncated by a kill or a full disk.

mmengine 0.10.7 writes in place. Ends with an mmengine whose LocalBackend writes a temporary file
and renames it.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from ..files import beside, put
from .quirk import Quirk


def checkpoints_whole() -> Quirk | None:
    """A checkpoint appears under its name only when it is complete.

    mmengine writes in place: a killed process or a full disk left a truncated ``iter_*.pth`` or
    ``best_*.pth`` under its final name, and replaced the old file. Here local files are written to
    a temporary file and renamed. Other storage backends are not changed.
    """
    from mmengine.fileio import LocalBackend, get_file_backend
    from mmengine.runner import checkpoint

    original = checkpoint.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(content, filename, file_client_args=None, backend_args=None):
        name = os.fspath(filename)
        local = not (file_client_args or '://' in name) and isinstance(
            get_file_backend(name, backend_args=backend_args), LocalBackend
        )
        if not local:
            return original(content, name, file_client_args, backend_args)
        path = Path(name)
        # Of one name, so that the next save replaces what a kill left; no suffix of a checkpoint.
        with beside(path, f'.{path.name}.unfinished') as temporary:
            original(content, str(temporary), None, backend_args)
            put(temporary, path)

    for module in list(sys.modules.values()):
        if getattr(module, '__name__', '').startswith('mmengine.') and (
            vars(module).get('save_checkpoint') is original
        ):
            module.save_checkpoint = save_checkpoint
    return Quirk(
        'checkpoints_whole',
        'checkpoints are written beside their name and renamed',
        'mmengine whose LocalBackend writes so',
    )
