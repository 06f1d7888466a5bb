"""What sparse prefill did for a long request, now and then, for those who read the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from mminference_sgl.backend.figures import ChunkFigures

SECONDS = 10.0
"""Between two samples."""
LONG = 16384
"""Keys from which on a request is long."""

logger = logging.getLogger(__name__)


class Samples:
    """At most one long request per :data:`SECONDS`, logged at level info.

    ``bound``: error that is promised; a request beyond it is logged at level warning.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._last = -SECONDS

    def tell(self, chunks: Sequence[ChunkFigures]) -> None:
        """Logs the longest request of a forward whose figures have arrived, if it is time."""
        if not chunks or time.monotonic() - self._last < SECONDS or not logger.isEnabledFor(logging.INFO):
            return
        chunk = max(chunks, key=lambda one: one.num_keys)
        if chunk.num_keys < LONG:
            return
        self._last = time.monotonic()
        missed = self._bound > 0 and chunk.error > self._bound
        logger.log(
            logging.WARNING if missed else logging.INFO,
            "mminference sample %s dense_heads=%d%s",
            chunk.words,
            chunk.dense,
            f": more than the error of {self._bound:g} that was asked for" if missed else "",
        )
