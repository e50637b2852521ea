"""Memory that the coordinator frees goes back to the system."""

import platform

from nnunetv2.federated.coordinator import malloc


def test_glibc_is_told_and_others_are_left_alone(monkeypatch):
    assert malloc.return_what_is_freed() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert not malloc.return_what_is_freed()
