"""A frontend program about a video: ``python examples/frontend.py clip.mp4 QUESTION [QUESTION ...] [--url URL]``.

The questions are asked side by side; what stands before them, the video included, is prefilled once and found in the
radix cache. The server has to see the file under the same path, or the path is a URL.

SGLang's own ``sgl.video`` sends frames as an image's data, which the server of 0.5.23 does not decode. So the endpoint
here sends the file, and the prompt has its placeholder where the video belongs.
"""

import argparse
from pathlib import Path

import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

BEGIN, END = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
"""Of Qwen2-VL to Qwen3.5; other families have other ones."""


class VideoEndpoint(RuntimeEndpoint):
    """An endpoint whose programs are about one video."""

    def __init__(self, url: str, video: str) -> None:
        super().__init__(url)
        self._video = video

    def _add_images(self, _state, data) -> None:
        data["video_data"] = [self._video]


@sgl.function
def ask(s, questions):
    s += BEGIN
    branches = list(s.fork(len(questions)))
    for i, question in enumerate(questions):
        branches[i] += question + END + sgl.gen("answer", max_tokens=16, temperature=0)
    s["answers"] = [branch["answer"] for branch in branches]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("video")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    options = parser.parse_args()
    video = options.video if "://" in options.video else str(Path(options.video).absolute())
    state = ask.run(options.questions, backend=VideoEndpoint(options.url, video))
    for question, answer in zip(options.questions, state["answers"], strict=True):
        print(f"{question}: {answer}")


if __name__ == "__main__":
    main()
