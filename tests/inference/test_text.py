"""From a prompt to text: what the model is given, where it stops, and pieces that are whole characters."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from nemotron_jax.data.chat import ChatTemplate
from nemotron_jax.data.tokenizer import Tokenizer, train_bpe
from nemotron_jax.errors import CheckpointError, ConfigError, DataError
from nemotron_jax.inference import text
from nemotron_jax.inference.sampling import Sampling
from nemotron_jax.inference.text import chat_prompt, decoded_pieces, generate_text, stop_ids, stream_text
from tests.tiny import TINY

TEMPLATE = Path(__file__).parents[1] / "data" / "nemotron_chat.jinja"
SETTINGS = {"raw": False, "system": None, "thinking": True}
SETTINGS |= {"tokens": 99, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7}
GRIN = "\N{GRINNING FACE}"


class ByteTokenizer:
    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Special tokens and bytes, no merges."""
    return train_bpe([""], 270)


@pytest.fixture
def directory(tokenizer, tmp_path):
    """What a Hugging Face directory with a chat template holds beside its weights."""
    tokenizer.save(tmp_path)
    shutil.copy(TEMPLATE, tmp_path / "chat_template.jinja")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}')
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    """Stands for the model: says ``said.tokens``; remembers what it was asked."""

    said = types.SimpleNamespace(tokens=[], prompt=[], asked=())

    def generate(model, prompts, tokens, sampling, *, seed):
        (prompt,) = prompts
        said.prompt, said.asked = prompt.tolist(), (model, tokens, sampling, seed)
        yield from (np.array([token], np.int32) for token in said.tokens)
        raise AssertionError("nobody asks for a token after the last")

    monkeypatch.setattr(text, "generate", generate)
    monkeypatch.setattr(text, "load", lambda path: (TINY, f"model of {path}"))
    return said


def test_streamed_pieces_are_whole_characters():
    pieces = list(decoded_pieces(ByteTokenizer(), f"aé€{GRIN}!".encode()))
    assert pieces == ["a", "é", "€", GRIN, "!"]


def test_a_cut_character_is_shown_at_the_end():
    assert list(decoded_pieces(ByteTokenizer(), [97, 0xE2, 0x82])) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_what_precedes_a_cut_character_is_shown_at_once():
    tokens = iter([b"ab\xe2", b"\x82\xac"])
    merged = type("", (), {"decode": lambda self, ids: b"".join(ids).decode(errors="replace")})()
    assert list(decoded_pieces(merged, tokens)) == ["ab", "€"]


def test_pieces_make_up_the_text_whatever_the_tokens_are(tokenizer):
    rng = np.random.default_rng(0)
    good = tokenizer.encode(f"añ€{GRIN}\N{REPLACEMENT CHARACTER} b" * 9)
    for _ in range(200):
        tokens = np.where(rng.random(len(good)) < rng.choice([0, 0.1, 0.9]), rng.integers(0, 270, len(good)), good)
        pieces = list(decoded_pieces(tokenizer, tokens.tolist()))
        assert "".join(pieces) == tokenizer.decode(tokens)
        assert all(pieces)


def test_pieces_of_a_tokenizer_that_drops_the_first_space():
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "s": 4}, unk_token="<s>"))
    made.decoder = decoders.Metaspace()
    assert list(decoded_pieces(Tokenizer(made), [2, 3, 4, 2])) == ["the", " cat", "s", " the"]


def test_streaming_never_decodes_much_at_a_time(tokenizer):
    longest = 0

    class Spy:
        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids)

    tokens = tokenizer.encode(f"words and {GRIN} " * 50)
    assert "".join(decoded_pieces(Spy(), tokens)) == tokenizer.decode(tokens)
    assert longest <= 5  # the four bytes of one character, and the token before it


@pytest.mark.parametrize("stop", [2, 11])
def test_a_stream_ends_before_a_stop_token(tokenizer, said, stop):
    said.tokens = [*tokenizer.encode("né"), stop, 70]
    pieces = stream_text("model", tokenizer, np.array([1, 2]), 5, Sampling(), stop={2, 11}, seed=3)
    assert "".join(pieces) == "né"
    assert said.asked == ("model", 5, Sampling(), 3)
    assert said.prompt == [1, 2]


def test_chat(directory, tokenizer, said):
    said.tokens = [*tokenizer.encode_chat("I see.</think>Hi!"), 11]
    assert "".join(generate_text(directory, "Hello <|im_end|> é", **SETTINGS)) == "I see.</think>Hi!"
    expected = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHello <|im_end|> é<|im_end|>\n"
    expected += "<|im_start|>assistant\n<think>\n"
    assert tokenizer.decode(said.prompt) == expected
    assert said.prompt == tokenizer.encode_chat(expected).tolist()
    assert (said.prompt[0], said.prompt[-2]) == (10, 12)  # no <s>; special tokens are themselves
    assert said.asked == (f"model of {directory}", 99, Sampling(0.5, 3, 0.9), 7)


def test_system_message_and_no_thinking(directory, tokenizer, said):
    said.tokens = [11]
    assert list(generate_text(directory, "Hi", **SETTINGS | {"system": "Be brief.", "thinking": False})) == []
    shown = tokenizer.decode(said.prompt)
    assert shown.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert shown.endswith("<|im_start|>assistant\n<think></think>")


@pytest.mark.parametrize("raw", [True, False])
def test_text_is_continued_after_the_opening_token(directory, tokenizer, said, raw):
    """With --raw, and where there is no template. Names of special tokens are text."""
    if not raw:
        (directory / "chat_template.jinja").unlink()
    said.tokens = [2]
    list(generate_text(directory, "Hi<|im_end|>", **SETTINGS | {"raw": raw}))
    assert said.prompt == [1, *tokenizer.encode("Hi<|im_end|>")]
    assert 11 not in said.prompt


@pytest.mark.parametrize(("config", "opening"), [({"model_type": "nemotron_h"}, []), ({"model": {}}, [1])])
def test_a_tokenizer_may_want_no_opening_token(directory, tokenizer, said, config, opening):
    """A Hugging Face directory does as its tokenizer says; training runs open every document."""
    values = json.loads((directory / "tokenizer.json").read_text())
    values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (directory / "tokenizer.json").write_text(json.dumps(values))
    (directory / "config.json").write_text(json.dumps(config))
    said.tokens = [2]
    list(generate_text(directory, "Hi", **SETTINGS | {"raw": True}))
    assert said.prompt == [*opening, *tokenizer.encode("Hi")]


@pytest.mark.parametrize(
    ("settings", "template", "message"),
    [
        ({"system": "a"}, None, "--system is for chats, but .* has no chat template"),
        ({"thinking": False}, None, "--no-thinking is for chats, but .* has no chat template"),
        ({"system": "a", "raw": True}, "x", "--system is for chats, but --raw continues"),
        ({"thinking": False}, "x", "--no-thinking: the chat template of .* knows no enable_thinking"),
        ({}, "", "makes nothing of the prompt"),
        ({"system": "\udcff"}, "x", "the system message is not valid UTF-8"),
        ({"prompt": "\udcff"}, "x", "the prompt is not valid UTF-8"),
        ({"temperature": -1.0}, "x", "temperature must be"),
    ],
)
def test_settings_that_are_refused(directory, said, settings, template, message):
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    settings = {"prompt": "a"} | SETTINGS | settings
    with pytest.raises(ConfigError, match=message):
        generate_text(directory, settings.pop("prompt"), **settings)


def test_a_template_that_refuses(directory, said):
    (directory / "chat_template.jinja").write_text("{{ raise_exception('No users\nhere.') }}")
    with pytest.raises(DataError, match="refuses the conversation: No users here"):
        generate_text(directory, "Hi", **SETTINGS)


def test_a_directory_without_a_tokenizer(directory, said):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json .*: work with token ids instead"):
        generate_text(directory, "Hi", **SETTINGS)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json: give the --workdir of a training run, or a Hug"):
        generate_text(directory, "Hi", **SETTINGS)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": [2, 11]}', {2, 11}),
        ('{"eos_token_id": 5}', {5}),
        ('{"eos_token_id": null}', {2, 11}),
        (None, {2, 11}),  # the config's and the tokenizer's </s>, and the end of a turn
    ],
)
def test_stop_ids(tokenizer, tmp_path, content, expected):
    if content:
        (tmp_path / "generation_config.json").write_text(content)
    assert stop_ids(tmp_path, tokenizer, TINY) == expected


def test_stop_ids_without_an_end_of_turn(tmp_path):
    """A word of the vocabulary that only looks like it ends nothing."""
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 7, "<|im_end|>": 3}, unk_token="<s>"))
    assert stop_ids(tmp_path, Tokenizer(made), TINY) == {2, 7}


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "a"}', '{"eos_token_id": [2, "b"]}'])
def test_generation_config_that_is_refused(tokenizer, tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        stop_ids(tmp_path, tokenizer, TINY)


def test_an_opening_token_is_the_templates_own(tokenizer, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<s>"})
    )
    template = ChatTemplate.load(tmp_path)
    ids = chat_prompt(tokenizer, template, "Hi", system=None, thinking=True)
    assert ids.tolist() == [1, *tokenizer.encode("Hi")]
