"""The config files of the project, read once."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
BASE = CONFIGS / '_base_'

#: Every config that can be trained, relative to the root.
TRAINABLE = [
    str(path.relative_to(ROOT))
    for path in sorted(CONFIGS.rglob('*.py'))
    if BASE not in path.parents
]
METAFILES = [str(p.relative_to(ROOT)) for p in sorted(CONFIGS.glob('*/metafile.yaml'))]
FOLDERS = sorted({str(Path(c).parent) for c in TRAINABLE})


@functools.cache
def read(path: str) -> Config:
    """The config at ``path``, relative to the root; not to be changed."""
    return Config.fromfile(ROOT / path)


def plain(path: str | Path) -> dict[str, Any]:
    """A config file's content as builtin types."""
    return Config.fromfile(path)._cfg_dict.to_dict()


@functools.cache
def models_of(metafile: str) -> tuple[dict[str, Any], ...]:
    """What a metafile lists."""
    # The same in C, where PyYAML has it.
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    return tuple(yaml.load((ROOT / metafile).read_text(encoding='utf-8'), loader)['Models'])


def without(value: Any, *keys: str) -> Any:
    """``value`` with every entry of that name taken out, at any depth."""
    if isinstance(value, dict):
        return {k: without(v, *keys) for k, v in value.items() if k not in keys}
    if isinstance(value, (list, tuple)):
        return [without(v, *keys) for v in value]
    return value


def signature(value: Any) -> str:
    """A key that two equal pieces of config share."""
    return json.dumps(value, sort_keys=True, default=str)


def without_host(value: Any) -> Any:
    """``value`` with the host cut from every address: the two families keep copies of one file."""
    if isinstance(value, dict):
        return {k: without_host(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_host(v) for v in value)
    return re.sub(r'^https?://[^/]+', '', value) if isinstance(value, str) else value
