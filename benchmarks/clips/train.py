"""``python -m benchmarks.clips.train``: the checkpoint from nothing, on a CPU.

First the vision tower learns to name colours and textures, then it is frozen, and the language model learns from a bank
of its embeddings: no pixels in the loop. What makes it learn within minutes, besides how it starts
(:mod:`benchmarks.clips.model`):

- Many questions behind one prompt: the prompt is causal, every question sees it and itself only.
- The answer is asked for at every position from the key on, not at the last one only.
- Visual tokens have to tell their neighbours' colours and their sign themselves; those heads are thrown away.
- At first questions may not read clips in the first layer, so that finding forms behind what visual tokens look up.
- Short prompts first. Positions jump, within clips and behind them, so that long prompts are not new.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.clips import model as shape
from benchmarks.clips.prompts import MOST_NEEDLES, OFFSETS, SIGNS, TASKS, Form, Prompt
from benchmarks.real.model import rotate
from benchmarks.real.weights import cache
from benchmarks.toy.scenes import COLOURS, INK, KEYS, NOISE, PALETTE, TEXTURES, TILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerFast

    from benchmarks.toy.scenes import Question

CHECKPOINT = cache() / "clips"
STEPS, SEED = 1450, 7
VISION_STEPS, VISION_BATCH = 500, 192
VARIANTS = 48
"""Embeddings of each tile in the bank."""
QUESTIONS = 12
"""Behind one prompt."""
LEARNING_RATE, WARM_UP = 1e-3, 80
LOOKED_UP = tuple(task for task, offset in OFFSETS.items() if any(offset))
"""What visual tokens tell of their neighbours, in the order of the auxiliary heads."""
IGNORED = -100
CHANGES = (0.3, 0.5, 0.8)
"""So often that an earlier colour cannot be guessed from the one that is there."""


@dataclass(frozen=True)
class Stage:
    """A part of training.

    ``share`` of the steps; ``parts``: the most clips; ``tokens``: the most visual tokens of a prompt; ``batch``: of a
    step. ``patches``: the most of a clip; ``grids``: rows and columns. ``gap``: the farthest jump of positions.
    ``banned``: how often questions may not read clips in the first layer.
    """

    share: float
    parts: int
    tokens: int
    batch: int
    patches: int
    grids: tuple[tuple[int, int], ...]
    gap: int
    banned: float


STAGES = (
    Stage(0.26, 1, 256, 1536, 32, ((2, 4), (4, 4)), 24, 1.0),
    Stage(0.20, 3, 512, 1792, 40, ((2, 4), (4, 4), (4, 8), (6, 6)), 80, 0.6),
    Stage(0.27, 3, 1100, 1800, 40, ((4, 8), (6, 6), (8, 8)), 300, 0.0),
    Stage(0.27, 3, 2100, 2100, 40, ((4, 8), (6, 8), (8, 8), (8, 12), (8, 16), (12, 12), (16, 16)), 640, 0.0),
)
REPLAY = 0.12
"""How often a step is of an earlier stage."""


@dataclass(frozen=True)
class Batch:
    """Prompts of one form.

    ``tokens`` int64 [B, N], -1 where a visual token stands; ``visual`` int64 [B, N, 2]: texture and colour there.
    ``positions`` [3, N + questions], ``suffixes`` int64 [B, Q, L]: questions with their answers; ``tasks`` [B, Q].
    ``neighbours`` int64 [B, tasks looked up and sign, N]: what visual tokens have to tell, or :data:`IGNORED`.
    """

    tokens: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    suffixes: torch.Tensor
    tasks: torch.Tensor
    neighbours: torch.Tensor


class Lessons:
    """Draws batches."""

    def __init__(self, tokens: PreTrainedTokenizerFast, seed: int) -> None:
        self._tokens, self.rng = tokens, np.random.default_rng(seed)

    def draw(self, stage: Stage) -> Batch:
        """A batch of a stage's prompts, all of one form."""
        rng = self.rng
        form = _form(rng, stage)
        count = max(1, stage.batch // (sum(math.prod(each) for each in form.shapes) + 60))
        change = float(rng.choice(CHANGES))
        return self.batch([form.draw(rng, change) for _ in range(count)], stage.gap)

    def batch(self, prompts: Sequence[Prompt], gap: int | None, questions: int = QUESTIONS) -> Batch:
        """Prompts of one form; ``gap`` None counts positions as SGLang does, without jumps."""
        rows = [self._prompt(prompt) for prompt in prompts]
        positions, start, times = self._positions(prompts[0], gap)
        asked = [self._questions(prompt, questions, times) for prompt in prompts]
        length = len(asked[0][0][0])
        behind = torch.arange(length) + start
        width = len(asked[0][0])
        return Batch(
            torch.stack([tokens for tokens, _ in rows]),
            torch.stack([visual for _, visual in rows]),
            torch.cat([positions, behind.repeat(width).expand(3, -1)], 1),
            torch.tensor([suffixes for suffixes, _ in asked]),
            torch.tensor([tasks for _, tasks in asked]),
            torch.stack(
                [_neighbours(prompt, tokens, times) for prompt, (tokens, _) in zip(prompts, rows, strict=True)]
            ),
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokens.encode(text))

    def _prompt(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, visual = self._encode("<|im_start|>user\n"), []
        visual += [[0, 0]] * len(tokens)
        for part in prompt.parts:
            texture = np.zeros(part.scene.colours.shape, np.int64)
            for needle in part.scene.needles:
                texture[needle.patch, needle.row, needle.column] = 1 + KEYS.index(needle.key)
            before = self._encode(part.sign + "<|vision_start|>")
            after = self._encode("<|vision_end|>" + part.after)
            tokens += [*before, *[-1] * part.scene.tokens, *after]
            visual += [[0, 0]] * len(before)
            visual += np.stack([texture.ravel(), part.scene.colours.ravel()], 1).tolist()
            visual += [[0, 0]] * len(after)
        return torch.tensor(tokens), torch.tensor(visual)

    def _positions(self, prompt: Prompt, gap: int | None) -> tuple[torch.Tensor, int, list[torch.Tensor]]:
        """Of the prompt, int64 [3, N]; where questions start; and the temporal positions of each part's patches."""
        rng, of_parts = self.rng, []
        parts = [torch.arange(len(self._encode("<|im_start|>user\n"))).expand(3, -1)]
        start = parts[0].shape[1]

        def text(words: str) -> None:
            nonlocal start
            length = len(self._encode(words))
            parts.append((torch.arange(length) + start).expand(3, -1))
            start += length

        for part in prompt.parts:
            text(part.sign + "<|vision_start|>")
            patches, rows, columns = part.scene.colours.shape
            times = torch.arange(patches)
            if gap is not None and patches >= 10 and rng.random() < 0.35:
                times[int(rng.integers(5, patches)) :] += int(rng.integers(1, gap // 2 + 1))
            of_parts.append(times)
            grid = torch.stack(torch.meshgrid(times, torch.arange(rows), torch.arange(columns), indexing="ij"))
            parts.append(grid.reshape(3, -1) + start)
            least, convention = max(rows, columns), int(parts[-1].max()) + 1
            jumps = gap is not None and rng.random() < 0.45
            start = start + int(rng.integers(least, max(gap or 0, least) + 1)) if jumps else convention
            text("<|vision_end|>" + part.after)
        return torch.cat(parts, 1), start, of_parts

    def _questions(
        self, prompt: Prompt, count: int, times: Sequence[torch.Tensor]
    ) -> tuple[list[list[int]], list[int]]:
        patches = {
            needle.key: (needle.patch, of_part)
            for part, of_part in zip(prompt.parts, times, strict=True)
            for needle in part.scene.needles
        }
        found = [each for each in prompt.questions() if not _jumps(each, patches)]
        # Each task as often as the others, however many needles there are.
        weights = 1 / np.array([sum(other.task == each.task for other in found) for each in found])
        chosen = self.rng.choice(len(found), count, p=weights / weights.sum(), replace=len(found) < count)
        asked = [found[index] for index in chosen]
        end = "<|im_end|>\n<|im_start|>assistant\n"
        suffixes = [self._encode(question.text + end + question.answer) for question in asked]
        return suffixes, [TASKS.index(question.task) for question in asked]


def _form(rng: np.random.Generator, stage: Stage) -> Form:
    """A form within a stage's bounds."""
    parts = min(int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])), stage.parts)
    while True:
        shapes = []
        for _ in range(parts):
            patches = 1 if rng.random() < 0.12 else int(rng.integers(2, stage.patches + 1))
            shapes.append((patches, *map(int, stage.grids[int(rng.integers(len(stage.grids)))])))
        if sum(map(math.prod, shapes)) <= stage.tokens:
            break
    sizes = np.array([math.prod(each) for each in shapes], float)
    needles = rng.multinomial(int(rng.integers(1, MOST_NEEDLES + 1)), (share := sizes / sizes.sum()))
    needles = np.minimum(needles, sizes.astype(int) // 2)
    if not needles.sum():
        needles[int(share.argmax())] = 1
    memos = rng.multinomial(int(rng.integers(0, 5)), [1 / parts] * parts)
    return Form(tuple(shapes), tuple(needles.tolist()), tuple(memos.tolist()))


def _jumps(question: Question, patches: Mapping[str, tuple[int, torch.Tensor]]) -> bool:
    """Whether positions jump between a question's needle and what is asked."""
    back = OFFSETS[question.task][0] if question.task in OFFSETS else 0
    if not back:
        return False
    patch, times = patches[question.key]
    return int(times[patch] - times[patch - back]) != back


def _neighbours(prompt: Prompt, tokens: torch.Tensor, times: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = torch.full((len(LOOKED_UP) + 1, len(tokens)), IGNORED)
    filled = 0
    for part, of_part in zip(prompt.parts, times, strict=True):
        colours = torch.from_numpy(part.scene.colours)
        found = torch.full((len(LOOKED_UP) + 1, *colours.shape), IGNORED)
        for index, task in enumerate(LOOKED_UP):
            t, y, x = OFFSETS[task]
            patches, height, width = colours.shape
            if patches > t and height > y and width > x:
                found[index, t:, y:, x:] = colours[: patches - t, : height - y, : width - x]
                found[index, t:][of_part[t:] - of_part[: patches - t] != t] = IGNORED
        found[-1] = SIGNS.index(part.sign)
        places = (tokens == -1).nonzero()[filled : filled + colours.numel(), 0]
        rows[:, places] = found.flatten(1)
        filled += colours.numel()
    return rows


# --- the model, in the few operations that it is made of -----------------------------------------------------------


class Forward:
    """The language model over a batch: prompts causal, each question sees its prompt and itself."""

    def __init__(self, model: Any, bank: torch.Tensor, rng: np.random.Generator) -> None:
        self._language, self._head, self._bank, self._rng = model.model.language_model, model.lm_head, bank, rng
        self._frequencies, self._axes = shape.frequencies(), shape.axes()

    def __call__(self, batch: Batch, *, banned: bool = False) -> torch.Tensor:
        """Hidden states [B, N + Q L, hidden]; ``banned``: questions do not read clips in the first layer."""
        language, (count, length) = self._language, batch.tokens.shape
        seen = batch.tokens == -1
        variant = torch.from_numpy(self._rng.integers(self._bank.shape[2], size=(count, length)))
        embedded = language.embed_tokens(batch.tokens.clamp(min=0))
        visual = self._bank[batch.visual[..., 0], batch.visual[..., 1], variant]
        prompt = torch.where(seen[..., None], visual, embedded)
        hidden = torch.cat([prompt, language.embed_tokens(batch.suffixes.flatten(1))], 1)
        angle = batch.positions[self._axes].T.float() * self._frequencies
        rotation = angle.repeat(1, 2).cos(), angle.repeat(1, 2).sin()
        mask = _question_mask(length, *batch.suffixes.shape[1:])
        blind = mask.clone()
        blind[:, :length] &= ~seen[0]
        for index, layer in enumerate(language.layers):
            hidden = self._layer(layer, hidden, rotation, length, blind if banned and index == 0 else mask)
        return language.norm(hidden)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self._language.config.eos_token_id)

    def answers(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits at every position of the questions: [B, Q, L, vocabulary]."""
        count, questions, length = batch.suffixes.shape
        return self._head(hidden[:, -questions * length :].view(count, questions, length, -1))  # type: ignore[no-any-return]

    def _layer(
        self, layer: Any, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], length: int, mask: Any
    ) -> torch.Tensor:
        attention, count, rows = layer.self_attn, *hidden.shape[:2]
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(count, rows, -1, shape.HEAD_DIM).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (rotate(each, *rotation) for each in (query, key))
        group = shape.HEADS // shape.KV_HEADS
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        causal = functional.scaled_dot_product_attention(
            query[:, :, :length], key[:, :, :length], value[:, :, :length], is_causal=True
        )
        asked = functional.scaled_dot_product_attention(query[:, :, length:], key, value, attn_mask=mask)
        out = torch.cat([causal, asked], 2).transpose(1, 2).reshape(count, rows, -1)
        hidden = hidden + attention.o_proj(out)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


def _question_mask(length: int, questions: int, words: int) -> torch.Tensor:
    own = torch.block_diag(*[torch.ones(words, words).tril()] * questions).bool()
    return torch.cat([torch.ones(questions * words, length, dtype=torch.bool), own], 1)


# --- training ------------------------------------------------------------------------------------------------------


def see(model: Any, seed: int) -> torch.Tensor:
    """Trains the vision tower; returns embeddings of tiles, fp32 [textures, colours, variants, hidden]."""
    tower = model.model.visual
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(shape.HIDDEN, len(COLOURS) + len(KEYS) + 1)
    learned = [parameter for name, parameter in tower.named_parameters() if "attn" not in name]
    optimizer = torch.optim.AdamW([*learned, *head.parameters()], lr=2e-3, weight_decay=1e-4)
    for step in range(VISION_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / VISION_STEPS))
        texture, colour = (torch.randint(n, (VISION_BATCH,), generator=generator) for n in (len(KEYS) + 1, 16))
        noise = NOISE + 18 * float(torch.rand(1, generator=generator))
        embedded = _embed(tower, _tiles(texture, colour, generator, noise)) / 0.5
        logits = head(embedded)
        loss = functional.cross_entropy(logits[:, : len(COLOURS)], colour)
        loss = loss + functional.cross_entropy(logits[:, len(COLOURS) :], texture)
        optimizer.zero_grad()
        (loss + 0.02 * (embedded.pow(2).mean() - 1).abs()).backward()
        optimizer.step()
    print(f"vision: loss {float(loss.detach()):.4f}", flush=True)
    with torch.no_grad():
        bank = torch.stack(
            [
                torch.stack([_embed(tower, _tiles(t.expand(VARIANTS), c.expand(VARIANTS), generator, NOISE)) for c in
                             torch.arange(len(COLOURS))])
                for t in torch.arange(len(KEYS) + 1)
            ]
        )  # fmt: skip
        factor = shape.EMBEDDING_STD / float(bank.std())
        for parameter in (tower.merger.mlp[2].weight, tower.merger.mlp[2].bias):
            parameter.mul_(factor)
    tower.requires_grad_(False)
    return bank * factor


def _embed(tower: Any, tiles: torch.Tensor) -> torch.Tensor:
    """The tower without its attention, which writes nothing."""
    hidden = tower.patch_embed(shape.patches(tiles))
    block = tower.blocks[0]
    return tower.merger(hidden + block.mlp(block.norm2(hidden)))  # type: ignore[no-any-return]


def _tiles(texture: torch.Tensor, colour: torch.Tensor, generator: torch.Generator, noise: float) -> torch.Tensor:
    """Noisy tiles, as after video compression: blurred, of other brightness and hue. fp32 [n, 2, 3, 28, 28]."""
    inked = torch.from_numpy(np.stack([np.zeros((TILE, TILE), bool), *(TEXTURES[key] for key in KEYS)]))
    palette = torch.tensor([PALETTE[name] for name in COLOURS]).float()
    plain = palette[colour][..., None, None].expand(-1, -1, TILE, TILE)
    picture = torch.where(inked[texture][:, None], torch.tensor(float(INK)), plain)
    n = len(picture)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    picture = picture.lerp(blurred, torch.rand((n, 1, 1, 1), generator=generator))
    picture = picture * (1 + 0.08 * normal(n, 1, 1, 1)) + 6 * normal(n, 3, 1, 1)
    return (picture[:, None] + noise * normal(n, 2, 3, TILE, TILE)).clamp(0, 255).round()


def loss_of(forward: Forward, told: nn.Module, batch: Batch, *, banned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and which answers are right: bool [B, Q]."""
    hidden = forward(batch, banned=banned)
    logits = forward.answers(hidden, batch)
    answers = batch.suffixes[..., -1]
    # From the key on, which is the second token; the position before the answer counts once more.
    vocabulary = logits.shape[-1]
    early = functional.cross_entropy(
        logits[:, :, 1:-2].reshape(-1, vocabulary), answers[..., None].expand(-1, -1, logits.shape[2] - 3).reshape(-1)
    )
    last = functional.cross_entropy(logits[:, :, -2].reshape(-1, vocabulary), answers.reshape(-1))
    end = functional.cross_entropy(
        logits[:, :, -1].reshape(-1, vocabulary), torch.full((answers.numel(),), forward.end)
    )
    length = batch.tokens.shape[1]
    named = told(hidden[:, :length]).unflatten(-1, (len(LOOKED_UP) + 1, len(COLOURS)))
    losses = [
        functional.cross_entropy(named[:, :, index].reshape(-1, len(COLOURS)), labels.reshape(-1), ignore_index=IGNORED)
        for index, labels in enumerate(batch.neighbours.unbind(1))
        if (labels != IGNORED).any()
    ]
    right = logits[:, :, -2].argmax(-1) == answers
    return last + 0.7 * early + 0.1 * end + 0.4 * sum(losses), right


def hold_slash_heads(model: Any) -> None:
    """Keeps the slash heads where they start.

    The shortest clips have no use for the one that looks farthest back: it would become another head before long ones.
    """
    attention = model.model.language_model.layers[0].self_attn
    for projection, heads in ((attention.q_proj, shape.HEADS // shape.KV_HEADS), (attention.k_proj, 1)):
        for parameter in projection.parameters():
            rows = torch.arange(len(parameter)) >= heads * shape.HEAD_DIM
            parameter.register_hook(lambda grad, rows=rows: grad * rows.view(-1, *[1] * (grad.dim() - 1)))


def train(steps: int, seed: int, folder: Path) -> None:
    """Trains and writes a checkpoint."""
    tokens = shape.tokenizer()
    model = shape.build(tokens, seed)
    bank = see(model, seed)
    shape.align(model, tokens, bank)
    hold_slash_heads(model)
    lessons = Lessons(tokens, seed)
    forward = Forward(model, bank, lessons.rng)
    told = nn.Linear(shape.HIDDEN, (len(LOOKED_UP) + 1) * len(COLOURS))
    learned = [*model.model.language_model.parameters(), model.lm_head.weight, *told.parameters()]
    matrices, others = ([p for p in learned if (p.dim() == 2) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    ends = np.cumsum([stage.share for stage in STAGES])
    tally, began = np.zeros((2, len(TASKS))), time.monotonic()
    for step in range(steps):
        progress = step / steps
        number = int(np.searchsorted(ends, progress, side="right").clip(max=len(STAGES) - 1))
        if number and lessons.rng.random() < REPLAY:
            number = int(lessons.rng.integers(number))
        stage = STAGES[number]
        decay = 1 if progress < 0.5 else 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * (progress - 0.5) / 0.5))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * decay
        batch = lessons.draw(stage)
        loss, right = loss_of(forward, told, batch, banned=lessons.rng.random() < stage.banned)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        np.add.at(tally, (0, batch.tasks.numpy()), 1)
        np.add.at(tally, (1, batch.tasks.numpy()), right.numpy())
        if step % 50 == 49:
            shares = " ".join(f"{t} {r / max(n, 1):.2f}" for t, n, r in zip(TASKS, *tally, strict=True))
            print(
                f"{step + 1} {time.monotonic() - began:.0f} s stage {number} loss {float(loss.detach()):.2f} {shares}",
                flush=True,
            )
            tally[:] = 0
    shape.save(model, tokens, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT)
    options = parser.parse_args(argv)
    train(options.steps, options.seed, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
