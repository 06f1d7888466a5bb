from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mminference_sgl.backend
from mminference_sgl import cli, plugin
from mminference_sgl.backend import selfcheck
from mminference_sgl.cli import doctor as doctor_module


def broken(*_arguments, **_keywords):
    raise RuntimeError("out of order")


@pytest.fixture
def doctor(capsys):
    def run() -> tuple[int, str]:
        status = cli.main(["doctor"])
        return status, capsys.readouterr().out

    return run


def test_doctor_as_a_command():
    """In a process of its own, where only SGLang's plugin loading can have named the backend."""
    command = Path(sys.executable).with_name("mminference")
    result = subprocess.run([command, "doctor"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("sglang ", "torch ", "numpy ", "rust core", "mminference is a choice of the command line"):
        assert word in result.stdout
    assert "\nok: " in result.stdout


def test_doctor_tells_implementations(doctor):
    status, report = doctor()
    assert status == 0, report
    lines = report.split("implementations on this machine\n")[1].split("\n\n")[0].splitlines()
    states = {name: state for name, _, state in (line.strip().partition(" ") for line in lines)}
    assert states["reference"].strip() == "ok"
    assert states["torch"].strip() == "ok"


def test_doctor_names_a_failing_register(doctor, monkeypatch):
    monkeypatch.setattr(plugin, "register", broken)
    status, report = doctor()
    assert status == 1
    assert "broken: register(): RuntimeError: out of order" in report
    assert "Traceback" in report


@pytest.mark.fault("import error of the plugin", "doctor names it")
def test_doctor_names_a_backend_that_does_not_import(doctor, monkeypatch):
    monkeypatch.delattr(mminference_sgl.backend, "factory", raising=False)
    monkeypatch.setitem(sys.modules, "mminference_sgl.backend.factory", None)
    status, report = doctor()
    assert status == 1
    assert "broken: backend module: " in report


def test_doctor_names_a_backend_that_sglang_does_not_know(doctor, monkeypatch):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # What a swallowed exception leaves behind; the plugins are not loaded twice.
    monkeypatch.delitem(ATTENTION_BACKENDS, "mminference")
    status, report = doctor()
    assert status == 1
    assert "load_plugins(): RuntimeError: mminference is not registered afterwards" in report


def test_doctor_names_an_environment_that_leaves_the_plugin_out(doctor, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    status, report = doctor()
    assert status == 1
    assert "SGLANG_PLUGINS=another" in report.split("broken: ")[1]


def test_doctor_names_a_platform_that_nothing_offers(doctor, monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", "portable_cpu")
    points = doctor_module.metadata.entry_points

    def without_platforms(**wanted):
        return [] if wanted.get("group") == "sglang.srt.platforms" else points(**wanted)

    monkeypatch.setattr(doctor_module.metadata, "entry_points", without_platforms)
    status, report = doctor()
    assert status == 1
    assert "pip install mminference-sgl-cpu" in report.split("broken: ")[1]


@pytest.mark.parametrize(("capability", "sees"), [(9, "full-attention"), (10, "Blackwell too"), (12, "Blackwell too")])
def test_doctor_tells_of_hybrid_models(capability, sees, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    assert sees in doctor_module._check_hybrid_models()


def test_doctor_tells_where_hybrid_models_are_refused(doctor, monkeypatch):
    """SGLang 0.5.17 on Blackwell, played: its wrapper asks for what was typed. All other models are served."""
    from sglang.srt.layers.attention import attention_registry

    monkeypatch.setattr(attention_registry, "attn_backend_wrapper", lambda runner, _: runner.server_args)
    assert doctor()[0] == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(RuntimeError, match=r"on Blackwell .* use 0\.5\.18"):
        doctor_module._check_hybrid_models()


def test_doctor_fails_without_an_implementation(doctor, monkeypatch):
    monkeypatch.setattr(selfcheck, "check_implementations", lambda: {"reference": "fails", "torch": "fails"})
    status, report = doctor()
    assert status == 1
    assert "reference: fails" in report


def test_implementation_that_computes_wrong(monkeypatch):
    from mminference_sgl.kernels import ops

    def wrong(operands, passes, out, implementation):
        out.zero_()

    monkeypatch.setattr(ops, "sparse_prefill", wrong)
    assert selfcheck.check_implementations()["torch"].startswith("computes wrong on")


def test_implementation_that_selects_wrong(monkeypatch):
    from mminference_sgl.method import prefill

    select = prefill.select_layer

    def wrong(*given):
        passes, (report,) = select(*given)
        return passes, [replace(report, coverage=report.coverage - 0.1 * (given[-1] == "reference"))]

    monkeypatch.setattr(prefill, "select_layer", wrong)
    found = selfcheck.check_implementations()
    assert found["torch"] == "ok"
    assert found["reference"].startswith("selects wrong on cpu")


def test_implementation_that_fails(monkeypatch):
    from mminference_sgl.kernels import ops

    monkeypatch.setattr(ops, "sparse_prefill", broken)
    assert "out of order" in selfcheck.check_implementations()["torch"]


def test_doctor_as_json(monkeypatch, capsys):
    from sglang.srt.plugins import load_plugins

    def talks():
        print("a dependency says hello")
        return {"reference": "ok", "torch": "fails"}

    monkeypatch.setattr(selfcheck, "check_implementations", talks)
    assert cli.main(["doctor", "--json"]) == 0
    written = capsys.readouterr()
    found = json.loads(written.out)
    assert "hello" in written.err
    assert found["ok"]
    assert found["broken"] == []
    assert found["versions"]["mminference-sgl"] == mminference_sgl.__version__
    assert {check["name"]: check["ok"] for check in found["implementations on this machine"]} == {
        "reference": True,
        "torch": False,
    }
    load_plugins()
    monkeypatch.setattr(plugin, "register", broken)
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == ["register()"]
    (check,) = (check for check in found["plugin"] if check["name"] == "register()")
    assert check["detail"] == "RuntimeError: out of order"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mminference-sgl {mminference_sgl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "Missing command; see mminference --help"),
        (["doctr"], "No such command 'doctr'"),
        (["doctor", "--verbose"], "No such option: --verbose; see mminference doctor --help"),
        (["check-model"], "Missing argument 'PATH'; see mminference check-model --help"),
        (["check-model", "no/such/folder"], "'no/such/folder' does not exist; see mminference check-model --help"),
        (["patterns"], "Missing command; see mminference patterns --help"),
        (["patterns", "validate"], "Missing argument 'FILE...'; see mminference patterns validate --help"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_usage_is_one_line_with_a_remedy(arguments, problem, capsys):
    assert cli.main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("mminference: ")
    assert problem in written.err
    assert written.err.count("\n") == 1


def plain(text: str) -> str:
    """What is read, whatever the terminal: without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.mark.parametrize("name", ["", *cli.GROUPS, *cli.COMMANDS])
def test_help_tells_the_exit_codes(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    assert cli.EXIT_CODES in plain(capsys.readouterr().out)


def test_help_lists_every_command(capsys):
    for name in cli.COMMANDS:
        *group, command = name.split()
        cli.main([*group, "--help"])
        assert f" {command} " in plain(capsys.readouterr().out).split("Commands")[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_speaks_json_and_says_what_it_does(name):
    run = cli.COMMANDS[name]
    assert inspect.signature(run).parameters["as_json"].default is False
    assert inspect.getdoc(run)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["patterns", "list"]], ids=" ".join)
def test_what_needs_no_server_imports_none(arguments):
    code = (
        f"import sys; from mminference_sgl.cli import main; assert main({arguments}) == 0; "
        "sys.exit(', '.join({'torch', 'sglang', 'triton', 'transformers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
