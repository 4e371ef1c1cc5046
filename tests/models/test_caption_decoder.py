import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, CLIPTextConfig, GPT2Config, MambaConfig, ModernBertConfig, PretrainedConfig

from scaleclip.config import CaptionDecoderConfig
from scaleclip.errors import ConfigError
from scaleclip.models.caption_decoder import CaptionDecoder

IMAGE_WIDTH, WIDTH, HEADS, WORDS = 12, 16, 2, 37
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": WORDS}
NUM_IMAGE, NUM_TEXT, QUERIES = 4, 6, 5
START, END, PAD = 1, 2, 0

both_ways = pytest.mark.parametrize("teacher_forced", [False, True], ids=["all at once", "teacher-forced"])


class Batch(NamedTuple):
    image: Tensor
    text: Tensor
    text_mask: Tensor
    captions: Tensor
    lengths: Tensor


def make_decoder(
    teacher_forced: bool, dtype: torch.dtype = torch.float64, checkpointing: bool = False, queries: int = QUERIES
) -> CaptionDecoder:
    torch.manual_seed(0)
    config = CaptionDecoderConfig(queries=queries, teacher_forced=teacher_forced)
    text = CLIPTextConfig(**SIZES, intermediate_size=40)
    decoder = CaptionDecoder(config, text, IMAGE_WIDTH, checkpointing).to(dtype)
    with torch.no_grad():
        # norms and biases that are not those of the start, and queries that attention tells apart
        for parameter in decoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return decoder


def make_batch(dtype: torch.dtype = torch.float64, queries: int = QUERIES) -> Batch:
    """The caption of the third sample is as long as may be, the second sample is invalid."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, NUM_IMAGE, IMAGE_WIDTH, dtype=dtype, generator=generator)
    text = torch.randn(4, NUM_TEXT, WIDTH, dtype=dtype, generator=generator)
    text_mask = torch.arange(NUM_TEXT) < torch.tensor([3, 5, 6, 1]).unsqueeze(1)
    lengths = torch.tensor([2, 0, queries, 4])
    captions = torch.randint(3, WORDS, (4, queries + 1), generator=generator)
    captions[:, 0] = START
    captions[torch.arange(4), lengths] = END
    captions[torch.arange(queries + 1) > lengths.unsqueeze(1)] = PAD
    return Batch(image, text, text_mask, captions, lengths)


def naive_states(decoder: CaptionDecoder, image: Tensor, text: Tensor, shown: list[int] | None) -> Tensor:
    """Normalised states of the queries for one sample without padding."""
    weights = dict(decoder.named_parameters())

    def linear(name: str, states: Tensor) -> Tensor:
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, states: Tensor) -> Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    queries = weights["queries.weight"]
    if shown is not None:
        queries = queries + weights["token_embedding.weight"][shown]
    states = torch.cat([linear("image_projection", image), linear("text_projection", text), queries])
    num_prefix = len(image) + len(text)
    for layer in ("encoder.layers.0", "encoder.layers.1"):
        normed = norm(f"{layer}.layer_norm1", states)
        query, key, value = (linear(f"{layer}.self_attn.{name}_proj", normed) for name in "qkv")
        attended = []
        for row in range(len(states)):
            columns = num_prefix if row < num_prefix else row + 1
            heads = []
            for head in torch.arange(WIDTH).chunk(HEADS):
                logits = key[:columns, head] @ query[row, head] / math.sqrt(len(head))
                heads.append(logits.softmax(0) @ value[:columns, head])
            attended.append(torch.cat(heads))
        states = states + linear(f"{layer}.self_attn.out_proj", torch.stack(attended))
        hidden = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", states))
        states = states + linear(f"{layer}.mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))
    return norm("norm", states[num_prefix:])


def naive_logits(decoder: CaptionDecoder, batch: Batch, sample: int, shown: list[int]) -> Tensor:
    text = batch.text[sample][batch.text_mask[sample]]
    seen = None if decoder.token_embedding is None else shown
    return naive_states(decoder, batch.image[sample], text, seen) @ decoder.head.weight.T


def naive_loss(decoder: CaptionDecoder, batch: Batch) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for sample, length in enumerate(batch.lengths.tolist()):
        caption = batch.captions[sample].tolist()
        if length:
            logits = naive_logits(decoder, batch, sample, caption[:-1])
            loss = loss - sum(logits[t].log_softmax(0)[caption[t + 1]] for t in range(length))
    return loss


def naive_captions(decoder: CaptionDecoder, batch: Batch, end: int | None) -> list[list[int]]:
    captions = []
    for sample in range(len(batch.image)):
        written: list[int] = []
        while len(written) < decoder.num_queries and end not in written:
            shown = [START, *written]
            logits = naive_logits(decoder, batch, sample, shown + [PAD] * (decoder.num_queries - len(shown)))
            written.append(int(logits[len(written)].argmax()))
        captions.append(written + [end or -1] * (decoder.num_queries - len(written)))
    return captions


def query_states(decoder: CaptionDecoder, batch: Batch) -> Tensor:
    """What the head is given of every query, [B, Q, D]."""
    seen: list[Tensor] = []
    with decoder.norm.register_forward_hook(lambda module, args, states: seen.append(states)), torch.no_grad():
        decoder(*batch)
    return seen[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@both_ways
def test_loss_and_gradients_are_those_of_the_definition(teacher_forced: bool, checkpointing: bool) -> None:
    decoder = make_decoder(teacher_forced, checkpointing=checkpointing)
    batch = make_batch()
    inputs = [batch.image.requires_grad_(), batch.text.requires_grad_(), *decoder.parameters()]
    expected, loss = naive_loss(decoder, batch), decoder(*batch)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients, expected_gradients = (torch.autograd.grad(3 * each, inputs) for each in (loss, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)
    # but for its rows of words that nobody is shown, no parameter is idle
    assert all((gradient != 0).any() for gradient in gradients)


def test_who_sees_whom() -> None:
    decoder, batch = make_decoder(teacher_forced=False), make_batch()
    masks: list[Tensor] = []
    for layer in decoder.encoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    decoder(*batch)
    num_prefix = NUM_IMAGE + NUM_TEXT
    first, second = masks
    assert first is second
    assert first.shape == (4, 1, num_prefix + QUERIES, num_prefix + QUERIES)
    assert first.dtype == torch.float64
    # no copies in PyTorch's fused attention
    assert all(stride % 16 == 0 for stride in first.stride()[:-1])
    for sample, length in enumerate([3, 0, 6, 1]):  # of the texts; the second sample is invalid
        for row in range(num_prefix + QUERIES):
            for column in range(num_prefix + QUERIES):
                if column < NUM_IMAGE:
                    sees = True
                elif column < num_prefix:
                    sees = column - NUM_IMAGE < length
                else:
                    sees = row >= column
                assert first[sample, 0, row, column] == (0 if sees else -math.inf), (sample, row, column)


def test_the_mask_is_made_once_a_size() -> None:
    decoder, batch = make_decoder(teacher_forced=False), make_batch()
    decoder(*batch)
    (unseen,) = decoder._unseen.values()
    decoder(*batch)
    decoder(*batch._replace(image=batch.image[:, :2]))
    assert next(iter(decoder._unseen.values())) is unseen
    assert [len(mask) for mask in decoder._unseen.values()] == [15, 13]
    assert not any("unseen" in name for name in decoder.state_dict())


@both_ways
def test_a_query_sees_true_tokens_up_to_the_one_before_its_own(teacher_forced: bool) -> None:
    decoder, batch = make_decoder(teacher_forced), make_batch()
    states = query_states(decoder, batch)[2]  # the longest
    for place in range(QUERIES + 1):
        captions = batch.captions.clone()
        captions[2, place] = 9 if captions[2, place] != 9 else 10
        change = (query_states(decoder, batch._replace(captions=captions))[2] - states).abs().amax(1)
        first = place if teacher_forced else QUERIES
        assert (change[:first] == 0).all()
        assert (change[first:] > 1e-4).all()


@both_ways
def test_padding_has_no_part(teacher_forced: bool) -> None:
    decoder, batch = make_decoder(teacher_forced), make_batch()
    expected = decoder(*batch)
    captions = batch.captions.masked_fill(torch.arange(QUERIES + 1) > batch.lengths.unsqueeze(1), WORDS + 100)
    text = batch.text.masked_fill(~batch.text_mask.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(decoder(*batch._replace(text=text, captions=captions)), expected, rtol=0, atol=0)
    # nor does it matter how much there is
    longer = batch._replace(text=F.pad(batch.text, (0, 0, 0, 3), value=7.0), text_mask=F.pad(batch.text_mask, (0, 3)))
    torch.testing.assert_close(decoder(*longer), expected, rtol=1e-12, atol=0)


@both_ways
def test_invalid_samples_have_no_part(teacher_forced: bool) -> None:
    decoder, batch = make_decoder(teacher_forced), make_batch()
    parameters = list(decoder.parameters())
    valid = batch.lengths > 0
    without = Batch(*(value[valid] for value in batch))
    expected = decoder(*without)
    expected_gradients = torch.autograd.grad(expected, parameters)
    image, text, captions = batch.image.clone(), batch.text.clone(), batch.captions.clone()
    image[~valid], text[~valid], captions[~valid] = torch.nan, torch.nan, -5
    spoilt = batch._replace(image=image.requires_grad_(), text=text.requires_grad_(), captions=captions)
    for text_mask in (batch.text_mask, batch.text_mask & valid.unsqueeze(1)):
        loss = decoder(*spoilt._replace(text_mask=text_mask))
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        image_gradient, text_gradient, *gradients = torch.autograd.grad(loss, (image, text, *parameters))
        torch.testing.assert_close(tuple(gradients), expected_gradients, rtol=1e-10, atol=1e-12)
        assert (image_gradient[~valid] == 0).all()
        assert (text_gradient[~valid] == 0).all()
    nothing = spoilt._replace(image=image * torch.nan, text=text * torch.nan, lengths=torch.zeros_like(batch.lengths))
    loss = decoder(*nothing)
    assert loss == 0
    # every parameter takes part all the same: ZeRO waits for the gradients of all
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, parameters))


@both_ways
def test_generate_takes_the_likeliest_tokens(teacher_forced: bool) -> None:
    decoder, batch = make_decoder(teacher_forced, queries=8), make_batch(queries=8)
    endless = naive_captions(decoder, batch, end=None)
    end = endless[0][3]
    # a caption that would go on with something else, and one that goes on to the last query
    assert any(end in caption and set(caption[caption.index(end) :]) != {end} for caption in endless)
    assert any(end not in caption for caption in endless)
    recorded: list[bool] = []
    decoder.norm.register_forward_hook(lambda module, args, states: recorded.append(states.requires_grad))
    captions = decoder.generate(*batch[:3], START, end)
    assert not any(recorded)  # nothing for a backward pass
    assert len(recorded) == (8 if teacher_forced else 1)
    assert captions.dtype == torch.int64
    assert captions.tolist() == naive_captions(decoder, batch, end)


@both_ways
def test_a_batch_can_be_learnt_by_heart(teacher_forced: bool) -> None:
    torch.manual_seed(0)
    config = CaptionDecoderConfig(queries=QUERIES, teacher_forced=teacher_forced)
    decoder = CaptionDecoder(config, CLIPTextConfig(**SIZES, intermediate_size=40), IMAGE_WIDTH)
    batch = make_batch(torch.float32)
    adamw = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    loss = decoder(*batch)
    first = loss.item()
    # as good as uniform at the start: log(words) a token, and the variance of logits of one half
    assert first / 11 == pytest.approx(math.log(WORDS) + 0.5, abs=0.8)
    for _ in range(60):
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        loss = decoder(*batch)
    assert loss < 0.02 * first
    captions = decoder.generate(*batch[:3], START, END)
    for sample, length in enumerate(batch.lengths.tolist()):
        if length:
            expected = [*batch.captions[sample, 1 : length + 1].tolist(), *[END] * (QUERIES - length)]
            assert captions[sample].tolist() == expected


@both_ways
def test_bf16_autocast(teacher_forced: bool) -> None:
    decoder, batch = make_decoder(teacher_forced, torch.float32), make_batch(torch.float32)
    parameters = list(decoder.parameters())
    expected = decoder(*batch)
    expected_gradients = torch.autograd.grad(expected, parameters)
    masks: list[Tensor] = []
    decoder.encoder.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = decoder(*batch)
        captions = decoder.generate(*batch[:3], START, END)
    gradients = torch.autograd.grad(loss, parameters)
    assert masks[0].dtype == torch.bfloat16
    assert captions.shape == (4, QUERIES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    ours, exact = (torch.cat([gradient.flatten() for gradient in each]) for each in (gradients, expected_gradients))
    assert (ours - exact).norm() < 0.03 * exact.norm()


@both_ways
def test_parameters_are_used_in_their_own_modules(teacher_forced: bool) -> None:
    """As under ZeRO-3, where they are empty but in the forward pass of the module that owns them."""
    decoder, batch = make_decoder(teacher_forced), make_batch()
    with torch.no_grad():
        expected = decoder(*batch), decoder.generate(*batch[:3], START, END)
    whole = {parameter: parameter.data for parameter in decoder.parameters()}

    def gather(module: torch.nn.Module, args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module: torch.nn.Module, *args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=torch.float64)

    for module in decoder.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        torch.testing.assert_close((decoder(*batch), decoder.generate(*batch[:3], START, END)), expected, rtol=0, atol=0)


@both_ways
def test_nothing_reads_the_device(teacher_forced: bool) -> None:
    """Fake tensors have no values to read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = CaptionDecoderConfig(queries=QUERIES, teacher_forced=teacher_forced)
        decoder = CaptionDecoder(config, CLIPTextConfig(**SIZES), IMAGE_WIDTH)
        image, text = torch.empty(4, NUM_IMAGE, IMAGE_WIDTH), torch.empty(4, NUM_TEXT, WIDTH)
        mask, captions = torch.empty(4, NUM_TEXT, dtype=torch.bool), torch.empty(4, QUERIES + 1, dtype=torch.int64)
        decoder(image, text, mask, captions, torch.empty(4, dtype=torch.int64)).backward()
        assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_checkpointing_recomputes_layers_in_training_alone() -> None:
    counts = []
    for checkpointing in (False, True):
        decoder, batch = make_decoder(teacher_forced=False, checkpointing=checkpointing), make_batch()
        calls: list[int] = []
        for layer in decoder.encoder.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        decoder(*batch).backward()
        decoder.eval()(*batch).backward()
        counts.append(len(calls))
    assert counts == [2 + 2, 4 + 2]


@both_ways
def test_shapes_without_weights(teacher_forced: bool) -> None:
    """How ranks other than 0 make the model under ZeRO-3."""
    with torch.device("meta"):
        config = CaptionDecoderConfig(queries=QUERIES, teacher_forced=teacher_forced)
        decoder = CaptionDecoder(config, CLIPTextConfig(**SIZES, intermediate_size=40), IMAGE_WIDTH)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert not list(decoder.buffers())
    real = {name: value.shape for name, value in make_decoder(teacher_forced).state_dict().items()}
    assert {name: value.shape for name, value in decoder.state_dict().items()} == real
    assert real["head.weight"] == (WORDS, WIDTH)
    assert "head.bias" not in real
    assert ("token_embedding.weight" in real) == teacher_forced


def test_layers_start_as_those_of_clips_text_tower() -> None:
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512, vocab_size=1000)
    decoder = CaptionDecoder(CaptionDecoderConfig(teacher_forced=True), text, image_width=64)
    expected = {
        "self_attn.q_proj": 128**-0.5,
        "self_attn.k_proj": 128**-0.5,
        "self_attn.v_proj": 128**-0.5,
        "self_attn.out_proj": (2 * 128 * 3) ** -0.5,
        "mlp.fc1": (2 * 128) ** -0.5,
        "mlp.fc2": (2 * 128 * 3) ** -0.5,
    }
    stds = {
        **{f"encoder.layers.{layer}.{name}": std for layer in range(3) for name, std in expected.items()},
        "queries": 0.02,
        "token_embedding": 0.02,
        "image_projection": 64**-0.5,
        "text_projection": 128**-0.5,
        "head": 128**-0.5,
    }
    weights = dict(decoder.named_parameters())
    for name, std in stds.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.05), name
    for layer in decoder.encoder.layers:
        assert all((layer.self_attn.get_submodule(f"{name}_proj").bias == 0).all() for name in ("q", "k", "v", "out"))
    assert decoder.encoder.config._attn_implementation == "sdpa"


TEXTS: dict[str, tuple[PretrainedConfig, str, float, int]] = {
    "clip": (CLIPTextConfig(**SIZES, intermediate_size=40), "QuickGELUActivation", 1e-5, 40),
    "bert": (BertConfig(**SIZES, intermediate_size=40, hidden_act="relu"), "ReLU", 1e-12, 40),
    "modernbert": (ModernBertConfig(**SIZES, intermediate_size=24, pad_token_id=0, norm_eps=1e-4), "GELUActivation", 1e-4, 24),
    "gpt2": (GPT2Config(n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=WORDS), "NewGELUActivation", 1e-5, 64),
    "bare": (PretrainedConfig(**SIZES), "GELUActivation", 1e-5, 64),
}


@pytest.mark.parametrize("name", TEXTS)
def test_sizes_are_the_text_towers(name: str) -> None:
    text, activation, norm_eps, mlp_width = TEXTS[name]
    torch.manual_seed(0)
    decoder = CaptionDecoder(CaptionDecoderConfig(queries=QUERIES), text, IMAGE_WIDTH)
    assert len(decoder.encoder.layers) == 2
    layer = decoder.encoder.layers[0]
    assert type(layer.mlp.activation_fn).__name__ == activation
    assert layer.layer_norm1.eps == decoder.norm.eps == norm_eps
    assert layer.mlp.fc1.weight.shape == (mlp_width, WIDTH)
    assert layer.self_attn.num_heads == HEADS
    assert decoder(*make_batch(torch.float32)).isfinite()


def test_faults_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"takes num_attention_heads from.*type=mamba has none"):
        CaptionDecoder(CaptionDecoderConfig(), MambaConfig(), IMAGE_WIDTH)
    with pytest.raises(ConfigError, match=r"hidden_size=16 is not a multiple of num_attention_heads=3"):
        CaptionDecoder(CaptionDecoderConfig(), BertConfig(**SIZES | {"num_attention_heads": 3}), IMAGE_WIDTH)
