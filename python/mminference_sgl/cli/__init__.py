"""The `mminference` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mminference_sgl import __version__
from mminference_sgl.cli import check_model, doctor, search_options


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
    search_options.add_to(commands)
    given = parser.parse_args(arguments)
    if given.command == "search":
        return search_options.run_with(given)
    if given.command == "check-model":
        return check_model.run(given.path, trust_remote_code=given.trust_remote_code)
    return doctor.run()
