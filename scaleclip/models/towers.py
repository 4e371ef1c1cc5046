"""Image and text towers from transformers behind one signature: a batch in, one vector a sample out.

Dimensions: B samples, C channels, H W pixels, T tokens, N patches, D states of the tower's width.
"""

import difflib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from scaleclip.config import ImageTowerConfig, TextTowerConfig
from scaleclip.errors import ConfigError
from scaleclip.models.clip_init import initialise_clip_image_tower, initialise_clip_text_tower
from scaleclip.models.locking import fix_batch_norm, has_batch_norm, lock
from scaleclip.models.patch_dropout import drop_patches
from scaleclip.models.positions import is_fixed, sincos_table
from scaleclip.models.pretrained import start_from_folder
from scaleclip.models.timm_towers import TIMM, initialise_timm_tower, timm_values

# Towers whose patch tokens can be dropped and whose positions can be fixed, with the tokens in front of the patches (CLIP's
# class token).
PREFIX_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}

# Towers whose fresh weights are not transformers' own.
INITIALISERS = {
    "clip_vision_model": initialise_clip_image_tower,
    "clip_text_model": initialise_clip_text_tower,
    TIMM: initialise_timm_tower,
}

# SigLIP's text tower, which AutoModel knows as a part of the whole only
AutoConfig.register(SiglipTextConfig.model_type, SiglipTextConfig, exist_ok=True)
AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)

# Text towers that attend to padding. CLIP's is causal: what is pooled at the end token never sees the padding behind it.
# SigLIP's (and CLIPA's) pools the last token, so that padding is a part of the text.
UNMASKED = ("clip_text_model", "siglip_text_model")

# Values that are not transformers' own unless given. ModernBERT compiles itself on a GPU, which is train.compile's affair,
# and takes flash_attn where that is installed, which runs in half precision only.
DEFAULTS = {"modernbert": {"reference_compile": False, "attn_implementation": "sdpa"}}


class Encoded(NamedTuple):
    """What a tower makes of a batch."""

    pooled_BD: Tensor
    """A vector a sample."""
    states_BND: Tensor
    """A vector a token, before pooling."""


class Tower(nn.Module):
    """A transformers model (`body`), which stays in evaluation mode if it has batch norm (see `fix_batch_norm`)."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        self._always_evaluates = has_batch_norm(body)

    def train(self, mode: bool = True) -> "Tower":
        super().train(mode)
        if self._always_evaluates:
            self.body.eval()
        return self


class ImageTower(Tower):
    """Normalised pixels [B, 3, H, W] -> what they are encoded to; `body` is the transformers model.

    `width` is that of pooled states, `state_width` that of tokens; `num_patches` is 0 in towers without patches.
    """

    def __init__(self, config: ImageTowerConfig, checkpointing: bool) -> None:
        super().__init__(_build("model.image", config, {"image_size": config.size}, checkpointing))
        self.pooling = config.pooling
        self.patch_dropout = config.patch_dropout
        if config.type == "clip_vision_model" and config.pooling != "pooler":
            raise ConfigError(
                f"model.image.pooling={config.pooling}: clip_vision_model normalises nothing but its class token, which is "
                f"what pooling=pooler returns; use that, or siglip_vision_model for the mean of the patches"
            )
        if config.type == TIMM and config.pooling != "pooler":
            raise ConfigError(
                f"model.image.pooling={config.pooling}: timm's towers pool in ways of their own: use pooler, and say in "
                f"model.image.config.model_args.global_pool how (token, avg, map)"
            )
        if config.patch_dropout > 0 and config.type not in PREFIX_TOKENS:
            raise ConfigError(
                f"model.image.patch_dropout={config.patch_dropout}: a {config.type} tower has no patch tokens to drop; "
                f"set it to 0 or use one of {', '.join(PREFIX_TOKENS)}"
            )
        self._num_prefix = PREFIX_TOKENS.get(config.type, 0)
        if config.positions == "sincos":
            self._fix_positions(config)
        patch_size = getattr(self.body.config, "patch_size", None)
        self.num_patches = (config.size // patch_size) ** 2 if isinstance(patch_size, int) else 0
        # of feature maps, which some of timm's architectures give with channels last
        self._first_place_axis = 1 if config.type == TIMM and vars(self.body.timm_model).get("output_fmt") == "NHWC" else 2
        self.width, self.state_width = self._output_widths(config.size)

    def forward(self, pixels_BCHW: Tensor, seeds_B: Tensor | None = None) -> Encoded:
        """`seeds_B` (int64) decides which patches a sample keeps in training; unused without patch dropout."""
        if self.patch_dropout == 0 or not self.training:
            return self._encoded(self.body(pixel_values=pixels_BCHW))
        assert seeds_B is not None, "patch dropout draws from a seed a sample"
        drop = partial(drop_patches, seeds_B=seeds_B, share=self.patch_dropout, num_prefix=self._num_prefix)
        embeddings = cast(nn.Module, self.body.vision_model.embeddings)
        # a hook instead of a wrapping module, so that parameter names stay those of transformers
        with embeddings.register_forward_hook(lambda module, args, tokens_BND: drop(tokens_BND)):
            return self._encoded(self.body(pixel_values=pixels_BCHW))

    def _encoded(self, outputs: Any) -> Encoded:
        states = outputs.last_hidden_state
        if states.dim() == 4:  # each place of a feature map is a token
            states = states.flatten(1, 2) if self._first_place_axis == 1 else states.flatten(2).transpose(1, 2)
        return Encoded(self._pool(outputs), states)

    def _pool(self, outputs: Any) -> Tensor:
        if self.pooling == "pooler":
            pooled = outputs.get("pooler_output")
            if pooled is None:
                raise ConfigError(f"model.image.pooling=pooler: {self.body.config.model_type} has none; use mean or cls")
            return cast(Tensor, pooled.flatten(1))  # some poolers keep [B, D, 1, 1]
        states = outputs.last_hidden_state
        if self.pooling == "cls":
            if states.dim() != 3 or self.body.config.model_type == "siglip_vision_model":
                raise ConfigError(f"model.image.pooling=cls: {self.body.config.model_type} has no class token; use mean")
            return cast(Tensor, states[:, 0])
        if states.dim() == 4:
            return cast(Tensor, states.mean((-2, -1)))
        return cast(Tensor, states[:, -self.num_patches :].mean(1))  # class tokens stand in front

    @torch.no_grad()
    def _fix_positions(self, config: ImageTowerConfig) -> None:
        if config.type not in PREFIX_TOKENS:
            raise ConfigError(
                f"model.image.positions=sincos: a {config.type} tower has no table of positions that is known here; use "
                f"learned, or one of {', '.join(PREFIX_TOKENS)}"
            )
        table = cast(nn.Parameter, self.body.vision_model.embeddings.position_embedding.weight).requires_grad_(False)
        num_positions, width = table.shape
        if width % 4:
            raise ConfigError(f"model.image.config.hidden_size={width} is no multiple of 4, which positions=sincos needs")
        if table.is_meta:
            return
        fixed_ND = sincos_table(num_positions, width, self._num_prefix)
        if config.pretrained is not None and not is_fixed(table, fixed_ND):
            raise ConfigError(
                f"model.image.pretrained={config.pretrained} has learned positions: set model.image.positions=learned"
            )
        table.copy_(fixed_ND)

    @torch.no_grad()
    def _output_widths(self, size: int) -> tuple[int, int]:
        # a run without memory or arithmetic: configurations name the width in many ways, and this finds what cannot run
        weights = {name: value.to("meta") for name, value in (*self.named_parameters(), *self.named_buffers())}
        self.eval()
        try:
            encoded: Encoded = functional_call(self, weights, (torch.empty(1, 3, size, size, device="meta"),))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            kind = self.body.config.model_type
            raise ConfigError(f"model.image: {kind} does not run on {size} x {size} pixels: {error}") from error
        self.train()
        return encoded.pooled_BD.shape[1], encoded.states_BND.shape[2]


class TextTower(Tower):
    """Token ids [B, T] (int64) -> what they are encoded to; `body` is the transformers model, `width` that of its states."""

    def __init__(self, config: TextTowerConfig, checkpointing: bool) -> None:
        super().__init__(_build("model.text", config, {"max_position_embeddings": config.context_length}, checkpointing))
        self.pooling = config.pooling
        self._masked = config.type not in UNMASKED
        values = self.body.config
        if config.type == "clip_text_model" and config.pooling == "pooler" and values.eos_token_id == 2:
            raise ConfigError("model.text.config.eos_token_id=2: transformers then pools at the largest id; use pooling=eos")
        for key, needed in (
            ("pad_token_id", self._masked or config.pooling == "mean"),
            ("eos_token_id", config.pooling == "eos"),
        ):
            if needed and getattr(values, key) is None:
                raise ConfigError(
                    f"model.text.config.{key} is unset, but the tower has to find that token: give the tokenizer's"
                )
        _check_positions(self.body, config.context_length)
        self.width = int(values.hidden_size)

    def forward(self, tokens_BT: Tensor) -> Encoded:
        mask_BT = tokens_BT != self.body.config.pad_token_id if self._masked else None
        outputs = self.body(input_ids=tokens_BT, attention_mask=mask_BT)
        return Encoded(self._pool(outputs, tokens_BT), outputs.last_hidden_state)

    def is_read(self, tokens_BT: Tensor) -> Tensor:
        """Where a text's own tokens are, its end token included, bool."""
        if self._masked:
            return cast(Tensor, tokens_BT != self.body.config.pad_token_id)
        # CLIP's padding has the id of a token that texts use
        ends_BT = tokens_BT == self.body.config.eos_token_id
        return cast(Tensor, ends_BT.cumsum(1) - ends_BT.long() == 0)

    def _pool(self, outputs: Any, tokens_BT: Tensor) -> Tensor:
        states_BTD = outputs.last_hidden_state
        if self.pooling == "pooler":
            pooled_BD = outputs.get("pooler_output")
            if pooled_BD is None:
                raise ConfigError(f"model.text.pooling=pooler: {self.body.config.model_type} has none; use mean, cls or eos")
            return cast(Tensor, pooled_BD)
        if self.pooling == "cls":
            return cast(Tensor, states_BTD[:, 0])
        if self.pooling == "eos":
            # argmax of equal values is the first of them
            first_end_B = (tokens_BT == self.body.config.eos_token_id).int().argmax(1)
            return cast(Tensor, states_BTD[torch.arange(len(tokens_BT), device=tokens_BT.device), first_end_B])
        weights_BT1 = (tokens_BT != self.body.config.pad_token_id).unsqueeze(-1).to(states_BTD.dtype)
        return cast(Tensor, (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1))


def build_image_tower(config: ImageTowerConfig, checkpointing: bool) -> ImageTower:
    """The image tower with the weights of `config.pretrained`, or fresh ones: CLIP's initialisation for CLIP towers,
    transformers' own for others.

    Under `torch.device("meta")` it has shapes and no weights.

    Raises:
        ConfigError: an unknown type or value, batch norm, a folder that does not agree, or a wish that the tower cannot fulfil.
    """
    return ImageTower(config, checkpointing)


def build_text_tower(config: TextTowerConfig, checkpointing: bool) -> TextTower:
    """The text tower; see `build_image_tower`."""
    return TextTower(config, checkpointing)


def check_tokenizer(config: TextTowerConfig, size: int, end_id: int, pad_id: int) -> None:
    """Raise ConfigError unless the text tower's numbers fit a tokenizer's (`size` tokens, ids of end and padding)."""
    values = _transformers_config("model.text", config.type, config.config, {})
    if not hasattr(values, "vocab_size"):
        raise ConfigError(f"model.text.type={config.type} has no vocabulary: it is no text tower")
    if size > values.vocab_size:
        raise ConfigError(
            f"model.text.config.vocab_size={values.vocab_size} is below the {size} tokens of "
            f"model.text.tokenizer={config.tokenizer}: set vocab_size={size}"
        )
    for key, ours in (("eos_token_id", end_id), ("pad_token_id", pad_id)):
        theirs = getattr(values, key)
        # CLIP's tower is blind to the padding
        unused = key == "pad_token_id" and config.type == "clip_text_model" and config.pooling != "mean"
        if theirs is not None and theirs != ours and not unused:
            raise ConfigError(
                f"model.text.config.{key}={theirs}, but model.text.tokenizer={config.tokenizer} writes {ours}: set {key}={ours}"
            )


def _build(
    key: str, tower: ImageTowerConfig | TextTowerConfig, defaults: Mapping[str, Any], checkpointing: bool
) -> PreTrainedModel:
    kind = tower.type
    values = timm_values(key, tower.config, defaults["image_size"]) if kind == TIMM else tower.config
    config = _transformers_config(key, kind, values, defaults)
    if kind == "siglip_vision_model" and tower.pooling != "pooler":
        config.vision_use_head = False  # an attention pooler that nothing would come out of
    body = _fresh_body(key, kind, config) if tower.pretrained is None else start_from_folder(key, tower, config)
    fix_batch_norm(key, tower, body)
    if checkpointing:
        if not body.supports_gradient_checkpointing:
            raise ConfigError(f"model.activation_checkpointing: transformers has none for {key}.type={kind}; unset it")
        body.gradient_checkpointing_enable({"use_reentrant": False})
    lock(key, tower, body)
    return body


def _fresh_body(key: str, kind: str, config: PretrainedConfig) -> PreTrainedModel:
    try:
        body = cast(PreTrainedModel, AutoModel.from_config(config))  # takes sdpa attention where the model has it
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}.config does not make a {kind} tower: {error}") from error
    if kind in INITIALISERS:
        INITIALISERS[kind](body)
    return body


def _transformers_config(key: str, kind: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> PretrainedConfig:
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"{key}.type={kind!r} is no model type of transformers{_hint(kind, CONFIG_MAPPING)}")
    config_class = CONFIG_MAPPING[kind]
    # transformers takes any name without a word
    names = {"bos_token_id", "eos_token_id", "pad_token_id", *config_class.attribute_map}
    names |= inspect.signature(config_class.__init__).parameters.keys() - {"self", "args", "kwargs"}
    for name in values:
        if name not in names:
            raise ConfigError(f"unknown key '{key}.config.{name}' for {kind}{_hint(name, names)}")
    ours = {name: value for name, value in defaults.items() if name in names} | DEFAULTS.get(kind, {})
    return cast(PretrainedConfig, AutoConfig.for_model(kind, **(ours | dict(values))))


def _check_positions(body: PreTrainedModel, context_length: int) -> None:
    for name, module in body.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embedding", "position_embeddings", "embed_positions")):
            # RoBERTa's positions start behind the padding's id
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            if module.num_embeddings - first < context_length:
                raise ConfigError(
                    f"model.text.config.max_position_embeddings={module.num_embeddings} is too small for "
                    f"model.text.context_length={context_length}: set it to {context_length + first}"
                )


def _hint(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
