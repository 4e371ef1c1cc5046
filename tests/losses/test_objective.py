"""The terms of an objective against their papers' formulas, in fp64, with every matrix stored."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scaleclip.config import LossConfig
from scaleclip.losses.objective import contrastive, text_contrastive, weighted_sum
from scaleclip.models.dual_encoder import Features

N, E = 11, 16
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def checked(found_of, naive_of, inputs: list[Tensor]) -> None:
    """Value and the gradients of all inputs; fp32 against fp64."""
    ours = [each.float().requires_grad_() for each in inputs]
    truth = [each.clone().requires_grad_() for each in inputs]
    found, expected = found_of(*ours), naive_of(*truth)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)
    gradients = torch.autograd.grad(expected, truth)
    for name, (mine, true) in enumerate(zip(torch.autograd.grad(found, ours), gradients, strict=True)):
        torch.testing.assert_close(mine.double(), true, **TOLERANCE, msg=lambda said, name=name: f"input {name}: {said}")


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.625, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_each_view_has_denominators_of_its_own(weights) -> None:
    """LaCLIP-MT, arXiv:2305.20088: the mean over views of image to text, and of text to image, each among its own kind."""
    torch.manual_seed(0)
    valid_N = torch.rand(N) > 0.2
    ids_N = torch.arange(N)

    def found(image: Tensor, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        return contrastive(Features(image, (first, second), scale, None), ids_N, valid_N, LossConfig(weights=weights), None)

    def naive(image: Tensor, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        losses = []
        for text in (first, second):
            logits = scale * image[valid_N] @ text[valid_N].T
            pair = torch.arange(len(logits))
            losses.append(weights[0] * F.cross_entropy(logits, pair) + weights[1] * F.cross_entropy(logits.T, pair))
        return sum(losses) / 2

    checked(found, naive, [unit(N, E), unit(N, E), unit(N, E), torch.tensor(20.0, dtype=torch.float64)])


@pytest.mark.parametrize("num_negatives", [0, 1, 7])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_queries_see_all_negatives_and_documents_see_queries_alone(num_negatives, weights) -> None:
    """InfoNCE+ of Jina-CLIP, arXiv:2405.20204, with the two terms of equation 3 the right way round."""
    torch.manual_seed(1)
    valid_N = torch.rand(N) > 0.2
    config = LossConfig(weights=weights, text_temperature=0.05)

    def found(*texts: Tensor) -> Tensor:
        return text_contrastive(texts, valid_N, config, None)

    def naive(*texts: Tensor) -> Tensor:
        query, positive, *negatives = (text[valid_N] for text in texts)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(query)):
            to_positive = torch.exp(query[i] @ positive[i] / 0.05)
            among = sum(torch.exp(query[i] @ document.T / 0.05).sum() for document in (positive, *negatives))
            back = torch.exp(positive[i] @ query.T / 0.05).sum()
            total = total - weights[0] * torch.log(to_positive / among) - weights[1] * torch.log(to_positive / back)
        return total / len(query)

    checked(found, naive, [unit(N, E) for _ in range(2 + num_negatives)])


def test_what_an_invalid_row_of_texts_holds_does_not_matter() -> None:
    torch.manual_seed(2)
    valid_N = torch.arange(N) != 4
    texts = [unit(N, E).float() for _ in range(4)]
    spoiled = [text.masked_fill(~valid_N[:, None], torch.nan).requires_grad_() for text in texts]
    config = LossConfig()
    loss = text_contrastive(spoiled, valid_N, config, None)
    torch.testing.assert_close(loss, text_contrastive([text[valid_N] for text in texts], valid_N[valid_N], config, None))
    for gradient in torch.autograd.grad(loss, spoiled):
        assert torch.isfinite(gradient).all()
        assert not gradient[4].any()


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    terms = {
        name: torch.tensor(value) for name, value in (("contrastive", 1.0), ("simclr", 2.0), ("text", 3.0), ("caption", 4.0))
    }
    config = LossConfig(simclr_weight=0.5, text_weight=0.25, caption_weight=2.0)
    assert weighted_sum(terms, config).item() == pytest.approx(1 + 1 + 0.75 + 8)
    assert weighted_sum({}, config).item() == 0
