"""``make bench-real``: what sparse prefill costs a language model that others trained, on real documents.

Documents of five kinds are prefilled in chunks by stock SGLang on the CPU, in float32, dense and then sparse. What
counts is the likelihood of each document's second half, the share of its tokens whose likeliest one is the dense one,
and passkeys. ``--twin`` asks the same of a forward in plain PyTorch, without a server: seconds for each document.

Exits 1 when a promise is missed: at most 0.5 % of likelihood lost by a kind of documents, beyond what its documents can
tell; at least 98 % agreement; every passkey found that is found under dense attention.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.real import weights
from benchmarks.real.documents import DOCUMENTS, HALVES, KINDS
from benchmarks.real.measures import Distance, distance
from benchmarks.real.passkeys import DEPTHS, passkeys
from benchmarks.real.readers import Served, Twin
from mminference_sgl.testing import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.real.documents import Document
    from benchmarks.real.readers import Sparse
    from benchmarks.real.reading import Reading

LENGTHS = (4096, 8192)
SPARSE: dict[str, Any] = {"pattern": "vertical_slash", "min_tokens": 512}
"""Text is sparse under this pattern only, and prompts of these lengths would be dense by themselves."""
LOSS, AGREEMENT = 0.005, 0.98


@dataclass(frozen=True)
class Row:
    """One document of one length: how far from dense, and what each chunk reported."""

    document: Document
    length: int
    distance: Distance
    density: list[float]
    coverage: list[float]
    error: list[float]


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
    reader = (Twin if options.twin else Served)(folder, SPARSE | dict(options.set))
    try:
        dense, sparse = reader.dense(prompts), reader.sparse(prompts)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    count = len(documents)
    rows = [_row(*each) for each in zip(documents, dense[:count], sparse[:count], strict=True)]
    found = [
        Found(len(key.tokens), key.depth, key.found(reference), key.found(other.reading))
        for key, reference, other in zip(keys, dense[count:], sparse[count:], strict=True)
    ]
    _print(rows, found)
    failures = judge(rows, found)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(options, rows, found, failures), indent=1) + "\n")
    return 1 if failures else 0


def judge(rows: Sequence[Row], found: Sequence[Found]) -> list[str]:
    """The promises that are missed."""
    failures = []
    kinds: dict[tuple[str, int], list[Distance]] = defaultdict(list)
    for row in rows:
        kinds[row.document.kind, row.length].append(row.distance)
    for (kind, length), distances in kinds.items():
        dense = sum(each.dense_nll for each in distances)
        loss = sum(each.nll for each in distances) / dense - 1
        interval = sum((each.interval * each.dense_nll) ** 2 for each in distances) ** 0.5 / dense
        agreement = sum(each.agreement for each in distances) / len(distances)
        if loss - interval > LOSS:
            failures.append(f"{kind} at {length} tokens: loses {100 * loss:.2f} +- {100 * interval:.2f} % likelihood")
        if agreement < AGREEMENT:
            failures.append(f"{kind} at {length} tokens: {100 * agreement:.1f} % agreement")
    failures += [
        f"passkey at {each.length} tokens, depth {each.depth:.2f}: found densely only"
        for each in found
        if each.dense and not each.sparse
    ]
    return failures


def _documents(options: argparse.Namespace) -> list[Document]:
    """The first documents of each kind of the half."""
    chosen = []
    for kind in options.kinds:
        chosen += [d for d in DOCUMENTS if d.kind == kind and d.half == options.half][: options.documents]
    return chosen


def _row(document: tuple[Document, int], dense: Reading, sparse: Sparse) -> Row:
    return Row(*document, distance(sparse.reading, dense), sparse.density, sparse.coverage, sparse.error)


def _print(rows: Sequence[Row], found: Sequence[Found]) -> None:
    print(f"{'':48}{'tokens':>7}{'dense':>7}{'sparse':>7}{'loss %':>8}{'+-':>6}{'same %':>7}  density by chunk, error")
    for row in rows:
        far = row.distance
        print(
            f"{row.document.name:48}{row.length:7}{far.dense_nll:7.3f}{far.nll:7.3f}{100 * far.loss:+8.2f}"
            f"{100 * far.interval:6.2f}{100 * far.agreement:7.1f}  "
            + " ".join(f"{density:.3f}" for density in row.density)
            + f", {max(row.error):.3f}",
        )
    for length in sorted({each.length for each in found}):
        own = [each for each in found if each.length == length]
        print(
            f"{'passkeys':48}{length:7}  found {sum(each.sparse for each in own)} of {len(own)}, "
            f"dense {sum(each.dense for each in own)}"
        )


def _record(
    options: argparse.Namespace, rows: Sequence[Row], found: Sequence[Found], failures: list[str]
) -> dict[str, Any]:
    packages = ("mminference-sgl", "sglang", "torch", "transformers")
    return {
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: metadata.version(name) for name in packages},
        "model": options.model.name if options.model else weights.NAME,
        "reader": "twin" if options.twin else "server",
        "settings": SPARSE | dict(options.set),
        "rows": [asdict(row) for row in rows],
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
