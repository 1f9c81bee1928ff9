import pytest
import torch

from bench import meter
from bench.meter import launches, peak_memory

CPU = torch.device("cpu")


def test_launches_counts_every_operator_and_what_it_calls():
    x = torch.randn(4)
    assert launches(lambda: x.add(x), CPU) == 1
    assert launches(lambda: [x.add(x) for _ in range(5)], CPU) == 5
    assert launches(lambda: torch.nn.functional.linear(x, torch.eye(4)), CPU) > 2


def test_peak_memory_is_what_a_call_adds_at_its_height():
    megabytes = 64

    def work():
        first = torch.ones(megabytes, 2**18)  # 1 MiB a row
        second = first + 1
        del first
        return second.sum()

    peak = peak_memory(work, CPU)
    if peak is None:
        pytest.skip("the system does not tell")
    assert 1.8 * megabytes < peak / 2**20 < 3 * megabytes


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(meter, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    assert peak_memory(lambda: None, CPU) is None
