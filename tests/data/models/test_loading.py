"""What is said about a model before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from rlkit.data.models.loading import slow_arithmetic
from rlkit.settings import Dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "is_slow"),
    [("AVX2", Dtype.bfloat16, True), ("AVX512", Dtype.bfloat16, False), ("AVX2", Dtype.float32, False)],
)
def test_a_processor_without_bfloat16_arithmetic_is_named(monkeypatch, capability, dtype, is_slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = slow_arithmetic(dtype)
    assert (text is not None) == is_slow
    assert text is None or ("model.dtype=bfloat16: this processor (AVX2)" in text and "Write model.dtype=float32" in text)
