"""Trains a model: MMSegmentation's own ``tools/train.py`` with mmseg_fusion imported first.

With this import, ``_base_ = 'mmseg_fusion::...'``, several processes without a GPU, and
``--resume`` on a recent torch work. The command line is MMSegmentation's::

    python tools/train.py CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--amp]
        [--cfg-options KEY=VALUE ...]

``--resume`` continues from the last intact checkpoint of the work dir, or from the named one. A run
without a checkpoint starts from ``load_from``.
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
    run_installed_tool('train', CheckedRunner)
