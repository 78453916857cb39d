#!/usr/bin/env bash
# Makes the small model that ships inside the package, from text to the finished folder WORK/model:
#
#     recipes/embedded.sh BOOKS VALID WORK
#
# BOOKS and VALID are .txt or .jsonl files in Markdown, also compressed: text to train on, and held-out
# text. Run it in the repository's root; it needs h1bjax[train]. Whatever WORK holds already is not made
# again and interrupted training goes on, so the same command continues a run that was cut off.
#
# The defaults suit one H100. What may be set in the environment:
#   CONFIG         the model, configs/embedded.json
#   CONTEXT        of the plain model's training, where the model's own is too dear to train with from
#                  the start, as on a CPU. Then LONG_STEPS follow with the model's own.
#   MEGABYTES      of text in which remembering pays; beside 90 MB of books 30 are three tenths of all
#                  tokens. The model of docs/quality.md learnt to copy from them, this one is too small.
#   STEPS, BATCH   of training the plain model. 65,536 tokens a step keep a large GPU busy; with more,
#                  a model this small would need nearly as many steps as with these.
#   LONG_BATCH     sequences in a step with the model's own context, after a shorter one and with the
#                  cache; as BATCH
#   RATE           peak learning rate. 1.5e-3 served the model of docs/quality.md at twice the width and
#                  half the batch; narrow models and large batches bear more.
#   CACHE, TRAINED the cache that the model then learns to read, and what changes for it (everything or
#                  lora)
#   CACHE_STEPS, CACHE_RATE
#                  of that. The rate goes on where the cosine of the plain model's ended, at a tenth;
#                  that of LONG_STEPS too.
#   SOURCE         where the books come from, for the model card
#   EVALUATED      held-out tokens of the evaluation
#   EXTRA          more options for all trainings, such as --dtype float32
#   PYTHON         the interpreter, python
set -euo pipefail

if (($# != 3)) || [[ ! -f recipes/embedded_card.py ]]; then
    echo "usage, in the repository's root: recipes/embedded.sh BOOKS VALID WORK" >&2
    exit 2
fi
work=$3
config=${CONFIG:-configs/embedded.json}
cache=${CACHE:-h1b}
long_batch=${LONG_BATCH:-${BATCH:-32}}
context=() base=$work/plain
if [[ -n ${CONTEXT:-} ]]; then context=(--context "$CONTEXT") base=$work/long; fi
read -ra extra <<<"${EXTRA:-}"
python=${PYTHON:-python}
vocabulary=$("$python" -c 'import json, sys
print(json.load(open(sys.argv[1]))["vocab_size"])' "$config")
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$work"

# Runs a command, and writes it down for the model card.
run() {
    echo "recipe: [${SECONDS} s] $*" >&2
    echo "$*" >>"$work/commands.txt"
    "$@"
}
python() { command "$python" "$@"; }
h1bjax() { python -m h1bjax.cli "$@"; }

# make_text NAME COMMAND: runs a command that writes a text, and names that only when it is whole.
make_text() {
    if [[ ! -f $work/$1 ]]; then
        rm -f "$work/partial.jsonl.xz"
        run "${@:2}" --out "$work/partial.jsonl.xz"
        run mv "$work/partial.jsonl.xz" "$work/$1"
    fi
}

books=$work/plain.jsonl.xz retrieval=$work/retrieval.jsonl.xz
make_text plain.jsonl.xz python recipes/plain_books.py --books "$1"
make_text held_out.jsonl.xz python recipes/plain_books.py --books "$2"
make_text retrieval.jsonl.xz python benchmarks/retrieval_text.py --text "$books" \
    --megabytes "${MEGABYTES:-30}"

if [[ ! -f $work/tokenizer/tokenizer.json ]]; then
    run python -m train.tokenizer --text "$books" --vocab-size "$vocabulary" --out "$work/tokenizer"
fi

if [[ ! -d $work/plain/model ]]; then
    run h1bjax finetune --init "$config" --tokenizer "$work/tokenizer" \
        --text "$books" "$retrieval" --out "$work/plain" \
        --steps "${STEPS:-5000}" --batch "${BATCH:-32}" --learning-rate "${RATE:-3e-3}" \
        --no-remat --checkpoint-every 1000 "${context[@]}" "${extra[@]}"
fi

if [[ ! -d $base/model ]]; then
    run h1bjax finetune --model "$work/plain/model" --text "$books" "$retrieval" --out "$base" \
        --steps "${LONG_STEPS:-200}" --batch "$long_batch" --learning-rate "${CACHE_RATE:-3e-4}" \
        --no-remat --checkpoint-every 1000 "${extra[@]}"
fi

if [[ ! -f $work/calibrated/calibration/$cache.json ]]; then
    run h1bjax calibrate --model "$base/model" --text "$books" "$retrieval" \
        --cache "$cache" --out "$work/calibrated"
fi

if [[ ! -d $work/taught/model ]]; then
    run h1bjax finetune --model "$work/calibrated" --cache "$cache" --train "${TRAINED:-everything}" \
        --text "$books" "$retrieval" --out "$work/taught" \
        --steps "${CACHE_STEPS:-400}" --batch "$long_batch" --learning-rate "${CACHE_RATE:-3e-4}" \
        --no-remat --checkpoint-every 1000 "${extra[@]}"
fi

rm -rf "$work/model"
python recipes/embedded_card.py --work "$work" --cache "$cache" \
    --source "${SOURCE:-public-domain books, github.com/mlschmitt/classic-books-markdown at 944882722e9a}" \
    --tokens "${EVALUATED:-262144}"
