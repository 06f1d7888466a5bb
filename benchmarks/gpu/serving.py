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
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.inputs import FRAME, count
from benchmarks.gpu.report import RESULTS, environment, parse_count, say
from benchmarks.toy.serving import CHECKPOINT
from mminference_sgl.testing import Answer, Server, ServerError, mean_density, prefills, write_mp4

"""Its tokenizer and processor are those of the family; its configuration is replaced."""
TOKENS = ("32K", "128K", "256K")
OPENINGS = ("one", "two", "three", "four", "five")
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PIXELS = 28
"""Side of the square that one token of a frame stands for; a token spans two frames."""
FPS = 2
GUARD_OFF = 1e9
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
    """One server's results, by length."""

    name: str
    timings: dict[str, Timing] = field(default_factory=dict)


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
    """Frames of moving noise for about ``tokens`` tokens."""
    rows, cols = FRAME
    frames = max(4, 2 * (tokens // (rows * cols)))
    rng = np.random.default_rng(tokens)
    tile = rng.integers(0, 256, (rows * PIXELS, cols * PIXELS * 2, 3), dtype=np.uint8)
    film = np.stack([tile[:, 4 * (frame % 64) :][:, : cols * PIXELS] for frame in range(frames)])
    return write_mp4(path, film, FPS)


def configurations(density: float) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """Backend and settings of each server."""
    budget = {"error": 1.0, "max_density": density / 100, "error_ceiling": GUARD_OFF}
    floor = {"pattern": "a_shape", "error_ceiling": GUARD_OFF, "patterns": {"a_shape": {"sink": 64, "window": 64}}}
    return {"dense": (None, {}), "mminference": ("mminference", budget), "rest": ("mminference", floor)}


def start(model: Path, backend: str | None, config: dict[str, Any], tokens: int, chunk: int) -> Server:
    """A server for prompts of up to ``tokens`` tokens."""
    rows, cols = FRAME
    video = {"fps": FPS, "max_frames": 1 << 20, "resized_height": rows * PIXELS, "resized_width": cols * PIXELS}
    room = tokens + (1 << 14)
    return Server(
        model,
        attention_backend=backend,
        chunked_prefill_size=chunk,
        metrics=True,
        platform=None,
        max_total_tokens=room,
        start_timeout=900.0,
        args=[
            *("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", str(room)),
            *("--mm-process-config", json.dumps({"video": video})),
        ],
        env={
            "MMINFERENCE_CONFIG": json.dumps(config),
            "MMINFERENCE_LOG": "debug",
            # Embeddings of the longest video, so that only its first request runs the vision tower.
            "SGLANG_VLM_CACHE_SIZE_MB": str(tokens * TEXT["hidden_size"] * 2 // 2**20 + 1024),
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


def table(runs: Sequence[Run]) -> str:
    """Markdown, one line per length and server."""
    head = ["tokens", "server", "density", "TTFT", "host", "vision", "language model", "attention", "LM speed-up"]
    rows = [head, ["---"] * len(head)]
    by_name = {run.name: run.timings for run in runs}
    for length, dense in by_name["dense"].items():
        for name, timings in by_name.items():
            if length not in timings:
                continue
            timing, rest = timings[length], by_name.get("rest", {}).get(length)
            low, high = min(timing.forwards), max(timing.forwards)
            attention = "" if rest is None or name == "rest" else _ms(timing.language_model - rest.language_model)
            rows.append(
                [
                    *(str(timing.tokens), name, f"{timing.density:.3f}", _ms(timing.ttft), _ms(timing.host)),
                    *(_ms(timing.vision), f"{_ms(timing.language_model)} ({_ms(low)} to {_ms(high)})", attention),
                    f"{dense.language_model / timing.language_model:.2f}",
                ]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def main(argv: Sequence[str] | None = None, start_server: Callable[..., Server] = start) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=lambda text: text.split(","), default=list(TOKENS), help="32K,128K,256K,1M")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--density", type=float, default=10.0, help="tile budget in per cent")
    parser.add_argument("--repeats", type=int, default=3, choices=range(1, len(OPENINGS) + 1))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="no GPU is asked for: the caller brings the servers")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        say("needs a CUDA device")
        return 1
    runs: list[Run] = []
    longest = max(parse_count(length) for length in options.tokens)
    with tempfile.TemporaryDirectory(prefix="mminference-bench-") as folder:
        model = write_checkpoint(Path(folder) / "model")
        videos = {length: write_video(Path(folder) / f"{length}.mp4", parse_count(length)) for length in options.tokens}
        warm_up = write_video(Path(folder) / "warm-up.mp4", min(16384, longest))
        for name, (backend, config) in configurations(options.density).items():
            run = Run(name)
            runs.append(run)
            try:
                with start_server(model, backend, config, longest, options.chunk) as server:
                    time_video(server, warm_up, 1)
                    for length, video in videos.items():
                        run.timings[length] = time_video(server, video, options.repeats)
                        say(f"{name}, {length}: TTFT {run.timings[length].ttft:.2f} s")
            except ServerError as error:
                say(f"{name}: {error}")
                return 1
    found = environment(torch.device("cpu" if options.dry_run else "cuda"))
    text = table(runs)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"serving-{found['device']}".lower().replace(" ", "-").replace("(", "").replace(")", "")
    record = {**found, "chunk": options.chunk, "budget": options.density, "runs": [asdict(run) for run in runs]}
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"# Qwen2.5-VL-7B shapes, dummy weights, chunks of {count(options.chunk)}, on {found['device']}"
    (options.output / f"{name}.md").write_text(f"{title}\n\nColumns: see benchmarks/gpu/serving.py.\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
