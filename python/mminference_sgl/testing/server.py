"""An SGLang server as a context manager, and a client for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from mminference_sgl.portable.cpu import PLATFORM_NAME, wait_briefly
from mminference_sgl.testing.processes import Process, of_group, scheduler_of, shared_memory_of
from mminference_sgl.testing.warm import WarmProcess

if TYPE_CHECKING:
    from types import FrameType, TracebackType

Message = Mapping[str, Any]
"""One OpenAI chat message."""

_LOOPBACK = "127.0.0.1"
_TAIL_LINES = 40
_TERM_GRACE_S = 10.0
_FLUSH_WAIT_S = 10
_QUICK_ENV = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
"""The server is ready when its scheduler is; otherwise a health check generates a token, and looks once a second."""


class ServerError(RuntimeError):
    """A server that did not start, died, or refused a request; ends with the tail of its log."""

    def __init__(self, message: str, log: str = "", returncode: int | None = None) -> None:
        tail = "\n".join(log.splitlines()[-_TAIL_LINES:])
        super().__init__(f"{message}\n--- end of the server's log ---\n{tail}" if tail else message)
        self.log = log
        self.returncode = returncode


@dataclass(frozen=True)
class Answer:
    """What a server said to one request."""

    text: str
    seconds: float
    """From sending the request to having the whole answer."""
    ttft: float | None = None
    """From sending the request to its first token; streamed requests only."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Log-probability of each generated token."""
    top: tuple[dict[int, float], ...] = ()
    """For each generated token, the likeliest token ids and their log-probabilities."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    """SGLang's ``meta_info``; with ``metrics=True`` it holds the request's time stamps."""

    @property
    def preprocess_s(self) -> float:
        """Seconds of decoding, resizing and tokenizing. Needs ``metrics=True``."""
        return float(self.meta["api_server_dispatch_finish_ts"] - self.meta["request_received_ts"])

    @property
    def forward_s(self) -> float:
        """Seconds from the first chunk's start to the first token. Needs ``metrics=True``.

        The language model's prefill, and the vision tower unless its embeddings were cached.
        """
        return float(self.meta["prefill_finished_time"] - self.meta["forward_entry_time"])


class Server:
    """An SGLang server in its own process group, as a context manager.

    Whatever ends the ``with`` block (its end, an exception, Ctrl-C, SIGTERM, SIGHUP) ends every
    process of the server.

    Args:
        model: directory or name of the model.
        attention_backend: ``--attention-backend``; None leaves the platform's default, which is dense.
        chunked_prefill_size: ``--chunked-prefill-size``; -1 is one chunk, None is SGLang's choice.
        env: environment variables on top of the caller's; the value None removes one.
        args: further command-line arguments.
        platform: ``SGLANG_PLATFORM``; None leaves the variable alone.
        max_total_tokens: slots of the KV pool.
        overlap_schedule: let SGLang schedule a batch while the one before it runs; off unless asked for.
        metrics: ask SGLang for the time stamps behind `Answer.preprocess_s` and `Answer.forward_s`.
        log_path: where the log goes; by default a temporary file that goes away with the server.
        start_timeout: seconds the server may take to be ready.
        warm: fork the server from a process that has imported SGLang, see `mminference_sgl.testing.warm`.
        prepare: functions of modules that a warm server calls before it starts, for what tests put in SGLang's place.
        quick: skip SGLang's own warm-up request and kill the server at its end: two seconds each. One that is not warm
            may log that it could not freeze its garbage collector, which SGLang asks itself over HTTP.

    Raises:
        ValueError: `prepare` without `warm`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        attention_backend: str | None = None,
        chunked_prefill_size: int | None = None,
        env: Mapping[str, str | None] | None = None,
        args: Sequence[str] = (),
        platform: str | None = PLATFORM_NAME,
        max_total_tokens: int = 65536,
        overlap_schedule: bool = False,
        metrics: bool = False,
        log_path: str | Path | None = None,
        start_timeout: float = 300.0,
        warm: bool = False,
        prepare: Sequence[Callable[[], None]] = (),
        quick: bool = False,
    ) -> None:
        if prepare and not warm:
            raise ValueError("only a warm server can be prepared")
        self.port = _free_port()
        self.url = f"http://{_LOOPBACK}:{self.port}"
        self.start_seconds = 0.0
        self._timeout = start_timeout
        self._log_path = Path(log_path) if log_path is not None else _temporary_log()
        self._keep_log = log_path is not None
        self._last_log = ""
        self._env = _environment(platform, {**(_QUICK_ENV if quick else {}), **(env or {})})
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        self.command += ["--host", _LOOPBACK, "--port", str(self.port)]
        self.command += ["--max-total-tokens", str(max_total_tokens), "--sleep-on-idle"]
        if platform == PLATFORM_NAME:
            self.command += ["--device", "cpu", "--mem-fraction-static", "0.2"]
        if not overlap_schedule:
            self.command += ["--disable-overlap-schedule"]
        if attention_backend is not None:
            self.command += ["--attention-backend", attention_backend]
        if chunked_prefill_size is not None:
            self.command += ["--chunked-prefill-size", str(chunked_prefill_size)]
        if metrics:
            self.command += ["--enable-metrics"]
        if quick:
            self.command += ["--skip-server-warmup"]
        self.command += args
        self._warm, self._prepare, self._quick = warm, prepare, quick
        self._process: subprocess.Popen[bytes] | WarmProcess | None = None
        self._signals = _ExitOnSignals()
        self._http = httpx.Client(base_url=self.url, timeout=httpx.Timeout(600.0, connect=5.0), trust_env=False)

    def __enter__(self) -> Server:
        self._signals.install()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        began = time.monotonic()
        if self._warm:
            self._log_path.write_bytes(b"")
            self._process = WarmProcess(self.command[3:], self._env, self._log_path, self._prepare)
        else:
            with self._log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._env,
                    start_new_session=True,
                )
        while time.monotonic() - began < self._timeout:
            if (code := self._process.poll()) is not None:
                raise ServerError(
                    f"the server stopped with exit code {code} before it was ready",
                    self.log(),
                    code,
                )
            with contextlib.suppress(httpx.TransportError):
                if self._http.get("/health", timeout=20.0).status_code == httpx.codes.OK:
                    self.start_seconds = time.monotonic() - began
                    return
            time.sleep(0.2)
        raise ServerError(f"the server was not ready after {self._timeout:.0f} s", self.log())

    def stop(self) -> None:
        """End every process of the server; harmless when it is not running."""
        process, self._process = self._process, None
        try:
            if process is not None:
                _end_group(process, 0.0 if self._quick else _TERM_GRACE_S)
        finally:
            self._http.close()
            self._signals.restore()
            if not self._keep_log:
                self._last_log = self.log()
                self._log_path.unlink(missing_ok=True)

    @property
    def group(self) -> int:
        """Process group of all its processes.

        Raises:
            ServerError: it is not running.
        """
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process.pid

    def processes(self) -> list[Process]:
        """All its processes, the launcher first."""
        return of_group(self.group)

    def scheduler(self) -> Process:
        """The process that holds the model, or most of it."""
        return scheduler_of(self.group)

    def log(self, since: int = 0) -> str:
        """The server's log from character `since` on; ``len(server.log())`` marks the present."""
        try:
            return self._log_path.read_text(encoding="utf-8", errors="replace")[since:]
        except FileNotFoundError:
            return self._last_log[since:]

    def flush_cache(self) -> None:
        """Empty the radix cache (SGLang keeps its cache of vision embeddings), once no request is left."""
        self._post(f"/flush_cache?timeout={_FLUSH_WAIT_S}", {})

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        *,
        stream: bool = False,
        logprobs: bool = True,
        top_logprobs: int = 5,
        **options: Any,
    ) -> Answer:
        """Ask ``/v1/chat/completions``, greedily.

        A streamed answer has `Answer.ttft`, but neither log-probabilities nor time stamps: SGLang
        gives those to whole answers only.
        """
        body: dict[str, Any] = {
            "model": "default",
            "messages": list(messages),
            "temperature": 0,
            **options,
        }
        body["max_tokens"] = max_tokens
        if stream:
            return self._stream({**body, "stream": True, "stream_options": {"include_usage": True}})
        body["return_meta_info"] = True
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        began = time.monotonic()
        reply = self._post("/v1/chat/completions", body)
        seconds = time.monotonic() - began
        choice = reply["choices"][0]
        return _answer(choice["message"]["content"] or "", choice["meta_info"], seconds)

    def generate(
        self,
        text: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        image_data: Sequence[str] | None = None,
        video_data: Sequence[str] | None = None,
        max_tokens: int = 16,
        stream: bool = False,
        top_logprobs: int = 5,
        **options: Any,
    ) -> Answer:
        """Ask SGLang's native ``/generate``, greedily.

        The prompt holds one placeholder token per image or video.
        """
        body: dict[str, Any] = {
            "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens},
            "return_logprob": True,
            "top_logprobs_num": top_logprobs,
            **options,
        }
        given = {
            "text": text,
            "input_ids": input_ids,
            "image_data": image_data,
            "video_data": video_data,
        }
        body |= {key: value for key, value in given.items() if value is not None}
        began = time.monotonic()
        if not stream:
            reply = self._post("/generate", body)
            return _answer(reply["text"], reply["meta_info"], time.monotonic() - began)
        ttft = None
        for reply in self._events("/generate", {**body, "stream": True}):
            if "error" in reply:
                raise ServerError(f"/generate answered {reply['error']}", self.log())
            ttft = time.monotonic() - began if ttft is None else ttft
        return _answer(reply["text"], reply["meta_info"], time.monotonic() - began, ttft)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a piece of a prompt."""
        return int(self._post("/tokenize", {"prompt": text, "add_special_tokens": False})["count"])

    def open_session(self, capacity: int = 1 << 20) -> str:
        """Open one of SGLang's sessions: its requests continue one another without sending media again.

        Pass ``session_params={"id": ...}`` to `generate`, and on later turns also ``rid``, the
        ``meta["id"]`` of the answer to continue, and ``offset``, how many tokens of its prompt to keep.
        """
        return str(self._post("/open_session", {"capacity_of_str_len": capacity}))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            response = self._http.post(path, json=body)
        except httpx.TransportError as error:
            raise ServerError(f"{path} failed: {error!r}", self.log()) from error
        if response.status_code != httpx.codes.OK:
            raise ServerError(f"{path} answered {response.status_code}: {response.text[:2000]}", self.log())
        return response.json() if "json" in response.headers.get("content-type", "") else response.text

    def _stream(self, body: dict[str, Any]) -> Answer:
        text = ""
        ttft: float | None = None
        usage: dict[str, Any] = {}
        began = time.monotonic()
        for event in self._events("/v1/chat/completions", body):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    ttft = time.monotonic() - began if ttft is None else ttft
                    text += piece
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        seconds = time.monotonic() - began
        return Answer(text, seconds, ttft, prompt_tokens=usage.get("prompt_tokens", 0), cached_tokens=cached)

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of a streamed answer."""
        with self._http.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                detail = response.read().decode(errors="replace")[:2000]
                raise ServerError(f"{path} answered {response.status_code}: {detail}", self.log())
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))


def user_message(text: str, *, images: Sequence[str] = (), videos: Sequence[str] = (), before: str = "") -> Message:
    """A chat message: the text `before`, the images, the videos (URLs or paths), then the text."""
    content: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    content += [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content += [{"type": "video_url", "video_url": {"url": url}} for url in videos]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _answer(text: str, meta: dict[str, Any], seconds: float, ttft: float | None = None) -> Answer:
    """From SGLang's ``meta_info``; its log-probabilities are ``[value, token id, text]`` triples."""
    chosen = meta.pop("output_token_logprobs", None) or []
    likely = meta.pop("output_top_logprobs", None) or []
    return Answer(
        text,
        seconds,
        ttft,
        token_ids=tuple(int(token) for _, token, _ in chosen),
        logprobs=tuple(float(value) for value, _, _ in chosen),
        top=tuple({int(token): float(value) for value, token, _ in row} for row in likely),
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
        meta=meta,
    )


def _environment(platform: str | None, extra: Mapping[str, str | None]) -> dict[str, str]:
    """The caller's environment, with one OpenMP thread per core that this process may use.

    Byte code is always cached: a server is three processes that import SGLang, and compiling it
    would take most of their start.
    """
    inherited = dict(os.environ)
    if platform == PLATFORM_NAME:
        # What warm servers are forked from has started OpenMP by the time that the platform says so.
        wait_briefly(inherited)
    env: dict[str, str | None] = {
        **inherited,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": None,
    }
    env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_OFFLINE", "1")
    if platform is not None:
        env["SGLANG_PLATFORM"] = platform
    return {key: value for key, value in {**env, **extra}.items() if value is not None}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="mminference-server-", suffix=".log")
    os.close(handle)
    return Path(name)


def _end_group(process: subprocess.Popen[bytes] | WarmProcess, grace: float) -> None:
    """Ask the leader of a process group to end, unless there is no grace, then kill what is left of the group."""
    shared = shared_memory_of(process.pid)
    try:
        if grace:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        # One that has just been forked leads no group yet.
        process.kill()
        process.wait()
        for path in shared:
            path.unlink(missing_ok=True)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class _ExitOnSignals:
    """Turns SIGTERM and SIGHUP into SystemExit, so that ``with`` blocks end as on exceptions."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._leave) for n in (signal.SIGTERM, signal.SIGHUP)}

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @staticmethod
    def _leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)
