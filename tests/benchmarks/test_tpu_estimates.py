"""Estimates for TPUs: how the compiler's texts are read, and what is refused."""

import importlib.util

import pytest

from nestedjax.benchmarks import tpu_cycles, tpu_estimates
from tests.cli.tiny import refused

CALL = 'custom-call(%f.1), custom_call_target="tpu_custom_call"'
PROGRAM = f"""HloModule jit_f
%fused (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
}}
%cond (arg: (s32[])) -> pred[] {{
  %c = s32[]{{:T(128)}} constant(32)
  ROOT %lt = pred[] compare(%get, %c), direction=LT
}}
%body (arg: (s32[])) -> (s32[]) {{
  %f.1 = f32[8] fusion(%x), calls=%fused, backend_config={{"estimated_cycles":"10"}}
  %k.1 = f32[8,128]{{1,0}} {CALL}, operand_layout_constraints={{bf16[4]{{0}}}}, metadata={{}}
}}
ENTRY %main (p: f32[8]) -> f32[8] {{
  %copy = f32[8] copy(%p), backend_config={{"estimated_cycles":"7"}}
  %while.1 = (s32[]) while(%t), condition=%cond, body=%body, metadata={{}}
}}
"""

SCHEDULE = """LB: loop body
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %p1 = scmp.ge.s32.totalorder %s1, 12 }
   0x2   : > { %v0 = vld [vmem:[%s0] sm:$0xff] }
   0x3 LB: >> { %p2 = scmp.ge.s32.totalorder %s2, 4 }
   0x4   : >> { %v1 = vadd.f32 %v0, %v0 }
   0x5   : > { %9 = sbr.rel (!%p2) target = $region4 }
   0x6   : > { %3 = sbr.rel (!%p1) target = $region9 }
   0x7   :  {}
"""


def test_loops_count_as_often_as_they_run():
    found = tpu_cycles.program(PROGRAM)
    assert found.cycles == 7 + 32 * 10
    assert found.calls == {"k.1": 32} and found.moved == {"k.1": 8 * 128 * 4 + 4 * 2}
    # ten steps of a grid and two in which only blocks move; four trips of three bundles inside
    assert tpu_cycles.schedule(SCHEDULE) == tpu_cycles.Schedule(8, 2 + 10 * (3 + 4 * 3))


def test_what_is_missing_is_named(capsys, monkeypatch):
    arguments = ("bench", "kernels", "--tpu-estimates")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'nestedjax[tpu]'" in refused(capsys, *arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "no estimates for 'v9'; v5e, v5p, v6e" in refused(capsys, *arguments, "v9")
    both = refused(capsys, "bench", "kernels", "--against", "fla", *arguments[2:])
    assert "--against and --tpu-estimates are two benchmarks" in both


@pytest.mark.parametrize("answer", [{"milliseconds": 1.0, "flops_per_second": 1e9}, None])
def test_rows_have_the_benchmarks_keys(monkeypatch, answer):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    answer = tpu_estimates._refused("no VMEM") if answer is None else answer
    monkeypatch.setattr(tpu_estimates, "isolated", lambda *arguments: dict(answer))
    rows = list(tpu_estimates.measure(["v5e"], ops=["selective_scan"]))
    assert [(row["implementation"], row["direction"]) for row in rows] == [
        (how, direction)
        for how in ("xla", "pallas_tpu")
        for direction in ("forward", "forward+backward")
    ]
    assert rows[0]["device"] == "TPU v5 lite" and rows[0]["clock"] == "estimate"
    assert rows[0]["refused"] == answer.get("refused")
