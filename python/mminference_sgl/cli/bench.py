"""``mminference bench``: dense against sparse prefill of one video, with this model on this machine.

Servers one after the other, alike but for the attention backend: dense and sparse in turns, since a machine that others
use too is not as fast at one time as at another. Each gets a short clip to warm up, the video once for its time to
first token, and then the video behind other texts: these miss the radix cache but find the video's embeddings, so that
what is timed is the language model's prefill alone. The sparse server is as it comes, so the crossover is what it has
measured at its start, and a video that is shorter runs dense.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mminference_sgl import BACKEND_NAME
from mminference_sgl.cli.report import print_json, show
from mminference_sgl.cli.servers import server

if TYPE_CHECKING:
    from mminference_sgl.testing import Server

_SIDE = 448
_WARM_UP_FRAMES = 4
_OPENINGS = ("one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class Figures:
    """What servers of one kind needed; seconds.

    ``ttft``: from sending the request to the first token, decoding of the video and vision tower included; of each.
    ``prefills``: of the language model, all that were timed. ``density``: computed tiles over those of dense attention.
    ``min_tokens``: the crossover, None of dense servers.
    """

    name: str
    tokens: int
    ttft: list[float]
    prefills: list[float]
    density: float
    min_tokens: int | None

    @property
    def prefill(self) -> float:
        """The median."""
        return statistics.median(self.prefills)

    def ratio_to(self, dense: Figures) -> tuple[float, float, float]:
        """Share of the dense servers' prefill: of the medians, the least and the most that single ones make of it."""
        low, high = min(self.prefills) / max(dense.prefills), max(self.prefills) / min(dense.prefills)
        return self.prefill / dense.prefill, low, high


def run(
    model: str,
    video: str | None = None,
    *,
    frames: int = 64,
    repeats: int = 3,
    rounds: int = 2,
    as_json: bool = False,
    chunk: int | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Print a line per kind of server; 0 if all answered, else 1.

    Args:
        model: folder or name of the model.
        video: path or URL; None is a generated one.
        frames: of the generated video, 448 x 448 pixels at 2 frames per second.
        repeats: timed prefills of each server, at most seven.
        rounds: servers of each kind.
        as_json: print a JSON array instead of a table.
        chunk: tokens of a prefill chunk; None is SGLang's choice.
        arguments: further arguments of the servers.
    """
    from mminference_sgl.testing import ServerError

    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="mminference-bench-") as folder:
        warm_up = _clip(Path(folder) / "warm-up.mp4", _WARM_UP_FRAMES, 1)
        video = video or _clip(Path(folder) / "clip.mp4", frames, 0)
        for name, backend in (("dense", None), (BACKEND_NAME, BACKEND_NAME)) * rounds:
            print(f"{name}: starting a server", file=sys.stderr)
            try:
                with server(model, backend, chunk, arguments, env={}, metrics=True) as one:
                    figures = _measure(one, name, video, warm_up, min(repeats, len(_OPENINGS)))
            except ServerError as error:
                print(error, file=sys.stderr)
                return 1
            if name in found:
                figures.ttft[:0], figures.prefills[:0] = found[name].ttft, found[name].prefills
            found[name] = figures
    if as_json:
        print_json([asdict(one) for one in found.values()])
    else:
        _print(list(found.values()), model)
    return 0


def _measure(one: Server, name: str, video: str, warm_up: str, repeats: int) -> Figures:
    from mminference_sgl.testing import ServerError, mean_density, prefills, start_lines, user_message

    one.chat([user_message("hello", videos=[warm_up])], 1)
    mark = len(one.log())
    first = one.chat([user_message("What happens?", videos=[video])], 2, stream=True)
    if first.ttft is None:
        raise ServerError("the first answer has no token", one.log())
    density = mean_density(prefills(one.log(mark)), first.prompt_tokens)
    seconds = [
        one.chat([user_message("What happens?", videos=[video], before=before)], 1).forward_s
        for before in _OPENINGS[:repeats]
    ]
    crossover = re.search(r"\bmin_tokens=(\d+)", " ".join(start_lines(one.log())))
    return Figures(
        name,
        first.prompt_tokens,
        [first.ttft],
        seconds,
        density,
        int(crossover[1]) if crossover else None,
    )


def _clip(path: Path, frames: int, seed: int) -> str:
    """A video of random squares that change."""
    import numpy as np

    from mminference_sgl.testing import write_mp4

    squares = np.random.default_rng(seed).integers(256, size=(frames, _SIDE // 28, _SIDE // 28, 3), dtype=np.uint8)
    return str(write_mp4(path, squares.repeat(28, 1).repeat(28, 2)))


def _print(found: Sequence[Figures], model: str) -> None:
    from rich.table import Table

    dense, sparse = found
    table = Table(title=f"{model}, {dense.tokens} tokens")
    for name in ("", "density", "TTFT", "ratio", "prefill of the language model", "ratio", "sparse from"):
        table.add_column(name, justify="right" if name else "left")
    for one in found:
        ttft = statistics.median(one.ttft)
        ratio, low, high = one.ratio_to(dense)
        table.add_row(
            one.name,
            f"{one.density:.3f}",
            f"{ttft:.2f} s",
            f"{ttft / statistics.median(dense.ttft):.2f}",
            f"{one.prefill:.2f} s ({min(one.prefills):.2f} to {max(one.prefills):.2f})",
            "" if one is dense else f"{ratio:.2f} ({low:.2f} to {high:.2f})",
            "" if one.min_tokens is None else f"{one.min_tokens} tokens",
        )
    show(table)
    if sparse.density == 1.0:
        print("Nothing ran sparse, so the ratios are noise: the video has fewer tokens, or nothing could be left out.")
