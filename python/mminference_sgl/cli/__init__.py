"""The `mminference` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mminference_sgl import __version__
from mminference_sgl.cli import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mminference", description="Sparse multimodal prefill for SGLang.")
    parser.add_argument("--version", action="version", version=f"mminference-sgl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="tell whether the plugin works here", description="Exits non-zero when the plugin is broken."
    )
    parser.parse_args(arguments)
    return doctor.run()
