"""ClipLoss and SigLipLoss in one process: open_clip's signatures, results and training; faults.

Over ranks: test_ranks.py.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenClipSigLipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from loss_cases import features
from scaleclip_kernels import ClipLoss, SigLipLoss

LOSSES = {"clip": (ClipLoss, OpenClipLoss), "siglip": (SigLipLoss, OpenClipSigLipLoss)}
both = pytest.mark.parametrize(("ours", "theirs"), LOSSES.values(), ids=LOSSES)

STEPS, BATCH = 20, 24


def shape_of(function: Any) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


@both
def test_constructors_are_open_clips(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    assert shape_of(ours.__init__) == shape_of(theirs.__init__)


def test_forwards_are_open_clips() -> None:
    assert shape_of(ClipLoss.forward) == shape_of(OpenClipLoss.forward)
    expected = shape_of(OpenClipSigLipLoss.forward)
    bias = [name for name, _, _ in expected].index("logit_bias")
    # open_clip asks for the bias, its models may not have one: here it may be left out
    assert expected[bias][2] is inspect.Parameter.empty
    expected[bias] = (*expected[bias][:2], None)
    assert shape_of(SigLipLoss.forward) == expected


@both
@pytest.mark.parametrize("bias", [None, -10.0])
def test_values_and_gradients_are_open_clips(ours: type[nn.Module], theirs: type[nn.Module], bias: float | None) -> None:
    results = []
    for kind in (ours, theirs):
        image, text = (t.requires_grad_() for t in features("random", 100, 64))
        logit_scale = torch.tensor(14.3, requires_grad=True)
        logit_bias = None if bias is None else torch.tensor(bias, requires_grad=True)
        loss = kind()(image, text, logit_scale, logit_bias)
        loss.backward()
        bias_grad = torch.zeros(()) if logit_bias is None or logit_bias.grad is None else logit_bias.grad
        results.append((loss.detach(), image.grad, text.grad, logit_scale.grad, bias_grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("bias", [None, torch.tensor(-10.0)])
def test_output_dict(ours: type[nn.Module], theirs: type[nn.Module], bias: Tensor | None) -> None:
    inputs = (*features("random", 10, 8), torch.tensor(14.3), bias)
    got, expected = (kind()(*inputs, output_dict=True) for kind in (ours, theirs))
    assert got.keys() == expected.keys() == {"contrastive_loss"}
    torch.testing.assert_close(got["contrastive_loss"], expected["contrastive_loss"])
    torch.testing.assert_close(ours()(*inputs), got["contrastive_loss"], rtol=0, atol=0)


@both
def test_scalars_in_bf16_or_with_one_element(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    """A bf16 model hands over bf16 scalars: taken as the numbers they are, and given gradients of their dtype."""
    image, text = features("random", 10, 8)
    for dtype, shape in ((torch.bfloat16, ()), (torch.bfloat16, (1,)), (torch.float32, (1,))):
        logit_scale = torch.full(shape, 14.3, dtype=dtype, requires_grad=True)
        logit_bias = torch.full(shape, -9.9, dtype=dtype, requires_grad=True)
        loss = ours()(image, text, logit_scale, logit_bias)
        loss.backward()
        assert loss.shape == ()
        expected = theirs()(image, text, logit_scale.detach().float(), logit_bias.detach().float())
        torch.testing.assert_close(loss, expected.reshape(()))
        for scalar in (logit_scale, logit_bias):
            assert scalar.grad is not None
            assert (scalar.grad.dtype, scalar.grad.shape) == (dtype, shape)


def test_bias_of_clip_gets_a_zero_gradient() -> None:
    """All logits move alike. DistributedDataParallel waits for a gradient of every parameter."""
    image, text = features("random", 10, 8)
    logit_bias = torch.tensor(-10.0, requires_grad=True)
    loss = ClipLoss()(image, text, torch.tensor(14.3), logit_bias)
    loss.backward()
    assert loss == ClipLoss()(image, text, torch.tensor(14.3))
    assert logit_bias.grad == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_low_precision_features(ours: type[nn.Module], theirs: type[nn.Module], dtype: torch.dtype) -> None:
    """Logits are never rounded: the loss is that of the features' exact values."""
    image, text = (t.to(dtype) for t in features("random", 50, 64))
    scalars = (torch.tensor(100.0), torch.tensor(-10.0))
    loss = ours()(image, text, *scalars)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, theirs()(image.float(), text.float(), *scalars))


@both
def test_features_of_two_dtypes(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    """One tower in bf16 and one in fp32: neither is rounded, and each gets gradients of its dtype."""
    image, text = features("random", 50, 64)
    image, text = image.bfloat16().requires_grad_(), text.requires_grad_()
    scalars = (torch.tensor(14.3), torch.tensor(-10.0))
    loss = ours()(image, text, *scalars)
    loss.backward()
    torch.testing.assert_close(loss, theirs()(image.float(), text, *scalars))
    assert image.grad is not None
    assert text.grad is not None
    assert (image.grad.dtype, text.grad.dtype) == (torch.bfloat16, torch.float32)


def tiny_model(**options: Any) -> CLIP:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True, **options)


def train(loss: nn.Module, **options: Any) -> list[float]:
    """Losses of 20 steps as open_clip's train_one_epoch takes them, on noise."""
    model = tiny_model(**options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    noise = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 16, 16, generator=noise)
        texts = torch.randint(1, 64, (BATCH, 8), generator=noise)
        optimizer.zero_grad()
        model_out = model(images, texts)
        terms = loss(**model_out, output_dict=True)
        total_loss = sum(terms.values())
        total_loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        losses.append(total_loss.item())
    return losses


@both
def test_training_of_open_clip(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    """A one-line swap: the same losses at each of 20 steps."""
    # as open_clip's configurations of SigLIP have them
    options = {"init_logit_scale": 2.3026, "init_logit_bias": -10.0} if ours is SigLipLoss else {}
    expected, got = train(theirs(), **options), train(ours(), **options)
    assert max(expected) - min(expected) > 1e-2  # it does train
    assert got == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@both
def test_ranks_without_a_process_group(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    inputs = (*features("random", 10, 8), torch.tensor(14.3), torch.tensor(-10.0))
    message = r"world_size=2, but the default process group has 0 ranks .*call torch.distributed.init_process_group first"
    with pytest.raises(ValueError, match=message):
        ours(rank=1, world_size=2)(*inputs)


@both
@pytest.mark.usefixtures("group_of_one")
def test_ranks_of_another_number(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    inputs = (*features("random", 10, 8), torch.tensor(14.3), torch.tensor(-10.0))
    with pytest.raises(ValueError, match="world_size=2, but the default process group has 1 ranks"):
        ours(world_size=2)(*inputs)
    assert ours(world_size=1)(*inputs).isfinite()


def test_horovod_is_refused() -> None:
    with pytest.raises(ValueError, match="use_horovod=True is not supported: start ranks with torchrun or srun"):
        ClipLoss(use_horovod=True)


@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather", None])
def test_every_dist_impl_of_open_clip_is_taken(dist_impl: str | None) -> None:
    inputs = (*features("random", 10, 8), torch.tensor(14.3), torch.tensor(-10.0))
    OpenClipSigLipLoss(dist_impl=dist_impl)
    assert SigLipLoss(dist_impl=dist_impl)(*inputs) == SigLipLoss()(*inputs)


def test_unknown_dist_impl_is_named() -> None:
    with pytest.raises(ValueError, match="dist_impl='ring' is not one of bidir, shift, reduce, gather"):
        SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("options", [{"local_loss": True}, {"gather_with_grad": True}, {"cache_labels": True, "rank": 0}])
def test_options_that_change_nothing(options: dict[str, Any]) -> None:
    inputs = (*features("random", 10, 8), torch.tensor(14.3))
    assert ClipLoss(**options)(*inputs) == ClipLoss()(*inputs)


def test_open_clip_builds_what_this_replaces() -> None:
    """open_clip.create_loss hands these arguments to the two classes."""
    source = inspect.getsource(open_clip.create_loss)
    for kind, names in ((ClipLoss, ("local_loss", "gather_with_grad", "use_horovod")), (SigLipLoss, ("dist_impl",))):
        for name in (*names, "cache_labels", "rank", "world_size"):
            assert f"{name}=" in source
            assert name in inspect.signature(kind).parameters
