"""Gated DeltaNet of the CPU platform: against transformers' functions, in chunks, from cached states, and in SGLang.

Those compute in float32 alone, one of them token by token. So much as these two differ is rounding, and what is
computed here may be as far from either, with a factor for its other order of sums.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

from mminference_sgl.portable import gated_delta_net as ours

HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 32, 48
"""Keys and values of different sizes, so that a state lies as it must."""
LENGTHS = (1, 200, 63, 64, 65, 3)
FACTOR = 8.0


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class Problem:
    """Sequences of some lengths, of which all but the first go on from a state; slots are in another order."""

    def __init__(self, lengths: Sequence[int] = LENGTHS) -> None:
        tokens = sum(lengths)
        self.lengths, self.bounds = lengths, torch.tensor([0, *lengths]).cumsum(0)
        self.q, self.k = (random(1, tokens, HEADS, KEY_DIM, seed=seed) for seed in (1, 2))
        self.v = random(1, tokens, VALUE_HEADS, VALUE_DIM, seed=3)
        # Decays from none to nearly all.
        self.g = -random(1, tokens, VALUE_HEADS, seed=4).exp() * torch.logspace(-3, 0.5, VALUE_HEADS)
        self.beta = random(1, tokens, VALUE_HEADS, seed=5).sigmoid()
        self.pool = random(len(lengths) + 2, VALUE_HEADS, VALUE_DIM, KEY_DIM, seed=6)
        self.slots = torch.arange(len(lengths)).flip(0) + 1
        self.pool[self.slots[0]] = 0

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, the pool afterwards and the states before each chunk."""
        pool = self.pool.clone()
        out, nothing, states = ours.chunk_gated_delta_rule(
            *self.operands,
            initial_state=pool,
            initial_state_indices=self.slots.int(),
            cu_seqlens=self.bounds.int(),
            use_qk_l2norm_in_kernel=True,
        )
        assert nothing is None
        return out, pool, states[0]

    def expected(self, rule, number: int, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and last state, in our layout, of a sequence's first tokens."""
        start = int(self.bounds[number])
        own = slice(start, start + (self.lengths[number] if tokens is None else tokens))
        q, k, v, g, beta = (x[:, own] for x in self.operands)
        q, k = (x.repeat_interleave(VALUE_HEADS // HEADS, 2) for x in (q, k))
        state = self.pool[self.slots[number]].mT[None]
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        out, last = rule(q, k, v, g=g, beta=beta, **options)
        return out[0], last[0].mT


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def tolerance(problem: Problem) -> float:
    both = [
        [problem.expected(rule, number) for number in range(len(LENGTHS))]
        for rule in (reference.torch_chunk_gated_delta_rule, reference.torch_recurrent_gated_delta_rule)
    ]
    pairs = zip(*both, strict=True)
    return FACTOR * max(float((a - b).abs().max()) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_tolerance_is_rounding(tolerance: float) -> None:
    assert 0 < tolerance < 1e-3


@pytest.mark.parametrize("number", range(len(LENGTHS)), ids=map(str, LENGTHS))
def test_prefill_from_states(problem: Problem, tolerance: float, number: int) -> None:
    out, pool, _ = problem.run()
    expected, last = problem.expected(reference.torch_recurrent_gated_delta_rule, number)
    own = slice(*problem.bounds[number : number + 2].tolist())
    torch.testing.assert_close(out[0, own], expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(pool[problem.slots[number]], last, rtol=0, atol=tolerance)


def test_states_of_others_stay(problem: Problem) -> None:
    _, pool, _ = problem.run()
    others = [slot for slot in range(len(pool)) if slot not in problem.slots]
    assert len(others) == 2
    assert torch.equal(pool[others], problem.pool[others])


def test_states_before_chunks_are_those_the_prefix_cache_copies(problem: Problem, tolerance: float) -> None:
    """It counts ``(length - 1) // 64 + 1`` for each sequence."""
    _, _, states = problem.run()
    before = [(number, start) for number, length in enumerate(LENGTHS) for start in range(0, length, ours.CHUNK)]
    assert len(states) == len(before)
    for state, (number, start) in zip(states, before, strict=True):
        if start == 0:
            expected = problem.pool[problem.slots[number]]
        else:
            _, expected = problem.expected(reference.torch_recurrent_gated_delta_rule, number, start)
        torch.testing.assert_close(state, expected, rtol=0, atol=tolerance)


def test_rows_behind_the_last_sequence_and_padded_requests(problem: Problem) -> None:
    pool = problem.pool.clone()
    options = {"initial_state": pool, "cu_seqlens": torch.tensor([0, 100, 100])}
    out, _, states = ours.chunk_gated_delta_rule(
        *problem.operands, initial_state_indices=torch.tensor([2, -1]), inplace_update=False, **options
    )
    assert torch.equal(pool, problem.pool)
    assert out[0, :100].abs().amin(0).max() > 0
    assert not out[0, 100:].any()
    assert len(states[0]) == 2


def test_prefill_in_pieces_and_decode(problem: Problem, tolerance: float) -> None:
    """A sequence of 200 tokens in pieces that end within chunks, the last tokens one by one."""
    number, start = 1, int(problem.bounds[1])
    slot = int(problem.slots[number])
    pool, parts = problem.pool.clone(), []
    for first, last in pairwise((0, 37, 101, 165, 190)):
        own = slice(start + first, start + last)
        options = {"initial_state": pool, "initial_state_indices": torch.tensor([slot])}
        out, _, _ = ours.chunk_gated_delta_rule(
            *(x[:, own] for x in problem.operands), cu_seqlens=torch.tensor([0, last - first]), **options,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        parts.append(out[0])
    for token in range(start + 190, start + 200):
        q, k, v, g, beta = (x[0, token] for x in problem.operands)
        # From decays and rates back to what they come from.
        a, b = torch.log(torch.expm1(-g)), torch.logit(beta)
        out = torch.full((2, 1, VALUE_HEADS, VALUE_DIM), torch.nan)
        mixed = torch.cat([q.flatten(), k.flatten(), v.flatten()])
        ours.fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv=mixed.expand(2, -1),
            a=a.expand(2, -1),
            b=b.expand(2, -1),
            A_log=torch.zeros(VALUE_HEADS),
            dt_bias=torch.zeros(VALUE_HEADS),
            scale=KEY_DIM**-0.5,
            initial_state=pool,
            out=out,
            ssm_state_indices=torch.tensor([slot, -1], dtype=torch.int32),
            use_qk_l2norm_in_kernel=True,
        )
        assert not out[1].any()
        parts.append(out[0])
    expected, last = problem.expected(reference.torch_recurrent_gated_delta_rule, number)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(pool[slot], last, rtol=0, atol=tolerance)
    others = [other for other in range(len(pool)) if other != slot]
    assert torch.equal(pool[others], problem.pool[others])


def test_gating_is_the_models() -> None:
    a, b, A_log, dt_bias = random(9, 4, seed=1), random(9, 4, seed=2), random(4, seed=3), random(4, seed=4)
    a[0] = 40.0
    g, beta = ours.fused_gdn_gating(A_log, a, b, dt_bias)
    torch.testing.assert_close(g[0], -A_log.exp() * functional.softplus(a + dt_bias))
    torch.testing.assert_close(beta[0], b.sigmoid())


# -- the convolution ---------------------------------------------------------------------------------------------------

CHANNELS, WIDTH = 10, 4


def test_convolution_of_sequences_that_begin_and_go_on() -> None:
    lengths = [7, 2, 1, 30]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, weight = random(CHANNELS, sum(lengths), seed=1), random(CHANNELS, WIDTH, seed=2)
    states = random(8, CHANNELS, WIDTH - 1, seed=3)
    before = states.clone()
    slots, goes_on = [5, 0, 3, 1], [False, True, True, False]
    out = ours.causal_conv1d_fn(
        x, weight, None, states, bounds.int(), lengths, torch.tensor(slots), torch.tensor(goes_on), "silu"
    )
    for slot, known, start, end in zip(slots, goes_on, bounds.tolist(), bounds.tolist()[1:], strict=False):
        earlier = before[slot] if known else torch.zeros(CHANNELS, WIDTH - 1)
        inputs = torch.cat([earlier, x[:, start:end]], 1)
        expected = reference.causal_conv1d_fn(inputs[None], weight, None, activation="silu")[0, :, WIDTH - 1 :]
        torch.testing.assert_close(out[:, start:end], expected)
        assert torch.equal(states[slot], inputs[:, -(WIDTH - 1) :])
    assert torch.equal(states[[2, 4, 6, 7]], before[[2, 4, 6, 7]])


def test_convolution_token_by_token_is_that_of_all() -> None:
    x, weight, bias = random(CHANNELS, 12, seed=1), random(CHANNELS, WIDTH, seed=2), random(CHANNELS, seed=3)
    whole_state, state = torch.zeros(1, CHANNELS, WIDTH - 1), torch.zeros(3, CHANNELS, WIDTH - 1)
    whole = ours.causal_conv1d_fn(x, weight, bias, whole_state, torch.tensor([0, 12]), [12])
    slots = torch.tensor([2, -1], dtype=torch.int32)
    steps = [
        ours.causal_conv1d_update(token.expand(2, -1), state, weight, bias, "silu", conv_state_indices=slots)[0]
        for token in x.T
    ]
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    assert torch.equal(state[2], whole_state[0])
    assert not state[:2].any()


def test_states_of_another_dtype_round_only_what_is_kept() -> None:
    x, weight = random(CHANNELS, 9, seed=1), random(CHANNELS, WIDTH, seed=2)
    exact, kept = torch.zeros(1, CHANNELS, WIDTH - 1), torch.zeros(1, CHANNELS, WIDTH - 1, dtype=torch.bfloat16)
    wide, narrow = (
        ours.causal_conv1d_fn(x, weight, None, states, torch.tensor([0, 9]), [9]) for states in (exact, kept)
    )
    assert torch.equal(wide, narrow)
    assert torch.equal(kept, exact.bfloat16())
    step = ours.causal_conv1d_update(x[None, :, 0], kept, weight, None, "silu")
    expected = reference.causal_conv1d_fn(
        torch.cat([exact.bfloat16().float(), x[None, :, :1]], -1), weight, None, "silu"
    )
    torch.testing.assert_close(step, expected[..., -1])


def test_drafts_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="speculative"):
        ours.causal_conv1d_update(random(2, CHANNELS, 3), random(2, CHANNELS, 3), random(CHANNELS, WIDTH))


# -- around it ---------------------------------------------------------------------------------------------------------


def test_projections_come_apart() -> None:
    qkvz, ba = random(5, 2 * 2 * 3 + 2 * 4 * 7, seed=1), random(5, 8, seed=2)
    qkv, z, b, a = ours.fused_qkvzba_split_reshape_cat_contiguous(qkvz, ba, 2, 4, 3, 7)
    assert torch.equal(torch.cat([qkv, z.flatten(1)], 1), qkvz)
    assert torch.equal(torch.cat([b, a], 1), ba)
    assert z.shape == (5, 4, 7)


def test_gated_norm_is_the_models() -> None:
    x, z = random(6, 16, seed=1), random(6, 16, seed=2)
    norm = reference.Qwen3_5RMSNormGated(16, eps=1e-6)
    norm.weight.data = random(16, seed=3)
    got = ours.rms_norm_gated(x=x, weight=norm.weight.data, bias=None, z=z, eps=1e-6, is_rms_norm=True)
    torch.testing.assert_close(got, norm(x, z).detach())


def test_output_gate() -> None:
    x, gate = random(5, 8, seed=1), random(5, 2, 8, seed=2)[..., :4]
    expected = x * gate.reshape(5, 8).sigmoid()
    assert ours.fused_sigmoid_mul(x, gate) is not x
    assert torch.equal(ours.fused_sigmoid_mul(x.clone(), gate), expected)
    assert ours.fused_sigmoid_mul(x, gate, inplace=True) is x
    assert torch.equal(x, expected)


def test_gate_of_the_shared_expert() -> None:
    x, weight, shared, routed = random(5, 8, seed=1), random(8, seed=2), random(5, 8, seed=3), random(5, 8, seed=4)
    expected = shared * (x * weight).sum(-1, keepdim=True).sigmoid()
    torch.testing.assert_close(ours.fused_gate_sigmoid_mul(x, weight, shared), expected)
    total = routed.clone()
    ours.fused_gate_sigmoid_mul_add(x, weight, shared, total)
    torch.testing.assert_close(total, routed + expected)


def test_states_are_copied_for_the_prefix_cache() -> None:
    pools = [random(2, 6, 3, 4, seed=1), random(2, 6, 5, seed=2)]
    before = [pool.clone() for pool in pools]
    rows = torch.tensor([1, 2, -1, 0]), torch.tensor([True, False, True, True]), torch.tensor([4, 5, 3, 0])
    ours.track_mamba_states_all_layers(*pools, *rows, 3, check_freed_slots=True)
    for pool, was in zip(pools, before, strict=True):
        assert torch.equal(pool[:, 4], was[:, 1])
        assert torch.equal(pool[:, [0, 1, 2, 3, 5]], was[:, [0, 1, 2, 3, 5]])
    ours.track_mamba_states_if_needed(pools[0][1], pools[1][1], *rows, 2)
    assert torch.equal(pools[0][1, 4], before[0][1, 1])


# -- in SGLang ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def homes(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    """Modules in the place of SGLang's, whose own are changed once for all in this process."""
    made = {
        f"sglang.kernels.ops.{module}": SimpleNamespace(**{f.__name__: f"Triton's {f.__name__}" for f in functions})
        for module, functions in ours.REPLACED.items()
    }
    monkeypatch.setattr(ours, "importlib", SimpleNamespace(import_module=made.__getitem__))
    return made


def test_sglang_calls_what_is_here(homes: dict[str, SimpleNamespace], monkeypatch) -> None:
    """Where it is defined, and where it was imported from there before; another function of that name is another's."""
    triton = homes["sglang.kernels.ops.mamba.causal_conv1d_triton"].causal_conv1d_fn
    user = SimpleNamespace(causal_conv1d_fn=triton, rms_norm_gated="its own")
    monkeypatch.setitem(sys.modules, "sglang.user", user)
    ours.install()
    installed = [function for home in homes.values() for function in vars(home).values()]
    assert installed == [function for functions in ours.REPLACED.values() for function in functions]
    assert user == SimpleNamespace(causal_conv1d_fn=ours.causal_conv1d_fn, rms_norm_gated="its own")


def test_a_release_with_other_names_is_left_as_it_is(homes: dict[str, SimpleNamespace]) -> None:
    """Other models are served all the same."""
    *_, last = homes.values()
    vars(last).popitem()
    ours.install()
    assert all(isinstance(function, str) for home in homes.values() for function in vars(home).values())


def test_where_sglang_has_kernels_for_cpus_they_stay(homes: dict[str, SimpleNamespace], monkeypatch) -> None:
    monkeypatch.setattr("sglang.srt.utils.is_cpu", lambda: True)
    ours.install()
    assert all(isinstance(function, str) for home in homes.values() for function in vars(home).values())


def test_a_long_chunk_takes_seconds() -> None:
    """4096 tokens of a layer of Qwen3.5-9B: 24 such layers stay well below a minute on two cores."""
    q, k = (random(1, 4096, 16, 128, seed=seed) for seed in (1, 2))
    v = random(1, 4096, 32, 128, seed=3)
    g, beta = -torch.rand(1, 4096, 32), torch.rand(1, 4096, 32)
    began = time.perf_counter()
    ours.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=torch.zeros(1, 32, 128, 128))
    assert time.perf_counter() - began < 20
