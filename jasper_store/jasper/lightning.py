"""A ``LightningDataModule`` over a JASPER dataset. Importing this needs the extra ``integrations``.

Lightning does most of it by itself with loaders of :func:`~jasper_store.jasper.loader.create_loader`: it saves and
restores their state, tells their sampler each epoch, and leaves a ``DistributedSampler`` alone. The data module gives
it such loaders, and corrects the one count that Lightning keeps for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jasper_store.errors import IncompatibleOptionsError, JasperStoreError
from jasper_store.jasper.api import warm_up
from jasper_store.jasper.loader import create_loader
from jasper_store.jasper.schema import Split
from jasper_store.loading.loader import Loader
from jasper_store.loading.options import Padding

try:
    from lightning.pytorch import LightningDataModule
except ImportError as exc:

    class MissingExtraError(JasperStoreError, ImportError):  # type: ignore[misc]  # both have a path, of a file
        """An optional package is not installed; the message names the extra."""

    raise MissingExtraError(
        f"JasperDataModule needs Lightning, and importing it failed ({exc});"
        " install it with: pip install 'jasper-store[integrations]'"
    ) from exc

if TYPE_CHECKING:
    import os

__all__ = ["JasperDataModule"]

_OURS = ("batch_size", "num_workers", "epoch", "split", "distributed", "rank", "world_size", "drop_last", "padding")


class JasperDataModule(LightningDataModule):
    """Training, validation and test loaders of a dataset, each rank with its share.

    A run may be interrupted anywhere and continue with another number of processes, workers or batch size: the
    checkpoint says how many samples of which epoch were trained on, and each of the others comes exactly once.
    Leave ``Trainer(use_distributed_sampler=True)`` as it is: it replaces only samplers that are not distributed.

    Args:
        dataset_dir: directory with ``config.json`` and the tensors.
        batch_size: samples per batch and rank.
        num_workers: worker processes per rank.
        eval_batch_size: the same for validation and test; ``batch_size`` by default.
        eval_padding: ``"none"`` serves every sample of validation and test exactly once over all ranks, so that
            ranks may have counts that differ by one; ``"wrap"`` repeats samples until all have the same, which a
            ``validation_step`` needs if it talks to the other ranks itself.
        warm: bring the files into the page cache before training, once per node.
        **options: of :func:`~jasper_store.jasper.loader.create_loader`: ``seed``, ``storage_format``, ``use_mmap``,
            ``memory_limit``, ``order``, ``persistent_workers``...

    Raises:
        IncompatibleOptionsError: an option that the data module or the trainer decides.

    Example:
        >>> data = JasperDataModule("data/wordnet", batch_size=256)      # doctest: +SKIP
        >>> Trainer(max_epochs=50).fit(model, datamodule=data)           # doctest: +SKIP
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike[str],
        batch_size: int,
        num_workers: int = 0,
        *,
        eval_batch_size: int | None = None,
        eval_padding: Padding = "none",
        warm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for name in _OURS:
            if name in options:
                raise IncompatibleOptionsError(
                    f"JasperDataModule takes no {name}=: the trainer and the split decide it; leave it out"
                )
        self.dataset_dir = dataset_dir
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.eval_padding: Padding = eval_padding
        self.warm = warm
        self.options = options
        self._train: Loader | None = None
        self._saved: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        """Warm the page cache if asked to. Lightning calls this in one process per node."""
        if self.warm:
            warm_up(self.dataset_dir)

    def train_dataloader(self) -> Loader:
        """This rank's share of the training split, at the trainer's epoch."""
        self._train = self._loader(
            "train", self.batch_size, epoch=0 if self.trainer is None else self.trainer.current_epoch
        )
        self._count_as_this_run_does(self._train)
        return self._train

    def val_dataloader(self) -> Loader:
        """This rank's share of the validation split."""
        return self._loader("val", self.eval_batch_size, padding=self.eval_padding)

    def test_dataloader(self) -> Loader:
        """This rank's share of the test split."""
        return self._loader("test", self.eval_batch_size, padding=self.eval_padding)

    def predict_dataloader(self) -> Loader:
        """This rank's share of the test split."""
        return self.test_dataloader()

    def _loader(self, split: Split, batch_size: int, **options: Any) -> Loader:
        trainer = self.trainer
        ranks = {} if trainer is None else {"rank": trainer.global_rank, "world_size": trainer.world_size}
        return create_loader(self.dataset_dir, split, batch_size, self.num_workers, **ranks, **options, **self.options)

    # --- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; Lightning saves the same of the loader, but reads that only after counting."""
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the run stood until the loader is made."""
        self._saved = state_dict.get("train")

    def _count_as_this_run_does(self, loader: Loader) -> None:
        """Convert the interrupted epoch's count of batches to batches of this run.

        Lightning ends an epoch by count: batches of the run that was interrupted plus those of this one against the
        length of this one's loader. With other ranks or another batch size it would stop early.
        """
        saved, self._saved = self._saved, None
        if saved is None or self.trainer is None or loader.batch_size is None:
            return
        left = loader.sampler_obj.batches(loader.batch_size, saved["consumed"])
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        moved = len(loader) - left - current.ready
        current.ready += moved
        current.started += moved
        current.processed += moved
        current.completed += moved
