"""What the GPU tests and the sanitizer run: kernels on random problems, attention against the reference in fp64.

``python tests/gpu/checks.py [--device cpu]`` runs a few small shapes once, without pytest: compute-sanitizer watches
that, and with ``TRITON_INTERPRET=1`` it runs without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import enum
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import problems
from mminference_sgl.kernels import attend, lists_triton, probe, probe_triton, reference, search, search_triton
from mminference_sgl.kernels.launch_table import NATIVE_DESCRIPTORS, Launch, device_architecture
from mminference_sgl.kernels.tiles import lists_from_map
from test_attention import random_lists, random_map

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
    """Probe, searches and lists in Triton against the portable ones; raises AssertionError with what is off.

    Both searches are given the same masses, and may differ where a candidate's mass rounds to another level.
    """
    problem = moved(setting.problem(seed), device)
    operands = replace(problem.operands, key_pool=problem.key_pool * 2)
    if setting.fp8:
        operands, _ = problems.in_fp8(operands, 0.75, 1.5)
    for group in problem.plan.groups:
        what = f"{group.modality} of request {group.request}, {setting}, seed {seed}"
        want, ours = (each.run(operands, group.keys, group.probe_rows) for each in (probe, probe_triton))
        close(ours.output, want.output, 8 * torch.finfo(setting.dtype).eps, f"output, {what}")
        bounds, eps = [(8, 17), (3, 40)], torch.finfo(setting.dtype).eps
        held = [("held", ours.held, want.held), ("near", ours.near(bounds[0]), want.near(bounds[0]))]
        view, cell = group.view, group.view.cell
        rows = want.output.square().sum(2)
        allowed = 0.01 * rows.mean(1)
        slash, causal, row_of = view.slash_tiles(20, 33), view.causal_tiles, want.row_of
        found = [
            [each.columns_and_diagonals(want.held, rows, row_of, slash, causal, allowed)]
            for each in (search_triton, search)
        ]
        given = [(want.held, view.row_tiles[row_of])]
        if cell is not None:
            held += [(f"far {i}", *both) for i, both in enumerate(zip(ours.far(bounds), want.far(bounds), strict=True))]
            far = want.far(bounds[:1])[0]
            given.append((far, cell.row_tiles[row_of]))
            for each, results in zip((search_triton, search), found, strict=True):
                tiles = cell.tiles(*bounds[0])
                results.append(each.lines(far, rows, row_of, cell, tiles, causal, allowed, min_lines=1))
        size = float(want.output.abs().max())
        for name, got, expected in held:
            close(got[0], expected[0], 8 * eps, f"mass {name}, {what}")
            # Deviations are differences of what is as large as outputs.
            error = float((got[1:] - expected[1:]).abs().nan_to_num(torch.inf).max())
            assert error <= 8 * eps * size, f"deviations {name} off by {error:.3g}, {what}"
        for got, expected, (holding, row_tiles) in zip(*found, given, strict=True):
            differing = float((got != expected).float().mean())
            assert differing <= 0.01, f"{differing:.2%} of levels differ: {what}"
            curves, right = (each.curves(holding, rows, expected, row_tiles) for each in (search_triton, search))
            assert torch.equal(curves.tiles, right.tiles), f"counts differ: {what}"
            close(curves.coverage, right.coverage, 1e-4, f"coverage, {what}")
            close(curves.error, right.error, 1e-3, f"error, {what}")
    for step, tile_pass in enumerate((problem.plan.near, problem.plan.far)):
        arguments = tile_pass, *random_map(problem, tile_pass, seed + step)
        got, expected = lists_triton.lists_from_map(*arguments), lists_from_map(*arguments)
        assert torch.equal(got.full, expected.full), f"full tiles: {setting}, seed {seed}"
        for index in range(expected.count.numel()):
            assert torch.equal(got.tiles_of(index), expected.tiles_of(index)), f"list {index}: {setting}, seed {seed}"


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
