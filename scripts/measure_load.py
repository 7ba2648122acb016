"""Memory of loading: a random bf16 checkpoint of the shape of Qwen3-0.6B, in three files.

    .venv/bin/python scripts/measure_load.py            # about three minutes, 1.2 GB of disk

The checkpoint is made in a temporary folder and loaded in processes of their own: on one device, on eight
fake ones, and by two processes of four. A thread samples, every few milliseconds, the process's anonymous
memory (RssAnon; on a CPU the arrays are part of it, the mapped files are not) and the bytes that live
arrays hold on each device. Printed are the peaks, a line of JSON for each process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp

from opd_jax.model import init_params, load_pretrained, make_mesh, parameter_table, preset, save_pretrained

MODEL = "qwen3-0.6b"
SHARD_BYTES = 450 * 10**6  # three files
# Name: data x fsdp x tensor of the mesh, processes. None is one device without a mesh.
LOADS: dict[str, tuple[tuple[int, int, int] | None, int]] = {
    "one device": (None, 1),
    "fsdp 8": ((1, 8, 1), 1),
    "fsdp 4 x tensor 2": ((1, 4, 2), 1),
    "data 2 x fsdp 2 x tensor 2": ((2, 2, 2), 1),
    "fsdp 8, two processes": ((1, 8, 1), 2),
}


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status; Linux is needed")


def device_bytes() -> Counter[jax.Device]:
    """What live arrays hold on each device, a buffer that several arrays share counted once."""
    buffers = {
        (device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
        for device in [shard.device]
    }
    held: Counter[jax.Device] = Counter()
    for (device, _), size in buffers.items():
        held[device] += size
    return held


class Peaks:
    """The largest values seen while the block runs, sampled by a thread."""

    def __enter__(self) -> Peaks:
        self.before, self.anonymous, self.device = anonymous_bytes(), 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.sample()

    def sample(self) -> None:
        self.anonymous = max(self.anonymous, anonymous_bytes() - self.before)
        self.device = max(self.device, *device_bytes().values(), 0)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.sample()


def load(folder: Path, name: str, process: int, port: int) -> dict:
    """Load in this process and tell the peaks."""
    shape, processes = LOADS[name]
    if shape:
        jax.config.update("jax_num_cpu_devices", math.prod(shape) // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = make_mesh(*shape) if shape else None
    jax.block_until_ready(jnp.zeros(()))  # what the backend itself needs is there before the count
    began = time.monotonic()
    with Peaks() as peaks:
        config, params = load_pretrained(folder, mesh=mesh, dtype=jnp.bfloat16)
    weights = [2 * math.prod(parameter.shape) for parameter in parameter_table(config).values()]
    share = max(device_bytes().values())
    del params
    return {
        "load": name,
        "process": process,
        "checkpoint_bytes": sum(weights),
        "largest_parameter_bytes": max(weights),
        "anonymous_growth_bytes": peaks.anonymous,
        "anonymous_growth_over_checkpoint": round(peaks.anonymous / sum(weights), 3),
        "device_share_bytes": share,
        "device_peak_bytes": peaks.device,
        "seconds": round(time.monotonic() - began, 1),
    }


def measure(folder: Path, name: str) -> list[dict]:
    """Load in processes of their own; returns what each of them saw."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--load", name, "--folder", str(folder), "--port", str(port)]
    with tempfile.TemporaryDirectory() as temporary:
        outs = [Path(temporary) / str(process) for process in range(LOADS[name][1])]
        children = [
            subprocess.Popen([*command, "--process", str(process), "--out", str(out)], env=environment)
            for process, out in enumerate(outs)
        ]
        for child in children:
            if child.wait():
                raise SystemExit(f"loading ({name}) ended with {child.returncode}")
        return [json.loads(out.read_text()) for out in outs]


def make_checkpoint(folder: Path) -> None:
    config = preset(MODEL)
    params = jax.jit(lambda: init_params(config, jax.random.key(0), jnp.bfloat16))()
    save_pretrained(folder, config, params, shard_bytes=SHARD_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", choices=LOADS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="a checkpoint to load instead of one made here")
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        told = load(given.folder, given.load, given.process, given.port)
        given.out.write_text(json.dumps(told))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / MODEL
        if not given.folder:
            make_checkpoint(folder)
        for name in LOADS:
            for line in measure(folder, name):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
