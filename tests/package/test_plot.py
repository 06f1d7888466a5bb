"""``mminference plot``: pictures of a small planted layer, and what is in their points."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.pictures.captures import planted_captures
from mminference_sgl import cli
from mminference_sgl.backend.capture import Capture, summary
from mminference_sgl.cli import plot
from mminference_sgl.method.config import Config

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib, which is in the extra `plot`")


@pytest.fixture(scope="module")
def captured() -> Capture:
    (found,) = planted_captures("no-window", 1500, "videochat", Config(tile_queries=16, tile_keys=16))
    return found


@pytest.fixture(scope="module")
def folder(captured: Capture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    captured.save(folder / "00001-r0-l000-h000-media.safetensors")
    return folder


@pytest.mark.parametrize("kind", plot.KINDS)
@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_every_kind_is_drawn(folder: Path, tmp_path: Path, kind: str, suffix: str, head: bytes) -> None:
    out = tmp_path / f"picture.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["plot", str(folder), "-o", str(out), "--kind", kind, "--layer", "0", "--head", "0"]) == 0
    content = out.read_bytes()
    assert content.startswith(head)
    if suffix == "png":
        image = matplotlib.image.imread(out)
        assert image[..., :3].std() > 0.05, "a blank picture"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--layer", "7"], 1, "no capture of layer 7"),
        (["--head", "9"], 1, "head 9"),
        (["--rows", "text"], 1, "rows of text"),
        (["--kind", "poster"], 2, "'poster' is not one of 'map', "),
    ],
)
def test_what_is_not_there_is_named(
    folder: Path, tmp_path: Path, capsys, arguments: list[str], status: int, message: str
) -> None:
    assert cli.main(["plot", str(folder), "-o", str(tmp_path / "x.png"), *arguments]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_an_empty_folder(tmp_path: Path, capsys) -> None:
    assert cli.main(["plot", str(tmp_path), "-o", str(tmp_path / "x.png")]) == 1
    assert "no captures" in capsys.readouterr().err


def test_points_hold_the_largest_weight(captured: Capture) -> None:
    """Without pooling a map is the weights, by position and in cell order; pooled, every point is the largest in it."""
    rows, keys = len(captured.positions), captured.key.shape[0]
    weights, near, far = plot.pooled(captured, 0, "sequence", max(rows, keys))
    plain = captured.weights(0)
    assert torch.equal(torch.from_numpy(weights), plain)
    kept = captured.kept(0)
    assert torch.equal(torch.from_numpy(near), kept == 1)
    assert torch.equal(torch.from_numpy(far), kept == 2)
    small, _, _ = plot.pooled(captured, 0, "sequence", 2)
    half, middle = rows // 2, keys // 2
    corners = [
        [plain[r, c].max() for c in (slice(0, middle), slice(middle, None))]
        for r in (slice(0, half), slice(half, None))
    ]
    torch.testing.assert_close(torch.from_numpy(small), torch.tensor(corners))


def test_cell_order_gathers_a_grid_head(captured: Capture) -> None:
    """What lies on many diagonals by position lies in blocks along one in cell order: of the sixteenth of points
    around the diagonal, most of the mass."""
    share = {}
    for order in ("sequence", "cell"):
        weights, _, _ = plot.pooled(captured, 0, order, 4096)
        rows, keys = (torch.arange(size) / size for size in weights.shape)
        around = (rows[:, None] - keys).abs() < 1 / 32
        share[order] = float(torch.from_numpy(weights)[around].sum() / weights.sum())
    assert share["cell"] > 0.5
    assert share["cell"] > 2 * share["sequence"]


def test_pictures_of_the_documentation_are_small_and_used() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = "".join(page.read_text() for page in (docs.parent / "README.md", *docs.glob("*.md")))
    names = {path.name for path in (docs / "pictures").iterdir()}
    assert names == set(re.findall(r"\((?:docs/)?pictures/([\w-]+\.(?:png|svg))\)", text))
    assert max(path.stat().st_size for path in (docs / "pictures").iterdir()) < 150_000


def test_a_summary_adds_chunks_up(captured: Capture) -> None:
    (one,), (two,) = summary([captured]), summary([captured, captured])
    assert one.pattern == captured.pattern(0) != "dense"
    assert one == two
    assert 0 < one.density < 1
    assert one.error <= 0.07
