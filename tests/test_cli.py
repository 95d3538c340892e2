"""Commands answer mistakes with one message and exit code 2, quickly and without a traceback."""

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nemotron_jax import __main__ as front
from nemotron_jax import cli
from nemotron_jax.config import preset
from nemotron_jax.errors import DataError, UserError
from nemotron_jax.hf_config import to_hf
from nemotron_jax.run_config import Processes, RunConfig, to_dict

ROOT = Path(__file__).parents[1]
train = importlib.import_module("train")
evaluation = importlib.import_module("eval")

QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"
WORKDIR = "--workdir=runs/x"
RUN = {"train": train.train, "eval": evaluation.evaluate, "nemotron_jax": front.run}


def call(monkeypatch, capfd, command: str, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as ending:
        cli.main(RUN[command])
    return (ending.value.code or 0, *capfd.readouterr())


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """Calls a command that must refuse its arguments; returns the message."""
    monkeypatch.chdir(tmp_path)

    def refuse(command: str, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = call(monkeypatch, capfd, command, *arguments)
        assert code == 2
        assert out == ""
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, "a refused command leaves no files"
        return err.removeprefix("error: ").strip()

    return refuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "unknown flag --nope. train.py --help lists the known ones."),
        (["--work=a"], "unknown flag --work. "),  # a flag is spelled out: another one may begin alike one day
        (["--wrokdir=a"], "unknown flag --wrokdir. Did you mean '--workdir'?"),
        ([QUICKSTART, WORKDIR, "--steps=3"], "unknown flag --steps. Did you mean '--config.train.steps'?"),
        ([QUICKSTART, WORKDIR, "--pattern", "M"], "unknown flag --pattern. Did you mean '--config.model.pattern'?"),
        (
            [QUICKSTART, WORKDIR, "--config.train.stepz=3"],
            "unknown config key train.stepz. Did you mean '--config.train.steps'?",
        ),
        (
            [QUICKSTART, WORKDIR, "--config.model.mamba.head=3"],
            "unknown config key model.mamba.head. Did you mean '--config.model.mamba.head_dim'?",
        ),
        (
            [QUICKSTART, WORKDIR, "--config.optimiser.peak_lr=1"],
            "unknown config key optimiser.peak_lr. Did you mean '--config.optimizer.peak_lr'?",
        ),
        ([QUICKSTART, WORKDIR, "--config.train=3"], "unknown config key train."),
        (
            [QUICKSTART, WORKDIR, "--config.train.steps=ten"],
            "--config.train.steps: expected a whole number, got 'ten'",
        ),
        ([QUICKSTART, WORKDIR, "--config.train.steps=1.5"], "expected a whole number, got '1.5'"),
        ([QUICKSTART, WORKDIR, "--config.train.steps="], "expected a whole number, got ''"),
        (
            [QUICKSTART, WORKDIR, "--config.optimizer.peak_lr=fast"],
            "--config.optimizer.peak_lr: expected a number, got 'fast'",
        ),
        ([QUICKSTART, WORKDIR, "--config.optimizer.peak_lr=nan"], "expected a number, got 'nan'"),
        ([QUICKSTART, WORKDIR, "--config.model.moe.normalize_weights=maybe"], "expected true or false, got 'maybe'"),
        ([QUICKSTART, WORKDIR, "--config.train.steps"], "--config.train.steps: expected one argument"),
        ([QUICKSTART, WORKDIR, "--config.train.steps=0"], "train.steps must be positive, got 0."),
        ([QUICKSTART, WORKDIR, "--config.train.remat=ful"], "Did you mean 'full'?"),
        ([QUICKSTART, WORKDIR, "--config.model.preset=supr"], "unknown model preset 'supr'"),
        ([QUICKSTART, WORKDIR, "--config.model.pattern=ME?"], "unknown letter '?' at position 2"),
        ([QUICKSTART, WORKDIR, "--config.model.mamba.num_heads=6"], "must be a multiple of mamba.num_groups (8)"),
        ([QUICKSTART, WORKDIR, "--config.train.microbatches=3"], "must be a multiple of train.microbatches (3)"),
        ([QUICKSTART, WORKDIR, "--coordinator=gpu1"], "--coordinator: expected HOST:PORT, such as node1:12345, got"),
        ([QUICKSTART, WORKDIR, "--coordinator=gpu1:99999"], "--coordinator: expected HOST:PORT"),
        ([QUICKSTART, WORKDIR, "--processes=0"], "--processes: expected a whole number from 1, got '0'"),
        ([QUICKSTART, WORKDIR, "--process=-1"], "--process: expected a whole number from 0, got '-1'"),
        ([QUICKSTART, WORKDIR, "more"], "unexpected argument 'more'"),
        ([QUICKSTART, WORKDIR, "--", "more"], "unexpected argument 'more'"),
        ([QUICKSTART, WORKDIR, "-x"], "unexpected argument '-x'"),
        ([], "train.py needs --config=FILE"),
        ([QUICKSTART], "train.py needs --workdir=DIR"),
        ([QUICKSTART, "--workdir="], "train.py needs --workdir=DIR"),
        ([WORKDIR], "train.py needs --config=FILE"),
        (["--config", QUICKSTART], "--config: expected one argument"),
        (["--config=none.py", WORKDIR], "--config=none.py cannot be read: No such file or directory."),
        (
            [QUICKSTART.replace("start.py", "stat.py"), WORKDIR],
            f"No such file or directory. Did you mean '{ROOT.as_posix()}/configs/quickstart.py'?",
        ),
        ([f"--config={ROOT}", WORKDIR], "cannot be read: Is a directory."),
        # An unknown flag is told first: whoever mistypes --config need not hear that it is missing.
        (["--confg=a.py", WORKDIR], "unknown flag --confg. Did you mean '--config'?"),
    ],
)
def test_train_refuses(refused, arguments: list[str], message: str):
    assert message in refused("train", *arguments)


BASE = "from nemotron_jax.cli import base_config\ndef get_config():\n    config = base_config()\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "mine.py has no function get_config()"),
        ("get_config = 1\n", "mine.py has no function get_config()"),
        ("def get_config(:\n", "mine.py:1: SyntaxError: invalid syntax"),
        ("import os\nimport nothing_of_that_name\n", "mine.py:2: ModuleNotFoundError"),
        (BASE, "get_config() must return a ConfigDict, best that of nemotron_jax.cli.base_config(), got NoneType."),
        ("def get_config():\n    return {}\n", "must return a ConfigDict"),
        ("from ml_collections import ConfigDict as get_config\n", "has no group model: set model.preset"),
        (
            BASE + "    config.train.stepz = 3\n",
            'mine.py:4: AttributeError: Key "stepz" does not exist and cannot be added since the config is locked. '
            'Did you mean "steps" instead of "stepz"?',
        ),
        (BASE + "    config.modle.preset = 'nano'\n", "mine.py:4: AttributeError: 'modle' Did you mean \"model\""),
        (BASE + "    config.train.steps = 'ten'\n", "mine.py:4: TypeError: Could not override field 'steps'"),
        (BASE + "    open('gone.txt')\n", "mine.py:4: FileNotFoundError"),
        (BASE + "    raise RuntimeError('two\\nlines')\n", "mine.py:4: RuntimeError: two lines"),
        (BASE + "    return config\n", "the config names no model.preset, so it must set model.pattern and"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n"
            "    return ConfigDict({'model': {'preset': 'nano'}, 'trian': {}})\n",
            "unknown config group 'trian'. Did you mean 'train'?",
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n"
            "    return ConfigDict({'model': {'preset': 'nano'}, 'train': 3})\n",
            "train must be a group of keys, got 3.",
        ),
    ],
)
def test_train_refuses_a_config_file(refused, tmp_path: Path, source: str, message: str):
    (tmp_path / "mine.py").write_text(source)
    assert message in refused("train", "--config=mine.py", WORKDIR)


def test_a_config_file_that_is_not_text(refused, tmp_path: Path):
    (tmp_path / "mine.py").write_bytes(b"\xff\xfe\x00")
    assert "mine.py: " in refused("train", "--config=mine.py", WORKDIR)


def test_a_config_file_is_read_anew_and_need_not_start_from_base_config(tmp_path: Path):
    file = tmp_path / "mine.py"
    source = (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'model': {'preset': '%s'}})\n"
    )
    for name in ("super", "ultra"):  # the same size, within a second: a compiled copy would look current
        file.write_text(source % name)
        config, *_ = cli.parse_train_flags([f"--config={file}", WORKDIR, "--config.train.steps=7"])
        assert config.model == preset(name)
        assert config.train.steps == 7
    assert sorted(tmp_path.iterdir()) == [file]


def test_a_model_without_a_preset_has_what_is_set_and_no_more(tmp_path: Path):
    (tmp_path / "mine.py").write_text(BASE + "    return config\n")
    flags = [f"--config={tmp_path / 'mine.py'}", WORKDIR, "--config.model.pattern=M*", "--config.model.hidden_size=64"]
    config, *_ = cli.parse_train_flags(flags)
    assert (config.model.pattern, config.model.hidden_size, config.model.mtp) == ("M*", 64, None)


def test_processes_are_told_apart_by_flags(tmp_path: Path):
    quickstart = ["--config=configs/quickstart.py", WORKDIR]
    *_, alone = cli.parse_train_flags(quickstart)
    assert alone == Processes()
    *_, one = cli.parse_train_flags([*quickstart, "--coordinator=gpu1:1234", "--processes=4", "--process=3"])
    assert one == Processes("gpu1:1234", 4, 3)


@pytest.mark.parametrize("code", [0, 3, 75])
def test_train_hands_over_and_passes_on_the_exit_code(monkeypatch, capfd, code: int):
    given = []
    loop = types.ModuleType("loop")
    loop.pretrain = lambda config, workdir, sampler: given.append((config, workdir)) or code
    monkeypatch.setitem(sys.modules, "nemotron_jax.training.loop", loop)
    flags = ["--config.parallel.data", "-1", "--workdir", "a b", "--config.train.steps=9", "--config.train.steps=8"]
    # Flags may stand before the config file that they change.
    assert call(monkeypatch, capfd, "train", *flags, QUICKSTART)[0] == code
    ((config, workdir),) = given
    assert isinstance(config, RunConfig)
    assert (config.model, config.train.steps, workdir) == (preset("quickstart"), 8, Path("a b"))


def test_only_users_mistakes_are_turned_into_messages(monkeypatch, capfd):
    def fail(error: Exception):
        def run(arguments):
            raise error

        return run

    with pytest.raises(ZeroDivisionError):
        cli.main(fail(ZeroDivisionError()))
    with pytest.raises(SystemExit) as ending:
        cli.main(fail(DataError("the file is empty.")))
    assert ending.value.code == 2
    assert capfd.readouterr() == ("", "error: the file is empty.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "eval.py needs --checkpoint=DIR (a training workdir or an HF directory) and --task=TASK (",
        ),
        (["--checkpont=."], "unknown flag --checkpont. Did you mean '--checkpoint'?"),
        (["--checkpoint=none", "--task=score"], "--checkpoint: there is no 'none'"),
        ([f"--checkpoint={'x' * 300}", "--task=score"], "--checkpoint: there is no 'xxx"),
        (["--checkpoint=", "--task=score"], "--checkpoint: there is no ''"),
        (
            ["--checkpoint=.", "--task=perplxity"],
            "--task must be one of perplexity, score, got 'perplxity'. Did you mean 'perplexity'?",
        ),
        (["--checkpoint=.", "--task=perplexity"], "--task=perplexity needs --data=FILES"),
        (["--checkpoint=.", "--task=score"], "--task=score needs --tokens=IN.npy (integers [B, T]) and --out=OUT.npy"),
        (["--checkpoint=.", "--task=score", "--tokens=none.npy", "--out=b"], "--tokens: there is no 'none.npy'"),
        (["--checkpoint=.", "--task=score", "--tokens=.", "--out=no/b"], "--out: expected a file that can be written"),
        (["--checkpoint=.", "--task=score", "--tokens=.", "--out=."], "--out: expected a file that can be written"),
        (
            ["--checkpoint=.", "--task=perplexity", "--data=a", "--out=b.npy"],
            "--task=perplexity has no use for --out: it takes --data.",
        ),
        (["--checkpoint=.", "--task=perplexity", "--data=a", "--step=-1"], "--step: expected a step, got '-1'"),
        (["--checkpoint=.", "--task=perplexity", "--data=a", "b"], "unexpected argument 'b'"),
    ],
)
def test_eval_refuses(refused, arguments: list[str], message: str):
    assert message in refused("eval", *arguments)


@pytest.fixture
def likelihood(monkeypatch):
    """Stands for the measuring itself; remembers what it was asked."""
    asked = []
    module = types.ModuleType("likelihood")
    module.perplexity = lambda *arguments, **settings: asked.append((arguments, settings)) or {"tokens": 3}
    module.score = lambda *arguments, **settings: asked.append((arguments, settings))
    monkeypatch.setitem(sys.modules, "nemotron_jax.evaluation.likelihood", module)
    monkeypatch.setattr("nemotron_jax.evaluation.likelihood", module, raising=False)
    return asked


def test_eval_prints_its_result_as_json(monkeypatch, capfd, likelihood, tmp_path: Path):
    flags = [f"--checkpoint={tmp_path}", "--task=perplexity", "--data=a.txt,b.txt"]
    code, out, _ = call(monkeypatch, capfd, "eval", *flags)
    assert (code, json.loads(out.splitlines()[-1])) == (0, {"tokens": 3})
    call(monkeypatch, capfd, "eval", *flags, "--step=0")
    assert likelihood == [((tmp_path, "a.txt,b.txt"), {"step": step}) for step in (None, 0)]


def test_eval_scores_into_a_file(monkeypatch, capfd, likelihood, tmp_path: Path):
    (tmp_path / "in.npy").touch()
    flags = [f"--checkpoint={tmp_path}", "--task=score", f"--tokens={tmp_path}/in.npy", f"--out={tmp_path}/out.npy"]
    assert call(monkeypatch, capfd, "eval", *flags) == (0, "", "")
    assert likelihood == [((tmp_path, tmp_path / "in.npy", tmp_path / "out.npy"), {"step": None})]


NEITHER = "generate needs either --prompt=TEXT, or --prompt-tokens=IN.npy and --out=OUT.npy."
CHAT_FLAGS = "--system, --no-thinking and --raw go with --prompt=TEXT"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs one of the commands params, plan, generate, convert, bench; got none."),
        (["parms"], "got 'parms'. Did you mean 'params'?"),
        (["--seq=3"], "got '--seq=3'."),
        (["params"], "params needs a preset (nano, lightning, "),
        (["params", "nanno"], "'nanno' is neither a preset ("),
        (["params", "nano", "super"], "unexpected argument 'super'"),
        (["params", "nano", "--sek=3"], "unknown flag --sek. Did you mean '--seq'?"),
        (["params", "nano", "--seq=0"], "--seq: expected a positive number of tokens, got '0'"),
        (["params", "."], "config.json cannot be read: No such file or directory."),
        (["generate", "--prompt=a"], "generate needs --checkpoint=DIR"),
        (["generate", "--checkpoint=none", "--prompt=a"], "--checkpoint: there is no 'none'"),
        (["generate", "--checkpoint=."], NEITHER),
        (["generate", "--checkpoint=.", "--prompt=a", "--prompt-tokens=."], NEITHER),
        (["generate", "--checkpoint=.", "--prompt=a", "--out=b.npy"], NEITHER),
        (["generate", "--checkpoint=.", "--prompt-tokens=."], NEITHER),
        (["generate", "--checkpoint=.", "--prompt-tokens=.", "--out=b.npy", "--raw"], CHAT_FLAGS),
        (["generate", "--checkpoint=.", "--prompt-tokens=.", "--out=b.npy", "--system="], CHAT_FLAGS),
        (["generate", "--checkpoint=.", "--prompt-tokens=.", "--out=b.npy", "--no-thinking"], CHAT_FLAGS),
        (["generate", "--checkpoint=.", "--prompt=a", "--tokens=0"], "--tokens: expected a positive number of tokens"),
        (["generate", "--checkpoint=.", "--prompt=a", "--temperature=-1"], "--temperature: expected a number that is"),
        (["generate", "--checkpoint=.", "--prompt=a", "--top-p=0"], "--top-p must be in (0, 1], got 0.0."),
        (["generate", "--checkpoint=.", "--prompt=a", "--top-k=-1"], "--top-k: expected a whole number"),
        (["generate", "--checkpoint=.", "--prompt=a", "--top_k=1"], "unknown flag --top_k. Did you mean '--top-k'?"),
        (["bench"], "the following arguments are required: train|prefill|decode"),
        (["bench", "trian", "--preset=nano"], "invalid choice: 'trian'"),
        (["bench", "train"], "bench needs --preset=NAME"),
        (["bench", "train", "--preset=nanno"], "Did you mean 'nano'?"),
        (["bench", "train", "--preset=nano", "--pattern=MX"], "unknown letter 'X' at position 1"),
        (["bench", "train", "--preset=nano", "--batch=0"], "--batch: expected a positive whole number, got '0'"),
        (
            ["bench", "train", "--preset=nano", "--remat=ful"],
            "expected one of none, full, got 'ful'. Did you mean 'full'",
        ),
        (["bench", "train", "--preset=nano", "--mesh=fdsp=2"], "got 'fdsp=2'. Did you mean 'fsdp'?"),
        (["bench", "train", "--preset=nano", "--mesh=fsdp"], "--mesh: expected AXIS=N,..."),
        (["bench", "train", "--preset=nano", "--compile-for=h100"], "expected one of h200, b200,"),
        (["bench", "train", "--preset=nano", "--compile-for=h200:9"], "1 to 8 devices or a multiple of 8"),
    ],
)
def test_the_front_door_refuses(refused, arguments: list[str], message: str):
    assert message in refused("nemotron_jax", *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "describes no model"),
        ('{"a": 1}', "describes no model"),
        ('{"model": 1}', "must be a group"),
    ],
)
def test_params_refuses_a_directory(refused, tmp_path: Path, content: str, message: str):
    (tmp_path / "config.json").write_text(content)
    assert message in refused("nemotron_jax", "params", ".")


def test_params_reads_presets_and_directories(monkeypatch, capfd, tmp_path: Path):
    config = preset("quickstart")
    for name, values in (("run", to_dict(RunConfig(config))), ("hf", to_hf(config))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    results = [
        json.loads(call(monkeypatch, capfd, "nemotron_jax", "params", name, "--seq=256")[1])
        for name in ("quickstart", str(tmp_path / "run"), str(tmp_path / "hf"))
    ]
    assert results[0] == results[1] == results[2]
    assert {"total", "active", "mtp", "kinds", "flops_per_token"} < set(results[0])
    assert set(results[0]["kinds"]) == set("ME*")
    assert 0 < results[0]["mtp"] < results[0]["total"]
    longer = json.loads(call(monkeypatch, capfd, "nemotron_jax", "params", "quickstart")[1])
    assert longer["flops_per_token"] > results[0]["flops_per_token"]


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("train", ["--help"], "--config.model.mamba.num_heads=INT"),
        ("eval", ["--help"], "--tokens IN.npy"),
        ("nemotron_jax", ["--help"], "params PRESET_OR_DIR"),
        ("nemotron_jax", ["params", "--help"], "--seq"),
        ("nemotron_jax", ["generate", "-h"], "--prompt-tokens IN.npy"),
    ],
)
def test_help(monkeypatch, capfd, command: str, arguments: list[str], expected: str):
    code, out, err = call(monkeypatch, capfd, command, *arguments)
    assert (code, err) == (0, "")
    assert expected in out


@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        (["train.py", "--nope"], 2, "", "error: unknown flag --nope"),
        (["train.py", "--help"], 0, "usage: train.py", ""),
        (["eval.py", "--checkpoint=.", "--task=perplxity"], 2, "", "error: --task must be one of"),
        (["-m", "nemotron_jax", "parms"], 2, "", "error: python -m nemotron_jax needs"),
        (["-m", "nemotron_jax", "params", "quickstart"], 0, '{"total": ', ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_real_commands(one_device_env, command: list[str], code: int, out: str, err: str):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=one_device_env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    for printed, start in ((done.stdout, out), (done.stderr, err)):
        assert printed.startswith(start) if start else printed == ""


def test_mistakes_are_answered_without_jax():
    program = f"""
import sys, train, eval, nemotron_jax.__main__ as front
for run, flags in ((train.train, ["{QUICKSTART}", "{WORKDIR}", "--config.train.steps=0"]),
                   (eval.evaluate, ["--nope"]), (front.run, ["params", "nanno"])):
    try:
        run(flags)
    except Exception as error:
        print(type(error).__name__)
print("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ConfigError", "UserError", "ConfigError", "False"]


def test_the_error_of_the_door_is_the_users():
    with pytest.raises(UserError, match="unknown flag --b"):
        cli.Parser("x", None).parse_args(["--b"])
