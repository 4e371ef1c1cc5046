"""CLIPS' caption decoder (arXiv:2411.16828): writes a caption of an image and of a first text about it, all tokens at once.

A transformer of the text tower's size reads

    [image tokens ; text tokens ; queries]

where image and text tokens, the prefix, see each other, and a learned query for every token of the caption sees the prefix and
the queries up to itself.

Dimensions: B samples, N image tokens, T text tokens, P = N + T tokens of the prefix, Q queries, L = P + Q, S = Q + 1 tokens of
a caption, D values of a state (of `image_width` in image tokens, else of the decoder's width).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, PretrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from scaleclip.config import CaptionDecoderConfig
from scaleclip.errors import ConfigError
from scaleclip.models.clip_init import TOKEN_STD, initialise_clip_text_layers
from scaleclip.models.token_loss import best_tokens, token_loss

# what every text tower has, and names under which some have the rest
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "activation")
_NORM_EPS = ("layer_norm_eps", "norm_eps", "layer_norm_epsilon")
_MLP_WIDTH = ("intermediate_size", "hidden_dim", "d_ff")

# of the rows of a mask, in elements: at any other stride PyTorch's fused attention copies the mask in every layer
_MASK_ALIGNMENT = 16


class CaptionDecoder(nn.Module):
    """The decoder and its loss.

    Layers are those of CLIP's text tower and start as they do. Every parameter is used in the forward pass of the module that
    owns it, so that ZeRO-3 can hold the whole of it just then. Under `torch.device("meta")` it has shapes and no values.

    Args:
        config: number of queries, and whether each is shown the true token before its own.
        text: configuration of the text tower's body, whose width, depth, heads and vocabulary the decoder takes.
        image_width: values of an image token.
        checkpointing: recompute the activations of the layers in the backward pass instead of storing them.

    Raises:
        ConfigError: a decoder cannot be made like this text tower.
    """

    def __init__(
        self, config: CaptionDecoderConfig, text: PretrainedConfig, image_width: int, checkpointing: bool = False
    ) -> None:
        super().__init__()
        layers = _layers_like(text)
        width, vocabulary = layers.hidden_size, layers.vocab_size
        self.num_queries = config.queries
        self.image_projection = _projection(image_width, width)
        self.text_projection = _projection(width, width)
        # not a bare parameter: `generate` reads them outside of the decoder's forward pass
        self.queries = _embedding(config.queries, width)
        self.token_embedding = _embedding(vocabulary, width) if config.teacher_forced else None
        self.encoder = CLIPEncoder(layers)
        initialise_clip_text_layers(self.encoder)
        if checkpointing:
            # as gradient_checkpointing_enable does, which only whole models of transformers have
            for layer in self.encoder.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.norm = nn.LayerNorm(width, eps=layers.layer_norm_eps)
        self.head = _Head(width, vocabulary)
        self._unseen: dict[tuple[int, torch.device], Tensor] = {}

    def forward(
        self, image_BND: Tensor, text_BTD: Tensor, text_mask_BT: Tensor, captions_BS: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """Sum over the batch of the cross-entropies of the captions' tokens, fp32 ().

        Args:
            image_BND: the image tower's tokens.
            text_BTD: the text tower's states of the text that is read.
            text_mask_BT: bool, False at its padding, which may hold anything.
            captions_BS: int64, the text that is written: start token, the caption with its end token, then anything.
            lengths_B: int64, tokens that count of each caption: all but start token and padding, at most Q. 0 makes a sample
                invalid: it may hold anything, NaN included, and has no part in loss and gradients.
        """
        assert captions_BS.shape[1] == self.num_queries + 1, (captions_BS.shape, self.num_queries)
        valid_B = lengths_B > 0
        # zeros, not only a mask: what nobody sees is still multiplied, and NaN * 0 is NaN
        image_BND = image_BND.masked_fill(~valid_B[:, None, None], 0)
        counted_BQ = torch.arange(self.num_queries, device=lengths_B.device) < lengths_B.unsqueeze(1)
        states_BQD = self._states(
            image_BND, text_BTD, text_mask_BT & valid_B.unsqueeze(1), captions_BS[:, :-1].masked_fill(~counted_BQ, 0)
        )
        loss: Tensor = self.head(states_BQD.flatten(0, 1), captions_BS[:, 1:].flatten(), counted_BQ.flatten())
        return loss

    @torch.no_grad()
    def generate(self, image_BND: Tensor, text_BTD: Tensor, text_mask_BT: Tensor, start_id: int, end_id: int) -> Tensor:
        """Captions of the likeliest tokens, int64 [B, Q]: without the start token, `end_id` from the end token on.

        With `teacher_forced` a token at a time, each by a pass over everything. For other arguments see `forward`.
        """
        ids_BQ = torch.full((len(image_BND), self.num_queries), start_id, device=image_BND.device)
        if self.token_embedding is None:
            ids_BQ = self._next(image_BND, text_BTD, text_mask_BT, ids_BQ)
        else:
            shown_BQ = ids_BQ.clone()
            for query in range(self.num_queries):
                # queries do not see later ones, nor do they see what these are shown
                ids_BQ = self._next(image_BND, text_BTD, text_mask_BT, shown_BQ)
                shown_BQ[:, query + 1 :] = ids_BQ[:, query, None]
        ended_BQ = (ids_BQ == end_id).int().cummax(1).values.bool()
        return ids_BQ.masked_fill(ended_BQ, end_id)

    def _next(self, image_BND: Tensor, text_BTD: Tensor, text_mask_BT: Tensor, shown_BQ: Tensor) -> Tensor:
        """The likeliest tokens of all queries, int64 [B, Q]."""
        states_BQD = self._states(image_BND, text_BTD, text_mask_BT, shown_BQ)
        ids_BQ: Tensor = self.head(states_BQD.flatten(0, 1)).view(shown_BQ.shape)
        return ids_BQ

    def _states(self, image_BND: Tensor, text_BTD: Tensor, text_mask_BT: Tensor, shown_BQ: Tensor) -> Tensor:
        """The normalised states of the queries [B, Q, D], which `teacher_forced` shows the tokens `shown_BQ` (int64)."""
        text_BTD = text_BTD.masked_fill(~text_mask_BT.unsqueeze(-1), 0)
        prefix_BPD = torch.cat([self.image_projection(image_BND), self.text_projection(text_BTD)], dim=1)
        queries_BQD = self.queries(torch.arange(self.num_queries, device=shown_BQ.device)).expand(len(shown_BQ), -1, -1)
        if self.token_embedding is not None:
            queries_BQD = queries_BQD + self.token_embedding(shown_BQ)
        sequence_BLD = torch.cat([prefix_BPD, queries_BQD], dim=1)
        mask_B1LL = self._attention_mask(text_mask_BT, image_BND.shape[1], _compute_dtype(sequence_BLD))
        states_BLD = self.encoder(sequence_BLD, attention_mask=mask_B1LL).last_hidden_state
        states_BQD: Tensor = self.norm(states_BLD[:, prefix_BPD.shape[1] :])
        return states_BQD

    def _attention_mask(self, text_mask_BT: Tensor, num_image: int, dtype: torch.dtype) -> Tensor:
        """What is added to the logits of attention, [B, 1, L, L]: 0 where a row's token sees a column's, else -inf.

        Numbers of attention's own type: a bool mask would be turned into them, and kept for the backward pass, in every layer.
        """
        num_samples, num_text = text_mask_BT.shape
        unseen_LL = self._unseen_of(num_image + num_text, text_mask_BT.device)
        size = len(unseen_LL)
        stride = -(-size // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
        mask_B1LL = torch.zeros(num_samples, 1, size, stride, dtype=dtype, device=text_mask_BT.device)[..., :size]
        mask_B1LL.masked_fill_(unseen_LL, -torch.inf)
        mask_B1LL[..., num_image : num_image + num_text].masked_fill_(~text_mask_BT[:, None, None], -torch.inf)
        return mask_B1LL

    def _unseen_of(self, num_prefix: int, device: torch.device) -> Tensor:
        """bool [L, L]: which columns a row does not see, padding aside."""
        if (num_prefix, device) not in self._unseen:
            place_L = torch.arange(num_prefix + self.num_queries, device=device)
            later_LL = place_L.unsqueeze(0) > place_L.unsqueeze(1)
            self._unseen[num_prefix, device] = later_LL & (place_L >= num_prefix)
        return self._unseen[num_prefix, device]


class _Head(nn.Module):
    """From states to words. The loss is part of it because it needs the whole weight without ever making all logits."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, states_ND: Tensor, targets_N: Tensor | None = None, counted_N: Tensor | None = None) -> Tensor:
        """The loss of the targets that count, or without any the likeliest words, int64 [N] (N: all tokens of a batch)."""
        if targets_N is None:
            return best_tokens(states_ND, self.weight)
        assert counted_N is not None
        return token_loss(states_ND, self.weight, targets_N, counted_N)


def _layers_like(text: PretrainedConfig) -> CLIPTextConfig:
    if missing := [name for name in _NEEDED if not hasattr(text, name)]:
        raise ConfigError(
            f"model.caption_decoder takes {', '.join(missing)} from the text tower, and model.text.type={text.model_type} has "
            f"none; use another tower, or no decoder"
        )
    if text.hidden_size % text.num_attention_heads:
        raise ConfigError(
            f"model.caption_decoder takes its sizes from the text tower, but model.text.config.hidden_size={text.hidden_size} "
            f"is not a multiple of num_attention_heads={text.num_attention_heads}: change one, or use no decoder"
        )
    return CLIPTextConfig(
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        intermediate_size=_first(text, _MLP_WIDTH, 4 * text.hidden_size),
        vocab_size=text.vocab_size,
        hidden_act=_first(text, _ACTIVATION, "gelu"),
        layer_norm_eps=_first(text, _NORM_EPS, 1e-5),
        attn_implementation="sdpa",
    )


def _first(values: PretrainedConfig, names: tuple[str, ...], default: Any) -> Any:
    return next((getattr(values, name) for name in names if getattr(values, name, None) is not None), default)


def _projection(width_in: int, width_out: int) -> nn.Linear:
    # its bias tells image from text tokens
    projection = nn.Linear(width_in, width_out)
    nn.init.normal_(projection.weight, std=width_in**-0.5)
    nn.init.zeros_(projection.bias)
    return projection


def _embedding(num: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(num, width)
    nn.init.normal_(embedding.weight, std=TOKEN_STD)
    return embedding


def _compute_dtype(states: Tensor) -> torch.dtype:
    device_type = states.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states.dtype
