"""The model that ships inside the package: small, calibrated, and found without being named."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import h1bjax
from h1bjax import cli
from h1bjax.calibration_file import calibrated_names
from h1bjax.checkpoint import resolve_model
from h1bjax.embedded import embedded_model
from h1bjax.evaluate import perplexity

pytestmark = pytest.mark.once

# Written for this test, so no model has read it.
TEXT = (
    "The old man put down his hat and looked at the fire for a long time before he spoke. He had "
    "walked all day through the rain, and his boots were heavy with mud. When at last he told us "
    "what he had seen in the valley, nobody in the room believed a word of it, and yet nobody "
    "dared to laugh. My sister brought him bread and a cup of hot tea, and asked him to begin "
    "again from the beginning."
)


@pytest.fixture(scope="module")
def model():
    # A cache without its calibration would warn, and warnings are errors here.
    return h1bjax.load()


def test_it_loads_by_default_with_the_calibration_of_the_default_cache(model):
    assert model.spec == h1bjax.PRESETS["h1b"]
    assert calibrated_names(embedded_model()) == ["h1b"]
    assert resolve_model(None) == embedded_model()


def test_it_reads_2048_tokens_with_heads_that_kernels_take(model):
    assert model.config.max_position_embeddings >= 2048
    assert model.config.head_dim in (64, 128)


def test_it_fits_into_the_package():
    files = [file for file in embedded_model().rglob("*") if file.suffix not in (".py", ".pyc")]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 12_000_000


def test_its_card_says_what_it_is(model):
    card = (embedded_model() / "README.md").read_text("utf-8")
    count = sum(array.size for array in model.decoder.parameters().values())
    assert f"{count:,} parameters" in card
    for heading in ("Quality", "Data", "Training", "Limits and licence"):
        assert f"\n## {heading}\n" in card


def test_it_knows_english_through_both_caches(model):
    """A model of this kind needs more than 2 bits a byte after its first steps of training."""
    exact = h1bjax.load(cache="exact")
    losses = [perplexity(one, TEXT, context=256).bits_per_byte for one in (exact, model)]
    assert losses[0] < 1.7
    assert losses[1] < 1.01 * losses[0]


def test_it_writes_words(model):
    prompt = "He opened the door and"
    out = model.generate(prompt, max_new_tokens=48, temperature=0.7, top_p=0.95, seed=1)
    words = re.findall(r"[A-Za-z]+", out.text[0])
    assert len(words) >= 20
    assert len(set(words)) >= 12


def test_commands_need_no_model(capfd):
    def run(*arguments):
        code = cli.main([*arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    # As many tokens as above, so that nothing is compiled again.
    prompt = "Once upon a time"
    answer = json.loads(run("generate", "--prompt", prompt, "--max-new-tokens", "48", "--json"))
    assert answer["cache"]["preset"] == "h1b"
    assert answer["text"][0]
    sizes = json.loads(run("cache-size", "--context", "2048", "--json"))
    config = h1bjax.LlamaConfig.from_hf(embedded_model())
    exact = h1bjax.PRESETS["exact"].nbytes(config, batch=1, max_length=2048)
    assert {row["preset"]: row.get("nbytes") for row in sizes}["exact"] == exact


def test_transformers_loads_it(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = embedded_model()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = model.tokenizer.encode(TEXT)
    assert tokenizer(TEXT).input_ids == ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    ours = h1bjax.load(cache="exact", dtype="float32")
    logits, _ = ours.decoder(jnp.asarray([ids]), jnp.arange(len(ids))[None])
    np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=2e-3)
