"""What fits where, and what is said when nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline.calibration.placement import Device, Needs, choose_place
from pipeline.machine.memory import available_memory

from pipeline.calibration import placement as machine
from pipeline.errors import PipelineError, UsageError
from pipeline.machine.memory import available_memory

GB = 10**9
CPU = Device("cpu", "cpu AVX512", "", 100 * GB)
GPU = Device("cuda", "NVIDIA H200", "", 16 * GB)
NEEDS = Needs(layer=GB, made=GB // 2, hidden=GB, activations=GB)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(machine, "available_memory", lambda: 64 * GB)
    return monkeypatch


def test_what_fits_on_the_gpu_stays_there(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_place("auto", GPU, NEEDS, tmp_path) == ("device", "1,000 MB of hidden states on the GPU")
    big = Needs(GB, GB // 2, 20 * GB, GB)
    assert choose_place("auto", GPU, big, tmp_path)[0] == "host"
    assert "pinned host memory" in choose_place("auto", GPU, big, tmp_path)[1]


def test_a_file_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 4 * GB)
    place, why = choose_place("auto", CPU, NEEDS, tmp_path / "not" / "there")
    assert place == "file" and "4.0 GB of memory are too few" in why and str(tmp_path) in why
    assert choose_place("file", CPU, NEEDS, tmp_path)[1].endswith("(asked for)")


def test_what_cannot_be(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no GPU in this run"):
        choose_place("device", CPU, NEEDS, tmp_path)
    with pytest.raises(PipelineError, match=r"NVIDIA H200: a layer needs 11.* GB of device memory, 8.0 GB are free"):
        choose_place("auto", Device("cuda", "NVIDIA H200", "", 8 * GB), Needs(4 * GB, 2 * GB, GB, GB), tmp_path)
    with pytest.raises(PipelineError, match=r"GB free, 1000000.0 GB needed for hidden states"):
        choose_place("file", CPU, Needs(GB, GB, 10**15, GB), tmp_path)


def test_this_machine_has_memory() -> None:
    assert 10**8 < available_memory() < 1 << 50
