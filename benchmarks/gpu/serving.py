"""``make bench-gpu-serving``: time to first token of long videos, by a real SGLang server on a GPU.

The model has the shapes of Qwen2.5-VL-7B and dummy weights, so its answers mean nothing; its attention is close to
uniform, so to keep the error selection would list nearly everything. What is measured is therefore a fixed budget:
mminference runs with the tile budget of ``--density`` and a guard that is off, dense is the platform's own backend.

For each length, in milliseconds:

- *host*: decoding, resizing and tokenizing, before the scheduler has the request;
- *vision*: the vision tower, as the first request's forward less the median of those below;
- *language model*: forwards with the video's embeddings cached and another text in front, so that no prefix is. Median
  (least to most);
- *attention*: of those, what is not *rest*, the forward of a third server whose attention is cut to 128 keys per row;
- *TTFT*: of the first request, nothing cached.

Dense is the platform's own backend, or the first of others that starts; ours then has the same beside it. ``--rivals``
adds what a user of stock SGLang could pick instead. A server that does not start has a line that says why. The factors
of skip-softmax are not calibrated for a target, and on attention that is close to uniform it skips next to nothing: its
lines show what it costs here, not what it saves on a trained model. Results are written after every length.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.inputs import FRAME, count
from benchmarks.gpu.report import RESULTS, device_of, environment, file_name, markdown, parse_count, say
from benchmarks.gpu.setups import DENSE, Setup, ours, rivals
from benchmarks.gpu.stand_in import StandInServer
from benchmarks.toy.serving import CHECKPOINT
from mminference_sgl.testing import Answer, Server, ServerError, mean_density, prefills, write_mp4

"""Its tokenizer and processor are those of the family; its configuration is replaced."""
TOKENS = ("32K", "128K", "256K")
OPENINGS = ("one", "two", "three", "four", "five")
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PIXELS = 28
"""Side of the square that one token of a frame stands for; a token spans two frames."""
FPS = 2
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 1 << 21,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 28,
    "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default", "type": "mrope"},
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


@dataclass
class Timing:
    """One length on one server: seconds."""

    tokens: int
    host: float
    first_forward: float
    ttft: float
    forwards: list[float]
    density: float

    @property
    def language_model(self) -> float:
        return statistics.median(self.forwards)

    @property
    def vision(self) -> float:
        return self.first_forward - self.language_model


@dataclass
class Run:
    """One server's results, by length, and why there are no more of them."""

    name: str
    timings: dict[str, Timing] = field(default_factory=dict)
    reason: str = ""


def write_checkpoint(folder: Path) -> Path:
    """A Qwen2.5-VL-7B without weights, which ``--load-format dummy`` does not ask for."""
    folder.mkdir(parents=True)
    for file in CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config))
    processor = folder / "video_preprocessor_config.json"
    settings = json.loads(processor.read_text())
    # Otherwise long videos would be shrunk.
    settings["size"]["longest_edge"] = settings["max_pixels"] = 1 << 40
    processor.write_text(json.dumps(settings))
    return folder


def write_video(path: Path, tokens: int) -> Path:
    """Frames of moving noise for about ``tokens`` tokens; by OpenCV where TorchCodec is missing."""
    rows, cols = FRAME
    frames = max(4, 2 * (tokens // (rows * cols)))
    rng = np.random.default_rng(tokens)
    tile = rng.integers(0, 256, (rows * PIXELS, cols * PIXELS * 2, 3), dtype=np.uint8)
    film = np.stack([tile[:, 4 * (frame % 64) :][:, : cols * PIXELS] for frame in range(frames)])
    if importlib.util.find_spec("torchcodec") is not None:
        return write_mp4(path, film, FPS)
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (cols * PIXELS, rows * PIXELS))
    for frame in film:
        writer.write(frame)
    writer.release()
    return path


def start(model: Path, setup: Setup, tokens: int, chunk: int) -> Server:
    """A server for prompts of up to ``tokens`` tokens."""
    rows, cols = FRAME
    video = {"fps": FPS, "max_frames": 1 << 20, "resized_height": rows * PIXELS, "resized_width": cols * PIXELS}
    room = tokens + (1 << 14)
    return Server(
        model,
        attention_backend=setup.backend,
        chunked_prefill_size=chunk,
        metrics=True,
        platform=None,
        max_total_tokens=room,
        start_timeout=900.0,
        args=[
            *("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", str(room)),
            *("--mm-process-config", json.dumps({"video": video})),
            *setup.args,
        ],
        env={
            "MMINFERENCE_CONFIG": json.dumps(setup.config),
            "MMINFERENCE_LOG": "debug",
            # Embeddings of the longest video, so that only its first request runs the vision tower.
            "SGLANG_VLM_CACHE_SIZE_MB": str(tokens * TEXT["hidden_size"] * 2 // 2**20 + 1024),
            **setup.env,
        },
    )


def time_video(server: Server, video: Path, repeats: int) -> Timing:
    """The first request, then the same video behind other texts."""

    def ask(opening: str, *, stream: bool) -> Answer:
        return server.generate(opening + VIDEO + "what", video_data=[str(video)], max_tokens=1, stream=stream)

    mark = len(server.log())
    first = ask("zero", stream=True)
    if first.ttft is None:
        raise ServerError("the first answer has no token", server.log())
    density = mean_density(prefills(server.log(mark)), first.prompt_tokens)
    again = [ask(opening, stream=False) for opening in OPENINGS[:repeats]]
    host, forward = first.preprocess_s, first.forward_s
    return Timing(first.prompt_tokens, host, forward, first.ttft, [answer.forward_s for answer in again], density)


def measure(run: Run, server: Server, warm_up: Path, videos: Mapping[str, Path], repeats: int) -> Iterator[None]:
    """Fills in a server's results, a length at a time, or the reason why there are no more."""
    try:
        with server:
            time_video(server, warm_up, 1)
            for length, video in videos.items():
                run.timings[length] = time_video(server, video, repeats)
                say(f"{run.name}, {length}: TTFT {run.timings[length].ttft:.2f} s")
                yield
    except ServerError as error:
        run.reason = why(error)
        say(f"{run.name}: {error}")
        yield


def why(error: ServerError) -> str:
    """One line: the last exception that the server's log tells of, or what was noticed of it."""
    raised = re.findall(r"^(?:\[.*\] )?((?:\w+\.)*\w*(?:Error|Exception|SystemExit): .*)$", error.log, re.MULTILINE)
    return raised[-1] if raised else str(error).partition("\n")[0]


def table(runs: Sequence[Run]) -> str:
    """Markdown, one line per length and server, those without results at the end."""
    head = ["tokens", "server", "density", "TTFT", "host", "vision", "language model", "attention", "LM speed-up"]
    rows = []
    by_name = {run.name: run.timings for run in runs}
    dense = next((run.timings for run in runs if run.name.startswith("dense") and run.timings), {})
    lengths = dict.fromkeys(length for run in runs for length in run.timings)
    for length in lengths:
        for name, timings in by_name.items():
            if length not in timings:
                continue
            timing, rest = timings[length], by_name.get("rest", {}).get(length)
            low, high = min(timing.forwards), max(timing.forwards)
            attention = "" if rest is None or name == "rest" else _ms(timing.language_model - rest.language_model)
            speed_up = f"{dense[length].language_model / timing.language_model:.2f}" if length in dense else ""
            rows.append(
                [
                    *(str(timing.tokens), name, f"{timing.density:.3f}", _ms(timing.ttft), _ms(timing.host)),
                    *(_ms(timing.vision), f"{_ms(timing.language_model)} ({_ms(low)} to {_ms(high)})", attention),
                    speed_up,
                ]
            )
    rows += [["", run.name, run.reason.replace("|", "/"), *[""] * 6] for run in runs if run.reason]
    return markdown(head, rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def write(folder: Path, options: argparse.Namespace, runs: Sequence[Run], found: dict[str, Any]) -> None:
    """``serving-DEVICE.json`` and ``.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"serving-{file_name(found['device'])}.json"
    record = {**found, "chunk": options.chunk, "budget": options.density, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    title = f"# Qwen2.5-VL-7B shapes, dummy weights, chunks of {count(options.chunk)}, on {found['device']}"
    path.with_suffix(".md").write_text(f"{title}\n\nColumns: see benchmarks/gpu/serving.py.\n\n{table(runs)}\n")


def main(argv: Sequence[str] | None = None, start_server: Callable[..., Server] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=lambda text: text.split(","), default=list(TOKENS), help="32K,128K,256K,1M")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--density", type=float, default=10.0, help="tile budget in per cent")
    parser.add_argument("--repeats", type=int, default=3, choices=range(1, len(OPENINGS) + 1))
    parser.add_argument("--rivals", action="store_true", help="other backends of stock SGLang as well")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="short videos and servers that only pretend")
    options = parser.parse_args(argv)
    device = device_of(options)
    if device is None:
        return 1
    if options.dry_run:
        options.tokens, start_server = ["1K"], start_server or StandInServer
    found = environment(device)
    runs: list[Run] = []
    longest = max(parse_count(length) for length in options.tokens)
    with tempfile.TemporaryDirectory(prefix="mminference-bench-") as folder:
        model = write_checkpoint(Path(folder) / "model")
        videos = {length: write_video(Path(folder) / f"{length}.mp4", parse_count(length)) for length in options.tokens}
        warm_up = write_video(Path(folder) / "warm-up.mp4", min(16384, longest))

        def serve(name: str, setup: Setup) -> Run:
            run = Run(name)
            runs.append(run)
            server = (start_server or start)(model, setup, longest, options.chunk)
            for _ in measure(run, server, warm_up, videos, options.repeats):
                # So that a run that is cut off leaves what it has.
                write(options.output, options, runs, found)
            return run

        for dense in DENSE:
            if serve("dense" if dense is None else f"dense, {dense}", Setup(dense)).timings:
                break
        wanted = [serve(name, setup) for name, setup in ours(options.density, dense).items()]
        for name, setup in rivals().items() if options.rivals else ():
            serve(name, setup)
    print(table(runs))
    return int(any(run.reason for run in wanted))


if __name__ == "__main__":
    sys.exit(main())
