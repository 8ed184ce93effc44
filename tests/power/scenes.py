"""Everything that writes, as the state before and the job: a new writer is one line of ``SCENES``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import jasper_store as js
from jasper_store.building.synth import SynthOptions, synthesize
from jasper_store.cli.sample import sample
from jasper_store.conversion.commit import commit
from jasper_store.conversion.compact import compact
from jasper_store.conversion.converter import convert
from jasper_store.conversion.writer import DirectoryWriter
from jasper_store.formats.generation import read_generation
from jasper_store.store.opening import open_store
from tests.building.raw import raw
from tests.conversion.samples import FORMAT_NAMES, write_pt
from tests.conversion.zygote import fill

__all__ = ["SCENES", "Scene"]

_ROWS = 600


class Scene(NamedTuple):
    """A job that writes ``root/set``.

    Attributes:
        prepare: makes what is there before.
        job: what is cut. Run again on what a power failure left, it leads to the state after.
        cleans: whether it removes what a writer left that was cut.
        renames: whether files are renamed one after another, so that opening may be refused until it is run again.
    """

    prepare: Callable[[Path], object]
    job: Callable[[Path], object]
    cleans: bool = True
    renames: bool = False


def nothing(root: Path) -> None:
    """Nothing is there."""


def both(*jobs: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        for job in jobs:
            job(root)

    return run


def write(fmt: str, value: float, name: str = "set") -> Callable[[Path], None]:
    def run(root: Path) -> None:
        with DirectoryWriter(root / name, fmt, overwrite=True, config={"value": value}) as writer:
            fill(writer, value, _ROWS)
            writer.append("ids", [f"{value}-{i}" for i in range(_ROWS)])

    return run


def write_more(value: float, rows: int = 200) -> Callable[[Path], None]:
    """Append, unless that was done before the power failed."""

    def run(root: Path) -> None:
        with open_store(root / "set", use_mmap=True) as store:
            last = store["b"].take(torch.tensor([len(store["b"]) - 1])).item()
        if last != value:
            with DirectoryWriter(root / "set", mode="append") as writer:
                fill(writer, value, rows)
                writer.append("ids", [f"{value}-{i}" for i in range(rows)])

    return run


def write_shards(fmt: str, mode: str, numbers: range = range(3)) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        for shard in numbers:
            with DirectoryWriter(root / "set", fmt, shard=shard, shards=3, mode=mode) as writer:
                fill(writer, 5.0 + shard, 100)
                writer.append("ids", [f"{shard}-{i}" for i in range(100)])

    return run


def publish_shards(root: Path) -> None:
    """Commit, unless that was done before the power failed."""
    if read_generation(root / "set") is None:
        commit(root / "set")


def pt_files(value: float, name: str = "pt") -> Callable[[Path], None]:
    def run(root: Path) -> None:
        words = [[int(value)] * (i % 3) for i in range(_ROWS)]
        tensors = {"a": torch.full((_ROWS, 20), value), "b": torch.full((_ROWS,), int(value)), "words": words}
        write_pt(root / name, tensors)
        (root / name / "config.json").write_text(json.dumps({"value": value}))

    return run


def to(
    fmt: str, *, overwrite: bool = False, compression: str | None = None, beside: bool = False
) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        source = root / ("set" if beside else "pt")
        convert(source, root / "set", fmt, compression, overwrite=overwrite, source_format="pt")

    return run


def to_holding_a_directory(root: Path) -> None:
    """Over a dataset that cannot be exchanged, since its directory holds another one: files are renamed one by one."""
    (root / "set" / "notes").mkdir(exist_ok=True)
    to("safetensors", overwrite=True)(root)


def compacted(*, remove_old: bool) -> Callable[[Path], object]:
    return lambda root: compact(root / "set", remove_old=remove_old)


def checked(root: Path) -> None:
    """Open it with every check, which the manifest then records."""
    with open_store(root / "set", use_mmap=True) as store:
        assert store.record_checks(["something"])


def jasper(fmt: str, name: str = "set", value: int = 0) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        synthesize(
            root / name, SynthOptions(pairs=80, dim=8, clusters=4, n_neg=3, seed=value), format=fmt, overwrite=True
        )

    return run


def the_sample(root: Path) -> None:
    if not (root / "set").exists():
        sample(root / "set")


def converted_jasper(fmt: str) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        js.convert(root / "source", root / "set", fmt, overwrite=True)

    return run


def built(fmt: str, seed: int = 0) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        js.build(root / "set", **raw(seed=seed), format=fmt, overwrite=True)

    return run


def mined(*, similarities: bool = False) -> Callable[[Path], object]:
    return lambda root: js.mine_negatives(root / "set", seed=1, similarities=similarities)


def another_question(root: Path) -> None:
    """A row that no pair names, so that the dataset is in parts."""
    with js.open(root / "set") as store:
        row = store["question_embs"].take(torch.tensor([0])).clone()
    with js.DatasetWriter(root / "set", mode="append") as writer:
        writer.append("question_embs", row)


def packed(root: Path) -> None:
    """Pack, also over a packed dataset of another seed."""
    js.pack(root / "source", root / "set", seed=3, overwrite=True)


def packed_before(root: Path) -> None:
    js.pack(root / "source", root / "set", seed=2)


def packed_again(root: Path) -> None:
    """The columns of other negatives, unless that was done before the power failed."""
    js.pack(root / "source", root / "set", columns=["negative_embs", "negative_tiers"])


def other_negatives(root: Path) -> None:
    js.mine_negatives(root / "source", 3, seed=5)


SCENES: dict[str, Scene] = {
    **{f"write {fmt}": Scene(nothing, write(fmt, 1.0)) for fmt in FORMAT_NAMES},
    **{f"write {fmt} over another": Scene(write("npy", 1.0), write(fmt, 2.0)) for fmt in FORMAT_NAMES},
    **{f"append to {fmt}": Scene(write(fmt, 1.0), write_more(2.0)) for fmt in ("safetensors", "npy", "hdf5")},
    "append again": Scene(both(write("safetensors", 1.0), write_more(2.0)), write_more(3.0)),
    "a shard": Scene(both(write("npy", 1.0), write_shards("npy", "append", range(1))), write_shards("npy", "append")),
    "commit": Scene(write_shards("safetensors", "create"), publish_shards),
    "commit to a dataset": Scene(both(write("hdf5", 1.0), write_shards("hdf5", "append")), publish_shards),
    "compact": Scene(both(write("npy", 1.0), write_more(2.0), write_more(3.0)), compacted(remove_old=False)),
    "compact hdf5, remove": Scene(
        both(write("hdf5", 1.0), write_more(2.0), write_more(3.0)), compacted(remove_old=True)
    ),
    **{f"convert to {fmt}": Scene(pt_files(2.0), to(fmt)) for fmt in FORMAT_NAMES if fmt != "pt"},
    "convert to gzip": Scene(pt_files(2.0), to("hdf5", compression="gzip")),
    **{
        f"convert {fmt} over another": Scene(both(write(fmt, 1.0), pt_files(2.0)), to(fmt, overwrite=True))
        for fmt in FORMAT_NAMES
        if fmt != "pt"
    },
    "convert beside the source": Scene(pt_files(2.0, "set"), to("safetensors", beside=True)),
    "convert, file after file": Scene(
        both(write("safetensors", 1.0), pt_files(2.0)), to_holding_a_directory, renames=True
    ),
    "a check recorded": Scene(write("safetensors", 1.0), checked, cleans=False),
    "convert a whole dataset": Scene(jasper("pt", "source"), converted_jasper("safetensors")),
    "convert a whole dataset to npy": Scene(jasper("safetensors", "source"), converted_jasper("npy")),
    "convert a whole dataset to pt": Scene(jasper("npy", "source"), converted_jasper("pt")),
    "convert a whole dataset over another": Scene(
        both(jasper("npy", "source"), jasper("safetensors", value=1)), converted_jasper("safetensors")
    ),
    "make a dataset": Scene(nothing, jasper("npy")),
    "make a dataset over another": Scene(jasper("npy", value=1), jasper("safetensors")),
    "the sample": Scene(nothing, the_sample),
    **{f"build {fmt}": Scene(nothing, built(fmt)) for fmt in ("safetensors", "hdf5")},
    "build over another": Scene(built("npy", seed=1), built("safetensors")),
    **{f"mine {fmt}": Scene(jasper(fmt), mined()) for fmt in ("safetensors", "hdf5")},
    "mine, with similarities": Scene(jasper("npy"), mined(similarities=True)),
    "mine, in parts": Scene(both(jasper("npy"), another_question), mined(similarities=True)),
    "pack": Scene(jasper("safetensors", "source"), packed),
    "pack over another": Scene(both(jasper("safetensors", "source"), packed_before), packed),
    "pack columns": Scene(both(jasper("safetensors", "source"), packed_before, other_negatives), packed_again),
}
