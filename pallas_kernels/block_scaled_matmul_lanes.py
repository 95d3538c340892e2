"""The arithmetic of `block_scaled_matmul_mosaic` lane by lane: registers of mma.sync, and what Pallas has no words for.

A warpgroup multiplies 64 outputs by units of 128 inputs. Lane 4 g + t of warp w reads, of outputs 16 w + g and
16 w + g + 8, the 16 bytes of codes of inputs 32 t ... 32 t + 31: whole sectors of memory go to registers, and no code
passes through shared memory. Which inputs a lane holds is free as long as x follows: within each 8 inputs, a word of
codes, inputs i and i + 4 make a pair, since their codes lie 16 bits apart. x is put in this order on its way to shared
memory, [unit, word of a lane, row, lane t, 8], where each load of an operand is 512 bytes in a row.

E2M1 becomes bfloat16 by moving its bits: the exponent and the mantissa bit, put at the lowest exponent, are the value
times 2^-126, 0.5 being a subnormal. An E4M3 scale becomes bfloat16 in the same way. The scale is multiplied by 2^119
and so makes up for it; the last 2^7 are left to the scale of the tensor. All of these products are exact.
"""

import functools
from typing import Any

import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu

OUTPUTS = 64  # of a warpgroup
UNIT = 128  # inputs

# x * code 2^-126 * scale 2^119: what is left is 2^7.
LEFT_OVER = 128.0

# Nibbles i and i + 4 of a word are bits 4 (i % 2) of its halves, after a shift by 8 for i > 1. A product by two powers
# of two puts one copy where the sign belongs and one where exponent and mantissa belong.
NIBBLES = ((0x000F000F, 0x1040), (0x00F000F0, 0x0104))
VALUE = 0x81C081C0

BF16_2_120, BF16_2_119 = 0x7B807B80, 0x7B007B00
NAN = 0x7F7F
NONE = 0x0101


def _i32(value: int | Any) -> Any:
    if isinstance(value, int):
        return mgpu.c(value - (1 << 32) if value >= 1 << 31 else value, ir.IntegerType.get_signless(32))
    return value


def _ptx(code: str, *operands: Any, results: int = 0, floats: bool = False, volatile: bool = True) -> Any:
    kind = ir.F32Type.get() if floats else ir.IntegerType.get_signless(32)
    types: Any = None if not results else kind if results == 1 else [kind] * results
    together = ".sync" in code or code.startswith("barrier.")  # of all lanes: not to be moved under a condition
    volatile = volatile or not results
    return mgpu.utils.inline_ptx(code, *operands, result_types=types, has_side_effects=volatile, convergent=together)


def _address(ref: Any, offset: Any = None, wide: bool = True) -> Any:
    """Of shared (32 bits) or global memory (64), so many bytes after the start."""
    integer = ir.IntegerType.get_signless(64 if wide else 32)
    start = llvm.ptrtoint(integer, mgpu.utils.memref_ptr(ref))
    if offset is None:
        return start
    return arith.addi(start, arith.extui(integer, offset) if offset.type != integer else offset)


def _wide(value: Any) -> Any:
    return arith.extui(ir.IntegerType.get_signless(64), value)


def _times(value: Any, factor: int) -> Any:
    return arith.muli(value, mgpu.c(factor, value.type))


def _and(value: Any, mask: int) -> Any:
    return arith.andi(value, _i32(mask))


def _right(value: Any, count: int) -> Any:
    return arith.shrui(value, _i32(count))


def _permute(low: Any, high: Any, selector: int) -> Any:
    return _ptx("prmt.b32 $0, $1, $2, $3;", low, high, _i32(selector), results=1, volatile=False)


def _multiply_pairs(a: Any, b: Any) -> Any:
    return _ptx("mul.rn.bf16x2 $0, $1, $2;", a, b, results=1, volatile=False)


def _decode(word: Any, scale: Any) -> list[Any]:
    """Eight codes -> bfloat16 weights in pairs (0, 4), (1, 5), (2, 6), (3, 7)."""
    pairs = []
    for part in (word, _right(word, 8)):
        for mask, factor in NIBBLES:
            bits = _and(_times(_and(part, mask), factor), VALUE)
            pairs.append(_multiply_pairs(bits, scale))
    return pairs


def _scale_pairs(codes: Any) -> list[Any]:
    """Two E4M3 codes -> each twice as bfloat16 scale * 2^119, whatever NaN becomes."""
    apart = _permute(codes, _i32(0), 0x1404)
    bits = arith.ori(_and(apart, 0x80008000), _and(_right(apart, 4), 0x07F007F0))
    both = _multiply_pairs(_multiply_pairs(bits, _i32(BF16_2_120)), _i32(BF16_2_119))
    return [_permute(both, both, 0x1010), _permute(both, both, 0x3232)]


def _mma(acc: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    code = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return list(_ptx(code, *a, *b, *acc, results=4, floats=True, volatile=False))


def _place() -> tuple[Any, Any, Any]:
    """(warp of the warpgroup, g, t) of this lane."""
    thread = mgpu.utils.thread_idx()
    return _and(_right(thread, 5), 3), _and(_right(thread, 2), 7), _and(thread, 3)


def _scalars(values: Any) -> list[Any]:
    return [value.registers.item() for value in values]


GROUP_ROWS = 8  # of a tile of one expert: the narrowest operand
MOST_EXPERTS = 1024  # the square of the lanes of a warp


def find(experts: int, rows: int) -> Any:
    """The function for `plgpu.inline_mgpu`: (expert, first row, number of rows) of a tile of GROUP_ROWS.

    Tiles follow each other expert by expert. Rows past the sum of the sizes are tiles of expert `experts`; those that
    are not in use have no rows. Every warp finds out for itself: first which lane's share of the experts, then which
    expert of that share. Rows and tiles are counted in the two halves of a word.
    """
    share = -(-experts // 32)
    assert share <= 32 and rows < 1 << 8

    def search(_, sizes_g, tile):
        (tile,) = _scalars((tile,))
        lane = _and(mgpu.utils.thread_idx(), 31)
        sizes = _address(sizes_g)
        less = arith.CmpIPredicate.slt

        def counts(index):
            at = arith.minsi(index, _i32(experts - 1))
            size = _ptx("ld.global.u32 $0, [$1];", arith.addi(sizes, _times(_wide(at), 4)), results=1)
            size = arith.select(arith.cmpi(less, index, _i32(experts)), size, _i32(0))
            return arith.addi(size, _times(_right(arith.addi(size, _i32(GROUP_ROWS - 1)), 3), 1 << 16))

        def sums(value):  # over this lane and those before
            for distance in (1, 2, 4, 8, 16):
                code = f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;"
                before = _ptx(code, value, results=1)
                before = arith.select(arith.cmpi(less, lane, _i32(distance)), _i32(0), before)
                value = arith.addi(value, before)
            return value

        def of_lane(value, lane):
            return _ptx("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", value, lane, results=1)

        def here(start, end, value):  # of the lane that has the tile, to all; else 0
            has = arith.cmpi(less, tile, _right(end, 16))
            has = arith.andi(has, arith.cmpi(arith.CmpIPredicate.sge, tile, _right(start, 16)))
            return _ptx("redux.sync.or.b32 $0, $1, 0xffffffff;", arith.select(has, value, _i32(0)), results=1)

        mine = [counts(arith.addi(_times(lane, share), _i32(i))) for i in range(share)]
        mine = functools.reduce(arith.addi, mine)
        end = sums(mine)
        start = arith.subi(end, mine)
        owner = here(start, end, arith.addi(lane, _i32(1)))
        is_owned = arith.cmpi(less, _i32(0), owner)
        owner = arith.select(is_owned, arith.subi(owner, _i32(1)), _i32(0))

        index = arith.addi(_times(owner, share), lane)
        one = arith.select(arith.cmpi(less, lane, _i32(share)), counts(index), _i32(0))
        end_of_one = arith.addi(sums(one), of_lane(start, owner))
        start_of_one = arith.subi(end_of_one, one)

        def first_row(before):
            return arith.addi(_and(before, 0xFFFF), _times(arith.subi(tile, _right(before, 16)), GROUP_ROWS))

        first = first_row(start_of_one)
        count = arith.minsi(arith.subi(_and(end_of_one, 0xFFFF), first), _i32(GROUP_ROWS))
        found = arith.addi(_times(index, 1 << 16), arith.addi(_times(first, 1 << 8), count))
        found = here(start_of_one, end_of_one, found)
        none = first_row(of_lane(end, _i32(31)))
        left = arith.minsi(arith.subi(_i32(rows), none), _i32(GROUP_ROWS))

        results = (
            arith.select(is_owned, _right(found, 16), _i32(experts)),
            arith.select(is_owned, _and(_right(found, 8), 0xFF), none),
            arith.select(is_owned, _and(found, 0xFF), left),
        )
        return tuple(mgpu.FragmentedArray.splat(value, (), is_signed=True) for value in results)

    return search


def products(units: int, total: int, experts: int, shape: tuple[int, int], ragged: bool, again: bool) -> Any:
    """The function for `plgpu.inline_mgpu`: adds `units` units of inputs to the sums of a warpgroup.

    total: units of all inputs. shape: outputs and inputs of a weight. ragged: units past `total` may be asked for.
    again: other units were multiplied before, with x in the same shared memory.
    """
    outputs, inputs = shape
    assert experts * outputs < 1 << 31

    def add(_, acc, codes_g, scales_g, x_g, x_s, expert, first_output, first_row, last_row, first_unit):
        rows = acc.shape[1]
        expert, first_output, first_row, last_row, first_unit = _scalars(
            (expert, first_output, first_row, last_row, first_unit)
        )
        warp, g, t = _place()
        row = arith.addi(_times(expert, outputs), arith.addi(first_output, arith.addi(_times(warp, 16), g)))

        def unit(i):
            place = arith.addi(first_unit, _i32(i))
            return arith.minsi(place, _i32(total - 1)) if ragged else place

        # Every load of codes and scales is on its way before anything waits.
        words, scales = [], []
        for i in range(units):
            for half in range(2):
                # The place in a row is added in 64 bits; without ragged ends it is a constant beside the register.
                at, ahead = (unit(i), 0) if ragged else (first_unit, i)
                codes = _address(codes_g, _times(_wide(row), inputs // 2))
                codes = arith.addi(codes, _wide(arith.addi(_times(at, UNIT // 2), _times(t, 16))))
                offset = half * 8 * (inputs // 2) + ahead * (UNIT // 2)
                words.append(
                    _ptx(
                        f"ld.global.L1::no_allocate.L2::256B.v4.b32 {{$0,$1,$2,$3}}, [$4+{offset}];",
                        codes,
                        results=4,
                    )
                )
                blocks = _address(scales_g, _times(_wide(row), inputs // 16))
                blocks = arith.addi(blocks, _wide(arith.addi(_times(at, UNIT // 16), _times(t, 2))))
                offset = half * 8 * (inputs // 16) + ahead * (UNIT // 16)
                scales.append(_ptx(f"ld.global.u16 $0, [$1+{offset}];", blocks, results=1))

        # x in pairs: a warp takes both rows of two and the 16 pieces of 8 inputs of a unit.
        shared = _address(x_s, wide=False)
        lane_row, piece = _and(g, 1), _right(g, 1)

        def fetch(item):  # 4 item + warp: unit and pair of rows
            i, pair = divmod(4 * item, rows // 2)
            which = arith.addi(_times(arith.addi(_i32(pair), warp), 2), lane_row)
            from_row = arith.minsi(arith.addi(first_row, which), last_row)
            at = arith.addi(_times(unit(i), 2 * UNIT), arith.addi(_times(t, 64), _times(piece, 16)))
            source = arith.addi(_address(x_g, _times(_wide(from_row), 2 * inputs)), _wide(at))
            values = list(_ptx("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", source, results=4))
            if ragged:
                inside = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(first_unit, _i32(i)), _i32(total))
                values = [arith.select(inside, value, _i32(0)) for value in values]
            to = arith.addi(_times(arith.addi(_times(piece, rows), which), 64), _times(t, 16))
            return values, arith.addi(shared, arith.addi(to, _i32(i * 4 * rows * 64)))

        items = range(units * rows // 8)
        together = 8 if rows <= 32 else 16  # what there are registers for
        for start in range(0, len(items), together):
            fetched = [fetch(item) for item in items[start : start + together]]
            if again and start == 0:  # while loads are on their way: slower warps may still read the x before
                mgpu.utils.warpgroup_barrier()
            for (v0, v1, v2, v3), to in fetched:
                halves = [(v0, v2, 0x5410), (v0, v2, 0x7632), (v1, v3, 0x5410), (v1, v3, 0x7632)]
                _ptx("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", to, *(_permute(*pair) for pair in halves))
        mgpu.utils.warpgroup_barrier()

        f32 = ir.F32Type.get()
        registers = acc.registers.reshape(rows // 8, 2)
        sums = [
            [vector.extract(registers[j, h], dynamic_position=[], static_position=[k]) for h in (0, 1) for k in (0, 1)]
            for j in range(rows // 8)
        ]
        mine = arith.addi(shared, arith.addi(_times(g, 64), _times(t, 16)))
        unknown = [_i32(0), _i32(0)]
        for i in range(units):
            pairs_of = [_scale_pairs(scales[2 * i + half]) for half in range(2)]
            for half in range(2):
                code = arith.addi(_and(scales[2 * i + half], NAN), _i32(NONE))
                unknown[half] = arith.ori(unknown[half], code)
            for q in range(4):
                upper, lower = (_decode(words[2 * i + half][q], pairs_of[half][q // 2]) for half in range(2))
                for j in range(rows // 8):
                    offset = ((i * 4 + q) * rows + 8 * j) * 64
                    x = _ptx(f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{offset}];", mine, results=4)
                    for k in (0, 2):
                        a = [upper[k], lower[k], upper[k + 1], lower[k + 1]]
                        sums[j] = _mma(sums[j], a, list(x[k : k + 2]))

        nan = mgpu.c(float("nan"), f32)
        result = np.empty_like(registers)
        for half in range(2):
            for distance in (1, 2):  # the scales of an output are spread over four lanes, and so are its sums
                code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
                unknown[half] = arith.ori(unknown[half], _ptx(code, unknown[half], results=1))
            known = arith.cmpi(arith.CmpIPredicate.eq, _and(unknown[half], 0x8080), _i32(0))
            for j in range(rows // 8):
                both = llvm.mlir_undef(ir.VectorType.get((2,), f32))
                for k in range(2):
                    value = arith.select(known, sums[j][2 * half + k], nan)
                    both = vector.insert(value, both, dynamic_position=[], static_position=[k])
                result[j, half] = both
        return mgpu.FragmentedArray(_registers=result.reshape(acc.registers.shape), _layout=acc.layout, _is_signed=None)

    return add


def finish(groups: int, split: int, total_outputs: int, half_width: bool) -> Any:
    """The function for `plgpu.inline_mgpu`: adds up the sums of all warpgroups of a cluster, scales and stores them.

    groups: warpgroups of a block. split: blocks of the cluster. half_width: the result is bfloat16, not float32.
    Block i of the cluster gets the i-th part of the 64 outputs; each sum is made in the order of the warpgroups.
    """
    each = OUTPUTS // split
    pitch = each + 4  # numbers of a row in shared memory: lanes that store together use banks of their own

    def end(_, acc, sums_s, out_g, scale, first_output, first_new, first_row, count):
        rows = acc.shape[1]
        scale, first_output, first_new, first_row, count = _scalars((scale, first_output, first_new, first_row, count))
        f32 = ir.F32Type.get()
        warp, g, t = _place()
        thread = mgpu.utils.thread_idx()
        block = _ptx("mov.u32 $0, %cluster_ctarank;", results=1) if split > 1 else _i32(0)
        group = _right(thread, 7)
        slot = arith.addi(_times(block, groups), group)
        sums = _address(sums_s, wide=False)

        registers = acc.registers.reshape(rows // 8, 2)
        for half in range(2):
            output = arith.addi(_times(warp, 16), arith.addi(g, _i32(8 * half)))
            inside = _and(output, each - 1)
            to = arith.addi(_times(slot, rows), _times(t, 2))
            to = arith.addi(sums, _times(arith.addi(_times(to, pitch), inside), 4))
            space = "shared"
            if split > 1:
                space = "shared::cluster"
                owner = arith.divui(output, _i32(each))
                to = _ptx("mapa.shared::cluster.u32 $0, $1, $2;", to, owner, results=1)
            for j in range(rows // 8):
                for k in range(2):
                    value = vector.extract(registers[j, half], dynamic_position=[], static_position=[k])
                    _ptx(f"st.{space}.f32 [$0+{(8 * j + k) * pitch * 4}], $1;", to, value)
        if split > 1:
            _ptx("barrier.cluster.arrive.release.aligned;")
            _ptx("barrier.cluster.wait.acquire.aligned;")
        else:
            _ptx("bar.sync 0;")

        scale = arith.mulf(scale, mgpu.c(LEFT_OVER, f32))
        width = 2 if total_outputs % 2 == 0 else 1  # outputs of a store
        threads, work = 128 * groups, each // width * rows
        for start in range(0, work, threads):
            item = arith.addi(thread, _i32(start))
            m, o = arith.divui(item, _i32(each // width)), _times(_and(item, each // width - 1), width)
            wanted = arith.cmpi(arith.CmpIPredicate.slt, m, count)
            if start + threads > work:
                wanted = arith.andi(wanted, arith.cmpi(arith.CmpIPredicate.slt, item, _i32(work)))
            output = arith.addi(first_output, arith.addi(_times(block, each), o))
            if total_outputs % OUTPUTS:  # of the last 64, the block before has some
                wanted = arith.andi(wanted, arith.cmpi(arith.CmpIPredicate.sge, output, first_new))
            with mgpu.utils.when(wanted):
                at = arith.addi(sums, _times(arith.addi(_times(m, pitch), o), 4))
                total = [mgpu.c(0.0, f32)] * width
                for i in range(split * groups):
                    for k in range(width):
                        offset = (i * rows * pitch + k) * 4
                        part = _ptx(f"ld.shared.f32 $0, [$1+{offset}];", at, results=1, floats=True)
                        total[k] = arith.addf(total[k], part) if i else part
                total = [arith.mulf(value, scale) for value in total]
                place = arith.addi(_times(_wide(arith.addi(first_row, m)), total_outputs), _wide(output))
                to = _address(out_g, _times(place, 2 if half_width else 4))
                if half_width and width == 2:
                    pair = _ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", total[1], total[0], results=1, volatile=False)
                    _ptx("st.global.b32 [$0], $1;", to, pair)
                elif half_width:
                    one = _ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", total[0], total[0], results=1, volatile=False)
                    _ptx("st.global.b16 [$0], $1;", to, arith.trunci(ir.IntegerType.get_signless(16), one))
                else:
                    for k in range(width):
                        _ptx(f"st.global.f32 [$0+{4 * k}], $1;", to, total[k])
        return ()

    return end
