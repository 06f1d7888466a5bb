"""Load a running server: ``python examples/load_test.py URL QUESTION a.mp4 b.mp4 [-- OPTIONS]``, a request per video.

Behind ``--`` are options of SGLang's load generator, such as ``--request-rate 0.5 --goodput ttft:5000``. Run it once on
a server with ``--attention-backend mminference`` and once on one without; ``make bench-serving`` does that for the toy.
"""

import json
import sys
import tempfile
from pathlib import Path

from sglang.benchmark import serving


def main(url: str, question: str, videos: list[str], options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "requests.jsonl"
        rows = []
        for video in videos:
            place = video if "://" in video else str(Path(video).absolute())
            content = [{"type": "video_url", "video_url": {"url": place}}, {"type": "text", "text": question}]
            rows.append(json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 16}))
        dataset.write_text("\n".join(rows) + "\n")
        sys.argv = [
            *("sglang.benchmark.serving", "--backend", "sglang-oai-chat", "--base-url", url, "--warmup-requests", "0"),
            *("--dataset-name", "openai", "--dataset-path", str(dataset), "--num-prompts", str(len(videos))),
            *("--output-file", "load-test.jsonl", *options),
        ]
        serving.cli_main()


if __name__ == "__main__":
    arguments = [*sys.argv[1:], "--"]
    given, behind = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 : -1]
    main(given[0], given[1], given[2:], behind)
