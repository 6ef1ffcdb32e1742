"""Checkpoints: reads one from any place, loads it into a model, finds the last one of a run.

All tools read checkpoints through this module. :mod:`.compat` decides what a file may hold: tensors
and plain values, never code.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError

#: How many names an error lists.
SHOWN = 5
_REMEDY = (
    'give the checkpoint that was trained with this config, or the config beside the checkpoint'
)


def some(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint from a file, a URL or any scheme of mmengine, on the CPU.

    Args:
        path: file name, ``https://...``, ``torchvision://...`` and the like.

    Returns:
        The saved object; :func:`weights_of` gives its weights, at least one.

    Raises:
        CheckpointError: there is no such file, it cannot be read, it would run code, or it holds
            no weights.
    """
    from mmengine.runner import CheckpointLoader

    path = os.fspath(path)
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except (OSError, ImportError) as error:
        where = '' if '://' in path else f' (looked in {os.getcwd()})'
        raise CheckpointError(
            f'checkpoint {path!r} cannot be read{where}: {error}. Give another file or URL.'
        ) from error
    weights_of(checkpoint, path)
    return checkpoint


def weights_of(checkpoint: Any, path: str) -> dict[str, Tensor]:
    """The weights in a checkpoint by name, without the ``module.`` of a wrapped model.

    Raises:
        CheckpointError: it holds none; the message says what it holds.
    """
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if isinstance(state, dict):
        weights = {
            str(key).removeprefix('module.'): value
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        if weights:
            return weights
    if not isinstance(checkpoint, dict):
        held = type(checkpoint).__name__
    elif not isinstance(state, dict):
        held = f"{type(state).__name__} under 'state_dict'"
    else:
        held = f'a dict with {some([repr(key) for key in checkpoint]) or "nothing in it"}'
    raise CheckpointError(
        f'checkpoint {path!r} holds no weights by name: expected a dict of tensors, or one under '
        f"'state_dict', got {held}. Give a file that tools/train.py wrote."
    )


def needed_weights(model: nn.Module) -> set[str]:
    """Names of the parameters and running statistics that a model uses at test.

    Auxiliary heads, which are only used in training, are left out.
    """
    names = {name for name, _ in model.named_parameters()}
    names |= {
        name
        for name, _ in model.named_buffers()
        if name.rpartition('.')[2] in ('running_mean', 'running_var')
    }
    return {name for name in names if not name.startswith('auxiliary_head.')}


def fit(
    model: nn.Module, checkpoint: dict[str, Any], path: str | os.PathLike, exact: bool = False
) -> None:
    """Loads the weights of a checkpoint into a model for test.

    If the checkpoint is of another model, mmengine only warns and continues with random weights.

    Args:
        model: a segmentor; that of a model with test-time augmentation is its ``module``.
        checkpoint: as :func:`read_checkpoint` returns it.
        path: its name, for messages.
        exact: whether weights that the model does not use are refused, too.

    Raises:
        CheckpointError: weights that the model uses at test are missing, have another shape, or are
            not finite. The message names them and similar names.
    """
    path = os.fspath(path)
    weights = weights_of(checkpoint, path)
    whose = f'checkpoint {path}'
    experiment = (checkpoint.get('meta') or {}).get('experiment_name')
    trained = f' It was trained as {experiment}.' if experiment else ''
    try:
        wrong = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        shapes = re.findall(r'size mismatch for ([^:]+):.*?(\[.*?\]).*?(\[.*?\])', str(error))
        lines = [f'{name} {theirs} instead of {ours}' for name, theirs, ours in shapes]
        raise CheckpointError(
            f'{whose} does not fit the model of the config: {some(lines) or error}; {_REMEDY}.'
            + trained
        ) from error
    needed = needed_weights(model)
    missing = [name for name in wrong.missing_keys if name in needed]
    if missing:
        near = _near(missing, wrong.unexpected_keys)
        raise CheckpointError(
            f'{whose} does not fit the model of the config: it lacks weights, {len(missing)} of '
            f'{len(needed)}: {some(missing)}; {near}{_REMEDY}.' + trained
        )
    if exact and wrong.unexpected_keys:
        raise CheckpointError(
            f'{whose} does not fit the model of the config, which has no '
            f'{some(wrong.unexpected_keys)}; {_REMEDY}.' + trained
        )
    check_finite(model, path)


def _near(missing: Iterable[str], unexpected: Sequence[str]) -> str:
    """What the checkpoint has that is named like the missing weights."""
    near: list[str] = []
    for name in missing:
        near += difflib.get_close_matches(name, unexpected, n=1, cutoff=0.6)
    if near:
        return f'it has instead {some(list(dict.fromkeys(near)))}; '
    return f'it has instead {some(list(unexpected))}; ' if unexpected else ''


def check_finite(model: nn.Module, path: str) -> None:
    """Raises an error if weights that a model uses are NaN or infinite.

    Raises:
        CheckpointError: the message names the weights.
    """
    needed = needed_weights(model)
    broken = [
        name
        for name, value in model.state_dict().items()
        if name in needed and not torch.isfinite(value).all()
    ]
    if broken:
        raise CheckpointError(
            f'checkpoint {path!r} has weights that are NaN or infinite: {len(broken)} of '
            f'{len(needed)}, {some(broken)}. The run that wrote it had diverged; give an earlier '
            'checkpoint of it, or train with a smaller learning rate.'
        )


# --- the last checkpoint of a run --------------------------------------------------------------


def candidates(work_dir: str | os.PathLike) -> list[Path]:
    """Checkpoints in ``work_dir`` that a run could resume from, the last one first.

    mmengine's file ``last_checkpoint`` names the last one. If the folder was copied or moved, its
    own checkpoint of that name comes before the one in the old folder. The others follow, the
    highest iteration or epoch first. Checkpoints of the best score are left out, since they have no
    optimizer.
    """
    work_dir = Path(work_dir)
    folders, last = [work_dir], []
    pointer = work_dir / 'last_checkpoint'
    # Empty where the process was killed as it wrote it.
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if named and '://' in named:
        return [named]  # Not this machine's: nothing to look beside.
    if named:
        last = [path for path in (work_dir / Path(named).name, Path(named)) if path.is_file()][:1]
        # CheckpointHook.out_dir may be another folder.
        folders += [path.parent for path in last]
    others = {
        path.resolve(): path
        for folder in folders
        for path in folder.glob('*.pth')
        if path.is_file() and not path.name.startswith('best_')
    }

    def progress(path: Path) -> tuple[int, float]:
        numbers = re.findall(r'\d+', path.stem)
        return int(numbers[-1]) if numbers else -1, path.stat().st_mtime

    rest = sorted(others.values(), key=progress, reverse=True)
    return last + [path for path in rest if not last or path.resolve() != last[0].resolve()]


def last_intact(work_dir: str | os.PathLike) -> tuple[str | None, dict[str, str]]:
    """The last checkpoint of a run that can be read and holds what resuming needs.

    Args:
        work_dir: where the run writes.

    Returns:
        Its path, or None if there is no checkpoint; and the reason for each later checkpoint that
        cannot be resumed from.

    Raises:
        CheckpointError: there are checkpoints, but none can be resumed from.
    """
    passed_over: dict[str, str] = {}
    for path in map(str, candidates(work_dir)):
        try:
            checkpoint = read_checkpoint(path)
            lacking = [key for key in ('meta', 'message_hub') if key not in checkpoint]
            if lacking:
                raise CheckpointError(
                    f'checkpoint {path!r} holds weights, but not the state of a run'
                )
        except CheckpointError as error:
            passed_over[path] = str(error)
        else:
            return path, passed_over
    if passed_over:
        raise CheckpointError(
            f'{work_dir} holds no checkpoint that a run can resume from: '
            + ' '.join(passed_over.values())
            + ' Delete them to begin again, or give one with --resume=CHECKPOINT.'
        )
    return None, {}
