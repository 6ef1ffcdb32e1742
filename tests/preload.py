"""What a process that forks itself for tests has imported: see distributed.py."""

from __future__ import annotations

import importlib
import sys

# torch 2.4 imports it where it is installed. It starts a thread, and a fork of a process with
# threads waits for ever for a lock that one of them held.
sys.modules['onnxruntime'] = None
# The package comes first: it meets the third-party quirks.
for name in ('mmseg_fusion', *(f'mmseg.{part}' for part in ('apis', 'engine', 'visualization'))):
    importlib.import_module(name)
cheaper = importlib.import_module('tests.cheaper')
del sys.modules['onnxruntime']
cheaper.format_a_text_once()
cheaper.leave_imports_alone()
