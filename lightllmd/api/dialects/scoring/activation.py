"""What a model's logits say, as transformers' and vLLM's classes make probabilities of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp

Activation = Callable[[Sequence[float]], list[float]]


def identity(logits: Sequence[float]) -> list[float]:
    """Unchanged."""
    return list(logits)


def sigmoid(logits: Sequence[float]) -> list[float]:
    """Of each label by itself."""
    return [1 / (1 + exp(-logit)) if logit >= 0 else (shifted := exp(logit)) / (1 + shifted) for logit in logits]


def softmax(logits: Sequence[float]) -> list[float]:
    """Over all labels."""
    most = max(logits)
    weights = [exp(logit - most) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def of_classifier(problem_type: str | None, labels: int) -> Activation:
    """By the model's config, as transformers' loss for sequence classification tells what it was trained with. Without
    a problem type: one label is a probability by itself, several are of one kind."""
    if problem_type == "regression":
        return identity
    if problem_type == "multi_label_classification" or labels == 1:
        return sigmoid
    return softmax
