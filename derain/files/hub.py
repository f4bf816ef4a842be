"""Models and weights of the Hugging Face hub: find or fetch them, hash them, check that they are complete."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from derain.errors import DerainError

log = logging.getLogger("derain")

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Possible names of the weights file of a model; the first is preferred."""


@dataclass(frozen=True)
class HubModelKind:
    """Kind of model on the hub, such as CLIP, with the advice of its error messages.

    Attributes:
        kind: Name of the kind in messages.
        tokenizer: Alternative sets of tokenizer files, of which a model needs one.
        option: Command-line option that names the model.
        naming_advice: End of the error about a name that is neither a directory nor an id: what else the user can do,
            such as ``set DERAIN_CLIP``.
        download_advice: End of the error about a model that cannot be fetched, likewise.
    """

    kind: str
    tokenizer: tuple[tuple[str, ...], ...]
    option: str
    naming_advice: str
    download_advice: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, other than weights, that a model may have and that are fetched."""
        return ("config.json", "preprocessor_config.json", *(file for group in self.tokenizer for file in group))

    def folder(self, name: str) -> Path:
        """Return the directory of a model; fetch the model from the hub if it is not on disk.

        Args:
            name: Id on the hub (``OWNER/NAME``) or a directory.

        Raises:
            DerainError: If files are missing from the directory, or the model can be neither found nor fetched.
        """
        path = Path(name).expanduser()
        if not path.is_dir():
            return self._from_hub(name)
        if not self._complete(path):
            tokenizer = " or ".join(" and ".join(group) for group in self.tokenizer)
            raise DerainError(
                f"{path}: no {self.kind} in this directory; expected config.json, preprocessor_config.json, "
                f"{tokenizer}, {' or '.join(WEIGHTS)}; name another directory"
            )
        return path

    def sha256(self, folder: Path) -> str:
        """Return a SHA-256 over the names and contents of the files of weights, configuration and tokenizer.

        Args:
            folder: Directory of the model.
        """
        digest = hashlib.sha256()
        for path in (_weights(folder), *(folder / name for name in self.files)):
            if path and path.is_file():
                with path.open("rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _complete(self, folder: Path) -> bool:
        names = {path.name for path in folder.iterdir()}
        has_tokenizer = any(set(group) <= names for group in self.tokenizer)
        has_configuration = {"config.json", "preprocessor_config.json"} <= names
        return has_configuration and has_tokenizer and _weights(folder) is not None

    def _from_hub(self, name: str) -> Path:
        """Return the directory of a model in the hub's cache; log name, size and source before fetching the model."""
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
        from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
            if self._complete(folder):
                return folder  # otherwise, a download was interrupted; it is resumed below
        except HFValidationError as error:
            raise DerainError(
                f"{self.option} {name}: neither a directory nor an id on the Hugging Face hub like OWNER/NAME; "
                f"give one, or {self.naming_advice}"
            ) from error
        except LocalEntryNotFoundError:
            pass
        try:
            sizes = {f.rfilename: f.size or 0 for f in HfApi().model_info(name, files_metadata=True).siblings or ()}
            weights_files = [file for file in WEIGHTS if file in sizes][:1]
            wanted_files = [*weights_files, *(file for file in self.files if file in sizes)]
            megabytes = sum(sizes[file] for file in wanted_files) / 1e6
            source, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
            log.info("fetching %s %s (%.0f MB) from %s into %s", self.kind, name, megabytes, source, cache)
            folder = Path(snapshot_download(name, allow_patterns=wanted_files))
        except (NetworkError, LocalEntryNotFoundError, OSError) as error:
            raise DerainError(
                f"{self.kind} {name}: not in {constants.HF_HUB_CACHE} and cannot be fetched from {constants.ENDPOINT} "
                f"({type(error).__name__}); fetch it beforehand where there is a network by `hf download {name}` and "
                f"copy that folder, or {self.download_advice}"
            ) from error
        if not self._complete(folder):
            raise DerainError(
                f"{self.kind} {name}: incomplete at {constants.ENDPOINT}; expected all files of a {self.kind}; use "
                "another name"
            )
        return folder


METHOD_FILE = "model.safetensors"
"""Name of a method's weights file on the hub, as ``save_pretrained`` writes it."""


def fetch_weights(
    name: str,
    file: str = METHOD_FILE,
    *,
    licence: str = "see its page",
    sha256: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Path:
    """Return the path of a weights file of the hub; fetch the file if it is not on disk.

    Size, source and licence are logged before a download.

    Args:
        name: ``OWNER/NAME``.
        file: File of the repository; by default the one that ``push_to_hub`` writes.
        licence: Licence of the weights, for the log.
        sha256: SHA-256 that the file must have, in lower-case hexadecimal digits; by default the file is not verified.
        revision: Branch, tag or commit; by default the main branch.
        cache_dir: Folder for files of the hub; by default the cache of huggingface_hub.
        token: Access token for private repositories.

    Raises:
        DerainError: If the name is invalid, or the file can be neither found nor fetched, or has another SHA-256.
    """
    path = _find_or_fetch(name, file, licence, revision, cache_dir, token)
    if sha256 is not None:
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != sha256:
            raise DerainError(
                f"{path}: SHA-256 {found}; expected {sha256} of hub:{name}; delete the file, and try again"
            )
    return path


def _find_or_fetch(
    name: str, file: str, licence: str, revision: str | None, cache_dir: str | None, token: str | None
) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

    download = partial(hf_hub_download, name, file, revision=revision, cache_dir=cache_dir, token=token)
    try:
        return Path(download(local_files_only=True))
    except HFValidationError as error:
        raise DerainError(f"hub:{name}: not an id on the Hugging Face hub; expected hub:OWNER/NAME") from error
    except LocalEntryNotFoundError:
        pass
    source, cache = constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
        sizes = {f.rfilename: f.size or 0 for f in info.siblings or ()}
        if file not in sizes:
            raise DerainError(
                f"hub:{name}: {source} has no file {file} in this repository; use one that push_to_hub wrote"
            )
        log.info(
            "fetching %s of %s (%.1f MB, licence: %s) from %s into %s",
            file,
            name,
            sizes[file] / 1e6,
            licence,
            source,
            cache,
        )
        return Path(download())
    except (NetworkError, LocalEntryNotFoundError, OSError) as error:
        raise DerainError(
            f"hub:{name}: not in {cache} and cannot be fetched from {source} ({type(error).__name__}); fetch it "
            f"where there is a network by `hf download {name} {file}`, and use that file"
        ) from error


@contextmanager
def loading(kind: str, name: str) -> Iterator[None]:
    """Silence transformers in a block that loads a model, and turn errors of the block into a `DerainError`.

    The progress bars of transformers stay disabled after the block.

    Args:
        kind: Kind of the model in messages.
        name: Name of the model as the user gave it.

    Raises:
        DerainError: If the model cannot be loaded.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = transformers_logging.get_verbosity()
    # By default, transformers prints a table of missing and unexpected tensors; check_complete reports missing ones.
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DerainError(f"{name}: cannot be loaded as {kind} ({reason}); fetch it again, or use another") from error
    finally:
        transformers_logging.set_verbosity(before)


def check_complete(kind: str, name: str, loading_info: Mapping[str, Any]) -> None:
    """Refuse weights with missing tensors or wrong shapes, which transformers replaces by random numbers.

    Args:
        kind: Kind of the model in messages.
        name: Name of the model as the user gave it.
        loading_info: ``output_loading_info`` of ``from_pretrained``.

    Raises:
        DerainError: If tensors are missing or have wrong shapes.
    """
    missing = sorted(loading_info["missing_keys"]) + sorted(key for key, *_ in loading_info["mismatched_keys"])
    if missing:
        raise DerainError(
            f"{name}: {len(missing)} tensors of {kind} are missing or mis-shaped, such as {missing[0]}; fetch it again"
        )


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
