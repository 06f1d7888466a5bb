"""Arguments of ``mminference search``; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DENSITY = 0.1
COMBINE = ("worst", "mean")


def add_to(commands: Any) -> None:
    """The command's arguments, for ``argparse``."""
    parser = commands.add_parser(
        "search",
        help="find the pattern of every head of a model, on calibration clips",
        description="Writes a pattern file. Interrupted, the same command goes on where it was.",
        epilog="Arguments behind -- are those of SGLang's server.",
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--video", type=Path, action="append", required=True, help="a calibration clip; repeatable")
    parser.add_argument("--text", required=True, help="asked about each clip")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the pattern file")
    parser.add_argument("--density", type=float, default=DENSITY, help="tiles to read, as a share of causal tiles")
    parser.add_argument("--combine", choices=COMBINE, default="worst", help="how clips count together")
    parser.add_argument("--held-out", type=Path, help="a clip that is measured and not searched on")
    parser.add_argument("--folder", type=Path, help="of the records, default OUTPUT.search")
    parser.add_argument("--date", help="in the file, default today")
    parser.add_argument("server", nargs="*", help="arguments of SGLang's server")


def run_with(given: Any) -> int:
    """Runs the command with its parsed arguments."""
    from mminference_sgl.cli import search
    from mminference_sgl.method.config import ConfigError

    try:
        return search.run(
            given.model_path,
            given.video,
            given.text,
            given.output,
            density=given.density,
            combine=given.combine,
            held_out=given.held_out,
            folder=given.folder,
            date=given.date,
            server_arguments=given.server,
        )
    except (ConfigError, OSError) as error:
        print(error)
        return 1
