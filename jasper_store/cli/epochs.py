"""What ``demo`` and ``train`` show of training: epochs going by, the curriculum, and what was gained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group
from rich.progress import Progress

from jasper_store.cli.console import errors, table
from jasper_store.jasper.steering import VARIANTS
from jasper_store.model.training import EpochReport, Trainer

__all__ = ["curriculum_table", "epoch_line", "recall_table", "run_epochs"]

_PLAIN_LINES = 10
_STAGES = 5


def epoch_line(report: EpochReport, epochs: int) -> str:
    """One epoch in a line: loss, speed, and where the curriculum stands."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(VARIANTS, report.probabilities, strict=True))
    rate = report.samples / report.seconds if report.seconds else float("nan")
    return f"epoch {report.epoch + 1}/{epochs}  loss {report.loss:.3f}  {rate:,.0f} samples/s  steering: {shares}"


def run_epochs(trainer: Trainer, bars: Progress) -> Iterator[EpochReport]:
    """Train what is left, moving a bar; where there is no terminal, some ten lines are printed in its stead."""
    epochs = trainer.options.epochs
    batches = len(trainer.loader)
    task = bars.add_task("training", total=epochs * batches, completed=trainer.epoch * batches)
    for report in trainer.run(lambda _: bars.advance(task)):
        shares = "/".join(f"{share:.0%}"[:-1] for share in report.probabilities)
        bars.update(task, description=f"epoch {report.epoch + 1}/{epochs}  loss {report.loss:.3f}  steering {shares} %")
        if bars.disable and (report.epoch % max(1, epochs // _PLAIN_LINES) == 0 or report.epoch + 1 == epochs):
            errors().print(epoch_line(report, epochs), markup=False)
        yield report


def curriculum_table(history: Sequence[EpochReport]) -> Group:
    """How loss and steering went: the epochs in a few stretches, and what was drawn in each."""
    length = -(-len(history) // _STAGES)
    cells = []
    for start in range(0, len(history), length):
        stretch = history[start : start + length]
        drawn = [sum(report.drawn[variant] for report in stretch) for variant in range(len(VARIANTS))]
        loss = sum(report.loss for report in stretch) / len(stretch)
        shares = (f"{count / max(1, sum(drawn)):.1%}" for count in drawn)
        cells.append((f"{stretch[0].epoch + 1}-{stretch[-1].epoch + 1}", f"{loss:.3f}", *shares))
    title = "Training: mean loss, and the steering that samples drew as the curriculum moved"
    return table(title, ("epochs", "loss", *VARIANTS), cells, right=("loss", *VARIANTS))


def recall_table(rows: Mapping[str, Mapping[str, float]], n_neg: int, samples: int) -> Group:
    """Recall@1 per steering variant: one row per predictor, and what a guess would score."""
    guess = dict.fromkeys(VARIANTS, 1 / (1 + n_neg))
    cells = [
        (name, *(f"{row[variant]:.1%}" for variant in VARIANTS)) for name, row in {"a guess": guess, **rows}.items()
    ]
    title = f"Recall@1 of the source against its {n_neg} hard negatives, {samples} validation samples, by steering"
    return table(title, ("predictor", *VARIANTS), cells, right=VARIANTS)
