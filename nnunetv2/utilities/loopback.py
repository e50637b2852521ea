"""Know the addresses of this machine itself.

No proxy, no network and nobody else is in between.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


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


def is_on_this_machine(url: str) -> bool:
    """Tell whether an address is of this machine, so that no proxy belongs in between."""
    return is_loopback(urlsplit(url).hostname)
