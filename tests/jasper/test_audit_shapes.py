"""Verifying a dataset whose tensors have unexpected shapes ends in a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import jasper_store as js
from jasper_store.errors import IntegrityError
from tests.builders import build_pt_dataset


def test_embeddings_without_columns(tmp_path: Path) -> None:
    data = build_pt_dataset(tmp_path / "data")
    rows = len(torch.load(data / "question_embs.pt"))
    torch.save(torch.zeros(rows, 0), data / "question_embs.pt")
    report = js.verify(data)
    assert any("question_embs has 0 columns" in found.message for found in report.errors)


def test_keywords_that_are_not_ragged(tmp_path: Path) -> None:
    data = build_pt_dataset(tmp_path / "data")
    rows = len(torch.load(data / "pair_index.pt"))
    torch.save(torch.zeros(rows, 2, dtype=torch.int64), data / "pair_keyword_ids.pt")
    report = js.verify(data)
    assert any("pair_keyword_ids should be ragged" in found.message for found in report.errors)
    with pytest.raises(IntegrityError, match="pair_keyword_ids should be ragged"):
        js.JASPERSteeringDataset(data, "train")
