"""Tests a model: MMSegmentation's own ``tools/test.py`` with mmseg_fusion imported first.

The command line is MMSegmentation's::

    python tools/test.py CONFIG CHECKPOINT [--tta] [--show-dir DIR] [--out DIR] [--work-dir DIR]
        [--allow-missing]

A checkpoint that lacks weights of the model is refused without ``--allow-missing``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_fusion').is_dir():  # a source checkout works without being installed
    sys.path.insert(0, str(ROOT))

from mmseg_fusion.cli import run_installed_tool
from mmseg_fusion.engine.runner import CheckedRunner

if __name__ == '__main__':
    run_installed_tool('test', CheckedRunner)
