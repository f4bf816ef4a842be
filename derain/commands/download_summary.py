"""Table of the sources of data sets, and descriptions of a download that are printed before it starts."""

from collections.abc import Mapping, Sequence

from rich.filesize import decimal

from derain import tables
from derain.data.archives import free_bytes
from derain.data.fetch import Download, describe_files, find_pair_folder
from derain.data.layouts import LAYOUTS
from derain.data.sources import Form, Source


def sources_table(sources: Mapping[str, Sequence[Source]]) -> tables.Table:
    """Return a table with one row per source.

    Args:
        sources: Sources by data set, those of each set in order of preference.
    """
    columns = [tables.Column(header, align="left") for header in ("set", "from", "address", "licence", "note")]
    rows = []
    for name, choices in sources.items():
        for source in choices:
            note = source.steps if isinstance(source, Form) else source.note
            rows.append(tables.Row([name, source.kind, str(source), source.licence, note]))
    return tables.Table(columns, rows)


def print_form(name: str, form: Form) -> None:
    """Print what the user must download from a page, and the command that unpacks it."""
    print(f"{name}: {LAYOUTS[name].title}")
    print(f"  page     {form.page}")
    print(f"  licence  {form.licence}")
    print("  size     not known")
    print(f"  to do    {form.steps}")
    print(f"           derain data fetch {name} --archive FILE [--archive FILE ...]")
    if form.note:
        print(f"  note     {form.note}")


def print_download(download: Download) -> None:
    """Print source, licence, size, numbers of pairs, checksums and disk space of a download."""
    files = download.listing.files
    print(f"{download.name}: {LAYOUTS[download.name].title}")
    print(f"  source     {download.listing.address}")
    if download.source.note:
        print(f"  note       {download.source.note}")
    print(f"  licence    {_licence(download)}")
    print(f"  size       {_size(download)}")
    print(f"  pairs      {_pairs(download)}")
    unchecked = sum(not file.has_checksum for file in files)
    print(f"  checksums  {'of all files' if not unchecked else f'none for {unchecked} of {len(files)} files'}")
    free = decimal(free_bytes(download.target.parent))
    print(f"  disk       {decimal(download.needed_bytes)} needed, {free} free, in {download.target}", flush=True)


def _licence(download: Download) -> str:
    stated = download.listing.licence
    return f"{download.source.licence}; according to the server: {stated}" if stated else download.source.licence


def _size(download: Download) -> str:
    files = download.listing.files
    text = f"{decimal(download.listing.size)} in {len(files)} files"
    unknown = sum(file.size is None for file in files)
    if unknown:
        text += f", {unknown} of them of unknown size"
    present = download.listing.size - download.missing_bytes
    if present:
        text += f"; {decimal(present)} already downloaded"
    return text


def _pairs(download: Download) -> str:
    """Return text with the number of pairs in each split of a download; those in archives are not counted yet."""
    if download.archives:
        return "counted after unpacking"
    names = [file.path for file in download.listing.files]
    _, counts = find_pair_folder(download.name, names)
    if not counts:
        return f"none recognised by their names: {describe_files(names)}"
    published = LAYOUTS[download.name].counts
    return ", ".join(f"{split} {count} (published: {published.get(split, '?')})" for split, count in counts.items())
