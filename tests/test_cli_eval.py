"""`h1bjax eval`: benchmarks from local files, and retrieval."""

import gzip
import json
import re
import subprocess
import sys

import pytest

from h1bjax import cli

# The command line makes lines of warnings, so they must reach it; the harness's imports warn.
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("default")]


@pytest.fixture
def run(capfd):
    """Runs a command line; returns its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(["eval", *(str(argument) for argument in arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval")


def assert_error(result, message):
    code, out, err = result
    assert (code, out) == (2, "")
    assert re.search(rf"h1bjax: error: .*{message}", err), err


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scores(result):
    code, out, _ = result
    assert code == 0
    assert out.count("\n") == 1
    return json.loads(out)


# Benchmarks from local files

SHORT = [
    "--cache",
    "exact",
    "--max-length",
    "128",
    "--max-new-tokens",
    "4",
    "--batch",
    "2",
    "--json",
]


def test_gsm8k_is_read_from_a_file(run, harness, toy_folder, tmp_path):
    rows = [{"question": f"{index} + 1?", "answer": f"So\n#### {index + 1}"} for index in range(3)]
    data = write(tmp_path / "test.jsonl", rows)
    printed = scores(run("gsm8k", "--model", toy_folder, "--data", data, "--limit", "2", *SHORT))
    assert printed["n-samples"]["gsm8k_cot"] == {"original": 3, "effective": 2}
    # The solved examples of the harness's own definition.
    assert printed["n-shot"]["gsm8k_cot"] == 8
    assert printed["results"]["gsm8k_cot"]["exact_match,strict-match"] == 0
    assert printed["config"]["cache"] == "exact"


def test_wikitext_agrees_with_the_likelihoods_of_its_articles(run, harness, bos_folder, tmp_path):
    from lm_eval.api.instance import Instance
    from toy import load_quietly

    from h1bjax.harness.model import HarnessModel

    articles = [" = One = \n \n the end \n", " = Two = \n \n the tale of one \n"]
    data = tmp_path / "valid.txt"
    data.write_text("".join(articles), encoding="utf-8")
    printed = scores(run("wikitext", "--model", bos_folder, "--data", data, *SHORT[:2], "--json"))
    # The harness takes the spaces before the ends of lines away, and counts the original bytes.
    texts = [article.replace(" \n", "\n").replace("\n ", "\n") for article in articles]
    model = HarnessModel(load_quietly(bos_folder))
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    nats = -sum(model.loglikelihood_rolling(asked))
    size = sum(len(article.encode()) for article in articles)
    found = printed["results"]["wikitext"]["bits_per_byte,none"]
    assert found == pytest.approx(nats / size / 0.6931471805599453, rel=1e-4)


def test_mmlu_is_weighed_by_the_questions_of_each_subject(run, harness, toy_folder, tmp_path):
    def row(split, subject, answer):
        return {
            "split": split, "subject": subject, "question": "Which?",
            "choices": ["one", "two", "three", "four"], "answer": answer,
        }  # fmt: skip

    # The same question with every answer: exactly one of each four is found.
    rows = [row("test", "anatomy", answer) for answer in range(4)]
    rows += [row("test", "virology", answer) for answer in range(3)]
    rows += [row("dev", subject, 0) for subject in ("anatomy", "virology")]
    data = write(tmp_path / "mmlu.jsonl", rows)
    arguments = ["mmlu", "--model", toy_folder, "--data", data, "--cache", "exact", "--shots", "1"]
    printed = scores(run(*arguments, "--json", "--out", tmp_path / "all.json"))
    first = printed["results"]["mmlu_anatomy"]["acc,none"]
    second = printed["results"]["mmlu_virology"]["acc,none"]
    assert first == 0.25
    assert second in (0, pytest.approx(1 / 3))
    assert printed["groups"]["mmlu"]["acc,none"] == pytest.approx((4 * first + 3 * second) / 7)
    assert json.loads((tmp_path / "all.json").read_text())["results"] == printed["results"]
    _, out, err = run(*arguments)
    assert re.search(r"^mmlu_anatomy +acc +0\.2500 ± 0\.\d{4}$", out, re.MULTILINE)
    assert "cache exact: 128 bytes per token and KV head" in err


def test_longeval_has_a_score_for_each_number_of_lines(run, harness, toy_folder, tmp_path):
    for lines in (2, 1):
        row = {"prompt": "line a is <7>. ", "expected_number": 7, "num_lines": lines}
        write(tmp_path / f"{lines}.jsonl", [row])
    printed = scores(run("longeval-lines", "--model", toy_folder, "--data", tmp_path, *SHORT))
    assert list(printed["results"]) == ["longeval_lines_1", "longeval_lines_2"]


def test_humaneval_runs_code_when_allowed(run, harness, toy_folder, tmp_path, monkeypatch):
    row = {"task_id": "H/0", "prompt": "def f():\n", "entry_point": "f",
           "test": "def check(f):\n    assert f() == 1"}  # fmt: skip
    data = tmp_path / "HumanEval.jsonl.gz"
    data.write_bytes(gzip.compress(json.dumps(row).encode()))
    from h1bjax.harness import model

    answers = iter(["    return 1", "    return 2"])
    monkeypatch.setattr(model, "generate_texts", lambda *_, **__: [next(answers)])
    arguments = ["humaneval", "--model", toy_folder, "--data", data, "--run-generated-code", *SHORT]
    for expected in (1, 0):
        printed = scores(run(*arguments))
        assert printed["results"]["humaneval"]["pass@1,none"] == expected


def test_code_does_not_run_unless_allowed(run, toy_folder, tmp_path):
    arguments = ["humaneval", "--model", toy_folder, "--data", tmp_path]
    assert_error(run(*arguments), "programs that the model writes.*--run-generated-code")


def test_the_first_number_of_an_answer_counts(harness):
    from h1bjax.harness.tasks import judge_number

    row = {"expected_number": 42}
    for answer, right in [("is <42>. 7", 1), ("7, not 42", 0), ("", 0), ("042", 1)]:
        assert judge_number(row, [answer]) == {"acc": right}


# Mistakes


def test_the_extra_is_named_where_the_harness_is_not_installed(
    run, toy_folder, tmp_path, monkeypatch
):
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "h1bjax.harness"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    data = write(tmp_path / "test.jsonl", [])
    assert_error(
        run("gsm8k", "--model", toy_folder, "--data", data), r"pip install 'h1bjax\[eval\]'"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm8k", "--data", "nowhere"], "No such file or folder: nowhere"),
        (["longeval-lines"], "the following arguments are required: --data"),
        (["gsm8k", "--limit", "0"], "'0' is not a whole number of at least 1"),
        (["mmlu", "--shots", "-1"], "'-1' is not a whole number|expected one argument"),
        (["gsm8k", "--run-generated-code"], "unrecognized arguments: --run-generated-code"),
    ],
)
def test_bad_arguments_are_one_line(run, toy_folder, arguments, message):
    assert_error(run(*arguments, "--model", toy_folder), message)


def test_results_need_a_folder(run, harness, toy_folder, tmp_path):
    data = write(tmp_path / "test.jsonl", [{"question": "?", "answer": "#### 1"}])
    out = tmp_path / "no" / "out.json"
    assert_error(
        run("gsm8k", "--model", toy_folder, "--data", data, "--out", out), "No such folder: .*no"
    )


def test_the_harness_has_its_own_command_line(harness):
    command = [sys.executable, "-m", "h1bjax.harness", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "--model_args" in done.stdout


# Retrieval


def test_retrieval_prints_one_json_object_and_draws(run, toy_folder, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "heat.png"
    code, out, err = run(
        "retrieval", "--model", toy_folder, "--cache", "exact", "h1b-signs", "exact",
        "--context", "200", "300", "--depths", "2", "--windows", "1", "--batch", "2",
        "--out", picture, "--json",
    )  # fmt: skip
    assert code == 0, err
    printed = json.loads(out)
    assert (printed["contexts"], printed["depths"]) == ([200, 300], [0, 1])
    assert [each["preset"] for each in printed["presets"]] == ["exact", "h1b-signs"]
    exact, signs = printed["presets"]
    assert exact["bytes_per_token"] == 128 > signs["bytes_per_token"]
    for each in (exact, signs):
        assert [len(row) for row in each["passkey_found"]] == [2, 2]
        assert all(0 <= found <= 1 for row in each["passkey_found"] for found in row)
        assert len(each["key_value_accuracy"]) == 2
    assert exact["passkey_nats_per_digit"] != signs["passkey_nats_per_digit"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_retrieval_prints_a_table(run, toy_folder, tmp_path):
    filler = tmp_path / "filler.txt"
    filler.write_text("the tale.\n" * 9, encoding="utf-8")
    code, out, _ = run(
        "retrieval", "--model", toy_folder, "--cache", "exact", "--context", "200",
        "--depths", "2", "--windows", "1", "--batch", "2", "--filler", filler,
    )  # fmt: skip
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "exact (128 bytes per token and KV head)"
    assert [line.split()[0] for line in lines[1:]] == ["context", "passkey", "passkey", "key-value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "h2b"], "h2b"),
        (["--out", "heat.jpg"], "--out must end in .png, and is heat.jpg"),
        (["--out", "nowhere/heat.png"], "No such folder: nowhere"),
        (["--context", "20"], "context=20 is too short"),
        (["--depths", "1"], "2 depths"),
    ],
)
def test_bad_options_of_retrieval_are_one_line(run, toy_folder, options, message):
    start = ["retrieval", "--model", toy_folder, "--cache", "exact", "--context", "300"]
    assert_error(run(*start, *options), message)
