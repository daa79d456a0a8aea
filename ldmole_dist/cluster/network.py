"""Network interfaces of this host."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # ioctl "get interface address" of linux/sockios.h


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one, by interface name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(s, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # the interface has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(reply[20:24])  # ifreq.ifr_addr.sin_addr
    return found


def interface_with(address: str) -> str | None:
    """Return the name of the interface that has the IPv4 address `address`; None if no interface has it."""
    return next((name for name, own in interfaces().items() if own == address), None)


def address_towards(host: str) -> str:
    """Return the IPv4 address of this host on the route to another host; no packet is sent.

    Raises:
        OSError: if the name cannot be resolved or there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((host, 9))  # connecting a UDP socket only selects the route; any port will do
        return str(s.getsockname()[0])
