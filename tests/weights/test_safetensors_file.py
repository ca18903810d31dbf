import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from ijepa_zoo.weights.read import read_safetensors
from ijepa_zoo.weights.safetensors_file import DTYPE_NAMES, Entry, layout, map_tensors


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


def test_mapped_tensors_are_those_that_the_package_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(_tensors(), path, {"key": "value"})
    expected, read = safetensors.torch.load_file(path), map_tensors(path)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert _bytes(read[name]) == _bytes(tensor), name


def test_types_that_this_package_does_not_know_are_read_by_the_other(tmp_path):
    tensors = {"known": torch.ones(3), "rare": torch.tensor([1, -1], dtype=torch.int16)}
    content = safetensors.torch.save(tensors).replace(b'"I16"', b'"U16"')
    (tmp_path / "a.safetensors").write_bytes(content)
    assert list(map_tensors(tmp_path / "a.safetensors")) == ["known"]
    read = read_safetensors(tmp_path / "a.safetensors")
    assert read["known"].tolist() == [1.0] * 3
    assert read["rare"].tolist() == [1, 65535]


def test_writes_to_mapped_tensors_stay_private(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(5), "b": torch.ones(7)}, tmp_path / "a")
    first, second = map_tensors(tmp_path / "a"), map_tensors(tmp_path / "a")
    first["a"].zero_()
    for tensors in (second, map_tensors(tmp_path / "a")):
        assert tensors["a"].tolist() == [1.0] * 5
    assert first["b"].tolist() == [1.0] * 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mappings")
def test_a_mapping_ends_with_its_last_tensor(tmp_path):
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file({f"{i:03}": torch.full((4096,), i * 1.0) for i in range(200)}, path)

    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        parts = (line.split()[0].split("-") for line in lines if line.endswith(str(path)))
        return sum(int(end, 16) - int(start, 16) for start, end in parts)

    tensors = map_tensors(path)
    whole = path.stat().st_size
    assert whole <= mapped() < 1.3 * whole
    for number, name in enumerate(sorted(tensors)):
        assert tensors.pop(name)[0] == number
        assert mapped() <= whole * (1 - number / 200) * 1.3 + whole / 16
    assert mapped() == 0
