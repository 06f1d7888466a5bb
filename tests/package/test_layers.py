"""``scripts/check_layers.py``, the part of ``make lint`` that keeps the layers: it finds what it is for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_layers.py"
GOOD = {
    "python/mminference_sgl/__init__.py": "",
    "python/mminference_sgl/plugin.py": "def create():\n    from mminference_sgl.backend import factory\n",
    "python/mminference_sgl/backend/__init__.py": "",
    "python/mminference_sgl/backend/factory.py": "import sglang\nfrom mminference_sgl.method.plan import build\n",
    "python/mminference_sgl/method/__init__.py": "",
    "python/mminference_sgl/method/plan.py": "from mminference_sgl.kernels import tiles\n",
    "python/mminference_sgl/kernels/tiles.py": "import torch\n",
    "python/mminference_sgl/kernels/attend.py": "from .tiles import TileLists\nfrom . import tiles\n",
    "benchmarks/toy/serving.py": "",
    "rust/core/src/lib.rs": "mod layout;\nmod order;",
    "rust/core/src/layout.rs": "use crate::order::Order;",
    "rust/core/src/order.rs": "// see crate::layout\n",
}


@pytest.fixture
def problems(tmp_path, monkeypatch):
    """The script's findings on a small tree with some files replaced."""
    spec = importlib.util.spec_from_file_location("check_layers", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)

    def problems(**changed: str) -> list[str]:
        for name, text in (GOOD | changed).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return list(script.problems())

    return problems


def test_a_tree_that_holds(problems):
    assert problems() == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("method/plan.py", "from mminference_sgl.backend.factory import create\n", "which stands above it"),
        ("method/plan.py", "def late():\n    import mminference_sgl.plugin\n", "which stands above it"),
        ("method/plan.py", "from sglang.srt import utils\n", "imports SGLang"),
        ("kernels/tiles.py", "import sglang\n", "imports SGLang"),
        ("kernels/tiles.py", "from .attend import attend\n", "circle: "),
        ("extra/new.py", "", "is in no layer"),
    ],
    ids=["above", "lazily-above", "sglang", "sglang-in-kernels", "circle", "unknown-part"],
)
def test_what_breaks_in_the_package(problems, file: str, text: str, found: str):
    lines = problems(**{f"python/mminference_sgl/{file}": text})
    assert any(found in line for line in lines)


def test_circles_elsewhere(problems):
    circular = {
        "benchmarks/toy/serving.py": "from benchmarks.toy import scenes\n",
        "benchmarks/toy/scenes.py": "if TYPE_CHECKING:\n    from benchmarks.toy.serving import A\n",
        "rust/core/src/order.rs": "use crate::layout::Layout;",
    }
    found = problems(**circular)
    assert len(found) == 2
    assert any("benchmarks.toy.scenes" in line for line in found)
    assert any("order" in line and "layout" in line for line in found)
