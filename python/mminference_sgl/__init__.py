"""Sparse multimodal prefill attention for SGLang.

Importing this package imports neither SGLang nor Triton nor PyTorch: SGLang loads the plugin in
every one of its processes, whether or not the backend is used.
"""

from importlib.metadata import version

BACKEND_NAME = "mminference"
"""What ``--attention-backend`` takes."""

__version__ = version("mminference-sgl")

__all__ = ["BACKEND_NAME", "__version__"]
