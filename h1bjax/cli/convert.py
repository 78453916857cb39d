"""`h1bjax convert`: writes a checkpoint as a folder of safetensors."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from h1bjax.cli.options import add_dtype, add_model


def add_parser(commands: Any) -> None:
    """Adds the command to those of the program."""
    parser = commands.add_parser(
        "convert",
        help="write a model as a folder of safetensors",
        description="Writes a model as a folder of safetensors that transformers loads too, in "
        "another dtype if wanted. Calibrations are not copied, because they hold for the weights "
        "as they were.",
    )
    parser.set_defaults(run=_run)
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    add_dtype(parser, of="the weights that are written")


def _run(options: argparse.Namespace) -> None:
    from h1bjax.calibration_file import calibrated_names
    from h1bjax.checkpoint import (
        check_destination,
        load_parameters,
        resolve_model,
        save_pretrained,
    )
    from h1bjax.config import LlamaConfig

    out = Path(options.out)
    check_destination(out)
    source = resolve_model(options.model)
    config = LlamaConfig.from_hf(source)
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    parameters = load_parameters(source, config, dtype)
    save_pretrained(out, config, parameters, source=source)
    if names := calibrated_names(source):
        warnings.warn(
            f"calibrations are not copied, because they hold for the weights as they were: "
            f"{', '.join(names)}; make new ones with h1bjax calibrate",
            stacklevel=1,
        )
    count = sum(array.size for array in parameters.values())
    print(f"{out}: {config.model_type}, {count} parameters in {dtype}")
