"""Configurations of checkpoints that neither transformers nor SGLang knows.

Each has ``text_config`` and ``vision_config``, by which SGLang sees a multimodal model. What cannot be served is
refused here, by name and with the value.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, SiglipVisionConfig, VideoMAEConfig

_LANGUAGE: dict[str, type[PretrainedConfig]] = {"qwen2": Qwen2Config, "llama": LlamaConfig}
_NAMES = {"model_type", "architectures", "transformers_version"}
_QWEN2 = {*Qwen2Config().to_dict(), "rope_theta", "rope_scaling"} - _NAMES
"""Fields of a flat configuration that are the language model's."""


class UnsupportedCheckpointError(ValueError):
    """A checkpoint with a part that is not implemented; the message names it."""


def refuse(what: str, value: Any, known: str) -> UnsupportedCheckpointError:
    """The error for a part that is not implemented."""
    return UnsupportedCheckpointError(f"mminference: {what} {value!r} is not supported; known: {known}")


class VilaConfig(PretrainedConfig):
    """LongVILA and NVILA as VILA's code writes them: ``llm/``, ``vision_tower/`` and ``mm_projector/`` in one folder.

    ``side``: tokens along a side of a frame. ``pool``: frames that become one (TSP encoders), 1 for none.
    ``image_size``: side of the tower's frames in pixels.

    Facts: NVlabs/VILA ``llava/model/configuration_llava.py``, NVlabs/Long-RL ``configuration_vila.py``.
    """

    model_type = "llava_llama"
    architecture: ClassVar[str] = "LlavaLlamaModel"
    PROJECTORS: ClassVar[tuple[str, ...]] = ("mlp_downsample", "mlp_downsample_fix", "mlp_downsample_2x2_fix")
    """One and the same: two by two patches become a token."""

    def __init__(
        self,
        llm_cfg: dict[str, Any] | None = None,
        vision_tower_cfg: dict[str, Any] | None = None,
        mm_projector_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.llm_cfg = llm_cfg or {}
        self.vision_tower_cfg = vision_tower_cfg or {}
        self.mm_projector_cfg = mm_projector_cfg or {}
        for name in ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg"):
            if not isinstance(getattr(self, name), dict):
                raise refuse(name, getattr(self, name), "the part's own configuration, written out")
        kind = self.llm_cfg.get("model_type", "qwen2")
        if kind not in _LANGUAGE:
            raise refuse("llm_cfg.model_type", kind, ", ".join(_LANGUAGE))
        self.text_config = _LANGUAGE[kind](**_own(self.llm_cfg))
        self.vision_config = SiglipVisionConfig(**_own(self.vision_tower_cfg))
        self.mm_vision_select_layer = kwargs.pop("mm_vision_select_layer", None) or -2
        self.num_video_frames = kwargs.pop("num_video_frames", None) or 8
        self.fps = kwargs.pop("fps", None) or 0.0
        self.video_encoder = kwargs.pop("video_encoder", None)
        if self.llm_cfg:
            self._check(kwargs)
        kwargs["torch_dtype"] = (
            kwargs.pop("model_dtype", None) or kwargs.get("torch_dtype") or self.llm_cfg.get("torch_dtype")
        )
        super().__init__(**_as_a_whole(kwargs, self.text_config, self.architecture))

    def _check(self, others: dict[str, Any]) -> None:
        tower = self.vision_tower_cfg.get("model_type", "siglip_vision_model")
        if tower != "siglip_vision_model":
            raise refuse("vision_tower_cfg.model_type", tower, "siglip_vision_model")
        projector = self.mm_projector_cfg.get("mm_projector_type")
        if projector not in self.PROJECTORS:
            raise refuse("mm_projector_type", projector, ", ".join(self.PROJECTORS))
        for name in ("s2", "dynamic_s2"):
            if others.get(name):
                raise refuse(name, others[name], "false")
        if self.mm_vision_select_layer >= 0 or -self.mm_vision_select_layer > self.vision_config.num_hidden_layers:
            raise refuse("mm_vision_select_layer", self.mm_vision_select_layer, "from the end, as -2")
        encoder = self.video_encoder or {}
        name = str(encoder.get("_target_", "BasicVideoEncoder")).rpartition(".")[2]
        if name not in {"BasicVideoEncoder", "TSPVideoEncoder"}:
            raise refuse("video_encoder", name, "BasicVideoEncoder, TSPVideoEncoder")
        sizes = encoder.get("pool_sizes", [[1, 1, 1]])
        if len(sizes) != 1 or list(sizes[0])[1:] != [1, 1]:
            raise refuse("video_encoder.pool_sizes", sizes, "one size, of frames alone, as [[8, 1, 1]]")

    @property
    def pool(self) -> int:
        """Frames that become one."""
        return int((self.video_encoder or {}).get("pool_sizes", [[1]])[0][0])

    @property
    def side(self) -> int:
        """Tokens along a side of a frame."""
        vision: Any = self.vision_config
        patches = int(vision.image_size // vision.patch_size)
        return -(-patches // 2)


class VilaRemoteConfig(VilaConfig):
    """The same as the checkpoints with remote code write it."""

    model_type = "vila"
    architecture: ClassVar[str] = "VILAForCausalLM"

    # transformers writes one for subclasses that have none.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class VideoChatFlashConfig(PretrainedConfig):
    """VideoChat-Flash with a UMT tower: Qwen2's fields and the media's, flat, as in its ``config.json``.

    ``vision_config``: the tower, as ``VideoMAEConfig`` names sizes; UMT-L at the side that ``mm_vision_tower`` stands
    for. A ``vision_config`` in the file, which published checkpoints have not, replaces some of these sizes.
    ``clip``: frames that the tower sees at once. ``clip_tokens``: tokens that they, or one image, become.

    Facts: OpenGVLab/VideoChat-Flash ``llava/model/multimodal_encoder/{builder,umt_encoder}.py``,
    ``llava/model/multimodal_projector/tome16_mlp_hd64.py``, ``llava/model/llava_arch.py``.
    """

    model_type = "videochat_flash_qwen"
    architecture: ClassVar[str] = "VideoChatFlashQwenForCausalLM"
    clip: ClassVar[int] = 4
    clip_tokens: ClassVar[int] = 64
    ONLY: ClassVar[dict[str, Any]] = {
        "mm_projector_type": "tome16_mlp_hd64",
        "mm_local_num_frames": clip,
        "mm_newline_position": "nothing",
        "mm_llm_compress": False,
        "vision_encode_type": "video_image",
        "frame_aspect_ratio": "square",
        "mm_use_im_start_end": False,
    }
    """What published checkpoints say where they say it, and all that is implemented."""

    def __init__(
        self,
        mm_vision_tower: str = "umt-hd-large",
        mm_vision_select_layer: int = -2,
        vision_config: VideoMAEConfig | dict[str, Any] | None = None,
        text_config: Qwen2Config | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.mm_vision_tower, self.mm_vision_select_layer = mm_vision_tower, mm_vision_select_layer
        for name, known in self.ONLY.items():
            setattr(self, name, kwargs.pop(name, known))
        if not isinstance(text_config, PretrainedConfig):
            text_config = Qwen2Config(**(text_config or {name: kwargs[name] for name in _QWEN2 if name in kwargs}))
        self.text_config = text_config
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = VideoMAEConfig(**{**self._umt_large(), **_own(vision_config or {})})
        self.vision_config = vision_config
        self._check()
        super().__init__(**_as_a_whole(kwargs, self.text_config, self.architecture))

    def _umt_large(self) -> dict[str, Any]:
        tower = str(self.mm_vision_tower).lower()
        if "umt" not in tower or "internvideo" in tower:
            raise refuse("mm_vision_tower", self.mm_vision_tower, "umt-hd-large (448), umt-large (224)")
        return {
            "image_size": 448 if "umt-hd" in tower else 224,
            "patch_size": 16,
            "num_frames": self.clip,
            "tubelet_size": 1,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "layer_norm_eps": 1e-6,
            "use_mean_pooling": False,
        }

    def _check(self) -> None:
        for name, known in self.ONLY.items():
            if getattr(self, name) != known:
                raise refuse(name, getattr(self, name), repr(known))
        select: Any = self.mm_vision_select_layer
        vision: Any = self.vision_config
        if not isinstance(select, int) or not -vision.num_hidden_layers <= select < 0:
            raise refuse("mm_vision_select_layer", select, "from the end, as -2")
        patches = (vision.image_size // vision.patch_size) ** 2
        if patches <= self.clip_tokens:
            raise refuse("patches of a frame", patches, f"more than {self.clip_tokens}, to which they are merged")


class LlavaVideoConfig(PretrainedConfig):
    """LLaVA-Video, whose file holds Qwen2's fields and LLaVA's side by side under LLaVA-OneVision's names.

    ``side``: tokens along a side of a frame of a video. ``whole_side``: the same of a picture, which is not pooled.
    ``newline_column``: whether every row of a frame ends in a newline token.

    Facts: LLaVA-VL/LLaVA-NeXT ``llava/model/llava_arch.py`` and ``llava/model/multimodal_encoder/siglip_encoder.py``,
    which reads the last layer but one whatever the file says.
    """

    model_type = "llava_video"
    # Not "Llava...ForCausalLM": SGLang would read it as its own LLaVA, in float16.
    architecture: ClassVar[str] = "LlavaVideoModel"
    ARCHITECTURE: ClassVar[str] = "LlavaQwenForCausalLM"
    TOWER: ClassVar[str] = "siglip-so400m-patch14-384"
    SO400M: ClassVar[dict[str, int]] = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
    KNOWN: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_newline_position": ("grid", "frame", "one_token", "no_token"),
        "mm_spatial_pool_mode": ("average", "bilinear"),
        "mm_spatial_pool_stride": (2,),
        "mm_patch_merge_type": ("spatial_unpad",),
        "mm_vision_select_layer": (-2,),
        "mm_use_im_start_end": (False,),
        "add_faster_video": (False,),
    }
    """What is implemented of each field."""
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "mm_projector_type": "linear",
        "mm_newline_position": "one_token",
        "mm_spatial_pool_mode": "average",
        "mm_spatial_pool_stride": 2,
        "mm_patch_merge_type": "flat",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "add_faster_video": False,
        "add_time_instruction": False,
        "force_sample": False,
    }
    """LLaVA-NeXT's, but for the pooling, which its authors name when they run the model."""

    def __init__(self, **kwargs: Any) -> None:
        for name, default in self.DEFAULTS.items():
            value = kwargs.pop(name, None)
            setattr(self, name, default if value is None else value)
        own = kwargs.pop("vision_config", None)
        self.text_config = Qwen2Config(**{name: kwargs[name] for name in _QWEN2 if name in kwargs})
        self.vision_config = SiglipVisionConfig(**(_own(own) if own else self.SO400M))
        # Without fields it is what transformers compares others with.
        if kwargs.get("mm_vision_tower"):
            self.check()
            tower, kind = str(kwargs["mm_vision_tower"]), (own or {}).get("model_type", "siglip_vision_model")
            if not own and tower.rpartition("/")[2] != self.TOWER:
                raise refuse("mm_vision_tower", tower, f"google/{self.TOWER}")
            if kind != "siglip_vision_model":
                raise refuse("vision_config.model_type", kind, "siglip_vision_model")
            if kwargs.get("architectures") != [self.ARCHITECTURE]:
                raise refuse("architectures", kwargs.get("architectures"), self.ARCHITECTURE)
        super().__init__(**_as_a_whole(kwargs, self.text_config, self.architecture))

    def check(self) -> None:
        """Once more where a configuration is used: ``--json-model-override-args`` changes it after it was read.

        Raises:
            UnsupportedCheckpointError: see :data:`KNOWN`.
        """
        for name, known in self.KNOWN.items():
            if getattr(self, name) not in known:
                raise refuse(name, getattr(self, name), ", ".join(str(one) for one in known))

    @classmethod
    def wrote(cls, fields: dict[str, Any]) -> bool:
        """Whether a file of type ``llava`` is LLaVA-Video's; LLaVA-OneVision's has neither mark."""
        marks = fields.get("mm_newline_position") == "grid" or fields.get("add_time_instruction") is True
        return fields.get("model_type") == "llava" and marks

    @property
    def whole_side(self) -> int:
        """Tokens along a side of a picture."""
        vision: Any = self.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def side(self) -> int:
        """Tokens along a side of a frame."""
        return self.whole_side // 2 if self.mm_spatial_pool_mode == "average" else -(-self.whole_side // 2)

    @property
    def newline_column(self) -> bool:
        """Whether every row of a frame ends in a newline token."""
        return bool(self.mm_newline_position == "grid")


def _own(part: dict[str, Any]) -> dict[str, Any]:
    """A part's configuration without what names it."""
    return {name: value for name, value in part.items() if name not in _NAMES}


def _as_a_whole(fields: dict[str, Any], text: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """A model's own fields with what SGLang reads of the whole: dtype, token ids of the language model, the name."""
    dtype = fields.pop("torch_dtype", None)
    if isinstance(dtype, str):
        fields.setdefault("dtype", dtype.removeprefix("torch."))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        fields.setdefault(name, getattr(text, name, None))
    return fields | {"architectures": [architecture]}
