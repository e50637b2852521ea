import subprocess
import sys

import pytest

from nnunetv2.utilities.file_lock import lock_file

HOLD = """
import sys
from nnunetv2.utilities.file_lock import lock_file
file = open(sys.argv[1], "a+b")
lock_file(file.fileno())
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_file_is_locked_until_its_holder_dies(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder, path.open("a+b") as file:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError):
            lock_file(file.fileno())
        holder.kill()
        holder.wait()
        lock_file(file.fileno())
