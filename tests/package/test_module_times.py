"""The time of modules by kind, put behind a model by SGLang's own means."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch

from mminference_sgl.testing.modules import ModuleTimes, module_times, timing_arguments


class Sleeps(torch.nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


class RadixAttention(Sleeps):
    pass


class LinearBase(Sleeps):
    pass


class RowParallelLinear(LinearBase):
    pass


class LogitsProcessor(Sleeps):
    pass


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([RowParallelLinear(0.005)])})
        layer = {"attn": RadixAttention(0.02), "norm": Sleeps(0.005), "o_proj": RowParallelLinear(0.01)}
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict(layer)])})
        self.logits_processor = LogitsProcessor(0.005)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (*self.visual["blocks"], *self.model["layers"][0].values(), self.logits_processor):
            x = part(x)
        return x


def test_times_by_kind_of_each_forward(caplog: pytest.LogCaptureFixture) -> None:
    from sglang.srt.model_executor.hook_manager import register_forward_hooks

    model = Model()
    flag, hooks = timing_arguments()
    assert flag == "--forward-hooks"
    register_forward_hooks(model, json.loads(hooks))
    with caplog.at_level(logging.INFO, "mminference_sgl"):
        model(torch.zeros(1))
        first = module_times("\n".join(caplog.messages))
        assert first == ModuleTimes(0.0, 0.0)
        model(torch.zeros(1))
        model(torch.zeros(1))
    lines = [message for message in caplog.messages if "mminference modules" in message]
    assert len(lines) == 3
    second = module_times(lines[1])
    assert second.attention >= 0.02
    assert 0.01 <= second.linear < second.attention
    both = module_times("\n".join(lines))
    assert both.attention == pytest.approx(second.attention + module_times(lines[2]).attention)
