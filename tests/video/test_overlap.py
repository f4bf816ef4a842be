import threading
import time

import numpy as np
import pytest

from derain.video.overlap import QUEUE, Frame, Packet, overlap


def frames(count, log=None):
    """Yield frames that contain their number, with a packet before every third, and a packet at the end."""
    for number in range(count):
        if log is not None:
            log.append(number)
        packets = [Packet(f"before {number}", 1)] if number % 3 == 0 else []
        yield Frame(packets, np.full((1, 1, 3), number % 256, np.uint8), number, 1)
    yield Frame([Packet("end", 1)], None)


def test_frames_are_written_in_order_with_the_packets_before_them():
    written = []

    def invert_in_batches(pixels):
        batch = []
        for frame in pixels:
            batch.append(255 - frame.pixels)
            if len(batch) == 7:
                yield from batch
                batch = []
        yield from batch

    overlap(frames(50), invert_in_batches, lambda frame, pixels: written.append((frame, pixels)))
    assert [frame.pts for frame, _ in written] == [*range(50), None]
    assert [int(pixels[0, 0, 0]) for _, pixels in written[:-1]] == [255 - number for number in range(50)]
    contents = [packet.content for frame, _ in written for packet in frame.packets]
    assert contents == [f"before {number}" for number in range(0, 50, 3)] + ["end"]


def test_memory_does_not_grow_with_the_number_of_frames():
    """At most QUEUE frames wait on either side, one is in each of the three threads, with 10,000 frames."""
    alive, peak = set(), 0
    lock = threading.Lock()

    class Tracked(np.ndarray):
        def __array_finalize__(self, source):
            nonlocal peak
            with lock:
                alive.add(id(self))
                peak = max(peak, len(alive))

        def __del__(self):
            with lock:
                alive.discard(id(self))

    def source():
        for number in range(10_000):
            yield Frame([], np.zeros((2, 2, 3), np.uint8).view(Tracked), number, 1)
        yield Frame([], None)

    written = 0

    def write(frame, pixels):
        nonlocal written
        written += pixels is not None

    overlap(source(), lambda frames: (frame.pixels for frame in frames), write)
    assert written == 10_000
    assert peak <= 2 * QUEUE + 6


@pytest.mark.parametrize("slow", ["read", "change", "write"])
def test_a_slow_part_stops_the_others(slow):
    """Reading is never more than the queues ahead of writing, whichever part is slow."""
    read, written, lead = [], [], []

    def source():
        for frame in frames(30, read):
            time.sleep(0.003 * (slow == "read"))
            yield frame

    def change(pixels):
        for frame in pixels:
            time.sleep(0.003 * (slow == "change"))
            yield frame.pixels

    def write(frame, pixels):
        time.sleep(0.003 * (slow == "write"))
        lead.append(len(read) - len(written))
        written.append(frame)

    overlap(source(), change, write)
    assert len(written) == 31
    assert max(lead) <= 2 * QUEUE + 4


def test_the_three_parts_run_at_the_same_time():
    """Each part waits for another: with one part at a time, this would not end."""
    read_second, changing = threading.Event(), threading.Event()

    def source():
        for frame in frames(2 * QUEUE):
            if frame.pts == 1:
                read_second.set()
            if frame.pts == QUEUE + 1:
                assert changing.wait(60)
            yield frame

    writing = threading.Event()

    def change(pixels):
        for number, frame in enumerate(pixels):
            if number == 0:
                assert read_second.wait(60)  # is read while the first is changed
            if number == 1:
                changing.set()
                assert writing.wait(60)  # the first is written while the second is changed
            yield frame.pixels

    overlap(source(), change, lambda frame, pixels: writing.set())


class Failure(Exception):
    pass


@pytest.mark.parametrize("part", ["read", "change", "write"])
def test_an_error_of_any_part_is_raised_and_ends_the_threads(part):
    before = threading.active_count()

    def fail(name, number):
        if name == part and number == 5:
            raise Failure(name)

    def source():
        for frame in frames(1000):
            fail("read", frame.pts)
            yield frame

    def change(pixels):
        for number, frame in enumerate(pixels):
            fail("change", number)
            yield frame.pixels

    with pytest.raises(Failure, match=part):
        overlap(source(), change, lambda frame, pixels: fail("write", frame.pts))
    assert threading.active_count() == before


def test_as_many_frames_are_changed_as_read():
    def only_the_first(pixels):
        yield next(pixels).pixels
        list(pixels)

    with pytest.raises(RuntimeError, match="2 frames"):
        overlap(frames(3), only_the_first, lambda *_: None)
    with pytest.raises(RuntimeError, match="more"):
        overlap(
            frames(3),
            lambda frames: iter([*(frame.pixels for frame in frames), np.zeros((1, 1, 3), np.uint8)]),
            lambda *_: None,
        )
