"""Imported once by the process that warm servers are forked from: all that a launcher and its children import."""

from __future__ import annotations

import gc

import sglang.launch_server
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.registry  # noqa: F401
from sglang.srt.managers.multimodal_processor import import_processors

import mminference_sgl.backend.backend
import mminference_sgl.portable.platform  # noqa: F401

import_processors("sglang.srt.multimodal.processors")
# What is here now lives as long as the servers: their collectors need not look at it.
gc.collect()
gc.freeze()
