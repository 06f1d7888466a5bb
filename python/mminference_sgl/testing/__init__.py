"""Real SGLang servers for tests, demonstrations and benchmarks.

`Server` runs ``python -m sglang.launch_server`` in a process group of its own and speaks HTTP to it, as `Client` does
to a server that others started; nothing of SGLang is imported here. `prefills`, `layouts`, `fallbacks` and
`start_lines` read the backend's log lines, and `module_times` those of a server started with `timing_arguments`;
`write_mp4` and `png_url` make media from arrays.
"""

from mminference_sgl.testing.client import Answer, Client, Message, ServerError, user_message
from mminference_sgl.testing.log import (
    Fallback,
    Prefill,
    fallbacks,
    layouts,
    mean_density,
    prefills,
    start_lines,
)
from mminference_sgl.testing.media import png_url, write_mp4
from mminference_sgl.testing.modules import ModuleTimes, forward_times, module_times, timing_arguments
from mminference_sgl.testing.processes import Process
from mminference_sgl.testing.server import Server

__all__ = [
    "Answer",
    "Client",
    "Fallback",
    "Message",
    "ModuleTimes",
    "Prefill",
    "Process",
    "Server",
    "ServerError",
    "fallbacks",
    "forward_times",
    "layouts",
    "mean_density",
    "module_times",
    "png_url",
    "prefills",
    "start_lines",
    "timing_arguments",
    "user_message",
    "write_mp4",
]
