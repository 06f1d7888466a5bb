"""What a server settles at its start, alike on all tensor-parallel ranks: settings, implementation, crossover."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mminference_sgl.backend import crossover, selfcheck
from mminference_sgl.backend.sglang_compat import chunk_tokens, first_rank_decides, of_all_ranks
from mminference_sgl.kernels import ops
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import MODALITIES, Model, PatternFile, load
from mminference_sgl.method.config import Config, ConfigError, environment_sources, from_sources, server_source

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner

    from mminference_sgl.backend.layers import Survey

logger = logging.getLogger(__name__)

_SMALLEST_QUERY_TILE = {"cpu": 16}
"""Rows below which a device's matrix unit is not filled; 64 where nothing else is known."""


@dataclass(frozen=True)
class Start:
    """Settings fixed for a server's life.

    ``implementation``: a resolved name. ``modalities``: those whose rows may run sparse by the pattern.
    ``min_tokens``: keys below which a request runs dense; ``dense_above``: density of a layer above which it does.
    ``chunk_tokens``: of a prefill chunk, 0 without chunks.
    ``sharing``: numbers of heads that may share lists.
    """

    config: Config
    pattern: PatternFile
    implementation: str
    modalities: frozenset[str]
    min_tokens: int
    dense_above: float
    chunk_tokens: int
    sharing: tuple[int, ...]

    @classmethod
    def of(cls, runner: ModelRunner, survey: Survey) -> Start:
        """Reads the configuration, tries the implementation, and measures from how many tokens on sparse prefill pays.

        Raises:
            ConfigError: settings cannot be used, or differ between ranks.
            ops.ImplementationUnavailableError: one was named, and it cannot run or computes wrong on some rank.
        """
        device = torch.device(runner.device)
        load_own, try_own = partial(_load, runner, device), partial(_try, runner, device, survey)
        config, pattern, implementation = _agreed(load_own, try_own)
        modalities = _sparse_modalities(pattern, runner)
        sharing: tuple[int, ...] = ()
        if survey.example is not None:
            group = survey.example.tp_q_head_num // survey.example.tp_k_head_num
            sharing = prefill.sharing(config, group)
        tokens, density = config.min_tokens, config.dense_above
        start = cls(
            config,
            pattern,
            implementation,
            modalities,
            min_tokens=tokens or 0,
            dense_above=1.0 if density is None else density,
            chunk_tokens=chunk_tokens(runner),
            sharing=sharing,
        )
        if tokens is None and config.active and modalities and survey.example is not None:
            found = _crossover(start, runner, survey)
            start = dataclasses.replace(
                start, min_tokens=found.tokens, dense_above=found.density if density is None else density
            )
        return start


def load_config(hf_config: object, served: Model | None = None) -> tuple[Config, PatternFile]:
    """Settings of this server and the pattern they name, which is for the served model.

    Raises:
        ConfigError: a setting or the pattern file cannot be used.
    """
    stronger = [server_source(hf_config), *environment_sources()]
    named = from_sources(*stronger)
    # `off` never enters the sparse path, so it needs no rules of its own.
    pattern = load("dense" if named.pattern == "off" else named.pattern, named.pattern_folder, served)
    pattern.check(served or Model())
    return from_sources((f"pattern {pattern.id!r}", pattern.config), *stronger), pattern


def served_model(model: ModelConfig) -> Model:
    """What a pattern file may say of the model that is served."""
    text = model.hf_text_config
    kv_heads = getattr(model, "get_total_num_kv_heads", None)
    return Model(
        id=getattr(model, "model_path", None),
        architecture=next(iter(getattr(model.hf_config, "architectures", None) or ()), None),
        layers=getattr(text, "num_hidden_layers", None),
        heads=int(text.num_attention_heads),
        kv_heads=kv_heads and kv_heads(),
        head_dim=getattr(model, "head_dim", None),
    )


_Settings = tuple[Config, PatternFile, str]


def _agreed(load_own: Callable[[], _Settings], try_own: Callable[[Config, str], str]) -> _Settings:
    """Settings and implementation of all ranks, which act on nothing before they know of one another.

    A rank that went dense or stopped by itself would leave the others waiting in their next collective.
    """
    settings: _Settings | None = None
    state, problem = "ok", ""
    try:
        settings = load_own()
        if settings[0].active:
            state = try_own(settings[0], settings[2])
    except (ConfigError, ops.ImplementationUnavailableError) as error:
        problem = str(error)
    ranks = of_all_ranks((settings, state, problem))
    _refuse([problem for _, _, problem in ranks], ConfigError)
    if settings is None:
        raise ConfigError(problem)
    for rank, (other, _, _) in enumerate(ranks):
        if other != settings:
            raise ConfigError(
                f"settings differ between tensor-parallel ranks: rank {rank} has {other}, this one {settings}; set "
                "MMINFERENCE_* alike on all nodes"
            )
    config, pattern, implementation = settings
    states = [state if state == "ok" else f"implementation {implementation!r} {state}" for _, state, _ in ranks]
    if config.implementation != "auto":
        _refuse(["" if said == "ok" else said for said in states], ops.ImplementationUnavailableError)
    elif set(states) != {"ok"}:
        said = _by_rank(["" if said == "ok" else said for said in states])
        logger.warning("mminference: prefill is dense: %s", said)
        config = dataclasses.replace(config, enabled=False)
    return config, pattern, implementation


def _refuse(problems: Sequence[str], kind: type[Exception]) -> None:
    if any(problems):
        raise kind(_by_rank(problems))


def _by_rank(problems: Sequence[str]) -> str:
    """One line: what all ranks say, or which says what."""
    if len(set(problems)) == 1:
        return problems[0]
    return "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)


def _load(runner: ModelRunner, device: torch.device) -> _Settings:
    config, pattern = load_config(runner.model_config.hf_config, served_model(runner.model_config))
    config = config.for_chunks(chunk_tokens(runner), _SMALLEST_QUERY_TILE.get(device.type, 64))
    implementation = ops.resolve(config.implementation, device)
    # Resolves every head once, so that a pattern that cannot be run stops the server and not a request.
    _sparse_modalities(pattern, runner)
    return config, pattern, implementation


def _try(runner: ModelRunner, device: torch.device, survey: Survey, config: Config, implementation: str) -> str:
    """`ok`, or what is wrong with an implementation where it was compiled for this very machine.

    What it compiles for the model's shape is then there for requests.
    """
    if device.type != "cuda" and implementation not in selfcheck.ISOLATED:
        return "ok"
    layer = survey.example
    if layer is None:
        return selfcheck.check(implementation, device)
    shape = layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim
    dtypes = runner.model_config.dtype, runner.kv_cache_dtype
    return selfcheck.check(
        implementation, device, selfcheck.Served(*shape, *dtypes, config.tile_queries, config.tile_keys)
    )


def _sparse_modalities(pattern: PatternFile, runner: ModelRunner) -> frozenset[str]:
    """Modalities whose rows some head of some layer does not run densely.

    Raises:
        ConfigError: the pattern's rules combine to something that cannot be run.
    """
    config = runner.model_config.hf_text_config
    layers = int(getattr(config, "num_hidden_layers", 1))
    specs = [pattern.specs(layer, range(int(config.num_attention_heads))) for layer in range(layers)]
    return frozenset(
        modality
        for modality in MODALITIES
        if any(spec.of(modality) != ("dense", "dense") for layer_specs in specs for spec in layer_specs)
    )


def _crossover(start: Start, runner: ModelRunner, survey: Survey) -> crossover.Crossover:
    """What this machine was measured to gain from."""
    layer = survey.example
    assert layer is not None
    shape = crossover.Shape(
        heads=layer.tp_q_head_num,
        kv_heads=layer.tp_k_head_num,
        head_dim=layer.qk_head_dim,
        dtype=runner.model_config.dtype,
        device=torch.device(runner.device),
        chunk_tokens=start.chunk_tokens,
        implementation=start.implementation,
        config=start.config,
        sparse_layers=len(survey.sparse),
    )
    return first_rank_decides(lambda: crossover.of(shape))
