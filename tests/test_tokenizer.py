import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from h1bjax.token_text import TokenDecoder
from h1bjax.tokenizer import Tokenizer

pytestmark = pytest.mark.once


SENTENCES = [
    "Once upon a time there was a little girl who liked the colour blue.",
    "The quick brown fox jumps over the lazy dog, and the dog barks.",
    "Straße, café, naïve: 3.14 and 1,024 € in total!\n\n\tend",
]
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<s>' + message['role'] + '\n' + message['content'] | trim + eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "The fox <ö>?"},
]
# Special tokens written out in a text become ids without bytes, so texts here do not hold any.
TEXTS = st.text(max_size=40).filter(lambda text: "<" not in text)


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """BPE with byte fallback, a dummy prefix, and "▁" for the space, as Llama 2 has it."""
    words = [("▁" + text.replace(" ", "▁")) for text in SENTENCES]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, limit_alphabet=40)
    trained.train_from_iterator(words, trainer)
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = first + sorted(model["vocab"], key=model["vocab"].get)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def write(folder: Path, tokenizer: tokenizers.Tokenizer, **config) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("byte_level"), byte_level(), **NAMED)


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sentencepiece"), with_bos(sentencepiece_like()), **NAMED)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture(scope="module", params=["models/stories260K", "tokenizers/gpt2"])
def shared_tokenizer(request, shared_data) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / request.param)


def dummy_prefix(tokenizer: Tokenizer, text: str) -> bytes:
    """The space that SentencePiece-style tokenizers put in front of any text but the empty one."""
    return b" " if text and not tokenizer.stream().decoder.byte_level else b""


# Bytes of tokens


def check_bytes(tokenizer: Tokenizer, text: str) -> None:
    pieces = tokenizer.token_bytes()
    written = b"".join(pieces[token] for token in tokenizer.encode_plain(text))
    # "▁" itself cannot be told from a space in SentencePiece's alphabet.
    if not tokenizer.stream().decoder.byte_level:
        text = text.replace("▁", " ")
    assert written == dummy_prefix(tokenizer, text) + text.encode()


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_the_bytes_of_a_texts_tokens_are_its_utf8(tokenizer, text):
    check_bytes(tokenizer, text)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_the_bytes_of_real_vocabularies_tokens_are_the_texts_utf8(shared_tokenizer, text):
    check_bytes(shared_tokenizer, text)


def test_special_tokens_have_no_bytes(tokenizer):
    pieces = tokenizer.token_bytes()
    assert len(pieces) == tokenizer.vocab_size
    assert pieces[tokenizer.bos_token_id] == pieces[tokenizer.eos_token_id] == b""
    assert sum(not piece for piece in pieces) == tokenizer.backend.to_str().count('"special":true')


def test_token_bytes_cover_the_vocabulary_of_a_model(tokenizer):
    own = tokenizer.token_bytes()
    assert tokenizer.token_bytes(tokenizer.vocab_size + 3) == (*own, b"", b"", b"")
    assert tokenizer.token_bytes(5) == own[:5]


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("two words")])
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, backend, **NAMED))
    tokens = tokenizer.encode_plain("two words")
    assert tokens == [tokenizer.vocab_size - 1]
    assert tokenizer.token_bytes()[tokens[0]] == b"two words"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
    ],
)
def test_unsupported_decoders_are_named(tmp_path, decoder):
    backend = byte_level()
    if decoder is None:
        spec = json.loads(byte_level().to_str()) | {"decoder": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    else:
        backend.decoder = decoder
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, backend, **NAMED))
    for use in (tokenizer.token_bytes, tokenizer.stream):
        with pytest.raises(ValueError, match="decoder of an unsupported kind"):
            use()


def test_sequences_of_sequences_are_read():
    step = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    spec = {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [step]}]}
    assert TokenDecoder.from_json(spec) == TokenDecoder(replacements=(("▁", " "),))


# Decoding token by token


def deltas(tokenizer: Tokenizer, tokens: list[int]) -> Iterator[str]:
    stream = tokenizer.stream()
    for token in tokens:
        delta, stream = stream.push(token)
        yield delta
    yield stream.finish()


def check_stream(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(deltas(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_of_any_tokens(tokenizer, data):
    ids = st.integers(0, tokenizer.vocab_size + 2)
    check_stream(tokenizer, data.draw(st.lists(ids, max_size=30)))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_of_any_bytes(tokenizer, data):
    single = [token for token, piece in enumerate(tokenizer.token_bytes()) if len(piece) == 1]
    check_stream(tokenizer, data.draw(st.lists(st.sampled_from(single), max_size=12)))


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_streamed_text_never_holds_half_a_character(tokenizer, text):
    tokens = tokenizer.encode(text)
    parts = list(deltas(tokenizer, tokens))
    assert "".join(parts) == tokenizer.decode(tokens)
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_streaming_real_vocabularies(shared_tokenizer):
    tokens = list(range(0, shared_tokenizer.vocab_size, 7))
    check_stream(shared_tokenizer, tokens)
    check_stream(shared_tokenizer, shared_tokenizer.encode("  Zoë’s naïve 🦊 said 你好.\n"))


def test_pushing_leaves_a_stream_as_it_was(tokenizer):
    first, second, *_ = tokenizer.encode_plain("the dog")
    _, stream = tokenizer.stream().push(first)
    expected = stream.push(second)
    stream.push(first)
    assert stream.push(second) == expected


def test_text_appears_as_soon_as_it_is_certain(tokenizer):
    tokens = tokenizer.encode_plain("the dog")
    stream, shown = tokenizer.stream(), ""
    for count, token in enumerate(tokens, start=1):
        delta, stream = stream.push(token)
        shown += delta
        assert shown == tokenizer.decode(tokens[:count])


def test_an_invalid_byte_spoils_its_whole_run_with_byte_fallback(sentencepiece_folder):
    tokenizer = Tokenizer.from_pretrained(sentencepiece_folder)
    letter = tokenizer.encode_plain("the")[-1]
    first = tokenizer.token_bytes().index(b"\0")
    euro = [first + byte for byte in "€".encode()]
    bad = first + 0xFF
    written = tokenizer.token_bytes()[letter].decode()
    assert list(deltas(tokenizer, [*euro, letter])) == ["", "", "", "€" + written, ""]
    assert list(deltas(tokenizer, [*euro, bad])) == ["", "", "", "", "\ufffd" * 4]


# Encoding and decoding


@settings(deadline=None, max_examples=100)
@given(text=TEXTS.filter(lambda text: "▁" not in text))
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_negative_ids_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"negative.*-1"):
        tokenizer.decode([5, -1])
    with pytest.raises(ValueError, match=r"negative.*-1"):
        tokenizer.stream().push(-1)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_the_post_processor_says_whether_bos_comes_first(tmp_path):
    plain = Tokenizer.from_pretrained(write(tmp_path / "a", byte_level(), **NAMED))
    bos = Tokenizer.from_pretrained(write(tmp_path / "b", with_bos(byte_level()), **NAMED))
    assert not plain.adds_bos
    assert bos.adds_bos
    assert plain.encode("fox") == plain.encode_plain("fox") == bos.encode_plain("fox")
    assert bos.encode("fox") == [bos.bos_token_id, *bos.encode_plain("fox")]
    assert (plain.bos_token_id, plain.eos_token_id) == (0, 1)


@pytest.mark.parametrize("flag", [False, True])
def test_add_bos_token_does_not_overrule_the_post_processor(tmp_path, flag):
    flags = {"add_bos_token": flag, "add_eos_token": flag}
    plain = Tokenizer.from_pretrained(write(tmp_path / "a", byte_level(), **NAMED, **flags))
    bos = Tokenizer.from_pretrained(write(tmp_path / "b", with_bos(byte_level()), **NAMED, **flags))
    assert plain.encode("fox") == plain.encode_plain("fox")
    assert bos.encode("fox") == [bos.bos_token_id, *bos.encode_plain("fox")]


def test_bos_is_known_without_a_configuration(tmp_path):
    folder = write(tmp_path, with_bos(byte_level()))
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.adds_bos
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id is None


def test_special_tokens_map_completes_the_configuration(tmp_path):
    folder = write(tmp_path, byte_level(), bos_token="<s>")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": ""})
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.eos_token_id == 1


def test_named_tokens_become_special(tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("<end>", special=False)])
    config = NAMED | {"eos_token": "<end>", "extra_special_tokens": ["<tool>"]}
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, backend, **config))
    assert tokenizer.decode(tokenizer.encode("fox<end><tool>")) == "fox"
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 2
    assert tokenizer.token_bytes()[-2:] == (b"", b"")


def test_tokens_that_only_the_configuration_adds_keep_their_ids(tmp_path):
    backend = byte_level()
    size = backend.get_vocab_size()
    added = {str(size): {"content": "<tool>", "special": True}, "0": {"content": "<s>"}}
    folder = write(tmp_path, backend, **NAMED, added_tokens_decoder=added)
    assert Tokenizer.from_pretrained(folder).encode("<tool>") == [size]
    added = {str(size + 7): {"content": "<tool>", "special": True}}
    folder = write(tmp_path, backend, **NAMED, added_tokens_decoder=added)
    with pytest.raises(ValueError, match=f"'<tool>' is {size}, not {size + 7}"):
        Tokenizer.from_pretrained(folder)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, backend, **NAMED))
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]


# Files


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*nowhere"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json$"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_sentencepiece_model_must_be_converted(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer\.model.*AutoTokenizer.*save_pretrained"
    ):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", "[]", "tokenizer.json must hold a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("special_tokens_map.json", "3", "special_tokens_map.json must hold a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    write(tmp_path, byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


# Chats


def test_the_chat_template_writes_the_prompt(tmp_path):
    folder = write(tmp_path, with_bos(byte_level()), **NAMED, chat_template=CHATML)
    tokenizer = Tokenizer.from_pretrained(folder)
    text = "<s>system\nBe brief.</s>\n<s>user\nThe fox <ö>?</s>\n"
    assert tokenizer.chat_text(MESSAGES, add_generation_prompt=False) == text
    prompt = tokenizer.chat_text(MESSAGES)
    assert prompt.endswith("<s>assistant\n")
    # The tokenizer adds BOS to texts, but a template writes its own special tokens.
    tokens = tokenizer.apply_chat_template(MESSAGES)
    assert tokens == tokenizer.encode_plain(prompt)
    assert sum(token == tokenizer.bos_token_id for token in tokens) == 3


def test_templates_come_from_a_list_or_from_files(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
    folder = write(tmp_path, byte_level(), **NAMED, chat_template=named)
    assert Tokenizer.from_pretrained(folder).chat_text(MESSAGES) == "list"
    (folder / "chat_template.jinja").write_text("file {{ bos_token }} ü", encoding="utf-8")
    assert Tokenizer.from_pretrained(folder).chat_text(MESSAGES) == "file <s> ü"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert set(Tokenizer.from_pretrained(folder).chat_templates) == {"default", "rag"}


def test_templates_have_what_transformers_gives_them(tmp_path):
    template = (
        "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none and documents is none }}"
    )
    folder = write(tmp_path, byte_level(), **NAMED, chat_template=template)
    message = {"role": "user", "content": "<b>é</b>", "name": None}
    text = Tokenizer.from_pretrained(folder).chat_text([message, message])
    assert text == '{"role": "user", "content": "<b>é</b>"}4True'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no default chat template: give a plain prompt"),
        (
            {"chat_template": [{"name": "rag", "template": ""}]},
            r"no default chat template \(it has only rag\)",
        ),
        (
            {"chat_template": "{{ raise_exception('roles must alternate') }}"},
            "roles must alternate",
        ),
        ({"chat_template": "{% if %}"}, "the chat template failed"),
        # The sandbox keeps a template away from Python's internals.
        ({"chat_template": "{{ messages.__class__.__mro__ }}"}, "unsafe"),
        ({"chat_template": "{{ messages.append(1) }}"}, "unsafe|not safely callable"),
    ],
)
def test_chat_templates_that_fail(tmp_path, config, message):
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, byte_level(), **NAMED, **config))
    with pytest.raises(ValueError, match=message):
        tokenizer.chat_text(MESSAGES)


@pytest.mark.parametrize("template", [3, [{"name": "default"}], ["a"]])
def test_chat_templates_of_a_wrong_form(tmp_path, template):
    folder = write(tmp_path, byte_level(), **NAMED, chat_template=template)
    with pytest.raises(ValueError, match=r"chat_template in .* must be a string or a list"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hello", "not a str"),
        ({"role": "user", "content": ""}, "not a dict"),
        (["hello", {"content": 3}], "0: is a str.*1: 'role' is missing; message 1: 'content' is 3"),
    ],
)
def test_malformed_messages_are_all_named(tmp_path, messages, message):
    folder = write(tmp_path, byte_level(), **NAMED, chat_template=CHATML)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder).apply_chat_template(messages)


# Agreement with transformers

SAMPLES = [
    "",
    "Once upon a time",
    "  two  spaces ",
    "naïve 🦊 你好\n\n\tend",
    "a<s>b </s> c",
    unicodedata.normalize("NFD", "Zoë"),
]


def check_agreement(folder: Path, theirs) -> None:
    ours = Tokenizer.from_pretrained(folder)
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode_plain(text) == theirs.encode(text, add_special_tokens=False)
        tokens = ours.encode(text)
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": False},
        {"pad_token": "<pad>", "extra_special_tokens": ["<tool>"]},
    ],
)
def test_ids_agree_with_transformers(tmp_path, make, in_file, flags):
    transformers = pytest.importorskip("transformers")
    backend = with_bos(make()) if in_file else make()
    folder = write(tmp_path, backend, **NAMED, **flags, chat_template=CHATML)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    check_agreement(folder, theirs)
    chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.from_pretrained(folder).apply_chat_template(MESSAGES) == chat


def test_ids_agree_with_the_auto_tokenizer_on_a_real_checkpoint(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    check_agreement(folder, transformers.AutoTokenizer.from_pretrained(folder))


def test_ids_agree_with_transformers_on_gpt2(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizers" / "gpt2"
    check_agreement(folder, transformers.PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_ids_agree_with_the_llama_tokenizer_class(tmp_path, flags):
    transformers = pytest.importorskip("transformers")
    config = NAMED | {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>"} | flags
    folder = write(tmp_path, with_bos(sentencepiece_like()), **config)
    theirs = transformers.LlamaTokenizerFast.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    for text in ("Once upon a time", "naïve 🦊 你好\n\n\tend"):
        assert ours.encode(text) == theirs.encode(text)
