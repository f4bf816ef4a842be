"""Serve a web page that removes rain from photos, on this machine."""

import errno
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derain.commands.hosts import ANY_ADDRESS, host_name
from derain.commands.service import RestorationService, load_restorers
from derain.errors import DerainError
from derain.image_sources import MEGAPIXELS
from derain.methods.catalog import use_method

PORTS = range(7860, 7960)
"""Ports that are tried in order if none is given."""


def app(
    *,
    weights: Sequence[str] = ("default",),
    method: Sequence[str] = (),
    device: str = "auto",
    host: str = "127.0.0.1",
    allow_host: Sequence[str] = (),
    trusted_proxy: Sequence[str] = (),
    port: int | None = None,
    max_megabytes: int = 40,
    max_megapixels: float = 24.0,
    keep_metadata: bool = False,
) -> int:
    """Serve a web page that removes rain from photos, until Ctrl-C.

    Photos are processed on this machine and deleted after 30 minutes.

    Args:
        weights: Weights that the page offers, as for derain restore; the first is preselected.
        method: Classes of methods outside derain that the weights belong to, such as my_method.MyModule.
        device: Device: auto, cpu, cuda, cuda:N or mps.
        host: Address to listen on; the page has no login.
        allow_host: Additional host names of the page, such as the name of a reverse proxy.
        trusted_proxy: IP addresses or networks of proxies whose X-Forwarded-For header is trusted.
        port: Port to listen on (default: the first free port from 7860 to 7959).
        max_megabytes: Maximum size of an uploaded file in MiB.
        max_megapixels: Maximum size of a photo in megapixels, at most 178.
        keep_metadata: Keep the EXIF metadata of photos (time, camera, location), which is removed by default.

    Raises:
        DerainError: If gradio is not installed, an option is wrong, weights cannot be loaded, or the port is in use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise DerainError("gradio is not installed; the page needs it: pip install 'derain[app]'")
    if max_megabytes < 1:
        raise DerainError(f"--max-megabytes {max_megabytes}: must be at least 1")
    if not 0 < max_megapixels <= MEGAPIXELS:
        raise DerainError(f"--max-megapixels {max_megapixels:g}: must be above 0 and at most {MEGAPIXELS}")
    _check_hosts(host, allow_host, trusted_proxy)
    for name in method:
        use_method(name)
    try:
        with listen(host, port) as listener:  # before weights are loaded, so that an error is reported at once
            restorers = load_restorers(weights, device)
            with tempfile.TemporaryDirectory(prefix="derain-app-", ignore_cleanup_errors=True) as temporary:
                folder = Path(temporary).resolve()
                service = RestorationService(restorers, folder, max_megapixels, keep_metadata=keep_metadata)
                serve(service, listener, max_megabytes, host, allow_host, trusted_proxy)
    except KeyboardInterrupt:
        pass
    return 0


def _check_hosts(host: str, allowed_hosts: Sequence[str], proxies: Sequence[str]) -> None:
    if host not in ANY_ADDRESS:
        host_name(host, "--host")
    for name in allowed_hosts:
        host_name(name, "--allow-host")
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise DerainError(
                f"--trusted-proxy {proxy}: expected an IP address or network, such as 10.0.0.2 or 10.0.0.0/8"
            ) from error


def serve(
    service: RestorationService,
    listener: socket.socket,
    max_megabytes: int,
    host: str,
    allowed_hosts: Sequence[str],
    proxies: Sequence[str],
) -> None:
    """Serve the page until SIGINT (Ctrl-C), SIGTERM or SIGHUP.

    Args:
        service: Restores uploaded photos; closed when the server stops.
        listener: Listening socket.
        max_megabytes: Maximum size of an uploaded file in MiB.
        host: Address that the socket listens on.
        allowed_hosts: Additional host names of the page.
        proxies: IP addresses or networks of trusted proxies.
    """
    variables = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(service.folder)}
    os.environ |= variables  # read when gradio is imported
    import uvicorn

    from derain.commands.page import build

    page = build(service, max_megabytes, host, allowed_hosts)
    name = "localhost" if host in ANY_ADDRESS else host
    address = f"[{name}]" if ":" in name else name

    class Server(uvicorn.Server):
        """Prints the address once the page is served; SIGHUP stops the server as SIGINT and SIGTERM do."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            hang_up = getattr(signal, "SIGHUP", None)  # absent on Windows; ignored under nohup
            if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:
                signal.signal(hang_up, self.handle_exit)
            port = listener.getsockname()[1]
            print(f"http://{address}:{port} (open it in a browser; Ctrl-C stops the server)", flush=True)

    server = Server(server_config(page, proxies))
    # Browsers keep connections open; uvicorn logs an error when it closes them at shutdown.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    try:
        server.run(sockets=[listener])
    finally:
        service.close()


def server_config(page: Any, proxies: Sequence[str]) -> Any:
    """Return the settings of the web server, which trusts X-Forwarded-For headers only from ``proxies``."""
    import uvicorn

    return uvicorn.Config(
        page,
        log_level="warning",
        timeout_graceful_shutdown=1,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
    )


def listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket.

    Args:
        host: IP address or host name of this machine.
        port: Port from 0 (any free port) to 65535; None for the first free port in ``PORTS``.

    Raises:
        DerainError: If the port or all of ``PORTS`` are in use, the port is not permitted, or the address does not
            belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, number), family=family)
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            reason = getattr(error, "strerror", None) or error
            raise DerainError(
                f"--host {host} --port {number}: cannot listen ({reason}); give an address of this machine, and a "
                "port from 1024 to 65535"
            ) from error
    if port is None:
        raise DerainError(f"ports {PORTS[0]} to {PORTS[-1]}: all in use; give another port by --port")
    raise DerainError(f"--port {port}: in use by another program; give another port, or omit it")
