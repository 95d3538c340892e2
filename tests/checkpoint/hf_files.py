"""Hugging Face directories for tests: random weights of a config, in any format."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from nemotron_jax.checkpoint import modelopt
from nemotron_jax.checkpoint.hf import Table, kv_scale_name, scheme_of, tensors_of
from nemotron_jax.checkpoint.safetensors import DTYPES, SafetensorsFile, ShardWriter
from nemotron_jax.config import ModelConfig
from nemotron_jax.hf_config import to_hf


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """{name on disk: values}: BF16, router correction biases float32."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(entry.shape) * 0.1).astype(DTYPES[entry.tensor().dtype])
        for name, entry in Table(config).entries.items()
    }


def write(directory: Path, config: ModelConfig, weights=None, quant=None, values=None, max_shard: int = 60_000) -> Path:
    """A directory as NVIDIA publishes it: BF16, or quantised by ModelOpt."""
    directory.mkdir(parents=True)
    weights = random_weights(config) if weights is None else weights
    values = to_hf(config) if values is None else values
    table = Table(config)
    planned = [tensor for entry in table.entries.values() for tensor in tensors_of(entry, quant, "BF16")]
    writer = ShardWriter(directory, planned, max_shard=max_shard)
    for name, entry in table.entries.items():
        scheme = scheme_of(entry, quant)
        if scheme is None:
            writer.write(name, weights[name])
        else:
            for suffix, array in modelopt.quantize(scheme, weights[name], 3.0).items():
                writer.write(f"{entry.module}.{suffix}", array)
        if quant is not None and quant.kv_scales(entry.module) and not name.startswith("mtp."):
            writer.write(kv_scale_name(entry.module), np.full(1, 1.5, np.float32))
    writer.finish()
    if quant is not None:
        files = quant.to_json()
        values = {**values, "quantization_config": files["quantization_config"]}
        (directory / modelopt.HF_QUANT_CONFIG).write_text(json.dumps(files[modelopt.HF_QUANT_CONFIG]))
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{name: (dtype, shape, bytes)} of all files."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = SafetensorsFile(path)
        for tensor in file.tensors.values():
            found[tensor.name] = (tensor.dtype, tensor.shape, file.array(tensor.name).tobytes())
    return found


BF16 = np.dtype(ml_dtypes.bfloat16)
