"""Models of the Hugging Face hub: found in a directory or fetched, told apart by a hash, refused when incomplete."""

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
"""Of these, one suffices; the first is preferred."""


@dataclass(frozen=True)
class HubModel:
    """A kind of model, and what is said of it when it cannot be had.

    Attributes:
        kind: What it is called.
        tokenizer: Files of the tokenizer, in groups of which one suffices.
        option: Which option names it.
        instead: What else to do than to name one.
        unfetched: What to do when it cannot be fetched, beyond fetching it elsewhere.
    """

    kind: str
    tokenizer: tuple[tuple[str, ...], ...]
    option: str
    instead: str
    unfetched: str

    @property
    def files(self) -> tuple[str, ...]:
        """What stands beside the weights."""
        return ("config.json", "preprocessor_config.json", *(file for group in self.tokenizer for file in group))

    def folder(self, name: str) -> Path:
        """Directory of a model; fetched from the hub, with a word about it, where it is not here yet.

        Args:
            name: Id on the hub (``OWNER/NAME``) or a directory.

        Raises:
            DerainError: If the directory lacks files, or the model can be neither found nor fetched.
        """
        path = Path(name).expanduser()
        if not path.is_dir():
            return self._from_hub(name)
        if not self._complete(path):
            tokenizer = " or ".join(" and ".join(group) for group in self.tokenizer)
            raise DerainError(
                f"{path}: no {self.kind} in this directory (expected config.json, preprocessor_config.json, "
                f"{tokenizer}, {' or '.join(WEIGHTS)})"
            )
        return path

    def sha256(self, folder: Path) -> str:
        """Hash of weights, configuration and tokenizer."""
        whole = hashlib.sha256()
        for path in (_weights(folder), *(folder / name for name in self.files)):
            if path and path.is_file():
                with path.open("rb") as file:
                    whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def _complete(self, folder: Path) -> bool:
        here = {path.name for path in folder.iterdir()}
        tokenizer = any(set(group) <= here for group in self.tokenizer)
        return {"config.json", "preprocessor_config.json"} <= here and tokenizer and _weights(folder) is not None

    def _from_hub(self, name: str) -> Path:
        """Directory of a hub's model; says what it fetches, from where and how big, before it does."""
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
        from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

        try:
            here = Path(snapshot_download(name, local_files_only=True))
            if self._complete(here):
                return here  # else a download was interrupted: it goes on below
        except HFValidationError as error:
            raise DerainError(
                f"{self.option} {name}: neither a directory nor an id on the Hugging Face hub like OWNER/NAME; "
                f"give one, or {self.instead}"
            ) from error
        except LocalEntryNotFoundError:
            pass
        try:
            files = {f.rfilename: f.size or 0 for f in HfApi().model_info(name, files_metadata=True).siblings or ()}
            wanted = [file for file in (next((w for w in WEIGHTS if w in files), ""), *self.files) if file in files]
            size = sum(files[file] for file in wanted) / 1e6
            source, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
            log.info("fetching %s %s (%.0f MB) from %s into %s", self.kind, name, size, source, cache)
            here = Path(snapshot_download(name, allow_patterns=wanted))
        except (NetworkError, LocalEntryNotFoundError, OSError) as error:
            raise DerainError(
                f"{self.kind} {name}: not in {constants.HF_HUB_CACHE} and cannot be fetched from {constants.ENDPOINT} "
                f"({type(error).__name__}); fetch it beforehand where there is a network by `hf download {name}` and "
                f"copy that folder, or {self.unfetched}"
            ) from error
        if not self._complete(here):
            raise DerainError(
                f"{self.kind} {name}: {constants.ENDPOINT} has not all files of a {self.kind} under this name; "
                "give another"
            )
        return here


METHOD = "model.safetensors"
"""File of a method's weights on the hub, as ``save_pretrained`` writes it."""


def fetch_weights(
    name: str, *, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Path:
    """File of a method's weights on the hub; fetched, with a word about it, where it is not here yet.

    Args:
        name: ``OWNER/NAME``.
        revision: Branch, tag or commit.
        cache_dir: Where the hub's files are kept.
        token: For what is private.

    Raises:
        DerainError: If it can be neither found nor fetched.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

    download = partial(hf_hub_download, name, METHOD, revision=revision, cache_dir=cache_dir, token=token)
    try:
        return Path(download(local_files_only=True))
    except HFValidationError as error:
        raise DerainError(f"hub:{name}: no id on the Hugging Face hub; expected hub:OWNER/NAME") from error
    except LocalEntryNotFoundError:
        pass
    source, cache = constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
        files = {f.rfilename: f.size or 0 for f in info.siblings or ()}
        if METHOD not in files:
            raise DerainError(f"hub:{name}: {source} has no {METHOD} under this name; give one that derain has pushed")
        log.info("fetching %s of %s (%.1f MB) from %s into %s", METHOD, name, files[METHOD] / 1e6, source, cache)
        return Path(download())
    except (NetworkError, LocalEntryNotFoundError, OSError) as error:
        raise DerainError(
            f"hub:{name}: not in {cache} and cannot be fetched from {source} ({type(error).__name__}); fetch it "
            f"where there is a network by `hf download {name} {METHOD}`, and give that file"
        ) from error


@contextmanager
def loading(kind: str, name: str) -> Iterator[None]:
    """Keeps transformers quiet, and says of files that it cannot load why, in one line.

    Args:
        kind: What is loaded.
        name: As the user named it.

    Raises:
        DerainError: If it cannot be loaded.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = transformers_logging.get_verbosity()
    # Else it prints a table of all parts that are missing, or too many.
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise DerainError(f"{name}: cannot be loaded as {kind} ({' '.join(str(error).split())[:200]})") from error
    finally:
        transformers_logging.set_verbosity(before)


def check_whole(kind: str, name: str, told: Mapping[str, Any]) -> None:
    """Refuses weights that lack parts of the model, or have others of its sizes: transformers fills in random numbers.

    Args:
        kind: What was loaded.
        name: As the user named it.
        told: What ``from_pretrained`` tells about the loading.

    Raises:
        DerainError: If there are any.
    """
    lacking = sorted(told["missing_keys"]) + sorted(name for name, *_ in told["mismatched_keys"])
    if lacking:
        raise DerainError(f"{name}: its weights lack {len(lacking)} parts of {kind} (as {lacking[0]}); fetch them anew")


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
