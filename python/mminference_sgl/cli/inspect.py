"""``mminference inspect``: what every head of a model does with a video, as one table.

A server is started, asked about the video once, with captures on, and ended. It runs sparse however short the video is,
so that there is something to see; what a server of the same settings would do is told by its log.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mminference_sgl import BACKEND_NAME
from mminference_sgl.cli.report import print_json, show
from mminference_sgl.cli.servers import server

if TYPE_CHECKING:
    from mminference_sgl.backend.capture import HeadSummary


def run(
    model: str,
    video: str,
    *,
    text: str = "What happens?",
    as_json: bool = False,
    capture: Path | None = None,
    chunk: int | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Print a line per layer and head; 0 if the video's prefill ran sparse, else 1.

    Args:
        model: folder or name of the model.
        video: path or URL.
        text: the question behind the video.
        as_json: print a JSON array instead of a table.
        capture: folder to keep the captures in; an empty one.
        chunk: tokens of a prefill chunk; None is SGLang's choice.
        arguments: further arguments of the server.
    """
    from mminference_sgl.backend import capture as captures
    from mminference_sgl.testing import ServerError, fallbacks, user_message

    with ExitStack() as stack:
        if capture is None:
            capture = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mminference-inspect-")))
        elif capture.is_dir() and captures.files(capture):
            print(f"{capture} holds captures already", file=sys.stderr)
            return 1
        least = os.environ.get("MMINFERENCE_MIN_TOKENS", "1")
        env = {captures.ENV_FOLDER: str(capture), "MMINFERENCE_MIN_TOKENS": least}
        try:
            with server(model, BACKEND_NAME, chunk, arguments, env=env) as one:
                answer = one.chat([user_message(text, videos=[video])], 1, logprobs=False)
                log = one.log()
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        files = captures.files(capture)
        lines = captures.summary(map(captures.load, files))
    if not lines:
        reasons = "; ".join(f"{one.reason}: {one.detail}" for one in fallbacks(log)) or "the server's rules say so"
        print(f"all {answer.prompt_tokens} tokens ran dense: {reasons}", file=sys.stderr)
        return 1
    if as_json:
        print_json([asdict(line) for line in lines])
    else:
        _print(lines, f"{model}, {answer.prompt_tokens} tokens")
    return 0


def _print(lines: Sequence[HeadSummary], title: str) -> None:
    from rich.table import Table

    table = Table(title=title)
    rows = [asdict(line) for line in lines]
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    layer = None
    for row in rows:
        if layer is not None and row["layer"] != layer:
            table.add_section()
        layer = row["layer"]
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    show(table)
