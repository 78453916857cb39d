"""h1bjax as a model of lm-evaluation-harness, and its tasks on files of one's own.

lm-evaluation-harness knows its models by a registry and searches no installed package for more, so
that whoever wants the model "h1bjax" there must first import `h1bjax.harness.model`.
`python -m h1bjax.harness` does so and is otherwise the command line `lm_eval`:

    python -m h1bjax.harness --model h1bjax --model_args path=MODEL,cache=h1b --tasks hellaswag

`h1bjax eval` runs the usual tasks with fewer words, and from local files. All of it needs the
extra `eval`; `scoring` and `programs` alone do not.
"""
