"""The model of lm-evaluation-harness: the same scores as the harness's Hugging Face model."""

import pytest
from toy import CHAT_TEMPLATE, load_quietly, sentencepiece, write_toy

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from h1bjax.evaluate import perplexity
from h1bjax.harness.model import HarnessModel

# The harness's own imports warn.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]

STORY = (
    "Once upon a time, there was a little girl. She liked to play in the park. One day, she saw a "
    "big dog. The dog was sad. "
)
PAIRS = [
    ("Once upon a time, there was a", " little girl."),
    ("Once upon a time, there was a ", "big dog."),
    ("", "One day, she"),
    ("<s>The dog was", " sad"),
    (STORY * 3, "She was happy."),
    *[("The dog was", choice) for choice in (" sad", " big", " a", " happy and went home")],
]
LENGTH = 96


def requests(kind, *arguments):
    return [Instance(kind, {}, argument, 0) for argument in arguments]


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    """A random model that transformers wrote."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("saved")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece(), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(params=["stories", "saved_folder"], scope="module")
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def ours(folder):
    return HarnessModel(load_quietly(folder), batch_size=4, max_length=LENGTH)


@pytest.fixture(scope="module")
def theirs(folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    return huggingface.HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH
    )


# Equal to the Hugging Face model


def test_log_likelihoods_are_equal(ours, theirs):
    asked = requests("loglikelihood", *PAIRS)
    with pytest.warns(UserWarning, match="1 contexts were longer than the model's 96 tokens"):
        found = ours.loglikelihood(asked)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], abs=1e-3
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_equal(ours, theirs):
    asked = requests("loglikelihood_rolling", (STORY,), (STORY * 6,), ("a",))
    assert len(ours.tok_encode(STORY * 6)) > 2 * LENGTH
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


def test_generated_texts_are_equal(ours, theirs):
    arguments = {"until": ["."], "max_gen_toks": 12}
    asked = requests(
        "generate_until",
        ("Once upon a time", arguments),
        ("The dog was sad. ", arguments),
        ("One day", {"until": ["zz"], "max_gen_toks": 6}),
    )
    found = ours.generate_until(asked)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    # Theirs decodes the new tokens alone, and so loses the space that they may begin with.
    assert [text.removeprefix(" ") for text in found] == [
        text.removeprefix(" ") for text in expected
    ]
    assert any(found)


# Through the cache


@pytest.mark.parametrize("cache", ["exact", "h1b-signs"])
def test_a_text_scores_as_perplexity_scores_it(bos_folder, cache):
    model = load_quietly(bos_folder, cache)
    text = "the end of the tale, " * 5
    length = len(model.tokenizer.encode_plain(text))
    assert length > 64
    ((found, _),) = HarnessModel(model, batch_size=1).loglikelihood(
        requests("loglikelihood", ("", text))
    )
    expected = perplexity(model, text, context=length).total.nats
    assert found == pytest.approx(-expected, rel=1e-5)
    if cache != "exact":
        exact = perplexity(load_quietly(bos_folder), text, context=length).total.nats
        assert expected != pytest.approx(exact, rel=1e-3)


# As the harness uses it


def test_the_harness_makes_it_by_name_from_text(toy_folder):
    made = get_model("h1bjax").create_from_arg_string(
        f"path={toy_folder},cache=exact,dtype=float32,max_length=64",
        {"batch_size": 2, "device": "cuda:0"},
    )
    assert isinstance(made, HarnessModel)
    assert (made.batch_size, made.max_length, made.model.spec.name) == (2, 64, "exact")
    # The harness's own are there as before.
    assert get_model("dummy").__name__ == "DummyLM"
    info = made.get_model_info()
    assert info["cache"] == "exact"
    assert info["model_num_parameters"] > 10_000


def test_a_bos_in_the_text_is_not_doubled(bos_folder, toy_folder):
    model = HarnessModel(load_quietly(bos_folder))
    bos = model.prefix_token_id
    assert model.text_tokenizer.encode("") == [bos]
    for text in ("the", "<s>the"):
        assert model.tok_encode(text).count(bos) == 1
    assert model.tok_encode("the", add_special_tokens=False).count(bos) == 0
    plain = HarnessModel(load_quietly(toy_folder))
    assert plain.prefix_token_id == plain.text_tokenizer.bos_token_id


def test_chats_use_the_models_template(toy_folder):
    model = HarnessModel(load_quietly(toy_folder))
    chat = [{"role": "user", "content": "the end"}, {"role": "assistant", "content": "So "}]
    assert model.apply_chat_template(chat).endswith("<s>assistant: ")
    assert model.apply_chat_template(chat, add_generation_prompt=False).endswith("assistant: So")
    assert model.chat_template(True) == CHAT_TEMPLATE
    assert model.chat_template(False) is None
    with pytest.raises(ValueError, match="has no chat template 'tools'; it has default"):
        model.chat_template("tools")
    assert model.tokenizer_name == HarnessModel(load_quietly(toy_folder)).tokenizer_name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size='auto'.*a number of at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_batch_size": 64}, "max_batch_size=64"),
        ({"max_length": 2000}, "max_length=2000 must be at least 2 and at most the model's 1024"),
    ],
)
def test_arguments_that_it_does_not_have_are_refused(toy_folder, options, message):
    with pytest.raises(ValueError, match=message):
        HarnessModel(load_quietly(toy_folder), **options)


def test_a_model_needs_a_tokenizer(untokenized_folder):
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessModel(load_quietly(untokenized_folder))


def test_a_sliding_window_limits_what_is_read(tmp_path):
    write_toy(tmp_path, sentencepiece(), model_type="mistral", sliding_window=64)
    assert HarnessModel(load_quietly(tmp_path)).max_length == 64


def test_a_prompt_needs_room(toy_folder):
    model = HarnessModel(load_quietly(toy_folder), max_length=64)
    asked = requests("generate_until", ("the end", {"max_gen_toks": 64}))
    with pytest.raises(ValueError, match=r"max_gen_toks=64 leaves no room .* within 64 tokens"):
        model.generate_until(asked)
