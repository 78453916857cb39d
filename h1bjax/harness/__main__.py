"""The command line of lm-evaluation-harness, with the model "h1bjax"."""

import sys

try:
    import h1bjax.harness.model  # noqa: F401  (registers the model)
except ModuleNotFoundError as missing:
    sys.stderr.write(f"h1bjax: error: {missing}\n")
    sys.exit(2)

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
