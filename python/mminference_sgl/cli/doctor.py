"""``mminference doctor``: versions, machine, plugin and implementations, and what is broken."""

from __future__ import annotations

import os
import platform
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata

from mminference_sgl import BACKEND_NAME
from mminference_sgl.cli.report import Json, print_json, print_rows, quiet
from mminference_sgl.portable.cpu import PLATFORM_NAME

_DISTRIBUTIONS = (
    "mminference-sgl",
    "mminference-sgl-cpu",
    "sglang",
    "torch",
    "triton",
    "flash-attn-4",
    "transformers",
    "torchcodec",
    "numpy",
)


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report: whether something works here, and what there is to say about it."""

    name: str
    ok: bool
    detail: str = ""
    trace: str = ""
    """The traceback of what went wrong, for the end of the report."""


def run(*, as_json: Json = False) -> int:
    """Tell whether the plugin works here: versions, machine, plugin, models and implementations.

    Exits with 1 when a server would not find a working backend.
    """
    versions = [("python", platform.python_version()), *((name, _version(name)) for name in _DISTRIBUTIONS)]
    if not as_json:
        print("versions")
        print_rows(versions)
    found: dict[str, list[Check]] = {}
    for title, checks in _SECTIONS.items():
        with quiet(as_json=as_json):
            found[title] = checks()
        if not as_json:
            print(f"\n{title}")
            print_rows([(check.name, _verdict(check)) for check in found[title]])

    broken = [check for title in ("plugin", "models") for check in found[title] if not check.ok]
    if not any(check.ok for check in found[_IMPLEMENTATIONS]):
        broken += found[_IMPLEMENTATIONS]
    if as_json:
        sections = {title: [asdict(check) for check in checks] for title, checks in found.items()}
        print_json({"ok": not broken, "versions": dict(versions), **sections, "broken": [c.name for c in broken]})
        return 1 if broken else 0
    for check in broken:
        if check.trace:
            print(f"\n{check.name}:\n{check.trace.rstrip()}")
    if broken:
        print("\nbroken: " + "; ".join(f"{check.name}: {check.detail}" for check in broken))
        return 1
    print(f"\nok: a server on this machine finds --attention-backend {BACKEND_NAME}")
    return 0


_MISSING = "not installed"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return _MISSING


def _attempt(name: str, check: Callable[[], str]) -> Check:
    """Run a check that returns what there is to say and raises when something is broken."""
    try:
        return Check(name, ok=True, detail=check())
    except Exception as error:  # noqa: BLE001 - the report shows it
        summary = str(error).strip().splitlines() or [""]
        return Check(
            name, ok=False, detail=f"{type(error).__name__}: {summary[0]}".rstrip(": "), trace=traceback.format_exc()
        )


def _attempt_all(checks: Sequence[tuple[str, Callable[[], str]]]) -> list[Check]:
    return [_attempt(name, check) for name, check in checks]


def _check_core() -> str:
    from mminference_sgl import _core

    return str(_core.__version__)


def _check_torch() -> str:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()} (sm_{major}{minor})"
    return f"no GPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _check_platform() -> str:
    from sglang.srt.platforms import current_platform

    name = f"{type(current_platform).__name__} ({current_platform.device_name})"
    if current_platform.device_name == "unknown":
        name += f"; set SGLANG_PLATFORM={PLATFORM_NAME} to serve on the CPU"
    return name


def _check_hybrid_models() -> str:
    """Models with Gated DeltaNet, such as Qwen3.5: on Blackwell SGLang refuses attention backends of other names."""
    import torch

    from mminference_sgl.backend.sglang_compat import hybrid_models_on_blackwell

    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in {10, 12}:
        if not hybrid_models_on_blackwell():
            raise RuntimeError("on Blackwell this SGLang serves Qwen3.5 with its own backends only: use 0.5.18")
        return "Qwen3.5 runs sparse on Blackwell too"
    return "Qwen3.5 runs sparse in its full-attention layers"


def _check_video() -> str:
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise RuntimeError("torchcodec does not load; install FFmpeg's shared libraries (Debian: ffmpeg)") from error
    return "torchcodec loads"


def _entry_points() -> list[metadata.EntryPoint]:
    points = metadata.entry_points(group="sglang.srt.plugins")
    return [point for point in points if point.value == "mminference_sgl.plugin:register"]


def _check_entry_point() -> str:
    points = _entry_points()
    if not points:
        raise RuntimeError("nothing in the group sglang.srt.plugins leads to this package: install it again")
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if allowed and not allowed & {point.name for point in points}:
        raise RuntimeError(f"SGLANG_PLUGINS={','.join(sorted(allowed))} leaves mminference out: add it")
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME and not metadata.entry_points(
        group="sglang.srt.platforms", name=PLATFORM_NAME
    ):
        raise RuntimeError(f"nothing offers SGLANG_PLATFORM={PLATFORM_NAME}: pip install mminference-sgl-cpu")
    return "found"


def _check_register() -> str:
    (point,) = _entry_points()
    # SGLang would swallow what this raises.
    point.load()()
    return "runs"


def _check_loaded() -> str:
    """Load the plugins as a server does, and look whether the backend is known afterwards."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        raise RuntimeError(f"{BACKEND_NAME} is no choice of the command line afterwards")
    if BACKEND_NAME not in ATTENTION_BACKENDS:
        raise RuntimeError(f"{BACKEND_NAME} is not registered afterwards")
    return f"{BACKEND_NAME} is a choice of the command line and registered"


def _check_backend() -> str:
    from mminference_sgl.backend import factory

    if not callable(getattr(factory, "create", None)):
        raise TypeError("mminference_sgl.backend.factory has no create()")
    return "imports"


def _check_models() -> str:
    from mminference_sgl import model_plugin

    return ", ".join(model_plugin.model_classes())


def _check_hooks() -> str:
    """Whether SGLang still has what the models hook into; after `load_plugins`, unless they are left out."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from mminference_sgl import model_plugin

    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if allowed and model_plugin.NAME not in allowed:
        return f"SGLANG_PLUGINS={','.join(sorted(allowed))} leaves the models out"
    broken = [target for target in model_plugin.HOOKS if target not in HookRegistry._patched]
    if broken:
        raise RuntimeError(f"SGLang no longer has {', '.join(broken)}; models of this package cannot be served with it")
    return "fit"


def _attempt_implementations() -> list[Check]:
    try:
        from mminference_sgl.backend import selfcheck

        found = selfcheck.check_implementations()
    except Exception as error:  # noqa: BLE001 - the report shows it
        return [Check("all", ok=False, detail=f"{type(error).__name__}: {error}", trace=traceback.format_exc())]
    return [Check(name, ok=state == "ok", detail="" if state == "ok" else state) for name, state in found.items()]


def _verdict(check: Check) -> str:
    word = "ok" if check.ok else "no"
    return f"{word}, {check.detail}" if check.detail else word


_MACHINE: tuple[tuple[str, Callable[[], str]], ...] = (
    ("pytorch", _check_torch),
    ("sglang platform", _check_platform),
    ("video decoding", _check_video),
    ("hybrid models", _check_hybrid_models),
)
# In the order in which one failing explains the next.
_PLUGIN: tuple[tuple[str, Callable[[], str]], ...] = (
    ("rust core", _check_core),
    ("entry point", _check_entry_point),
    # Before register() is called here: afterwards the backend is known in any case.
    ("load_plugins()", _check_loaded),
    ("register()", _check_register),
    ("backend module", _check_backend),
)
_MODELS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("added", _check_models),
    ("hooks", _check_hooks),
)
_IMPLEMENTATIONS = "implementations on this machine"
_SECTIONS: dict[str, Callable[[], list[Check]]] = {
    "machine": partial(_attempt_all, _MACHINE),
    "plugin": partial(_attempt_all, _PLUGIN),
    "models": partial(_attempt_all, _MODELS),
    _IMPLEMENTATIONS: _attempt_implementations,
}
