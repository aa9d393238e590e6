"""What a compiled program sends, read from the ways in which backends write it."""

import pytest

from q8jax.hlo.costs import costs
from q8jax.hlo.text import parse

PROGRAM = """HloModule step, num_partitions=8

ENTRY %main (x: {dtype}[8,4]) -> {result} {{
  %x = {dtype}[8,4]{{1,0}} parameter(0)
  ROOT %out = {result} {op}(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true
}}
"""
SIZE = 8 * 4  # of the operand, in elements


def sent(op, groups="{{0,1,2,3}}", dtype="bf16", result="bf16[8,4]"):
    (found,) = costs(parse(PROGRAM.format(op=op, groups=groups, dtype=dtype, result=result))).collectives
    return found


@pytest.mark.parametrize(
    ("op", "result", "share"),
    [
        ("all-reduce", "bf16[8,4]", 2 * 3 / 4),
        ("all-gather", "bf16[32,4]", 3),
        ("reduce-scatter", "bf16[2,4]", 3 / 4),
        ("all-to-all", "bf16[8,4]", 3 / 4),
        ("collective-permute", "bf16[8,4]", 1),
        ("all-gather-start", "(bf16[8,4], bf16[32,4])", 3),
        ("all-reduce-start", "bf16[8,4]", 2 * 3 / 4),
    ],
)
def test_a_device_sends_what_a_ring_needs(op, result, share):
    found = sent(op, result=result)
    assert (found.op, found.dtype, found.times) == (op.removesuffix("-start"), "bf16", 1)
    assert found.bytes == 2 * SIZE * share


@pytest.mark.parametrize(
    ("pairs", "group"),
    [
        ("{{0,1},{1,0},{2,3},{3,2}}", (0, 1)),
        ("{{0,2},{1,3},{2,4},{3,5},{4,0},{5,1}}", (0, 2, 4)),
        ("{{0,1},{2,3},{1,2},{4,5}}", (0, 1, 2, 3)),
    ],
)
def test_who_a_device_passes_things_to_is_read_from_pairs(pairs, group):
    program = PROGRAM.format(op="collective-permute", groups="{}", dtype="bf16", result="bf16[8,4]")
    program = program.replace("replica_groups={}, use_global_device_ids=true", f"source_target_pairs={pairs}")
    (found,) = costs(parse(program)).collectives
    assert found.group == group and found.bytes == 2 * SIZE


ON_SPARSE_CORES = """HloModule step, num_partitions=8

%gathering (x: bf16[8,4], token: token[]) -> bf16[32,4] {
  %token = token[] parameter(1)
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %all = bf16[32,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,4]) -> bf16[32,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %begin = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %begun = token[] custom-call(%begin), custom_call_target="PrepareAsyncCallDone"
  %all.start = ((bf16[8,4], token[]), bf16[32,4]) call-start(%x, %begun), to_apply=%gathering
  ROOT %all.done = bf16[32,4]{1,0} call-done(%all.start)
}
"""


def test_what_a_tpu_leaves_to_its_sparse_cores_is_counted():
    found = costs(parse(ON_SPARSE_CORES))
    ((gathered,), kernels) = found.collectives, found.kernels
    assert (gathered.op, gathered.bytes, gathered.group, kernels) == ("all-gather", 2 * 3 * SIZE, (0, 1, 2, 3), 1)


@pytest.mark.parametrize("dtype", ["u8", "f8e4m3fn", "s8"])
def test_codes_are_counted_as_bytes(dtype):
    assert sent("all-gather", dtype=dtype, result=f"{dtype}[32,4]").bytes == 3 * SIZE


@pytest.mark.parametrize(
    ("groups", "group"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=2,'c'=1] {'a','b'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", (3, 1)),
        ("{}", tuple(range(8))),
    ],
)
def test_groups_are_read_in_every_spelling(groups, group):
    assert sent("all-reduce", groups).group == group


FUSED = """HloModule step

%add (x: bf16[], y: bf16[]) -> bf16[] {{
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}}

%inside (p: bf16[8,4]) -> bf16[{rows},4] {{
  %p = bf16[8,4] parameter(0)
  %zero = u32[] constant(0)
  %all-reduce = bf16[8,4] all-reduce(%p), channel_id=1, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %last = {last}
}}

ENTRY %main (x: bf16[8,4]) -> bf16[{rows},4] {{
  %x = bf16[8,4] parameter(0)
  ROOT %out = bf16[{rows},4] fusion(%x), kind=kCustom, calls=%inside
}}
"""


@pytest.mark.parametrize(
    ("rows", "last", "op", "share"),
    [
        (2, "bf16[2,4] dynamic-slice(%all-reduce, %zero, %zero), dynamic_slice_sizes={2,4}", "reduce-scatter", 3 / 4),
        (8, "bf16[8,4] negate(%all-reduce)", "all-reduce", 2 * 3 / 4),
    ],
)
def test_a_fused_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter(rows, last, op, share):
    (found,) = costs(parse(FUSED.format(rows=rows, last=last))).collectives
    assert (found.op, found.bytes) == (op, 2 * SIZE * share)


def test_pieces_of_one_collective_count_once_in_each_turn_of_a_loop():
    piece = (
        "  %gathered{0} = u8[32,4] all-gather(%p{0}), channel_id=3, replica_groups=[1,4]<=[4], dimensions={{0}}, "
        'frontend_attributes={{chain_id="{1}"}}\n'
    )
    fused = "".join(
        f"%piece{i} (p{i}: u8[8,4]) -> u8[32,4] {{\n  %p{i} = u8[8,4] parameter(0)\n"
        + piece.format(i, chain)
        + f"  ROOT %last{i} = u8[32,4] copy(%gathered{i})\n}}\n\n"
        for i, chain in enumerate("001")
    )
    body = "".join(f"  %run{i} = u8[32,4] fusion(%codes), kind=kCustom, calls=%piece{i}\n" for i in range(3))
    program = f"""HloModule step

{fused}%body (state: (s32[], u8[8,4])) -> (s32[], u8[8,4]) {{
  %state = (s32[], u8[8,4]) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %codes = u8[8,4] get-tuple-element(%state), index=1
{body}  ROOT %next = (s32[], u8[8,4]) tuple(%count, %codes)
}}

%goes_on (state: (s32[], u8[8,4])) -> pred[] {{
  %state = (s32[], u8[8,4]) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %turns = s32[] constant(5)
  ROOT %less = pred[] compare(%count, %turns), direction=LT
}}

ENTRY %main (state: (s32[], u8[8,4])) -> (s32[], u8[8,4]) {{
  %state = (s32[], u8[8,4]) parameter(0)
  ROOT %loop = (s32[], u8[8,4]) while(%state), condition=%goes_on, body=%body
}}
"""
    (found,) = costs(parse(program)).collectives
    assert (found.op, found.dtype, found.times) == ("all-gather", "u8", 2 * 5)
    assert found.bytes == 2 * 5 * 3 * SIZE


BETWEEN_SLICES = """HloModule step, num_partitions=4

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {{
  %x = bf16[8,4]{{1,0}} parameter(0)
  %after = token[] after-all()
  %send = (bf16[8,4]{{1,0}}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, {attributes}
  %send.done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (bf16[8,4]{{1,0}}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, {attributes}
  %recv.done = (bf16[8,4]{{1,0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = bf16[8,4]{{1,0}} get-tuple-element(%recv.done), index=0
}}
"""
OF_HOSTS = (
    'frontend_attributes={{_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{{1,2,3}}x{{0:3}}",_xla_megascale_transfer_type="{}"}}'
)


@pytest.mark.parametrize(
    ("transfer", "op", "share"),
    [
        ("ALL_REDUCE", "all-reduce", 2 * 2 / 3),
        ("ALL_GATHER", "all-gather", 2),
        ("REDUCE_SCATTER", "reduce-scatter", 2 / 3),
        ("ONE_TO_ONE", "collective-permute", 1),
    ],
)
def test_what_hosts_are_sent_for_other_slices_is_counted_once(transfer, op, share):
    (found,) = costs(parse(BETWEEN_SLICES.format(attributes=OF_HOSTS.format(transfer)))).collectives
    assert (found.op, found.dtype, found.times, found.group) == (op, "bf16", 1, (0, 4, 8))
    assert found.bytes == int(2 * SIZE * share)


def test_what_a_host_alone_is_sent_is_not_counted():
    attributes = 'frontend_attributes={_xla_host_transfer_handler_name="callback"}'
    assert not costs(parse(BETWEEN_SLICES.format(attributes=attributes))).collectives
