from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jasper_store.errors import IncompatibleOptionsError
from jasper_store.store.guard import check_options, normalize_device, resolve_pin_memory
from jasper_store.store.opening import open_store, plan_store

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"use_mmap": True, "device": "cuda"}, ["use_mmap=True", "'cuda'", "use_mmap=False"]),
    ({"use_mmap": True, "device": "cuda:1"}, ["cuda:1", "device=None"]),
    ({"use_mmap": True, "device": torch.device("cuda", 0)}, ["cuda:0"]),
    ({"any_mapped": True, "device": "cuda"}, ["mapped"]),
    ({"use_mmap": True, "pin_memory": True}, ["pin_memory=True", "pin_memory=False"]),
    ({"any_mapped": True, "pin_memory": True}, ["pin_memory=True", "use_mmap=False"]),
    ({"device": "cuda", "num_workers": 2}, ["num_workers=2", "num_workers=0"]),
    ({"device": "cuda", "pin_memory": True}, ["pin_memory=True", "device=None"]),
    ({"use_mmap": True, "dtype": torch.float16}, ["dtype", "convert --dtype float16"]),
]
NONSENSE: list[dict[str, Any]] = [
    {"use_mmap": "yes"},
    {"pin_memory": 1},
    {"num_workers": -1},
    {"num_workers": 1.5},
    {"device": "tpu"},
    {"device": "mps"},
    {"device": "cuda:x"},
    {"memory_limit": -1},
    {"memory_limit": 1e9},
    {"memory_limit": "8 elephants"},
    {"memory_limit": True},
    {"memory_limit": 2**63},
    {"dtype": torch.int8},
    {"dtype": "float16"},
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=str)
def test_pairs_that_cannot_hold_together(options, words):
    with pytest.raises(IncompatibleOptionsError) as caught:
        check_options(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("options", NONSENSE, ids=str)
def test_nonsense(options):
    (name,) = options
    with pytest.raises(IncompatibleOptionsError, match=name):
        check_options(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_mmap": True, "num_workers": 8},
        {"use_mmap": False, "pin_memory": True, "num_workers": 2},
        {"use_mmap": False, "device": "cuda", "pin_memory": False},
        {"device": "cuda:3", "pin_memory": None},
        {"device": "cpu", "use_mmap": True, "pin_memory": False},
        {"device": "auto", "use_mmap": True},
        {"any_mapped": True, "pin_memory": None},
        {"dtype": torch.bfloat16, "memory_limit": 0},
    ],
    ids=str,
)
def test_pairs_that_can(options):
    check_options(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [case for case in REFUSED if not {"any_mapped", "pin_memory", "num_workers"} & set(case[0])],
    ids=str,
)
@pytest.mark.parametrize("function", [open_store, plan_store])
def test_refused_before_the_path_is_even_looked_at(function, options, words):
    with pytest.raises(IncompatibleOptionsError):
        function("/nowhere/at/all", **options)


def test_a_memory_limit_comes_back_in_bytes(tmp_path):
    assert check_options() is None
    assert check_options(memory_limit="1.5 KiB") == 1536
    assert check_options(memory_limit=0) == 0
    save_file({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
    for limit in (1000, "1000", "1kB"):
        plan = plan_store(tmp_path, memory_limit=limit)
        assert plan.budget.winner.nbytes == 1000
        with open_store(tmp_path, memory_limit=limit) as store:
            assert store.use_mmap


def test_cuda_is_not_initialised(monkeypatch):
    def touched(*args, **kwargs):
        pytest.fail("the guard touched CUDA")

    for name in ("is_available", "device_count", "current_device", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    for options, _ in REFUSED:
        with pytest.raises(IncompatibleOptionsError):
            check_options(**options)


@pytest.mark.parametrize(
    ("asked", "mapped", "device", "cuda", "expected"),
    [
        (None, False, None, True, True),
        (None, True, None, True, False),
        (None, False, None, False, False),
        (None, False, "cuda:0", True, False),
        (True, False, None, False, True),
        (False, False, None, True, False),
    ],
)
def test_pin_memory_by_itself(asked, mapped, device, cuda, expected):
    assert resolve_pin_memory(asked, any_mapped=mapped, device=device, cuda_available=cuda) is expected


def test_devices():
    assert normalize_device(None) is None
    assert normalize_device("cpu") is None
    assert normalize_device(torch.device("cuda:2")) == "cuda:2"
    assert normalize_device("auto") == "auto"
