"""Which sources are known to answer the questions that a report looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jasper_store.report.rows import SCALARS, distinct
from jasper_store.store.tensors import StoredTensor

__all__ = ["KnownPositives"]

_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class KnownPositives:
    """The positives of some questions, by all pairs that were read.

    Attributes:
        questions: the questions, ascending [q].
        keys: ``place of the question * sources + source``, ascending and each once; int64.
        sources: how many sources there are.
    """

    questions: torch.Tensor
    keys: torch.Tensor
    sources: int

    @classmethod
    def of(cls, pair_index: StoredTensor, index: torch.Tensor, sources: int) -> KnownPositives:
        """Read the positives of the questions in ``index`` [n, 2] from all pairs.

        Of more pairs than :data:`SCALARS` only the first so many are read, so that time does not grow with the dataset;
        those in ``index`` count in any case.
        """
        questions = distinct(index[:, 0])
        keys = [_keys(questions, index[:, 0], index[:, 1], sources)]
        start = 0
        for block in pair_index.blocks(_BLOCK_ROWS):
            if start >= SCALARS:
                break
            mine = torch.isin(block[:, 0], questions.to(block.dtype))
            found = block[mine].long()
            keys.append(distinct(_keys(questions, found[:, 0], found[:, 1], sources)))
            start += len(block)
        return cls(questions, distinct(torch.cat(keys)), sources)

    def holds(self, questions: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """Whether sources are positives of questions: shapes that broadcast, of questions among :attr:`questions`."""
        found: torch.Tensor = torch.isin(_keys(self.questions, questions, sources, self.sources), self.keys)
        return found

    def of_questions(self, questions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All positives of questions [n]: the position in ``questions`` and the source of each, [m] and [m]."""
        first = torch.searchsorted(self.questions, questions.contiguous()) * self.sources
        begin, end = torch.searchsorted(self.keys, first), torch.searchsorted(self.keys, first + self.sources)
        counts = end - begin
        place = torch.repeat_interleave(torch.arange(len(questions)), counts)
        within = torch.arange(len(place)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return place, self.keys[begin[place] + within] % self.sources


def _keys(questions: torch.Tensor, asked: torch.Tensor, found: torch.Tensor, sources: int) -> torch.Tensor:
    return torch.searchsorted(questions, asked.contiguous()) * sources + found
