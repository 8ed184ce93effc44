"""A small JASPER predictor: question and steering in, the embedding of the source out.

It is what ``jasper-store demo`` and ``jasper-store train`` train, and an example of how batches are used; nothing of
the dataset depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.jasper.dataset import JASPERSteeringDataset
from jasper_store.jasper.steering import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from jasper_store.loading.loader import Loader

__all__ = ["SAME_SOURCE", "JasperPredictor", "dataset_of", "evaluate", "info_nce", "question_alone", "recall_at_1"]

SAME_SOURCE = 1.0 - 1e-4
"""Two sources of a cosine above this are one source: the positive of one sample is no negative of the other."""


class JasperPredictor(nn.Module):
    """``normalize(question + gate * steering + correction)``, the gate and the correction being small networks.

    Both begin at zero, so an untrained predictor *is* the question's embedding: whatever it scores before training
    is the cosine baseline, and whatever it gains was learnt. A full matrix in place of the two learns a thousand
    pairs by heart; one number per sample, deciding how far to follow the steering, carries over to new ones.

    Args:
        embedding_dim: columns of every embedding, D.
        hidden: width of both networks.
        dropout: share of hidden values dropped in training.
        seed: decides the initial weights; the global random state is left alone.
    """

    def __init__(self, embedding_dim: int, *, hidden: int = 64, dropout: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        if embedding_dim < 1 or hidden < 1:
            raise IncompatibleOptionsError(
                f"embedding_dim and hidden should be at least 1, found {embedding_dim} and {hidden}"
            )
        self.embedding_dim = embedding_dim
        self.hidden = hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate = _network(2 * embedding_dim, hidden, 1, dropout)
            self.correction = _network(2 * embedding_dim, hidden, embedding_dim, dropout)

    def forward(self, question: torch.Tensor, steering: torch.Tensor) -> torch.Tensor:
        """Predict sources.

        Args:
            question: [B, D], any floating dtype.
            steering: [B, D], zeros for none.

        Returns:
            [B, D] float32, of length 1.
        """
        question, steering = question.float(), steering.float()
        both = torch.cat((question, steering), dim=1)
        return functional.normalize(question + self.gate(both) * steering + self.correction(both), dim=1)

    def parameter_groups(self, gate_lr: float, correction_lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: the gate decides one number and may learn fast, the correction must not."""
        return [
            {"params": list(self.gate.parameters()), "lr": gate_lr, "peak_lr": gate_lr},
            {"params": list(self.correction.parameters()), "lr": correction_lr, "peak_lr": correction_lr},
        ]


def _network(inputs: int, hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(dropout), last)


def info_nce(predicted: torch.Tensor, batch: dict[str, torch.Tensor], temperature: float = 0.1) -> torch.Tensor:
    """InfoNCE of the positive against the hard negatives and the other samples' positives.

    A hard negative counts ``1 + 0.5 * tier / 2`` times in the denominator, so that tier 2 counts 1.5 times.

    Args:
        predicted: [B, D], of length 1.
        batch: a batch of the loader, on the same device.
        temperature: cosine similarities are divided by it.

    Returns:
        A scalar: the mean over the batch.
    """
    positives = functional.normalize(batch["target_source_emb"].float(), dim=1)
    negatives = functional.normalize(batch["negative_embs"].float(), dim=2)
    weights = 1.0 + 0.5 * batch["negative_tiers"].float() / 2.0
    hard = torch.einsum("bd,bnd->bn", predicted, negatives) / temperature + weights.log()
    others = predicted @ positives.T / temperature
    own = others.diagonal()[:, None]
    same = (positives @ positives.T > SAME_SOURCE).fill_diagonal_(True)
    logits = torch.cat((own, hard, others.masked_fill(same, float("-inf"))), dim=1)
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def recall_at_1(predicted: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which predictions [B, D] are nearer to their positive than to every hard negative; bool [B]. A tie is a miss."""
    positives = functional.normalize(batch["target_source_emb"].float(), dim=1)
    negatives = functional.normalize(batch["negative_embs"].float(), dim=2)
    predicted = functional.normalize(predicted.float(), dim=1)
    best = torch.einsum("bd,bnd->bn", predicted, negatives).amax(dim=1)
    return (predicted * positives).sum(dim=1) > best


def dataset_of(loader: Loader) -> JASPERSteeringDataset:
    """The dataset behind a loader of :func:`create_loader`.

    Raises:
        IncompatibleOptionsError: it is a loader over something else, which has no steering to force.
    """
    dataset = loader.dataset_obj
    if not isinstance(dataset, JASPERSteeringDataset):
        raise IncompatibleOptionsError(
            f"expected a loader over a JASPERSteeringDataset, found one over {type(dataset).__name__}; use create_loader"
        )
    return dataset


def question_alone(question: torch.Tensor, steering: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """The baseline without a model: predict the question's own embedding, whatever the steering."""
    return question


@torch.no_grad()
def evaluate(loader: Loader, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Recall@1 of the positive against the sample's hard negatives, for each steering variant forced in turn.

    A guess scores ``1 / (1 + n_neg)``. A module is put into evaluation mode and back.

    Args:
        loader: of :func:`create_loader`, for ``"val"`` or ``"test"``; its dataset's forced steering ends as ``None``.
        predict: a :class:`JasperPredictor`, or any function of (question [B, D], steering [B, D]) to [B, D].

    Returns:
        Variant name to recall, 0 to 1; ``nan`` for an empty split.
    """
    dataset = dataset_of(loader)
    was_training = isinstance(predict, nn.Module) and predict.training
    if isinstance(predict, nn.Module):
        predict.eval()
    recalls = {}
    try:
        for variant in VARIANTS:
            dataset.force_steering(variant)
            hits = [recall_at_1(predict(batch["question_emb"], batch["steering"]), batch) for batch in loader]
            recalls[variant] = torch.cat(hits).float().mean().item() if hits else float("nan")
    finally:
        dataset.force_steering(None)
        if isinstance(predict, nn.Module):
            predict.train(was_training)
    return recalls
