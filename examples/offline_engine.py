"""Ask about a video without a server: ``python examples/offline_engine.py MODEL clip.mp4 QUESTION [ENGINE ARGUMENTS]``.

The last argument is a JSON object; on a machine without a GPU, with ``SGLANG_PLATFORM=portable_cpu``:
``'{"device": "cpu", "mem_fraction_static": 0.2, "max_total_tokens": 65536}'``.
"""

import json
import sys
from typing import Any

import sglang
from transformers import AutoTokenizer


def main(model: str, video: str, question: str, arguments: dict[str, Any]) -> None:
    content = [{"type": "video"}, {"type": "text", "text": question}]
    prompt = AutoTokenizer.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    with sglang.Engine(model_path=model, attention_backend="mminference", log_level="info", **arguments) as engine:
        answer = engine.generate(prompt, {"temperature": 0, "max_new_tokens": 16}, video_data=[video])
    print(answer["text"])


if __name__ == "__main__":  # The engine's processes import this file again.
    main(*sys.argv[1:4], json.loads((sys.argv[4:] or ["{}"])[0]))
