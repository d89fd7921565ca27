"""How the TPU compiler's texts are read."""

from nestedjax.planning import tpu_text

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
    found = tpu_text.program(PROGRAM)
    assert found.cycles == 7 + 32 * 10
    assert found.calls == {"k.1": 32} and found.moved == {"k.1": 8 * 128 * 4 + 4 * 2}
    # ten steps of a grid and two in which only blocks move; four trips of three bundles inside
    assert tpu_text.schedule(SCHEDULE) == tpu_text.Schedule(8, 2 + 10 * (3 + 4 * 3))
