"""Plans against arithmetic by hand, the real model's shapes, and (slow) compiled steps."""

import dataclasses
import importlib.util
import json
import math

import pytest

from nemotron_jax import __main__ as front
from nemotron_jax import bench
from nemotron_jax.config import preset, replace
from nemotron_jax.errors import ConfigError, UserError
from nemotron_jax.model.counts import count_parameters, flops_per_token, parts
from nemotron_jax.model.nemotron import abstract, find_layer_stack
from nemotron_jax.parallel.plan import HBM_BYTES, Plan, Work
from nemotron_jax.parallel.stack import Repeat, Stack
from nemotron_jax.precision.recipe import RECIPES
from nemotron_jax.run_config import ParallelConfig
from pallas_kernels import aot

MODELS = {  # a layer of each kind is as good as 40
    "super": replace(preset("super"), {"pattern": "MEM*E"}),
    "nano": replace(preset("nano"), {"pattern": "MEM*E"}),
    "dense": replace(preset("nano-4b"), {"pattern": "M-*"}),
}


@pytest.fixture(scope="module")
def parts_of():
    """parts() of a model; tracing takes a second."""
    made = {}

    def of(name):
        if name not in made:
            with aot.compiling_for("h200"):
                made[name] = parts(MODELS[name], 8192, RECIPES["bfloat16"])
        return made[name]

    return of


def plan(parts_of, name="super", mesh=None, **work):
    settings = {"batch": 8, "seq": 8192} | work
    return Plan(MODELS[name], parts_of(name), ParallelConfig(**{"data": 1, **(mesh or {})}), Work(**settings))


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_the_model(parts_of, name):
    model = MODELS[name]
    made = parts_of(name)
    sizes = {path: math.prod(shape) for part in made for path, (shape, _) in part.tensors.items()}
    assert len(sizes) == sum(len(part.tensors) for part in made)  # no tensor is in two parts
    total = sum(part.stored * math.prod(shape) for part in made for shape, _ in part.tensors.values())
    assert total == count_parameters(model)["total"]
    flops = 3 * sum(part.stored * part.runs * part.flops for part in made)
    assert flops == pytest.approx(flops_per_token(model, 8192))


def test_weights_and_moments_are_cut_as_the_table_says(parts_of):
    total = count_parameters(MODELS["super"])["total"]
    whole = plan(parts_of).memory()
    assert whole["parameters"] == 4 * total and whole["optimizer"] == 8 * total
    cut = plan(parts_of, mesh={"fsdp": 8}).memory()
    assert total / 8 < cut["parameters"] / 4 < 1.001 * total / 8  # norms and the like stay whole
    assert plan(parts_of, mesh={"data": 8}).memory()["parameters"] == whole["parameters"]
    for mesh in ({"context": 8}, {"fsdp": 2, "context": 4}):
        assert plan(parts_of, mesh=mesh).memory()["parameters"] == cut["parameters"]


def test_activations_shrink_where_they_should(parts_of):
    def activations(mesh, **work):
        return plan(parts_of, "dense", mesh, **work).memory()["activations"]

    eight = {"data": 8}
    assert activations(eight, remat="full") < activations(eight, remat="none")
    assert activations(eight, batch=128, remat="none") > 1.6 * activations(eight, batch=64, remat="none")
    assert activations({"tensor": 8}, batch=16, remat="none") < 0.5 * activations({}, batch=16, remat="none")
    assert activations({"context": 8}, batch=16, remat="none") == activations(eight, batch=16, remat="none")


def bytes_of(made: Plan, part: str) -> dict[str, float]:
    (found,) = (one for one in made.parts if one.name == part)
    return {name: sum(ways) for name, ways in made.traffic(found).items()}


def test_tokens_travel_at_latent_width(parts_of):
    """Super: one of 1024 numbers a token to each device, for two forward passes and the gradient, and two sums back."""
    found = bytes_of(plan(parts_of, "super", {"expert": 8}, batch=8), "E")
    tokens = 8192 * 1024 * 2
    assert found["expert all-gather"] == pytest.approx(3 * 7 * tokens)
    assert found["expert reduce-scatter"] == pytest.approx(2 * 7 * tokens)
    assert not {"fsdp all-gather", "expert all-to-all"} & found.keys()


def test_rows_travel_where_devices_are_more_than_experts_of_a_token(parts_of):
    """Nano: 6 rows of a token, twice in the forward pass, three times backwards, never once more."""
    found = bytes_of(plan(parts_of, "nano", {"expert": 8}, batch=8), "E")
    rows = 8192 * 6 * 2688 * 2
    assert found["expert all-to-all"] == pytest.approx((2 + 3) * rows * 7 / 8)
    assert "expert all-gather" not in found


def test_weights_travel_in_bfloat16_and_gradients_in_float32(parts_of):
    made = plan(parts_of, "super", {"fsdp": 8}, batch=8)
    weights = sum(
        math.prod(shape) for path, (shape, _) in made.parts[3].tensors.items() if path.endswith("proj/weight")
    )
    found = bytes_of(made, "*")
    assert made.parts[3].name == "*"
    assert found["fsdp all-gather"] == pytest.approx(3 * 2 * weights * 7 / 8)  # two forward passes and a backward one
    assert found["fsdp reduce-scatter"] == pytest.approx(4 * weights * 7 / 8)


def test_devices_of_a_row_share_weights_as_rows_do(parts_of):
    """What travels of weights is the same whichever of the two axes cuts them, or both."""
    alone = plan(parts_of, "super", {"fsdp": 8}, batch=8)
    for mesh, batch, seq in (({"context": 8}, 1, 65536), ({"fsdp": 2, "context": 4}, 2, 32768)):
        made = plan(parts_of, "super", mesh, batch=batch, seq=seq)
        for part in made.parts:
            found, expected = bytes_of(made, part.name), bytes_of(alone, part.name)
            for name in ("fsdp all-gather", "fsdp reduce-scatter", "fsdp all-to-all", "gradient all-reduce"):
                assert found.get(name, 0) == pytest.approx(expected.get(name, 0)), (part.name, name)


def test_context_sends_states_and_keys(parts_of):
    made = plan(parts_of, "super", {"context": 8}, batch=1, seq=65536, remat="none")
    assert bytes_of(made, "M")["context all-gather"] == pytest.approx(2 * 7 * 128 * 64 * 128 * 4)
    keys = 65536 * 2 * 2 * 128 * 2  # tokens, keys and values, heads, width, bytes
    assert bytes_of(made, "*")["context all-gather"] == pytest.approx(3 * keys * 7 / 8)


def test_links_inside_and_between_hosts(parts_of):
    """The last axes are within a host of 8; what comes from other hosts comes once a host."""
    near = plan(parts_of, "super", {"fsdp": 8, "expert": 8}, batch=64)
    (experts,) = (part for part in near.parts if part.name == "E")
    nvlink, network = near.traffic(experts)["expert all-gather"]
    assert network == 0 < nvlink
    nvlink, network = near.traffic(experts)["fsdp all-gather"]  # one GPU of each of 8 hosts
    assert network == pytest.approx(nvlink)
    both = plan(parts_of, "super", {"fsdp": 64}, batch=64)
    nvlink, network = both.traffic(experts)["fsdp all-gather"]
    assert network == pytest.approx(nvlink * (7 / 8) / 8 / (63 / 64))
    rack = plan(parts_of, "super", {"fsdp": 64}, batch=64, interconnect="nvl72")
    assert rack.traffic(experts)["fsdp all-gather"][1] == 0


def test_the_limit_moves_with_the_network(parts_of):
    slow = plan(parts_of, "super", {"fsdp": 64}, batch=64, interconnect="ib200").report()
    fast = plan(parts_of, "super", {"fsdp": 64}, batch=64, interconnect="ib800").report()
    assert slow["ms"]["network"] == pytest.approx(4 * fast["ms"]["network"], rel=1e-4)
    assert slow["blocks"]["E"]["limit"] == "network"
    alone = plan(parts_of, "nano", {}, batch=1).report()
    assert alone["collective_gb"] == {} and alone["fits_h200"]
    assert alone["blocks"]["M"]["limit"] == "compute" and alone["blocks"]["E"]["limit"] == "HBM"  # few tokens an expert
    large = plan(parts_of, "nano", {}, batch=64, remat="none").report()
    assert large["blocks"]["E"]["limit"] == "compute"
    assert not large["fits_h200"] and large["memory_gb"]["total"] * 1e9 > HBM_BYTES


# Bytes of a device that XLA plans for train.py's step, compiled for H200s that are not there (BENCHMARKS.md).
COMPILED = [
    ("nano", "MEM*E", {}, 1, 8192, "none", 54.95e9),
    ("nano", "MEM*E", {}, 1, 8192, "full", 50.30e9),
    ("nano", "MEM*E", {"fsdp": 8}, 8, 8192, "full", 14.03e9),
    ("nano", "MEM*E", {"expert": 8}, 8, 8192, "full", 20.84e9),
    ("nano", "MEM*E", {"fsdp": 2, "expert": 4}, 8, 8192, "none", 20.42e9),
    ("nano", "MEM*E", {"fsdp": 2, "context": 4}, 2, 32768, "full", 14.29e9),
    ("nano", "MEM*E", {"context": 8}, 1, 65536, "full", 13.30e9),
    ("nano", "MEM*E", {"tensor": 8}, 1, 8192, "full", 9.10e9),  # no kernel takes the experts' width
    ("super", "MEM*E", {"context": 8}, 1, 65536, "full", 38.08e9),
    ("super", "MEM*E", {"fsdp": 4, "expert": 2}, 8, 8192, "full", 34.28e9),
    ("super", "MEM*E", {"fsdp": 2, "expert": 4}, 16, 8192, "none", 70.69e9),
    ("tiny-super", "MEM*EME", {"fsdp": 8}, 8, 8192, "none", 4.64e9),
    ("tiny-super", "MEM*EME", {"expert": 8}, 16, 8192, "full", 4.80e9),
    ("nano-4b", "M-M*-", {"fsdp": 8}, 8, 8192, "full", 7.92e9),
    ("nano-4b", "M-M*-", {"tensor": 8}, 1, 8192, "full", 3.13e9),
    ("nano-4b", "M-M*-", {"data": 2, "tensor": 4}, 2, 8192, "none", 6.94e9),
]


STACKED = [  # layers scanned, computed again
    ("super", "ME" * 6, {"fsdp": 4, "expert": 2}, 8, 8192, "full", 60.29e9),
    ("super", "MEMEMEMEME*", {"context": 8}, 1, 65536, "full", 57.53e9),
    ("nano", "MEMEM*EMEMEM*E", {"fsdp": 2, "expert": 4}, 8, 8192, "full", 35.21e9),
    ("nano-4b", "M-M-M-M-*-", {"fsdp": 8}, 8, 8192, "full", 8.95e9),
    ("nano", "MEMEMEME*", {"context": 8}, 1, 65536, "full", 21.22e9),
]
WHOLE = [  # models, layers scanned
    ("super", preset("super").pattern, {"fsdp": 8, "expert": 8}, 64, 8192, "full", 64.87e9),
    ("super", preset("super").pattern, {"context": 64}, 1, 2**20, "full", 68.44e9),
    ("ultra", preset("ultra").pattern, {"fsdp": 64, "expert": 8}, 512, 8192, "full", 72.83e9),
]


def planned(name, pattern, mesh, batch, seq, remat, stacked) -> float:
    model, recipe = replace(preset(name), {"pattern": pattern}), RECIPES["bfloat16"]
    with aot.compiling_for("h200"):
        made = parts(model, seq, recipe)
    stack = find_layer_stack([abstract(model, recipe)], lambda _: True) if stacked else None
    work = Work(batch, seq, remat=remat)
    return Plan(model, made, ParallelConfig(**{"data": 1, **mesh}), work, stack).memory()["total"]


@pytest.mark.parametrize(("name", "pattern", "mesh", "batch", "seq", "remat", "compiled"), COMPILED)
def test_memory_is_that_of_compiled_steps(name, pattern, mesh, batch, seq, remat, compiled):
    assert planned(name, pattern, mesh, batch, seq, remat, False) == pytest.approx(compiled, rel=0.15)


@pytest.mark.parametrize(("name", "pattern", "mesh", "batch", "seq", "remat", "compiled"), STACKED + WHOLE)
def test_memory_is_that_of_compiled_stacked_steps(name, pattern, mesh, batch, seq, remat, compiled):
    assert planned(name, pattern, mesh, batch, seq, remat, True) == pytest.approx(compiled, rel=0.15)


def test_what_scans_hold_beside_one_layer(parts_of):
    """All gradients and inputs at once; an inner scan has one iteration's weights, gradients and inputs of its own."""
    model = replace(MODELS["dense"], {"pattern": "M-M-*" * 2})
    made = [dataclasses.replace(part, stored=max(1, model.pattern.count(part.name))) for part in parts_of("dense")]

    def memory(stack):
        return Plan(model, made, ParallelConfig(data=1), Work(8, 8192), stack).memory()

    unrolled, flat = memory(None), memory(Stack((Repeat(2, (0, 1, 2, 3, 4)),)))
    nested = memory(Stack((Repeat(2, (Repeat(2, (0, 1)), 2)),)))
    but_embeddings = 4 * (count_parameters(model)["total"] - model.vocab_size * model.hidden_size)
    assert flat["gradients"] == nested["gradients"] == but_embeddings > 1.5 * unrolled["gradients"]
    kinds, wide = count_parameters(model)["kinds"], 8 * 8192 * model.hidden_size * 2
    sliced = 2 * (4 + 4) * (kinds["M"] + kinds["-"]) + 4 * wide
    assert nested["total"] - flat["total"] == pytest.approx(sliced)


def test_a_scan_carries_gradients_of_experts_that_are_not_cut_yet(parts_of):
    """Float32, whole along `fsdp`: the second weight's as well as the first's; with `expert`, both once more."""
    moe = MODELS["super"].moe
    whole = 4 * 2 * moe.num_experts * moe.latent_size * moe.intermediate_size
    for mesh, expected in (
        ({"fsdp": 8}, whole / 2),
        ({"fsdp": 2, "expert": 4}, whole / 4),
        ({"expert": 8}, 0),
    ):
        made = plan(parts_of, "super", mesh)
        (experts,) = (part for part in made.parts if part.name == "E")
        assert made._carried(experts) == expected


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the compiler for GPUs")
@pytest.mark.parametrize(
    ("name", "pattern", "mesh", "batch", "seq", "remat", "stacked"),
    [(*row[:-1], False) for row in COMPILED] + [(*row[:-1], True) for row in STACKED],
)
def test_memory_is_that_of_steps_compiled_now(name, pattern, mesh, batch, seq, remat, stacked):
    """The same against this version of the model."""
    work = bench.Workload(
        replace(preset(name), {"pattern": pattern}),
        batch=batch,
        seq=seq,
        precision="bfloat16",
        parallel=ParallelConfig(**mesh, stack_layers=stacked),
        remat=remat,
        optimizer=True,
        target="h200",
        target_devices=math.prod(mesh.values()),
    )
    memory = bench.run("train", work)["planned_memory_gb"]
    compiled = 1e9 * (memory["argument"] + memory["output"] - memory["alias"] + memory["temp"])
    assert planned(name, pattern, mesh, batch, seq, remat, stacked) == pytest.approx(compiled, rel=0.15)


def test_the_command(capsys):
    arguments = ["plan", "tiny-super", "--mesh=data=2,fsdp=2,expert=2", "--batch=8", "--seq=1024", "--remat=none"]
    assert front.run([*arguments, "--interconnect=ib800"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["devices"] == 8 and result["interconnect"] == "ib800" and result["stack"] is None
    assert {"parameters", "gradients", "optimizer", "activations", "total"} == result["memory_gb"].keys()
    assert set(result["blocks"]) == {"embeddings", "M", "E", "*", "head", "mtp eh_proj", "mtp *", "mtp E"}
    assert all(block["limit"] in ("compute", "HBM", "NVLink", "network") for block in result["blocks"].values())


def test_the_command_knows_stacked_layers(capsys):
    arguments = ["plan", "nano-4b", "--mesh=fsdp=8", "--batch=8", "--seq=1024"]
    shown = []
    for flags in ([], ["--stack-layers"]):
        assert front.run([*arguments, *flags]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0]["stack"] is None and "x [" in shown[1]["stack"]
    assert shown[0]["memory_gb"]["total"] < shown[1]["memory_gb"]["total"]
    assert shown[0]["collective_gb"] == shown[1]["collective_gb"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano"], "plan needs --mesh=AXIS=N,.* and --batch=B .* and --seq=T"),
        (["nan", "--mesh=fsdp=8", "--batch=8", "--seq=64"], "neither a preset .* Did you mean 'nano'"),
        (
            ["nano", "--mesh=stack_layers=1", "--batch=8", "--seq=64"],
            "axes of data, fsdp, expert, context, tensor, got",
        ),
        (["nano", "--mesh=fdsp=8", "--batch=8", "--seq=64"], "expected AXIS=N.* Did you mean 'fsdp'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises((UserError, ConfigError), match=message):
        front.run(["plan", *arguments])


@pytest.mark.parametrize(
    ("mesh", "work", "message"),
    [
        ({"data": -1}, {}, "plan counts no devices"),
        ({"fsdp": 8}, {"batch": 4}, "--batch is 4 sequences, which do not divide over the 8 devices"),
        ({"context": 8}, {"seq": 60}, r"--seq \(60\) must be a multiple of parallel.context \(8\)"),
        (
            {"tensor": 3},
            {},
            r"parallel.tensor=3 does not divide model.mamba.num_groups \(8\): it may be one of 1, 2, 4, 8",
        ),
        ({}, {"interconnect": "ib40"}, "--interconnect must be one of ib200, .* Did you mean 'ib400'"),
    ],
)
def test_work_that_does_not_fit(mesh, work, message):
    with pytest.raises(ConfigError, match=message):
        plan(lambda _: [], "super", mesh, **work)
