"""Draw a video that the toy model can be asked about: ``python -m examples.toy_video clip.mp4 [TEMPORAL PATCHES]``."""

import sys

import numpy as np

from benchmarks.toy.scenes import make_scene
from benchmarks.toy.serving import CHANGE, COLUMNS, FPS, ROWS
from mminference_sgl.testing import write_mp4

rng = np.random.default_rng(0)
scene = make_scene(rng, int((sys.argv[2:] or ["128"])[0]), ROWS, COLUMNS, change=CHANGE)
write_mp4(sys.argv[1], scene.frames(rng, noise=0), FPS)
for question in scene.questions():
    print(f"{question.text}: {question.answer}")
