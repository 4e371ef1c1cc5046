"""A dual encoder's text tower as a model that `mteb.evaluate` takes (mteb 2; not among scaleclip's dependencies).

from scaleclip.evaluation.mteb_adapter import MtebEncoder
mteb.evaluate(MtebEncoder(encoder, "me/my-clip"), mteb.get_tasks(tasks=["STSBenchmark"]))
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scaleclip.evaluation.encoder import Encoder


class MtebEncoder:
    """Follows mteb's EncoderProtocol, by shape: nothing of mteb's is inherited.

    Args:
        encoder: the model.
        name: under which results are filed, as ORGANISATION/MODEL.
        revision: of the weights.
    """

    def __init__(self, encoder: Encoder, name: str, revision: str | None = None) -> None:
        self._encoder, self._name, self._revision = encoder, name, revision

    def encode(self, inputs: Iterable[Mapping[str, Sequence[str]]], **_: Any) -> Tensor:
        """(N, E) of the texts of batches; queries and documents are encoded alike, and tasks have no prompts of their own."""
        with self._encoder.evaluating():
            return torch.cat([self._encoder.texts(list(batch["text"])) for batch in inputs])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(N, M) cosines."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """(N,) cosines."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files results under."""
        from mteb.models.model_meta import ModelMeta

        about = {"name": self._name, "revision": self._revision, "embed_dim": self._encoder.model.text_projection.out_features}
        return ModelMeta.create_empty(about | {"similarity_fn_name": "cosine", "modalities": ["text"]})
