"""Runs functions for `plgpu.inline_mgpu` on the CPU: NumPy in place of MLIR, all threads of a cluster in step.

A value is an array over the threads. Memory is bytes. All threads go on together, so that barriers do nothing but end
what is forbidden without them: to read what others have written to shared memory, to write what they read or wrote.
"""

import contextlib
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np

LANES = 32
WARPGROUP = 128
TYPES = {"i1": np.bool_, "i16": np.uint16, "i32": np.uint32, "i64": np.uint64, "f32": np.float32}
CLUSTER = 24  # the bit of a shared address where the block of the cluster starts


class Value:
    def __init__(self, array, kind):
        self.array, self.type = np.asarray(array).astype(TYPES[kind]), kind


class FragmentedArray:
    def __init__(self, _registers, _layout, _is_signed):
        self.registers = _registers

    @classmethod
    def splat(cls, value, shape, is_signed):
        assert shape == ()
        return cls(np.array(value, object), None, is_signed)


class Machine:
    """`blocks` of `threads`, with `shared` bytes each. Arrays in global memory: `place`."""

    def __init__(self, blocks, threads, shared):
        self.block = np.repeat(np.arange(blocks), threads)
        self.thread = np.tile(np.arange(threads), blocks)
        self.shared = np.zeros((blocks, shared), np.uint8)
        self.written = np.zeros((blocks, shared), bool)
        # For warps, warpgroups and blocks, by their size: which (from 1 on; -1: several) wrote and which read each byte
        # since the last barrier of more threads than that.
        self.since = {size: np.zeros((2, blocks, shared), np.int32) for size in (LANES, WARPGROUP, threads)}
        self.globals = []
        self.mask = np.ones(blocks * threads, bool)

    def barrier(self, threads):
        """So many threads wait for each other."""
        for size, of_bytes in self.since.items():
            if size < threads:
                of_bytes[...] = 0

    def place(self, array):
        """A reference to a NumPy array, which stores change."""
        self.globals.append(array.reshape(-1).view(np.uint8))
        return ("global", np.uint64(len(self.globals) << 40))

    def number(self, value, kind="i32"):
        value = np.broadcast_to(np.asarray(value), self.thread.shape)
        return SimpleNamespace(registers=np.array(Value(value, kind), object))

    def patch(self, monkeypatch, module):
        for name in ("ir", "arith", "llvm", "vector", "mgpu"):
            monkeypatch.setattr(module, name, getattr(self, name)())

    def ir(self):
        return SimpleNamespace(
            IntegerType=SimpleNamespace(get_signless=lambda bits: f"i{bits}"),
            F32Type=SimpleNamespace(get=lambda: "f32"),
            VectorType=SimpleNamespace(get=lambda shape, kind: (shape, kind)),
        )

    def arith(self):
        def both(function, result=None):
            def apply(a, b):
                assert a.type == b.type, (a.type, b.type)
                return Value(function(a.array, b.array), result or a.type)

            return apply

        def signed(array):
            return array.view(np.int32)

        compare = {
            "eq": np.equal,
            "slt": lambda a, b: signed(a) < signed(b),
            "sge": lambda a, b: signed(a) >= signed(b),
        }
        return SimpleNamespace(
            addi=both(np.add), subi=both(np.subtract), muli=both(np.multiply),
            andi=both(np.bitwise_and), ori=both(np.bitwise_or),
            shrui=both(np.right_shift), divui=both(np.floor_divide), addf=both(np.add), mulf=both(np.multiply),
            minsi=both(lambda a, b: np.minimum(signed(a), signed(b))),
            extui=lambda kind, value: Value(value.array, kind),
            trunci=lambda kind, value: Value(value.array, kind),
            CmpIPredicate=SimpleNamespace(**{name: name for name in compare}),
            cmpi=lambda name, a, b: Value(compare[name](*np.broadcast_arrays(a.array, b.array)), "i1"),
            select=lambda c, a, b: Value(np.where(c.array, a.array, b.array), a.type),
        )  # fmt: skip

    def llvm(self):
        return SimpleNamespace(
            ptrtoint=lambda kind, pointer: Value(pointer, kind), mlir_undef=lambda kind: [None] * kind[0][0]
        )

    def vector(self):
        def insert(value, into, dynamic_position, static_position):
            return [value if i == static_position[0] else old for i, old in enumerate(into)]

        return SimpleNamespace(
            extract=lambda register, dynamic_position, static_position: register[static_position[0]], insert=insert
        )

    def mgpu(self):
        @contextlib.contextmanager
        def when(condition):
            before, self.mask = self.mask, self.mask & condition.array
            yield
            self.mask = before

        utils = SimpleNamespace(
            memref_ptr=lambda ref: ref[1],
            thread_idx=lambda: Value(self.thread, "i32"),
            warpgroup_barrier=lambda: self.barrier(WARPGROUP),
            when=when,
            inline_ptx=self.ptx,
        )

        def constant(value, kind):
            value = np.float32(value) if kind == "f32" else np.int64(value)
            return Value(np.broadcast_to(value, self.thread.shape), kind)

        return SimpleNamespace(
            utils=utils,
            c=constant,
            FragmentedArray=FragmentedArray,
        )

    def ptx(self, code, *operands, result_types, has_side_effects, convergent):
        assert has_side_effects or result_types
        arrays = [np.broadcast_to(operand.array, self.thread.shape) for operand in operands]
        kinds = [] if result_types is None else result_types if isinstance(result_types, list) else [result_types]
        name = code.split()[0].rstrip(";")
        if name.startswith(("ld.", "st.")):
            results = self.memory(name, code, arrays, kinds)
        elif name.startswith("barrier.cluster.") or code == "bar.sync 0;":
            if "arrive" not in name:
                self.barrier(self.thread.size if "cluster" in name else self.thread[-1] + 1)
            results = []
        elif name == "mov.u32" and "%cluster_ctarank" in code:
            results = [self.block]
        elif name.startswith("mapa."):
            results = [arrays[0] + ((arrays[1] + 1) << CLUSTER)]
        elif name.startswith("shfl.sync"):
            lanes = np.arange(self.thread.size)
            if "bfly" in name:
                source = lanes ^ int(code.split(",")[2])
            elif "up" in name:
                source = np.maximum(lanes - int(code.split(",")[2]), lanes // LANES * LANES)
            else:
                source = lanes // LANES * LANES + arrays[1].astype(np.int64) % LANES
            results = [arrays[0][source]]
        elif name == "redux.sync.or.b32":
            results = [np.repeat(np.bitwise_or.reduce(arrays[0].reshape(-1, LANES), axis=1), LANES)]
        elif name == "prmt.b32":
            results = [permute(*arrays)]
        elif name == "mul.rn.bf16x2":
            a, b = (array.copy().view(ml_dtypes.bfloat16).astype(np.float32) for array in arrays)
            results = [(a * b).astype(ml_dtypes.bfloat16).view(np.uint32)]
        elif name == "cvt.rn.bf16x2.f32":
            high, low = (array.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for array in arrays)
            results = [high << 16 | low]
        elif name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"):
            results = multiply_add(arrays[:4], arrays[4:6], arrays[6:])
        else:
            raise NotImplementedError(code)
        values = [Value(result, kind) for result, kind in zip(results, kinds, strict=True)]
        return values if isinstance(result_types, list) else values[0] if values else None

    def memory(self, name, code, arrays, kinds):
        parts = name.split(".")
        size = {"b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4}[parts[-1]]
        at = re.search(r"\[\$(\d+)(?:\+(\d+))?\]", code)
        count = int(next((part[1:] for part in parts if part in ("v2", "v4")), 1))
        store = parts[0] == "st"
        address = arrays[0].astype(np.uint64) + np.uint64(at[2] or 0)
        assert (address % np.uint64(size * count) == 0)[self.mask].all(), code
        loaded = [np.zeros(self.thread.shape, np.uint32) for _ in kinds]
        for thread in np.flatnonzero(self.mask):
            place = int(address[thread])
            if parts[1] == "global":
                bytes_, place = self.globals[(place >> 40) - 1], place & (1 << 40) - 1
            else:
                block = (place >> CLUSTER) - 1 if parts[1] == "shared::cluster" else self.block[thread]
                bytes_, place = self.shared[block], place & (1 << CLUSTER) - 1
                where = block, slice(place, place + size * count)
                self.order(thread, where, store, code)
                if store:
                    self.written[where] = True
                else:
                    assert self.written[where].all(), code
            assert place + size * count <= bytes_.size, (code, place, bytes_.size)
            for i in range(count):
                word = bytes_[place + i * size : place + (i + 1) * size]
                if store:
                    word[...] = np.frombuffer(arrays[1 + i][thread].tobytes()[:size], np.uint8)
                else:
                    loaded[i][thread] = int.from_bytes(word.tobytes(), "little")
        return [word.view(np.float32) if kind == "f32" else word for word, kind in zip(loaded, kinds, strict=True)]

    def order(self, thread, where, store, code):
        """Asserts that a barrier is between this access to shared memory and those that must not come at once."""
        for size, (writer, reader) in self.since.items():
            this = thread // size + 1
            for other in (writer[where], reader[where])[: 1 + store]:
                assert ((other == 0) | (other == this)).all(), f"no barrier for groups of {size} threads: {code}"
            mine = writer if store else reader
            mine[where] = np.where((mine[where] == 0) | (mine[where] == this), this, -1)


def permute(low, high, selector):
    both = np.stack([low, high], axis=-1).astype(np.uint32).view(np.uint8)
    chosen = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & 15
    assert (chosen < 8).all()
    return np.take_along_axis(both, chosen.astype(np.int64), axis=1).copy().view(np.uint32)[:, 0]


def multiply_add(a, b, c):
    """mma.m16n8k16: the registers of each lane, as the PTX manual has them."""
    g, t = np.divmod(np.arange(LANES), 4)
    pairs = [
        [x.reshape(-1, LANES, 1).astype(np.uint32).view(ml_dtypes.bfloat16).astype(np.float64) for x in y]
        for y in (a, b)
    ]
    warps = pairs[0][0].shape[0]
    left, right, out = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for k in range(2):
        for i in range(4):
            left[:, g + 8 * (i % 2), 2 * t + k + 8 * (i // 2)] = pairs[0][i][..., k]
            out[:, g + 8 * (i // 2), 2 * t + i % 2] = c[i].reshape(warps, LANES)
        for i in range(2):
            right[:, 2 * t + k + 8 * i, g] = pairs[1][i][..., k]
    out = out + left @ right
    return [out[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1).astype(np.float32) for i in range(4)]
