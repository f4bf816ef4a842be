"""Data sets on a local server, and the command that fetches them."""

import random
import zipfile

from derain.cli import main
from derain.data.sources import SOURCES, Hub, Web
from tests.factories import make_set
from tests.servers import REPOSITORY, serve_hub


def contents(folder):
    """Return the files of a folder, with their contents, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def serve_zips(server, monkeypatch, folder, *, padding=0, **arguments):
    """Serve Rain12 as one archive of rainy and one of clean images, with other files; return their contents."""
    files = contents(make_set(folder / "source", "Rain12", "test", count=12))
    files |= {f"{name}/other.bin": random.Random(name).randbytes(padding) for name in ("rainy", "groundtruth")}
    urls = []
    for name in ("rainy", "groundtruth"):
        part = {path: content for path, content in files.items() if path.startswith(name)}
        server.files[f"/{name}.zip"] = make_zip(folder / f"{name}.zip", part).read_bytes()
        server.headers[f"/{name}.zip"] = {"ETag": f'"{name}"'}
        urls.append(f"{server.url}/{name}.zip")
    monkeypatch.setitem(SOURCES, "Rain12", (Web(tuple(urls), **arguments),))
    return files


def serve_repository(server, monkeypatch, folder, **arguments):
    """Serve Rain12 as a repository of the hub; return the contents of its files."""
    source = make_set(folder / "source", "Rain12", "test", count=12)
    (source / "README.md").write_text("someone's mirror")
    serve_hub(server, source, **arguments)
    monkeypatch.setitem(SOURCES, "Rain12", (Hub(REPOSITORY),))
    return contents(source)


SERVE = {"web": serve_zips, "hub": serve_repository}


def fetch(root, *options, name="Rain12"):
    return main(["data", "fetch", name, "--root", str(root), *options])


def error(capsys):
    """Return the only line of an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("derain:")]
    assert len(lines) == 1
    return lines[0]
