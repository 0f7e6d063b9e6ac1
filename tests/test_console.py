"""What is shown: tables that fit, the end of a run, and readers that leave."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import rich.console
from click.testing import CliRunner

from pipeline.batch.watch import live_table
from pipeline.cli import main
from pipeline.report.console import Console
from pipeline.report.tables import Column, fitted
from pipeline.units import error_text
from tests.conftest import QUANTIZE, make_plain_checkpoint

LAYERS = [
    {
        "layer": f"model.language_model.layers.{number}", "read_s": 1.234, "load_s": 0.1, "forward_s": 2.5,
        "quantize_s": 0.7, "write_s": 0.3, "bytes_read": 436_000_000, "bytes_written": 218_000_000,
        "rss_bytes": 3_100_000_000, "tokens_per_s": 4096, "device_bytes": 9_100_000_000,
    }
    for number in (10, 11)
]  # fmt: skip


def printed(table: Any, width: int) -> str:
    out = io.StringIO()
    rich.console.Console(file=out, width=width).print(table)
    return out.getvalue()


def on_terminal(width: int, colours: bool = False) -> tuple[Console, io.StringIO]:
    console, out = Console(), io.StringIO()
    system: Any = "standard" if colours else None
    console.rich = rich.console.Console(file=out, width=width, force_terminal=True, color_system=system)
    return console, out


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40])
def test_a_table_of_layers_keeps_its_names_and_cuts_no_figure(width: int) -> None:
    console, out = on_terminal(width)
    console.show_layers(LAYERS, 2)
    text = out.getvalue()
    assert "model.language_model.layers.10" in text and "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    headings = [cell.strip() for cell in text.splitlines()[2].split("┃")]
    for heading, value in (("read s", "1.234"), ("read", "436 MB"), ("RSS", "3.1 GB"), ("GPU", "9.1 GB")):
        assert heading not in headings or value in text


@pytest.mark.parametrize("width", [120, 80, 60, 44])
def test_the_live_table_of_a_batch_keeps_the_jobs(width: int) -> None:
    row = {
        "name": "qwen3_vl_8b-fp8-kv_fp8", "stage": "layers", "at": "model.language_model.layers.10", "share": 0.5,
        "rate": 2e8, "left": 300.0, "device_bytes": 8e9, "seconds": 100.0, "rss": 2e9,
    }  # fmt: skip
    text = printed(live_table([row], {"running": 1}, width), width)
    assert "qwen3_vl_8b-fp8-kv_fp8" in text and "50%" in text and "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_the_least_important_column_goes_first() -> None:
    columns = [Column("key", str, right=False), *(Column(f"c{rank}", lambda _: "123456", rank) for rank in (2, 3, 1))]
    assert [column.header for column in fitted(["a"], columns, 80).columns] == ["key", "c2", "c3", "c1"]
    assert [column.header for column in fitted(["a"], columns, 28).columns] == ["key", "c2", "c1"]
    assert [column.header for column in fitted(["[b]"], columns, 10).columns] == ["key"]
    assert "[b]" in printed(fitted(["[b]"], columns, 10), 10), "no markup"


def test_a_terminal_breaks_between_words_and_leaves_commands_whole() -> None:
    console, out = on_terminal(40)
    console.say("word " * 30)
    assert all(line.strip(" ").endswith("word") for line in out.getvalue().splitlines())
    out.truncate(0)
    console.say("vllm serve " + "x" * 60, whole=True)
    assert "vllm serve " + "x" * 60 in out.getvalue().replace("\x00", "")


def test_a_verdict_is_in_colour_where_colours_are_on(capsys: pytest.CaptureFixture[str]) -> None:
    console, out = on_terminal(80, colours=True)
    console.say_verdict("verification: ", "passed", True, " (structure)")
    assert "\x1b[1;32mpassed\x1b[0m (structure)" in out.getvalue()
    Console().say_verdict("verification: ", "FAILED", False)
    assert capsys.readouterr().out == "verification: FAILED\n"


def test_how_far_an_estimate_was_off_is_said_in_words() -> None:
    assert error_text(100.0, 112.0) == "12% longer than estimated"
    assert error_text(100.0, 75.0) == "25% shorter than estimated"
    assert error_text(100.0, 100.2) == "as estimated" == error_text(0.0, 3.0)


def test_the_end_of_a_run(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    """Verdict, place, sizes, time, the command; timings of layers are asked for."""
    recipe, out = write_recipe(make_plain_checkpoint(tmp_path / "source")), tmp_path / "out"
    lines = quantize(recipe).stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[-5:]] == ["verification", "published", "size", "time", "serve it"]
    assert lines[-4] == f"published: {out}" and " became " in lines[-3] and "% of the source" in lines[-3]
    assert lines[-1].endswith(f"vllm serve {out} --config {out}/quantize/serve.yaml")
    assert not any("slowest" in line for line in lines)
    assert "slowest" in quantize(recipe, "--fresh", "--verbose").stdout
    assert f"vllm serve {out} --config " in quantize(recipe).stdout, "also where it is done already"


def test_a_reader_that_leaves_does_not_end_a_conversion(tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    process = subprocess.Popen([*QUANTIZE, recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # before its first line
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and not errors, errors
    assert (tmp_path / "out" / "config.json").exists()


def test_an_empty_directory_is_a_place_for_a_result(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    (tmp_path / "out").mkdir()
    assert quantize(recipe).returncode == 0 and (tmp_path / "out/config.json").exists()
    (tmp_path / "two").mkdir()
    (tmp_path / "two/mine.txt").write_text("mine")
    done = quantize(recipe, f"output={tmp_path / 'two'}")
    assert done.returncode == 2 and "no result of this program" in done.stderr
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["mine.txt"]


def test_a_trace_on_standard_output(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    assert quantize(write_recipe(make_plain_checkpoint(tmp_path / "source"))).returncode == 0
    done = quantize("trace", tmp_path / "out", "-o", "-")
    assert json.loads(done.stdout)["traceEvents"]


@pytest.mark.parametrize("command", ["plan", "verify", "doctor"])
def test_json_has_a_format_and_errors_are_json_too(command: str, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    what = tmp_path / "source" if command == "verify" else recipe
    level = ["--level", "structure"] if command == "verify" else []
    told = json.loads(CliRunner().invoke(main, [command, str(what), *level, "--json"]).stdout)
    assert told["format"] == 1 and "error" not in told
    if command == "verify":
        return
    done = CliRunner().invoke(main, [command, str(recipe), "--json", "backend=none"])
    error = json.loads(done.stdout)
    assert error["format"] == 1 and error["error"]["exit_status"] == done.exit_code == 2
    assert error["error"]["message"] and error["error"]["kind"] == "recipe"


def test_the_report_of_a_batch_as_json(tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    words = [*QUANTIZE, "batch", recipe, "--directory", tmp_path / "b", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["format"] == 1 and told["counts"]["published"] == 1, done.stderr
    again = subprocess.run([*QUANTIZE, "batch", "--status", tmp_path / "b", "--json"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert json.loads(again.stdout)["jobs"][0]["output"] == str(tmp_path / "out")


def test_every_key_of_json_is_documented(tmp_path: Path, write_recipe: Any) -> None:
    page = (Path(__file__).parent.parent / "docs" / "json.md").read_text()
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    commands = (["plan", str(recipe)], ["verify", str(tmp_path / "source"), "--level", "structure"], ["doctor"])
    for command in commands:
        told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
        assert [key for key in told if f"`{key}`" not in page and f'"{key}"' not in page] == [], command
