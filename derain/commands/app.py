"""A page that restores photos in the browser on this machine: they stay here, and are soon deleted."""

import argparse
import errno
import importlib.util
import ipaddress
import logging
import os
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

PORTS = range(7860, 7960)
"""Tried one after the other where no port is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["default"],
        metavar="FILE",
        help="weights to choose from, as of derain restore, the first one chosen (default: the bundled model)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: only this machine); no login")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that browsers open the page by, such as that of a proxy; may be repeated",
    )
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="IP address or network of a proxy whose X-Forwarded-For header names the client; may be repeated",
    )
    parser.add_argument("--port", type=int, help=f"of the page (default: the first free one from {PORTS[0]} on)")
    parser.add_argument("--max-megabytes", type=int, default=40, help="largest file that is taken (default 40)")
    parser.add_argument("--max-megapixels", type=float, default=24.0, help="largest photo that is taken (default 24)")
    parser.add_argument(
        "--keep-metadata",
        action="store_true",
        help="keep a photo's time, camera and location (EXIF), which are otherwise removed",
    )


def run(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C, which is its good end."""
    if importlib.util.find_spec("gradio") is None:
        raise DerainError("gradio is not installed, which the page needs: pip install 'derain[app]'")
    if args.max_megabytes < 1:
        raise DerainError(f"--max-megabytes {args.max_megabytes}: must be at least 1")
    if not 0 < args.max_megapixels <= MEGAPIXELS:
        raise DerainError(f"--max-megapixels {args.max_megapixels:g}: must be above 0 and at most {MEGAPIXELS}")
    if args.host not in ANY_ADDRESS:
        host_name(args.host, "--host")
    for name in args.allow_host:
        host_name(name, "--allow-host")
    for proxy in args.trusted_proxy:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise DerainError(f"--trusted-proxy {proxy}: not an IP address or network, such as 10.0.0.2") from error
    try:
        with listen(args.host, args.port) as listening:
            _serve(args, listening)
    except KeyboardInterrupt:
        pass
    return 0


def _serve(args: argparse.Namespace, listening: socket.socket) -> None:
    keep_freed_memory()
    restorers = load_restorers(args.weights, args.device)
    with tempfile.TemporaryDirectory(prefix="derain-app-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}  # read on import
        import uvicorn

        from derain.commands.page import build

        service = RestorationService(restorers, folder, args.max_megapixels, keep_metadata=args.keep_metadata)
        page = build(service, args.max_megabytes, args.host, args.allow_host)
        server = uvicorn.Server(server_config(page, args.trusted_proxy))
        # Browsers hold connections open; that these are cut off at the end is no error.
        logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
        host = "localhost" if args.host in ANY_ADDRESS else args.host
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{listening.getsockname()[1]} restores photos in a browser; Ctrl-C ends it", flush=True)
        try:
            server.run(sockets=[listening])
        finally:
            service.close()


def server_config(page: Any, proxies: Sequence[str]) -> Any:
    """Return the settings of the web server; an X-Forwarded-For header is believed from these proxies only."""
    import uvicorn

    return uvicorn.Config(
        page,
        log_level="warning",
        timeout_graceful_shutdown=1,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
    )


def listen(host: str, port: int | None) -> socket.socket:
    """Takes a port at once, so that no other program can meanwhile.

    Raises:
        DerainError: If the port or the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for one in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, one), family=family)
        except (OSError, OverflowError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            raise DerainError(
                f"--host {host} --port {one}: cannot be served ({getattr(error, 'strerror', None) or error}); give an "
                "address of this machine, and a port from 1024 to 65535"
            ) from error
    if port is None:
        raise DerainError(f"ports {PORTS[0]} to {PORTS[-1]} are all in use; give another by --port")
    raise DerainError(f"--port {port}: in use by another program; give another, or leave it out")
