"""An SGLang server as a context manager."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from mminference_sgl.portable.cpu import PLATFORM_NAME, wait_briefly
from mminference_sgl.testing.client import Client, ServerError
from mminference_sgl.testing.processes import Process, of_group, scheduler_of, shared_memory_of
from mminference_sgl.testing.warm import WarmProcess

if TYPE_CHECKING:
    from types import FrameType, TracebackType

_LOOPBACK = "127.0.0.1"
_TERM_GRACE_S = 10.0
_QUICK_ENV = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
"""The server is ready when its scheduler is; otherwise a health check generates a token, and looks once a second."""


class Server(Client):
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
        super().__init__(f"http://{_LOOPBACK}:{self.port}")
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
