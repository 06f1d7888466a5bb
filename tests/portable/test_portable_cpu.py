from __future__ import annotations

import math
import os
import unittest
from types import SimpleNamespace

import pytest
import torch

from mminference_sgl.portable import cpu as portable_cpu

pytestmark = pytest.mark.skipif(
    os.environ.get("SGLANG_PLATFORM") != "portable_cpu", reason="SGLang runs on another platform in this process"
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def heads(count: int, *shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], count, shape[1], generator=generator).to(dtype)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None) -> torch.Tensor:
    """Attention of the last rows by an explicit mask, in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    rows, keys = q.shape[0], k.shape[0]
    distance = torch.arange(keys - rows, keys).unsqueeze(1) - torch.arange(keys)
    visible = (distance >= 0) & (distance <= (keys if window is None else window))
    scores = torch.einsum("rhd,khd->hrk", q, k) * scale
    return torch.einsum("hrk,khd->rhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


LENGTHS = [(0, 1), (0, 63), (0, 1000), (1, 1), (63, 1), (1, 63), (64, 111), (111, 64), (1000, 63), (509, 509)]
HEADS = [(4, 4, 16), (8, 4, 32), (8, 1, 64), (6, 2, 80)]


@pytest.mark.parametrize(("prefix", "chunk"), LENGTHS, ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_extend_attention(prefix, chunk, q_heads, kv_heads, head_dim, dtype):
    from mminference_sgl.kernels.torch_tiles import compute_dtype
    from mminference_sgl.portable.dense import extend_attention

    scale = head_dim**-0.5
    q = heads(q_heads, chunk, head_dim, dtype=dtype, seed=0)
    k = heads(kv_heads, prefix + chunk, head_dim, dtype=dtype, seed=1)
    v = heads(kv_heads, prefix + chunk, head_dim, dtype=dtype, seed=2)
    exact = masked(q.double(), k.double(), v.double(), scale)

    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        attn_mask=torch.arange(prefix + chunk) <= torch.arange(prefix, prefix + chunk).unsqueeze(1),
        scale=scale,
        enable_gqa=True,
    )
    error = (plain.squeeze(0).transpose(0, 1).double() - exact).abs().max()
    rounding = torch.finfo(dtype).eps * exact.abs().max()

    for inner in {dtype, compute_dtype(dtype, torch.device("cpu"))}:
        out = extend_attention(q.to(inner), k.to(inner), v.to(inner), scale).to(dtype)
        assert out.shape == q.shape
        assert (out.double() - exact).abs().max() <= 2 * (error + rounding)


@pytest.mark.parametrize(
    ("prefix", "chunk", "window"), [(0, 1, 7), (63, 1, 0), (300, 613, 37), (0, 1111, 2000)], ids=str
)
def test_window_attention(prefix, chunk, window):
    from mminference_sgl.portable.dense import window_attention

    q = heads(6, chunk, 32, dtype=torch.float64, seed=0)
    k, v = (heads(2, prefix + chunk, 32, dtype=torch.float64, seed=seed) for seed in (1, 2))
    expected = masked(q, k, v, 0.3, window)
    unseen = max(0, prefix - window)
    torch.testing.assert_close(window_attention(q, k, v, 0.3, window), expected)
    torch.testing.assert_close(window_attention(q, k[unseen:], v[unseen:], 0.3, window), expected)


def test_attend_log_sum_exp():
    from mminference_sgl.portable.dense import attend

    q, k = (heads(n, rows, 32, dtype=torch.float64, seed=n) for n, rows in ((6, 63), (2, 111)))
    _, lse = attend(q, k, k, 0.3, causal=False)
    scores = torch.einsum("rhd,khd->rhk", q, k.repeat_interleave(3, dim=1)) * 0.3
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def long_cases(backend: str):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.test.kits.attention_unittest.attention_methods.dense_attention import DenseAttentionCase

    lengths = {
        "prefix": ((300,), (509,)),
        "no_prefix": ((0,), (700,)),
        "batch_with_single_rows": ((417, 600, 0), (1, 300, 1)),
    }
    return [
        DenseAttentionCase(
            name=f"{name}_page_size_{page_size}",
            backend=backend,
            forward_mode=ForwardMode.EXTEND,
            num_heads=8,
            num_kv_heads=2,
            page_size=page_size,
            prefix_lens=prefixes,
            extend_lens=chunks,
        )
        for name, (prefixes, chunks) in lengths.items()
        for page_size in (1, 16)
    ]


@pytest.fixture(scope="module")
def kit():
    """SGLang's own test of attention backends, with the plugins loaded as a server loads them."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention

    return dense_attention


@pytest.mark.parametrize("context", [64, 256])
def test_sglang_kit(kit, context):
    backend = portable_cpu.DENSE_BACKEND_NAME
    cases = kit.make_dense_cases(backend)
    assert len(cases) >= 12
    cases += kit.make_swa_no_prefix_input_config_cases(backend) + kit.make_swa_prefix_input_config_cases(backend)
    for case in cases:
        kit.run_dense_attention_case(
            unittest.TestCase(), case, device="cpu", dtype=torch.float32, max_context_len=context
        )


def test_sglang_kit_long(kit):
    for case in long_cases(portable_cpu.DENSE_BACKEND_NAME):
        kit.run_dense_attention_case(unittest.TestCase(), case, device="cpu", dtype=torch.float32, max_context_len=1024)


def vision_attention(cls, *, heads: int, head_dim: int, flatten_batch: bool = True):
    return cls(head_dim=head_dim, num_heads=heads, num_kv_heads=heads, flatten_batch=flatten_batch)


@pytest.mark.parametrize(
    "lengths",
    [[64, 64, 16, 64, 64, 16, 8], [111], [0, 63, 0, 1], [100] * 5],
    ids=["windows", "one", "with_empty", "frames"],
)
def test_vision_attention(lengths):
    from sglang.srt.layers.attention.vision import VisionSdpaAttention

    from mminference_sgl.portable.vision import SegmentedVisionAttention

    q, k, v = (heads(3, sum(lengths), 20, dtype=torch.float32, seed=seed) for seed in range(3))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    expected, got = (
        vision_attention(cls, heads=3, head_dim=20).forward(q, k, v, 1, cu_seqlens=bounds)
        for cls in (VisionSdpaAttention, SegmentedVisionAttention)
    )
    torch.testing.assert_close(got, expected)


def test_vision_attention_needs_no_mask(monkeypatch):
    from mminference_sgl.portable.vision import SegmentedVisionAttention

    monkeypatch.setattr(SegmentedVisionAttention, "_generate_mask_cache", None)
    patches = torch.zeros(65536, 1, 16)
    bounds = torch.arange(0, 65537, 512)
    out = vision_attention(SegmentedVisionAttention, heads=1, head_dim=16).forward(
        patches, patches, patches, 1, cu_seqlens=bounds
    )
    assert out.shape == patches.shape


def test_vision_attention_leaves_padded_batches_to_sglang():
    from sglang.srt.layers.attention.vision import VisionSdpaAttention

    from mminference_sgl.portable.vision import SegmentedVisionAttention

    q = heads(2, 96, 16, dtype=torch.float32, seed=0)
    bounds = torch.tensor([0, 48, 80])
    expected, got = (
        vision_attention(cls, heads=2, head_dim=16, flatten_batch=False).forward(q, q, q, 2, cu_seqlens=bounds)
        for cls in (VisionSdpaAttention, SegmentedVisionAttention)
    )
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_platform():
    from sglang.srt.layers.attention import attention_registry, vision
    from sglang.srt.platforms import current_platform

    assert type(current_platform).__name__ == "PortableCpuPlatform"
    assert current_platform.is_out_of_tree()
    assert current_platform.get_default_attention_backend() == "portable_dense"
    assert current_platform.get_device() == "cpu"

    frames = torch.zeros(3)
    assert frames.pin_memory() is frames

    current_platform.init_backend()
    assert "portable_dense" in attention_registry.ATTENTION_BACKENDS
    assert vision.QKV_BACKEND_IMPL["sdpa"].__name__ == "SegmentedVisionAttention"


@pytest.mark.parametrize("value", [None, "", "cuda"])
def test_activate_only_when_asked(monkeypatch, value):
    assert portable_cpu.activate() == "mminference_sgl.portable.platform.PortableCpuPlatform"
    if value is None:
        monkeypatch.delenv("SGLANG_PLATFORM")
    else:
        monkeypatch.setenv("SGLANG_PLATFORM", value)
    assert portable_cpu.activate() is None


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_threads_wait_briefly_unless_told_otherwise(given):
    environment = dict(given)
    portable_cpu.wait_briefly(environment)
    assert environment == (given or {"GOMP_SPINCOUNT": str(portable_cpu.SPIN_COUNT)})


def platform():
    from sglang.srt.platforms import current_platform

    return current_platform


def test_activate_with_an_older_sglang(monkeypatch):
    from sglang.srt.platforms import interface

    monkeypatch.delattr(interface, "PlatformCapabilities")
    with pytest.raises(RuntimeError, match=r"needs SGLang 0\.5\.22 or newer"):
        portable_cpu.activate()


def server_args(**given):
    """Arguments as the platform sees them: SGLang has filled in its own CPU backend."""
    defaults = {
        "attention_backend": "intel_amx",
        "mem_fraction_static": None,
        "max_total_tokens": None,
        "max_running_requests": None,
        "max_mamba_cache_size": None,
        "watchdog_timeout": 300.0,
        "dtype": "float32",
        "quantization": None,
    }
    return SimpleNamespace(**(defaults | given), _raw_input={"attention_backend": None} | given)


def test_defaults():
    args = server_args()
    platform().apply_server_args_defaults(args)
    assert args.attention_backend == "portable_dense"
    assert (args.mem_fraction_static, args.max_total_tokens, args.max_running_requests) == (0.5, 262144, 32)
    assert args.max_mamba_cache_size == 128
    assert args.watchdog_timeout == 3600.0


def test_defaults_of_sglang_on_arm():
    args = server_args()
    args.attention_backend = "torch_native"
    platform().apply_server_args_defaults(args)
    assert args.attention_backend == "portable_dense"


@pytest.mark.parametrize(
    "given",
    [
        {"attention_backend": "torch_native"},
        {"attention_backend": "mminference"},
        {"max_total_tokens": 1000},
        {"max_running_requests": 3},
        {"max_mamba_cache_size": 9},
        {"watchdog_timeout": 7.0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_defaults_leave_what_was_given(given):
    args = server_args(**given)
    platform().apply_server_args_defaults(args)
    assert {name: getattr(args, name) for name in given} == given


def test_defaults_with_given_memory_fraction():
    args = server_args(mem_fraction_static=0.2)
    platform().apply_server_args_defaults(args)
    assert (args.mem_fraction_static, args.max_total_tokens, args.max_mamba_cache_size) == (0.2, None, None)
