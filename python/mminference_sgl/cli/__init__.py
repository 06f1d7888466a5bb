"""The `mminference` command."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from mminference_sgl import __version__
from mminference_sgl.cli import bench, check_model, doctor, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mminference", description="Sparse multimodal prefill for SGLang.")
    parser.add_argument("--version", action="version", version=f"mminference-sgl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="tell whether the plugin works here", description="Exits non-zero when the plugin is broken."
    )
    check = commands.add_parser(
        "check-model",
        help="tell whether a checkpoint would load, where its videos lie and what of it runs sparse",
        description="Reads configuration and headers, no weights. Exits non-zero when the checkpoint would not load.",
    )
    check.add_argument("path", type=Path, help="folder of the checkpoint")
    check.add_argument("--trust-remote-code", action="store_true", help="run code of the checkpoint's own, as SGLang")
    look = commands.add_parser(
        "inspect",
        help="tell what every head of a model does with a video",
        description="Starts a server, asks it once and ends it. Exits non-zero when nothing ran sparse.",
    )
    look.add_argument("--video", required=True, help="path or URL")
    look.add_argument("--text", default="What happens?", help="the question behind the video")
    look.add_argument("--capture", type=Path, metavar="FOLDER", help="keep the captures there, for `mminference plot`")
    time = commands.add_parser("bench", help="time dense against sparse prefill of a video, on this machine")
    time.add_argument("--video", help="path or URL (default: a generated one)")
    time.add_argument("--frames", type=int, default=64, help="of the generated video")
    time.add_argument("--repeats", type=int, default=3, help="timed prefills, at most 7")
    for command in (look, time):
        command.add_argument("--model-path", required=True, help="folder or name of the model")
        command.add_argument("--json", action="store_true", help="print a JSON array")
        command.add_argument("--chunk", type=int, help="tokens of a prefill chunk (default: SGLang's choice)")
        command.add_argument("--server-args", default="", help="further arguments of the server, in one string")
    picture = commands.add_parser("plot", help="draw what `inspect --capture` or MMINFERENCE_CAPTURE left in a folder")
    picture.add_argument("path", type=Path, help="folder of captures, or one of them")
    picture.add_argument("-o", "--out", type=Path, required=True, help="picture; its suffix says the format")
    picture.add_argument("--kind", default="map", help="map, permuted, tiles, overview or curves")
    picture.add_argument("--layer", type=int, help="layer id (default: the first captured one)")
    picture.add_argument("--head", type=int, default=0, help="head id")
    picture.add_argument("--rows", choices=("media", "text"), default="media", help="modality of the rows")
    given = parser.parse_args(arguments)
    if given.command == "plot":
        wanted = {name: getattr(given, name) for name in ("kind", "layer", "head", "rows")}
        from mminference_sgl.cli import plot

        return plot.run(given.path, given.out, **wanted)
    if given.command in {"inspect", "bench"}:
        wanted = {"as_json": given.json, "chunk": given.chunk, "arguments": shlex.split(given.server_args)}
        if given.command == "bench":
            return bench.run(given.model_path, given.video, frames=given.frames, repeats=given.repeats, **wanted)
        return inspect.run(given.model_path, given.video, text=given.text, capture=given.capture, **wanted)
    if given.command == "check-model":
        return check_model.run(given.path, trust_remote_code=given.trust_remote_code)
    return doctor.run()
