"""Data sets of the Hugging Face hub: list their files with checksums, and download them with huggingface_hub."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from derain.data.remote_files import Listing, RemoteFile
from derain.errors import DerainError

UNUSED = (".gitattributes",)
"""Files of a repository that are not part of its data set."""

WORKERS = 8
"""Number of files that are downloaded at the same time."""


def list_repository(repository: str, revision: str = "main", patterns: Sequence[str] = ()) -> Listing:
    """Return the files of a data set on the hub, with their sizes and checksums.

    Args:
        repository: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        patterns: Glob patterns of the files; all files by default.

    Raises:
        DerainError: If the hub cannot be reached, or the repository does not exist, requires access, or has no such
            revision or files.
    """
    with _hub_errors(repository):
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

        api = HfApi()
        info = api.dataset_info(repository, revision=revision)
        entries = api.list_repo_tree(repository, recursive=True, revision=info.sha, repo_type="dataset")
        found = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path not in UNUSED]
        selected = list(filter_repo_objects(found, allow_patterns=list(patterns) or None, key=lambda f: f.path))
        licence = getattr(info.card_data, "license", None) or ""
        if licence == "other":  # the card then names it separately
            licence = getattr(info.card_data, "license_name", None) or licence
    if not found:
        raise DerainError(f"hub:{repository}: contains no files; use another source (--from)")
    if not selected:
        folders = sorted({entry.path.partition("/")[0] for entry in found})[:8]
        raise DerainError(
            f"hub:{repository}: no files {' '.join(patterns)}; contains {', '.join(folders)}; "
            f"--from hub:{repository} fetches all of it"
        )
    files = []
    for entry in selected:
        sha256 = entry.lfs.sha256 if entry.lfs else ""
        files.append(RemoteFile(entry.path, entry.size, sha256, "" if sha256 else entry.blob_id))
    licence = licence if isinstance(licence, str) else ", ".join(licence)
    return Listing(f"{_endpoint()}/datasets/{repository}", tuple(files), licence, str(info.sha))


def download_repository(
    repository: str, commit: str, patterns: Sequence[str], folder: Path, advance: Callable[[int], None]
) -> None:
    """Download files of a data set; complete files from an earlier call are kept.

    Args:
        repository: ``OWNER/NAME``.
        commit: Commit, 40 hexadecimal digits.
        patterns: Glob patterns of the files; empty for all files.
        folder: Download folder; huggingface_hub adds a folder ``.cache``.
        advance: Called with the number of bytes of each new block; negative if a file starts again.

    Raises:
        DerainError: If the hub cannot be reached or refuses.
        OSError: If a file cannot be written.
    """
    with _hub_errors(repository):
        from huggingface_hub import constants, snapshot_download

        stopped = Event()
        # In a thread of its own, since an interrupted snapshot_download waits until the files in progress are complete.
        with ThreadPoolExecutor(1) as thread:
            download = thread.submit(
                snapshot_download,
                repository,
                repo_type="dataset",
                revision=commit,
                local_dir=folder,
                allow_patterns=list(patterns) or None,
                ignore_patterns=list(UNUSED),
                max_workers=WORKERS,
                tqdm_class=_silent_bar(advance, stopped),
            )
            try:
                download.result()
            except KeyboardInterrupt:
                stopped.set()
                offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # prevents further attempts
                try:
                    wait([download])
                finally:
                    constants.HF_HUB_OFFLINE = offline
                raise


def _silent_bar(advance: Callable[[int], None], stopped: Event) -> Any:
    """Return a class of invisible progress bars for huggingface_hub.

    Args:
        advance: Called with numbers of downloaded bytes.
        stopped: Once it is set, the next update raises `InterruptedError`, which ends the download.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        """Invisible bar. Of all bars of `snapshot_download`, only the one that counts bytes on disk reports them."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: int | float | None = 1) -> None:
            if stopped.is_set():
                raise InterruptedError
            if self.counts_bytes:
                advance(int(n or 0))

    return Bar


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Import huggingface_hub without telemetry, silence its warnings, and turn its errors into a `DerainError`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        XetDownloadError,
    )
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]
    from huggingface_hub.utils import logging as hub_logging

    source = f"hub:{repository}"
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns about each attempt of each file
    try:
        yield
    except HFValidationError as error:
        raise DerainError(f"{source}: not an id on the Hugging Face hub; expected hub:OWNER/NAME") from error
    except GatedRepoError as error:
        page = f"{_endpoint()}/datasets/{repository}"
        raise DerainError(f"{source}: requires access; ask for it at {page}, then run: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise DerainError(
            f"{source}: no such data set at {_endpoint()}, or a private one; check the name, or run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise DerainError(f"{source}: no such branch, tag or commit; omit it for the main branch") from error
    except OfflineModeIsEnabled as error:
        raise DerainError(f"{source}: HF_HUB_OFFLINE is set; unset it to fetch data sets") from error
    except (NetworkError, XetDownloadError, OSError) as error:
        is_local = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
        if is_local:  # a full disk, a folder without permission
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else type(error).__name__
        raise DerainError(
            f"{source}: cannot be fetched from {_endpoint()} ({reason}); check the network and run the same command "
            "again; what has arrived is kept"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
