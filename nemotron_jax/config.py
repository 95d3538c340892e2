"""What a Nemotron 3 model is: frozen, validated descriptions of its shape, and the presets.

Values are those of the released config.json files and the official Megatron configurations
(Megatron-LM examples, Megatron-Bridge recipes, the Nemotron 3 reports);
``nemotron_jax.hf_config`` reads and writes the Hugging Face spelling.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nemotron_jax.errors import ConfigError, did_you_mean

# Megatron's letters: one mixer a layer, each with one norm in front of it.
BLOCK_LETTERS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(section: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{section}.{name} must be positive, got {value}.")


def check_pattern(pattern: str, name: str) -> None:
    """Raises ConfigError naming the position of the first letter that is no block."""
    _require(len(pattern) > 0, f"{name} is empty: give at least one of {known_letters()}.")
    for position, letter in enumerate(pattern):
        _require(
            letter in BLOCK_LETTERS,
            f"{name} has the unknown letter {letter!r} at position {position} of {pattern!r}: "
            f"known letters are {known_letters()}.",
        )


def known_letters() -> str:
    return ", ".join(f"{letter} ({meaning})" for letter, meaning in BLOCK_LETTERS.items())


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 mixer: ``num_heads * head_dim`` inner channels, B and C shared by the heads of a group."""

    num_heads: int = 64
    head_dim: int = 64
    num_groups: int = 8
    state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 128
    # Initialisation of dt (Megatron-LM, mamba_mixer.py); the forward pass never clamps dt: its limit is (0, inf).
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    def __post_init__(self) -> None:
        _require_positive(
            "mamba",
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_groups=self.num_groups,
            state_size=self.state_size,
            chunk_size=self.chunk_size,
            time_step_min=self.time_step_min,
            time_step_floor=self.time_step_floor,
        )
        _require(
            self.time_step_min <= self.time_step_max,
            f"mamba.time_step_min ({self.time_step_min}) must not exceed mamba.time_step_max ({self.time_step_max}).",
        )
        _require(
            self.num_heads % self.num_groups == 0,
            f"mamba.num_heads ({self.num_heads}) must be a multiple of mamba.num_groups ({self.num_groups}): "
            "the heads of a group share B and C.",
        )
        _require(self.conv_kernel >= 2, f"mamba.conv_kernel must be at least 2, got {self.conv_kernel}.")

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size


@dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention without positions (NoPE), biases or q/k norms."""

    num_heads: int = 32
    num_kv_heads: int = 2
    head_dim: int = 128

    def __post_init__(self) -> None:
        _require_positive("attention", num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention.num_heads ({self.num_heads}) must be a multiple of attention.num_kv_heads "
            f"({self.num_kv_heads}): the query heads of a group share one key/value head.",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Sigmoid-routed experts with relu^2, a shared expert, and optional latent projections (LatentMoE)."""

    num_experts: int = 128
    top_k: int = 6
    intermediate_size: int = 1856
    shared_intermediate_size: int = 3712
    latent_size: int = 0  # 0: the routed experts work at full width
    scaling_factor: float = 2.5
    num_groups: int = 1  # expert groups of the router; 1 in every released model
    top_k_groups: int = 1
    normalize_weights: bool = True

    def __post_init__(self) -> None:
        _require_positive(
            "moe",
            num_experts=self.num_experts,
            top_k=self.top_k,
            intermediate_size=self.intermediate_size,
            shared_intermediate_size=self.shared_intermediate_size,
            num_groups=self.num_groups,
        )
        _require(
            self.top_k <= self.num_experts,
            f"moe.top_k ({self.top_k}) must not exceed moe.num_experts ({self.num_experts}).",
        )
        _require(
            self.num_experts % self.num_groups == 0 and 1 <= self.top_k_groups <= self.num_groups,
            f"moe.num_experts ({self.num_experts}) must be a multiple of moe.num_groups ({self.num_groups}), and "
            f"moe.top_k_groups ({self.top_k_groups}) between 1 and moe.num_groups.",
        )
        _require(
            self.top_k <= self.top_k_groups * (self.num_experts // self.num_groups),
            f"moe.top_k ({self.top_k}) exceeds the experts that moe.top_k_groups={self.top_k_groups} groups hold.",
        )
        _require(self.latent_size >= 0, f"moe.latent_size must be 0 (none) or positive, got {self.latent_size}.")


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction: one stored module, applied ``depth`` times (model/mtp.py)."""

    pattern: str = "*E"
    depth: int = 2
    loss_factor: float = 0.3  # shared by the depths: each weighs loss_factor / depth

    def __post_init__(self) -> None:
        check_pattern(self.pattern, "mtp.pattern")
        _require_positive("mtp", depth=self.depth)
        _require(self.loss_factor >= 0, f"mtp.loss_factor must not be negative, got {self.loss_factor}.")


@dataclass(frozen=True)
class ModelConfig:
    """One Nemotron 3 model. ``pattern`` gives the layers in Megatron's letters, one mixer each."""

    pattern: str
    hidden_size: int
    vocab_size: int = 131072
    intermediate_size: int = 1856  # of the "-" block
    mamba: MambaConfig = MambaConfig()
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    mtp: MTPConfig | None = None
    norm_eps: float = 1e-5
    initializer_std: float = 0.0  # 0: 0.9 / sqrt(hidden_size), the rule behind the official values
    max_positions: int = 262144
    bfloat16_share: float = 0.15  # of the layers, the last ones: quantised training leaves them in bfloat16
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    # Keys of a Hugging Face config.json that mean nothing here, kept to be written back: (name, JSON text).
    hf_extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_pattern(self.pattern, "model.pattern")
        _require_positive(
            "model",
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            intermediate_size=self.intermediate_size,
            norm_eps=self.norm_eps,
            max_positions=self.max_positions,
        )
        _require(
            self.initializer_std >= 0,
            f"model.initializer_std must be 0 (automatic) or positive, got {self.initializer_std}.",
        )
        _require(
            0 <= self.bfloat16_share <= 1, f"model.bfloat16_share must be between 0 and 1, got {self.bfloat16_share}."
        )
        for name in ("bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            _require(
                0 <= value < self.vocab_size,
                f"model.{name} ({value}) must be a token id below model.vocab_size ({self.vocab_size}).",
            )

    @property
    def init_std(self) -> float:
        """Standard deviation of weight initialisation (Megatron's init-method-std)."""
        return self.initializer_std or 0.9 / math.sqrt(self.hidden_size)

    @property
    def output_init_std(self) -> float:
        """Of the projections that write to the residual stream: std / sqrt(layers) (Megatron-LM's scaled init)."""
        return self.init_std / math.sqrt(len(self.pattern))


def same_network(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs describe the same tensors and the same function of them.

    How weights are initialised, how often MTP is applied in training, which layers quantised training leaves in
    bfloat16, and what a config.json says beside are not part of that.
    """
    return _network(a) == _network(b)


def _network(config: ModelConfig) -> ModelConfig:
    defaults = ModelConfig(config.pattern, config.hidden_size)
    # Widths of blocks that the pattern does not have play no part.
    letters = config.pattern + (config.mtp.pattern if config.mtp else "")
    mamba = MambaConfig()
    initialisation = {name: getattr(mamba, name) for name in ("time_step_min", "time_step_max", "time_step_floor")}
    return dataclasses.replace(
        config,
        intermediate_size=config.intermediate_size if "-" in letters else defaults.intermediate_size,
        mamba=dataclasses.replace(config.mamba, chunk_size=mamba.chunk_size, **initialisation)
        if "M" in letters
        else mamba,
        attention=config.attention if "*" in letters else AttentionConfig(),
        moe=config.moe if "E" in letters else MoEConfig(),
        mtp=config.mtp and MTPConfig(pattern=config.mtp.pattern),
        initializer_std=defaults.initializer_std,
        bfloat16_share=defaults.bfloat16_share,
        max_positions=defaults.max_positions,
        bos_id=defaults.bos_id,
        eos_id=defaults.eos_id,
        pad_id=defaults.pad_id,
        hf_extra=(),
    )


def replace(config: ModelConfig, overrides: dict[str, object]) -> ModelConfig:
    """A config with some fields replaced; nested sections are dicts: ``{"mamba": {"num_heads": 8}}``.

    ``{"mtp": {"depth": 0}}`` removes the MTP module. Raises ConfigError for an unknown field.
    """
    values: dict[str, object] = {}
    for name, value in overrides.items():
        _require_field(ModelConfig, name, f"model.{name}")
        current = getattr(config, name)
        if isinstance(value, dict):
            current = MTPConfig() if current is None else current
            for key in value:
                _require_field(type(current), key, f"model.{name}.{key}")
            without_mtp = name == "mtp" and value.get("depth") == 0
            value = None if without_mtp else dataclasses.replace(current, **value)
        values[name] = value
    return dataclasses.replace(config, **values)  # type: ignore[arg-type]


def _require_field(cls: type, name: str, shown: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    _require(name in known, f"unknown config key {shown}.{did_you_mean(name, known)}")


def preset(name: str) -> ModelConfig:
    """The model of a released checkpoint or recipe by name. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown model preset {name!r}; known presets are {', '.join(PRESETS)}.{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]


_NANO = ModelConfig(
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688,
    initializer_std=0.0173,
)

_SUPER = ModelConfig(
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=4096,
    intermediate_size=2688,
    mamba=MambaConfig(num_heads=128),
    moe=MoEConfig(
        num_experts=512,
        top_k=22,
        intermediate_size=2688,
        shared_intermediate_size=5376,
        latent_size=1024,
        scaling_factor=5.0,
    ),
    mtp=MTPConfig(depth=2, loss_factor=0.3),
    initializer_std=0.014,
)

PRESETS = {
    "nano": _NANO,
    "lightning": dataclasses.replace(_NANO, mtp=MTPConfig(depth=2, loss_factor=0.3), max_positions=1048576),
    "super": _SUPER,
    "ultra": ModelConfig(
        pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
        "EMEMEMEM*EMEMEMEME",
        hidden_size=8192,
        intermediate_size=5120,
        mamba=MambaConfig(num_heads=256),
        attention=AttentionConfig(num_heads=64),
        moe=MoEConfig(
            num_experts=512,
            top_k=22,
            intermediate_size=5120,
            shared_intermediate_size=10240,
            latent_size=2048,
            scaling_factor=5.0,
        ),
        mtp=MTPConfig(depth=2, loss_factor=0.1),
        initializer_std=0.0099,
        bfloat16_share=16 / 108,
    ),
    # The dense member of the family: the smallest released checkpoint.
    "nano-4b": ModelConfig(
        pattern="M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        hidden_size=3136,
        intermediate_size=12544,
        mamba=MambaConfig(num_heads=96, head_dim=80, chunk_size=256),
        attention=AttentionConfig(num_heads=40, num_kv_heads=8),
        initializer_std=0.02,
    ),
    # The official tiny shape of Super (NVIDIA-NeMo/Nemotron, super3/tiny_model.py). The number of Mamba groups is
    # that of the whole family.
    "tiny-super": ModelConfig(
        pattern="MEM*EME",
        hidden_size=256,
        intermediate_size=384,
        mamba=MambaConfig(num_heads=8, head_dim=32),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
        moe=MoEConfig(num_experts=16, top_k=2, intermediate_size=384, shared_intermediate_size=768, latent_size=128),
        mtp=MTPConfig(depth=2, loss_factor=0.3),
    ),
    # Every block kind of Super at a size that two CPU cores train in minutes; each width divides by 8, so
    # that it also fits every mesh of 8 devices whose axes are powers of two.
    "quickstart": ModelConfig(
        pattern="MEM*EME",
        hidden_size=192,
        vocab_size=8192,
        intermediate_size=384,
        mamba=MambaConfig(num_heads=8, head_dim=32, num_groups=8, state_size=32, chunk_size=64),
        attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=32),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=192, shared_intermediate_size=384, latent_size=96),
        mtp=MTPConfig(depth=1, loss_factor=0.3),
        max_positions=8192,
    ),
}
