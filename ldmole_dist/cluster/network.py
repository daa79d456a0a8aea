"""This host's network interfaces."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def interfaces() -> dict[str, str]:
    """IPv4 address of every interface that has one, by name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(s, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_with(address: str) -> str | None:
    """Name of the interface that has an address."""
    return next((name for name, own in interfaces().items() if own == address), None)


def address_towards(host: str) -> str:
    """This host's own address on the way to another; nothing is sent.

    Raises:
        OSError: if the name cannot be resolved or there is no way to it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, 9))  # any port
        return str(s.getsockname()[0])
