"""``python -m benchmarks.real.knob``: what each setting of the knob costs a real language model, from exact to fast.

Rows of a context run under the method, the rows that are judged run densely behind it, as a question does behind a
video: the first half of each document, and its second half. Read by the offline twin, in chunks of 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.real import weights
from benchmarks.real.__main__ import SPARSE
from benchmarks.real.documents import DOCUMENTS, HALVES, KINDS
from benchmarks.real.measures import distance
from benchmarks.real.passkeys import passkeys
from benchmarks.real.readers import Twin
from mminference_sgl.kernels import stages

if TYPE_CHECKING:
    from collections.abc import Sequence

ERRORS = (0.02, 0.05, 0.07, 0.1, 0.2, 0.4, 0.8)
PASSKEYS = 5
"""Those in the first half of their documents."""


@dataclass(frozen=True)
class Line:
    """A setting: loss of likelihood over all documents, and the worst of them; agreement likewise.

    ``density``: of the rows that ran sparse. ``found``: passkeys, and ``findable``: those that dense attention finds.
    """

    error: float
    loss: float
    worst_loss: float
    agreement: float
    worst_agreement: float
    divergence: float
    density: float
    found: int
    findable: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    # The method's tiles are asked for, not what suits this CPU.
    stages.CPU_EASE = stages.EASE
    options = _arguments(argv)
    from transformers import AutoTokenizer

    folder = options.model or weights.checkpoint()
    tokenizer, reader = AutoTokenizer.from_pretrained(folder), Twin(folder)
    documents = [next(d for d in DOCUMENTS if (d.kind, d.half) == (kind, options.half)) for kind in options.kinds]
    prompts = [document.tokens(tokenizer, options.tokens) for document in documents]
    keys = passkeys(tokenizer, options.half, options.tokens)[:PASSKEYS]
    dense, told = reader.dense(prompts), reader.dense([key.tokens for key in keys])
    findable = sum(key.found(reading) for key, reading in zip(keys, told, strict=True))
    lines = []
    print("| error | loss % | worst | same % | worst | KL | density | passkeys |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for error in options.errors:
        settings = SPARSE | {"error": error, "text_error": error}
        sparse = [reader.context(tokens, settings) for tokens in prompts]
        far = [distance(one.reading, reference) for one, reference in zip(sparse, dense, strict=True)]
        losses, agreements = [each.loss for each in far], [each.agreement for each in far]
        kls = [reader.divergence(one.reading, reference) for one, reference in zip(sparse, dense, strict=True)]
        line = Line(
            error,
            sum(each.nll for each in far) / sum(each.dense_nll for each in far) - 1,
            max(losses),
            sum(agreements) / len(agreements),
            min(agreements),
            sum(kls) / len(kls),
            sum(sum(one.density) / len(one.density) for one in sparse) / len(sparse),
            sum(key.found(reader.context(key.tokens, settings).reading) for key in keys),
            findable,
        )
        lines.append(line)
        cells = f"{error}", f"{100 * line.loss:+.2f}", f"{100 * line.worst_loss:+.2f}", f"{100 * line.agreement:.1f}"
        cells += f"{100 * line.worst_agreement:.1f}", f"{line.divergence:.4f}", f"{line.density:.3f}"
        print("| " + " | ".join((*cells, f"{line.found}/{findable}")) + " |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="another folder in Hugging Face's format")
    parser.add_argument("--half", default="choose", choices=HALVES)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--errors", type=float, nargs="+", default=ERRORS)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
