"""Makes the fixtures beside it: three tiny Hugging Face directories, and what transformers computes from them.

Run in an environment of its own, which the project never needs otherwise (the fixtures are committed):

    python3.11 -m venv hf-env && hf-env/bin/pip install torch==2.13.0 transformers==5.23.0
    hf-env/bin/python tests/golden/hf/make_fixtures.py          # writes nano/, super/ and dense/
    hf-env/bin/python tests/golden/hf/make_fixtures.py DIR ...  # compares directories with their expected.npz

Each directory is as NVIDIA's releases are: config.json as transformers writes it, BF16 tensors (router biases float32)
under NVIDIA's names, one tensor an expert; super/ has MTP tensors, which transformers drops, and two shards with an
index. expected.npz holds token ids and log-probabilities, all float32 on the CPU, for sequences that end on, before
and after the borders of Mamba chunks: ``tokens_<i>`` [T], ``logprobs_<i>`` [T, V] of one pass over the whole sequence,
``cached_<i>`` [T, V] of a prefill, a second prefill on top of its cache, and one token at a time after that.

Patched in transformers 5.23.0: ``NemotronHMamba2Mixer.time_step_limit``, from (time_step_min, inf) to (0, inf).
Its modeling_nemotron_h.py clamps dt from below in the chunked scan; neither its own one-token path (so that a pass
with a cache differs from one without), nor its own config (time_step_limit is (0, inf) there), nor Megatron-LM, which
trained the models, nor vLLM do (transformers pull request 48989). The script prints what the clamp costs. The other
error reported for this file (issue 47246, versions 5.6 to 5.13: states passed between chunks along the wrong axis) is
not in 5.23.0: the passes with and without a cache, which cut the chunks differently, agree, and the script refuses to
write fixtures where they do not.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h import modeling_nemotron_h as hf

HERE = Path(__file__).parent
MAMBA, ATTENTION, MOE, MLP = "linear_attention", "full_attention", "moe", "mlp"
# Lengths of the sequences: around chunk borders, odd, and one token.
MODELS = {
    # Nano: no latent projections; here with two router groups of which one is taken (every release has one group).
    "nano": (
        {
            "layers_block_type": [MAMBA, MOE, MAMBA, ATTENTION, MOE, MAMBA],
            "vocab_size": 64,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 4,
            "ssm_state_size": 16,
            "chunk_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "routed_scaling_factor": 2.5,
        },
        (1, 16, 17, 53),
    ),
    # Super: latent experts, many and small; MTP.
    "super": (
        {
            "layers_block_type": [MAMBA, MOE, MAMBA, ATTENTION, MOE],
            "vocab_size": 64,
            "hidden_size": 48,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 16,
            "mamba_head_dim": 8,
            "n_groups": 8,
            "ssm_state_size": 8,
            "chunk_size": 32,
            "n_routed_experts": 32,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 16,
            "intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 48,
            "moe_latent_size": 16,
            "routed_scaling_factor": 5.0,
            "num_nextn_predict_layers": 1,
            "mtp_layers_block_type": [ATTENTION, MOE],
        },
        (31, 65, 75),
    ),
    # Nano 4B: dense, 8 key/value heads, Mamba heads of 80, chunks of 256.
    "dense": (
        {
            "layers_block_type": [MAMBA, MLP, MAMBA, ATTENTION, MLP],
            "vocab_size": 24,
            "hidden_size": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 80,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 256,
            "intermediate_size": 72,
            "moe_intermediate_size": 72,
        },
        (256, 515),
    ),
}
SEEDS = {"nano": 0, "super": 5, "dense": 0}  # of the weights
COMMON = {
    "architectures": ["NemotronHForCausalLM"],
    "max_position_embeddings": 4096,
    "mlp_hidden_act": "relu2",
    "num_logits_to_keep": 1,
    "dtype": "bfloat16",
}


def tensors_of(config: NemotronHConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """NVIDIA's names -> random tensors, none of them near its initial value or so small that an error is lost."""
    d, heads, groups, n = config.hidden_size, config.mamba_num_heads, config.n_groups, config.ssm_state_size
    inner = heads * config.mamba_head_dim
    channels = inner + 2 * groups * n

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    def linear(n_out: int, n_in: int, gain: float = 1.0) -> torch.Tensor:
        return normal(n_out, n_in, std=gain / math.sqrt(n_in))

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def mamba() -> dict[str, torch.Tensor]:
        # dt around 1e-5 to 0.1: half of it lies below the 0.001 that transformers would clamp it to.
        dt = torch.exp(uniform(heads, low=math.log(1e-5), high=math.log(0.1)))
        return {
            "in_proj.weight": linear(inner + channels + heads, d),
            "conv1d.weight": normal(channels, 1, config.conv_kernel, std=0.5),
            "conv1d.bias": normal(channels, std=0.5),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "A_log": torch.log(uniform(heads, low=1.0, high=16.0)),
            "D": normal(heads, std=0.5, mean=1.0),
            "norm.weight": uniform(inner, low=0.5, high=1.5),
            "out_proj.weight": linear(d, inner),
        }

    def attention() -> dict[str, torch.Tensor]:
        wide, narrow = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
        return {
            "q_proj.weight": linear(wide, d, gain=1.5),
            "k_proj.weight": linear(narrow, d, gain=1.5),
            "v_proj.weight": linear(narrow, d),
            "o_proj.weight": linear(d, wide),
        }

    def mlp(width: int, size: int) -> dict[str, torch.Tensor]:
        return {"up_proj.weight": linear(size, width), "down_proj.weight": linear(width, size, gain=0.5)}

    def moe() -> dict[str, torch.Tensor]:
        latent = config.moe_latent_size or d
        tensors = {
            "gate.weight": linear(config.n_routed_experts, d),
            "gate.e_score_correction_bias": normal(config.n_routed_experts, std=0.3),
        }
        for expert in range(config.n_routed_experts):
            routed = mlp(latent, config.moe_intermediate_size)
            tensors |= {f"experts.{expert}.{name}": tensor for name, tensor in routed.items()}
        shared = mlp(d, config.moe_shared_expert_intermediate_size)
        tensors |= {f"shared_experts.{name}": tensor for name, tensor in shared.items()}
        if config.moe_latent_size:
            tensors |= {"fc1_latent_proj.weight": linear(latent, d), "fc2_latent_proj.weight": linear(d, latent)}
        return tensors

    makers = {MAMBA: mamba, ATTENTION: attention, MOE: moe, MLP: lambda: mlp(d, config.intermediate_size)}

    def layers(prefix: str, kinds: list[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        for index, kind in enumerate(kinds):
            tensors[f"{prefix}.{index}.norm.weight"] = uniform(d, low=0.5, high=1.5)
            tensors |= {f"{prefix}.{index}.mixer.{name}": tensor for name, tensor in makers[kind]().items()}
        return tensors

    tensors = {"backbone.embeddings.weight": normal(config.vocab_size, d)}
    tensors |= layers("backbone.layers", config.layers_block_type)
    tensors["backbone.norm_f.weight"] = uniform(d, low=0.5, high=1.5)
    tensors["lm_head.weight"] = linear(config.vocab_size, d, gain=2.0)
    if config.num_nextn_predict_layers:
        kinds = config.mtp_layers_block_type
        tensors |= layers("mtp.layers", kinds)
        tensors |= {f"mtp.layers.0.{name}.weight": uniform(d, low=0.5, high=1.5) for name in ("enorm", "hnorm")}
        tensors["mtp.layers.0.eh_proj.weight"] = linear(d, 2 * d)
        tensors[f"mtp.layers.{len(kinds) - 1}.final_layernorm.weight"] = uniform(d, low=0.5, high=1.5)
    return {
        name: tensor.contiguous() if name.endswith("correction_bias") else tensor.to(torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
    }


def write_directory(path: Path, config: NemotronHConfig, seed: int) -> None:
    path.mkdir(exist_ok=True)
    config.save_pretrained(path)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = tensors_of(config, torch.Generator().manual_seed(seed))
    if not config.num_nextn_predict_layers:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(path: Path) -> NemotronHForCausalLM:
    """In float32, with dt as it should be. Every tensor must find its place: only those of MTP are dropped."""
    model, report = NemotronHForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in report.items() if names}
    assert not wrong, wrong
    clamp(model, 0.0)
    return model.eval()


def clamp(model: NemotronHForCausalLM, least: float) -> None:
    mixers = [module for module in model.modules() if isinstance(module, hf.NemotronHMamba2Mixer)]
    assert mixers
    for mixer in mixers:
        mixer.time_step_limit = (least, float("inf"))


@torch.no_grad()
def logprobs(model: NemotronHForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """[T] -> [T, V] float32, in one pass without a cache."""
    logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits
    return torch.log_softmax(logits[0], dim=-1).numpy()


@torch.no_grad()
def cached_logprobs(model: NemotronHForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """[T] -> [T, V] float32: half of the tokens, a quarter on top of their cache, the rest one at a time."""
    length = len(tokens)
    borders = sorted({0, length // 2, length * 3 // 4, *range(length * 3 // 4, length + 1)})
    cache, parts = None, []
    for start, end in itertools.pairwise(borders):
        out = model(torch.from_numpy(tokens[start:end])[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(torch.log_softmax(out.logits[0], dim=-1))
    return torch.cat(parts).numpy()


def smallest_margin(model: NemotronHForCausalLM, tokens: np.ndarray) -> float:
    """By how much the last chosen expert won: where it is tiny, rounding decides, and no comparison makes sense."""
    margins = [math.inf]

    def watch(router: hf.NemotronHTopkRouter, inputs: tuple, outputs: tuple) -> None:
        choice = outputs[0].sigmoid() + router.e_score_correction_bias
        groups = choice.view(len(choice), router.num_group, -1)
        strength = groups.topk(2, dim=-1)[0].sum(-1).sort(-1, descending=True)
        if router.num_group > router.topk_group:
            gap = strength[0][:, router.topk_group - 1] - strength[0][:, router.topk_group]
            margins.append(gap.min().item())
        kept = torch.zeros_like(strength[0], dtype=torch.bool).scatter_(1, strength[1][:, : router.topk_group], True)
        best = groups.masked_fill(~kept[..., None], -math.inf).flatten(1).topk(router.top_k + 1, dim=-1)[0]
        margins.append((best[:, -2] - best[:, -1]).min().item())

    hooks = [
        module.register_forward_hook(watch) for module in model.modules() if isinstance(module, hf.NemotronHTopkRouter)
    ]
    logprobs(model, tokens)
    for hook in hooks:
        hook.remove()
    return min(margins)


def make(name: str) -> None:
    sizes, lengths = MODELS[name]
    path = HERE / name
    write_directory(path, NemotronHConfig(**COMMON, **sizes), seed=SEEDS[name])
    for file in path.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them private
    model = load(path)
    rng = np.random.default_rng(0)
    arrays, apart, margin, cost = {}, 0.0, math.inf, 0.0
    for number, length in enumerate(lengths):
        tokens = rng.integers(0, model.config.vocab_size, length)
        whole, cached = logprobs(model, tokens), cached_logprobs(model, tokens)
        arrays |= {f"tokens_{number}": tokens.astype(np.int32), f"logprobs_{number}": whole, f"cached_{number}": cached}
        apart = max(apart, float(np.abs(whole - cached).max()))
        margin = min(margin, smallest_margin(model, tokens))
        clamp(model, model.config.time_step_min)
        cost = max(cost, float(np.abs(whole - logprobs(model, tokens)).max()))
        clamp(model, 0.0)
    assert apart < 2e-5, f"{name}: with and without a cache differ by {apart}"
    assert margin > 2e-5, f"{name}: an expert won by {margin} only: choose another seed"
    np.savez_compressed(path / "expected.npz", **arrays)
    spread = float(whole.std())
    print(f"{name}: cache {apart:.1e}, margin of experts {margin:.1e}, dt clamp {cost:.1e}, std of log-p {spread:.2f}")


def compare(path: Path) -> None:
    """Prints the largest difference between what transformers computes from a directory and its expected.npz."""
    model, expected = load(path), np.load(path / "expected.npz")
    numbers = [name.removeprefix("tokens_") for name in expected if name.startswith("tokens_")]
    worst = max(
        float(np.abs(logprobs(model, expected[f"tokens_{n}"].astype(np.int64)) - expected[f"logprobs_{n}"]).max())
        for n in numbers
    )
    print(f"{path}: largest difference of log-probabilities {worst:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="*", metavar="DIR")
    directories = parser.parse_args(sys.argv[1:]).directories
    torch.set_num_threads(1)
    for directory in directories:
        compare(directory)
    if not directories:
        for model_name in MODELS:
            make(model_name)
