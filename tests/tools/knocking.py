"""Stands in for ``python``: has a program run by a fork of forking.py, and ends as it ends.

``running.forked_python`` makes an executable file of it, with the two names below.
"""

import json
import os
import signal
import socket
import sys

SOCKET = PYTHON = ''


def main() -> None:
    words = sys.argv[1:]
    job = dict(cwd=os.getcwd(), environment=dict(os.environ), python=sys.argv[0])
    if words[0] == '-u':
        job['unbuffered'] = words.pop(0)
    if words[0] == '-m':
        job['module'] = words.pop(0)
    if words[0] == '-c' and words[1].startswith('import mmseg_fusion'):
        job['code'] = words.pop(0)
    if words[0].startswith('-'):
        # Python that does not begin as a tool does: a line of a script, without torch.
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(SOCKET)
        socket.send_fds(door, [b'.'], [0, 1, 2])
        door.sendall(json.dumps(dict(job, argv=words)).encode() + b'\n')
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: door.send(bytes([number])))
        code = int(door.recv(64) or 1)
    if code < 0:
        # Ended by a signal: so is this.
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == '__main__':
    main()
