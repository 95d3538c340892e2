"""Runs on the CPU what XLA made of a program for a GPU: shows which of its operations survived the optimisation.

The optimised program is taken as text, its fusions become calls and its layouts are dropped, and the CPU compiles
that. Elementwise operations and reductions only: a GPU's own kernels are not there.
"""

import re

import jax
import numpy as np
from jax._src.lib import xla_client
from jaxlib import _hlo, _jax

from pallas_kernels import aot

INSTRUCTION = re.compile(r"(ROOT )?(%[\w.\-]+) = (\w+)(\[[\d,]*\]) bitcast\((%[\w.\-]+)\)")


def optimised(function, arguments, target="h200"):
    """The text of the program that XLA makes of a function of arrays for a GPU.

    Raises RuntimeError where the compiler for GPUs is not installed (`make compile-gpu` brings it).
    """
    here = jax.sharding.SingleDeviceSharding(aot.devices(target)[0])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in arguments]
    compiled = jax.jit(function, keep_unused=True).lower(*shapes).compile()
    options = _hlo.HloPrintOptions()
    options.print_large_constants = True
    return compiled.runtime_executable().hlo_modules()[0].to_string(options)


def run_on_cpu(text, arguments):
    """The first result of an optimised program."""
    module = _hlo.hlo_module_from_text(_for_cpu(text))
    stablehlo = xla_client._xla.mlir.hlo_to_stablehlo(module.as_serialized_hlo_module_proto())
    cpu = jax.devices("cpu")[0]
    program = cpu.client.compile_and_load(stablehlo, _jax.DeviceList((cpu,)), xla_client.CompileOptions())
    results = program.execute_sharded([jax.device_put(x, cpu) for x in arguments])
    return np.asarray(results.disassemble_into_single_device_arrays()[0][0])


def _for_cpu(text):
    text = re.sub(r"(?<=\])\{[\d,]*\}", "", text)  # layouts
    text = re.sub(r" fusion\((.*?)\), kind=k\w+, calls=", r" call(\1), to_apply=", text)
    return "\n\n".join(_with_portable_bitcasts(computation) for computation in text.split("\n\n"))


def _with_portable_bitcasts(computation):
    """A GPU's bitcast changes shape and type at once; elsewhere these are two instructions."""
    types = {name: (kind, shape) for name, kind, shape in re.findall(r"(%[\w.\-]+) = (\w+)(\[[\d,]*\])", computation)}

    def portable(match):
        root, name, kind, shape, source = match.groups()
        old_kind, old_shape = types[source]
        assign = f"{root or ''}{name} = {kind}{shape}"
        if kind == old_kind:
            return f"{assign} reshape({source})"
        if shape == old_shape:
            return f"{assign} bitcast-convert({source})"
        return f"{name}.cast = {kind}{old_shape} bitcast-convert({source})\n  {assign} reshape({name}.cast)"

    return INSTRUCTION.sub(portable, computation)
