"""The fixtures of tests/server."""

from server.conftest import messages, model_path, run_of  # noqa: F401
