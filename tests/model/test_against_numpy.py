"""The model against a second, naive implementation of its formulas in NumPy, token by token."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nemotron_jax.model.context import Context

EPS = 1e-5


def weights_of(model):
    """{path: float64 array}."""
    _, variables = nnx.split(model)
    return {
        "/".join(map(str, path)): np.asarray(variable.get_value(), np.float64)
        for path, variable in nnx.to_flat_state(variables)
    }


def below(weights, prefix):
    return {path[len(prefix) :]: value for path, value in weights.items() if path.startswith(prefix)}


def rms(x, weight):
    return weight * (x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS))


def silu(x):
    return x / (1 + np.exp(-x))


def relu2(x):
    return np.maximum(x, 0) ** 2


def mamba(w, h, m):
    """h [T, D]; one token after the other, as in the text of the paper."""
    inner, bc = m.num_heads * m.head_dim, m.num_groups * m.state_size
    row = np.concatenate([w[f"in_proj/{name}"] for name in ("z", "x", "B", "C", "dt")], axis=1)
    taps = np.concatenate([w[f"conv1d/weight/{kind}"] for kind in "xBC"])
    bias = np.concatenate([w[f"conv1d/bias/{kind}"] for kind in "xBC"])
    window = np.zeros((m.conv_kernel, inner + 2 * bc))
    state = np.zeros((m.num_heads, m.head_dim, m.state_size))
    outputs = []
    for token in h @ row:
        z, xbc, dt = token[:inner], token[inner : 2 * inner + 2 * bc], token[2 * inner + 2 * bc :]
        window = np.concatenate([window[1:], xbc[None]])
        xbc = silu((window.T * taps).sum(1) + bias)
        x = xbc[:inner].reshape(m.num_heads, m.head_dim)
        B = xbc[inner : inner + bc].reshape(m.num_groups, m.state_size)
        C = xbc[inner + bc :].reshape(m.num_groups, m.state_size)
        dt = np.log1p(np.exp(dt + w["dt_bias"]))
        y = np.zeros_like(x)
        for head in range(m.num_heads):
            group = head // (m.num_heads // m.num_groups)
            state[head] = np.exp(-dt[head] * np.exp(w["A_log"][head])) * state[head]
            state[head] += dt[head] * np.outer(x[head], B[group])
            y[head] = state[head] @ C[group] + w["D"][head] * x[head]
        gated = (y.reshape(inner) * silu(z)).reshape(m.num_groups, -1)
        gated = (gated / np.sqrt((gated**2).mean(-1, keepdims=True) + EPS)).reshape(inner)
        outputs.append((w["norm/weight"] * gated) @ w["out_proj/weight"])
    return np.stack(outputs)


def attention(w, h, a):
    heads = lambda name: (h @ w[f"{name}/weight"]).reshape(len(h), -1, a.head_dim)  # noqa: E731
    q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
    out = np.zeros_like(q)
    for t in range(len(h)):
        for head in range(a.num_heads):
            shared = head // (a.num_heads // a.num_kv_heads)
            scores = k[: t + 1, shared] @ q[t, head] / np.sqrt(a.head_dim)
            p = np.exp(scores - scores.max())
            out[t, head] = (p / p.sum()) @ v[: t + 1, shared]
    return out.reshape(len(h), -1) @ w["o_proj/weight"]


def moe(w, h, moe):
    outputs = []
    for token in h:
        scores = 1 / (1 + np.exp(-(token @ w["gate/weight"])))
        chosen = np.argsort(-(scores + w["gate/e_score_correction_bias"]), kind="stable")[: moe.top_k]
        share = scores[chosen] / (scores[chosen].sum() + 1e-20) * moe.scaling_factor
        u = token @ w["fc1_latent_proj/weight"]
        y = sum(
            s * (relu2(u @ w["experts/up_proj"][e]) @ w["experts/down_proj"][e])
            for s, e in zip(share, chosen, strict=True)
        )
        shared = relu2(token @ w["shared_experts/up_proj/weight"]) @ w["shared_experts/down_proj/weight"]
        outputs.append(y @ w["fc2_latent_proj/weight"] + shared)
    return np.stack(outputs)


def mlp(w, h, _):
    return relu2(h @ w["up_proj/weight"]) @ w["down_proj/weight"]


def run_layers(weights, prefix, pattern, h, config):
    mixers = {"M": (mamba, config.mamba), "*": (attention, config.attention), "E": (moe, config.moe), "-": (mlp, None)}
    for index, letter in enumerate(pattern):
        w = below(weights, f"{prefix}layers/{index}/")
        mixer, part = mixers[letter]
        h = h + mixer(below(w, "mixer/"), rms(h, w["norm/weight"]), part)
    return h


def test_logits_equal_numpy(tiny_model, tiny_config, rng):
    tokens = rng.integers(0, 64, 19)
    w = weights_of(tiny_model)
    h = run_layers(w, "", tiny_config.pattern, w["embeddings/weight"][tokens], tiny_config)
    expected = rms(h, w["norm_f/weight"]) @ w["lm_head/weight"]
    np.testing.assert_allclose(tiny_model(jnp.asarray(tokens[None])).logits[0], expected, rtol=1e-3, atol=2e-4)


def test_mtp_depths_equal_numpy(tiny_model, tiny_config, rng):
    """Depth k: embedding of token t+k first, then h^{k-1}; one module for both depths; a shared head."""
    tokens = rng.integers(0, 64, 11)
    w = weights_of(tiny_model)
    hidden, _, _ = tiny_model.hidden(jnp.asarray(tokens[None]), Context())
    depths, _ = tiny_model.mtp_hidden(hidden, jnp.asarray(tokens[None]), Context())
    m = below(w, "mtp/")
    h = np.asarray(hidden[0], np.float64)
    for k, depth in enumerate(depths, start=1):
        ahead = np.zeros((11, tiny_config.hidden_size))
        ahead[: 11 - k] = w["embeddings/weight"][tokens[k:]]
        x = np.concatenate([rms(ahead, m["enorm/weight"]), rms(h, m["hnorm/weight"])], axis=1) @ m["eh_proj/weight"]
        h = rms(run_layers(w, "mtp/", tiny_config.mtp.pattern, x, tiny_config), m["final_layernorm/weight"])
        np.testing.assert_allclose(depth[0], h, rtol=2e-3, atol=5e-4)
    assert len(depths) == 2
