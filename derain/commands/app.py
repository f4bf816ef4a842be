"""Serve a page that restores photos in the browser, on this machine."""

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
from derain.memory import keep_freed_memory
from derain.methods.catalog import use_method

PORTS = range(7860, 7960)
"""Ports to try if none is given."""


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
    """Serve a page that restores photos in the browser, until Ctrl-C.

    Photos are processed on this machine and deleted after 30 minutes.

    Args:
        weights: Weights to choose from, as for derain restore; the first is selected at the beginning.
        method: Classes of the weights that are of methods outside derain, such as my_method.MyModule.
        device: Device: auto, cpu, cuda, cuda:N or mps.
        host: Address to serve at; there is no login.
        allow_host: Further host names under which browsers open the page, such as that of a proxy.
        trusted_proxy: IP addresses or networks of proxies whose X-Forwarded-For header names the client.
        port: Port of the page (default: the first free one from 7860).
        max_megabytes: Largest file that is accepted.
        max_megapixels: Largest photo that is accepted.
        keep_metadata: Keep time, camera and location (EXIF) of photos, which are removed otherwise.

    Raises:
        DerainError: If gradio is not installed, an option is wrong, or the port is in use.
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
        with listen(host, port) as listening:
            keep_freed_memory()
            restorers = load_restorers(weights, device)
            with tempfile.TemporaryDirectory(prefix="derain-app-", ignore_cleanup_errors=True) as temporary:
                folder = Path(temporary).resolve()
                service = RestorationService(restorers, folder, max_megapixels, keep_metadata=keep_metadata)
                serve(service, listening, max_megabytes, host, allow_host, trusted_proxy)
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
            raise DerainError(f"--trusted-proxy {proxy}: expected an IP address or network, as 10.0.0.2") from error


def serve(
    service: RestorationService,
    listening: socket.socket,
    max_megabytes: int,
    host: str,
    allowed_hosts: Sequence[str],
    proxies: Sequence[str],
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        service: Restores uploaded photos.
        listening: Socket to serve at.
        max_megabytes: Largest file that is accepted.
        host: Address of the socket.
        allowed_hosts: Further host names of the page.
        proxies: Trusted proxies.
    """
    variables = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(service.folder)}
    os.environ |= variables  # gradio reads them when it is imported
    import uvicorn

    from derain.commands.page import build

    page = build(service, max_megabytes, host, allowed_hosts)
    name = "localhost" if host in ANY_ADDRESS else host
    address = f"[{name}]" if ":" in name else name

    class Server(uvicorn.Server):
        """Prints the address once the page is served; closes the page at SIGHUP as at Ctrl-C and SIGTERM."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            hang_up = getattr(signal, "SIGHUP", None)  # absent on Windows; ignored under nohup
            if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:
                signal.signal(hang_up, self.handle_exit)
            port = listening.getsockname()[1]
            print(f"http://{address}:{port} restores photos in a browser; Ctrl-C stops it", flush=True)

    server = Server(server_config(page, proxies))
    # Browsers keep connections open: closing them at the end is not an error.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    try:
        server.run(sockets=[listening])
    finally:
        service.close()


def server_config(page: Any, proxies: Sequence[str]) -> Any:
    """Return the settings of the web server, which trusts X-Forwarded-For headers of these proxies only."""
    import uvicorn

    return uvicorn.Config(
        page,
        log_level="warning",
        timeout_graceful_shutdown=1,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
    )


def listen(host: str, port: int | None) -> socket.socket:
    """Open a listening socket early, so that no other program can use the port while weights are loaded.

    Args:
        host: Address.
        port: Port; None for the first free one.

    Raises:
        DerainError: If the port is in use, or the address is not of this machine.
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
                f"--host {host} --port {number}: cannot be served ({reason}); give an address of this machine, and a "
                "port from 1024 to 65535"
            ) from error
    if port is None:
        raise DerainError(f"ports {PORTS[0]} to {PORTS[-1]} are in use; give another port by --port")
    raise DerainError(f"--port {port}: in use by another program; give another port, or omit it")
