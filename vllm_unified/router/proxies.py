"""Who the client is when a proxy in front of the router speaks for it."""

import functools
import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
FORWARDED_FOR = b"x-forwarded-for"
LONGEST_MEMORY = 4096


class TrustedProxies:
    """What others than these say of their clients is not believed: anybody can write a header."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._trusts = functools.lru_cache(LONGEST_MEMORY)(self._looked_up)

    def client_of(self, peer: str, forwarded_for: bytes) -> str:
        """`peer`: the address of the connection; `forwarded_for`: the last header of that name.

        Each proxy puts whom it heard at the end, so the first one from there that is no proxy of ours is the client.
        """
        client = peer
        for said in reversed(forwarded_for.split(b",")):
            if not self._trusts(client):
                break
            address = _address(said.strip().decode("latin-1"))
            if address is None or b"%" in said:  # the name of an interface, which may be any text
                break
            client = str(address)
        return client

    def _looked_up(self, peer: str) -> bool:
        address = _address(peer)
        return address is not None and any(address in network for network in self._networks)


def is_loopback(peer: str) -> bool:
    address = _address(peer)
    return address is not None and address.is_loopback


def _address(text: str) -> Address | None:
    """An IPv4 address that came over an IPv6 socket is one of IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
