"""A model as evaluations see it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from scaleclip.data.tokenizer import Tokenizer
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.models.dual_encoder import DualEncoder
from scaleclip.models.tensor_digest import tensor_digest


@dataclass(frozen=True)
class Encoder:
    """A dual encoder with its tokenizer. Features are fp32 on the CPU, of unit length."""

    model: DualEncoder
    tokenizer: Tokenizer
    size: int
    """Height and width of images, in pixels."""
    batch: int
    """Images or texts encoded at once."""

    def images(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, E) features of uint8 pixels, by this rank."""
        return self.model.encode_image(pixels_BCHW.to(self.model.logit_scale.device)).cpu()

    def pooled_images(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, D) of uint8 pixels, by this rank: fp32 outputs of the image tower before the projection, of any length."""
        return self.model.pool_image(pixels_BCHW.to(self.model.logit_scale.device)).float().cpu()

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), E) features; every rank calls, encodes a part and gets all."""

        def encode(start: int, stop: int) -> Tensor:
            return self.model.encode_text(self.tokenizer(texts[start:stop]).to(self.model.logit_scale.device)).cpu()

        return torch.cat(encode_over_ranks(len(texts), self.batch, encode))

    def image_digest(self) -> str:
        """Of all that image features depend on but the images: weights, and how the tower is built, fed and pooled."""
        image = self.model.image
        about = image.body.config.to_json_string() + repr((image.pooling, self.model.pixel_mean, self.model.pixel_std))
        return tensor_digest((*image.state_dict().items(), *self.model.image_projection.state_dict().items()), about)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode and without gradients, and then in the mode that it was in."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)
