"""The command line: what it prints, where, and how it fails."""

import gzip
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from toy import load_quietly

from h1bjax import cli
from h1bjax.cache import PRESETS, CacheSpec
from h1bjax.cli.report import human_bytes
from h1bjax.config import LlamaConfig
from h1bjax.evaluate import perplexity

# The command line makes lines of warnings, so they must reach it.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]

REPOSITORY = Path(__file__).parents[1]
SHORT = ["--cache", "exact", "--max-new-tokens", "12"]


@pytest.fixture
def run(capfd):
    """Runs a command line; returns its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def assert_error(result, message):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"h1bjax: error: .*\n", err), err
    assert re.search(message, err), err


def cache_report(folder, preset, *, batch, capacity):
    config = LlamaConfig.from_hf(folder)

    def nbytes(name, **dtype):
        return CacheSpec.preset(name).nbytes(config, batch=batch, max_length=capacity, **dtype)

    return {
        "preset": preset,
        "nbytes": nbytes(preset, dtype="float32"),
        "bf16_nbytes": nbytes("exact"),
    }


# generate


def test_generate_prints_one_json_object(run, toy_folder):
    prompts = ["Once upon a time", "the end"]
    code, out, err = run(
        "generate", "--model", toy_folder, "--prompt", prompts[0], "--prompt", prompts[1],
        *SHORT, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    printed = json.loads(out)
    expected = load_quietly(toy_folder).generate(prompts, max_new_tokens=12)
    assert list(printed) == ["text", "tokens", "cache", "tokens_per_second"]
    assert printed["text"] == expected.text
    assert printed["tokens"] == expected.tokens
    assert printed["cache"] == cache_report(toy_folder, "exact", batch=2, capacity=128)
    assert printed["tokens_per_second"] > 0
    assert out.count("\n") == 1


def test_generate_prints_the_whole_text_and_a_summary_apart(run, toy_folder):
    code, out, err = run("generate", "--model", toy_folder, "--prompt", "the end", *SHORT)
    (text,) = load_quietly(toy_folder).generate("the end", max_new_tokens=12).text
    assert (code, out) == (0, f"the end{text}\n")
    assert re.fullmatch(
        r"cache exact: 131.07 kB, in bf16 65.54 kB \(0.50 times as much\); [\d.]+ tokens/s\n", err
    )


def test_several_prompts_are_told_apart(run, toy_folder):
    _, out, _ = run(
        "generate", "--model", toy_folder, "--prompt", "the", "--prompt", "once", *SHORT
    )
    first, second = load_quietly(toy_folder).generate(["the", "once"], max_new_tokens=12).text
    assert out == f"==> prompt 1 <==\nthe{first}\n\n==> prompt 2 <==\nonce{second}\n"


def test_a_stream_prints_the_same_text(run, toy_folder):
    arguments = ["generate", "--model", toy_folder, "--prompt", "the end", *SHORT]
    _, whole, _ = run(*arguments)
    code, streamed, err = run(*arguments, "--stream")
    assert (code, streamed) == (0, whole)
    assert re.fullmatch(r"cache exact: .*; [\d.]+ tokens/s\n", err)


def test_a_stream_of_one_token_has_no_speed(run, toy_folder):
    _, _, err = run(
        "generate", "--model", toy_folder, "--prompt", "the end", "--cache", "exact",
        "--max-new-tokens", "1", "--stream",
    )  # fmt: skip
    assert err.endswith("; 1 new tokens\n")


def test_every_option_of_generate_counts(run, toy_folder):
    def text(*options):
        code, out, _ = run(
            "generate", "--model", toy_folder, "--prompt", "the end", *SHORT, "--json", *options
        )
        assert code == 0
        return json.loads(out)["text"][0]

    greedy = text()
    hot = ("--temperature", "9")
    assert text(*hot) != greedy
    assert text(*hot, "--seed", "1") != text(*hot)
    assert text(*hot, "--top-k", "1") == greedy
    assert text(*hot, "--top-p", "1e-6") == greedy
    assert text(*hot, "--min-p", "0.999") == greedy
    assert text("--stop", greedy[3:5], "--stop", "no such text") == greedy[:3]


def test_an_uncalibrated_cache_is_one_line_of_warning(run, toy_folder):
    code, out, err = run(
        "generate", "--model", toy_folder, "--prompt", "the end", "--max-new-tokens", "12", "--json"
    )
    assert code == 0
    # What stands in for the default until there is a calibration.
    expected = cache_report(toy_folder, "h1b-signs", batch=1, capacity=128)
    assert json.loads(out)["cache"] == expected
    assert re.fullmatch(r"h1bjax: warning: the cache 'h1b' is not calibrated.*\n", err)


# eval perplexity


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("Once upon a time\r\nthe thé ended.\n".encode())
    return path


def test_perplexity_prints_one_json_object(run, bos_folder, text_file):
    code, out, err = run(
        "eval", "perplexity", "--model", bos_folder, "--text", text_file, "--cache", "exact",
        "--context", "20", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    text = text_file.read_bytes().decode()
    expected = perplexity(load_quietly(bos_folder), text, context=20)
    assert expected.late is not None
    assert expected.bytes == text_file.stat().st_size
    assert json.loads(out) == {
        "nats_per_token": pytest.approx(expected.nats_per_token),
        "bits_per_byte": pytest.approx(expected.bits_per_byte),
        "tokens": expected.tokens,
        "bytes": expected.bytes,
        "late": {
            "bits_per_byte": pytest.approx(expected.late.bits_per_byte),
            "tokens": expected.late.tokens,
            "bytes": expected.late.bytes,
        },
        "cache": cache_report(bos_folder, "exact", batch=2, capacity=128),
    }


def test_perplexity_reads_several_files_and_takes_the_first_tokens(
    run, bos_folder, text_file, tmp_path
):
    lines = tmp_path / "lines.jsonl.gz"
    lines.write_bytes(gzip.compress(b'{"text": "the end"}\n{"text": "the"}\n'))
    code, out, _ = run(
        "eval", "perplexity", "--model", bos_folder, "--text", lines, text_file,
        "--cache", "exact", "--context", "20", "--tokens", "30", "--json",
    )  # fmt: skip
    assert code == 0
    documents = ["the end", "the", text_file.read_bytes().decode()]
    expected = perplexity(load_quietly(bos_folder), documents, context=20, tokens=30)
    everything = perplexity(load_quietly(bos_folder), documents, context=20)
    printed = json.loads(out)
    assert printed["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert printed["tokens"] == expected.tokens < everything.tokens


def test_windows_that_end_early_have_no_late_tokens(run, bos_folder, text_file):
    options = ["--model", bos_folder, "--text", text_file, "--cache", "exact", "--context", "99"]
    _, out, _ = run("eval", "perplexity", *options, "--json")
    assert json.loads(out)["late"] is None
    _, out, _ = run("eval", "perplexity", *options)
    assert "late" not in out


def test_perplexity_prints_lines_for_people(run, bos_folder, text_file):
    code, out, err = run(
        "eval", "perplexity", "--model", bos_folder, "--text", text_file, "--cache", "exact",
        "--context", "20",
    )  # fmt: skip
    assert code == 0
    assert re.search(r"^nats per token +\d+\.\d+$", out, re.M)
    assert re.search(r"^bits per byte +\d+\.\d+$", out, re.M)
    assert re.search(r"^  late +\d+\.\d+$", out, re.M)
    assert re.search(rf"^bytes +{text_file.stat().st_size}$", out, re.M)
    assert err.startswith("cache exact: ")


def test_a_text_that_is_not_utf8_is_one_line(run, bos_folder, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert_error(
        run(
            "eval", "perplexity", "--model", bos_folder, "--text", tmp_path / "latin.txt",
            "--context", "8",
        ),
        "latin.txt is not UTF-8",
    )  # fmt: skip


# cache-size


def test_cache_size_lists_every_preset_and_needs_only_the_config(run, toy_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((toy_folder / "config.json").read_bytes())
    code, out, err = run(
        "cache-size", "--model", tmp_path, "--context", "1000", "--batch", "3", "--json"
    )
    assert (code, err) == (0, "")
    config = LlamaConfig.from_hf(toy_folder)
    rows = json.loads(out)
    assert [row["preset"] for row in rows] == list(PRESETS)
    bf16 = 1024 * 3 * config.num_layers * config.num_kv_heads * 4 * config.head_dim
    for row in rows:
        spec = CacheSpec.preset(row["preset"])
        nbytes = spec.nbytes(config, batch=3, max_length=1000)
        assert row == {
            "preset": spec.name,
            "bytes_per_token_head": spec.bytes_per_token(config.head_dim),
            "nbytes": nbytes,
            "ratio": pytest.approx(bf16 / nbytes),
        }
    assert rows[0] == {
        "preset": "exact", "bytes_per_token_head": 128, "nbytes": bf16, "ratio": 1.0
    }  # fmt: skip


def test_the_table_of_sizes_is_aligned(run, toy_folder):
    _, out, _ = run("cache-size", "--model", toy_folder, "--context", "1000", "--batch", "3")
    title, *table = out.splitlines()
    assert title == "3 sequences of 1000 tokens, 2 layers, 2 KV heads of 32 channels"
    assert [line.split()[0] for line in table] == ["preset", *PRESETS]
    assert len({*map(len, table)}) == 1
    assert re.fullmatch(r"exact +128 +1\.57 MB +1\.00", table[1])


def test_presets_that_do_not_take_the_models_head_dimension_say_why(run, toy_folder, tmp_path):
    config = json.loads((toy_folder / "config.json").read_bytes())
    narrow = json.dumps({**config, "head_dim": 16})
    (tmp_path / "config.json").write_text(narrow, encoding="utf-8")
    possible = [name for name in PRESETS if not name.startswith("kivi")]
    why = "values with a scale for 32 channels need a head dimension that is a multiple of 32"
    _, out, _ = run("cache-size", "--model", tmp_path, "--context", "100", "--json")
    rows = {row["preset"]: row for row in json.loads(out)}
    assert list(rows) == list(PRESETS)
    assert [name for name, row in rows.items() if "nbytes" in row] == possible
    assert why in rows["kivi-2"]["problem"]
    _, out, _ = run("cache-size", "--model", tmp_path, "--context", "100")
    table, others = out.splitlines()[1 : len(possible) + 2], out.splitlines()[len(possible) + 2 :]
    assert [line.split()[0] for line in table] == ["preset", *possible]
    assert [line.split(":")[1] for line in others] == [" kivi-2", " kivi-4"]
    assert all(why in line for line in others)


def test_sizes_have_units_that_people_read():
    sizes = [0, 999, 1000, 123_456, 7_890_000, 4_295_000_000, 5_000_000_000_000_000]
    assert [human_bytes(size) for size in sizes] == [
        "0 B", "999 B", "1.00 kB", "123.46 kB", "7.89 MB", "4.29 GB", "5000.00 TB"
    ]  # fmt: skip


# convert


def test_convert_writes_a_model_of_the_wanted_dtype(run, toy_folder, tmp_path):
    out_folder = tmp_path / "out"
    code, out, err = run(
        "convert", "--model", toy_folder, "--out", out_folder, "--dtype", "bfloat16"
    )
    count = sum(array.size for array in load_quietly(toy_folder).decoder.parameters().values())
    assert (code, err) == (0, "")
    assert out == f"{out_folder}: llama, {count} parameters in bfloat16\n"
    assert LlamaConfig.from_hf(out_folder).dtype == "bfloat16"
    assert load_quietly(out_folder).tokenizer.chat_templates
    assert_error(run("convert", "--model", toy_folder, "--out", out_folder), "not empty")


def test_convert_keeps_the_dtype_by_default(run, toy_folder, tmp_path):
    assert run("convert", "--model", toy_folder, "--out", tmp_path / "out")[0] == 0
    ours, theirs = load_quietly(tmp_path / "out"), load_quietly(toy_folder)
    assert ours.decoder.dtype == theirs.decoder.dtype
    assert ours.generate("the", max_new_tokens=12).tokens == (
        theirs.generate("the", max_new_tokens=12).tokens
    )


# Mistakes


def command(name, folder):
    return {
        "generate": ["generate", "--model", folder, "--prompt", "the end"],
        "cache-size": ["cache-size", "--model", folder, "--context", "100"],
        "perplexity": ["eval", "perplexity", "--model", folder, "--text", "t", "--context", "9"],
    }[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND; see h1bjax --help"),
        (["generat"], "invalid choice: 'generat'"),
        (["eval"], "required: MEASURE; see h1bjax eval --help"),
        (["generate"], "required: --prompt; see h1bjax generate --help"),
        (["generate", "--model", "m", "--prompt", "p", "--bogus"], "unrecognized .*--bogus"),
        (["generate", "--model", "m", "--pro", "p"], "--prompt"),
        (["generate", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "--max-new-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["generate", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["cache-size", "--context", "-5"], "'-5' is not a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments, message):
    assert_error(run(*arguments), message)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("generate", ["--stream", "--json"], "choose one"),
        ("generate", ["--stream", "--prompt", "x"], "--stream takes one prompt, not 2"),
        ("generate", ["--cache", "h2b"], "unknown cache preset 'h2b'; choose one of exact"),
        ("generate", ["--top-p", "2"], "top_p must be above 0"),
        ("generate", ["--cache", "exact", "--stop", ""], "stop strings must be non-empty"),
        ("perplexity", [], r"No such file: t$"),
    ],
)
def test_wrong_options_are_one_line(run, toy_folder, name, options, message):
    assert_error(run(*command(name, toy_folder), *options), message)


@pytest.mark.parametrize("name", ["generate", "cache-size"])
def test_a_model_that_is_not_there_is_one_line(run, tmp_path, name):
    assert_error(run(*command(name, tmp_path / "none")), "none")


def test_a_list_of_problems_is_one_line(run, toy_folder, tmp_path):
    for file in toy_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    arguments = command("generate", tmp_path)
    assert_error(run(*arguments, "--cache", "exact"), r"missing: \S+ \[.*missing: ")


def test_a_context_beyond_the_sliding_window_is_refused(run, toy_folder, tmp_path):
    config = json.loads((toy_folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    assert_error(run(*command("cache-size", tmp_path)), "--context 100 exceeds .* window of 64")


def test_ctrl_c_is_tidy(run, toy_folder, monkeypatch):
    def interrupted(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.generate, "_run", interrupted)
    assert run(*command("generate", toy_folder)) == (130, "", "h1bjax: interrupted\n")


# Processes


def process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "perplexity", "--help"], ["--version"]])
def test_help_does_not_wait_for_jax(arguments):
    program = (
        "import sys, h1bjax.cli\n"
        "try: h1bjax.cli.main(sys.argv[1:])\n"
        "finally: print([name for name in ('jax', 'numpy', 'flax') if name in sys.modules])"
    )
    with process("-c", program, *arguments) as running:
        out, err = running.communicate()
    assert running.returncode == 0
    assert err == ""
    assert out.splitlines()[-1] == "[]"
    assert out.startswith(("usage: h1bjax", "h1bjax "))


def test_a_reader_that_goes_away_is_no_error(toy_folder):
    with process("-m", "h1bjax.cli", *command("cache-size", toy_folder)) as running:
        running.stdout.close()
        err = running.stderr.read()
    assert (running.returncode, err) == (141, "")


def test_a_platform_for_which_nothing_is_installed_is_one_line(toy_folder):
    if any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        pytest.skip("jax can run on NVIDIA GPUs here")
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    with process("-m", "h1bjax.cli", *command("generate", toy_folder), env=environment) as running:
        out, err = running.communicate()
    assert (running.returncode, out) == (2, "")
    assert err.endswith("h1bjax: error: nothing is installed for JAX_PLATFORMS=cuda\n")
