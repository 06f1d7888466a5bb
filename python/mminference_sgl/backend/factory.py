"""The factory behind ``--attention-backend mminference``: a gate, then the backend before a dense one."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

from mminference_sgl import BACKEND_NAME
from mminference_sgl.backend.backend import MMInferenceAttnBackend
from mminference_sgl.backend.layers import Survey
from mminference_sgl.backend.sglang_compat import decode_backend, default_dense_backend, resolved_options
from mminference_sgl.backend.support import Deployment, UnsupportedServerError, pool_reason
from mminference_sgl.kernels import ops
from mminference_sgl.method.config import ConfigError

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def create(runner: ModelRunner) -> AttentionBackend:
    """Builds what a model runner attends with.

    Prefill is ours; decode, and what prefill does not run sparse, is the dense backend that SGLang would have chosen.
    Where nothing could run sparse it is that backend alone, and one log line says why.

    Raises:
        SystemExit: the options or the configuration cannot be used; the server stops with one line.
    """
    _setup_logging()
    try:
        return _create(runner)
    except (ConfigError, ops.ImplementationUnavailableError, UnsupportedServerError) as error:
        raise SystemExit(f"mminference: {error}") from None


def _create(runner: ModelRunner) -> AttentionBackend:
    name = _dense_backend(runner)
    deployment = Deployment.of(resolved_options(runner), runner.model_config, name)
    deployment.check()
    both = decode_backend(runner) == BACKEND_NAME
    # Dense backends, and what SGLang wraps around the backends of hybrid models, ask the runner by name who attends:
    # on Blackwell it refuses names that it does not know beside Gated DeltaNet.
    runner.prefill_attention_backend_str = name
    if both:
        runner.decode_attention_backend_str = name
    dense = ATTENTION_BACKENDS[name](runner)
    survey = Survey.of(runner.model, runner.token_to_kv_pool)
    reason = deployment.dense_reason() or pool_reason(runner.token_to_kv_pool) or _layers_reason(survey)
    if reason:
        logger.warning("mminference: prefill is dense: %s", reason)
        return dense
    backend = MMInferenceAttnBackend(runner, dense, survey)
    return HybridAttnBackend(runner, backend, dense) if both else backend


def _dense_backend(runner: ModelRunner) -> str:
    """Name of the dense backend: the one resolved beside ours, or else SGLang's default."""
    beside = getattr(resolved_options(runner), "attention_backend", None)
    return str(beside) if beside not in {None, BACKEND_NAME} else default_dense_backend(runner)


def _layers_reason(survey: Survey) -> str:
    """Why none of the attention layers that were found can run sparse."""
    if survey.sparse or not survey.dense:
        return ""
    return "no layer can run sparse: " + ", ".join(f"{reason} ({count})" for reason, count in survey.dense.items())


def _setup_logging() -> None:
    """``MMINFERENCE_LOG`` sets this package's log level, whatever SGLang's is."""
    level = os.environ.get("MMINFERENCE_LOG", "").upper()
    if level:
        package = logging.getLogger("mminference_sgl")
        try:
            package.setLevel(level)
        except ValueError as error:
            raise SystemExit(f"mminference: MMINFERENCE_LOG: {error}") from None
        for handler in logging.getLogger().handlers:
            handler.setLevel(min(handler.level, package.level))
