import warnings

import pytest
import torch
from safetensors.torch import save_file

from jasper_store.errors import CorruptFileError, IncompatibleOptionsError, InsufficientMemoryError
from jasper_store.formats.base import Schema
from jasper_store.formats.registry import locate
from jasper_store.store.device import DevicePreloader
from jasper_store.store.opening import open_store
from jasper_store.store.resident import DeviceTensor
from tests.store.samples import WRITERS, tensors

HOST = torch.device("cpu")


class LateCopyStream:
    """Copies as late as a device may: when :meth:`wait` is called. So a buffer that was refilled too early is noticed."""

    pinned = False

    def __init__(self):
        self.queue = []
        self.started = self.waits = 0

    def copy(self, source, target):
        self.queue.append((source, target))
        self.started += 1
        return self.started

    def wait(self, handle):
        self.waits += 1
        while self.started - len(self.queue) < handle:
            source, target = self.queue.pop(0)
            target.copy_(source)

    def finish(self):
        self.wait(self.started)


@pytest.fixture(params=sorted(WRITERS))
def specs(request, tmp_path):
    WRITERS[request.param](tmp_path, tensors())
    return {spec.name: spec for spec in locate(tmp_path, "auto", Schema()).specs}


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("buffer_nbytes", [1, 64, 1 << 20])
def test_every_byte_arrives_however_small_the_ring(specs, buffers, buffer_nbytes):
    copies = LateCopyStream()
    preloader = DevicePreloader(HOST, copies=copies, buffers=buffers, buffer_nbytes=buffer_nbytes)
    for name, expected in tensors().items():
        counted: list[int] = []
        got = preloader.load(specs[name], expected.dtype, on_bytes=counted.append)
        assert got.shape == expected.shape
        assert torch.equal(got, expected), name
        assert not copies.queue
        assert sum(counted) <= expected.nbytes


def test_a_buffer_is_filled_again_only_after_its_copy(specs):
    copies = LateCopyStream()
    preloader = DevicePreloader(HOST, copies=copies, buffers=2, buffer_nbytes=64)
    preloader.load(specs["scores"], torch.float32)
    assert copies.waits >= tensors()["scores"].nbytes // 64 - 2


def test_converted_on_the_way(specs):
    preloader = DevicePreloader(HOST, buffer_nbytes=64)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(preloader.load(specs["embs"], dtype), tensors()["embs"].to(dtype))


def test_a_truncated_file_is_refused(tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "x.safetensors")
    (spec,) = locate(tmp_path, "auto", Schema()).specs
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CorruptFileError):
        DevicePreloader(HOST, buffer_nbytes=64).load(spec, torch.float32)


def test_a_device_that_refuses_memory(specs, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    preloader, nbytes = DevicePreloader(HOST), tensors()["embs"].nbytes
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(InsufficientMemoryError, match="another process took the memory") as caught:
        preloader.load(specs["embs"], torch.float32)
    assert caught.value.needed == nbytes


def test_rows_from_the_host_are_checked_on_the_host(specs):
    tensor = DeviceTensor(specs["embs"], tensors()["embs"])
    with pytest.raises(IndexError, match="embs: row 50 at position 1"):
        tensor.take([0, 50])
    assert tensor.placement == "cpu"


@pytest.mark.cuda
class TestCuda:
    @pytest.mark.parametrize("kind", sorted(WRITERS))
    def test_the_same_values(self, tmp_path, kind):
        WRITERS[kind](tmp_path, tensors())
        with open_store(tmp_path, device="cuda") as store:
            assert store.device.type == "cuda"
            assert not store.use_mmap
            for name, expected in tensors().items():
                tensor = store[name]
                assert torch.equal(tensor.tensor().cpu(), expected)
                if expected.ndim and len(expected):
                    rows = torch.tensor([len(expected) - 1, 0, 0])
                    assert torch.equal(tensor.take(rows).cpu(), expected[rows])
                    assert torch.equal(tensor.take(rows.to(tensor.device)).cpu(), expected[rows])
                    with pytest.raises(IndexError, match=name):
                        tensor.take([len(expected)])

    def test_large_and_narrowed(self, tmp_path):
        values = torch.randn(100_000, 384)
        save_file({"x": values}, tmp_path / "x.safetensors")
        for dtype in (None, torch.bfloat16):
            with open_store(tmp_path, device="cuda:0", dtype=dtype) as store:
                assert torch.equal(store["x"].tensor().cpu(), values.to(dtype or values.dtype))
                assert store["x"].placement == "cuda:0"

    def test_auto_takes_it(self, tmp_path):
        WRITERS["safetensors"](tmp_path, tensors())
        with open_store(tmp_path, device="auto") as store:
            assert store.device.type == "cuda"

    def test_gathers_wait_for_nothing(self, tmp_path):
        WRITERS["safetensors"](tmp_path, tensors())
        with open_store(tmp_path, device="cuda") as store:
            rows = torch.tensor([3, 1], device="cuda")
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            try:
                torch.cuda.set_sync_debug_mode("error")
                got = store["embs"].take(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(got.cpu(), tensors()["embs"][[3, 1]])

    def test_too_many_devices(self, tmp_path):
        WRITERS["safetensors"](tmp_path, tensors())
        with pytest.raises(IncompatibleOptionsError, match="CUDA device"):
            open_store(tmp_path, device=f"cuda:{torch.cuda.device_count()}")
