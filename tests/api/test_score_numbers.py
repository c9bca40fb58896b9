"""Logits become the probabilities, and numbers the bytes, that torch makes of them."""

from __future__ import annotations

import sys
from base64 import b64decode

import pytest
import torch

from lightllmd.api.dialects.scoring.activation import identity, of_classifier, sigmoid, softmax
from lightllmd.api.dialects.vectors import base64_of

LOGITS = [[0.0], [-1.5], [800.0], [-800.0], [0.25, -3.0], [700.0, 710.0, -5.0], [1e-8, 0.0, 3.0, 3.0]]


@pytest.mark.parametrize("logits", LOGITS)
def test_probabilities_are_torchs(logits):
    tensor = torch.tensor(logits, dtype=torch.float64)
    assert sigmoid(logits) == pytest.approx(torch.sigmoid(tensor).tolist(), rel=1e-12, abs=1e-300)
    assert softmax(logits) == pytest.approx(torch.softmax(tensor, -1).tolist(), rel=1e-12, abs=1e-300)
    assert identity(logits) == logits


def test_the_problem_type_says_which():
    assert of_classifier("regression", 1) is of_classifier("regression", 3) is identity
    assert of_classifier("multi_label_classification", 3) is of_classifier(None, 1) is sigmoid
    assert of_classifier("single_label_classification", 1) is sigmoid
    assert of_classifier("single_label_classification", 2) is of_classifier(None, 5) is softmax


NUMBERS = [0.0, -0.0, 1.0, 0.1, -2.71828, 65504.0, 65519.0, 65520.0, -1e9, 6e-8, 2.9e-8, 1.00390625, 3.389e38, 1e-40]


@pytest.mark.parametrize("endianness", ["native", "big", "little"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_are_torchs(dtype, endianness):
    raw = bytearray(b64decode(base64_of([NUMBERS[:3], NUMBERS[3:]], dtype, endianness)))
    kind = getattr(torch, dtype)
    size = kind.itemsize
    if endianness not in ("native", sys.byteorder):
        for at in range(0, len(raw), size):
            raw[at : at + size] = raw[at : at + size][::-1]
    expected = torch.tensor(NUMBERS, dtype=torch.float32).to(kind)
    assert torch.frombuffer(raw, dtype=kind).view(torch.int32 if size == 4 else torch.int16).tolist() == (
        expected.view(torch.int32 if size == 4 else torch.int16).tolist()
    )


def test_the_byte_order_is_the_one_that_was_asked_for():
    assert b64decode(base64_of([[1.0]], "float32", "big")) == b"\x3f\x80\0\0"
    assert b64decode(base64_of([[1.0]], "bfloat16", "little")) == b"\x80\x3f"
    assert b64decode(base64_of([[1.0]], "float16", "big")) == b"\x3c\0"
