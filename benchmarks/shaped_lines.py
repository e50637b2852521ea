"""Join hosts of a benchmark to this one by lines that the kernel shapes: network namespaces, and tc's token buckets.

    site's namespace: 10.213.<n>.2 --- 10.213.<n>.1 :this host, which others reach as 10.213.0.1

Unlike a relay, that takes next to no processor time. Linux, root, the commands ip and tc (package iproute2).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

HOST = "10.213.0.1"
SLOW = 1.25e6
"""Bytes per second up to which a bucket is small, so that no burst passes for a part of the line."""
_PREFIX = "nnfedline"
_CLONE_NEWNET = 0x40000000


def can_be_shaped() -> bool:
    """Tell whether this machine lets us make namespaces and shape lines."""
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")):
        return False
    try:
        with shaped_lines(1, 125e6):
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def shaped_lines(number: int, bytes_per_s: float) -> Iterator[list[str]]:
    """Make so many namespaces, each behind a line of its own with that rate in each direction; yield their names."""
    with ExitStack() as stack:
        _run("ip", "address", "add", f"{HOST}/32", "dev", "lo")
        stack.callback(_run, "ip", "address", "del", f"{HOST}/32", "dev", "lo")
        yield [stack.enter_context(_shaped_line(index, bytes_per_s)) for index in range(1, number + 1)]


@contextmanager
def _shaped_line(index: int, bytes_per_s: float) -> Iterator[str]:
    name, here, there = f"{_PREFIX}{index}", f"10.213.{index}.1", f"10.213.{index}.2"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "line", "netns", name)
        _run("ip", "address", "add", f"{here}/30", "dev", name)
        _run("ip", "link", "set", name, "up")
        for command in (
            ("address", "add", f"{there}/30", "dev", "line"),
            ("link", "set", "line", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", here),
        ):
            _run("ip", "-n", name, *command)
        _shape("add", name, bytes_per_s)
        yield name
    finally:  # the namespace itself lasts as long as a process is in it; its line does not
        subprocess.run(("ip", "link", "del", name), check=False, capture_output=True)
        _run("ip", "netns", "del", name)


def change_rate(namespaces: Iterable[str], bytes_per_s: float) -> None:
    """Give these lines another rate in each direction; transfers on them go on with it."""
    for name in namespaces:
        _shape("change", name, bytes_per_s)


def _shape(action: str, name: str, bytes_per_s: float) -> None:
    burst, latency = ("512kb", "20ms") if bytes_per_s > SLOW else ("32kb", "200ms")
    shape = ("root", "tbf", "rate", f"{round(bytes_per_s * 8)}bit", "burst", burst, "latency", latency)
    _run("tc", "qdisc", action, "dev", name, *shape)
    _run("ip", "netns", "exec", name, "tc", "qdisc", action, "dev", "line", *shape)


def enter(namespace: str) -> None:
    """Move this thread, and threads that it starts from now on, into a namespace."""
    descriptor = os.open(Path("/var/run/netns") / namespace, os.O_RDONLY)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    finally:
        os.close(descriptor)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
