"""The server harness, with a small process in the place of SGLang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from torchcodec.decoders import VideoDecoder

from mminference_sgl import testing
from mminference_sgl.testing import processes

LOG = """\
[2026-01-01 00:00:00] mminference: model=Tiny pattern=auto active=True
[2026-01-01 00:00:01] mminference: request runs dense: geometry: item 0: spans overlap: (4, 9), (7, 12)
[2026-01-01 00:00:02] mminference prefill request=1 prefix=100 chunk=50 layers=2 density=0.25 coverage=0.9 error=0.1 x=7
[2026-01-01 00:00:02] Prefill batch, #new-seq: 1
[2026-01-01 00:00:03] mminference prefill request=0 prefix=0 chunk=100 layers=2 density=0.5 coverage=1.0 error=0.0
"""


def test_prefills():
    first, second = testing.prefills(LOG)
    assert first == testing.Prefill("1", prefix=100, chunk=50, layers=2, density=0.25, coverage=0.9, error=0.1)
    assert (second.prefix, second.chunk, second.density) == (0, 100, 0.5)


def test_fallbacks():
    assert testing.fallbacks(LOG) == [testing.Fallback("geometry", "item 0: spans overlap: (4, 9), (7, 12)")]


def test_start_lines():
    assert testing.start_lines(LOG) == ["model=Tiny pattern=auto active=True"]


def test_mean_density_weighs_by_area_and_counts_silent_chunks_as_dense():
    lines = testing.prefills(LOG)
    assert testing.mean_density([], 150) == 1.0
    assert testing.mean_density(lines, 150) == pytest.approx((0.25 * 50 * 125.5 + 0.5 * 5050) / (150 * 151 / 2))
    assert testing.mean_density(lines[1:], 150) == pytest.approx((50 * 125.5 + 0.5 * 5050) / (150 * 151 / 2))


def test_user_message_keeps_the_order():
    message = testing.user_message("after", images=["a.png"], videos=["b.mp4"], before="before")
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "video_url", "text"]


def test_write_mp4_keeps_frames_and_rate(tmp_path: Path):
    frames = np.zeros((7, 32, 64, 3), np.uint8)
    frames[:, :, :32] = np.linspace(0, 240, 7, dtype=np.uint8)[:, None, None, None]
    decoder = VideoDecoder(str(testing.write_mp4(tmp_path / "a.mp4", frames, fps=2)))
    assert decoder.metadata.average_fps == 2
    read = decoder[:].permute(0, 2, 3, 1).numpy()
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 5


def standing_in(server: testing.Server, script: str) -> testing.Server:
    """A server whose process runs `script` instead."""
    server.command = [sys.executable, "-c", textwrap.dedent(script)]
    return server


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """Whether a process ends within some seconds; one that is killed does not end at once."""
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


SPAWN = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)
"""


GROUP = """
    import subprocess, sys, time
    held = "import time; held = bytearray(b'x') * {}; print(flush=True); time.sleep(600)"
    children = [
        subprocess.Popen([sys.executable, "-c", held.format(size)], stdout=subprocess.PIPE) for size in (1, 64 << 20)
    ]
    for child in children:
        child.stdout.readline()
    print(*(child.pid for child in children), flush=True)
    time.sleep(600)
"""


def test_the_scheduler_is_the_largest_process_beside_the_launcher():
    command = [sys.executable, "-c", textwrap.dedent(GROUP)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as launcher:
        try:
            small, large = map(int, launcher.stdout.readline().split())
            found = processes.scheduler_of(launcher.pid)
            assert {one.pid for one in processes.of_group(launcher.pid)} == {launcher.pid, small, large}
            assert found.pid == large
            assert found.resident_bytes > 64 << 20
            assert found.name.startswith("python")
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError, match="no scheduler"):
        processes.scheduler_of(1 << 30)


def test_server_that_stops_shows_its_log():
    server = standing_in(testing.Server("none"), "print('the reason'); raise SystemExit(3)")
    with pytest.raises(testing.ServerError, match=r"exit code 3(.|\n)*the reason") as caught, server:
        pytest.fail("it cannot be ready")
    assert caught.value.returncode == 3
    assert "the reason" in caught.value.log
    assert "the reason" in server.log()


def test_server_that_is_never_ready_ends_with_its_children():
    server = standing_in(testing.Server("none", start_timeout=10), SPAWN)
    with pytest.raises(testing.ServerError, match="not ready after 10 s"), server:
        pytest.fail("it cannot be ready")
    assert ends(int(server.log().split()[1]))


def test_quick_server_is_killed_and_leaves_no_shared_memory():
    server = testing.Server("none", quick=True)
    assert "--skip-server-warmup" in server.command
    script = f"""
        import http.server, signal
        from multiprocessing.shared_memory import SharedMemory
        signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
        block = SharedMemory(create=True, size=1)
        print(block.name, flush=True)
        class Healthy(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
        http.server.HTTPServer(("127.0.0.1", {server.port}), Healthy).serve_forever()
    """
    with standing_in(server, script):
        block = Path("/dev/shm", server.log().split()[0])
        assert block.exists()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert "asked" not in server.log()
    assert not block.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_signal_to_the_caller_ends_the_server(tmp_path: Path, number: signal.Signals):
    log = tmp_path / "server.log"
    # A test run in the background ignores SIGINT, and its children would as well.
    script = f"""
        import signal, sys, textwrap
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from mminference_sgl.testing import Server
        server = Server("none", log_path={str(log)!r})
        server.command = [sys.executable, "-c", textwrap.dedent({SPAWN!r})]
        with server:
            pass
    """
    caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text().startswith("child")):
            assert time.monotonic() < deadline
            assert caller.poll() is None
            time.sleep(0.05)
        child = int(log.read_text().split()[1])
        assert is_alive(child)
        os.kill(caller.pid, number)
        assert caller.wait(30) != 0
        assert ends(child)
    finally:
        caller.kill()
        caller.wait()


def test_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("REMOVE_ME", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    script = """
        import os
        names = "SGLANG_PLATFORM", "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "REMOVE_ME", "ADDED"
        print([os.environ.get(name) for name in names])
        raise SystemExit(1)
    """
    server = standing_in(testing.Server("none", env={"REMOVE_ME": None, "ADDED": "x"}), script)
    with pytest.raises(testing.ServerError), server:
        pytest.fail("it cannot be ready")
    assert "['portable_cpu', '7', None, None, 'x']" in server.log()


def test_only_warm_servers_can_be_prepared():
    with pytest.raises(ValueError, match="only a warm server"):
        testing.Server("none", prepare=(print,))
