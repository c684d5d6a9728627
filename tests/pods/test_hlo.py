"""The reader of HLO: it loses nothing, and knows how arrays lie."""

import pytest

from clip_jax.pods import hlo
from tests.pods.conftest import compiled_scan, module

# A kernel's attributes run over lines, some of which look like the end of a computation.
KERNEL = """HloModule step
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]) parameter(0)
  %x = f32[8,128] get-tuple-element(%p), index=1
  %k = f32[8,128] custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata"="{\\"a\\": \\"}\\"}"
}}, backend_config={"body":"}}{{", "of": {"two": "lines
}}"}}
  %after = f32[8,128] add(%k, %x)
  ROOT %r = (s32[], f32[8,128]) tuple(%p, %after)
}
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128] parameter(0)
  ROOT %b = f32[8,128] negate(%a)
}
"""


def test_attributes_over_several_lines_end_no_computation_and_half_a_text_is_an_error():
    computations, entry = hlo.parse(KERNEL)
    assert entry == "main"
    assert list(computations["body"]) == ["p", "x", "k", "after", "r"]
    assert computations["body"]["k"].operands == ("x",)
    assert list(computations["main"]) == ["a", "b"]
    with pytest.raises(ValueError, match="breaks off"):
        hlo.parse(KERNEL[: KERNEL.index("ROOT %b")])


def test_as_many_as_the_module_itself_counts():
    [compiled] = compiled_scan().runtime_executable().hlo_modules()
    computations, entry = hlo.parse(compiled_scan().as_text())
    theirs = {x.name: len(x.instructions()) for x in compiled.computations()}
    assert {name: len(x) for name, x in computations.items()} == theirs
    assert {visit.times for visit in hlo.walk(computations, entry)} == {1, 3}


@pytest.mark.parametrize(
    ("shape", "size", "padded"),
    [
        ("f32[257,257]{1,0:T(8,128)}", 257 * 257 * 4, 264 * 384 * 4),
        ("f32[257,257]{1,0}", 257 * 257 * 4, 257 * 257 * 4),  # no tiles: a CPU's or a GPU's
        # Of the lengths that lie last, 128 and 768, both are whole tiles; the 197 are not tiled.
        ("bf16[128,197,768]{2,0,1:T(8,128)(2,1)}", 128 * 197 * 768 * 2, 128 * 197 * 768 * 2),
        ("bf16[128,197,768]{2,1,0:T(8,128)(2,1)}", 128 * 197 * 768 * 2, 128 * 200 * 768 * 2),
        ("f32[5]{0:T(128)S(5)}", 20, 512),  # with the host
        ("pred[3]{0:T(8,128)(4,1)}", 3, 8 * 128),
        ("s4[2,3]{1,0}", 3, 3),
        ("f32[]", 4, 4),
        ("f32[8]{0:S(1)}", 32, 32),  # a GPU's memory for exchanges
        ("f32[8]{0:T(128)S(1)}", 32, 512),  # on a TPU's chip, where it costs no traffic
    ],
)
def test_arrays_lie_in_whole_tiles(shape, size, padded):
    [result] = hlo.read_shapes(shape)
    assert (result.bytes, result.padded_bytes) == (size, padded)
    assert result.fast == shape.endswith("T(128)S(1)}")


def test_a_loop_whose_turns_are_not_said_is_an_error():
    lines = ("  %a = s32[] constant(3)", "  %b = s32[] constant(4)")
    loop = "  ROOT %w = s32[] while(%a), condition=%main, body=%main"
    computations, _ = hlo.parse(module(*lines, loop))
    with pytest.raises(ValueError, match="trip count of w is one of"):
        hlo.trips(computations["main"]["w"], computations)


def test_of_texts_by_length_the_groups_are_visited_and_of_other_choices_all_branches():
    text = """HloModule step
%padded (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %x = f32[8] negate(%p), metadata={op_name="jit(step)/by_length/cond/branch_0_fun/neg"}
}
%grouped (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %x = f32[8] negate(%p), metadata={op_name="jit(step)/by_length/cond/branch_1_fun/neg"}
}
ENTRY %main (n: s32[], a: f32[8]) -> f32[8] {
  %n = s32[] parameter(0)
  %a = f32[8] parameter(1)
  ROOT %b = f32[8] conditional(%n, %a, %a), branch_computations={%padded, %grouped}
}
"""
    visited = [x.name for x in hlo.walk(*hlo.parse(text))]
    assert visited == ["main", "grouped"]
    others = hlo.parse(text.replace("by_length", "by_weather"))
    assert [x.name for x in hlo.walk(*others)] == ["main", "padded", "grouped"]
