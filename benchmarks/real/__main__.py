"""``make bench-real``: what sparse prefill costs a language model that others trained, on real documents.

Documents of five kinds are prefilled in chunks by stock SGLang on the CPU, in float32, dense and then sparse. What
counts is the likelihood of each document's second half, the share of its tokens whose likeliest one is the dense one,
and passkeys. ``--twin`` asks the same of a forward in plain PyTorch, without a server: seconds for each document, and
the divergence of next-token distributions besides. ``--control`` reads the documents once more with a sink and a local
window of about the same density: what choosing tiles is worth.

Exits 1 when a promise is missed: at most 0.5 % of likelihood lost by a kind of documents, beyond what its documents can
tell; at least 98 % agreement; every passkey found that is found under dense attention; and the control losing at least
three times as much.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.host import described
from benchmarks.real import weights
from benchmarks.real.documents import DOCUMENTS, HALVES, KINDS
from benchmarks.real.measures import Distance, distance
from benchmarks.real.passkeys import DEPTHS, passkeys
from benchmarks.real.readers import Served, Twin
from benchmarks.toy.serving import GUARD_OFF
from mminference_sgl.testing import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from benchmarks.real.documents import Document
    from benchmarks.real.readers import LayerFigures, Reader, Sparse
    from benchmarks.real.reading import Reading

LENGTHS = (4096, 8160)
"""The longer one with room for what the server keeps back of a context of 8192."""
SPARSE: dict[str, Any] = {"pattern": "vertical_slash", "min_tokens": 512}
"""Text is sparse under this pattern only, and prompts of these lengths would be dense by themselves."""
LOSS, AGREEMENT = 0.005, 0.98
A_SHAPE = Path(__file__).with_name("a_shape.json")
"""The control's pattern: the package's own leaves text dense."""
SINK = 64
"""First keys that the control reads."""
OVERHANG = 48
"""Keys before the window that it reads besides, as tiles of 32 rows and 64 keys are read whole."""
WORSE = 3.0
"""How many times as much the control is to lose."""


@dataclass(frozen=True)
class Row:
    """One document of one length: how far from dense, and what each chunk reported.

    ``divergence``: mean Kullback-Leibler divergence in nats; None with a server. ``mean_density``: of the document;
    ``density``, ``coverage``, ``error``: by chunk. ``layers``: of the last chunk, without a server.
    """

    document: Document
    length: int
    distance: Distance
    divergence: float | None
    mean_density: float
    density: list[float]
    coverage: list[float]
    error: list[float]
    layers: list[LayerFigures]


@dataclass(frozen=True)
class Found:
    """One passkey, and whether it was found densely and sparsely."""

    length: int
    depth: float
    dense: bool
    sparse: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether its promises are kept."""
    options = _arguments(argv)
    from transformers import AutoTokenizer

    began = time.monotonic()
    folder = options.model or weights.checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [(document, length) for length in options.lengths for document in _documents(options)]
    keys = [key for length in options.lengths for key in passkeys(tokenizer, options.half, length)[: options.passkeys]]
    prompts = [document.tokens(tokenizer, length) for document, length in documents] + [key.tokens for key in keys]
    settings, count = SPARSE | dict(options.set), len(documents)
    reader = (Twin if options.twin else Served)(folder)
    try:
        dense, sparse = reader.dense(prompts), reader.sparse(prompts, [settings] * len(prompts))
        rows = _rows(reader, documents, dense[:count], sparse[:count])
        controls = _controls(reader, rows, prompts[:count], dense[:count], settings) if options.control else []
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    found = [
        Found(len(key.tokens), key.depth, key.found(reference), key.found(other.reading))
        for key, reference, other in zip(keys, dense[count:], sparse[count:], strict=True)
    ]
    _print(rows, found, controls)
    failures = judge(rows, found, controls)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(options, rows, found, controls, failures), indent=1) + "\n")
    return 1 if failures else 0


def judge(rows: Sequence[Row], found: Sequence[Found], controls: Sequence[Row] = ()) -> list[str]:
    """The promises that are missed; ``controls`` by row, or none."""
    failures = []
    kinds: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        kinds[row.document.kind, row.length].append(index)
    for (kind, length), members in kinds.items():
        own = [rows[index] for index in members]
        loss, interval = _loss(own)
        agreement = sum(row.distance.agreement for row in own) / len(own)
        where = f"{kind} at {length} tokens"
        if loss - interval > LOSS:
            failures.append(f"{where}: loses {100 * loss:.2f} +- {100 * interval:.2f} % likelihood")
        if agreement < AGREEMENT:
            failures.append(f"{where}: {100 * agreement:.1f} % agreement")
    if controls:
        for length in sorted({row.length for row in rows}):
            pairs = [pair for pair in zip(rows, controls, strict=True) if pair[0].length == length]
            failures += [f"all at {length} tokens: {what}" for what in _beside(*zip(*pairs, strict=True))]
    failures += [
        f"passkey at {each.length} tokens, depth {each.depth:.2f}: found densely only"
        for each in found
        if each.dense and not each.sparse
    ]
    return failures


def _beside(rows: Sequence[Row], controls: Sequence[Row]) -> list[str]:
    """What is wrong where the control does not lose more: told by divergence where there is one, it is the sharper."""
    if all(row.mean_density == 1 for row in rows):
        return []
    if any(row.divergence is None for row in rows):
        (loss, _), (lost, interval) = _loss(rows), _loss(controls)
        if lost < max(WORSE * loss, interval):
            return [f"loses {100 * loss:.2f} % likelihood, the control {100 * lost:.2f} +- {100 * interval:.2f} %"]
        return []
    own, other = (sum(row.divergence or 0.0 for row in some) / len(some) for some in (rows, controls))
    return [f"diverges by {own:.4f} nats, the control by {other:.4f}"] if other < WORSE * own else []


def _loss(rows: Sequence[Row]) -> tuple[float, float]:
    """Share of the documents' likelihood that is lost, and half the width of its interval."""
    distances = [row.distance for row in rows]
    dense = sum(each.dense_nll for each in distances)
    interval = sum((each.interval * each.dense_nll) ** 2 for each in distances) ** 0.5
    return sum(each.nll for each in distances) / dense - 1, interval / dense


def window(density: float, length: int) -> int:
    """The local window with which a document is about as dense, counting the sink and what whole tiles add."""
    return max(1, round(length * (1 - (1 - density) ** 0.5)) - SINK - OVERHANG)


def _controls(
    reader: Reader, rows: Sequence[Row], prompts: list[torch.Tensor], dense: list[Reading], settings: dict[str, Any]
) -> list[Row]:
    control = {"pattern": str(A_SHAPE), "error_ceiling": GUARD_OFF, "min_tokens": settings["min_tokens"]}
    budgets = [{"sink": SINK, "window": window(row.mean_density, row.length)} for row in rows]
    sparse = reader.sparse(prompts, [control | {"patterns": {"a_shape": budget}} for budget in budgets])
    return _rows(reader, [(row.document, row.length) for row in rows], dense, sparse)


def _documents(options: argparse.Namespace) -> list[Document]:
    """The first documents of each kind of the half."""
    chosen = []
    for kind in options.kinds:
        chosen += [d for d in DOCUMENTS if d.kind == kind and d.half == options.half][: options.documents]
    return chosen


def _rows(
    reader: Reader, documents: Sequence[tuple[Document, int]], dense: Sequence[Reading], sparse: Sequence[Sparse]
) -> list[Row]:
    return [
        Row(
            document,
            length,
            distance(one.reading, reference),
            reader.divergence(one.reading, reference),
            one.mean_density,
            one.density,
            one.coverage,
            one.error,
            one.layers,
        )
        for (document, length), reference, one in zip(documents, dense, sparse, strict=True)
    ]


def _print(rows: Sequence[Row], found: Sequence[Found], controls: Sequence[Row]) -> None:
    print(
        f"{'':48}{'tokens':>7}{'dense':>7}{'sparse':>7}{'loss %':>8}{'+-':>6}{'same %':>7}{'KL':>8}"
        "  density by chunk, error"
    )
    for index, row in enumerate(rows):
        _print_row(row.document.name, row)
        if controls:
            _print_row("  control", controls[index])
    _print_layers([row.layers for row in rows if row.layers])
    for length in sorted({each.length for each in found}):
        own = [each for each in found if each.length == length]
        print(
            f"{'passkeys':48}{length:7}  found {sum(each.sparse for each in own)} of {len(own)}, "
            f"dense {sum(each.dense for each in own)}"
        )


def _print_layers(documents: Sequence[Sequence[LayerFigures]]) -> None:
    """By layer, over the documents: heads that save nothing at this error run dense."""
    if not documents:
        return
    print(f"{'last chunk, by layer':48}{'density':>9}{'coverage':>9}{'error':>8}{'dense heads':>13}")
    for layer, own in enumerate(zip(*documents, strict=True)):
        density, coverage, dense = (
            sum(getattr(each, name) for each in own) / len(own) for name in ("density", "coverage", "dense_heads")
        )
        print(f"{layer:48}{density:9.3f}{coverage:9.3f}{max(each.error for each in own):8.3f}{dense:13.1f}")


def _print_row(name: str, row: Row) -> None:
    far = row.distance
    print(
        f"{name:48}{row.length:7}{far.dense_nll:7.3f}{far.nll:7.3f}{100 * far.loss:+8.2f}"
        f"{100 * far.interval:6.2f}{100 * far.agreement:7.1f}"
        + (f"{'':8}  " if row.divergence is None else f"{row.divergence:8.4f}  ")
        + " ".join(f"{density:.3f}" for density in row.density)
        + f", {max(row.error):.3f}",
    )


def _record(
    options: argparse.Namespace,
    rows: Sequence[Row],
    found: Sequence[Found],
    controls: Sequence[Row],
    failures: list[str],
) -> dict[str, Any]:
    return {
        **described(),
        "model": options.model.name if options.model else weights.NAME,
        "reader": "twin" if options.twin else "server",
        "settings": SPARSE | dict(options.set),
        "rows": [asdict(row) for row in rows],
        "controls": [asdict(row) for row in controls],
        "passkeys": [asdict(each) for each in found],
        "failures": failures,
    }


def _setting(text: str) -> tuple[str, Any]:
    """``key=JSON``; what is not JSON is a string."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="another folder in Hugging Face's format")
    parser.add_argument("--twin", action="store_true", help="without a server")
    parser.add_argument("--control", action="store_true", help="read a sink and a local window, too")
    parser.add_argument("--half", default="confirm", choices=HALVES, help="documents to choose by, or to confirm by")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--documents", type=int, default=1, help="documents of each kind, at most 2")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--passkeys", type=int, default=0, choices=range(DEPTHS + 1), metavar="N")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
