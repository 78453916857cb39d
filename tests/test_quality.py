"""The quality study: its numbers are those of the library, and nothing it found is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from calibrations import random_calibration
from matplotlib.text import Text
from toy import load_quietly

from h1bjax import cli
from h1bjax.cache import CacheSpec
from h1bjax.decoder import Decoder, fold_value_rotation
from h1bjax.evaluate import perplexity
from h1bjax.model import Model
from h1bjax.retrieval import copy_score, key_value_score
from train.job import run as run_job
from train.options import Job

pytestmark = pytest.mark.once


CONTEXT = 128
BOOKS = ["".join(f"the {number} ended. " for number in range(begin, begin + 40))
         for begin in (100, 300)]  # fmt: skip
WIKITEXT = "Once upon a time there was the end. " * 20
SEEDS = [3, 4]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def quality(benchmarks, monkeypatch):
    """The study with random numbers in the place of the fit."""
    import quality

    def calibrate(decoder, windows, specs, *, seed):
        assert windows == ("windows", seed)
        return [random_calibration(spec, seed) for spec in specs]

    def calibration_windows(tokenizer, documents, *, context, tokens, seed):
        assert (documents, context, tokens) == (["calibrate with this"], CONTEXT, 256)
        return ("windows", seed)

    monkeypatch.setattr(quality, "calibrate", calibrate)
    monkeypatch.setattr(quality, "calibration_windows", calibration_windows)
    return quality


@pytest.fixture
def arguments(toy_folder, tmp_path):
    def arguments(*caches):
        (tmp_path / "calibration.txt").write_text("calibrate with this")
        lines = [json.dumps({"text": text}) for text in BOOKS]
        (tmp_path / "books.jsonl").write_text("\n".join(lines))
        (tmp_path / "wikitext.txt").write_text(WIKITEXT)
        options = {
            "model": toy_folder,
            "calibration-text": tmp_path / "calibration.txt",
            "books": tmp_path / "books.jsonl",
            "wikitext": tmp_path / "wikitext.txt",
            "out": tmp_path / "new" / "results.json",
            "context": CONTEXT,
            "calibration-tokens": 256,
            "books-tokens": 3 * CONTEXT,
            "wikitext-tokens": 2 * CONTEXT,
            "retrieval-windows": 3,
            "batch": 2,
        }
        named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*named, "--cache", *caches, "--seeds", *map(str, SEEDS)]

    return arguments


def bits_per_byte(loss):
    return pytest.approx(loss.bits_per_byte, rel=1e-5)


def expected_scores(model):
    shape = {"context": CONTEXT, "batch": 2}
    books = perplexity(model, BOOKS, tokens=3 * CONTEXT, **shape)
    wikitext = perplexity(model, WIKITEXT, tokens=2 * CONTEXT, **shape)
    copies = copy_score(model, BOOKS, windows=3, seed=0, **shape)
    answers = key_value_score(model, windows=3, seed=0, **shape)
    assert books.late is not None
    assert wikitext.late is not None
    return {
        **{
            name: {
                "bits_per_byte": bits_per_byte(result),
                "nats_per_token": pytest.approx(result.nats_per_token, rel=1e-5),
                "tokens": result.tokens,
                "bytes": result.bytes,
                "late_bits_per_byte": bits_per_byte(late),
                "late_tokens": late.tokens,
                "late_bytes": late.bytes,
            }
            for name, result, late in [
                ("books", books, books.late),
                ("wikitext", wikitext, wikitext.late),
            ]
        },
        "copy": {
            "bits_per_byte": bits_per_byte(copies),
            "first_bits_per_byte": bits_per_byte(copies.first),
            "tokens": copies.repeated.tokens,
            "bytes": copies.repeated.bytes,
        },
        "key_value": {
            "bits_per_byte": bits_per_byte(answers),
            "accuracy": answers.accuracy,
            "tokens": answers.answers.tokens,
            "bytes": answers.answers.bytes,
        },
    }


def calibrated(folder, spec, seed):
    """The model with a random calibration."""
    exact = load_quietly(folder)
    calibration = random_calibration(spec, seed)
    parameters = exact.decoder.parameters()
    if calibration.rotation is not None:
        parameters = fold_value_rotation(exact.config, parameters, calibration.rotation)
    return Model(Decoder(exact.config, parameters, spec, calibration.codec), exact.tokenizer)


# The study


def test_its_numbers_are_those_of_the_library(quality, arguments, toy_folder, capsys, tmp_path):
    quality.main(arguments("h1b-signs-v2"))
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    exact, v2 = results["presets"]
    assert (exact["name"], v2["name"]) == ("exact", "h1b-signs-v2")
    spec = CacheSpec.preset("h1b-signs-v2")
    models = [load_quietly(toy_folder), load_quietly(toy_folder, "h1b-signs-v2")]
    models += [calibrated(toy_folder, spec, seed) for seed in SEEDS]
    runs = [*exact["runs"], *v2["runs"]]
    assert [run["calibration_seed"] for run in runs] == [None, None, *SEEDS]
    for run, model in zip(runs, models, strict=True):
        assert run["scores"] == expected_scores(model)
    config = load_quietly(toy_folder).config
    assert v2["bytes_per_token_head"] == spec.bytes_per_token(config.head_dim)
    assert v2["everything_per_token_head"] * 2 * 2 * CONTEXT == spec.nbytes(
        config, batch=1, max_length=CONTEXT
    )
    assert results["settings"]["seeds"] == SEEDS
    assert results["settings"]["books"] == [str(tmp_path / "books.jsonl")]
    assert {"device", "versions", "calibration_seconds", "model"} <= set(results)
    from quality_results import markdown

    assert capsys.readouterr().out == markdown(results) + "\n"


@pytest.mark.slow
def test_one_compiled_function_serves_all_texts_and_calibrations(quality, arguments, monkeypatch):
    traced, logits = [], Decoder.logits

    def spy(decoder, hidden):
        traced.append(decoder.spec.name)
        return logits(decoder, hidden)

    monkeypatch.setattr(Decoder, "logits", spy)
    # A batch that nothing else in this process has compiled.
    quality.main([*arguments("h1b-v2"), "--batch", "4"])
    assert sorted(traced) == ["exact", "h1b-v2"]


def test_a_killed_study_keeps_what_it_has(quality, arguments, tmp_path, monkeypatch):
    score = quality.Tasks.score

    def killed(tasks, decoder):
        if decoder.spec.name == "kivi-2":
            raise KeyboardInterrupt
        return score(tasks, decoder)

    monkeypatch.setattr(quality.Tasks, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments("exact", "kivi-2"))
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [preset["name"] for preset in results["presets"]] == ["exact"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--cache", "h2b"], ValueError, "unknown cache preset 'h2b'"),
        (["--books", "none.txt"], FileNotFoundError, "No such file: none.txt"),
        (["--context", "4096"], ValueError, "--context 4096 exceeds the 1024 tokens"),
        (["--books-tokens", "9"], ValueError, "none of which can be scored in whole windows"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    quality, arguments, tmp_path, options, error, message
):
    with pytest.raises(error, match=message):
        quality.main([*arguments("exact"), *options])
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(quality, arguments, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "results.json").write_text("precious")
    with pytest.raises(ValueError, match=r"results\.json exists"):
        quality.main(arguments("exact"))
    assert (tmp_path / "new" / "results.json").read_text() == "precious"


def test_missing_options_are_all_named(quality, capsys):
    with pytest.raises(SystemExit):
        quality.main(["--model", "m", "--out", "o"])
    assert "give --calibration-text, --books, --wikitext" in capsys.readouterr().err


# Table and picture


def made_up(name, everything, books, copy, keys="OrthogonalSigns", calibratable=True):
    """A preset whose losses are those given for each calibration seed; the first has none."""
    runs = []
    for seed, (text, far) in enumerate(zip(books, copy, strict=True), start=-1):
        scores = {
            "books": {"bits_per_byte": 2 * (1 + text), "late_bits_per_byte": 1 + text},
            "wikitext": {"bits_per_byte": 3 * (1 + text), "late_bits_per_byte": None},
            "copy": {"bits_per_byte": 0.5 * (1 + far)},
            "key_value": {"bits_per_byte": 1 + far, "accuracy": 0.5 / (1 + far)},
        }
        runs.append({"calibration_seed": None if seed < 0 else seed, "scores": scores})
    return {
        "name": name,
        "keys": keys,
        "calibratable": calibratable,
        "bytes_per_token_head": everything - 16,
        "everything_per_token_head": everything,
        "runs": runs,
    }


PRESETS: list[dict[str, Any]] = [
    made_up("exact", 512, [0.0], [0.0], keys="NoneType", calibratable=False),
    made_up("first", 100, [0.05, 0.01, 0.02, 0.03], [0.5, 0.1, 0.1, 0.1]),
    made_up("second", 100, [0.05, 0.021, 0.021, 0.021], [0.5, 0.1, 0.11, 0.12]),
    made_up("third", 101, [0.05, 0.022, 0.022, 0.022], [0.5, 0.1, 0.11, 0.12]),
    made_up("fitted", 80, [9.0, 0.04], [9.0, -0.01], keys="LinearCode"),
    made_up("kivi", 160, [0.0], [0.25], keys="ChannelQuantisedKeys", calibratable=False),
]
# One that cannot do without a calibration.
del PRESETS[4]["runs"][0]
RESULTS = {"settings": {"context": 2048}, "presets": PRESETS}


def test_the_table_gives_means_losses_and_their_range(benchmarks):
    from quality_results import markdown

    calibrated, uncalibrated = markdown(RESULTS).split("\n\nWithout a calibration:\n\n")
    header, _, *rows = [line.strip("| ").split(" | ") for line in calibrated.splitlines()[2:]]
    assert header == [
        "preset", "marginal bytes", "everything at 2048", "books", "books, late", "WikiText",
        "copy", "key-value", "key-value accuracy",
    ]  # fmt: skip
    assert [row[0] for row in rows] == [f"`{preset['name']}`" for preset in PRESETS]
    by_name = {row[0]: row for row in rows}
    assert by_name["`exact`"][3:] == ["2.0000", "1.0000", "3.0000", "0.5000", "1.0000", "50.0%"]
    assert by_name["`first`"][1:4] == ["84", "100.0", "+2.00% (+1.00 to +3.00)"]
    assert by_name["`fitted`"][6] == "-1.00%"
    assert by_name["`kivi`"][6:] == ["+25.00%", "1.2500", "40.0%"]
    # Those that calibration changes, and can do without.
    names = [line.split("`")[1] for line in uncalibrated.splitlines()[2:]]
    assert names == ["exact", "first", "second", "third"]
    assert "| `first` | 84 | 100.0 | +5.00% | +5.00% |" in uncalibrated


def test_an_earlier_study_can_be_printed(quality, tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    quality.main(["--table", str(tmp_path / "results.json")])
    from quality_results import markdown

    assert capsys.readouterr().out == markdown(RESULTS) + "\n"


def finetuned(name, books, tokens_per_second, **options):
    """A preset that a model was trained for."""
    preset = made_up(name, 100, [books], [10 * books], **options)
    training = {"tokens_per_second": tokens_per_second, "nbytes": 84e9}
    preset["runs"][0] |= {
        "training": training,
        "calibration_seed": 0 if preset["calibratable"] else None,
    }
    return preset


CONTROL = finetuned("exact", 0.0, 1000.0, keys="NoneType", calibratable=False)


def finetuned_study(*presets):
    return {
        "settings": {"context": 1024, "steps": 7, "cache": [preset["name"] for preset in presets]},
        "device": "a computer",
        "versions": {"jax": "1"},
        "presets": [CONTROL, *presets],
    }


def test_finetuned_presets_are_compared_with_the_exact_cache_trained_as_long(benchmarks):
    from quality_results import markdown

    study = finetuned_study(finetuned("first", 0.003, 800.0))
    _, table = markdown(RESULTS | {"finetuned": study}).split("\n\nFinetuned:\n\n")
    header, _, exact, first = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert header[2] == "everything at 1024"
    assert header[-3:] == ["training, tokens/s", "time of a step", "memory of a step"]
    assert exact[0] == "`exact`"
    assert exact[-3:] == ["1000", "1.00", "84.0 GB"]
    assert first[:4] == ["`first`", "84", "100.0", "+0.30%"]
    assert first[6] == "+3.00%"
    assert first[-3:] == ["800", "1.25", "84.0 GB"]
    assert "Finetuned" not in markdown(RESULTS)


@pytest.mark.slow
def test_finetuned_numbers_are_those_of_the_training_job(benchmarks, toy_folder, tmp_path):
    """With the model before training as the teacher, as the job has it."""
    import quality_finetuned

    text = tmp_path / "books.jsonl"
    text.write_text("\n".join(json.dumps({"text": text}) for text in BOOKS * 3))
    (tmp_path / "wikitext.txt").write_text(WIKITEXT)
    quality_finetuned.main(
        [
            *("--model", str(toy_folder), "--cache", "h1b", "--teacher", "before"),
            *("--text", str(text), "--calibration-text", str(text), "--books", str(text)),
            *("--wikitext", str(tmp_path / "wikitext.txt"), "--out", str(tmp_path / "out.json")),
            *("--context", str(CONTEXT), "--steps", "3", "--batch", "2", "--dtype", "float32"),
            *("--calibration-tokens", "512", "--books-tokens", "384", "--wikitext-tokens", "256"),
            *("--retrieval-windows", "3", "--score-batch", "2", "--compilers", "2"),
        ]
    )
    exact, h1b = json.loads((tmp_path / "out.json").read_text())["presets"]
    calibrated = tmp_path / "calibrated"
    options = ["--context", str(CONTEXT), "--tokens", "512", "--cache", "h1b"]
    options += ["--model", str(toy_folder), "--text", str(text), "--out", str(calibrated)]
    assert cli.main(["calibrate", *options]) == 0
    for preset, source, cache in [(exact, toy_folder, None), (h1b, calibrated, "h1b")]:
        job = Job(
            text=(text,),
            out=tmp_path / f"{preset['name']} job",
            steps=3,
            model=str(source),
            cache=cache,
            batch=2,
            context=CONTEXT,
            learning_rate=1.5e-4,
            dtype="float32",
        )
        outcome = run_job(job)
        model = load_quietly(outcome.model, preset["name"])
        books = perplexity(model, BOOKS * 3, tokens=384, context=CONTEXT, batch=2)
        (run,) = preset["runs"]
        found = run["scores"]["books"]["bits_per_byte"]
        assert found == pytest.approx(books.bits_per_byte, rel=1e-5)
        assert run["training"]["nats_per_token"] > 0
        untrained = load_quietly(source, preset["name"])
        before = perplexity(untrained, BOOKS * 3, tokens=384, context=CONTEXT, batch=2)
        assert books.bits_per_byte < before.bits_per_byte - 1e-3
    assert exact["runs"][0]["training"]["divergence"] is None
    assert h1b["runs"][0]["training"]["divergence"] > 0


def test_studies_of_other_finetuned_presets_are_put_together(benchmarks, tmp_path):
    import quality_finetuned

    paths = []
    for number, preset in enumerate(
        [finetuned("first", 0.1, 800.0), finetuned("second", 0.2, 700.0)]
    ):
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps(finetuned_study(preset)))
    whole = tmp_path / "results.json"
    whole.write_text(json.dumps(RESULTS))
    for path in paths:
        quality_finetuned.main(["--merge", str(whole), path])
    results = json.loads(whole.read_text())
    assert results["presets"] == RESULTS["presets"]
    merged = results["finetuned"]
    assert [preset["name"] for preset in merged["presets"]] == ["exact", "first", "second"]
    assert merged["settings"] == {"context": 1024, "steps": 7, "cache": ["first", "second"]}
    with pytest.raises(ValueError, match="results already for second"):
        quality_finetuned.main(["--merge", str(whole), paths[1]])
    other = finetuned_study(finetuned("third", 0.1, 800.0)) | {"device": "another"}
    Path(paths[0]).write_text(json.dumps(other))
    with pytest.raises(ValueError, match="differ in device"):
        quality_finetuned.main(["--merge", str(whole), paths[0]])
    assert json.loads(whole.read_text()) == results


def test_results_without_the_exact_cache_cannot_be_compared(benchmarks):
    from quality_results import rows

    with pytest.raises(ValueError, match="lack the exact cache"):
        rows({"presets": PRESETS[1:]}, calibrated=True)


@pytest.mark.slow
def test_the_picture_names_every_preset_without_overlaps(benchmarks, tmp_path):
    import quality_plot

    results = RESULTS | {"finetuned": finetuned_study(finetuned("first", 0.004, 800.0))}
    (tmp_path / "results.json").write_text(json.dumps(results))
    picture = tmp_path / "new" / "quality.png"
    quality_plot.main([str(tmp_path / "results.json"), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    figure = quality_plot.draw(results)
    figure.draw_without_rendering()
    for axes in figure.axes:
        # Without the lines, which belong to what matplotlib calls an annotation.
        names = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
        assert set(names) == {preset["name"] for preset in PRESETS[1:]}
        boxes = list(names.values())
        for index, box in enumerate(boxes):
            assert axes.get_window_extent().count_contains(box.get_points()) == 2
            assert box.count_overlaps(boxes[:index]) == 0
