"""Checks of host names for the page of ``derain app``."""

import ipaddress
import re
from urllib.parse import urlsplit

from derain.errors import DerainError

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
"""Host names that always mean this machine."""

ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
"""Values of ``--host`` that mean all addresses of this machine."""

LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"{LABEL}(\.{LABEL})*")
"""Host name: labels separated by dots, in lower case."""


def host_name(text: str, option: str) -> str:
    """Return a host name or IP address in the form that `host_of` returns for a browser's Host header.

    Names are converted to lower-case ASCII (IDNA); IPv6 addresses are shortened and lose their brackets.

    Args:
        text: Name or IP address.
        option: Option that contains the text, for the error message.

    Raises:
        DerainError: If ``text`` is not a host name, or has further parts such as a scheme or port.

    Example:
        >>> host_name("Box.lan", "--host"), host_name("[::0:1]", "--host"), host_name("münchen.de", "--host")
        ('box.lan', '::1', 'xn--mnchen-3ya.de')
    """
    without_brackets = text.removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(without_brackets))
    except ValueError:
        pass
    try:
        name = text.lower().encode("idna").decode("ascii")
    except UnicodeError:  # raised for empty and long labels too
        name = ""
    if not NAME.fullmatch(name):
        raise DerainError(
            f"{option} {text}: not a host name; give a name or an IP address without scheme, port, wildcard or final "
            "dot, such as photos.example.org"
        )
    return name


def host_of(netloc: str) -> str:
    """Return the host of ``host`` or ``host:port``, in lower case and without brackets; empty if there is none.

    Example:
        >>> host_of("Box.lan:7860"), host_of("[::1]:7860"), host_of("[::1")
        ('box.lan', '::1', '')
    """
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""
