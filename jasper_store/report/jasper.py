"""What only a JASPER dataset has to show: its curriculum, and what its values look like."""

from __future__ import annotations

from pathlib import Path

from jasper_store.bench.serving import quietly
from jasper_store.errors import JasperStoreError
from jasper_store.jasper.config import Config, read_config
from jasper_store.jasper.integrity import check_structure, unread_bounds
from jasper_store.jasper.schema import NOUNS, SCHEMA, SPLITS, declaration_for, split_tensor
from jasper_store.jasper.steering import Curriculum
from jasper_store.report.figures import figures
from jasper_store.report.model import Figures, JasperPart
from jasper_store.samples.compiler import build_graph
from jasper_store.samples.integrity import check_bounds_once
from jasper_store.store.opening import open_store

__all__ = ["curriculum_by_epoch", "look_at_jasper"]

_EPOCHS_LOOKED_AT = 10_000
_EPOCHS_AFTER = 10


def look_at_jasper(path: Path, storage_format: str) -> JasperPart:
    """Look at the values of a JASPER dataset; where tensors contradict each other it says how.

    Raises:
        DatasetNotFoundError: no configuration.
        CorruptFileError: a configuration that is not JSON.
        IntegrityError: a configuration without its dimensions.
    """
    config = read_config(path)
    seen, why_not = _look(path, storage_format, config)
    return JasperPart(
        dim=config.embedding_dim,
        n_neg=config.n_neg,
        curriculum=curriculum_by_epoch(config.curriculum),
        figures=seen,
        why_no_figures=why_not,
    )


def curriculum_by_epoch(curriculum: Curriculum) -> tuple[tuple[float, ...], ...]:
    """Probabilities of each epoch, until some epochs after the last change."""
    probabilities = [curriculum.probabilities(epoch) for epoch in range(_EPOCHS_LOOKED_AT)]
    changes = (epoch for epoch in range(1, len(probabilities)) if probabilities[epoch] != probabilities[epoch - 1])
    last = max(changes, default=0)
    return tuple(tuple(stage) for stage in probabilities[: last + _EPOCHS_AFTER])


def _look(path: Path, storage_format: str, config: Config) -> tuple[Figures | None, str]:
    """The figures, or why there are none."""
    try:
        with (
            quietly(),
            open_store(path, format=storage_format, use_mmap=True, schema=SCHEMA) as store,
        ):
            there = [split for split in SPLITS if split_tensor(split) in store]
            sizes = check_structure(store, config, there, path)
            if not sizes["pairs"]:
                return None, "there is no pair"
            declaration = declaration_for(config.curriculum)
            bounds = [bound for split in there for bound in build_graph(declaration, store, split).bounds]
            check_bounds_once(store, [*bounds, *unread_bounds(store)], NOUNS)
            return figures(store, sizes), ""
    except JasperStoreError as exc:
        return None, f"the tensors contradict each other: {exc}"
