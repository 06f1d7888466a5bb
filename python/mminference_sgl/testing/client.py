"""A client for an SGLang server, or for another one that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

Message = Mapping[str, Any]
"""One OpenAI chat message."""

_TAIL_LINES = 40
_FLUSH_WAIT_S = 10


class ServerError(RuntimeError):
    """A server that did not start, died, or refused a request; ends with the tail of its log."""

    def __init__(self, message: str, log: str = "", returncode: int | None = None) -> None:
        tail = "\n".join(log.splitlines()[-_TAIL_LINES:])
        super().__init__(f"{message}\n--- end of the server's log ---\n{tail}" if tail else message)
        self.log = log
        self.returncode = returncode


@dataclass(frozen=True)
class Answer:
    """What a server said to one request."""

    text: str
    seconds: float
    """From sending the request to having the whole answer."""
    ttft: float | None = None
    """From sending the request to its first token; streamed requests only."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Log-probability of each generated token."""
    top: tuple[dict[int, float], ...] = ()
    """For each generated token, the likeliest token ids and their log-probabilities."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    """SGLang's ``meta_info``; with ``metrics=True`` it holds the request's time stamps."""

    @property
    def preprocess_s(self) -> float:
        """Seconds of decoding, resizing and tokenizing. Needs ``metrics=True``."""
        return float(self.meta["api_server_dispatch_finish_ts"] - self.meta["request_received_ts"])

    @property
    def forward_s(self) -> float:
        """Seconds from the first chunk's start to the first token. Needs ``metrics=True``.

        The language model's prefill, and the vision tower unless its embeddings were cached.
        """
        return float(self.meta["prefill_finished_time"] - self.meta["forward_entry_time"])


class Client:
    """Speaks HTTP to the server at a URL.

    `chat` needs no more than OpenAI's protocol where it streams; all else is SGLang's own. Other servers than SGLang's
    want to hear the name of their `model`.
    """

    def __init__(self, url: str, model: str = "default") -> None:
        self.url, self._model = url.rstrip("/"), model
        self._http = httpx.Client(base_url=self.url, timeout=httpx.Timeout(600.0, connect=5.0), trust_env=False)

    def log(self, since: int = 0) -> str:  # noqa: ARG002
        """The server's log from character `since` on; of a server that others started nothing is known."""
        return ""

    def flush_cache(self) -> None:
        """Empty the radix cache (SGLang keeps its cache of vision embeddings), once no request is left."""
        self._post(f"/flush_cache?timeout={_FLUSH_WAIT_S}", {})

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        *,
        stream: bool = False,
        logprobs: bool = True,
        top_logprobs: int = 5,
        **options: Any,
    ) -> Answer:
        """Ask ``/v1/chat/completions``, greedily.

        A streamed answer has `Answer.ttft`, but neither log-probabilities nor time stamps: SGLang
        gives those to whole answers only.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(messages),
            "temperature": 0,
            **options,
        }
        body["max_tokens"] = max_tokens
        if stream:
            return self._stream({**body, "stream": True, "stream_options": {"include_usage": True}})
        body["return_meta_info"] = True
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        began = time.monotonic()
        reply = self._post("/v1/chat/completions", body)
        seconds = time.monotonic() - began
        choice = reply["choices"][0]
        return _answer(choice["message"]["content"] or "", choice["meta_info"], seconds)

    def generate(
        self,
        text: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        image_data: Sequence[str] | None = None,
        video_data: Sequence[str] | None = None,
        max_tokens: int = 16,
        stream: bool = False,
        top_logprobs: int = 5,
        **options: Any,
    ) -> Answer:
        """Ask SGLang's native ``/generate``, greedily.

        The prompt holds one placeholder token per image or video.
        """
        body: dict[str, Any] = {
            "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens},
            "return_logprob": True,
            "top_logprobs_num": top_logprobs,
            **options,
        }
        given = {
            "text": text,
            "input_ids": input_ids,
            "image_data": image_data,
            "video_data": video_data,
        }
        body |= {key: value for key, value in given.items() if value is not None}
        began = time.monotonic()
        if not stream:
            reply = self._post("/generate", body)
            return _answer(reply["text"], reply["meta_info"], time.monotonic() - began)
        ttft = None
        for reply in self._events("/generate", {**body, "stream": True}):
            if "error" in reply:
                raise ServerError(f"/generate answered {reply['error']}", self.log())
            ttft = time.monotonic() - began if ttft is None else ttft
        return _answer(reply["text"], reply["meta_info"], time.monotonic() - began, ttft)

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a piece of a prompt."""
        return int(self._post("/tokenize", {"prompt": text, "add_special_tokens": False})["count"])

    def open_session(self, capacity: int = 1 << 20) -> str:
        """Open one of SGLang's sessions: its requests continue one another without sending media again.

        Pass ``session_params={"id": ...}`` to `generate`, and on later turns also ``rid``, the
        ``meta["id"]`` of the answer to continue, and ``offset``, how many tokens of its prompt to keep.
        """
        return str(self._post("/open_session", {"capacity_of_str_len": capacity}))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            response = self._http.post(path, json=body)
        except httpx.TransportError as error:
            raise ServerError(f"{path} failed: {error!r}", self.log()) from error
        if response.status_code != httpx.codes.OK:
            raise ServerError(f"{path} answered {response.status_code}: {response.text[:2000]}", self.log())
        return response.json() if "json" in response.headers.get("content-type", "") else response.text

    def _stream(self, body: dict[str, Any]) -> Answer:
        text = ""
        ttft: float | None = None
        usage: dict[str, Any] = {}
        began = time.monotonic()
        for event in self._events("/v1/chat/completions", body):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    ttft = time.monotonic() - began if ttft is None else ttft
                    text += piece
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        seconds = time.monotonic() - began
        return Answer(text, seconds, ttft, prompt_tokens=usage.get("prompt_tokens", 0), cached_tokens=cached)

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of a streamed answer."""
        with self._http.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                detail = response.read().decode(errors="replace")[:2000]
                raise ServerError(f"{path} answered {response.status_code}: {detail}", self.log())
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))


def user_message(text: str, *, images: Sequence[str] = (), videos: Sequence[str] = (), before: str = "") -> Message:
    """A chat message: the text `before`, the images, the videos (URLs or paths), then the text."""
    content: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    content += [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content += [{"type": "video_url", "video_url": {"url": url}} for url in videos]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _answer(text: str, meta: dict[str, Any], seconds: float, ttft: float | None = None) -> Answer:
    """From SGLang's ``meta_info``; its log-probabilities are ``[value, token id, text]`` triples."""
    chosen = meta.pop("output_token_logprobs", None) or []
    likely = meta.pop("output_top_logprobs", None) or []
    return Answer(
        text,
        seconds,
        ttft,
        token_ids=tuple(int(token) for _, token, _ in chosen),
        logprobs=tuple(float(value) for value, _, _ in chosen),
        top=tuple({int(token): float(value) for value, token, _ in row} for row in likely),
        prompt_tokens=meta.get("prompt_tokens", 0),
        cached_tokens=meta.get("cached_tokens", 0),
        meta=meta,
    )
