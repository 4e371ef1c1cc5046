"""Operations of a forward pass against their formula."""

import torch

from scaleclip.config import DataConfig, ModelConfig
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.planning.counting import count_flops, count_memory

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"size": 32, "config": TOWER | {"patch_size": 8}}
TEXT = {"context_length": 10, "config": TOWER | {"vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}}


def forward_flops(data: DataConfig | None = None, **values) -> int:
    model = ModelConfig.model_validate({"embed_dim": 16, "image": IMAGE, "text": TEXT, **values})
    return count_flops(model, data or DataConfig()).forward


def test_forward_flops_are_those_of_the_matrices() -> None:
    def tower(tokens: int, width: int = 32, mlp: int = 64, layers: int = 2) -> int:
        linears = 2 * tokens * (4 * width * width + 2 * width * mlp)
        attention = 2 * 2 * tokens * tokens * width
        return layers * (linears + attention)

    patches = 2 * 16 * 3 * 8 * 8 * 32
    projection = 2 * 32 * 16
    expected = tower(17) + tower(10) + patches + 2 * projection
    assert forward_flops() == expected
    assert forward_flops(image=IMAGE | {"patch_dropout": 0.5}) == expected - tower(17) + tower(9)
    assert forward_flops(activation_checkpointing=True) == expected
    assert forward_flops(init_logit_bias=-10) == expected
    wide = forward_flops(embed_dim=32)
    assert forward_flops(embed_dim=32, image=IMAGE | {"projection": False}) == wide - 2 * 32 * 32
    three_short_views = forward_flops(DataConfig.model_validate({"views": [{"max_tokens": 6}] * 3}))
    assert three_short_views == expected + 3 * tower(6) - tower(10) + 2 * projection
    bert = {"type": "bert", "context_length": 10, "config": TOWER | {"vocab_size": 100}}
    assert forward_flops(text=bert) == expected + 2 * 32 * 32


def test_a_projection_that_is_not_there_has_no_parameters() -> None:
    def learning(projection: bool) -> int:
        image = IMAGE | {"projection": projection}
        model = ModelConfig.model_validate({"embed_dim": 32, "image": image, "text": TEXT})
        return sum(count_memory(model, DataConfig(), "fp32").learning)

    assert learning(True) - learning(False) == 32 * 32


def test_a_locked_tower_without_a_projection_is_counted() -> None:
    image = IMAGE | {"projection": False, "locked": True}
    model = ModelConfig.model_validate({"embed_dim": 32, "image": image, "text": TEXT})
    text = sum(parameter.numel() for name, parameter in _named_parameters(model) if name.startswith(("text", "logit")))
    assert sum(count_memory(model, DataConfig(), "fp32").learning) == text
    assert count_flops(model, DataConfig()).backward < 3 * count_flops(model, DataConfig()).forward


def _named_parameters(model: ModelConfig) -> list[tuple[str, torch.Tensor]]:
    with torch.device("meta"):
        return list(DualEncoder(model).named_parameters())
