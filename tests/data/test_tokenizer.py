import json
import random
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from nemotron_jax.data.tokenizer import BYTES, SPECIAL_TOKENS, Tokenizer, train_bpe
from nemotron_jax.errors import DataError


def unicode_texts() -> list[str]:
    """Every kind of character, in no sensible order; and what trips tokenizers up."""
    chosen = random.Random(0)
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    texts = ["".join(chosen.choices(characters, k=length)) for length in range(1, 200)]
    return [*texts, "", " ", "\n\n  \t x", "\r\n", "e\u0301 \u00e9 \ufeff", "<s>a</s><|im_end|> <unk>", "\x00\x00"]


def test_round_trip_and_bytes(tokenizer):
    texts = unicode_texts()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_special_tokens_have_their_places_and_never_come_from_text(tokenizer):
    assert SPECIAL_TOKENS[:4] == ("<unk>", "<s>", "</s>", "<SPECIAL_3>")
    assert SPECIAL_TOKENS[9:] == ("<SPECIAL_9>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode(range(14)) == "".join(SPECIAL_TOKENS)
    assert min(tokenizer.encode("".join(SPECIAL_TOKENS))) >= len(SPECIAL_TOKENS)
    assert not tokenizer.token_bytes[: len(SPECIAL_TOKENS)].any()
    assert tokenizer.token_bytes[len(SPECIAL_TOKENS) :].all()


def test_special_tokens_of_chats(tokenizer):
    ids = tokenizer.encode_chat("<|im_start|>user\nthe cat<|im_end|>")
    assert ids.dtype == np.int32
    assert (ids[0], ids[-1]) == (10, 11)
    assert ids[1:-1].tolist() == tokenizer.encode("user\nthe cat").tolist()
    assert min(tokenizer.encode("<|im_end|>")) >= len(SPECIAL_TOKENS)  # elsewhere they are still text
    assert tokenizer.special_id("<|im_end|>") == 11
    assert tokenizer.special_id("t") is None and tokenizer.special_id("<|no|>") is None


def test_what_a_tokenizer_opens_a_text_with(tokenizer):
    assert tokenizer.opening_ids == [1]  # it does not say
    made = hf_tokenizer({"x": 0, "y": 1}, ["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A </s>", special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    assert Tokenizer(made).opening_ids == [2, 3]
    made.post_processor = processors.ByteLevel()
    assert Tokenizer(made).opening_ids == []


def test_training_is_deterministic_and_learns():
    texts = unicode_texts() + ["the cat sat on the mat"] * 20
    first, second = train_bpe(texts, 400), train_bpe(iter(texts), 400)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 400
    assert len(first.encode("the cat sat on the mat")) < 10
    assert train_bpe(texts, 399).fingerprint != first.fingerprint


def test_vocabulary_too_small():
    with pytest.raises(DataError, match=f"at least {len(SPECIAL_TOKENS) + BYTES} tokens .* got 200"):
        train_bpe(["text"], 200)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("on the mat").tolist() == tokenizer.encode("on the mat").tolist()


def test_load_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"nothing: expected a tokenizer\.json, or a directory that holds one"):
        Tokenizer.load(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"expected a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(
        DataError, match=r"tokenizer\.json: expected a tokenizer of the Hugging Face tokenizers library"
    ):
        Tokenizer.load(tmp_path)


def hf_tokenizer(vocabulary: dict[str, int], special: list[str]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    made.add_special_tokens(special)
    return made


def test_hugging_face_files(tmp_path):
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = hf_tokenizer(vocabulary, ["<|open|>", "<|im_end|>", "</s>"])
    made.add_tokens([AddedToken("  é", normalized=False)])
    made.enable_truncation(2)
    made.enable_padding()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has no token that opens or closes a document"):
        Tokenizer(hf_tokenizer(vocabulary, []))
    config = {"bos_token": {"content": "<|open|>"}, "eos_token": "<|im_end|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == made.token_to_id("<|open|>")
    assert loaded.eos_id == made.token_to_id("</s>")  # the end of a document, whatever ends a turn of a chat
    assert loaded.vocab_size == 256 + 4
    text = "abc  é\n"
    assert len(loaded.encode(text)) == 5  # neither truncated nor padded
    assert loaded.token_bytes[loaded.encode(text)].sum() == len(text.encode())
    for content, message in (("{", "expected JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: {message}"):
            Tokenizer.load(tmp_path)


def test_one_token_may_open_and_close():
    made = hf_tokenizer({"a": 0}, ["<|endoftext|>"])
    tokenizer = Tokenizer(made)
    assert tokenizer.bos_id == tokenizer.eos_id == 1


def test_bytes_of_other_kinds_of_tokenizers():
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xE2>": 3, "▁the": 4, "é": 5}
    made = tokenizers.Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    assert Tokenizer(made).token_bytes.tolist() == [0, 0, 0, 1, 4, 2]
