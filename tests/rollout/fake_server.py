"""An HTTP server in the test's own process that answers like vLLM, and fails when told to."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from opd_jax.model.vocab import TopK

EOS, USABLE, VOCABULARY, CAP = 0, 12, 16, 5
STATUSES = ("429", "500", "503", "404", "501", "529")


def likelihood(previous: int, weights: int = 0) -> np.ndarray:
    """Log-probs ``[V]`` of what follows an id, under weights of that number."""
    logits = np.random.default_rng([previous, weights]).normal(size=VOCABULARY)
    logits[USABLE:] = -10.0
    return logits - np.log(np.sum(np.exp(logits)))


def drawn(body: dict[str, Any], weights: int = 0) -> tuple[list[int], list[float]]:
    """What the server draws: a function of prompt and seed alone."""
    draw = np.random.default_rng(body["seed"])
    previous, ids, logprobs = body["prompt"][-1], [], []
    while len(ids) < body["max_tokens"] and ids[-1:] != [EOS]:
        told = likelihood(previous, weights)
        previous = int(draw.choice(USABLE, p=np.exp(told[:USABLE]) / np.sum(np.exp(told[:USABLE]))))
        ids.append(previous)
        logprobs.append(float(told[previous]))
    return ids, logprobs


class FakeServer:
    """Use as a context; ``fault(number of the request, body)`` names what goes wrong, or nothing."""

    def __init__(self, fault: Callable[[int, dict], str | None] = lambda number, body: None) -> None:
        self.fault = fault
        self.seen: list[tuple[str, Any]] = []  # paths and bodies
        self.times: list[float] = []
        self.weights = 0
        self.paused = False
        self.loads = lambda path: 0  # the number of the weights in a folder
        self.control: Callable[[str], str | None] = lambda path: None  # faults of all but completions
        self.room = 1000  # completions at a time; to more it says 429
        self.inside = 0
        self.release = threading.Event()  # ends stalls and holds
        self.arrived = threading.Semaphore(0)  # once for every request
        self._lock = threading.Lock()

    def __enter__(self) -> FakeServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *args: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def bodies(self) -> list[dict]:
        return [body for path, body in self.seen if path == "/v1/completions"]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        text = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        body = json.loads(text or b"null")
        with self._lock:
            number = len(self.bodies)
            self.seen.append((handler.path, body))
            self.times.append(time.monotonic())
        self.arrived.release()
        if handler.path == "/v1/completions":
            with self._lock:
                full = self.inside >= self.room
                self.inside += not full
            if full:
                _reply(handler, 429, {"error": {"message": "full"}})
                return
            self._complete(handler, number, body)
            with self._lock:
                self.inside -= 1
            return
        fault = self.control(handler.path)
        if fault == "stall":
            self.release.wait(30)
        if fault == "die":
            _hang_up(handler)
        elif fault in STATUSES:
            _reply_status(handler, fault)
        elif handler.path == "/collective_rpc":
            weights = self.loads(body["kwargs"]["weights_path"])
            if weights is not None:
                self.weights = weights
            _reply(handler, 500 if weights is None else 200, {"results": [None]})
        else:
            self.paused = handler.path.startswith("/pause")
            _reply(handler, 200, {"status": "done"})

    def _complete(self, handler: BaseHTTPRequestHandler, number: int, body: dict) -> None:
        fault = self.fault(number, body)
        if fault in ("stall", "hold"):
            self.release.wait(30)
        if fault == "die":
            _hang_up(handler)
            return
        if fault == "die midway":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.wfile.flush()
            _hang_up(handler)
            return
        if fault == "page":
            _reply(handler, 200, "<html>welcome</html>")
        elif fault == "half":
            _reply(handler, 200, '{"choices": [')
        elif fault == "deep":
            _reply(handler, 200, "[" * 100_000)
        elif fault in STATUSES:
            _reply_status(handler, fault)
        elif body.get("prompt_logprobs", 0) > CAP:
            asked = body["prompt_logprobs"]
            message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {CAP}"
            _reply(handler, 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        else:
            _reply(handler, 200, {"choices": [self._choice(fault, body)]})

    def _choice(self, fault: str | None, body: dict) -> dict[str, Any]:
        choice: dict[str, Any] = {"prompt_token_ids": body["prompt"]}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None, *self._prompt_logprobs(body)]
            _spoil_scores(choice, fault)
            return choice
        ids, logprobs = drawn(body, self.weights)
        choice["token_ids"], choice["logprobs"] = ids, {"token_logprobs": logprobs}
        choice["finish_reason"] = "stop" if ids[-1] == EOS else "length"
        _spoil(choice, fault)
        return choice

    def _prompt_logprobs(self, body: dict) -> list[dict]:
        entries = []
        for previous, id_ in itertools.pairwise(body["prompt"]):
            told = likelihood(previous, self.weights)
            order = np.argsort(-told, kind="stable")
            chosen = {int(best): float(told[best]) for best in order[: body["prompt_logprobs"]]}
            chosen[id_] = float(told[id_ % VOCABULARY])  # another model's tokens have a log-prob, too
            entries.append({str(one): {"logprob": logprob} for one, logprob in sorted(chosen.items())})
        return entries


def _spoil(choice: dict[str, Any], fault: str | None) -> None:
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if fault == "nan":
        logprobs[-1] = float("nan")
    elif fault == "floor":
        logprobs[0] = -9999.0
    elif fault == "positive":
        logprobs[0] = 0.5
    elif fault == "certain":
        logprobs[:] = [0.0] * len(ids)
    elif fault == "impossible":
        logprobs[0] = -9998.0
    elif fault == "count":
        logprobs.append(-1.0)
    elif fault == "empty":
        ids.clear()
        logprobs.clear()
    elif fault == "echo":
        choice["prompt_token_ids"] = [*choice["prompt_token_ids"], 1]
    elif fault == "id":
        ids[0] = USABLE
    elif fault == "no eos":
        choice.update(finish_reason="stop", token_ids=[1, 2], logprobs={"token_logprobs": [-1.0, -1.0]})
    elif fault == "float ids":
        choice["token_ids"] = [id_ + 0.9 for id_ in ids]
    elif fault == "text ids":
        choice["token_ids"] = [str(id_) for id_ in ids]
    elif fault == "text logprobs":
        choice["logprobs"]["token_logprobs"] = [str(logprob) for logprob in logprobs]
    elif fault == "past eos":
        choice.update(finish_reason="stop", token_ids=[EOS, EOS], logprobs={"token_logprobs": [-1.0, -1.0]})
    elif fault == "cut":
        choice.update(finish_reason="length", token_ids=[1, 2], logprobs={"token_logprobs": [-1.0, -1.0]})
    elif fault == "long":
        choice.update(finish_reason="length", token_ids=[1] * 99, logprobs={"token_logprobs": [-1.0] * 99})
    elif fault == "no ids":
        del choice["token_ids"]
    elif fault == "abort":
        choice["finish_reason"] = "abort"


def _spoil_scores(choice: dict[str, Any], fault: str | None) -> None:
    told = choice["prompt_logprobs"]
    if fault == "nan":
        next(iter(told[-1].values()))["logprob"] = float("nan")
    elif fault == "count":
        told.pop()
    elif fault == "fewer":
        told[-1] = dict(list(told[-1].items())[:1])
    elif fault == "lacks":
        told[-1].pop(str(choice["prompt_token_ids"][-1]))
    elif fault in ("-1", "16"):
        told[-1][fault] = {"logprob": -0.001}
        for id_ in told[-1].keys() - {fault}:
            told[-1][id_] = {"logprob": -8.0}
    elif fault == "mass":
        for entry in told[-1].values():
            entry["logprob"] = -0.01
    elif fault == "none":
        del choice["prompt_logprobs"]


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def _reply(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict | None = None) -> None:
    text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(text))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(text)


def _reply_status(handler: BaseHTTPRequestHandler, status: str) -> None:
    headers = {"Retry-After": "0.4"} if status in ("429", "503") else {}
    _reply(handler, int(status), {"error": {"message": f"a {status}"}}, headers)


def together(told, rows, k):
    """What `teacher_rows` yields, in one piece: zero off the mask."""
    shape = rows.mask.shape
    sampled, ids = np.zeros(shape, np.float32), np.zeros((*shape, k), np.int32)
    logprobs = np.zeros((*shape, k), np.float32)
    for row, columns in told:
        on = rows.mask[row]
        sampled[row, on], ids[row, on], logprobs[row, on] = columns
    return TopK(sampled, ids, logprobs, None)
