"""An interpreter that has imported what every tool imports first, and forks itself to run one.

``running.forking`` starts it as a program. A fork does what ``python TOOL ...`` does, in a process
of its own, but for the seconds of one import: ``mmseg_fusion.cli``, which brings in torch, mmseg
and the whole package. test_imports.py checks what makes the two the same: that this import is the
first of each tool, and that nothing else is there.

It is asked in two ways. ``running.Again`` writes a line of JSON per tool: its words, the folder to
run in, the files for what it prints, the interpreter that it is to take for others. It is answered
with two lines: the number of the process and, once that has ended, its exit code. And ``knocking``,
which stands in for ``python`` where a script or a tool starts others, connects to the socket that
is named on the command line: any number at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

ROOT = str(Path(__file__).resolve().parents[2])


class OnThePath:
    """Hides the package that is imported already, until a tool has its folder on ``sys.path``."""

    def __init__(self) -> None:
        names = [name for name in sys.modules if name.partition('.')[0] == 'mmseg_fusion']
        self.modules = {name: sys.modules.pop(name) for name in names}
        self.spec = self.modules['mmseg_fusion'].__spec__

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != 'mmseg_fusion':
            return None
        found = PathFinder.find_spec(name)
        if found is None or not os.path.samefile(found.origin, self.spec.origin):
            return None  # Python says so, or takes the other one
        sys.meta_path.remove(self)
        sys.modules.update(self.modules)
        return ModuleSpec(name, self, origin=found.origin, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def become(job: dict[str, Any]) -> None:
    """What the system and Python do when a program is started."""
    import numpy as np
    import torch

    os.chdir(job['cwd'])
    if 'descriptors' not in job:
        job['descriptors'] = [
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(job[n], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for n in ('stdout', 'stderr')),
        ]
    for number, descriptor in enumerate(job['descriptors']):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if 'environment' in job:
        os.environ.clear()
        os.environ.update(job['environment'])
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
        known = {os.path.abspath(path) for path in sys.path}
        paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
        sys.path[1:1] = [path for path in paths if path and os.path.abspath(path) not in known]
    if job.get('unbuffered') or os.environ.get('PYTHONUNBUFFERED'):
        sys.stdout.reconfigure(write_through=True)
    sys.executable = job.get('python') or sys.executable
    sys.argv = ['-c', *job['argv'][1:]] if job.get('code') else job['argv']
    inside = job.get('module') or job.get('code')
    sys.path[0] = job['cwd'] if inside else str(Path(job['argv'][0]).parent)
    # Each starts from a state of its own, as one that was not forked.
    random.seed()
    np.random.seed()
    torch.seed()
    sys.meta_path.insert(0, OnThePath())


def asked(answers: TextIO) -> dict[str, Any] | None:
    """Forks for every line of standard input; what a fork has to run, None at the end of them."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    return None


def knocked(door: socket.socket) -> dict[str, Any] | None:
    """Forks twice for everybody who connects; what the second fork has to run, None at the end.

    The first waits for the second, passes on the signals that are sent to it, and kills it where
    the one who knocked was killed.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not select.select([door], [], [], 1)[0]:
            continue
        guest, _ = door.accept()
        if os.fork():
            guest.close()
            continue
        door.close()
        descriptors = socket.recv_fds(guest, 1, 3)[1]
        with guest.makefile() as lines:
            job = dict(json.loads(lines.readline()), descriptors=descriptors)
        child = os.fork()
        if not child:
            guest.close()
            os.setsid()
            return job
        for descriptor in descriptors:
            os.close(descriptor)
        threading.Thread(target=pass_on, args=(guest, child), daemon=True).start()
        guest.sendall(b'%d' % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    return None


def pass_on(guest: socket.socket, child: int) -> None:
    """The signals that a guest has sent, a byte each, to its process."""
    while numbers := guest.recv(64):
        for number in numbers:
            os.kill(child, number)
    os.killpg(child, signal.SIGKILL)


def main() -> None:
    # The answers have standard output to themselves: what is imported may print (onedl's does).
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    # As a tool does before it imports the package; each fork has to do it again.
    sys.path.insert(1, ROOT)
    # torch 2.4 imports it where it is installed. It starts a thread, and a fork of a process with
    # threads waits for ever for a lock that one of them held.
    sys.modules['onnxruntime'] = None
    import mmseg_fusion.cli  # noqa: F401  isort: skip  (first: it meets the third-party quirks)
    from tests.cheaper import format_a_text_once, leave_imports_alone

    sys.path.remove(ROOT)
    del sys.modules['onnxruntime']
    format_a_text_once()
    leave_imports_alone()
    door = socket.socket(socket.AF_UNIX)
    door.bind(sys.argv[1])
    door.listen(64)
    opened = os.fork()
    if opened:
        door.close()
        print('ready', file=answers, flush=True)
        job = asked(answers)
    else:
        answers.close()
        job = knocked(door)
    if job is None:
        return
    become(job)
    if job.get('code'):
        exec(compile(job['argv'][0], '<string>', 'exec'), {'__name__': '__main__'})
    elif job.get('module'):
        runpy.run_module(job['argv'][0], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(job['argv'][0], run_name='__main__')


if __name__ == '__main__':
    main()
