"""Search mode: prefill is dense, and what the offline search wants to know of every layer is written to a folder.

``MMINFERENCE_SEARCH`` names the folder. ``task.json`` in it says into which of its folders the next requests' records
go and what they are, so the command that sends the requests, one at a time, says it there before each of them. A
record is a file of one layer, one chunk and one rank, and is not made again where it is there: a search that was cut
off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mminference_sgl.backend.sglang_compat import head_offset, head_ranks
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import head_search
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import LARGEST_INTEGER, Config
from mminference_sgl.method.head_search import Measured, Scores
from mminference_sgl.method.plan import ForwardPlan, SparseRequest, build

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from mminference_sgl.backend.layers import Survey
    from mminference_sgl.backend.start import Start

ENV_SEARCH = "MMINFERENCE_SEARCH"
TASK, MODEL, REQUEST = "task.json", "model.json", "request.json"

Record = TypeVar("Record", Scores, Measured)


@dataclass(frozen=True)
class Task:
    """What is recorded of the next requests.

    ``into``: folder of the records, below the search's. ``maps``: maps of the heads by layer to be measured, at
    ``density`` and with ``window`` of A-shape; None where candidates are scored.
    """

    into: str
    maps: Mapping[int, Sequence[HeadSpec]] | None = None
    density: float = 1.0
    window: int = 0

    def write(self, folder: Path) -> None:
        """Says so to the server that searches into a folder."""
        maps: Any = self.maps
        if maps is not None:
            maps = {layer: [dataclasses.astuple(spec) for spec in own] for layer, own in maps.items()}
        write_json(folder / TASK, {"into": self.into, "maps": maps, "density": self.density, "window": self.window})

    @classmethod
    def read(cls, folder: Path) -> Task | None:
        """What was said last; None before anything was."""
        try:
            given = json.loads((folder / TASK).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        maps = given["maps"] and {int(layer): [HeadSpec(*one) for one in own] for layer, own in given["maps"].items()}
        return cls(**{**given, "maps": maps})


class Recorder:
    """Records what the search wants to know of this rank's heads."""

    def __init__(self, folder: Path, start: Start, runner: ModelRunner, survey: Survey) -> None:
        self._folder, self._start, self._layers = folder, start, survey.sparse
        self._rank = head_offset(runner)
        self._task: Task | None = None
        self._plan: ForwardPlan | None = None
        if self._rank == 0:
            write_json(folder / MODEL, _model(start, runner, survey))

    @classmethod
    def of_environment(cls, start: Start, runner: ModelRunner, survey: Survey) -> Recorder | None:
        """The one that the environment asks for, if any."""
        folder = os.environ.get(ENV_SEARCH, "").strip()
        return cls(Path(folder), start, runner, survey) if folder else None

    def begin(self, requests: Mapping[int, SparseRequest], batch_size: int, req_to_token: torch.Tensor) -> None:
        """Plans a forward; nothing of it is recorded but where it has one request, which could run sparse."""
        self._plan = None
        self._task = Task.read(self._folder)
        if self._task is None or batch_size != 1 or not requests:
            return
        config = self._start.config
        scored = self._task.maps is None
        self._plan = build(
            list(requests.values()),
            req_to_token,
            tile_queries=config.tile_queries,
            tile_keys=config.tile_keys,
            probe_rows=LARGEST_INTEGER if scored else config.probe_rows,
            sharing=self._start.sharing,
            probe_one_in=head_search.PROBE_ONE_IN if scored else 0,
        )
        if self._rank == 0:
            layout = requests[0].layout
            strides = layout.search.strides if layout.search is not None else []
            content = {"tokens": int(layout.layout.length), "strides": strides}
            write_json(self._folder / self._task.into / REQUEST, content)

    def wants(self, layer: int) -> bool:
        """Whether a layer of the forward is to be recorded and is not yet, or is listened to for strides."""
        if self._plan is None or self._task is None or layer not in self._layers:
            return False
        search = self._plan.requests[0].layout.search
        # A search that goes on must hear again what it heard before.
        listens = self._task.maps is None and search is not None and search.listens(layer)
        return listens or not self._path(layer).exists()

    def layer(self, layer: int, operands: Operands, dense: torch.Tensor) -> None:
        """Records a layer whose keys are in the pool; ``dense`` [batch rows, H, Dv]: its output."""
        plan, task, start = self._plan, self._task, self._start
        assert plan is not None
        assert task is not None
        record: Scores | Measured
        if task.maps is None:
            record = head_search.score(operands, plan, start.config, start.implementation, layer)
        else:
            config = measuring(start.config, task.density, task.window)
            first = self._rank * operands.heads
            specs = task.maps[layer][first : first + operands.heads]
            record = head_search.measure(operands, plan, specs, config, dense, start.implementation)
        save(self._path(layer), record)

    def _path(self, layer: int) -> Path:
        assert self._plan is not None
        assert self._task is not None
        name = f"layer{layer:03}-token{self._plan.requests[0].prefix:08}-rank{self._rank:02}.npz"
        return self._folder / self._task.into / name


def measuring(config: Config, density: float, window: int) -> Config:
    """The configuration that maps are measured with."""
    return dataclasses.replace(head_search.with_window(config, window), max_density=density)


def save(path: Path, record: Scores | Measured) -> None:
    """Writes a record, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {f.name: getattr(record, f.name).astype(np.float32) for f in dataclasses.fields(record)}
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **fields)
    unfinished.replace(path)


def load(folder: Path, layer: int, kind: type[Record]) -> Record:
    """The records of a layer: all ranks' heads, all chunks' sum.

    Raises:
        FileNotFoundError: there are none.
    """
    chunks: dict[str, list[Record]] = {}
    for path in sorted(folder.glob(f"layer{layer:03}-*.npz")):
        with np.load(path) as file:
            own = kind(**{name: file[name].astype(np.float64) for name in file.files})
        chunks.setdefault(path.name.split("-")[1], []).append(own)
    if not chunks:
        raise FileNotFoundError(f"{folder}: nothing of layer {layer}")
    found = [kind.concatenate(ranks) for ranks in chunks.values()]
    total = found[0]
    for one in found[1:]:
        total += one
    return total


def records(folder: Path) -> Iterator[Path]:
    """Files of the records in a folder."""
    return folder.glob("layer*.npz")


def write_json(path: Path, content: Any) -> None:
    """Writes a file, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _model(start: Start, runner: ModelRunner, survey: Survey) -> dict[str, Any]:
    config = runner.model_config
    device = torch.device(runner.device)
    example = survey.example
    ranks = head_ranks(runner)
    return {
        "architecture": (getattr(config.hf_config, "architectures", None) or ["unknown"])[0],
        "layers": int(config.hf_text_config.num_hidden_layers),
        "heads": int(config.hf_text_config.num_attention_heads),
        "kv_heads": int(config.get_total_num_kv_heads()),
        "head_dim": int(example.qk_head_dim if example is not None else config.head_dim),
        "sparse_layers": sorted(survey.sparse),
        "ranks": ranks,
        "chunk_tokens": start.chunk_tokens,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
