"""Initialisation of CLIP (arXiv:2103.00020) for the CLIP towers of transformers, whose own differs.

Width w, L layers. Text tower: token embeddings N(0, 0.02), positions N(0, 0.01); in each layer query, key, value
N(0, w^-1/2), attention output and second MLP matrix N(0, (2 w L)^-1/2), first MLP matrix N(0, (2 w)^-1/2).
(N(0, s): normal with standard deviation s.)
Image tower: class token and positions N(0, w^-1/2); query, key, value as one 3w x w matrix by Xavier's uniform rule,
every other matrix U(-b, b) with b = fan_in^-1/2. Biases in both: 0 in attention, U(-b, b) in the MLP.
"""

import math

from torch import nn
from transformers import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPEncoder

TOKEN_STD = 0.02


def initialise_clip_text_tower(body: PreTrainedModel) -> None:
    """In place, for a CLIPTextModel."""
    tower = body.text_model
    nn.init.normal_(tower.embeddings.token_embedding.weight, std=TOKEN_STD)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.01)
    initialise_clip_text_layers(tower.encoder)


def initialise_clip_text_layers(encoder: CLIPEncoder) -> None:
    """In place, for the layers of a text tower or of a decoder that is made like one."""
    width, num_layers = encoder.config.hidden_size, encoder.config.num_hidden_layers
    for layer in encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        stds = {
            attention.q_proj: width**-0.5,
            attention.k_proj: width**-0.5,
            attention.v_proj: width**-0.5,
            attention.out_proj: (2 * width * num_layers) ** -0.5,
            mlp.fc1: (2 * width) ** -0.5,
            mlp.fc2: (2 * width * num_layers) ** -0.5,
        }
        for linear, std in stds.items():
            linear.reset_parameters()
            nn.init.normal_(linear.weight, std=std)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            nn.init.zeros_(linear.bias)


def initialise_clip_image_tower(body: PreTrainedModel) -> None:
    """In place, for a CLIPVisionModel."""
    tower = body.vision_model
    width = body.config.hidden_size
    nn.init.normal_(tower.embeddings.class_embedding, std=width**-0.5)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=width**-0.5)
    tower.embeddings.patch_embedding.reset_parameters()
    bound = math.sqrt(6 / (width + 3 * width))
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)
        for linear in (attention.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            linear.reset_parameters()
        nn.init.zeros_(attention.out_proj.bias)
