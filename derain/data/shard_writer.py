"""Write the image pairs of a data set to shards."""

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from derain.data.pairs import Pair, PairSet
from derain.data.shards import FORMAT, VERSION, IndexEntry, index_line, index_name, shard_name
from derain.errors import DerainError
from derain.image_sources import ImageFile
from derain.images import image_size, write_whole
from derain.progress import track


def write_shards(pair_set: PairSet, out: Path, size: int, *, overwrite: bool = False) -> list[int]:
    """Write the pairs of one split of a data set to shards, and their index.

    Each pair is a sample of WebDataset, such as ``000012.rainy.png`` and ``000012.clean.png``, with the bytes of the
    image files, and their suffixes in lower case. A side-by-side file is called ``000012.clean-rainy.png`` (clean left)
    or ``000012.rainy-clean.png``. Equal pairs yield equal shards. The index is written last.

    Args:
        pair_set: Pairs of image files.
        out: Folder for the shards; it may contain those of other splits.
        size: Maximum number of bytes of images in a shard, which may only be exceeded by a single pair.
        overwrite: Whether to replace shards of this split.

    Returns:
        The sizes of the shards in bytes.

    Raises:
        DerainError: If a pair cannot be read, or its images differ in size; if the pairs are in shards already; or if
            the folder contains shards or an index of this split, and ``overwrite`` is false.
    """
    _prepare(out, pair_set.split, overwrite=overwrite)
    root = Path(pair_set.root)
    lines: list[str] = []
    sizes: list[int] = []
    with ThreadPoolExecutor() as threads:
        for pairs in _groups(pair_set.pairs, size):
            # All pairs are decoded, so that damage is found now and not during training.
            dimensions = list(track(threads.map(_checked_size, pairs), f"Reading shard {len(sizes)}", len(pairs)))
            file = out / shard_name(pair_set.split, len(sizes))
            with write_whole(file) as temporary:
                entries = _write_tar(temporary, pairs, len(lines), len(sizes), root)
                sizes.append(temporary.stat().st_size)
            for pair, dimension, pair_entries in zip(pairs, dimensions, entries, strict=True):
                lines.append(index_line(pair.name, dimension, pair_entries))
    first = pair_set.pairs[0]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": pair_set.name,
        "layout": pair_set.layout,
        "clean_side": first.clean_side,
        "video": bool(first.sequence),
        "shard_sizes": sizes,
        "pairs": len(lines),
    }
    content = "\n".join([json.dumps(header), *lines])
    with write_whole(out / index_name(pair_set.split)) as temporary:
        temporary.write_bytes(gzip.compress(content.encode(), mtime=0))
    return sizes


def _prepare(out: Path, split: str, *, overwrite: bool) -> None:
    """Create the folder; remove the index of an earlier run before its shards, so that no index lacks its shards.

    Raises:
        DerainError: If there are files of an earlier run, and ``overwrite`` is false.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = [path for path in out.iterdir() if re.fullmatch(rf"{split}-\d{{6}}\.tar", path.name)]
    existing = [path for path in (out / index_name(split), *sorted(shards)) if path.exists()]
    if existing and not overwrite:
        raise DerainError(
            f"{existing[0]}: exists already; add --overwrite to replace the shards, or give another folder"
        )
    for path in existing:
        path.unlink()


def _groups(pairs: Sequence[Pair], size: int) -> Iterator[list[Pair]]:
    """Split pairs into groups whose files have at most ``size`` bytes, unless a single pair has more."""
    group: list[Pair] = []
    total = 0
    for pair in pairs:
        length = sum(file.stat().st_size for file in _files(pair))
        if group and total + length > size:
            yield group
            group, total = [], 0
        group.append(pair)
        total += length
    yield group


def _files(pair: Pair) -> list[Path]:
    """Return the different files of a pair.

    Raises:
        DerainError: If an image is in a shard.
    """
    files = []
    for file in dict.fromkeys((pair.rainy, pair.clean)):
        if isinstance(file, Path):
            files.append(file)
        elif file is not None:
            raise DerainError(f"{file}: is in a shard already; give the folder of the image files")
    return files


def _checked_size(pair: Pair) -> tuple[int, int]:
    """Return height and width of the rainy file.

    Raises:
        DerainError: If the pair cannot be read, or its images differ in size.
    """
    pair.read()
    return image_size(pair.rainy)


def _write_tar(
    target: Path, pairs: Sequence[Pair], first_number: int, shard_number: int, root: Path
) -> list[list[IndexEntry]]:
    """Write a shard, and return the entries of the rainy and the clean image of each pair for the index.

    Args:
        target: File to write.
        pairs: The pairs.
        first_number: Number of the first of the pairs, counted over all shards from 0.
        shard_number: Number of the shard.
        root: Folder of the data set; in the index, the paths of files in it are relative to it, others as they are.
    """
    hashes = []
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, pair in enumerate(pairs, first_number):
            for file in _files(pair):
                content = file.read_bytes()
                member = tarfile.TarInfo(f"{number:06d}.{_kind(pair, file)}{file.suffix.lower()}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                hashes.append(hashlib.sha256(content).hexdigest())
    with tarfile.open(target) as tar:
        members = iter(zip(tar.getmembers(), hashes, strict=True))
    entries = []
    for pair in pairs:
        entry_by_file: dict[ImageFile, IndexEntry] = {}
        for file, (member, digest) in zip(_files(pair), members, strict=False):
            path = file.relative_to(root) if file.is_relative_to(root) else file
            entry_by_file[file] = (shard_number, member.offset_data, member.size, digest, path.as_posix())
        entries.append([entry_by_file[file] for file in (pair.rainy, pair.clean) if file is not None])
    return entries


def _kind(pair: Pair, file: Path) -> str:
    """Return what an image file contains, as part of its name in the shard."""
    if pair.clean_side is not None:
        return "clean-rainy" if pair.clean_side == "left" else "rainy-clean"
    return "rainy" if file == pair.rainy else "clean"
