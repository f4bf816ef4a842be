"""A page that restores photos in the browser on this machine: they stay here, and are soon deleted."""

import argparse
import dataclasses
import errno
import importlib.util
import ipaddress
import logging
import os
import re
import shlex
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from derain.commands.hosts import ANY_ADDRESS, host_name
from derain.commands.page_files import KEPT
from derain.data.rain import PRESETS, Rain, add_rain, sample_rain
from derain.errors import DerainError
from derain.image_sources import MEGAPIXELS
from derain.images import Pixels, image_size, read_photo, to_bytes, write_image
from derain.memory import give_back_blocks, keep_large_blocks
from derain.restoration import Restorer

PORTS = range(7860, 7960)
"""Tried one after the other where no port is given."""

SHOWN, SMALL = 2048, 640
"""Longest side of a picture and of a map on the page, in pixels; what is downloaded has the photo's size."""


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
    keep_large_blocks()
    restorers = load(args.weights, args.device)
    with tempfile.TemporaryDirectory(prefix="derain-app-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}  # read on import
        import uvicorn

        from derain.commands.page import build

        studio = Studio(restorers, folder, args.max_megapixels, keep_metadata=args.keep_metadata)
        page = build(studio, args.max_megabytes, args.host, args.allow_host)
        server = uvicorn.Server(server_config(page, args.trusted_proxy))
        # Browsers hold connections open; that these are cut off at the end is no error.
        logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
        host = "localhost" if args.host in ANY_ADDRESS else args.host
        address = f"[{host}]" if ":" in host else host
        print(f"http://{address}:{listening.getsockname()[1]} restores photos in a browser; Ctrl-C ends it", flush=True)
        try:
            server.run(sockets=[listening])
        finally:
            studio.close()


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


def load(names: Sequence[str], device: str) -> dict[str, Restorer]:
    """Loads all weights, each once; the keys are what people choose by.

    Raises:
        DerainError: If weights cannot be used.
    """
    restorers = {name: Restorer(name, device=device) for name in dict.fromkeys(names)}
    short = {name: Path(name).stem for name in restorers}
    alike = len(set(short.values())) < len(short)
    methods = {name: type(one.method).__name__.removesuffix("Module") for name, one in restorers.items()}
    return {f"{name if alike else short[name]} · {methods[name]}": one for name, one in restorers.items()}


class Restored(NamedTuple):
    """What the page shows of a restored photo.

    Attributes:
        before: The rainy photo, no larger than the page shows.
        after: The same without rain.
        download: PNG of the photo's size, depth, transparency and profile.
        maps: Small pictures of what was taken away, and of the method's maps, by name.
        facts: What else there is to tell, by name.
    """

    before: Path
    after: Path
    download: Path
    maps: dict[str, Pixels]
    facts: dict[str, Any]


def _never() -> bool:
    return False


class Studio:
    """Restores the photos that people give, one after the other, each with the weights that they choose.

    Args:
        restorers: By the name that people choose.
        folder: Where the pictures go.
        max_megapixels: Largest photo that is taken.
        keep_metadata: Whether restored photos keep their EXIF.
    """

    def __init__(
        self,
        restorers: dict[str, Restorer],
        folder: Path,
        max_megapixels: float = 24.0,
        *,
        keep_metadata: bool = False,
    ) -> None:
        self.restorers, self.folder, self.max_megapixels = restorers, folder, max_megapixels
        self.keep_metadata = keep_metadata
        self._turn = threading.Lock()  # memory is measured for one photo at a time
        self._closed = threading.Event()
        self._abandoned: Callable[[], bool] = _never
        for restorer in restorers.values():
            for part in restorer.method.modules():
                part.register_forward_pre_hook(self._go_on)

    def restore(
        self,
        upload: Path,
        name: str,
        model: str,
        amount: float = 0.0,
        seed: int = 0,
        abandoned: Callable[[], bool] = _never,
    ) -> Restored:
        """Restores a photo, after letting it rain on it where that is wanted.

        Args:
            upload: The file.
            name: What it is called where it comes from.
            model: One of the restorers.
            amount: Of synthetic rain, 0 (none) to 100.
            seed: Of that rain.
            abandoned: Asked between layers whether nobody waits for the photo any more, which ends it.

        Raises:
            DerainError: If the file is no photo, is too large, or memory does not suffice; in words for the page.
        """
        name = Path(name).name
        self.check(upload, name)
        if model not in self.restorers:
            raise DerainError(f"There is no model {model!r} here; choose {' or '.join(self.restorers)}.")
        restorer = self.restorers[model]
        with self._turn:
            start = time.perf_counter()
            self._abandoned = abandoned
            try:
                self._go_on()
                photo = read_photo(upload)
                photo = photo if self.keep_metadata else photo.without_metadata()
                rainy = photo.rgb if amount <= 0 else rain_on(photo.rgb, amount, seed)
                derained, maps, perceived = restorer.explain(rainy, str(upload))
            except DerainError as error:
                raise DerainError(f"{name}: {str(error).removeprefix(f'{upload}: ')}") from error
            seconds = time.perf_counter() - start
            folder = self.folder / uuid.uuid4().hex
            stem = re.sub(r"[^\w.-]+", "-", Path(name).stem)[:50]
            download = folder / f"{stem}-derained.png"
            photo.write(download, derained)
            before, after = folder / "before.jpg", folder / "after.jpg"
            write_image(before, shrunk(rainy, SHOWN), subsampling=0)
            write_image(after, shrunk(derained, SHOWN), subsampling=0)
            taken = np.abs(rainy - derained).mean(2)
            maps = {"taken away": taken / max(0.1, float(np.percentile(taken, 99.5))), **maps}
            small = {key: shrunk(np.repeat(one[..., None], 3, 2), SMALL) for key, one in maps.items()}
            give_back_blocks()
        height, width = derained.shape[:2]
        facts = {"model": model, "size": f"{width:,} × {height:,} pixels", "time": f"{seconds:.1f} s", **perceived}
        if amount > 0:
            facts["synthetic rain"] = f"{amount:g} %, seed {seed}"
        return Restored(before, after, download, small, facts)

    def close(self) -> None:
        """Ends the restoration that runs, within one layer of its network, and waits for that; there are no others."""
        self._closed.set()
        with self._turn:
            pass

    def _go_on(self, *_: Any) -> None:
        if self._closed.is_set():
            raise DerainError("the page has ended")
        if self._abandoned():
            raise DerainError("nobody waits for it any more")

    def check(self, upload: Path, name: str) -> None:
        """Refuses what is no photo or too large, from the head of the file alone.

        Args:
            upload: The file.
            name: What it is called where it comes from.

        Raises:
            DerainError: In words for the page.
        """
        if not upload.is_file():
            raise DerainError(
                f"{name} is no longer here: photos are deleted after {KEPT} minutes. Please add it again."
            )
        if upload.stat().st_size == 0:
            raise DerainError(f"{name} is empty: it has 0 bytes. Please try another copy of it.")
        try:
            height, width = image_size(upload)
        except DerainError as error:
            raise DerainError(f"{name}: {str(error).removeprefix(f'{upload}: ')}") from error
        megapixels = width * height / 1e6
        if megapixels > self.max_megapixels:
            raise DerainError(
                f"{name} has {megapixels:.4g} megapixels ({width:,} × {height:,}), and this page takes up to "
                f"{self.max_megapixels:g}. The command line takes it: `derain restore {shlex.quote(name)} derained.png`"
            )


def rain_on(rgb: NDArray[np.float32], amount: float, seed: int) -> NDArray[np.float32]:
    """Lets it rain on a photo; the same amount and seed give the same pixels.

    Args:
        rgb: ``(h, w, 3)`` in [0, 1].
        amount: Above 0, to 100.
        seed: Where and how the streaks fall.
    """
    rainy = add_rain(to_bytes(rgb), rain_of(amount, seed), np.random.default_rng(seed))
    return rainy.astype(np.float32) / np.float32(255)


def rain_of(amount: float, seed: int) -> Rain:
    """The rain of an amount: at thirds of the way a light, a medium and a heavy one, and mixtures between them.

    Example:
        >>> rain_of(0.0, 7).density, rain_of(100.0, 7) == sample_rain(*PRESETS["heavy"], np.random.default_rng(7))
        (0.0, True)
    """
    drawn = [dataclasses.asdict(sample_rain(*limits, np.random.default_rng(seed))) for limits in PRESETS.values()]
    stops = [drawn[0] | {"density": 0.0, "veil": 0.0}, *drawn]
    way = np.linspace(0, 100, len(stops))
    mixed = {name: float(np.interp(amount, way, [stop[name] for stop in stops])) for name in stops[0]}
    return Rain(**{name: round(one) if isinstance(drawn[0][name], int) else one for name, one in mixed.items()})  # type: ignore[arg-type]


def shrunk(picture: NDArray[np.float32], longest: int) -> Pixels:
    """Colours in [0, 1] as pixels, no side longer than told.

    Example:
        >>> shrunk(np.zeros((10, 40, 3), np.float32), 20).shape
        (5, 20, 3)
    """
    pixels = to_bytes(picture)
    scale = longest / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
