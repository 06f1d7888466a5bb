"""Tokenizer and chat template of checkpoints that bring no processor of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer

_PARTS = (
    "{%- macro show(content) -%}{%- if content is string -%}{{- content | trim -}}{%- else -%}"
    "{%- for part in content -%}{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'video' -%}{{- 'VIDEO' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] | trim -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' + show(message['content'])"
    " + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_LLAMA_3 = (
    "{{- '<|begin_of_text|>' -}}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' + SYSTEM + '<|eot_id|>' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + show(message['content']) + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)


def chatml(system: str, video: str = "<video>") -> str:
    """Qwen2's template with placeholders for media; ``system`` speaks where no message of the user's does."""
    return _PARTS.replace("VIDEO", video) + _CHATML.replace("SYSTEM", repr(system))


def llama_3(system: str, video: str = "<video>") -> str:
    """The same for Llama 3."""
    return _PARTS.replace("VIDEO", video) + _LLAMA_3.replace("SYSTEM", repr(system))


class Chat:
    """Stands where SGLang expects transformers' processor: a tokenizer and a chat template."""

    subfolder: ClassVar[str] = ""

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        tokenizer.chat_template = chat_template

    @classmethod
    def template(cls, path: str | Path, **kwargs: Any) -> str:
        """The template for a checkpoint."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Chat:
        """As transformers' processors; reads the tokenizer of the folder."""
        known = {name: kwargs[name] for name in ("trust_remote_code", "revision") if name in kwargs}
        return cls(AutoTokenizer.from_pretrained(path, subfolder=cls.subfolder, **known), cls.template(path, **known))


class VilaChat(Chat):
    """VILA's: the tokenizer is the language model's, the template that of its kind."""

    subfolder = "llm"

    @classmethod
    def template(cls, path: str | Path, **kwargs: Any) -> str:
        """By the language model's kind."""
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(path, **kwargs).text_config.model_type
        if kind == "llama":
            return llama_3(
                "You are a helpful language and vision assistant. You are able to understand the visual content that"
                " the user provides, and assist the user with a variety of tasks using natural language.",
                "<vila/video>",
            )
        return chatml("You are a helpful assistant", "<vila/video>")


class VideoChatFlashChat(Chat):
    """VideoChat-Flash's, which its authors call qwen_2."""

    @classmethod
    def template(cls, path: str | Path, **kwargs: Any) -> str:  # noqa: ARG003 - as the base class has it
        """The same for all."""
        return chatml("You are a helpful assistant.")


LLAVA_VIDEO = chatml("You are a helpful assistant.")
"""What LLaVA-NeXT calls ``qwen_1_5``."""
