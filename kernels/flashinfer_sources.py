"""Whether the installed FlashInfer is one whose sources were read: by what they are, not by their version.

:mod:`.flashinfer_work` relies on internals that no release promises to keep. Other releases may have them unchanged, so
what is compared are digests of the parts that were read; everything else may differ.
"""

from __future__ import annotations

import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "flashinfer-python"
READ_IN = ("0.7.1", "0.7.2.post1")
"""First and last release with the parts of :data:`READ`. 0.7.0.post1 has another kernel; 0.6.15.post1 marks keys beyond
the end with -5e4 and the LSE of no keys too, instead of -inf."""
READ = {
    "plan": "ece5a3a8b69a61b5",
    "entry point": "574c688b7a66fa6f",
    "templates": "e1a9169ee07d8ddd",
    "kernel": "f16991ac499aad70",
    "module": "e1c542bf335dee82",
}
"""Digest of each part that was read; see :func:`parts`."""

_HOPPER = "data/include/flashinfer/attention/hopper"
_BINDING = ("batch_prefill_sm90.cu", "batch_prefill_sm90_jit_binding.cu")
_TEMPLATES = ("batch_prefill_sm90_customize_config.jinja", "batch_prefill_paged_sm90_kernel_inst.jinja")
_GENERATORS = ("_gen_batch_prefill_module", "gen_batch_prefill_module", "gen_customize_batch_prefill_module")


def problem() -> str:
    """Why the installed FlashInfer cannot be relied upon, empty if it can; nothing of it is imported."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed; pip install 'mminference-sgl[flashinfer]'"
    root = folder()
    try:
        differing = ["its package is missing"] if root is None else changed(root)
    except OSError as error:
        differing = [f"{error.filename} cannot be read"]
    if not differing:
        return ""
    wanted = " to ".join(READ_IN)
    return f"it relies on internals of {DISTRIBUTION} {wanted}; {version} has others ({', '.join(differing)})"


def folder() -> Path | None:
    """The package's folder."""
    found = importlib.util.find_spec("flashinfer")
    return Path(found.origin).parent if found is not None and found.origin is not None else None


def changed(root: Path) -> list[str]:
    """Names of the parts in a package's folder that are not those that were read.

    Raises:
        OSError: a file that was read is not there.
    """
    return [name for name, text in parts(root).items() if digest(text) != READ[name]]


def parts(root: Path) -> dict[str, str]:
    """What the work items, the launch and the compiled module rely on."""
    sources = root / "data/csrc"
    scheduler = (root / "data/include/flashinfer/attention/scheduler.cuh").read_text(encoding="utf-8")
    modules = (root / "jit/attention/modules.py").read_text(encoding="utf-8")
    kernel = sorted((root / _HOPPER).glob("*.cuh"))
    return {
        "plan": _between(scheduler, "struct PrefillPlanSM90Info {", "\n};"),
        "entry point": "".join((sources / name).read_text(encoding="utf-8") for name in _BINDING),
        "templates": "".join((sources / name).read_text(encoding="utf-8") for name in _TEMPLATES),
        "kernel": "".join(path.name + path.read_text(encoding="utf-8") for path in kernel),
        "module": "".join(_between(modules, f"\ndef {name}(", "\n\n\n") for name in _GENERATORS),
    }


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].partition(end)[0]
