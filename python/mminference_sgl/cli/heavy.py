"""Command lines of the commands whose modules import PyTorch or SGLang: they are imported when they run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from mminference_sgl.cli.report import Json, json_alone, print_json

ModelPath = Annotated[str, typer.Option("--model-path", help="Folder or name of the model.")]
Chunk = Annotated[int | None, typer.Option(help="Tokens of a prefill chunk; SGLang's choice if it is not given.")]
ServerArguments = Annotated[str, typer.Option("--server-args", help="Further arguments of the server, in one string.")]


def inspect(
    *,
    model_path: ModelPath,
    video: Annotated[str, typer.Option(help="Path or URL.")],
    text: Annotated[str, typer.Option(help="The question behind the video.")] = "What happens?",
    capture: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the captures there, for `mminference plot`.")
    ] = None,
    chunk: Chunk = None,
    server_args: ServerArguments = "",
    as_json: Json = False,
) -> int:
    """Tell what every head of a model does with a video: pattern, density, coverage, error.

    Starts a server, asks it once and ends it. Exits with 1 when nothing ran sparse.
    """
    from mminference_sgl.cli import inspect as work

    arguments = shlex.split(server_args)
    return work.run(model_path, video, text=text, as_json=as_json, capture=capture, chunk=chunk, arguments=arguments)


def bench(
    *,
    model_path: ModelPath,
    video: Annotated[str | None, typer.Option(help="Path or URL; a generated one if it is not given.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Of the generated video.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=7, help="Timed prefills of each server.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Servers of each kind, in turns.")] = 2,
    chunk: Chunk = None,
    server_args: ServerArguments = "",
    as_json: Json = False,
) -> int:
    """Time dense against sparse prefill of a video: this model on this machine, and its crossover."""
    from mminference_sgl.cli import bench as work

    return work.run(
        model_path,
        video,
        frames=frames,
        repeats=repeats,
        rounds=rounds,
        as_json=as_json,
        chunk=chunk,
        arguments=shlex.split(server_args),
    )


def plot(
    path: Annotated[Path, typer.Argument(help="Folder of captures, or one of them.", metavar="PATH")],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture; its suffix says the format.")],
    kind: Annotated[
        Literal["map", "permuted", "tiles", "overview", "curves"],
        typer.Option(
            help="Attention by position, in cell order, with what is read; heads by layers; error by density."
        ),
    ] = "map",
    layer: Annotated[int | None, typer.Option(help="Layer id; the first captured one if it is not given.")] = None,
    head: Annotated[int, typer.Option(help="Head id.")] = 0,
    rows: Annotated[Literal["media", "text"], typer.Option(help="Modality of the rows.")] = "media",
    as_json: Json = False,
) -> int:
    """Draw what `inspect --capture` or MMINFERENCE_CAPTURE left in a folder, as PNG or SVG."""
    from mminference_sgl.cli import plot as work

    status = work.run(path, out, kind=kind, layer=layer, head=head, rows=rows)
    if as_json:
        print_json({"ok": status == 0, "picture": str(out)})
    return status


def search(
    server: Annotated[list[str] | None, typer.Argument(help="Arguments of SGLang's server, behind --.")] = None,
    *,
    model_path: ModelPath,
    video: Annotated[list[Path], typer.Option(help="A calibration clip; repeatable.")],
    text: Annotated[str, typer.Option(help="Asked about each clip.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The pattern file.")],
    density: Annotated[float, typer.Option(help="Tiles to read, as a share of causal tiles.")] = 0.1,
    combine: Annotated[Literal["worst", "mean"], typer.Option(help="How clips count together.")] = "worst",
    held_out: Annotated[Path | None, typer.Option(help="A clip that is measured and not searched on.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Of the records; OUTPUT.search if it is not given.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model; the path's last part if it is not given.")] = None,
    date: Annotated[str | None, typer.Option(help="In the file; today's if it is not given.")] = None,
    as_json: Json = False,
) -> int:
    """Find the pattern of every head of a model on calibration clips, and write a pattern file.

    Interrupted, the same command goes on where it was.
    """
    from mminference_sgl.cli import search as work

    with json_alone(as_json):
        status = work.run(
            model_path,
            video,
            text,
            output,
            density=density,
            combine=combine,
            held_out=held_out,
            folder=folder,
            name=name,
            date=date,
            server_arguments=server or [],
        )
    if as_json:
        print_json({"ok": status == 0, "pattern": str(output)})
    return status
