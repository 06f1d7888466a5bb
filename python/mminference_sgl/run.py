"""``python -m mminference_sgl.run MODULE ...``: modules of SGLang that read their command line without loading plugins.

``launch_server``, ``serve`` and ``Engine`` load plugins first. SGLang's offline benchmarks do not, and refuse the name
of an attention backend that comes from one: ``python -m mminference_sgl.run sglang.benchmark.offline_throughput
--attention-backend mminference ...`` is that benchmark with this backend.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Load SGLang's plugins, then run the module that the command line names, with the rest of the command line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(
            "usage: python -m mminference_sgl.run MODULE [ARGUMENTS ...], e.g. sglang.benchmark.offline_throughput"
        )
    from sglang.srt.plugins import load_plugins

    load_plugins()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
