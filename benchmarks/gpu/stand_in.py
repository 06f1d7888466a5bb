"""What stands for a GPU's servers in dry runs of benchmarks/gpu/serving.py."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.setups import Setup
from mminference_sgl.testing import Answer, ServerError

SECONDS = {None: 4.0, "mminference": 2.0, "fa3": 4.0}
"""Of a forward, by backend; servers with another one do not start."""


class StandInServer:
    """Answers at once, sooner with mminference, and still sooner with a fixed pattern of it."""

    def __init__(self, _model: Path, setup: Setup, *_: int) -> None:
        self.setup = setup
        self.backend = "mminference" if "mminference" in setup.args else setup.backend

    def __enter__(self) -> StandInServer:
        if self.backend not in SECONDS:
            log = f"ValueError: {self.backend} is not there\n"
            raise ServerError("the server stopped with exit code 1 before it was ready", log, 1)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, since: int = 0) -> str:
        """Nothing: no prefill ran sparse."""
        return ""[since:]

    def generate(self, _text: str, *, video_data: list[str], stream: bool, **_: int) -> Answer:
        """One token; a streamed request runs the vision tower as well."""
        assert Path(video_data[0]).stat().st_size > 0
        forward = SECONDS[self.backend] - (1.0 if "pattern" in self.setup.config else 0.0)
        forward += 0.5 if stream else 0.0
        meta = {
            "request_received_ts": 0.0,
            "api_server_dispatch_finish_ts": 0.25,
            "forward_entry_time": 1.0,
            "prefill_finished_time": 1.0 + forward,
        }
        return Answer("", forward, ttft=forward + 0.25, prompt_tokens=1024, meta=meta)
