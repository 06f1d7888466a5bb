"""The toy model's videos: what a scene holds, what is drawn, and which answers are right."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.toy import scenes

PATCHES, ROWS, COLUMNS = 9, 3, 5


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def scene(rng):
    return scenes.make_scene(rng, PATCHES, ROWS, COLUMNS)


def tile_of(frames: np.ndarray, patch: int, row: int, column: int) -> np.ndarray:
    """[2 frames, 28, 28, 3]"""
    y, x = row * scenes.TILE, column * scenes.TILE
    return frames[2 * patch : 2 * patch + 2, y : y + scenes.TILE, x : x + scenes.TILE]


def test_same_seed_same_scene():
    one, other = (scenes.make_scene(np.random.default_rng(7), PATCHES, ROWS, COLUMNS) for _ in range(2))
    assert (one.colours == other.colours).all()
    assert one.needles == other.needles


def test_size(scene):
    assert scene.colours.shape == (PATCHES, ROWS, COLUMNS)
    assert scene.tokens == PATCHES * ROWS * COLUMNS
    assert scene.frame_tokens == ROWS * COLUMNS


def test_needles_have_distinct_keys_and_places_and_a_past(scene):
    assert sorted(needle.key for needle in scene.needles) == sorted(scenes.KEYS)
    places = {(needle.patch, needle.row, needle.column) for needle in scene.needles}
    assert len(places) == len(scene.needles)
    assert all(needle.patch >= max(scenes.LOOKBACK.values()) for needle in scene.needles)


def test_questions_look_back_at_the_needles_place(scene):
    questions = {(question.task, question.key): question for question in scene.questions()}
    assert len(questions) == len(scenes.TASKS) * len(scene.needles)
    for needle in scene.needles:
        for task, back in {"find": 0, "prev": 1, "past": 4}.items():
            colour = scene.colours[needle.patch - back, needle.row, needle.column]
            assert questions[task, needle.key].answer == scenes.COLOURS[colour]
            assert questions[task, needle.key].text == f"{task} {needle.key}"


@pytest.mark.parametrize("reply", ["red", " red", "RED", " Red \n"])
def test_letter_case_and_spacing_do_not_matter(reply):
    assert scenes.Question("find", "dot", "red").is_right(reply)


@pytest.mark.parametrize("reply", ["", "green", "redred", "not red"])
def test_wrong_reply(reply):
    assert not scenes.Question("find", "dot", "red").is_right(reply)


def test_frames_without_noise_show_palette_and_textures(scene, rng):
    frames = scene.frames(rng, noise=0.0)
    assert frames.dtype == np.uint8
    assert frames.shape == (2 * PATCHES, 28 * ROWS, 28 * COLUMNS, 3)
    keys = {(needle.patch, needle.row, needle.column): needle.key for needle in scene.needles}
    for place in np.ndindex(PATCHES, ROWS, COLUMNS):
        expected = np.empty((28, 28, 3), np.uint8)
        expected[:] = scenes.PALETTE[scenes.COLOURS[scene.colours[place]]]
        if place in keys:
            expected[scenes.TEXTURES[keys[place]]] = scenes.INK
        assert (tile_of(frames, *place) == expected).all()


def test_noise_is_fresh_in_every_frame_and_of_the_asked_size(rng):
    scene = scenes.make_scene(rng, 5, 4, 4, needles=1)
    clean = scene.frames(rng, noise=0.0).astype(float)
    inside = (clean > 60) & (clean < 195)  # not clipped
    noise = scene.frames(rng, noise=12.0) - clean
    assert abs(noise[inside].std() - 12.0) < 0.3
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("change", [0.1, 0.5])
def test_tiles_keep_their_colour_until_they_change(rng, change):
    scene = scenes.make_scene(rng, 200, 8, 8, needles=1, change=change)
    differs = (scene.colours[1:] != scene.colours[:-1]).mean()
    assert differs == pytest.approx(change * 15 / 16, abs=0.02)  # one in 16 changes draws the old colour


def test_colours_are_drawn_evenly(rng):
    counts = np.bincount(scenes.make_scene(rng, 100, 10, 10, change=1.0).colours.ravel(), minlength=16)
    assert counts.min() > 0.8 * 625
    assert counts.max() < 1.2 * 625


def test_textures_differ():
    drawn = np.stack([scenes.TEXTURES[key] for key in scenes.KEYS]).reshape(len(scenes.KEYS), -1)
    overlap = (drawn[:, None] == drawn[None]).mean(-1)
    assert (overlap[~np.eye(len(drawn), dtype=bool)] < 0.8).all()


@pytest.mark.parametrize(
    ("patches", "needles", "message"),
    [(9, 0, "needles must be"), (9, 9, "needles must be"), (4, 1, "no room"), (5, 8, "no room")],
)
def test_impossible_scenes_are_refused(rng, patches, needles, message):
    with pytest.raises(ValueError, match=message):
        scenes.make_scene(rng, patches, 1, 7, needles=needles)
