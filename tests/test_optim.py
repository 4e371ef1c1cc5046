"""What decays, how fast each group learns, and what reaches AdamW."""

from typing import Any

import pytest
import torch
from torch import nn

from scaleclip.config import ModelConfig, OptimConfig, TrainConfig
from scaleclip.config_io import load_config
from scaleclip.errors import ConfigError
from scaleclip.models.depth import depth_groups
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.optim import build_optimizer, parameter_groups, set_learning_rate
from scaleclip.schedule import learning_rate


def tiny_model(**values: Any) -> ModelConfig:
    """Towers of two layers each: groups 0 to 3."""
    tree = load_config("configs/demo.yaml", ["model=tiny"]).model.model_dump()
    for key, value in values.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    return ModelConfig.model_validate(tree)


def optim_config(**values: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.1, "weight_decay": 0.3, **values})


def names_by_group(model: DualEncoder, optim: OptimConfig) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, optim)
    assert all(group["params"] for group in groups), "DeepSpeed breaks on an empty group"
    assert len({group["name"] for group in groups}) == len(groups)
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)), "no parameter stands in two groups"
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def lr_scales(model: DualEncoder, optim: OptimConfig) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr_scale"] for group in parameter_groups(model, optim) for p in group["params"]}


def test_what_decays() -> None:
    model = DualEncoder(tiny_model(init_logit_bias=-10.0))
    grouped = names_by_group(model, optim_config())
    assert list(grouped) == ["decay", "no_decay", "logit_scale"]
    assert set().union(*grouped.values()) == {name for name, _ in model.named_parameters()}
    assert grouped["logit_scale"] == {"logit_scale"}
    decays = {group["name"]: group["weight_decay"] for group in parameter_groups(model, optim_config())}
    assert decays == {"decay": 0.3, "no_decay": 0.0, "logit_scale": 0.0}
    assert all("bias" not in name and "norm" not in name for name in grouped["decay"])
    assert "image_projection.weight" in grouped["decay"]
    assert "logit_bias" in grouped["no_decay"]


def test_a_shard_decays_like_the_whole() -> None:
    """ZeRO-3 leaves an empty vector in a parameter's place and its shape in `ds_shape`."""
    model = DualEncoder(tiny_model())
    optim = optim_config(image={"layer_decay": 0.5})
    expected = names_by_group(model, optim)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names_by_group(model, optim) == expected


def test_learning_rates_of_towers() -> None:
    model = DualEncoder(tiny_model(init_logit_bias=-10.0))
    scales = lr_scales(model, optim_config(image={"lr_scale": 0.25}, text={"lr_scale": 2.0}))
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, scale in scales.items():
        assert scale == {"image": 0.25, "text": 2.0, "logit": 1.0}[name.split(".")[0].split("_")[0]], name


def test_learning_rates_fall_towards_the_input() -> None:
    model = DualEncoder(tiny_model())
    scales = lr_scales(model, optim_config(image={"layer_decay": 0.5, "lr_scale": 0.1}))
    image = "image.body.vision_model."
    assert scales["image_projection.weight"] == scales[f"{image}post_layernorm.bias"] == 0.1
    assert scales[f"{image}encoder.layers.1.mlp.fc1.weight"] == 0.05
    assert scales[f"{image}encoder.layers.0.layer_norm1.weight"] == 0.025
    assert scales[f"{image}embeddings.class_embedding"] == scales[f"{image}pre_layrnorm.weight"] == 0.0125
    assert all(scale == 1 for name, scale in scales.items() if not name.startswith("image"))


def test_the_order_of_groups() -> None:
    """Decay first, the logit scale last, and within each from the fastest: on every rank and after every start."""
    model = DualEncoder(tiny_model(text={"locked": True}))
    groups = parameter_groups(model, optim_config(image={"layer_decay": 0.5}, text={"lr_scale": 0.5}))
    assert [group["name"] for group in groups] == [
        "decay", "decay x 0.5", "decay x 0.25", "decay x 0.125",
        "no_decay", "no_decay x 0.5", "no_decay x 0.25", "no_decay x 0.125", "logit_scale",
    ]  # fmt: skip
    assert [group["weight_decay"] for group in groups] == [0.3] * 4 + [0.0] * 5


def test_what_is_locked_is_in_no_group() -> None:
    model = DualEncoder(tiny_model(image={"locked": True}, text={"locked": True}))
    assert names_by_group(model, optim_config()) == {
        "decay": {"image_projection.weight", "text_projection.weight"},
        "logit_scale": {"logit_scale"},
    }


def test_the_learning_rate_reaches_adamw() -> None:
    """A first step of AdamW without decay is lr x sign(gradient)."""
    torch.manual_seed(0)
    model = DualEncoder(tiny_model(init_logit_scale=10.0))
    optim = optim_config(weight_decay=0.0, eps=1e-30, image={"layer_decay": 0.5}, text={"lr_scale": 3.0})
    adamw = build_optimizer(model, optim)
    scales = lr_scales(model, optim)
    assert {group["lr"] for group in adamw.param_groups} == {0.1 * scale for scale in scales.values()}
    set_learning_rate(adamw, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    for name, parameter in model.named_parameters():
        step = torch.full_like(parameter, 0.01 * scales[name])
        torch.testing.assert_close(
            before[name] - parameter.detach(), step, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("gradient", "log_scale"), [(1.0, 0.0), (-1.0, 3.0)])
def test_a_step_ends_with_the_logit_scale_within_its_bounds(gradient: float, log_scale: float) -> None:
    model = DualEncoder(tiny_model(init_logit_scale=10.0))
    model.log_max_logit_scale = 3.0
    adamw = build_optimizer(model, optim_config(lr=5.0))
    model.logit_scale.grad = torch.full_like(model.logit_scale, gradient)
    adamw.step()
    assert model.logit_scale.item() == log_scale


def test_a_tower_without_layers_has_no_layer_decay() -> None:
    model = DualEncoder(tiny_model())
    model.text.body.text_model.encoder.layers = nn.ModuleList([nn.Linear(2, 2)])
    assert depth_groups(model.text.body).num_groups == 1
    assert set(lr_scales(model, optim_config(text={"lr_scale": 0.5})).values()) == {0.5, 1.0}
    with pytest.raises(ConfigError, match=r"optim\.text\.layer_decay=0\.9: no layers were found"):
        parameter_groups(model, optim_config(text={"layer_decay": 0.9}))


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    optim, train = OptimConfig(lr=2.0, final_lr=0.2, warmup_samples=40), TrainConfig(global_batch=10, samples=240)
    rates = [learning_rate(step, optim, train) for step in range(train.steps + 1)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.1)
    assert rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert TrainConfig(global_batch=10, samples=241).steps == 25
