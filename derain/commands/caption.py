"""Caption the clean images of a data set: a table 'filepath<TAB>title' in DA-CLIP's form, to train DA-CLIP with."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
from derain.progress import track

BLIP = "Salesforce/blip-image-captioning-large"
"""What DA-CLIP's authors captioned with."""


class Captioner(NamedTuple):
    """What gives captions.

    Attributes:
        run: What they depend on besides the images.
        captions: Those of the clean images of pairs.
        looks: Whether it looks at the images.
    """

    run: dict[str, str | int]
    captions: Callable[[Sequence[Pair]], list[str]]
    looks: bool = True


class Clean(NamedTuple):
    """A clean image: its file, and which half of it."""

    file: Path
    side: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("set", metavar="ROOT", help="a data set's name or folder")
    parser.add_argument(
        "output", type=Path, metavar="OUT.tsv", help="the table; OUT.tsv.part holds it until it is done"
    )
    parser.add_argument("--split", choices=["train", "test"], default="train", help="of the data set (default train)")
    parser.add_argument("--root", type=Path, help="folder that holds the sets (default $DERAIN_DATA)")
    parser.add_argument("--degradation", default=DEGRADATION, metavar="WORD", help=f"default {DEGRADATION}")
    parser.add_argument(
        "--captioner",
        default=BLIP,
        metavar="BLIP",
        help=f"id on the Hugging Face hub or a directory (default {BLIP}, 1.9 GB, fetched once), "
        f"or template: '{TEMPLATE}' for every image, without a model",
    )
    parser.add_argument("--max_tokens", type=int, default=32, metavar="N", help="of a caption (default 32)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="images at once (default 8)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--overwrite", action="store_true", help="replace the table, and what another run left of one")


def run(args: argparse.Namespace) -> int:
    """Captions the images and writes the table; the same command goes on where it was interrupted."""
    check(args)
    found = find_pairs(args.set, args.split, data_root=args.root)
    for note in found.notes:
        print(f"{found.name}: {note}", file=sys.stderr)
    files = table_paths([pair.rainy for pair in found.pairs], args.output)
    captioner = captioner_of(args)
    journal = Journal(args.output.with_name(f"{args.output.name}.part"), captioner.run)
    images = [(file, clean_of(pair).file) for file, pair in zip(files, found.pairs, strict=True)]
    done = journal.begin(images, args.overwrite)
    if done:
        print(f"{journal.path}: goes on after {len(done):,} of {len(files):,} rows", file=sys.stderr)
    texts = captioned(found.pairs, files, captioner, journal, done, args.batch_size)
    rows = [(file, Caption(text, args.degradation)) for file, text in zip(files, texts, strict=True)]
    write_captions(args.output, rows)
    journal.path.unlink(missing_ok=True)
    cleans = len({clean_of(pair) for pair in found.pairs})
    print(
        f"{args.output}: {len(rows):,} rainy images of {found.name}, {cleans:,} clean ones, "
        f"{len(set(texts)):,} different captions; for example"
    )
    for place in sorted({0, len(rows) // 2, len(rows) - 1}):
        print(f"{rows[place][0]}\t{rows[place][1].title}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuses options that cannot be meant, before anything is read.

    Raises:
        DerainError: If there are any.
    """
    for name in ("max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise DerainError(f"--{name} {getattr(args, name)}: give a number of at least 1")
    if one_line(args.degradation) != args.degradation or not args.degradation or ": " in args.degradation:
        raise DerainError(f"--degradation {args.degradation!r}: give a word like {DEGRADATION}, without ': '")
    if args.output.is_dir():
        raise DerainError(f"{args.output}: is a folder; name the table, as {args.output / 'captions.tsv'}")
    if args.output.exists() and not args.overwrite:
        raise DerainError(f"{args.output}: exists; give --overwrite to replace it, or another name")


def captioner_of(args: argparse.Namespace) -> Captioner:
    """What gives captions.

    Raises:
        DerainError: If there is no such model or device.
    """
    run: dict[str, str | int] = {"captioner": args.captioner, "degradation": args.degradation}
    if args.captioner == "template":
        return Captioner(run, lambda pairs: [TEMPLATE] * len(pairs), looks=False)
    from derain.methods.daclipsde.blip import FrozenBLIP
    from derain.restoration import choose_device

    device = choose_device(args.device)
    blip = FrozenBLIP(args.captioner, args.max_tokens)
    run |= {"max_tokens": args.max_tokens, "sha256": blip.sha256}
    return Captioner(run, lambda pairs: blip.captions([read_clean(pair) for pair in pairs], device))


def clean_of(pair: Pair) -> Clean:
    """The clean image of a pair that has one; pairs may share it."""
    assert pair.clean is not None
    return Clean(pair.clean, pair.clean_side)


def captioned(
    pairs: Sequence[Pair],
    files: Sequence[str],
    captioner: Captioner,
    journal: Journal,
    done: Sequence[JournalEntry],
    size: int,
) -> list[str]:
    """Captions each clean image once and writes the rows of its pairs into the journal, in their order.

    The batches of a run that goes on are those of one that was never interrupted: on some devices an image's caption
    could depend on those beside it.

    Args:
        pairs: The pairs.
        files: Their rainy images, as they stand in the table.
        captioner: What gives captions.
        journal: Where rows go.
        done: Those that are there, of the first pairs.
        size: Images of a batch.

    Returns:
        The caption of each pair.
    """
    firsts: dict[Clean, Pair] = {}
    for pair in pairs:
        firsts.setdefault(clean_of(pair), pair)
    known = {clean_of(pair): (row.text, row.image) for pair, row in zip(pairs, done, strict=False)}
    cleans = list(firsts)
    batches = [cleans[place : place + size] for place in range(0, len(cleans), size)]
    left = [batch for batch in batches if any(clean not in known for clean in batch)]

    def work() -> Iterator[Clean]:
        start = len(done)
        for batch in left:
            for clean, text in zip(batch, captioner.captions([firsts[clean] for clean in batch]), strict=True):
                if clean not in known:
                    known[clean] = (one_line(text), file_hash(clean.file) if captioner.looks else "")
            ready = start
            while ready < len(pairs) and clean_of(pairs[ready]) in known:
                ready += 1
            journal.add(JournalEntry(files[place], *known[clean_of(pairs[place])]) for place in range(start, ready))
            start = ready
            yield from batch

    for _ in track(work(), "Captioning", sum(map(len, left))):
        pass
    return [known[clean_of(pair)][0] for pair in pairs]
