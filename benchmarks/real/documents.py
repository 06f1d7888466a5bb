"""Real documents that the pinned environment ships: prose, licences, code, tables, translations.

One half is for choosing settings, the other one for confirming what was chosen.
"""

from __future__ import annotations

import gettext
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALVES = ("choose", "confirm")
KINDS = ("prose", "licence", "code", "table", "translation")
_CHARACTERS_PER_TOKEN = 6
"""More than text of any kind has on average."""


@dataclass(frozen=True)
class Document:
    """A text: where it is from, and the character at which the excerpt begins.

    ``source``: a file under site-packages, ``topic:`` one of Python's help texts, or ``locale:`` a language of
    pycountry's catalogues.
    """

    kind: str
    half: str
    source: str
    start: int = 0

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.kind}:{self.source.rpartition('/')[2].rpartition(':')[2]}+{self.start}"

    def tokens(self, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
        """Its first ``length`` tokens, int64.

        Raises:
            ValueError: it is shorter.
        """
        text = self._text()[self.start : self.start + _CHARACTERS_PER_TOKEN * length]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        if len(ids) < length:
            raise ValueError(f"{self.name} has {len(ids)} tokens, fewer than {length}")
        return torch.tensor(ids)

    def _text(self) -> str:
        source, _, name = self.source.partition(":")
        if source == "topic":
            return str(topics.topics[name])
        if source == "locale":
            return _translations(name)
        return (_site_packages() / self.source).read_text(encoding="utf-8", errors="replace")


DOCUMENTS = (
    Document("prose", "choose", "tvm_ffi/3rdparty/libbacktrace/Isaac.Newton-Opticks.txt", 60_000),
    Document("prose", "choose", "topic:compound"),
    Document("licence", "choose", "pyarrow-26.0.1.dist-info/licenses/LICENSE.txt"),
    Document(
        "licence", "choose", "torchcodec-0.17.0.dist-info/licenses/third_party/LICENSE.libnvjpeg-NVIDIA-CUDA-EULA.txt"
    ),
    Document("code", "choose", "sglang/srt/managers/scheduler.py", 20_000),
    Document("code", "choose", "torch/nn/functional.py", 40_000),
    Document("table", "choose", "airportsdata/airports.csv", 400_000),
    Document("table", "choose", "pycountry/databases/iso3166-2.json", 50_000),
    Document("translation", "choose", "locale:fr"),
    Document("translation", "choose", "locale:ru"),
    Document("prose", "confirm", "tvm_ffi/3rdparty/libbacktrace/Isaac.Newton-Opticks.txt", 330_000),
    Document("prose", "confirm", "topic:specialnames"),
    Document("licence", "confirm", "pillow-13.0.0.dist-info/licenses/LICENSE"),
    Document("licence", "confirm", "nvidia_curand-10.4.0.35.dist-info/licenses/License.txt", 20_000),
    Document("code", "confirm", "transformers/generation/utils.py", 60_000),
    Document("code", "confirm", "scipy/optimize/_optimize.py", 30_000),
    Document("table", "confirm", "airportsdata/airports.csv", 2_000_000),
    Document("table", "confirm", "pycountry/databases/iso639-3.json", 300_000),
    Document("translation", "confirm", "locale:de"),
    Document("translation", "confirm", "locale:zh_CN"),
)


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _translations(language: str) -> str:
    """Names of regions and languages, in English and in another language, line by line."""
    lines = []
    for catalogue in ("iso3166-2", "iso639-3"):
        path = _site_packages() / "pycountry" / "locales" / language / "LC_MESSAGES" / f"{catalogue}.mo"
        with path.open("rb") as file:
            entries = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        lines += [f"{name} = {entries[name]}" for name in entries if name and isinstance(name, str)]
    return "\n".join(lines)
