"""The benchmarks that are meant for a GPU: their control flow on the CPU, with tiny sizes or stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import layer as gpu
from benchmarks.gpu import serving as gpu_serving
from benchmarks.gpu import tune
from mminference_sgl.kernels import ops
from mminference_sgl.kernels.launch_table import TABLE, Launch
from mminference_sgl.testing import Answer


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


class StandInServer:
    """Answers at once, slower without a backend, and logs what a sparse prefill would."""

    def __init__(self, model: Path, backend: str | None, config: dict, tokens: int, chunk: int) -> None:
        text = json.loads((model / "config.json").read_text())["text_config"]
        assert (text["num_attention_heads"], text["num_hidden_layers"]) == (28, 28)
        assert not list(model.glob("*.safetensors"))
        self.seconds = {None: 4.0, "mminference": 2.0}[backend] - (1.0 if "pattern" in config else 0.0)
        self.written = ""

    def __enter__(self) -> StandInServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, since: int = 0) -> str:
        return self.written[since:]

    def generate(self, text: str, *, video_data: list[str], max_tokens: int, stream: bool) -> Answer:
        assert Path(video_data[0]).stat().st_size > 0
        forward = self.seconds + (0.5 if stream else 0.0)
        meta = {
            "request_received_ts": 0.0,
            "api_server_dispatch_finish_ts": 0.25,
            "forward_entry_time": 1.0,
            "prefill_finished_time": 1.0 + forward,
        }
        return Answer("", forward, ttft=forward + 0.25, prompt_tokens=1024, meta=meta)


def test_bench_gpu_serving_splits_the_time_to_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--tokens", "1K", "--output", str(tmp_path)]
    assert gpu_serving.main(arguments, StandInServer) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    dense, sparse, rest = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert (dense["host"], dense["vision"], dense["attention"], dense["TTFT"]) == ("250", "500", "3000", "4750")
    assert (sparse["language model"], sparse["attention"], sparse["LM speed-up"]) == (
        "2000 (2000 to 2000)",
        "1000",
        "2.00",
    )
    assert rest["attention"] == ""
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("script", [gpu, tune, gpu_serving], ids=lambda script: script.__name__)
def test_without_a_gpu_they_say_what_they_need(script, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
