"""Makes nvfp4.npz: what NVIDIA's own code gives for a few small tensors.

Needs an environment of its own (Python 3.11, CPU):

    pip install torch==2.13.0 nvidia-modelopt==0.47.0 requests
    pip download --no-deps transformer_engine==2.20.2 && unzip transformer_engine-2.20.2-py3-none-any.whl -d te
    python tests/golden/make_nvfp4.py te

Transformer Engine's reference quantiser is one file of plain torch; the modules that it imports but does not use here
are replaced by empty ones, since the package itself needs CUDA.
"""

import enum
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

HERE = Path(__file__).parent
PACKAGE = "transformer_engine.pytorch"


def module(name: str, **content: object) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__path__ = []
    made.__dict__.update(content)
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, made)
    return made


class Base:
    def __init__(self, rowwise: bool = True, columnwise: bool = True) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


def transformer_engine(folder: Path) -> types.ModuleType:
    one_member = enum.Enum("OneMember", ["E2M1", "FPROP"])
    for name in ("transformer_engine", PACKAGE, f"{PACKAGE}.custom_recipes"):
        module(name)
    module(f"{PACKAGE}.custom_recipes.gemm", GEMMType=one_member, MMParams=object)
    module(f"{PACKAGE}.custom_recipes.reference_utils", Fp4Formats=one_member)
    module(f"{PACKAGE}.quantized_tensor", QuantizedTensorStorage=Base, Quantizer=Base)
    file = folder / "transformer_engine/pytorch/custom_recipes/reference_nvfp4.py"
    spec = importlib.util.spec_from_file_location("reference_nvfp4", file)
    reference = importlib.util.module_from_spec(spec)
    sys.modules["reference_nvfp4"] = reference
    spec.loader.exec_module(reference)
    return reference


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20)
    normal = rng.normal(size=(16, 32)).astype(np.float32)
    blocks = normal.copy()
    blocks[:8, 16:32] = 0
    blocks[4] = 0
    blocks[8:, 16:32] *= np.float32(1e-9)
    outlier = normal.copy()
    outlier[3, 5] = 3e4
    ties = rng.choice([0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], normal.shape) * rng.choice(
        [-1, 1], normal.shape
    )
    ties[:, ::16] = 6
    return {
        "normal": normal,
        "zeros": np.zeros_like(normal),
        "blocks": blocks,
        "outlier": outlier,
        "ties": (ties * 448).astype(np.float32),
        "wide": (normal * 10.0 ** rng.uniform(-42, 5, normal.shape)).astype(np.float32),
        "tiny": (normal * 2.0**-118).astype(np.float32),
        "subnormal": (normal * 2.0**-130).astype(np.float32),
        "huge": (normal / np.abs(normal).max() * np.finfo(np.float32).max).astype(np.float32),
    }


TE_OPTIONS = {
    "1x16": {},
    "16x16": {"quant_tile_shape": (16, 16)},
    "rows": {"row_scaled_nvfp4": True},
    "mae256": {"nvfp4_use_4over6": True, "nvfp4_e4m3_max": 256, "nvfp4_4over6_err_mode": "MAE"},
    "mse448 16x16": {
        "nvfp4_use_4over6": True,
        "nvfp4_e4m3_max": 448,
        "nvfp4_4over6_err_mode": "MSE",
        "quant_tile_shape": (16, 16),
    },
    "hadamard": {"with_rht": True},  # of the transpose
}


def main() -> None:
    reference = transformer_engine(Path(sys.argv[1]))
    e2m1 = reference.reference_utils.Fp4Formats.E2M1
    out = {}
    for name, values in tensors().items():
        out[f"{name}/x"] = values
        for dtype in ("float32", "bfloat16"):
            x = torch.from_numpy(values).to(getattr(torch, dtype))
            for option, settings in TE_OPTIONS.items():
                if option == "hadamard" and (dtype == "float32" or name in ("wide", "tiny", "subnormal")):
                    continue  # defined for bfloat16; torch's CPU kernels flush its subnormals
                result = reference.NVFP4QuantizerRef(e2m1, **settings)._quantize(x)
                codes, scales, _, _, amax, _ = result
                if option == "hadamard":
                    _, _, codes, scales, _, amax = result
                out[f"{name}/te/{dtype}/{option}"] = joined(codes, scales, amax)
            if name != "zeros":  # ModelOpt divides zero by zero there
                quantised, scales, scale_2 = NVFP4QTensor.quantize(x.clone(), 16)
                out[f"{name}/modelopt/{dtype}"] = joined(quantised._quantized_data, scales, scale_2)
    np.savez_compressed(HERE / "nvfp4.npz", **out)
    print(len(out), "arrays")


def joined(codes: torch.Tensor, scales: torch.Tensor, last: torch.Tensor) -> np.ndarray:
    """The bytes of codes, e4m3 scales and amax (or weight_scale_2), one after the other."""
    parts = (codes, scales.contiguous().view(torch.uint8), last.reshape(-1).view(torch.uint8))
    return np.concatenate([part.numpy().ravel() for part in parts])


if __name__ == "__main__":
    main()
