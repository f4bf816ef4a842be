import contextlib
import functools
import gzip
import http.server
import json
import re
import tarfile
import threading
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
import webdataset
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from PIL import Image

from derain.cli import main
from derain.data import shards
from derain.data.cache import fingerprint
from derain.data.datamodule import RainDataModule
from derain.data.pairs import find_pairs, find_pairs_or_photos, merge_pairs
from derain.data.sequences import consecutive_frames
from derain.data.shard_writer import write_shards
from derain.data.splitting import hold_out
from derain.data.verify import verify
from derain.errors import DerainError
from derain.loops import Position
from tests.factories import clean_image, make_set, save
from tests.runs import EXPERIMENT, error_line, finish, fit

SETS = [("Rain800", "train"), ("Rain1400", "train"), ("NTURain", "train"), ("Rain100L", "test"), ("folder", "train")]
SMALL = 15_000
"""Bytes of a shard, so that a few small pairs need several."""


def sharded(root, name="Rain800", split="train", count=6, size=SMALL):
    """Write a data set and its shards; return the option of each."""
    folder = make_set(root, name, split, count=count)
    pair_set = find_pairs(f"{name}:{folder}", split)
    write_shards(pair_set, root / "shards", size)
    return f"{name}:{folder}", str(root / "shards")


def data(train, **options):
    options = {"workers": 0, "crop": 16, "batch_size": 4, "cache": "off", "val_share": 0.2, **options}
    module = RainDataModule(train=train, **options)
    module.setup("fit")
    return module


def training_batches(module, epoch=0):
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def assert_equal_batches(first, second):
    assert len(first) == len(second) > 0
    for batch, other in zip(first, second, strict=True):
        assert batch.keys() == other.keys()
        assert batch["name"] == other["name"]
        for key in ("rainy", "clean", "index"):
            assert torch.equal(batch[key], other[key])


def change(path, offset):
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def upload(folder, url):
    """Copy shards to a file system of fsspec."""
    for path in folder.iterdir():
        fsspec.open(f"{url}/{path.name}", "wb").open().write(path.read_bytes())


@pytest.fixture
def memory():
    yield "memory://bucket/set"
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(("name", "split"), SETS)
def test_pairs_in_shards_equal_those_in_files(tmp_path, name, split):
    spec, location = sharded(tmp_path, name, split)
    files, stored = find_pairs(spec, split), find_pairs(location, split)
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    assert stored.layout == name
    assert fingerprint(files.pairs) == fingerprint(stored.pairs)
    for pair, other in zip(files.pairs, stored.pairs, strict=True):
        assert (pair.name, pair.sequence, pair.clean_side) == (other.name, other.sequence, other.clean_side)
        assert pair.size() == other.size()
        for image, read in zip(pair.read(), other.read(), strict=True):
            np.testing.assert_array_equal(image, read)
    assert consecutive_frames(files.pairs) == consecutive_frames(stored.pairs)
    for part, other in zip(hold_out(files.pairs, 0.3, 1), hold_out(stored.pairs, 0.3, 1), strict=True):
        assert [pair.name for pair in part] == [pair.name for pair in other]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_shards_equal_those_from_files(tmp_path, workers):
    spec, location = sharded(tmp_path, "Rain1400")
    for epoch in (0, 1):
        expected = training_batches(data(spec), epoch)
        assert_equal_batches(expected, training_batches(data(location, workers=workers), epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumes_with_the_same_samples(tmp_path, workers):
    spec, location = sharded(tmp_path)
    expected = training_batches(data(spec, batch_size=2), epoch=3)
    module = data(location, batch_size=2, workers=workers)
    module.load_state_dict(module.state_dict())
    module.resume_at(Position(epoch=3, batch=1, trained=1))
    assert_equal_batches(expected[1:], list(module.train_dataloader()))


def test_each_rank_reads_only_its_samples(tmp_path, monkeypatch):
    spec, location = sharded(tmp_path)
    read = []
    original = shards.ShardImage.open
    monkeypatch.setattr(shards.ShardImage, "open", lambda image, mode: read.append(image.name) or original(image, mode))
    names = []
    for rank in (0, 1):
        batches = []
        for option in (spec, location):
            module = data(option, val="none")
            monkeypatch.setattr(module, "_rank_and_world", lambda rank=rank: (rank, 2))
            read.clear()
            batches.append(training_batches(module))
        assert_equal_batches(*batches)
        rank_names = [name for batch in batches[1] for name in batch["name"]]
        assert sorted(read) == sorted(f"training/{name}.jpg" for name in rank_names)
        names += rank_names
    assert sorted(names) == ["1", "2", "3", "4", "5", "6"]


def test_starting_reads_nothing_but_the_index(tmp_path, memory, monkeypatch):
    _, location = sharded(tmp_path)
    upload(tmp_path / "shards", memory)
    read = []
    original = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "cat_file",
        lambda files, path, **options: read.append(path) or original(files, path, **options),
    )
    module = data(memory, cache="auto")
    assert read == ["/bucket/set/train-index.json.gz"]
    assert module._caches["train"] is None
    assert_equal_batches(training_batches(data(location)), training_batches(module))


def test_several_sets_mix_files_and_shards(tmp_path, memory):
    spec, location = sharded(tmp_path)
    upload(tmp_path / "shards", memory)
    other = find_pairs(f"Rain1400:{make_set(tmp_path, 'Rain1400', 'train', count=2)}", "train")
    merged = merge_pairs([find_pairs(location, "train"), other])
    expected = merge_pairs([find_pairs(spec, "train"), other])
    assert fingerprint(merged) == fingerprint(expected)
    twice = merge_pairs([find_pairs(location, "train"), find_pairs(memory, "train")])
    assert len({pair.name for pair in twice}) == 12


@pytest.mark.parametrize("split", ["test", "predict"])
def test_evaluation_from_shards(tmp_path, split):
    spec, location = sharded(tmp_path, "Rain100L", "test", count=3)
    batches = []
    for option in (spec, location):
        module = RainDataModule(**{split: option, "workers": 0})
        module.setup(split)
        batches.append(list(getattr(module, f"{split}_dataloader")()))
    assert ("clean" in batches[1][0]) == (split == "test")
    for batch, other in zip(*batches, strict=True):
        assert batch["name"] == other["name"]
        assert torch.equal(batch["rainy"], other["rainy"])


def test_photos_in_shards_are_clean_images_for_added_rain(tmp_path):
    for index in range(2):
        save(tmp_path / "photos" / f"{index}.png", clean_image(index))
    write_shards(find_pairs(tmp_path / "photos", "predict"), tmp_path / "shards", SMALL)
    pairs = find_pairs_or_photos(tmp_path / "shards", "train").pairs
    assert [pair.is_photo for pair in pairs] == [True, True]
    rainy, clean = pairs[1].read()
    np.testing.assert_array_equal(rainy, clean_image(1))
    np.testing.assert_array_equal(clean, clean_image(1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_from_shards_gives_the_same_weights(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"] if processes == 2 else []
    spec, location = sharded(tmp_path)
    weights = []
    for name, train in (("files", spec), ("shards", location)):
        config = json.loads(json.dumps(EXPERIMENT))
        config["data"] |= {"train": train, "cache": "off", "batch_size": 2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        finish("fit", "--config", f"{name}.yaml", *two)
        checkpoint = torch.load(f"runs/{name}/fit-1/checkpoints/last.ckpt", weights_only=True)
        weights.append(checkpoint["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_webdataset_reads_the_shards(tmp_path):
    spec, _ = sharded(tmp_path, "Rain1400", count=2)
    pairs = find_pairs(spec, "train").pairs
    files = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(files, shardshuffle=False).decode("rgb8").to_tuple("rainy.jpg", "clean.jpg")
    samples = list(dataset)
    assert len(samples) == len(pairs) == 6
    for (rainy, clean), pair in zip(samples, pairs, strict=True):
        np.testing.assert_array_equal(rainy, np.asarray(Image.open(pair.rainy)))
        np.testing.assert_array_equal(clean, np.asarray(Image.open(pair.clean)))


def test_equal_sets_give_equal_shards(tmp_path):
    folder = make_set(tmp_path, "Rain800", "train", count=3)
    contents = []
    for out in ("a", "b"):
        write_shards(find_pairs(f"Rain800:{folder}", "train"), tmp_path / out, SMALL)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert contents[0] == contents[1]


def test_sizes_of_shards(tmp_path):
    sharded(tmp_path, count=6, size=SMALL)
    for path in sorted((tmp_path / "shards").glob("*.tar"))[:-1]:
        with tarfile.open(path) as tar:
            assert 0 < sum(member.size for member in tar) <= SMALL


def test_the_command_writes_shards_and_replaces_them_on_request(tmp_path, capsys):
    make_set(tmp_path, "Rain800", "train", count=5)
    arguments = ["data", "shard", "Rain800", str(tmp_path / "out"), "--root", str(tmp_path)]
    assert main(arguments) == 0
    index = (tmp_path / "out/train-index.json.gz").read_bytes()
    assert main(arguments) == 2
    assert "--overwrite" in error_line(capsys)
    (tmp_path / "out/train-000007.tar").write_bytes(b"left over")
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "out/train-index.json.gz").read_bytes() == index
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert main([*arguments, "--shard-size", "0"]) == 2


def test_an_unreadable_image_leaves_no_index(tmp_path):
    folder = make_set(tmp_path, "Rain800", "train", count=6)
    (folder / "training/4.jpg").write_bytes((folder / "training/4.jpg").read_bytes()[:500])
    with pytest.raises(DerainError, match=r"4\.jpg"):
        write_shards(find_pairs(f"Rain800:{folder}", "train"), tmp_path / "out", SMALL)
    assert not shards.sharded_splits(tmp_path / "out")


def test_shards_are_not_sharded_again(tmp_path):
    _, location = sharded(tmp_path)
    with pytest.raises(DerainError, match="in a shard already"):
        write_shards(find_pairs(location, "train"), tmp_path / "again", SMALL)


def test_a_damaged_image_is_named(tmp_path):
    _, location = sharded(tmp_path)
    pair = find_pairs(location, "train").pairs[3]
    change(tmp_path / "shards" / pair.rainy.shard, pair.rainy.offset + pair.rainy.length // 2)
    with pytest.raises(DerainError, match=rf"{re.escape(pair.rainy.shard)}: training/4\.jpg"):
        pair.read()
    _, findings = verify(tmp_path / "shards")
    assert [finding.kind for finding in findings if finding.level == "error"] == ["count", "unreadable"]


def test_truncated_and_missing_shards_are_found_before_training(tmp_path):
    _, location = sharded(tmp_path)
    path = tmp_path / "shards/train-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(DerainError, match=r"train-000001\.tar"):
        find_pairs(location, "train")
    path.unlink()
    with pytest.raises(DerainError, match=r"train-000001\.tar"):
        find_pairs(location, "train")


def test_a_shard_that_is_truncated_later_is_named(tmp_path):
    _, location = sharded(tmp_path)
    pair = find_pairs(location, "train").pairs[-1]
    path = tmp_path / "shards" / pair.rainy.shard
    path.write_bytes(path.read_bytes()[: pair.rainy.offset + 10])
    with pytest.raises(DerainError, match=rf"{re.escape(path.name)}: training/6\.jpg.*10 of"):
        pair.read()


def test_shards_that_are_written_again_are_read_again(tmp_path):
    for seed in (0, 1):
        image = clean_image(seed)
        save(tmp_path / "set/input/1.png", image)
        save(tmp_path / "set/target/1.png", image)
        write_shards(find_pairs(f"folder:{tmp_path / 'set'}", "train"), tmp_path / "shards", SMALL, overwrite=True)
        np.testing.assert_array_equal(find_pairs(tmp_path / "shards", "train").pairs[0].read()[0], image)


def test_more_shards_than_a_process_keeps_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_opened", functools.lru_cache(2)(shards._OpenShard))
    spec, location = sharded(tmp_path, size=1)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    assert_equal_batches(training_batches(data(spec)), training_batches(data(location)))
    assert len(list(Path("/proc/self/fd").iterdir())) <= opened + 2


def rewrite(index, header=None, lines=slice(None)):
    first, *pairs = gzip.decompress(index.read_bytes()).decode().splitlines()
    content = "\n".join([json.dumps(json.loads(first) | (header or {})), *pairs[lines]])
    index.write_bytes(gzip.compress(content.encode()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: index.write_bytes(index.read_bytes()[:-20]), "damaged index"),
        (lambda index: change(index, index.stat().st_size // 2), "damaged index"),
        (lambda index: index.write_bytes(b""), "damaged index"),
        (lambda index: rewrite(index, lines=slice(4)), "4 pairs instead of 6"),
        (lambda index: rewrite(index, {"version": 99}), "version 99"),
        (lambda index: rewrite(index, {"format": "other"}), "not an index"),
        (lambda index: rewrite(index, {"layout": "Rain9"}), "Rain9"),
        (lambda index: rewrite(index, {"shard_sizes": None}), "damaged index"),
        (lambda index: index.write_bytes(gzip.compress(b"[1]")), "damaged index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, damage, message):
    _, location = sharded(tmp_path)
    damage(tmp_path / "shards/train-index.json.gz")
    with pytest.raises(DerainError, match=message) as error:
        find_pairs(location, "train")
    assert "train-index.json.gz" in str(error.value)


def test_a_missing_split_is_named(tmp_path, memory):
    _, location = sharded(tmp_path)
    with pytest.raises(DerainError, match="has only train"):
        find_pairs(location, "test")
    with pytest.raises(DerainError, match=r"train-index\.json\.gz"):
        find_pairs(memory, "train")


def test_captions_need_files(tmp_path):
    from derain.data.captions import Caption, match_captions

    _, location = sharded(tmp_path)
    with pytest.raises(DerainError, match="captions"):
        match_captions(find_pairs(location, "train").pairs, {tmp_path / "a.tsv": {"a.png": Caption("a", "rainy")}})


def test_unknown_protocols_and_missing_libraries_are_named(monkeypatch):
    with pytest.raises(DerainError, match="rain://"):
        find_pairs("rain://bucket/set", "train")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(DerainError, match=r"derain\[s3\]"):
        find_pairs("s3://bucket/set", "train")


# Shards behind an HTTP server.


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, or the requested range of bytes; can fail requests."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers["Range"]))
        if server.failures:
            failure = server.failures.pop(0)
            if failure != "interrupted":
                self.send_error(failure)
                return
            self.send_response(206)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"begin")
            self.close_connection = True
            return
        path = self.translate_path(self.path)
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            self.send_error(404)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if match is None or not server.ranges:
            self.send_response(200)
        else:
            start = int(match[1])
            if start >= len(content):
                self.send_error(416)
                return
            content = content[start : int(match[2] or len(content)) + 1]
            self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PAUSES", (0, 0))
    handler = lambda *arguments: RangeHandler(*arguments, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests, server.failures, server.ranges = [], [], True
        server.url = f"http://127.0.0.1:{server.server_port}/shards"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_equal_those_from_files(tmp_path, server, workers):
    spec, _ = sharded(tmp_path, "Rain1400", count=3)
    expected = training_batches(data(spec))
    module = data(server.url, workers=workers)
    assert server.requests == [("/shards/train-index.json.gz", None)]
    assert_equal_batches(expected, training_batches(module))
    assert all(requested_range for _, requested_range in server.requests[1:])
    assert len(server.requests) == 1 + 2 * len(module.pairs["train"])


def test_interrupted_reads_are_repeated(tmp_path, server, caplog):
    spec, _ = sharded(tmp_path)
    pair = find_pairs(server.url, "train").pairs[0]
    server.failures = ["interrupted", 503]
    np.testing.assert_array_equal(pair.read()[0], find_pairs(spec, "train").pairs[0].read()[0])
    assert sum("trying again" in record.message for record in caplog.records) == 2
    server.failures = [500, "interrupted", 503]
    with pytest.raises(DerainError, match=rf"{re.escape(pair.rainy.shard)}.*3 attempts.*training/1\.jpg"):
        pair.read()


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_not_repeated(tmp_path, server, status):
    sharded(tmp_path)
    server.failures = [status, status]
    with pytest.raises(DerainError, match=str(status)):
        find_pairs(server.url, "train")
    assert len(server.requests) == 1


def test_wrong_answers_of_a_server_are_refused(tmp_path, server):
    sharded(tmp_path)
    pair = find_pairs(server.url, "train").pairs[-1]
    path = tmp_path / "shards" / pair.rainy.shard
    content = path.read_bytes()
    server.ranges = False
    with pytest.raises(DerainError, match="ranges of bytes"):
        pair.read()
    server.ranges = True
    path.write_bytes(content[: pair.rainy.offset + 10])
    with pytest.raises(DerainError, match="truncated"):
        pair.read()
    path.unlink()
    with pytest.raises(DerainError, match=r"no such file.*training/6\.jpg"):
        pair.read()


def test_an_unreachable_host_is_one_line(tmp_path, server, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = EXPERIMENT | {"data": EXPERIMENT["data"] | {"train": "http://127.0.0.1:1/set"}}
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(config))
    assert fit() == 2
    assert "http://127.0.0.1:1/set/train-index.json.gz" in error_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_stops_at_damage_in_one_line(tmp_path, capsys, monkeypatch, workers):
    monkeypatch.chdir(tmp_path)
    _, location = sharded(tmp_path)
    for image in {pair.rainy for pair in find_pairs(location, "train").pairs}:
        change(tmp_path / "shards" / image.shard, image.offset + 20)
    config = EXPERIMENT | {"data": EXPERIMENT["data"] | {"train": location, "cache": "off", "workers": workers}}
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(config))
    assert fit() == 2
    assert re.search(r"train-00000\d\.tar: training/\d\.jpg", error_line(capsys))


class HubFile(AbstractBufferedFile):
    """A file of a file system that reads ahead, as the hub's does."""

    def _fetch_range(self, start, end):
        self.fs.ranges.append((start, end))
        return self.fs.content[self.path][start:end]


class HubFileSystem(fsspec.AbstractFileSystem):
    protocol = "testhub"
    content: ClassVar[dict] = {}
    ranges: ClassVar[list] = []

    def info(self, path, **options):
        return {"name": path, "size": len(self.content[path]), "type": "file"}

    def _open(self, path, mode="rb", **options):
        return HubFile(self, path, mode, **options)


def test_file_systems_do_not_read_ahead(tmp_path):
    spec, _ = sharded(tmp_path)
    with contextlib.suppress(ValueError):
        fsspec.register_implementation("testhub", HubFileSystem)
    HubFileSystem.content = {f"set/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    pair = find_pairs("testhub://set", "train").pairs[0]
    HubFileSystem.ranges.clear()
    np.testing.assert_array_equal(pair.read()[0], find_pairs(spec, "train").pairs[0].read()[0])
    assert HubFileSystem.ranges == [(pair.rainy.offset, pair.rainy.offset + pair.rainy.length)]
