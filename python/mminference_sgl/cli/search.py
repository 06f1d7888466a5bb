"""``mminference search``: a pattern file for a model, from calibration clips, by SGLang's offline engine.

Clips are prefilled densely, twice: once to score every candidate in every layer and head, once to measure what the
chosen maps lose. Where a frame stride is found in clips without a known grid, they are scored again as frames of it,
and the file names it. What is done is kept in a folder beside the output, so a search that was interrupted goes on
where it was, and one with another density or combination prefills only to measure.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mminference_sgl import BACKEND_NAME, __version__
from mminference_sgl.backend import recording
from mminference_sgl.backend.recording import Task, write_json
from mminference_sgl.method import catalog, head_search
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import ConfigError
from mminference_sgl.method.head_search import Measured, Scores

OBJECTIVE = "error of each head's output, relative to dense attention's"
_DONE, _SEARCH = "done.json", "search.json"

Ask = Callable[[Path, int], int]
"""Prefills a clip with the text, runs without a grid at a frame stride or 0; returns the tokens of the prompt."""


@dataclass(frozen=True)
class Clip:
    """A video file; ``sha256`` of its content names its records."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Clip:
        """Reads the file."""
        with path.open("rb") as file:
            return cls(path, hashlib.file_digest(file, "sha256").hexdigest())

    @property
    def name(self) -> str:
        """Of its folders."""
        return self.sha256[:16]


def run(
    model_path: str,
    videos: Sequence[Path],
    text: str,
    output: Path,
    *,
    density: float,
    combine: str = "worst",
    held_out: Path | None = None,
    folder: Path | None = None,
    name: str | None = None,
    date: str | None = None,
    server_arguments: Sequence[str] = (),
) -> int:
    """Searches, writes the pattern file and prints what was found.

    ``folder``: of the records, default the output's name with ``.search`` behind it. ``name``: of the model, default
    the last part of its path. ``date``: of the provenance, default today.
    """
    if not videos:
        raise ConfigError("search: at least one --video is needed")
    if combine not in head_search.COMBINE:
        raise ConfigError(f"search: --combine must be one of {', '.join(head_search.COMBINE)}, got {combine!r}")
    if not 0 < density <= 1:
        raise ConfigError(f"search: --density must be above 0 and at most 1, got {density}")
    folder = folder or output.with_name(output.name + ".search")
    clips = [Clip.of(path) for path in videos]
    other = Clip.of(held_out) if held_out is not None else None
    _same_search(folder, {"model": model_path, "text": text, "server": list(server_arguments), "version": __version__})
    try:
        with engine(model_path, text, folder, server_arguments) as ask:
            found = search(folder, clips, other, ask, density=density, combine=combine)
    except KeyboardInterrupt:
        print(f"interrupted; what is done is in {folder}, and the same command goes on from there")
        return 130
    content = pattern_file(found, name or Path(model_path).name or model_path, date or dt.date.today().isoformat())
    catalog.parse(content, str(output))
    write_json(output, content)
    print(found.summary())
    print(f"written: {output}")
    return 0


@dataclass(frozen=True)
class Found:
    """What a search found. ``measured`` by layer, over the calibration clips; ``held_out`` the same of that clip."""

    model: Mapping[str, Any]
    clips: Sequence[tuple[Clip, int]]
    density: float
    combine: str
    window: int
    frame_stride: int
    specs: Mapping[int, Sequence[HeadSpec]]
    measured: Mapping[int, Measured]
    held_out: Mapping[int, Measured]

    def summary(self) -> str:
        """A few lines for the operator."""
        counts: dict[str, int] = {}
        for own in self.specs.values():
            for spec in own:
                name = f"{spec.media_text}/{spec.media_media}" if spec.media_text != spec.media_media else ""
                name = f"media {name or spec.media_media}, boundary {head_search.boundary(spec)}"
                counts[name] = counts.get(name, 0) + 1
        lines = [f"frame stride {self.frame_stride} in clips without a grid"] if self.frame_stride else []
        lines += [f"{count:6} heads: {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])]
        for name, measured in (("calibration", self.measured), ("held out", self.held_out)):
            if measured:
                total = _total(measured)
                lines.append(
                    f"{name}: error {total['error']:.4f}, mass {total['mass']:.4f}, density {total['density']:.4f}"
                )
        return "\n".join(lines)


def _total(measured: Mapping[int, Measured]) -> dict[str, float]:
    """Over layers: the root of the mean squared error of the layers' outputs; mass and density, means over heads."""
    layers = list(measured.values())
    return {
        "error": float(sum(m.error.sum() / max(m.energy.sum(), 1e-30) for m in layers) / len(layers)) ** 0.5,
        "mass": float(sum(m.mass.sum() for m in layers) / sum(m.rows.sum() for m in layers)),
        "density": float(sum(m.tiles.sum() for m in layers) / sum(m.causal.sum() for m in layers)),
    }


def search(
    folder: Path, clips: Sequence[Clip], held_out: Clip | None, ask: Ask, *, density: float, combine: str
) -> Found:
    """Scores the clips, chooses, and measures what was chosen; ``ask`` reaches a server that searches into the folder.

    Raises:
        ConfigError: nothing of a clip could run sparse.
    """
    with _Progress(folder) as progress:
        into = "scores"
        tokens = [progress.prefill(ask, clip, Task(f"{into}/{clip.name}"), f"score {clip.path.name}") for clip in clips]
        stride = frame_stride([_request(folder / into / clip.name)["strides"] for clip in clips])
        if stride:
            into, progress.frame_stride = f"scores-stride{stride}", stride
            for clip in clips:
                progress.prefill(ask, clip, Task(f"{into}/{clip.name}"), f"score {clip.path.name}, stride {stride}")
        model = json.loads((folder / recording.MODEL).read_text(encoding="utf-8"))
        layers = model["sparse_layers"]

        def scores(layer: int) -> list[Scores]:
            try:
                return [recording.load(folder / into / clip.name, layer, Scores) for clip in clips]
            except FileNotFoundError as error:
                raise ConfigError(f"search: nothing could run sparse: {error}") from None

        window = head_search.window_for((scores(layer) for layer in layers), density, combine)
        specs = {layer: head_search.choose(scores(layer), density, window, combine).specs for layer in layers}
        chosen = json.dumps([head_search.rules(specs), density, window, stride])
        name = "measured-" + hashlib.sha256(chosen.encode()).hexdigest()[:16]
        measured: list[dict[int, Measured]] = []
        for clip in [*clips, *([held_out] if held_out is not None else [])]:
            task = Task(f"{name}/{clip.name}", specs, density, window)
            progress.prefill(ask, clip, task, f"measure {clip.path.name}")
            measured.append({layer: recording.load(folder / task.into, layer, Measured) for layer in layers})
    total = dict(measured[0])
    for one in measured[1 : len(clips)]:
        total = {layer: total[layer] + one[layer] for layer in layers}
    pairs = list(zip(clips, tokens, strict=True))
    held = measured[-1] if held_out is not None else {}
    return Found(model, pairs, density, combine, window, stride, specs, total, held)


def compare(
    folder: Path,
    clip: Clip,
    ask: Ask,
    maps: Mapping[str, Mapping[int, Sequence[HeadSpec]]],
    density: float,
    window: int,
) -> dict[str, dict[str, float]]:
    """What maps of all layers' heads lose on a clip, by name: ``error``, ``mass`` and ``density`` as in a search."""
    found = {}
    with _Progress(folder) as progress:
        for name, specs in maps.items():
            task = Task(f"compared-{name}/{clip.name}", specs, density, window)
            progress.prefill(ask, clip, task, f"measure {name}")
            found[name] = _total({layer: recording.load(folder / task.into, layer, Measured) for layer in specs})
    return found


def frame_stride(found: Sequence[Sequence[int]]) -> int:
    """The stride that runs without a grid have in all clips where one was found; 0 without, or where they differ."""
    strides = {stride for clip in found for stride in clip}
    return strides.pop() if len(strides) == 1 else 0


def pattern_file(found: Found, name: str, date: str) -> dict[str, Any]:
    """The content of a pattern file, schema 1."""
    model = {key: found.model[key] for key in ("architecture", "layers", "heads", "kv_heads", "head_dim")}
    stride = {"frame_stride": found.frame_stride} if found.frame_stride else {}
    return {
        "schema": 1,
        "id": f"{name}-searched",
        "description": f"Searched for {name} at a density of {found.density:g}.",
        "model": {"id": name, **model},
        "provenance": {
            "version": __version__,
            "clips": [{"sha256": clip.sha256, "tokens": tokens} for clip, tokens in found.clips],
            "density": found.density,
            "objective": OBJECTIVE,
            "combine": found.combine,
            "date": date,
            "device": found.model["device"],
        },
        "heads": head_search.rules(found.specs),
        "config": {"patterns": {"a_shape": {"window": found.window}}, **stride},
        "measured": [
            {"layer": layer, "head": head, **figures}
            for layer in sorted(found.measured)
            for head, figures in enumerate(found.measured[layer].figures())
        ],
    }


class _Progress:
    """Prefills clips and shows, from the files that appear, how many layers are done."""

    def __init__(self, folder: Path) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._folder = folder
        self.frame_stride = 0
        elapsed, text = TimeElapsedColumn(), TextColumn("{task.description}")
        self._bar = Progress(text, BarColumn(), MofNCompleteColumn(), TextColumn("layers"), elapsed, Remaining())

    def __enter__(self) -> _Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def prefill(self, ask: Ask, clip: Clip, task: Task, says: str) -> int:
        """Prefills a clip unless all of its records are there; returns the tokens of the prompt."""
        into = self._folder / task.into
        if (into / _DONE).is_file():
            return int(json.loads((into / _DONE).read_text(encoding="utf-8"))["tokens"])
        task.write(self._folder)
        line, over = self._bar.add_task(says, total=None), threading.Event()
        watch = threading.Thread(target=self._watch, args=(into, line, over), daemon=True)
        watch.start()
        try:
            tokens = ask(clip.path, self.frame_stride)
        finally:
            over.set()
            watch.join()
        # Chunks of a few rows have no records.
        done = sum(1 for _ in recording.records(into))
        self._bar.update(line, total=done, completed=done)
        write_json(into / _DONE, {"tokens": tokens})
        return tokens

    def _watch(self, into: Path, line: Any, over: threading.Event) -> None:
        last = False
        while not last:
            last = over.wait(0.5)
            try:
                model = json.loads((self._folder / recording.MODEL).read_text(encoding="utf-8"))
                tokens = _request(into)["tokens"]
            except FileNotFoundError:
                continue
            chunks = -(-tokens // model["chunk_tokens"]) if model["chunk_tokens"] else 1
            total = chunks * len(model["sparse_layers"]) * model["ranks"]
            self._bar.update(line, total=total, completed=sum(1 for _ in recording.records(into)))


def _request(folder: Path) -> dict[str, Any]:
    """What the recorder says of a request."""
    found: dict[str, Any] = json.loads((folder / recording.REQUEST).read_text(encoding="utf-8"))
    return found


@contextmanager
def engine(model_path: str, text: str, folder: Path, server_arguments: Sequence[str]) -> Iterator[Ask]:
    """SGLang's offline engine in search mode, as what asks it; started by the first question of a stride."""
    started: dict[int, Any] = {}

    def ask(clip: Path, frame_stride: int) -> int:
        if frame_stride not in started:
            for before in list(started):
                started.pop(before).shutdown()
            started[frame_stride] = _start(model_path, folder, frame_stride, server_arguments)
        return _ask(started[frame_stride], text, clip)

    try:
        yield ask
    finally:
        for one in started.values():
            one.shutdown()


def _start(model_path: str, folder: Path, frame_stride: int, server_arguments: Sequence[str]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        recording.ENV_SEARCH: str(folder.resolve()),
        "MMINFERENCE_MIN_TOKENS": "0",
        "MMINFERENCE_PATTERN": "auto",
        "MMINFERENCE_FRAME_STRIDE": str(frame_stride),
    }
    import sglang
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    # A clip is prefilled twice, and nothing of the first time may shorten the second.
    own = ["--model-path", model_path, "--attention-backend", BACKEND_NAME, "--disable-radix-cache"]
    own += [] if "--log-level" in server_arguments else ["--log-level", "error"]
    return sglang.Engine(server_args=prepare_server_args([*own, *server_arguments]))


def _ask(engine: Any, text: str, clip: Path) -> int:
    """Prefills a chat of the clip and the text, as the server's chat route would; returns the prompt's tokens."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    video = {"type": "video_url", "video_url": {"url": str(clip.resolve())}}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": text}]}]
    chat = OpenAIServingChat(engine.tokenizer_manager, engine.template_manager)
    request, _ = chat._convert_to_internal_request(
        ChatCompletionRequest(model="", messages=messages, max_completion_tokens=1, temperature=0)
    )
    answers = engine.tokenizer_manager.generate_request(request, None)
    answer = engine.loop.run_until_complete(anext(answers))
    return int(answer["meta_info"]["prompt_tokens"])


def _same_search(folder: Path, search_is: Mapping[str, Any]) -> None:
    """Records of another model, text or server must not be mixed with these."""
    path = folder / _SEARCH
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != search_is:
        raise ConfigError(f"search: {folder} holds records of another search: remove it, or name another --folder")
    write_json(path, search_is)
