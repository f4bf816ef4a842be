"""Host names of the page of ``derain app``."""

import ipaddress
import re
from urllib.parse import urlsplit

from derain.errors import DerainError

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine."""

ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
"""Values of ``--host`` that mean all addresses of this machine."""

LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"{LABEL}(\.{LABEL})*")


def host_name(text: str, option: str) -> str:
    """Return a host name in the form in which browsers send it: lower case, IPv6 short and without brackets.

    Args:
        text: Name or address.
        option: Option that the name was given with, for the message.

    Raises:
        DerainError: If it is not a host name alone, but has a port, a scheme or a wildcard.

    Example:
        >>> host_name("Box.lan", "--host"), host_name("[::0:1]", "--host"), host_name("münchen.de", "--host")
        ('box.lan', '::1', 'xn--mnchen-3ya.de')
    """
    bare = text.removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        pass
    try:
        name = text.lower().encode("idna").decode("ascii")
    except UnicodeError:  # also of labels that are empty or too long
        name = ""
    if not NAME.fullmatch(name):
        raise DerainError(
            f"{option} {text}: not a host name; expected a name or an IP address alone, without scheme, port, wildcard "
            "or dot at the end, such as photos.example.org"
        )
    return name


def host_of(netloc: str) -> str:
    """Return the host of ``name:port``, empty if there is none.

    Example:
        >>> host_of("Box.lan:7860"), host_of("[::1]:7860"), host_of("[::1")
        ('box.lan', '::1', '')
    """
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""
