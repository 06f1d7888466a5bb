"""Command lines of the commands whose modules import PyTorch or SGLang: they are imported when they run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from mminference_sgl.cli.report import Json, print_json

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
