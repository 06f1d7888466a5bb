"""The benchmarks that are meant for a GPU: their control flow on the CPU, with tiny sizes or stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import attend as gpu_attend
from benchmarks.gpu import layer as gpu
from benchmarks.gpu import profile as gpu_profile
from benchmarks.gpu import serving as gpu_serving
from benchmarks.gpu import stand_in, tune
from benchmarks.gpu.setups import SKIP_FACTORS, Setup
from benchmarks.gpu.stand_in import StandInServer
from mminference_sgl.kernels import ops, torch_tiles
from mminference_sgl.kernels.launch_table import TABLE, Launch
from mminference_sgl.testing import ServerError


def test_bench_gpu_reports_every_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--output", str(tmp_path), "--name", "dry"]) == 0
    record = json.loads((tmp_path / "dry.json").read_text())
    assert {(line["shape"], line["wanted_density"]) for line in record["lines"]} == {
        (shape, density) for shape in ("1K one-shot", "512 at 1K") for density in (20.0, 100.0)
    }
    for line in record["lines"]:
        assert line["error"] <= line["allowed_error"]
        assert 0 < line["density"] <= 1.3
        assert line["true_mass"] <= 1 + 1e-4
        assert line["wanted_density"] < 100 or line["true_mass"] == pytest.approx(1, abs=1e-4)
    assert record["versions"]["torch"]
    table = capsys.readouterr().out
    assert (tmp_path / "dry.md").read_text().endswith(table)
    assert len(table.splitlines()) == 2 + len(record["lines"])


def test_bench_gpu_does_not_report_wrong_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_prefill

    def wrong(operands, passes, out, implementation):
        lse = right(operands, passes, out, implementation)
        out[:, 0] *= 1.01
        out[:, 1:] *= 0.99
        return lse

    monkeypatch.setattr(ops, "sparse_prefill", wrong)
    with pytest.raises(SystemExit, match="is off by"):
        gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_tune_rewrites_only_the_devices_entries(tmp_path: Path) -> None:
    output = tmp_path / "table.py"
    assert tune.main(["--dry-run", "--output", str(output), "--heads", "64,128"]) == 0
    module: dict[str, object] = {"__name__": "table"}
    sys.modules["table"] = sys.modules[__name__]
    exec(compile(output.read_text(), str(output), "exec"), module)
    del sys.modules["table"]
    changed = {entry for entry, launch in module["TABLE"].items() if tuple(launch) != tuple(TABLE[entry])}
    assert changed
    assert changed <= {(80, 64), (80, 128)}
    assert output.read_text().count("dry run, ") == 2


def test_tune_takes_the_fastest_that_fits() -> None:
    entry, fast, faster = (80, 128), Launch(64, 64, 8, 3), Launch(128, 64, 8, 4)

    def measure(_: object, launch: Launch) -> float:
        return {fast: 1.0, faster: 0.5}.get(launch, 2.0)

    assert tune.tune([entry], lambda _, launch: launch != faster, measure) == {entry: (fast, 1.0)}
    assert tune.tune([entry], lambda *_: False, measure) == {entry: (TABLE[entry], 2.0)}
    assert tune.tune([entry], lambda *_: True, lambda *_: 1.0) == {entry: (TABLE[entry], 1.0)}
    with pytest.raises(ValueError, match="no line for"):
        tune.rewritten("", {entry: tune.Tuned(fast, "")})


def test_tune_tries_descriptors_where_there_can_be_some() -> None:
    def tried(entry: tuple[int, int]) -> set[bool]:
        return {launch.descriptors for launch in tune.candidates(TABLE[entry], entry)}

    assert [tried(entry) for entry in ((80, 128), (90, 128), (90, 80))] == [{False}, {False, True}, {False}]
    entry = 90, 128
    changed = tune.rewritten(tune.MODULE.read_text(), {entry: tune.Tuned(Launch(16, 16, 1, 2, True, True), "note")})
    assert "    (90, 128): Launch(16, 16, 1, 2, split=True, descriptors=True),  # note\n" in changed


class CheckedServer(StandInServer):
    """A stand-in that looks at what it would serve."""

    def __init__(self, model: Path, setup: Setup, *sizes: int) -> None:
        text = json.loads((model / "config.json").read_text())["text_config"]
        assert (text["num_attention_heads"], text["num_hidden_layers"]) == (28, 28)
        assert not list(model.glob("*.safetensors"))
        super().__init__(model, setup, *sizes)


def serving(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str, servers=CheckedServer) -> list[dict]:
    """The rows of its table, which is also what it wrote."""
    assert gpu_serving.main(["--dry-run", "--output", str(output), *arguments], servers) == 0
    table = capsys.readouterr().out
    assert next(output.glob("*.md")).read_text().endswith(table)
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_bench_gpu_serving_splits_the_time_to_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, sparse, rest = serving(capsys, tmp_path)
    assert (dense["host"], dense["vision"], dense["attention"], dense["TTFT"]) == ("250", "500", "3000", "4750")
    assert (sparse["language model"], sparse["attention"], sparse["LM speed-up"]) == (
        "2000 (2000 to 2000)",
        "1000",
        "2.00",
    )
    assert rest["attention"] == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_bench_gpu_serving_says_why_a_rival_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = serving(capsys, tmp_path, "--rivals")
    why = {row["server"]: row["density"] for row in rows if not row["tokens"]}
    assert why == dict.fromkeys(
        ["trtllm_mha", *(f"trtllm_mha, skip {factor}" for factor in SKIP_FACTORS)],
        "ValueError: trtllm_mha is not there",
    )
    assert [row["server"] for row in rows if row["tokens"]][3:] == ["fa3, pages of 1", "fa3, pages of 128"]


def test_bench_gpu_serving_takes_the_dense_backend_that_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "SECONDS", {"triton": 6.0, "mminference": 2.0})
    setups = []

    class Noted(StandInServer):
        def __init__(self, model: Path, setup: Setup, *sizes: int) -> None:
            setups.append(setup)
            super().__init__(model, setup, *sizes)

    rows = serving(capsys, tmp_path, servers=Noted)
    assert [(row["server"], row["LM speed-up"]) for row in rows] == [
        ("dense, triton", "1.00"),
        ("mminference", "3.00"),
        ("rest", "6.00"),
        ("dense", ""),
        ("dense, flashinfer", ""),
    ]
    assert [(setup.backend, setup.args) for setup in setups[-2:]] == [
        ("triton", ("--prefill-attention-backend", "mminference"))
    ] * 2


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "[2026 TP0] Scheduler hit an exception: Traceback\nImportError: flash_ops\nKilled\n",
            "ImportError: flash_ops",
        ),
        ("nothing\n", "stopped"),
        ("mminference: SystemExit\ntorch.OutOfMemoryError: CUDA\n", "torch.OutOfMemoryError: CUDA"),
    ],
)
def test_why_a_server_did_not_start_is_one_line(log: str, reason: str) -> None:
    assert gpu_serving.why(ServerError("stopped", log)) == reason


def test_attend_refuses_to_time_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_tiles.attend

    def wrong(operands, tile_pass, lists, out, lse, *, merge):
        right(operands, tile_pass, lists, out, lse, merge=merge)
        out *= 1.01

    monkeypatch.setattr(torch_tiles, "attend", wrong)
    assert gpu_attend.main(["--dry-run", "--output", str(tmp_path), "--repeats", "1"]) == 1
    lines = json.loads((tmp_path / "attend.json").read_text())["lines"]
    assert len(lines) == 12
    for line in lines:
        assert "is allowed" in line["wrong"]
        assert line["attend"] is None


def test_attend_reports_every_variant(tmp_path: Path) -> None:
    assert gpu_attend.main(["--dry-run", "--output", str(tmp_path), "--repeats", "2"]) == 0
    lines = json.loads((tmp_path / "attend.json").read_text())["lines"]
    assert {(line["tiles"], line["body"], line["stages"]) for line in lines} == {
        (tiles, body, stages) for tiles in (4, 8) for body in gpu_attend.BODIES for stages in gpu_attend.STAGES
    }
    assert all(line["tflops"] > 0 and line["attend"]["low"] <= line["attend"]["high"] for line in lines)


def test_profile_counts_what_a_layer_launches(tmp_path: Path) -> None:
    assert gpu_profile.main(["--dry-run", "--output", str(tmp_path)]) == 0
    (layer,) = json.loads((tmp_path / "profile.json").read_text())["layers"]
    times = [kernel["milliseconds"] for kernel in layer["kernels"]]
    assert times == sorted(times, reverse=True)
    assert sum(times) > 0
    assert layer["host"]["median"] <= layer["both"]["median"]
    assert {"aten::bmm", "aten::cumsum_"} <= {kernel["name"] for kernel in layer["kernels"]}


@pytest.mark.parametrize(
    "script", [gpu, tune, gpu_serving, gpu_attend, gpu_profile], ids=lambda script: script.__name__
)
def test_without_a_gpu_they_say_what_they_need(script, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
