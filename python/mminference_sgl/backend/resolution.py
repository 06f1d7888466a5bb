"""Takes part in how SGLang resolves its arguments, so that a server with this backend is otherwise the stock one.

SGLang decides by the *names* of attention backends: page sizes, model defaults, draft backends, fall-backs for KV
dtypes. ``--attention-backend mminference`` therefore means: resolve everything as if it were not given, then put this
backend before the dense one that came of it, for prefill alone; ``--prefill-attention-backend mminference`` means the
same. Where :mod:`.support` says that nothing could run sparse, the names stay those of stock SGLang.

SGLang runs the hooks in the launching process; the others get what was resolved. Releases without such hooks build the
backend by its name, and what depends on names has to be given by flags.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from mminference_sgl import BACKEND_NAME

SOURCE = "mminference"
_NAMES = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")

logger = logging.getLogger(__name__)

Step = Callable[[Any], None]


@functools.cache
def register() -> None:
    """Hook into the steps that name attention backends; once in a process."""
    try:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    except ImportError:
        return
    register_resolution_hook("handle_model_specific_adjustments")(withdraw)
    register_resolution_hook("handle_attention_backend_compatibility")(enter)
    register_resolution_hook("handle_speculative_decoding")(name_draft_backend)


def asked_for(server_args: Any) -> bool:
    """Whether the user named this backend for prefill; what was typed stays in the record whatever is resolved."""
    return bool((server_args.prefill_attention_backend or server_args.attention_backend) == BACKEND_NAME)


def withdraw(server_args: Any, previous: Step) -> None:
    """Before models choose their defaults: as if this backend had not been named.

    Raises:
        UnsupportedServerError: the options promise what sparse prefill would break.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    view = resolving_view(server_args)
    named = [name for name in _NAMES if getattr(view, name) == BACKEND_NAME]
    if named:
        if asked_for(server_args):
            _deployment(server_args).check()
        else:
            logger.warning("mminference: decode is never sparse: %s=%s is left out", named[0], BACKEND_NAME)
        declare_resolution(server_args, SOURCE, **dict.fromkeys(named))
    previous(server_args)


def enter(server_args: Any, previous: Step) -> None:
    """Once the dense backends are known, with their page size and KV dtype: before that of prefill."""
    previous(server_args)
    if not asked_for(server_args):
        return
    from sglang.srt.arg_groups.overrides import attention_backends_of, declare_resolution, resolving_view

    reason = _deployment(server_args).dense_reason()
    if reason:
        logger.warning("mminference: prefill is dense: %s", reason)
        return
    prefill, decode = attention_backends_of(resolving_view(server_args))
    declare_resolution(
        server_args,
        SOURCE,
        attention_backend=prefill,
        prefill_attention_backend=BACKEND_NAME,
        decode_attention_backend=decode,
    )


def name_draft_backend(server_args: Any, previous: Step) -> None:
    """A draft model's attention is dense, and SGLang looks for it under the target's name if it has none."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    view = resolving_view(server_args)
    ours = view.prefill_attention_backend == BACKEND_NAME
    if ours and view.speculative_algorithm is not None and view.speculative_draft_attention_backend is None:
        declare_resolution(server_args, SOURCE, speculative_draft_attention_backend=view.attention_backend)
    previous(server_args)


def _deployment(server_args: Any) -> Any:
    from sglang.srt.arg_groups.overrides import attention_backends_of, model_config_of, resolving_view

    from mminference_sgl.backend.support import Deployment

    view = resolving_view(server_args)
    return Deployment.of(view, model_config_of(server_args), attention_backends_of(view)[0])
