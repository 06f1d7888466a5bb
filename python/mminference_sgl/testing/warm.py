"""Servers forked from a process that has imported SGLang already.

Starting ``python -m sglang.launch_server`` is mostly imports, three times over: in the launcher, the scheduler and the
detokenizer. Here one process imports once, and every server and its children are forked from it; from then on they run
what the module runs, as processes of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

_READ_ON_IMPORT = ("SGLANG_PLATFORM", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_forked_from: dict[str, str | None] = {}


class WarmProcess:
    """A forked launcher; what `Server` uses of ``subprocess.Popen``."""

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], log: Path, prepare: Sequence[Callable[[], None]] = ()
    ) -> None:
        """Fork one; the first call imports SGLang in the process that all are forked from.

        Functions of modules in `prepare` are called in the launcher, before it reads its arguments.

        Raises:
            ValueError: `env` differs from the first call's in what SGLang reads when it is imported.
        """
        read = {name: env.get(name) for name in _READ_ON_IMPORT}
        if _forked_from and _forked_from != read:
            raise ValueError(f"warm servers were imported with {_forked_from}, this one wants {read}")
        _forked_from.update(read)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mminference_sgl.testing.warm_imports"])
        arguments_of_serve = (list(arguments), dict(env), str(log), tuple(prepare))
        self._process: Any = context.Process(target=_serve, args=arguments_of_serve)
        with mock.patch.dict(os.environ, env, clear=True):
            self._process.start()
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if self.poll() is None and timeout is not None:
            raise subprocess.TimeoutExpired("sglang.launch_server", timeout)
        return self.poll()


def _serve(arguments: list[str], env: dict[str, str], log: str, prepare: tuple[Callable[[], None], ...]) -> None:
    """``python -m sglang.launch_server`` in a forked process: own session, own log, own environment."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(env)

    from sglang.launch_server import kill_process_tree, load_plugins, prepare_server_args, run_server
    from sglang.srt.entrypoints import engine, http_server

    # SGLang would spawn its processes, which imports everything again.
    set_start_method = engine.mp.set_start_method
    engine.mp.set_start_method = lambda *_, **__: set_start_method("fork", force=True)
    # Asked for over HTTP behind the warm-up request: without one, perhaps before anybody listens.
    http_server._freeze_gc_after_server_warmup = lambda *_: None
    load_plugins()
    for function in prepare:
        function()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
