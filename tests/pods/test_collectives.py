"""Collectives, read from HLO as the TPU compiler writes it."""

from clip_jax.pods.collectives import collectives
from tests.pods.conftest import module


def test_collectives_between_slices_are_read():
    """The TPU compiler writes them as transfers of one chip with its likes on the other slices."""
    transfer = "u32[], token[]) recv(%a), channel_id={}, frontend_attributes={{{}}}"
    name = '_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{}"'
    lines = [
        f"  %r{i} = (f32[{dims}]{{1,0}}, " + transfer.format(i, name.format(kind))
        for i, (dims, kind) in enumerate([("8,128", "ALL_REDUCE"), ("16,16", "ALL_GATHER")])
    ]
    gathered, reduced = collectives(module(*lines), {"data": 4, "fsdp": 2, "tensor": 1}, 2)
    assert (gathered.kind, reduced.kind) == ("all-gather", "all-reduce")
    assert reduced.axes == gathered.axes == ("data",)
    assert reduced.received_from_slices == 8 * 128 * 4  # half sent away, half got back, twice
    assert gathered.received_from_slices == 16 * 16 * 4 // 2
    assert reduced.received == gathered.received == 0


def test_gradients_of_a_decoder_and_of_its_text_tower_are_two_parts():
    decoder = "jit(step)/transpose(jvp(Towers.run))/decoder.embed_and_write/"
    lines = [
        f"  %r{i} = f32[8]{{0}} all-reduce(%a), replica_groups={{{{0,1}}}}, "
        f'metadata={{op_name="{decoder}{source}"}}'
        for i, source in enumerate(("text/mlp/dot_general", "decoder._run/mlp/dot_general"))
    ]
    found = collectives(module(*lines), {"data": 2})
    assert {x.part for x in found} == {"text tower, backward", "caption decoder, backward"}


def test_a_fused_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    """As the TPU compiler writes it; a sum that is used whole stays an all-reduce."""
    text = """HloModule step
%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0} parameter(0)
  %sum = bf16[64,128]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %kept = bf16[16,128]{1,0} dynamic-slice(%sum, %place), dynamic_slice_sizes={16,128}
}
ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %shard = bf16[16,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/transpose(jvp(visual))/c_fc"}
  ROOT %whole = bf16[64,128]{1,0} all-reduce(%a), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}
}"""
    total, shard = collectives(text, {"data": 2, "fsdp": 4, "tensor": 1})
    assert (total.kind, shard.kind) == ("all-reduce", "reduce-scatter")
    assert shard.source == "jit(step)/transpose(jvp(visual))/c_fc"
    assert total.received == 2 * shard.received == 2 * (64 * 128 * 2) * 3 // 4


def test_layers_without_a_loop_have_collectives_of_one_channel():
    """Equal collectives of one channel differ in their chain, or are a fusion each."""
    layers = [
        f"""%all-reduce-scatter.{i} (a: f32[8]) -> f32[4] {{
  %a = f32[8]{{0}} parameter(0)
  %sum = f32[8]{{0}} all-reduce(%a), channel_id=1, replica_groups={{{{0,1}}}}
  ROOT %kept = f32[4]{{0}} dynamic-slice(%sum, %place), dynamic_slice_sizes={{4}}
}}
%async_collective_fusion.{i} (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} all-gather(%p), channel_id=1, replica_groups={{{{0,1}}}}, \
frontend_attributes={{chain_id="{i // 2}"}}
}}"""
        for i in range(4)
    ]
    calls = [
        f"  %x{i}.{kind} = f32[4]{{0}} fusion(%a), kind=kCustom, calls=%{kind}.{i}"
        for i in range(4)
        for kind in ("all-reduce-scatter", "async_collective_fusion")
    ]
    text = "\n".join(["HloModule m", *layers, "ENTRY %main (a: f32[8]) -> f32[8] {", *calls, "}"])
    kinds = [x.kind for x in collectives(text, {"data": 2})]
    assert (kinds.count("reduce-scatter"), kinds.count("all-gather")) == (4, 2)


ASYNC = """HloModule step
%begin (p: f32[64]) -> (f32[64], f32[256]) {
  %p = f32[64]{0} parameter(0)
  %g = f32[256]{0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %c = (f32[64], f32[256]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (p: f32[64]) -> f32[256] {
  %p = f32[64]{0} parameter(0)
  ROOT %g = f32[256]{0} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
}
ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %s = (f32[64], f32[256]) fusion(%a), kind=kCustom, calls=%begin
  %f = f32[256]{0} fusion(%s), kind=kOutput, calls=%async_collective_fusion.1
  %plain = f32[64]{0} all-reduce(%a), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}
  %idle = (f32[64], f32[64]) all-reduce-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %idle-done = f32[64]{0} all-reduce-done(%idle)
  %busy = (f32[64], f32[64]) all-reduce-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %work = f32[64]{0} fusion(%a), kind=kLoop, calls=%none
  ROOT %busy-done = f32[64]{0} all-reduce-done(%busy)
}
%none (p: f32[64]) -> f32[64] {
  ROOT %p = f32[64]{0} parameter(0)
}"""


def test_a_collective_overlaps_if_work_runs_between_its_start_and_its_end():
    """Fused with work, or with work between its two instructions; a plain one does not."""
    every = collectives(ASYNC, {"data": 2, "fsdp": 4, "tensor": 1})
    assert sorted(x.kind for x in every) == ["all-gather"] + ["all-reduce"] * 3
    assert sorted(x.kind for x in every if x.overlapped) == ["all-gather", "all-reduce"]
