"""What the GPU tests and the sanitizer run: kernels on random problems, attention against the reference in fp64.

``python tests/gpu/checks.py [--device cpu]`` runs a few small shapes once, without pytest: compute-sanitizer watches
that, and with ``TRITON_INTERPRET=1`` it runs without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import enum
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import problems
from mminference_sgl.kernels import attend, probe, probe_triton, reference
from mminference_sgl.kernels.launch_table import NATIVE_DESCRIPTORS, Launch, device_architecture
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.probe_triton import Probed, Probes, Source
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from test_attention import random_lists

ODD = (
    problems.Request(1000, [problems.one_span_video(63, 9, 8, 11)], 0, 1000),
    problems.Request(1, [], 0, 1),
    problems.Request(900, [problems.timestamped_video(18, 10, 6, 10)], 307, 557),
    problems.Request(1111, [problems.one_span_video(3, 63, 1, 17)], 1000, 111),
)
"""Odd lengths, a request of one key, a chunk cut inside a timestamped frame, a long prefix."""
SMALL = (
    problems.Request(111, [problems.one_span_video(3, 6, 3, 3), problems.one_span_video(60, 5, 2, 4)], 0, 111),
    problems.Request(1, [], 0, 1),
    problems.Request(100, [problems.timestamped_video(9, 4, 3, 3)], 37, 63),
)


BOUNDARY = HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid")


@dataclass(frozen=True)
class Setting:
    """One problem: shapes, pool and launch; ``fp8`` is the pool's dtype, with scales."""

    head_dim: int
    dtype: torch.dtype
    page_size: int
    heads: tuple[int, int] = (4, 2)
    tiles: tuple[int, int] = (128, 64)
    launch: Launch | None = None
    fp8: bool = False
    requests: tuple[problems.Request, ...] = ODD

    def problem(self, seed: int) -> problems.Problem:
        """A random problem of these shapes, its pool in the query's dtype."""
        return problems.make(
            self.requests,
            tile_queries=self.tiles[0],
            tile_keys=self.tiles[1],
            head_dim=self.head_dim,
            heads=self.heads[0],
            kv_heads=self.heads[1],
            page_size=self.page_size,
            dtype=self.dtype,
            seed=seed,
        )


def moved(value: Any, device: torch.device) -> Any:
    """A copy of a tensor, or of an object or container with tensors in it, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, enum.Enum) or not type(value).__module__.startswith(("mminference_sgl", "problems")):
        return value
    if not hasattr(value, "__dict__"):
        return value
    result = copy.copy(value)
    for name, item in vars(value).items():
        # What was copied into an order there is not here.
        object.__setattr__(result, name, {} if name == "copies" else moved(item, device))
    return result


def check(setting: Setting, device: torch.device, seed: int) -> None:
    """Both passes of a random problem, and the first one's merged again with other lists, in memory that starts as NaN.

    Raises AssertionError with what is off.

    Our error against fp64 must be at most twice that of plain PyTorch in the same dtype plus a band of rounding.
    """
    problem = setting.problem(seed)
    passes = [
        (tile_pass, random_lists(problem, tile_pass, seed + step))
        for step, tile_pass in enumerate((problem.plan.near, problem.plan.far, problem.plan.near))
    ]
    meant, passes = moved((problem.operands, passes), device)
    stored = meant
    if setting.fp8:
        stored, meant = problems.in_fp8(meant, 0.75, 1.5)
    results = []
    for implementation, operands, extra in (
        (reference, problems.cast(meant, torch.float64), {}),
        (reference, meant, {}),
        (attend, stored, {"launch": setting.launch}),
    ):
        out = torch.full_like(operands.query, torch.nan)
        lse_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        lse = torch.full(out.shape[:2], torch.nan, dtype=lse_dtype, device=device)
        for index, (tile_pass, lists) in enumerate(passes):
            implementation.attend(operands, tile_pass, lists, out, lse, merge=index > 0, **extra)
        results.append((out, lse))
    compare(*results, what=f"{setting}, seed {seed}")


def compare(exact: Any, plain: Any, ours: Any, what: str) -> None:
    """Outputs and LSEs by the rule; rows that see no key must be 0 and -inf."""
    blind = torch.isneginf(exact[1])
    assert torch.equal(torch.isneginf(ours[1]), blind), f"other rows see no key: {what}"
    assert bool((ours[0][blind] == 0).all()), f"a row without keys is not 0: {what}"
    for name, index, band in (("output", 0, torch.finfo(plain[0].dtype).eps), ("LSE", 1, 4e-6)):
        want, have, got = (result[index][~blind].double() for result in (exact, plain, ours))
        assert not bool(got.isnan().any()), f"NaN in the {name}: {what}"
        allowed = 2 * float((have - want).abs().max()) + 2 * band * float(want.abs().max())
        error = float((got - want).abs().max())
        assert error <= allowed, f"{name} off by {error:.3g}, allowed {allowed:.3g}: {what}"


def check_selection(setting: Setting, device: torch.device, seed: int) -> None:
    """Probe and selection in Triton against the portable ones; raises AssertionError with what is off.

    Selection is given what the portable probe finds, and may differ where a level or a price is rounded; twice the same
    must give the same bits.
    """
    problem = moved(setting.problem(seed), device)
    operands = replace(problem.operands, key_pool=problem.key_pool * 2)
    if setting.fp8:
        operands, _ = problems.in_fp8(operands, 0.75, 1.5)
    probed = []
    for group in problem.plan.groups:
        want = probe.run(operands, group.keys, group.probe_rows)
        sources = [Source(False, 0, 0), Source(False, 8, 17)]
        if group.view.cell is not None:
            sources += [Source(True, 8, 17), Source(True, 3, 40)]
        expected = {source: held_of(want, source) for source in sources}
        ours = Probed(
            group.keys,
            group.probe_rows,
            torch.empty_like(want.output),
            torch.empty(want.output.shape[:2], device=device),
            {source: torch.full_like(held, torch.nan) for source, held in expected.items()},
        )
        probed.append((group, want, expected, ours))
    probe_triton.run(operands, Probes([ours for *_, ours in probed], operands, operands.heads, empty_on(device)))
    for group, want, expected, ours in probed:
        what = f"{group.modality} of request {group.request}, {setting}, seed {seed}"
        eps, size = torch.finfo(setting.dtype).eps, float(want.output.abs().max())
        close(ours.output, want.output, 8 * eps, f"output, {what}")
        for source, held in expected.items():
            close(ours.held[source][0], held[0], 8 * eps, f"mass {source}, {what}")
            # Deviations are differences of what is as large as outputs.
            error = float((ours.held[source][1:] - held[1:]).abs().nan_to_num(torch.inf).max())
            assert error <= 8 * eps * size, f"deviations {source} off by {error:.3g}, {what}"
    specs = [HeadSpec()] * (operands.heads // 2) + [BOUNDARY] * (operands.heads - operands.heads // 2)
    given = operands, problem.plan, specs, Config(error=0.3, text_error=0.3)
    with mock.patch.object(probe_triton, "run", exactly):
        found = [entries(prefill.select_layer(*given, "triton")[0]) for _ in range(2)]
    assert found[0] == found[1], f"another selection the second time: {setting}, seed {seed}"
    expected_entries = entries(prefill.select_layer(*given, "torch")[0])
    differing = len(found[0] ^ expected_entries) / len(expected_entries)
    assert differing <= 0.02, f"{differing:.2%} of the listed tiles differ: {setting}, seed {seed}"


def empty_on(device: torch.device) -> Callable[..., torch.Tensor]:
    """Makes room on a device."""
    return partial(torch.empty, device=device)


def held_of(probed: probe.WeightProbe, source: Source) -> torch.Tensor:
    """What tiles hold of the keys of a source, by the portable probe."""
    if source.cell:
        return probed.far(source[1:])
    return probed.held - probed.near(source[1:]) if source.reach else probed.held


def exactly(operands: Operands, probes: Probes, first: int) -> None:
    """The portable probe in place of that in Triton, for all heads at a time."""
    assert first == 0
    for probed in probes.probed:
        want = probe.run(operands, probed.keys, probed.rows)
        probed.output.copy_(want.output)
        probed.size.copy_(want.output.square().sum(2))
        for source, held in probed.held.items():
            held.copy_(held_of(want, source).flatten())


def entries(passes: prefill.Passes) -> set[tuple[int, int, int, bool]]:
    """Pass, list, key tile and whether it is full, of all that is listed."""
    found = set()
    for number, (_, lists) in enumerate(passes):
        for index, full in enumerate(lists.full.tolist()):
            found |= {(number, index, tile, at < full) for at, tile in enumerate(lists.tiles_of(index).tolist())}
    return found


def close(got: torch.Tensor, want: torch.Tensor, share: float, what: str) -> None:
    """Largest difference within a share of the largest value."""
    error, allowed = float((got - want).abs().nan_to_num(torch.inf).max()), share * float(want.abs().max())
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}: {what}"


def sanitized_settings(dtype: torch.dtype) -> list[Setting]:
    """Every body and both regions on shapes small enough for a sanitizer."""
    return [
        Setting(64, dtype, 1, tiles=(32, 16), requests=SMALL),
        Setting(80, dtype, 16, tiles=(32, 16), requests=SMALL),
        Setting(128, dtype, 64, heads=(2, 1), tiles=(64, 32), requests=SMALL),
        Setting(64, dtype, 16, tiles=(32, 16), requests=SMALL, fp8=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    options = parser.parse_args()
    # The interpreter computes bf16 wrong.
    dtype = torch.float16 if options.device.type == "cpu" else torch.bfloat16
    settings = sanitized_settings(dtype)
    if options.device.type == "cpu" or device_architecture(options.device) >= NATIVE_DESCRIPTORS:
        launch = Launch(32, 16, 2, 2, descriptors=True)
        settings.append(Setting(64, dtype, 64, tiles=(32, 16), launch=launch, requests=SMALL))
    for setting in settings:
        check(setting, options.device, seed=1)
        print("ok", setting, flush=True)
    for setting in settings[:: 3 if options.device.type != "cpu" else len(settings)]:
        check_selection(setting, options.device, seed=1)
        print("ok, selection", setting, flush=True)


if __name__ == "__main__":
    main()
