"""What operations compute and move, against what is known by hand."""

import jax
import jax.numpy as jnp
import pytest

from clip_jax.pods import work
from clip_jax.pods.schedule import Schedule
from tests.pods.conftest import compiled_scan, module

FULL = 128 * 128 * 4  # bytes of f32[128,128]
X = "f32[128,128]{1,0:T(8,128)}"
PAIR = f"(s32[], {X})"


def loop(name: str, turns: int, body: str) -> str:
    """The two computations of a loop over a counter and an array."""
    return f"""
%{name}_cond (i: s32[]) -> pred[] {{
  %i = s32[]{{:T(128)}} parameter(0)
  %n = s32[]{{:T(128)}} constant({turns})
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %n), direction=LT
}}
%{name} (p: (s32[], f32[128,128])) -> (s32[], f32[128,128]) {{
  %p = {PAIR} parameter(0)
{body}
}}"""


# Two loops, one in the other; a kernel that says its FLOPs and one that doesn't.
INNER = f"""  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %x = {X} get-tuple-element(%p), index=1
  %m = {X} convolution(%x, %x), dim_labels=bf_io->bf, \
metadata={{op_name="jit(s)/jvp(T)/visual/resblocks/mlp/c_fc/dot"}}, \
backend_config={{"estimated_cycles":"700"}}
  ROOT %r = {PAIR} tuple(%i, %m)"""
OUTER = f"""  %w = {PAIR} while(%p), condition=%inner_cond, body=%inner
  %x = {X} get-tuple-element(%w), index=1
  %b = {X} bitcast(%x)
  %k = f32[128,100]{{1,0:T(8,128)}} custom-call(%x, %b), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(s)/jvp(T)/visual/resblocks/attn/pallas_call"}}, \
backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"1000"}}}}}}
  ROOT %r = {PAIR} tuple(%w, %k)"""
NESTED = f"""HloModule step
{loop("inner", 5, INNER)}{loop("outer", 3, OUTER)}
ENTRY %main (a: f32[128,128]) -> f32[128,128] {{
  %a = {X} parameter(0)
  %t = {PAIR} tuple(%a, %a)
  %w = {PAIR} while(%t), condition=%outer_cond, body=%outer
  ROOT %u = f32[16,128]{{1,0:T(8,128)}} custom-call(%w), custom_call_target="tpu_custom_call"
}}
"""


def parameters(**shapes: str) -> list[str]:
    return [f"  %{name} = {x} parameter({i})" for i, (name, x) in enumerate(shapes.items())]


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_flops_of_splash_attention(kernel, products):
    """Which has no estimate: by its products of [L, L] matrices, of padded heads."""
    heads = "bf16[8,2,256,128]{3,2,1,0:T(8,128)(2,1)}"
    lines = [
        *parameters(i="s32[1,4]{1,0}", q=heads, k=heads),
        f'  ROOT %s = {heads} custom-call(%i, %q, %k), custom_call_target="tpu_custom_call", '
        f'metadata={{op_name="jit(s)/attn/vmap(splash_mha_{kernel}_segmented)/pallas_call"}}',
    ]
    [x] = work.read(module(*lines))
    assert x.flops == products * 2 * 8 * 2 * 256 * 256 * 128


def test_nested_loops_and_kernels():
    schedules = {"k": Schedule(90), "m": Schedule(60, 50), "unknown": Schedule(7)}
    works = {x.name: x for x in work.read(NESTED, schedules)}
    assert set(works) == {"m", "k", "u"}
    m, k, u = works["m"], works["k"], works["u"]
    assert (m.times, m.flops, m.bytes, m.cycles) == (15, 2 * 128**3, 2 * FULL, 700)  # x times x
    assert (k.times, k.flops, k.bytes, k.cycles) == (3, 1000, 2 * FULL, 90)  # x once; 100 take 128
    assert (u.times, u.flops, u.cycles, u.schedule) == (1, None, None, None)
    assert (m.schedule, m.matrix, k.schedule) == (60, 50, 90)
    assert (m.opcode, k.opcode) == ("convolution", "custom-call")
    assert (m.part, k.part) == ("MLP", "attention")


def test_equal_kernels_have_one_schedule():
    """The compiler writes that of one of them."""
    call = 'f32[16,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", '
    lines = [
        f'  %{name} = {call}backend_config={{"custom_call_config":{{"body":"{body}"}}}}'
        for name, body in (("forward.1", "QUJD"), ("again.2", "QUJD"), ("backward.3", "REVG"))
    ]
    text = module(*parameters(a="f32[16,128]{1,0:T(8,128)}"), *lines)
    schedules = {"again.2": Schedule(90, 80)}
    cycles = {x.name: (x.cycles, x.schedule, x.matrix) for x in work.read(text, schedules)}
    ours = (90, 90, 80)
    assert cycles == {"forward.1": ours, "again.2": ours, "backward.3": (None, None, 0)}


def test_equal_operations_have_one_schedule():
    """They have the same kind, arrays and estimate; one of other arrays is another."""
    lines = [
        f'  %{name} = {x} negate(%{of}), backend_config={{"estimated_cycles":"{cycles}"}}'
        for name, x, of, cycles in (
            ("first", X, "a", 9),
            ("again", X, "b", 9),
            ("other", X, "a", 8),
            ("small", "f32[8,128]{1,0:T(8,128)}", "c", 9),
        )
    ]
    text = module(*parameters(a=X, b=X, c="f32[8,128]{1,0:T(8,128)}"), *lines)
    schedules = {x.name: x.schedule for x in work.read(text, {"again": Schedule(5)})}
    assert schedules == {"first": 5, "again": 5, "other": None, "small": None}


FUSED = """HloModule step
%saved (p0: bf16[12,64,256], p1: bf16[64,256], p2: s32[]) -> bf16[12,64,256] {
  %p0 = bf16[12,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %b = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} bitcast(%p1)
  ROOT %u = bf16[12,64,256]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0, %b, %p2, %p2, %p2)
}
%taken (q0: bf16[12,64,256], q1: s32[]) -> bf16[64,256] {
  %q0 = bf16[12,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  %s = bf16[1,64,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q0, %q1, %q1, %q1)
  ROOT %o = bf16[64,256]{1,0:T(8,128)(2,1)} bitcast(%s)
}
ENTRY %main (a: bf16[12,64,256], c: bf16[64,256], i: s32[]) -> bf16[64,256] {
  %a = bf16[12,64,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %c = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %f = bf16[12,64,256]{2,1,0:T(8,128)(2,1)} fusion(%a, %c, %i), kind=kLoop, calls=%saved
  ROOT %g = bf16[64,256]{1,0:T(8,128)(2,1)} fusion(%f, %i), kind=kLoop, calls=%taken
}
"""


def test_an_update_in_place_writes_and_a_slice_reads_its_part():
    saved, taken = work.read(FUSED)
    assert saved.bytes == 64 * 256 * 2  # what it saves comes from the chip
    assert taken.bytes == 2 * saved.bytes


QUERY, WIDE = "bf16[128,77,8,64]", "bf16[128,77,512,1,1]"
IMAGE, KERNEL, OUTPUT = "f32[2,8,8,4]", "f32[3,3,4,6]", "f32[2,4,4,6]"
CONVOLUTION = (
    "({}, u8[0]) custom-call(%x, %y), window={{size=3x3 stride=2x2 pad=1_1x1_1}}, "
    'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$conv{}"'
)
ATTENTION = 'custom-call(%x, %y, %z), custom_call_target="__cudnn$fmhaSoftmax'
PRODUCT = 2 * 128 * 8 * 77 * 77 * 64


PRECISE = "{} dot(%x, %y), lhs_contracting_dims={{1}}, operand_precision={{highest,highest}}"


@pytest.mark.parametrize(
    ("operands", "line", "flops"),
    [
        # As TPUs write [B, N] attention of 77 × 77: most places of the window are padding.
        (
            (QUERY, QUERY),
            "f32[128,8,77,77] convolution(%x, %y), window={size=128x8 stride=127x7 "
            "lhs_dilate=128x8}, dim_labels=0b1f_0o1i->01bf",
            PRODUCT,
        ),
        (  # and a projection to three times eight heads
            (WIDE, "bf16[512,3,8,64,1]"),
            "bf16[128,77,3,8,64] convolution(%x, %y), window={size=1x3x8 pad=0_0x2_2x7_7 "
            "rhs_reversal=0x1x1}, dim_labels=b0f12_i12o0->b012f",
            2 * 128 * 77 * 512 * 3 * 8 * 64,
        ),
        # Only float32 operands take several passes.
        (("f32[8,16]", "f32[16,4]"), PRECISE.format("f32[8,4]"), 6 * 2 * 8 * 16 * 4),
        (("bf16[8,16]", "bf16[16,4]"), PRECISE.format("f32[8,4]"), 2 * 8 * 16 * 4),
        # cuDNN's gradients of a convolution cost what it does: of four outputs along a side of
        # eight the first sees two places, the others three.
        ((IMAGE, KERNEL), CONVOLUTION.format(OUTPUT, "Forward"), 2 * 2 * 11**2 * 4 * 6),
        ((OUTPUT, KERNEL), CONVOLUTION.format(IMAGE, "BackwardInput"), 2 * 2 * 11**2 * 4 * 6),
        ((IMAGE, OUTPUT), CONVOLUTION.format(KERNEL, "BackwardFilter"), 2 * 2 * 11**2 * 4 * 6),
        # cuDNN's attention is two products forward and five backward.
        ((QUERY,) * 3, f'({QUERY}, u8[0]) {ATTENTION}"', 2 * PRODUCT),
        ((QUERY,) * 3, f'({QUERY}, u8[0]) {ATTENTION}Backward"', 5 * PRODUCT),
    ],
)
def test_flops_of_one_operation(operands, line, flops):
    shapes = dict(zip("xyz", operands, strict=False))
    [works] = work.read(module(*parameters(**shapes), f"  ROOT %c = {line}"))
    assert works.flops == flops


def test_flops_of_a_scan_and_of_convolutions_as_xla_compiles_them():
    works = work.read(compiled_scan().as_text())
    assert sum(x.times * (x.flops or 0) for x in works) == 2 * 3 * 2 * 8 * 16 * 16

    def convolved(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    compiled = jax.jit(convolved).lower(jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8))).compile()
    places = (5 * 3 - 2) ** 2  # of five outputs the first and the last see two pixels, not three
    [flops] = [x.flops for x in work.read(compiled.as_text()) if x.flops]
    assert flops == compiled.cost_analysis()["flops"] == 2 * 2 * places * 4 * 8
