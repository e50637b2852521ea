"""This machine, by all its names."""

import pytest

from nnunetv2.utilities.loopback import is_loopback


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.2", "127.255.255.254", "::1", "::ffff:127.0.0.3"],
)
def test_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "128.0.0.1",
        "localhost.example",
        "127.0.0.1.example",
        "example",
        "::ffff:10.0.0.1",
    ],
)
def test_others(host):
    assert not is_loopback(host)
