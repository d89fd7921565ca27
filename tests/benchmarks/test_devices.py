"""The clock of a device, from a profile, and its roofline."""

from types import SimpleNamespace as Record

import jax
import jax.numpy as jnp
import pytest

from nestedjax.benchmarks import devices


def plane(name, **lines):
    events = {k: [Record(start_ns=s, duration_ns=d) for s, d in v] for k, v in lines.items()}
    return Record(name=name, lines=[Record(name=k, events=v) for k, v in events.items()])


def test_overlapping_streams_count_once():
    streams = plane("/device:GPU:0", a=[(0, 10), (30, 5)], b=[(5, 10), (31, 2)])
    host = plane("/host:CPU", python=[(0, 1000)])
    second = plane("/device:GPU:1", a=[(0, 500)])
    assert devices.busy_seconds([host, second, streams]) == pytest.approx(20e-9)


def test_a_tpu_counts_whole_programs():
    lines = {"Steps": [(0, 100)], "XLA Modules": [(10, 20)], "XLA Ops": [(10, 5), (16, 5)]}
    assert devices.busy_seconds([plane("/device:TPU:0", **lines)]) == pytest.approx(20e-9)


def test_a_profile_of_a_cpu_says_nothing_of_a_device(tmp_path):
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(3) + 1)
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert devices._profiled(tmp_path) == 0


def test_without_a_device_in_the_profile_the_host_is_asked(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    taken, clock = devices.seconds(lambda: jnp.ones(3) + 1, 2)
    assert clock == "host" and taken > 0


def test_the_device_is_asked_first(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(devices, "_profiled", lambda folder: 6e-3)
    assert devices.seconds(lambda: jnp.ones(3), 3) == (2e-3, "device")


def test_roofline():
    kind = "NVIDIA H200"
    assert devices.roofline(kind, 989e9, 0.0, 2e-3) == pytest.approx(0.5)
    assert devices.roofline(kind, 989e9, 4.8e10, 20e-3) == pytest.approx(0.5)
    assert devices.roofline("cpu", 1e9, 1e9, 1.0) is None
