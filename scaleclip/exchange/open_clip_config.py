"""open_clip's models as `model_cfg` of an open_clip_config.json says them.

Read from open_clip_torch 3.3. Its image towers always have a class token, so one that pools patches is another network than
SigLIP's and Recap-CLIP's, even where both take the mean.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from scaleclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from scaleclip.config_io import parse_section
from scaleclip.errors import ConfigError
from scaleclip.exchange.open_clip_names import HF_TYPES, text_prefix
from scaleclip.exchange.weights import Weights
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.timm_towers import TIMM, default_pool, default_size, unknown_architecture

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# LayerNorm's own, which open_clip takes where it is told nothing
_EPS = 1e-5
_CLIP_TOKENS = 49408
_HEAD_WIDTH = 64
# ours -> whether open_clip's quick_gelu, and arguments of GELU
_ACTIVATIONS: dict[str, tuple[bool, dict[str, str]]] = {
    "gelu": (False, {}),
    "quick_gelu": (True, {}),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}
# whose shapes tell the sizes of a CLIP with ViT, with their numbers of dimensions
_TELLING = {
    "visual.proj": 2, "visual.conv1.weight": 4, "visual.positional_embedding": 2,
    "visual.transformer.resblocks.0.mlp.c_fc.weight": 2, "{text}ln_final.weight": 1, "{text}positional_embedding": 2,
    "{text}token_embedding.weight": 2, "{text}transformer.resblocks.0.mlp.c_fc.weight": 2,
}  # fmt: skip
_HF_POOLERS = {"pooler": "cls_pooler", "mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
# what only training or a tokenizer reads
_VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"}
_VISION_KEYS |= {"patch_dropout", "output_tokens"}
_TIMM_KEYS = {"image_size", "patch_dropout", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj"}
_TIMM_KEYS |= {"timm_drop", "timm_drop_path"}
_TOKENIZER_KEYS = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"}
_TEXT_KEYS |= {"no_causal_mask", "pool_type", "proj_bias", "eos_id", "pad_id"} | _TOKENIZER_KEYS
_HF_KEYS = {"hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"} | _TOKENIZER_KEYS


def model_cfg(config: ModelConfig, model: DualEncoder) -> dict[str, Any]:
    """open_clip's `model_cfg` of a dual encoder.

    Args:
        config: the dual encoder's.
        model: built from it, with or without values.

    Raises:
        ConfigError: open_clip has no tower that computes the same.
    """
    vision, image_act = _vision_cfg(config.image, model.image.body.config)
    text, text_act = _text_cfg(config.text, model.text.body.config)
    # one switch for both towers, which timm's and transformers' do not read
    switches = {act for act in (image_act, text_act) if act is not None}
    if len(switches) > 1:
        raise _misfit("quick_gelu holds for both towers, and only one of these has it")
    cfg: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if True in switches:
        cfg["quick_gelu"] = True
    if config.init_logit_bias is not None:
        cfg["init_logit_bias"] = config.init_logit_bias
    return cfg


def model_config(cfg: Mapping[str, Any], preprocess: Mapping[str, Any], reference: str) -> ModelConfig:
    """The dual encoder that computes what open_clip's model does.

    Args:
        cfg: `model_cfg`.
        preprocess: `preprocess_cfg`, for mean and standard deviation.
        reference: names the model, or the file that describes it, in messages.

    Raises:
        ConfigError: no tower here does; the message names what it is.
    """
    if "multimodal_cfg" in cfg:
        raise ConfigError(f"{reference} is a CoCa, whose text tower has a class token of its own: no tower here computes that")
    quick, vision, text = bool(cfg.get("quick_gelu")), cfg["vision_cfg"], cfg["text_cfg"]
    image = _image_section(vision, quick, reference)
    image |= {key: tuple(preprocess[key]) for key in ("mean", "std") if preprocess.get(key)}
    tree = {
        "embed_dim": cfg["embed_dim"],
        "image": image,
        "text": _text_section(text, quick, reference),
        "init_logit_bias": cfg.get("init_logit_bias"),
    }
    return checked_model(tree, reference)


def guessed_cfg(weights: Weights, quick_gelu: bool, reference: str) -> dict[str, Any]:
    """`model_cfg` by the shapes of a CLIP with ViT alone; what they do not say is guessed: 64 channels a head.

    Args:
        weights: under open_clip's names, which are OpenAI's.
        quick_gelu: OpenAI's models have it.
        reference: names the weights in messages.

    Raises:
        ConfigError: they are no such CLIP's.
    """
    shapes = weights.shapes
    prefix = text_prefix(shapes)
    for name, dimensions in _TELLING.items():
        name = name.format(text=prefix)
        if len(shapes.get(name, ())) != dimensions:
            has = f"has {name} with shape {list(shapes[name])}" if name in shapes else f"lacks {name}"
            raise ConfigError(
                f"{reference} does not say what it is, and its shapes are no CLIP's with ViT: it {has}; put open_clip's "
                f"{CONFIG} beside it"
            )
    width, _, _, patch_size = shapes["visual.conv1.weight"]
    num_tokens = shapes[f"{prefix}token_embedding.weight"][0]
    if num_tokens != _CLIP_TOKENS:
        raise ConfigError(
            f"{reference} does not say which tokenizer it has: it knows {num_tokens:,} tokens, CLIP's has {_CLIP_TOKENS:,}; "
            f"name --architecture, or put open_clip's {CONFIG} beside it"
        )
    text_width = shapes[f"{prefix}ln_final.weight"][0]
    grid = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)

    def num_layers(start: str) -> int:
        return len({name.split(".")[start.count(".")] for name in shapes if name.startswith(start)})

    cfg = {
        "embed_dim": shapes["visual.proj"][1],
        "vision_cfg": {
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "width": width,
            "head_width": _HEAD_WIDTH,
            "layers": num_layers("visual.transformer.resblocks."),
            "mlp_ratio": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0] / width,
        },
        "text_cfg": {
            "context_length": shapes[f"{prefix}positional_embedding"][0],
            "vocab_size": num_tokens,
            "width": text_width,
            "heads": text_width // _HEAD_WIDTH,
            "layers": num_layers(f"{prefix}transformer.resblocks."),
            "mlp_ratio": shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0] / text_width,
        },
        "quick_gelu": quick_gelu,
    }
    return cfg | ({"init_logit_bias": 0.0} if "logit_bias" in shapes else {})


def checked_model(tree: Mapping[str, Any], reference: str) -> ModelConfig:
    """A model's section from what another library says, which `reference` names in messages.

    Raises:
        ConfigError: a value that cannot be.
    """
    try:
        return parse_section(ModelConfig, tree, "model.")
    except ConfigError as error:
        raise ConfigError(f"{reference} describes a model that cannot be:\n{error}") from None


def tower_values(values: PretrainedConfig) -> dict[str, Any]:
    """A transformers configuration as `model.*.config` gives it."""
    names = inspect.signature(CONFIG_MAPPING[values.model_type].__init__).parameters.keys() - {"self", "kwargs"}
    names |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    return {name: value for name in sorted(names) if (value := getattr(values, name, None)) is not None}


def _vision_cfg(tower: ImageTowerConfig, values: PretrainedConfig) -> tuple[dict[str, Any], bool | None]:
    if tower.type == TIMM:
        arguments = {key: value for key, value in (values.model_args or {}).items() if key != "img_size"}
        if arguments or tower.size != default_size(values.architecture):
            raise _misfit(f"it builds {values.architecture} as timm does, without model_args and at timm's own size")
        return {
            "image_size": tower.size,
            "timm_model_name": values.architecture,
            "timm_model_pretrained": False,
            "timm_pool": "" if tower.projection else default_pool(values.architecture),
            "timm_proj": "linear" if tower.projection else "none",
        }, None
    if tower.type != "clip_vision_model":
        has = "it has no such tower"
        if tower.type == "siglip_vision_model":
            has = f"with pooling={tower.pooling} it has no class token, and open_clip's image towers do, which patches see"
        raise _misfit(f"model.image.type={tower.type}: {has}; of ours it has clip_vision_model and {TIMM}")
    quick, act = _activation("image", values.hidden_act)
    cfg = {
        "image_size": tower.size,
        "patch_size": values.patch_size,
        "layers": values.num_hidden_layers,
        "width": values.hidden_size,
        "head_width": values.hidden_size // values.num_attention_heads,
        "mlp_ratio": values.intermediate_size / values.hidden_size,
    }
    return cfg | act | _norm(values.layer_norm_eps), quick


def _text_cfg(tower: TextTowerConfig, values: PretrainedConfig) -> tuple[dict[str, Any], bool | None]:
    if tower.type in HF_TYPES:
        if tower.pooling not in _HF_POOLERS:
            raise _misfit(f"model.text.pooling={tower.pooling}: of {tower.type} it takes {', '.join(_HF_POOLERS)}")
        cfg = {"hf_model_name": tower.type, "hf_model_pretrained": False, "hf_proj_type": "linear"}
        return cfg | {"hf_pooler_type": _HF_POOLERS[tower.pooling], "context_length": tower.context_length}, None
    if tower.type not in ("clip_text_model", "siglip_text_model"):
        raise _misfit(f"model.text.type={tower.type}: its text towers are CLIP's, SigLIP's and {', '.join(HF_TYPES)}")
    if tower.pooling not in (("pooler", "eos") if tower.type == "clip_text_model" else ("pooler",)):
        raise _misfit(f"model.text.pooling={tower.pooling}: it pools the end token of a causal tower, or the last one")
    quick, act = _activation("text", values.hidden_act)
    cfg = {
        "context_length": tower.context_length,
        "vocab_size": values.vocab_size,
        "width": values.hidden_size,
        "heads": values.num_attention_heads,
        "layers": values.num_hidden_layers,
        "mlp_ratio": values.intermediate_size / values.hidden_size,
    }
    if tower.type == "siglip_text_model":
        if values.max_position_embeddings != tower.context_length:
            raise _misfit(
                f"model.text.config.max_position_embeddings={values.max_position_embeddings} is not "
                f"model.text.context_length={tower.context_length}, and the last token is pooled"
            )
        cfg |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    elif values.eos_token_id != values.vocab_size - 1:
        cfg |= {"pool_type": "eos", "eos_id": values.eos_token_id}
    return cfg | act | _norm(values.layer_norm_eps), quick


def _activation(tower: str, name: str) -> tuple[bool, dict[str, Any]]:
    if name not in _ACTIVATIONS:
        raise _misfit(f"model.{tower}.config.hidden_act={name}: it has {', '.join(_ACTIVATIONS)}")
    quick, arguments = _ACTIVATIONS[name]
    return quick, {"act_kwargs": arguments} if arguments else {}


def _norm(eps: float) -> dict[str, Any]:
    return {} if eps == _EPS else {"norm_kwargs": {"eps": eps}}


def _image_section(cfg: Mapping[str, Any], quick: bool, reference: str) -> dict[str, Any]:
    size = cfg.get("image_size", 224)
    size = size if isinstance(size, int) else size[0] if len(set(size)) == 1 else None
    if size is None:
        raise ConfigError(f"{reference} takes images of {cfg['image_size']} pixels: here they are square")
    if "timm_model_name" in cfg:
        _check_keys(cfg, _TIMM_KEYS, "vision_cfg", reference)
        architecture, pool = cfg["timm_model_name"], cfg.get("timm_pool", "avg")
        if fault := unknown_architecture(architecture):
            raise ConfigError(f"{reference} has vision_cfg.timm_model_name={fault}")
        projection = cfg.get("timm_proj", "linear")
        # told another way, open_clip pools behind the norm, and timm in front of it; "" and "none" leave the tokens as they are
        pools = {"linear": ("", default_pool(architecture)), "none": (default_pool(architecture),)}
        if pool not in pools.get(projection, ()):
            raise ConfigError(
                f"{reference} has vision_cfg.timm_pool={pool} and timm_proj={projection}: here {architecture} pools as timm "
                f"does by itself ({default_pool(architecture)}), and one matrix without a bias projects (linear), or none"
            )
        projects = projection == "linear"
        return {"type": TIMM, "size": size, "projection": projects, "config": {"architecture": architecture}}
    if not isinstance(cfg.get("layers", 12), int):
        raise ConfigError(f"{reference} has CLIP's ResNet as its image tower, whose batch norm no tower here has: use a ViT")
    _check_keys(cfg, _VISION_KEYS, "vision_cfg", reference)
    width, head_width, patch_size = cfg.get("width", 768), cfg.get("head_width", _HEAD_WIDTH), cfg.get("patch_size", 16)
    if width % head_width:
        raise ConfigError(f"{reference} has vision_cfg.width={width}, no multiple of head_width={head_width}: mend one")
    if size < patch_size:
        raise ConfigError(f"{reference} has vision_cfg.image_size={size}, below patch_size={patch_size}: mend one")
    values = _layer_values(cfg, width, quick, "vision_cfg", reference) | {"patch_size": patch_size}
    return {"size": size, "config": values | {"num_attention_heads": width // head_width}}


def _text_section(cfg: Mapping[str, Any], quick: bool, reference: str) -> dict[str, Any]:
    length, width = cfg.get("context_length", 77), cfg.get("width", 512)
    if "hf_model_name" in cfg:
        return _hf_section(cfg, reference) | {"context_length": length}
    _check_keys(cfg, _TEXT_KEYS, "text_cfg", reference)
    heads = cfg.get("heads", 8)
    if width % heads:
        raise ConfigError(f"{reference} has text_cfg.width={width}, no multiple of heads={heads}: mend one")
    values = _layer_values(cfg, width, quick, "text_cfg", reference)
    values |= {"num_attention_heads": heads, "max_position_embeddings": length}
    size = cfg.get("vocab_size", _CLIP_TOKENS)
    pooling, causal, bias = cfg.get("pool_type", "argmax"), not cfg.get("no_causal_mask"), bool(cfg.get("proj_bias"))
    end_id = cfg.get("eos_id", 2) if pooling == "eos" else size - 1
    values |= {"vocab_size": size, "bos_token_id": end_id - 1, "eos_token_id": end_id, "pad_token_id": cfg.get("pad_id", 0)}
    if causal and pooling in ("argmax", "eos") and not bias:
        return {"context_length": length, "pooling": "eos", "config": values}
    if not causal and pooling == "last":
        return {"type": "siglip_text_model", "context_length": length, "config": values}
    raise ConfigError(
        f"{reference} has a text tower with no_causal_mask={not causal}, pool_type={pooling}, proj_bias={bias}: here are "
        f"CLIP's (causal, the end token, no bias) and SigLIP's (not causal, the last token)"
    )


def _hf_section(cfg: Mapping[str, Any], reference: str) -> dict[str, Any]:
    _check_keys(cfg, _HF_KEYS | {"context_length"}, "text_cfg", reference)
    poolers = {theirs: ours for ours, theirs in _HF_POOLERS.items()}
    pooler, projection = cfg.get("hf_pooler_type", "mean_pooler"), cfg.get("hf_proj_type", "mlp")
    if pooler not in poolers or projection != "linear":
        raise ConfigError(
            f"{reference} has text_cfg.hf_pooler_type={pooler} and hf_proj_type={projection}: here they are one of "
            f"{', '.join(poolers)}, and linear"
        )
    try:
        values = AutoConfig.from_pretrained(cfg["hf_model_name"], local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{reference} names text_cfg.hf_model_name={cfg['hf_model_name']}, and that is no folder of transformers here: "
            f"download its config.json and set hf_model_name to its folder ({error})"
        ) from error
    if values.model_type not in HF_TYPES:
        raise ConfigError(
            f"{reference} names text_cfg.hf_model_name={cfg['hf_model_name']}, a {values.model_type}: of open_clip's text "
            f"towers from transformers {', '.join(HF_TYPES)} are here"
        )
    return {"type": values.model_type, "pooling": poolers[pooler], "config": tower_values(values)}


def _layer_values(cfg: Mapping[str, Any], width: int, quick: bool, section: str, reference: str) -> dict[str, Any]:
    arguments = dict(cfg.get("act_kwargs") or {})
    acts = [name for name, (is_quick, others) in _ACTIVATIONS.items() if is_quick == quick and others == arguments]
    if not acts:
        raise ConfigError(
            f"{reference} has {section}.act_kwargs={arguments} with quick_gelu={quick}: that is no activation that is known "
            f"here; these are {', '.join(_ACTIVATIONS)}"
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": cfg.get("layers", 12),
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4.0)),
        "hidden_act": acts[0],
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", _EPS),
    }


def _check_keys(cfg: Mapping[str, Any], known: Collection[str], section: str, reference: str) -> None:
    defaults = {"pool_type": "tok", "pos_embed_type": "learnable", "proj_type": "linear", "block_type": "default"}
    others = {key: value for key, value in cfg.items() if key not in known and value and value != defaults.get(key)}
    if others:
        found = ", ".join(f"{section}.{key}={value}" for key, value in others.items())
        raise ConfigError(f"{reference} has {found}: no tower here computes that: models without it can be read")


def _misfit(reason: str) -> ConfigError:
    return ConfigError(f"open_clip cannot hold this model: {reason}")
