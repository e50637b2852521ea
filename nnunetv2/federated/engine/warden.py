"""Run a command that ends with the process that wanted it: python warden.py LOCK COMMAND...

The parent keeps this process's standard input open for as long as the command may run. When it closes it, or dies of
whatever cause, the command and all its children are ended. Until the last of them is gone, the lock file is held: so
no two jobs train at one site at the same time.

Needs the standard library only, since the parent may run in another environment than the command.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 10.0
"""Between asking a command to end and killing it."""
IS_LOCKED = 75
"""Exit status where another command holds the lock: EX_TEMPFAIL."""


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    lock = os.open(argv[0], os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return IS_LOCKED
    process = subprocess.Popen(argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(lock,))
    threading.Thread(target=_end_with_parent, args=(process,), daemon=True).start()
    status = process.wait()
    with suppress(ProcessLookupError):  # whatever it has left behind
        os.killpg(process.pid, signal.SIGKILL)
    return 128 - status if status < 0 else 1 if status == IS_LOCKED else status


def _end_with_parent(process: subprocess.Popen[bytes]) -> None:
    """End the command's group of processes once standard input is closed."""
    while os.read(0, 1):
        pass
    for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
