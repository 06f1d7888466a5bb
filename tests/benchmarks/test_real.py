"""benchmarks/real on tiny random checkpoints: its decoder, its twin of the server, documents, measures, promises."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.real import __main__ as command
from benchmarks.real import documents, measures, model, passkeys, readers, twin, weights
from benchmarks.real.reading import Reading
from mminference_sgl.method import catalog
from mminference_sgl.method.config import from_sources
from tiny_models import parts

EXACT = {"error": 0.0}
"""So exact a setting that everything is kept."""
ROUGH = {"pattern": str(command.A_SHAPE), "error_ceiling": 1e9, "patterns": {"a_shape": {"sink": 0, "window": 16}}}
LENGTH = 700
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 64}),
}


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def build(family: str, folder: Path) -> PreTrainedModel:
    """Writes a checkpoint in which every part matters, norms and biases among them."""
    config, kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    built = kind(config(**{**parts.TEXT, **settings})).eval()
    parts.spread(built, built.model, built.lm_head, ())
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    built.save_pretrained(folder)
    return built


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(parts.VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("real") / "tiny"
    build("llama", folder)
    parts.write_tokenizer(folder, (), parts.chat_template(""))
    return folder


@pytest.fixture(scope="module")
def language(folder: Path) -> model.LanguageModel:
    return model.LanguageModel(folder)


@pytest.fixture(scope="module")
def reference(language: model.LanguageModel, tokens: torch.Tensor) -> Reading:
    return twin.read(language, tokens, LENGTH, model.dense)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def method_of(language: model.LanguageModel, settings: dict, chunk: int, length: int = LENGTH) -> twin.Method:
    config = from_sources(("test", {"pattern": "vertical_slash", "min_tokens": 0, **settings}))
    config = config.for_chunks(chunk, readers.SMALLEST_TILE)
    pattern = catalog.load(config.pattern)
    specs = [pattern.specs(layer, range(language.shape.heads)) for layer in range(language.shape.layers)]
    return twin.Method(config, specs, length, chunk, language.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_that_of_transformers(family: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        wanted = build(family, tmp_path)(tokens[None]).logits[0]
        ours = model.LanguageModel(tmp_path)
        for chunk in (LENGTH, 300, 64):
            stream = ours.stream(LENGTH)
            hidden = [ours.prefill(stream, part, model.dense) for part in tokens.split(chunk)]
            torch.testing.assert_close(ours.logits(torch.cat(hidden)), wanted, atol=2e-3, rtol=1e-4)


def test_residuals_are_kept_where_asked_for(language: model.LanguageModel, tokens: torch.Tensor) -> None:
    stream = language.stream(LENGTH)
    hidden = [language.prefill(stream, part, model.dense, keep=True) for part in tokens.split(400)]
    assert [len(residuals) for residuals in stream.residuals] == [language.shape.layers + 1] * 2
    torch.testing.assert_close(language._norm("model.norm", stream.residuals[1][-1]), hidden[1])


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="'mamba', only llama, qwen2, qwen3"):
        model.LanguageModel(tmp_path)


@pytest.mark.parametrize("chunk", [LENGTH, 512, 256, 100])
def test_the_twin_that_keeps_everything_is_dense(
    chunk: int, language: model.LanguageModel, tokens: torch.Tensor, reference: Reading
) -> None:
    method = method_of(language, EXACT, chunk)
    reading = twin.read(language, tokens, chunk, method)
    torch.testing.assert_close(reading.hidden, reference.hidden, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(reading.logprob, reference.logprob, atol=2e-3, rtol=1e-4)
    assert float(twin.divergence(language, reading, reference).abs().max()) < 1e-4
    assert [part.prefix for part in method.chunks] == list(range(0, LENGTH, chunk))
    for part in method.chunks:
        assert len(part.layers) == language.shape.layers
        # All that a row may see; tiles of shared lists have fewer rows, so fewer keys that none of them sees.
        assert 0.85 < part.density <= 1
        assert part.coverage == pytest.approx(1, abs=1e-5)
        assert part.error < 1e-5


@pytest.mark.parametrize("chunk", [LENGTH, 256])
def test_a_rough_twin_is_not_dense(
    chunk: int, language: model.LanguageModel, tokens: torch.Tensor, reference: Reading
) -> None:
    method = method_of(language, ROUGH, chunk)
    reading = twin.read(language, tokens, chunk, method)
    assert float(twin.divergence(language, reading, reference).mean()) > 0.1
    assert measures.distance(reading, reference).agreement < 0.9
    assert all(part.density < 0.6 for part in method.chunks[1:])
    assert all(part.error > 0.1 for part in method.chunks)


def test_chunks_that_end_early_run_dense(language: model.LanguageModel, tokens: torch.Tensor) -> None:
    method = method_of(language, {**ROUGH, "min_tokens": 513}, 256)
    twin.read(language, tokens, 256, method)
    assert [part.prefix for part in method.chunks] == [512]


def test_a_reading_is_of_the_second_half(language: model.LanguageModel, tokens: torch.Tensor) -> None:
    reading = twin.read(language, tokens, LENGTH, model.dense)
    logits = language.logits(language.prefill(language.stream(LENGTH), tokens, model.dense))
    half = LENGTH // 2
    wanted = logits.log_softmax(-1)[torch.arange(half - 1, LENGTH - 1), tokens[half:]]
    torch.testing.assert_close(reading.logprob, wanted, atol=1e-4, rtol=1e-4)
    assert (reading.top == logits[half - 1 : -1].argmax(-1)).all()


def test_dense_readings_are_kept(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, language: model.LanguageModel, tokens: torch.Tensor
) -> None:
    first = twin.dense(language, "tiny", tokens, 256)
    assert len(list((own_cache / "mminference-sgl" / "real" / "dense").iterdir())) == 1

    def read_again(*_: object) -> Reading:
        raise AssertionError("read again")

    monkeypatch.setattr(twin, "read", read_again)
    again = twin.dense(language, "tiny", tokens, 256)
    for name in ("logprob", "top", "hidden"):
        assert torch.equal(getattr(again, name), getattr(first, name))
    for other in (("other", tokens), ("tiny", tokens[1:])):
        with pytest.raises(AssertionError, match="read again"):
            twin.dense(language, *other, 256)


def test_rotary_pairs_come_half_a_head_apart() -> None:
    # Two heads of four rows: in GGUF the pairs (0, 1) and (2, 3), here (0, 2) and (1, 3).
    weight = np.arange(16, dtype=np.float32).reshape(8, 2)
    assert (weights._rotary_halves(weight, 2) == weight[[0, 2, 1, 3, 4, 6, 5, 7]]).all()


@pytest.mark.parametrize(
    ("gguf", "name"),
    [
        ("blk.11.attn_q.weight", "model.layers.11.self_attn.q_proj.weight"),
        ("blk.0.attn_v.bias", "model.layers.0.self_attn.v_proj.bias"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names_of_weights(gguf: str, name: str) -> None:
    assert weights._name(gguf) == name


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(KeyError):
        weights._name("blk.0.attn_sinks.weight")


def test_each_kind_has_documents_to_choose_and_to_confirm_by() -> None:
    count = Counter((document.kind, document.half) for document in documents.DOCUMENTS)
    assert count == {(kind, half): 2 for kind in documents.KINDS for half in documents.HALVES}
    assert len({(document.half, document.name) for document in documents.DOCUMENTS}) == len(documents.DOCUMENTS)


def test_halves_are_disjoint() -> None:
    spans: dict[str, list[tuple[int, int]]] = {}
    for document in documents.DOCUMENTS:
        reach = documents._CHARACTERS_PER_TOKEN * max(command.LENGTHS)
        spans.setdefault(document.source, []).append((document.start, document.start + reach))
    for of_one in spans.values():
        ordered = sorted(of_one)
        assert all(before[1] <= after[0] for before, after in pairwise(ordered))


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda document: f"{document.half}-{document.name}")
def test_documents_are_there_and_long_enough(document: documents.Document) -> None:
    tokens = document.tokens(Letters(), 8192)
    assert tokens.shape == (8192,)
    assert tokens.dtype == torch.int64
    assert len(set(tokens.tolist())) > 20


def test_a_document_that_is_too_short_is_refused() -> None:
    document = documents.Document("prose", "choose", "topic:break")
    with pytest.raises(ValueError, match=r"prose:break\+0 has \d+ tokens, fewer than 8192"):
        document.tokens(Letters(), 8192)


def test_distance() -> None:
    count = 4 * measures.BLOCK
    dense = Reading(torch.full((count,), -2.0), torch.zeros(count, dtype=torch.int64))
    top = torch.zeros(count, dtype=torch.int64)
    top[: count // 4] = 1
    lost = torch.tensor([0.0, 0.1, 0.2, 0.3]).repeat_interleave(measures.BLOCK)
    far = measures.distance(Reading(dense.logprob - lost, top), dense)
    assert far.dense_nll == pytest.approx(2.0)
    assert far.nll == pytest.approx(2.15)
    assert far.loss == pytest.approx(0.075)
    assert far.agreement == 0.75
    # Student's t of three degrees of freedom is 3.1824; the means' standard deviation 0.1291.
    assert far.interval == pytest.approx(3.1824 * 0.12910 / 2 / 2, rel=1e-3)


def test_passkeys_ask_for_what_they_tell() -> None:
    keys = passkeys.passkeys(Letters(), "confirm", 1024)
    assert [key.depth for key in keys] == pytest.approx(np.linspace(0, 1, passkeys.DEPTHS).tolist())
    places, numbers = [], set()
    for key in keys:
        assert len(key.tokens) == 1024
        text = "".join(map(chr, key.tokens.tolist()))
        answer = text[-key.answer :]
        assert answer.strip().isdigit()
        assert text[: -key.answer].endswith("The pass key is")
        places.append(text.index(f"The pass key is{answer}. Remember it.{answer} is the pass key."))
        numbers.add(answer)
    assert len(numbers) == passkeys.DEPTHS
    assert places == sorted(places)
    assert places[0] < 10


def test_a_passkey_is_found_when_every_digit_is() -> None:
    key = passkeys.passkeys(Letters(), "confirm", 1024)[3]
    top = key.tokens[512:].clone()
    top[: -key.answer] = 0
    reading = Reading(torch.zeros(512), top)
    assert key.found(reading)
    top[-1] += 1
    assert not key.found(reading)


def row_of(loss: float = 0.0, agreement: float = 1.0, interval: float = 0.001, divergence: float | None = None):
    far = measures.Distance(2.0, 2.0 * (1 + loss), loss, interval, agreement)
    return command.Row(documents.DOCUMENTS[0], 4096, far, divergence, 0.5, [0.4, 0.6], [1.0, 1.0], [0.0, 0.0], [])


def test_kept_promises() -> None:
    kept = [row_of(), row_of(loss=0.0055), row_of(loss=-0.1), row_of(agreement=0.981)]
    for row in kept:
        assert command.judge([row], []) == []
    found = [command.Found(4096, 0.5, dense, sparse) for dense, sparse in [(True, True), (False, True), (False, False)]]
    assert command.judge(kept, found) == []


@pytest.mark.parametrize(
    ("row", "failure"),
    [
        (row_of(loss=0.0065), "prose at 4096 tokens: loses 0.65 +- 0.10 % likelihood"),
        (row_of(agreement=0.979), "prose at 4096 tokens: 97.9 % agreement"),
    ],
)
def test_missed_promises(row, failure: str) -> None:
    assert command.judge([row], []) == [failure]


def test_documents_of_a_kind_are_judged_together() -> None:
    assert command.judge([row_of(loss=0.009), row_of(loss=-0.005)], []) == []
    assert len(command.judge([row_of(agreement=0.99), row_of(agreement=0.96)], [])) == 1


def test_a_passkey_that_only_dense_attention_finds() -> None:
    failures = command.judge([], [command.Found(4096, 0.25, dense=True, sparse=False)])
    assert failures == ["passkey at 4096 tokens, depth 0.25: found densely only"]


@pytest.mark.parametrize(
    ("row", "control", "failures"),
    [
        (row_of(0.001), row_of(0.0031), 0),
        (row_of(0.001), row_of(0.0029), 1),
        (row_of(-0.001), row_of(0.002), 0),
        (row_of(-0.001), row_of(0.0005), 1),
        (row_of(0.001, divergence=0.002), row_of(0.001, divergence=0.0061), 0),
        (row_of(0.001, divergence=0.002), row_of(0.1, divergence=0.0059), 1),
    ],
)
def test_the_control_is_to_lose_more(row, control, failures: int) -> None:
    assert len(command.judge([row], [], [control])) == failures


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("error=0.9", ("error", 0.9)),
        ("pattern=grid", ("pattern", "grid")),
        ("enabled=true", ("enabled", True)),
        ('patterns={"grid": {"sink": 1}}', ("patterns", {"grid": {"sink": 1}})),
        ("pattern=a=b", ("pattern", "a=b")),
    ],
)
def test_settings(text: str, pair: tuple[str, object]) -> None:
    assert command._setting(text) == pair


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_the_control_is_about_as_dense(density: float, language: model.LanguageModel) -> None:
    length = 2048
    budget = {"sink": command.SINK, "window": command.window(density, length)}
    method = method_of(language, {**ROUGH, "patterns": {"a_shape": budget}}, length, length)
    twin.read(language, torch.arange(length) % parts.VOCABULARY, length, method)
    assert method.chunks[0].density == pytest.approx(density, abs=0.04)


def run(folder: Path, out: Path, settings: dict) -> tuple[int, dict]:
    options = ["--twin", "--control", "--model", str(folder), "--kinds", "prose", "code", "--lengths", "768"]
    options += ["--passkeys", "2", "--json", str(out), "--set=min_tokens=0"]
    options += [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    code = command.main(options)
    return code, json.loads(out.read_text())


def test_a_run_that_keeps_everything(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(readers, "CHUNK", 256)
    code, record = run(folder, tmp_path / "out.json", EXACT)
    assert code == 0
    assert record["failures"] == []
    for row in record["rows"]:
        assert row["density"] == [1, 1, 1]
        assert row["distance"]["loss"] == pytest.approx(0, abs=1e-5)
        assert row["divergence"] == pytest.approx(0, abs=1e-5)
    text = capsys.readouterr().out
    assert text.count("  control") == len(record["controls"]) == 2
    layers = record["rows"][0]["layers"]
    assert layers[0]["density"] == 1
    assert layers[0]["dense_heads"] > 0
    assert len(text.split("by layer")[1].splitlines()) > len(layers) > 1


def test_a_rough_run_is_no_better_than_its_control(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(readers, "CHUNK", 256)
    rough = ROUGH | {"patterns": {"a_shape": {"sink": 64, "window": 192}}}
    code, record = run(folder, tmp_path / "out.json", rough)
    assert code == 1
    for row, control in zip(record["rows"], record["controls"], strict=True):
        assert row["divergence"] > 0.1
        assert control["mean_density"] == pytest.approx(row["mean_density"], abs=0.05)
        # It is what it is compared with.
        assert control["divergence"] == pytest.approx(row["divergence"], rel=0.3)
    kept = [failure for failure in record["failures"] if "the control by" in failure]
    assert [failure.split(":")[0] for failure in kept] == ["all at 768 tokens"]
    text = capsys.readouterr().out
    assert all(f"FAILED: {failure}" in text for failure in record["failures"])
