"""CPU and memory of long stages, told through the journal."""

import threading

from pipelines.tracking import system_metrics
from pipelines.tracking.system_metrics import pause


class Run:
    """Remembers what it is told, and when it was told something twice."""

    def __init__(self):
        self.told, self.twice = [], threading.Event()

    def metrics(self, metrics, step):
        self.told.append((step, metrics))
        if len(self.told) == 2:
            self.twice.set()


def test_a_long_stage_tells_how_busy_its_machine_is_until_it_ends(monkeypatch):
    monkeypatch.setattr(system_metrics, "FIRST_SECONDS", 0.05)
    run = Run()
    with system_metrics.system_metrics(run):
        assert run.twice.wait(60)
    for _, metrics in run.told:
        assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= metrics.keys()
        assert all(0 <= value <= 100 for name, value in metrics.items() if name.endswith("percentage"))
    assert not any(thread.name == "system-metrics" for thread in threading.enumerate())


def test_a_stage_of_seconds_has_none():
    run = Run()
    with system_metrics.system_metrics(run):
        pass
    assert run.told == []


def test_a_machine_that_cannot_be_asked_stops_no_stage(monkeypatch, caplog):
    def broken():
        raise OSError("no /proc")

    monkeypatch.setattr(system_metrics, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(system_metrics, "measure_usage", broken)
    run = Run()
    with system_metrics.system_metrics(run):
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "system-metrics"]
        thread.join(60)
    assert run.told == [] and "no more system metrics of this stage" in caplog.text


def test_a_week_is_some_hundred_points():
    seconds = points = 0
    while seconds < 7 * 86_400:
        seconds += pause(seconds)
        points += 1
    assert 300 < points < 1000
