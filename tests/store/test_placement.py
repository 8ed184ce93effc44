import json

import pytest
from hypothesis import given, strategies as st

from jasper_store.errors import InsufficientMemoryError
from jasper_store.memory.budget import Bound, Budget
from jasper_store.store.assignment import make_auto_plan, make_plan
from jasper_store.store.placement import Item

MIB = 1 << 20


def budget(nbytes):
    """A budget of exactly this many bytes."""
    return Budget((Bound("test memory", nbytes, "made up"),), fraction=1.0)


def rows(name, n, reads, row=1536, **facts):
    return Item(name, nbytes=n * row, reads_per_sample=reads, row_nbytes=row, **facts)


INDEX = rows("index", 100_000, 1, row=16)
SOURCES = rows("sources", 20_000, 6)
QUESTIONS = rows("questions", 50_000, 1)
STEERING = rows("steering", 100_000, 0.2)
KEYWORDS = rows("keywords", 10_000, 0)
ALL = [STEERING, KEYWORDS, QUESTIONS, INDEX, SOURCES]


def preloaded(plan):
    return {entry.name for entry in plan.entries if entry.placement not in {"mmap", "chunked"}}


def test_everything_is_preloaded_when_everything_fits():
    plan = make_plan(ALL, budget(sum(item.nbytes for item in ALL)))
    assert preloaded(plan) == {item.name for item in ALL}
    assert not plan.any_mapped
    assert plan.mapped_nbytes == 0
    assert plan.preloaded_nbytes == plan.nbytes == sum(item.nbytes for item in ALL)


def test_what_no_sample_reads_is_mapped_first_and_never_takes_room():
    read = sum(item.nbytes for item in ALL if item.reads_per_sample)
    plan = make_plan(ALL, budget(read + KEYWORDS.nbytes - 1))
    assert preloaded(plan) == {"index", "sources", "questions", "steering"}
    plan = make_plan(ALL, budget(KEYWORDS.nbytes))
    assert plan.placement("keywords") == "mmap"


def test_order_is_bytes_read_per_sample_over_bytes_held():
    left = 0
    for taken, item in enumerate([SOURCES, QUESTIONS, INDEX, STEERING], start=1):
        left += item.nbytes
        assert len(preloaded(make_plan(ALL, budget(left)))) >= taken
        assert item.name in preloaded(make_plan(ALL, budget(left)))


def test_ties_go_to_the_smaller_tensor():
    wide, narrow = rows("wide", 1000, 1, row=4000), rows("narrow", 1000, 1, row=40)
    plan = make_plan([wide, narrow], budget(wide.nbytes))
    assert preloaded(plan) == {"narrow"}


def test_one_that_does_not_fit_leaves_room_to_the_next():
    plan = make_plan(ALL, budget(INDEX.nbytes))
    assert preloaded(plan) == {"index"}
    assert "does not fit" in str(plan)


def test_use_mmap_true_maps_all_and_warns_of_chunks():
    chunked = rows("packed", 100, 1, chunked=True, mappable=False)
    plan = make_plan([*ALL, chunked], budget(1 << 40), use_mmap=True)
    assert preloaded(plan) == set()
    assert plan.placement("packed") == "chunked"
    (warning,) = plan.warnings
    assert "packed" in warning
    assert "convert" in warning


def test_use_mmap_false_that_does_not_fit_says_all_numbers():
    with pytest.raises(InsufficientMemoryError) as caught:
        make_plan(ALL, budget(MIB), use_mmap=False)
    text = str(caught.value)
    assert caught.value.needed == sum(item.nbytes for item in ALL)
    assert caught.value.available == MIB
    for part in ("use_mmap=False", "sources", "29.30 MiB", "test memory", "1.00 MiB", "use_mmap=None", "bfloat16"):
        assert part in text


def test_chunked_data_is_preloaded_if_it_fits():
    chunked = rows("packed", 100, 1, chunked=True, mappable=False)
    assert make_plan([chunked], budget(chunked.nbytes)).placement("packed") == "ram"
    assert make_plan([chunked], budget(chunked.nbytes - 1)).placement("packed") == "chunked"
    assert make_plan([chunked], budget(MIB), use_mmap=False).placement("packed") == "ram"


def test_what_can_neither_be_mapped_nor_read_in_chunks_must_fit():
    odd = rows("odd", 100, 0, mappable=False)
    assert make_plan([odd], budget(odd.nbytes), use_mmap=True).placement("odd") == "ram"
    with pytest.raises(InsufficientMemoryError, match="read whole"):
        make_plan([odd], budget(odd.nbytes - 1))


def test_values_that_came_with_a_header_are_in_memory_already():
    inline = rows("inline", 1000, 1, inline=True, mappable=False)
    for use_mmap in (None, True, False):
        assert make_plan([inline], budget(0), use_mmap=use_mmap).placement("inline") == "ram"
    assert make_plan([inline, INDEX], budget(INDEX.nbytes)).placement("index") == "mmap"


def test_a_device_holds_all_that_is_read_or_refuses():
    read = sum(item.nbytes for item in ALL if item.reads_per_sample)
    plan = make_plan(ALL, budget(read), device="cuda:1")
    assert plan.placement("steering") == "cuda:1"
    assert plan.placement("keywords") == "mmap"
    assert make_plan(ALL, budget(read + KEYWORDS.nbytes), device="cuda:1").placement("keywords") == "cuda:1"
    with pytest.raises(InsufficientMemoryError, match="cuda:1"):
        make_plan(ALL, budget(read - 1), device="cuda:1")


def test_auto_takes_the_device_only_if_all_fits_and_says_why():
    total = sum(item.nbytes for item in ALL)
    host = budget(total)
    on_device = make_auto_plan(ALL, host, {"cuda:0": budget(total)})
    assert {entry.placement for entry in on_device.entries} == {"cuda:0"}
    assert "chose cuda:0" in str(on_device)
    for plan, word in (
        (make_auto_plan(ALL, host, {"cuda:0": budget(total - 1)}), "do not fit"),
        (make_auto_plan(ALL, host, {}), "no CUDA device"),
        (make_auto_plan(ALL, host, {"cuda:0": budget(total)}, use_mmap=True), "use_mmap=True"),
    ):
        assert plan.device is None
        assert word in str(plan)


def test_a_network_file_system_is_warned_of_only_where_it_hurts():
    assert not make_plan(ALL, budget(1 << 40), network=True).warnings
    (warning,) = make_plan(ALL, budget(INDEX.nbytes), network=True).warnings
    assert "network" in warning
    assert "keywords" not in warning


def test_the_table_is_readable_and_names_the_bound_that_decided():
    bounds = (Bound("host memory available", 8 << 30, "psutil"), Bound("cgroup /box", 64 << 20, "limit 64 MiB"))
    text = str(make_plan(ALL, Budget(bounds, 0.5), notes=("a note",)))
    lines = text.splitlines()
    assert lines[0].split() == ["tensor", "size", "rows/sample", "place", "why"]
    assert any(line.split()[:5] == ["sources", "29.30", "MiB", "6", "ram"] for line in lines)
    assert any(line.startswith("->") and "cgroup /box" in line for line in lines)
    assert any("host memory available" in line and not line.startswith("->") for line in lines)
    assert "32.00 MiB" in text
    assert "a note" in text


def test_to_dict_is_json():
    plan = make_plan(ALL, budget(INDEX.nbytes))
    again = json.loads(plan.to_json())
    assert again == plan.to_dict()
    assert again["budget"]["winner"] == "test memory"
    assert {t["name"]: t["placement"] for t in again["tensors"]}["index"] == "ram"


ITEMS = st.lists(
    st.builds(
        lambda n, row, reads, kind: (n, row, reads, kind),
        st.integers(0, 1000),
        st.integers(0, 100),
        st.sampled_from([0, 0.25, 1, 6]),
        st.sampled_from(["plain", "chunked"]),
    ),
    max_size=12,
).map(
    lambda drawn: [
        rows(f"t{i}", n, reads, row, chunked=kind == "chunked", mappable=kind == "plain")
        for i, (n, row, reads, kind) in enumerate(drawn)
    ]
)


def read_from_memory(plan, items):
    inside = preloaded(plan)
    return sum(item.bytes_per_sample for item in items if item.name in inside and item.nbytes)


@given(ITEMS, st.integers(0, 200_000), st.integers(0, 200_000))
def test_plans_keep_to_the_budget_and_grow_with_it(items, small, more):
    plan, larger = make_plan(items, budget(small)), make_plan(items, budget(small + more))
    assert plan == make_plan(items, budget(small))
    assert plan.preloaded_nbytes <= small
    assert larger.preloaded_nbytes <= small + more
    assert read_from_memory(larger, items) >= read_from_memory(plan, items) - 1e-6
    assert plan.preloaded_nbytes + plan.mapped_nbytes + plan.chunked_nbytes == plan.nbytes
    # Nothing worth having is left out while there is room for it.
    left = small - plan.preloaded_nbytes
    for item in items:
        if item.reads_per_sample and item.name not in preloaded(plan):
            assert item.nbytes > left


@given(ITEMS, st.randoms(use_true_random=False))
def test_plans_do_not_depend_on_the_order_of_tensors(items, random):
    limit = budget(sum(item.nbytes for item in items) // 2)
    shuffled = random.sample(items, len(items))
    assert preloaded(make_plan(items, limit)) == preloaded(make_plan(shuffled, limit))
