import pytest

from derain import memory


@pytest.mark.parametrize(("limit", "used", "free"), [("1000", "400", 600), ("1000", "1200", 1), ("max", "400", None)])
def test_free_memory_respects_the_limit_of_a_container(tmp_path, monkeypatch, limit, used, free):
    unlimited = memory.free_memory()
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    if free is None:
        assert memory.free_memory() == pytest.approx(unlimited, rel=0.5)
    else:
        assert memory.free_memory() == free


def test_free_memory_without_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "absent")
    assert memory.free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), False),
    ],
)
def test_messages_about_memory_are_recognised(error, expected):
    assert memory.is_out_of_memory(error) is expected
