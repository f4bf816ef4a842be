"""Caption the clean images of a data set, to train DA-CLIP."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from derain.data.captions import (
    DEGRADATION,
    TEMPLATE,
    Caption,
    Journal,
    JournalEntry,
    file_hash,
    one_line,
    table_paths,
    write_captions,
)
from derain.data.pairs import Pair, find_pairs, read_clean
from derain.errors import DerainError
from derain.image_sources import ImageFile
from derain.progress import track


class Captioner(NamedTuple):
    """Function that captions images, and its settings.

    Attributes:
        settings: Settings of the run; it resumes only if they are unchanged.
        caption: Function that returns a caption for the clean image of each pair.
        uses_images: Whether captions depend on the images.
    """

    settings: dict[str, str | int]
    caption: Callable[[Sequence[Pair]], list[str]]
    uses_images: bool = True


class CleanImage(NamedTuple):
    """Clean image of a pair.

    Attributes:
        file: File that contains the image.
        side: Half of a side-by-side file (``left`` or ``right``) that is the image; None if the whole file is.
    """

    file: ImageFile
    side: str | None


def caption(
    dataset: str,
    out: Path,
    *,
    split: Literal["train", "test"] = "train",
    root: Path | None = None,
    degradation: str = "rainy",
    captioner: str = "Salesforce/blip-image-captioning-large",
    max_tokens: int = 32,
    batch_size: int = 8,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Caption the clean images of a data set, and write a table in DA-CLIP's format.

    The table has the columns filepath and title, and a row for each rainy image. The title is the caption of the clean
    image and the word for the degradation. Run the same command again to resume an interrupted run.

    Args:
        dataset: Name or folder of a data set.
        out: Table to write, such as captions.tsv; until all images have a caption, captions are in captions.tsv.part.
        split: Split of the data set.
        root: Folder with data sets (default: $DERAIN_DATA).
        degradation: Word for the degradation of the rainy images, appended to each caption.
        captioner: BLIP model on the Hugging Face hub or in a folder (the default is downloaded once, 1.9 GB); or
            template, which captions every image 'a photo', without a model.
        max_tokens: Maximum length of a caption in tokens.
        batch_size: Images per batch.
        device: Device: auto, cpu, cuda, cuda:N or mps.
        overwrite: Replace an existing table, and a .part file from which this run cannot resume.

    Raises:
        DerainError: If an option is wrong, the table exists already, the run cannot resume from the .part file, the
            captioner cannot be loaded, or images cannot be read or are in shards.
    """
    for option, number in {"--max-tokens": max_tokens, "--batch-size": batch_size}.items():
        if number < 1:
            raise DerainError(f"{option} {number}: must be at least 1")
    _check_degradation(degradation)
    _check_table(out, overwrite)
    pair_set = find_pairs(dataset, split, data_root=root)
    for note in pair_set.notes:
        print(f"{pair_set.name}: {note}", file=sys.stderr)
    files = table_paths([pair.rainy for pair in pair_set.pairs], out)
    loaded_captioner = _load_captioner(captioner, degradation, max_tokens, device)
    journal = Journal(out.with_name(f"{out.name}.part"), loaded_captioner.settings)
    file_pairs = [(file, clean_image(pair).file) for file, pair in zip(files, pair_set.pairs, strict=True)]
    finished = journal.begin(file_pairs, overwrite)
    if finished:
        print(f"{journal.path}: resuming after {len(finished):,} of {len(files):,} captions", file=sys.stderr)
    texts = caption_pairs(pair_set.pairs, files, loaded_captioner, journal, finished, batch_size)
    rows = [(file, Caption(text, degradation)) for file, text in zip(files, texts, strict=True)]
    write_captions(out, rows)
    journal.path.unlink(missing_ok=True)
    clean_count = len({clean_image(pair) for pair in pair_set.pairs})
    print(
        f"wrote {out}: {len(rows):,} rainy images of {pair_set.name}, {clean_count:,} clean images, "
        f"{len(set(texts)):,} different captions; for example"
    )
    for index in sorted({0, len(rows) // 2, len(rows) - 1}):
        print(f"{rows[index][0]}\t{rows[index][1].title}")
    return 0


def _check_degradation(word: str) -> None:
    if not word or one_line(word) != word or ": " in word:
        raise DerainError(f"--degradation {word!r}: expected text without ': ' or extra spaces, such as {DEGRADATION}")


def _check_table(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise DerainError(f"{out}: is a folder; expected a file, such as {out / 'captions.tsv'}")
    if out.exists() and not overwrite:
        raise DerainError(f"{out}: exists already; add --overwrite to replace it, or give another file")


def _load_captioner(name: str, degradation: str, max_tokens: int, device: str) -> Captioner:
    settings: dict[str, str | int] = {"captioner": name, "degradation": degradation}
    if name == "template":
        return Captioner(settings, lambda pairs: [TEMPLATE] * len(pairs), uses_images=False)
    from derain.methods.daclipsde.blip import FrozenBLIP
    from derain.restoration import choose_device

    chosen_device = choose_device(device)
    blip = FrozenBLIP(name, max_tokens)
    settings |= {"max_tokens": max_tokens, "sha256": blip.sha256}
    return Captioner(settings, lambda pairs: blip.captions([read_clean(pair) for pair in pairs], chosen_device))


def clean_image(pair: Pair) -> CleanImage:
    """Return the clean image of a pair; several pairs may share one."""
    assert pair.clean is not None
    return CleanImage(pair.clean, pair.clean_side)


def caption_pairs(
    pairs: Sequence[Pair],
    files: Sequence[str],
    captioner: Captioner,
    journal: Journal,
    finished: Sequence[JournalEntry],
    batch_size: int,
) -> list[str]:
    """Caption the clean images, and add entries to the journal in the order of the pairs.

    Pairs that share a clean image get the same caption. On some devices, a caption depends on the other images of its
    batch. A resumed run therefore repeats the batch in which it was interrupted: with the same batch size, its batches
    are those of an uninterrupted run.

    Args:
        pairs: Pairs in the order of the table.
        files: Path of each rainy image as written in the table.
        captioner: Captions the clean images.
        journal: Journal of the run.
        finished: Entries of the first pairs, from an interrupted run; empty for a new run.
        batch_size: Clean images per batch.

    Returns:
        The caption of each pair.

    Raises:
        DerainError: If an image cannot be read.
    """
    first_pairs: dict[CleanImage, Pair] = {}
    for pair in pairs:
        first_pairs.setdefault(clean_image(pair), pair)
    captions = {clean_image(pair): (entry.text, entry.image_hash) for pair, entry in zip(pairs, finished, strict=False)}
    images = list(first_pairs)
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    unfinished = [batch for batch in batches if any(image not in captions for image in batch)]

    def caption_batches() -> Iterator[CleanImage]:
        written = len(finished)
        for batch in unfinished:
            texts = captioner.caption([first_pairs[image] for image in batch])
            for image, text in zip(batch, texts, strict=True):
                if image not in captions:
                    image_hash = file_hash(image.file) if captioner.uses_images else ""
                    captions[image] = (one_line(text), image_hash)
            entries = []
            for pair, file in zip(pairs[written:], files[written:], strict=True):
                if clean_image(pair) not in captions:
                    break
                entries.append(JournalEntry(file, *captions[clean_image(pair)]))
            journal.add(entries)
            written += len(entries)
            yield from batch

    for _ in track(caption_batches(), "Captioning", sum(map(len, unfinished))):
        pass
    return [captions[clean_image(pair)][0] for pair in pairs]
