"""The advisor: what it makes of the times that it is given."""

from __future__ import annotations

from jasper_store.loading.advisor import Meter, Stopwatch, advise


def passed(wait: float, wall: float, *, prefetch: float = 0.0, transfer: float = 0.0) -> Stopwatch:
    """A pass of 10 batches; seconds in all."""
    watch = Stopwatch(wait=Meter(10, wait), prefetch=Meter(10, prefetch, prefetch), transfer=transfer, began=1.0)
    watch.ended = watch.began + wall
    return watch


def lines(watch: Stopwatch, gathers: Meter, **facts: object) -> list[str]:
    given = {"workers": 0, "mapped": False, "pinned": True, "block": False} | facts
    return advise(watch, gathers, **given)  # type: ignore[arg-type]


def test_a_loader_that_keeps_up_is_left_alone() -> None:
    found = lines(passed(0.01, 1.0), Meter(10, 0.01, 0.01))
    assert found[0] == "10 batches, one every 100.000 ms, of which 1.000 ms waiting for data"
    assert found[-1].startswith("nothing to change: the trainer waits 1.0 %")


def test_waiting_for_pages() -> None:
    watch, gathers = passed(0.9, 1.0, prefetch=0.1), Meter(10, 0.9, 0.3, faults=40)
    found = lines(watch, gathers, mapped=True)
    assert "pages 60.000 ms (4.0 major faults), gather 20.000 ms in the trainer's process" in found[1]
    assert "prefetching 10.000 ms" in found[1]
    assert found[2].startswith("pages: ")
    assert "order='block'" in found[2]
    assert "order='block'" not in lines(watch, gathers, mapped=True, block=True)[2]


def test_without_major_faults_lost_time_is_not_blamed_on_pages() -> None:
    found = lines(passed(0.9, 1.0), Meter(10, 0.9, 0.3))
    assert "pages 0.000 ms" in found[1]
    assert found[2].startswith("gather: ")


def test_waiting_for_workers() -> None:
    # Two workers, each busy 200 ms a batch, of which 50 ms gather.
    found = lines(passed(0.8, 1.0), Meter(10, 0.5, 0.5), workers=2)
    assert "gather 50.000 ms in 2 workers, worker transfer 150.000 ms" in found[1]
    assert found[2].startswith("worker transfer: ")
    # All of it is gathering.
    assert lines(passed(0.8, 1.0), Meter(10, 1.99, 1.99), workers=2)[2].startswith("gather: the workers")


def test_copies_that_are_not_pinned() -> None:
    watch, gathers = passed(0.1, 1.0, transfer=0.5), Meter(10, 0.1, 0.1)
    assert any("pin_memory=True" in line for line in lines(watch, gathers, pinned=False))
    assert any("preload" in line for line in lines(watch, gathers, pinned=False, mapped=True))
    assert not any("device copy: " in line for line in lines(watch, gathers))


def test_before_the_first_batch_there_is_nothing_to_say() -> None:
    assert lines(Stopwatch(), Meter()) == ["no batch was served yet: iterate over the loader, then ask again"]
