"""The page of ``derain app`` under load: 20 users, 200 photos and hostile requests.

The page runs in another process, on the CPU, with a small PReNet; all requests are local. Targets: every photo is
restored, and every request with a foreign path, file, host or origin is refused. Abandoned jobs may be accepted.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from derain.methods import PReNetModule

USERS, PHOTOS_PER_USER, ATTACKERS = 20, 10, 4
SIZE = (320, 240)
PATHS = ("{secret}", "{upload}/../../../secret.png", "file://{secret}", "http://127.0.0.1:1/x.png", "/etc/passwd")
HOSTS = ("evil.example", "127.0.0.1.evil.example", "192.0.2.1", "[::2]:80")
ORIGINS = ("http://evil.example", "null", "http://localhost:3000")


def user(address: str, photo: bytes, number: int) -> list[tuple[str, float]]:
    """Restore `PHOTOS_PER_USER` copies of a photo one after another, like a browser; return outcomes and seconds."""
    outcomes = []
    with httpx.Client(base_url=address, timeout=300) as client:
        client.get("/")
        for i in range(PHOTOS_PER_USER):
            start = time.perf_counter()
            name = f"{number}-{i}.png"
            path = client.post("/gradio_api/upload", files={"files": (name, photo)}).json()[0]
            data = [{"path": path, "orig_name": name}, "w · PReNet", 0, 0, "full", 1]
            joined = client.post("/gradio_api/call/restore", json={"data": data})
            if joined.status_code != 200:
                outcomes.append((str(joined.status_code), time.perf_counter() - start))
                continue
            answer = client.get(f"/gradio_api/call/restore/{joined.json()['event_id']}").text
            link = re.search(rf"/gradio_api/file=[^\"]*{number}-{i}-derained\.png", answer)
            restored = link is not None and client.get(link[0]).status_code == 200
            outcomes.append(("restored" if restored else "lost", time.perf_counter() - start))
    return outcomes


def attack(address: str, secret: Path, upload: str, done: threading.Event) -> Counter[str]:
    """Request private files, use foreign hosts and origins, and abandon jobs until ``done``; count the answers."""
    answers: Counter[str] = Counter()
    with httpx.Client(base_url=address, timeout=60) as client:
        while not done.is_set():
            for path in PATHS:
                for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
                    file = {"path": path.format(secret=secret, upload=upload), **meta}
                    response = client.post(
                        "/gradio_api/call/restore", json={"data": [file, "w · PReNet", 0, 0, "full", 1]}
                    )
                    answers[f"path {response.status_code}"] += 1
            for host in HOSTS:
                response = client.get("/config", headers={"host": host})
                answers[f"host {response.status_code}"] += 1
            for origin in ORIGINS:
                response = client.post("/gradio_api/queue/join", json={"data": []}, headers={"origin": origin})
                answers[f"origin {response.status_code}"] += 1
            response = client.get(f"/gradio_api/file={secret}")
            answers[f"file {response.status_code}"] += 1
            for i in range(10):
                job = {"data": [{"path": upload}, "w · PReNet", 0, 0, "full", 1], "session_hash": f"abandoned{i}"}
                response = client.post("/gradio_api/call/restore", json=job)
                answers[f"abandoned {response.status_code}"] += 1
            time.sleep(0.2)
    return answers


def main() -> int:
    """Print outcomes, times and the memory of the page; return 1 if a target is missed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        PReNetModule(stages=1).save_weights(folder / "w.safetensors")
        pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "secret.png")
        photo = (folder / "secret.png").read_bytes()
        command = ["-m", "derain", "app", "--port", "0", "--device", "cpu", "--weights", str(folder / "w.safetensors")]
        page = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        try:
            assert page.stdout is not None
            address = page.stdout.readline().split()[0]
            upload = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", photo)}).json()[0]
            memory = psutil.Process(page.pid)
            before, done = memory.memory_info().rss, threading.Event()
            with ThreadPoolExecutor(USERS + ATTACKERS) as threads:
                start = time.perf_counter()
                attacks = [
                    threads.submit(attack, address, folder / "secret.png", upload, done) for _ in range(ATTACKERS)
                ]
                users = [threads.submit(user, address, photo, i) for i in range(USERS)]
                outcomes = [outcome for future in users for outcome in future.result()]
                seconds = time.perf_counter() - start
                done.set()
                answers = sum((future.result() for future in attacks), Counter())
            times = sorted(time for _, time in outcomes)
            print(f"{USERS} users, {len(outcomes)} photos of {SIZE[0]} × {SIZE[1]} in {seconds:.1f} s: ", end="")
            print(", ".join(f"{n} {name}" for name, n in Counter(name for name, _ in outcomes).items()))
            print(f"seconds per photo: median {statistics.median(times):.2f}, 95 % {times[int(0.95 * len(times))]:.2f}")
            print("hostile requests by kind and status:", dict(sorted(answers.items())))
            grown = (memory.memory_info().rss - before) / 1e6
            print(f"memory of the page: {before / 1e6:.0f} MB, {grown:+.0f} MB")
            allowed = {"path 403", "host 403", "origin 403", "file 403", "abandoned 200", "abandoned 429"}
            return int({name for name, _ in outcomes} != {"restored"} or not set(answers) <= allowed)
        finally:
            page.terminate()
            page.wait()


if __name__ == "__main__":
    sys.exit(main())
