"""An interpreter that has imported what every tool imports, and forks itself to run one.

``running.Again`` starts it as a program and writes a line of JSON per tool: its words, the folder
to run in, the files for what it prints. It answers with two lines: the number of the process and,
once that has ended, its exit code. What a fork does is what ``python TOOL ...`` does after its
imports, in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])


def become(job: dict[str, Any]) -> None:
    """What the system and Python do when a tool is started."""
    import numpy as np
    import torch

    os.chdir(job['cwd'])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = job['argv']
    sys.path[0] = str(Path(job['argv'][0]).parent)
    # Each starts from a state of its own, as one that was not forked.
    random.seed()
    np.random.seed()
    torch.seed()


def main() -> None:
    # The answers have standard output to themselves: what is imported may print (onedl's does).
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    # As a tool does before it imports the package; a fork has to do it again.
    sys.path.insert(1, ROOT)
    # torch 2.4 imports it where it is installed. It starts a thread, and a fork of a process with
    # threads waits for ever for a lock that one of them held.
    sys.modules['onnxruntime'] = None
    import mmseg_fusion.cli  # noqa: F401  isort: skip  (first: it meets the third-party quirks)
    import mmseg.apis
    import mmseg.datasets
    import mmseg.engine
    import mmseg.evaluation
    import mmseg.visualization  # noqa: F401

    from tests.cheaper import format_a_text_once, leave_imports_alone

    sys.path.remove(ROOT)
    del sys.modules['onnxruntime']
    format_a_text_once()
    leave_imports_alone()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            become(job)
            runpy.run_path(job['argv'][0], run_name='__main__')
            return
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == '__main__':
    main()
