"""Requests that reach a server's scheduler together, in an order that a test chooses."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import serving
from mminference_sgl.testing import Answer, Message, Server

_MARK = "company"


def install() -> None:
    """In a server's processes: requests of `ask_at_once` wait for one another before they are queued."""
    from sglang.srt.managers.scheduler import Scheduler

    handle = Scheduler.handle_generate_request
    waiting: dict[str, dict[int, Any]] = {}

    def together(self: Any, request: Any, **kwargs: Any) -> None:
        mark, _, place = str(request.rid).partition("/")
        if mark != _MARK:
            handle(self, request, **kwargs)
            return
        of, number, count = place.split("/")
        there = waiting.setdefault(of, {})
        there[int(number)] = request
        if len(there) == int(count):
            for _, one in sorted(waiting.pop(of).items()):
                handle(self, one)

    Scheduler.handle_generate_request = together


def ask_at_once(server: Server, messages: Sequence[Message]) -> list[Answer]:
    """Requests that a server, one that was prepared with `install`, begins in this order and in one batch if it can."""
    of, count = uuid.uuid4().hex, len(messages)
    with ThreadPoolExecutor(count) as pool:
        answers = [
            pool.submit(serving.ask, server, message, rid=f"{_MARK}/{of}/{number}/{count}")
            for number, message in enumerate(messages)
        ]
        return [answer.result() for answer in answers]
