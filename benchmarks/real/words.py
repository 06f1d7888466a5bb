"""``make bench-real WORDS=1``: a video of words, for a language model that others trained.

Every place of a frame shows a word, which changes now and then, and a visual token of it is the word's own embedding;
a row ends with a line break. To the language model a video reads as text, frame behind frame, while it has a grid like
any other. Behind it some
frames are written out again, with a row of each to tell which it is. What counts is how likely the dense model's
readings of these words stay, and how many are right: heads that others trained have to find a frame, and then the same
place, by visual tokens that ran sparse.

``auto`` with its defaults and with a looser ``error``, what is left of other choices at the density that ``auto`` has
at the looser one, and what lists shared by a KV group cost. Read by the offline twin (``docs/real-weights.md``).

Exits 1 when a promise is missed: ``auto`` at the default ``error`` loses no more likelihood than the interval, or half
a percent; the distributions of A-shape diverge more than those of ``auto`` at the same density.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.accuracy.settings import ALL_ROWS, rivals
from benchmarks.host import described
from benchmarks.real import weights
from benchmarks.real.measures import distance
from benchmarks.real.readers import SMALLEST_TILE, Twin
from benchmarks.real.reading import Reading
from mminference_sgl.kernels import stages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from benchmarks.real.twin import Item

GRID = (32, 8, 9)
"""Frames, rows, columns, the last of which are line breaks."""
CHANGE = 0.05
"""Probability that a word changes from one frame to the next; a small model loses count of frames that change more."""
VIDEOS = 4
AGAIN = (0.2, 0.5, 0.8, 1.0)
"""Depths of the frames that are written out again."""
SEED = 20261128
LOSS = 0.005
DEFAULT, LOOSER = "auto", "auto, error 0.2"
SETTINGS: dict[str, dict[str, Any]] = {DEFAULT: {}, "auto, lists apart": {"sharing": False}, LOOSER: {"error": 0.2}}
"""The rivals compute at the density of the last one."""
_VIDEO = 2
_WORDS = (
    "red green blue yellow black white gold silver apple bread cheese butter sugar coffee water wine river ocean "
    "mountain forest garden road bridge house door window table chair lamp clock book paper pencil letter music guitar "
    "piano drum dog cat horse bird fish lion tiger bear rain snow wind fire stone iron glass wood king queen soldier "
    "doctor teacher farmer sailor north south east west summer winter"
)


@dataclass(frozen=True)
class WordVideo:
    """A prompt, int64 [tokens], with a video; ``again`` [n]: which of the tokens behind it are words to be read."""

    tokens: torch.Tensor
    item: Item
    again: torch.Tensor

    @property
    def judged(self) -> int:
        """The first token behind the video."""
        return self.item[1][0][1] + 1


@dataclass(frozen=True)
class Row:
    """One setting over all videos.

    ``density``: of the video's rows; of all rows where texts run sparse, too. ``loss``: share of the dense likelihood
    that the words lose, ``interval`` half its 95 % interval. ``agreement``: with the dense likeliest words. ``right``:
    words that are read rightly.
    """

    name: str
    density: float
    loss: float
    interval: float
    agreement: float
    divergence: float
    right: float


def videos(tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[WordVideo]:
    """The same at every call."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    coded = [encode(f" {word}") for word in _WORDS.split()]
    words = np.array([code[0] for code in coded if len(code) == 1])
    (line_break,) = encode("\n")
    rng = np.random.default_rng(SEED)
    for _ in range(count):
        frames = rng.choice(words, GRID)
        for frame in range(1, GRID[0]):
            kept = rng.random(GRID[1:]) >= CHANGE
            frames[frame] = np.where(kept, frames[frame - 1], frames[frame])
        frames[..., -1] = line_break
        before = encode("A video of words, frame by frame:")
        tokens = [*before, *frames.ravel().tolist()]
        span = (len(before), len(tokens) - 1)
        again: list[bool] = []
        for depth in AGAIN:
            told = encode("\n\nOne of the frames once more:")
            frame = frames[round(depth * (GRID[0] - 1))]
            tokens += [*told, *frame.ravel().tolist()]
            # The first row says which frame it is.
            judged = frame != line_break
            judged[0] = False
            again += [False] * len(told) + judged.ravel().tolist()
        yield WordVideo(torch.tensor(tokens), (_VIDEO, [span], GRID), torch.tensor(again))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit code says whether the promises are kept."""
    # The method's tiles are asked for, not what suits this CPU.
    stages.CPU_EASE = stages.EASE
    options = _arguments(argv)
    from transformers import AutoTokenizer

    began = time.monotonic()
    folder = options.model or weights.checkpoint()
    reader, shown = Twin(folder), list(videos(AutoTokenizer.from_pretrained(folder), options.videos))
    dense = [reader.dense_behind(video.tokens, video.judged) for video in shown]
    right = float(np.mean([_right(video, reading) for video, reading in zip(shown, dense, strict=True)]))
    print("| setting | density | loss % | same % | KL | right |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| dense | 1 | | | | {right:.3f} |", flush=True)

    def measured(name: str, settings: dict[str, Any]) -> Row:
        row = _row(name, {"min_tokens": 0, **settings}, reader, shown, dense)
        loss, same = f"{100 * row.loss:+.2f} +- {100 * row.interval:.2f}", f"{100 * row.agreement:.1f}"
        print(f"| {name} | {row.density:.3f} | {loss} | {same} | {row.divergence:.4f} | {row.right:.3f} |", flush=True)
        return row

    rows = [measured(*each) for each in SETTINGS.items()]
    rows += [measured(*each) for each in rivals(rows[-1].density, math.prod(GRID), rows=SMALLEST_TILE)]
    failures = judge(rows)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        content: dict[str, Any] = {
            **described(),
            "model": options.model.name if options.model else weights.NAME,
            "videos": options.videos,
            "dense_right": right,
            "rows": [asdict(row) for row in rows],
            "failures": failures,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failures else 0


def judge(rows: Sequence[Row]) -> list[str]:
    """The promises that are missed."""
    by_name = {row.name: row for row in rows}
    own, looser, control = by_name[DEFAULT], by_name[LOOSER], by_name["a_shape"]
    failures = []
    if own.loss > max(LOSS, own.interval):
        failures.append(f"{own.name} loses {100 * own.loss:.2f} +- {100 * own.interval:.2f} % of the words' likelihood")
    if control.divergence <= looser.divergence:
        failures.append(f"A-shape diverges by {control.divergence:.4f} nats, {looser.name} by {looser.divergence:.4f}")
    return failures


def _row(
    name: str, settings: dict[str, Any], reader: Twin, shown: Sequence[WordVideo], dense: Sequence[Reading]
) -> Row:
    read = [reader.behind_media(video.tokens, settings, [video.item]) for video in shown]
    kept = [_words(video, one.reading) for video, one in zip(shown, read, strict=True)]
    wanted = [_words(video, reading) for video, reading in zip(shown, dense, strict=True)]
    far = distance(_joined(kept), _joined(wanted))
    return Row(
        name,
        float(np.mean([_density(name, video, one.mean_density) for video, one in zip(shown, read, strict=True)])),
        far.loss,
        far.interval,
        far.agreement,
        float(np.mean([reader.divergence(*pair) for pair in zip(kept, wanted, strict=True)])),
        float(np.mean([_right(video, one.reading) for video, one in zip(shown, read, strict=True)])),
    )


def _words(video: WordVideo, reading: Reading) -> Reading:
    """Of the words that are to be read."""
    assert reading.hidden is not None
    return Reading(reading.logprob[video.again], reading.top[video.again], reading.hidden[video.again])


def _joined(readings: Sequence[Reading]) -> Reading:
    """All videos' words, without what the head read."""
    return Reading(torch.cat([one.logprob for one in readings]), torch.cat([one.top for one in readings]))


def _density(name: str, video: WordVideo, density: float) -> float:
    """What all rows' density leaves for the video: those behind it run dense, where texts are not sparse, too."""
    if name == ALL_ROWS:
        return density
    media = (video.judged / len(video.tokens)) ** 2
    return (density - (1 - media)) / media


def _right(video: WordVideo, reading: Reading) -> float:
    """Share of words that are read rightly."""
    wanted = video.tokens[video.judged :]
    return float((reading.top == wanted)[video.again].float().mean())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="another folder in Hugging Face's format")
    parser.add_argument("--videos", type=int, default=VIDEOS)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
