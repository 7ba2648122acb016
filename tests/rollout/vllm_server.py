"""A real vLLM server on the CPU, started and stopped by the tests marked ``server``.

``OPD_VLLM_PYTHON`` names the Python of an environment that has vLLM; the tests need nothing of it but
what it answers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
FLAGS = (
    "--dtype float32 --max-model-len 512 --enforce-eager --kv-cache-memory-bytes 67108864 "
    "--max-num-batched-tokens 16384 --no-enable-chunked-prefill --generation-config vllm --seed 0 "
    "--disable-uvicorn-access-log"
).split()


def vllm_python() -> str:
    """The Python to serve with; skips the test where there is none."""
    python = os.environ.get("OPD_VLLM_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("OPD_VLLM_PYTHON does not name the Python of an environment with vLLM")
    return python


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of a server of a checkpoint folder; it ends with the context."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy", *FLAGS, *flags]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX", "XLA"))}
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env={**env, **OFFLINE}, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )
        try:
            _wait(url, server, log)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)  # a group of its own, so nobody else's
                server.wait(10)


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"no health after 600 s: {log.read_text()[-3000:]}")
