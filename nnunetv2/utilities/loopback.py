"""Know this machine by its names: the addresses that no proxy, no network and nobody else is in between of."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str | None) -> bool:
    """Tell whether a host of an address is this machine itself: localhost, 127.0.0.0/8 or ::1."""
    host = (host or "").lower().rstrip(".")
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
