"""`python -m calib_data FILE...` builds a set of captions that recipes name: captions.jsonl and manifest.json.

The same inputs give the same bytes: no date, no path, and the order of files and captions does not matter.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline.calibration import captions as reader
from pipeline.errors import PipelineError, UsageError, from_os_error


def _number_or_all(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """``--per-image``: None is no limit. Left out, it is a recipe's own default where captions are sampled."""
    if value is None:
        return 1 if context.params.get("samples") else None
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a number from 1 nor the word all")
    return int(value)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--samples", type=click.IntRange(min=1), is_eager=True, help="How many captions; left out: all.")
@click.option(
    "--per-image",
    metavar="N|all",
    callback=_number_or_all,
    help="At most so many captions of one image; left out: 1 with --samples, otherwise all.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the ranks of captions.")
@click.option("--licence", help="Of the captions; known for COCO.")
@click.option("--attribution", help="Whom to name; known for COCO.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The set's directory; left out: what coco2017 stands for."
)
@click.option("--force", is_flag=True, help="Replace the files of a set that is there.")
def main(
    files: tuple[str, ...],
    samples: int | None,
    per_image: int | None,
    seed: int,
    licence: str | None,
    attribution: str | None,
    output: Path | None,
    force: bool,
) -> None:
    """Build a set of captions from COCO annotation FILEs, or from anything else that calibration.captions takes."""
    output = output or reader.COCO2017
    try:
        _check_output(output, force)
        source = reader.read_sources(list(files))
        chosen = reader.choose(
            source.captions, seed, samples, per_image, ", ".join(files), ("--samples", "--per-image")
        )
        lines = [json.dumps({"image_id": c.image, "caption": c.text}, ensure_ascii=False) for c in chosen.captions]
        text = "".join(line + "\n" for line in lines).encode()
        manifest: dict[str, Any] = {
            "licence": licence or "; ".join(terms.licence for terms in source.terms) or None,
            "attribution": attribution or "; ".join(terms.attribution for terms in source.terms) or None,
            "sources": [{"name": name, "sha256": digest} for name, digest in source.files],
            "captions": {"name": reader.SET_CAPTIONS, "sha256": hashlib.sha256(text).hexdigest(), "count": len(lines)},
            "seed": seed,
            "samples": samples,
            "per_image": per_image,
            "read": chosen.read,
            "dropped": {
                "empty": chosen.empty,
                "duplicates": chosen.duplicates,
                "over_per_image": chosen.over_per_image,
                "not_sampled": chosen.read - chosen.empty - chosen.duplicates - chosen.over_per_image - len(lines),
            },
            "sampling": reader.SAMPLING,
            "normalization": reader.NORMALIZATION,
        }
        _write(output / reader.SET_CAPTIONS, text)
        _write(output / reader.SET_MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        _fail(from_os_error(error, f"building {output}"))
    except PipelineError as error:
        _fail(error)
    click.echo(f"{output}: {len(lines):,} of {chosen.read:,} captions, seed {seed}, licence {manifest['licence']}")
    if None in (manifest["licence"], manifest["attribution"]):
        click.echo("note: the sources do not say whose they are; --licence and --attribution record it", err=True)


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: this is a file; -o names a directory")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UsageError(
            f"{output}: the directory is not empty", remedy="--force replaces a set in it, or name another with -o"
        )


def _write(path: Path, data: bytes) -> None:
    """A whole file or none, so that a set is never half of two: its manifest would not fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_bytes(data)
    part.replace(path)


def _fail(error: PipelineError) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_status)


if __name__ == "__main__":
    main(prog_name="python -m calib_data")
