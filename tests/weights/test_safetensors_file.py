import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from ijepa_zoo.weights.safetensors_file import DTYPE_NAMES, Entry, layout


def _tensors():
    torch.manual_seed(0)
    tensors = {
        f"{number}.{str(dtype).removeprefix('torch.')}": (torch.rand(3, number + 1) * 4).to(dtype)
        for number, dtype in enumerate(DTYPE_NAMES)
    }
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        'Größe "μ"\n😀': torch.arange(5, dtype=torch.int16),
    }


def _bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _entries(tensors):
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _write(path, tensors, plan):
    with path.open("wb") as file:
        file.truncate(plan.size)
        file.write(plan.header)
        for name in reversed(tensors):  # any order
            file.seek(plan.offsets[name])
            file.write(_bytes(tensors[name]))


def test_package_reads_back_what_was_written_in_pieces(tmp_path):
    tensors = _tensors()
    metadata = {"b": 'quote " and \\', "a": "Übung 😀", "c": ""}
    plan = layout(_entries(tensors), metadata)
    _write(tmp_path / "a.safetensors", tensors, plan)
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert _bytes(read[name]) == _bytes(tensor), name
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == metadata


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_bytes_are_those_of_the_package(tmp_path, dtype):
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name in ("b", "ä", "a", "A")}
    for metadata in (None, {"format": "pt"}):
        plan = layout(_entries(tensors), metadata)
        _write(tmp_path / "a.safetensors", tensors, plan)
        expected = safetensors.torch.save(tensors, metadata)
        assert (tmp_path / "a.safetensors").read_bytes() == expected


def test_order_of_entries_and_metadata_does_not_matter():
    entries = _entries(_tensors())
    first = layout(entries, {"a": "1", "b": "2"})
    second = layout(reversed(entries), {"b": "2", "a": "1"})
    assert first == second


def test_header_and_tensors_are_aligned():
    for length in range(9):
        plan = layout([Entry("x" * length + "y", torch.bool, (3,)), Entry("z", torch.int64, (2,))])
        assert len(plan.header) % 8 == 0
        assert plan.offsets["z"] % 8 == 0
        assert plan.size == len(plan.header) + 19


def test_no_tensors(tmp_path):
    plan = layout([], {"note": "empty"})
    (tmp_path / "a.safetensors").write_bytes(plan.header)
    assert plan.size == len(plan.header)
    assert safetensors.torch.load_file(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry("a", torch.int8, ()), Entry("a", torch.int8, ())], "'a' comes twice"),
        ([Entry("__metadata__", torch.int8, ())], "reserved"),
        ([Entry("a", torch.complex128, ())], "complex128.*convert it to one of int64, float64"),
    ],
)
def test_refusals(entries, message):
    with pytest.raises(ValueError, match=message):
        layout(entries)


def test_too_long_a_header_is_refused_as_readers_would():
    with pytest.raises(ValueError, match="readers accept"):
        layout([Entry("a", torch.int8, (1,))], {"long": "x" * 100_000_000})
