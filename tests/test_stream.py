"""The parts of the streams by themselves: layers are read and run without a plan; totals; asking for a stop."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.calibration.batches import make_batches
from pipeline.checkpoint.source import SourceError, Tensor, open_checkpoint
from pipeline.machine.signals import stop_on_signals
from pipeline.model.selection import select
from pipeline.model.skeleton import Skeleton
from pipeline.recipe.recipe import load
from pipeline.report.console import Console
from pipeline.run import runner
from pipeline.stream.forward import Forward, count_expert_tokens, deterministic
from pipeline.stream.hidden import ActivationCache
from pipeline.stream.layer_reader import LayerReader
from pipeline.stream.totals import Totals
from tests import families
from tests.conftest import damaged, make_plain_checkpoint

SEQUENCES = [[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8, 9, 3], [4] * 70]


@dataclass(frozen=True)
class Layer:
    """What a caller without a plan knows of a decoder layer."""

    tensors: tuple[Tensor, ...]
    nbytes: int


def layers_of(source: Path) -> tuple[Any, Any, list[Layer]]:
    checkpoint = open_checkpoint(source)
    selection = select(checkpoint)
    layers = []
    for index in range(selection.layers):
        names = [name for name, choice in selection.choices.items() if choice.layer == index]
        tensors = tuple(checkpoint.tensors[name] for name in names)
        layers.append(Layer(tensors, sum(tensor.nbytes for tensor in tensors)))
    return checkpoint, selection, layers


@pytest.mark.parametrize(("name", "placement"), [("qwen2_5_vl", "host"), ("qwen3_moe", "file")])
def test_layers_run_without_a_plan(
    name: str, placement: Any, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Reader and forward, put together by a caller of its own, give what the whole model gives, by the bit."""
    import torch
    import transformers

    source, device = small_model(name), torch.device("cpu")
    checkpoint, selection, layers = layers_of(source)
    batches = make_batches(SEQUENCES, 512).batches
    width = checkpoint.config.get("text_config", checkpoint.config)["hidden_size"]
    shapes = [(batch.rows, batch.length) for batch in batches]
    tokens = sum(batch.tokens for batch in batches)
    with (
        deterministic(2),
        ActivationCache(shapes, width, device, placement, tmp_path / "now.bin") as cache,
        LayerReader(checkpoint, layers, device) as reader,
    ):
        assert not list(tmp_path.iterdir()), "the file has no name while it is used"
        forward = Forward(Skeleton.build(checkpoint, selection, device), batches, device, cache)
        forward.embed(checkpoint)
        for index, raw in enumerate(reader):
            layer = forward.load(index, raw.tensors)
            counted = count_expert_tokens(layer)
            before = cache.take(len(batches) - 1).clone()
            probed = forward.probe(layer)
            assert torch.equal(cache.take(len(batches) - 1), before), "a probe leaves the cache as it is"
            counted_by_probe = counted()
            counted = count_expert_tokens(layer)
            passed = forward.run(layer)
            assert torch.equal(cache.take(len(batches) - 1), probed)
            assert sorted(count for count, _ in passed.timed) == sorted(batch.tokens for batch in batches)
            for block, experts in counted().items():
                chosen = checkpoint.config["num_experts_per_tok"]
                assert sum(experts) == tokens * chosen
                assert sum(counted_by_probe[block]) == batches[-1].tokens * chosen
            forward.drop(layer)
            reader.give_back(raw)
        states = [cache.take(number).clone() for number in range(len(batches))]
        assert forward.count == len(batches) * len(layers)
    assert reader.bytes_read == sum(layer.nbytes for layer in layers)
    assert reader.reads == dict.fromkeys((t.name for layer in layers for t in layer.tensors), 1)

    whole = getattr(transformers, families.FAMILIES[name]["class"]).from_pretrained(source, dtype=torch.bfloat16).eval()
    last = next(m for n, m in whole.named_modules() if n.endswith(f"layers.{len(layers) - 1}") and "vis" not in n)
    caught: list[Any] = []
    last.register_forward_hook(lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with deterministic(2), torch.no_grad():
        for batch, state in zip(batches, states, strict=True):
            whole(input_ids=torch.tensor(batch.ids, dtype=torch.long).view(batch.rows, batch.length), use_cache=False)
            assert torch.equal(caught.pop(), state)


def test_a_reader_that_is_left_early_ends(small_model: Callable[[str], Path]) -> None:
    """Its thread waits for memory that nobody gives back any more."""
    import torch

    checkpoint, _, layers = layers_of(small_model("llama"))
    with LayerReader(checkpoint, [*layers, *layers], torch.device("cpu")) as reader:
        first, second = itertools.islice(reader, 2)
        assert first.tensors.keys() == {tensor.name for tensor in layers[0].tensors}
        assert second.tensors.keys() == {tensor.name for tensor in layers[1].tensors}
        assert first.span[0] <= first.span[1] <= second.span[0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]


def test_a_reader_refuses_what_is_not_sound(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensor: str, data: bytearray) -> None:
        if tensor == name:
            data[-2:] = b"\x80\xff"  # -Inf

    checkpoint, _, layers = layers_of(damaged(small_model("llama"), tmp_path / "source", poison))
    with (
        LayerReader(checkpoint, layers, torch.device("cpu")) as reader,
        pytest.raises(SourceError, match=f"{name}: NaN or Inf; the checkpoint is damaged"),
    ):
        for raw in reader:
            reader.give_back(raw)
    path = checkpoint.shards[0].path
    assert path is not None
    os.utime(path, ns=(1, 1))
    with (
        LayerReader(checkpoint, layers, torch.device("cpu")) as reader,
        pytest.raises(SourceError, match="the file changed since the plan was made"),
    ):
        next(iter(reader))


def test_totals_add_up(tmp_path: Path, write_recipe: Any) -> None:
    one = Totals(bytes_read=1, units=2, seconds=0.5, peak_rss_bytes=9, notes=["a"])
    two = Totals(bytes_read=2, units=1, peak_rss_bytes=4, layers=3, forwards=6, notes=["b"])
    two.reads["w"] += 1
    both = one + two
    assert (both.bytes_read, both.units, both.seconds, both.peak_rss_bytes) == (3, 3, 0.5, 9)
    assert (both.layers, both.forwards, both.reads, both.notes) == (3, 6, {"w": 1}, ["a", "b"])
    source = make_plain_checkpoint(tmp_path / "source")
    outcome = runner.run(load(write_recipe(source), ()), Console())
    lines = (tmp_path / "out" / "quantize" / "events.jsonl").read_text().splitlines()
    (event,) = [event for event in map(json.loads, lines) if event["event"] == "streamed"]
    del event["time"], event["event"]
    assert event == {  # others read these
        "bytes_read": outcome.totals.bytes_read, "bytes_written": outcome.totals.bytes_written,
        "units": outcome.totals.units, "seconds": outcome.totals.seconds,
        "peak_rss_bytes": outcome.totals.peak_rss_bytes,
    }  # fmt: skip
    assert 0 < event["bytes_written"] < event["bytes_read"] and event["units"] == 1


def test_a_request_to_stop_is_not_a_signal() -> None:
    """After it the first signal still waits for the end of a unit; a second one forces it. Who came first counts."""
    with stop_on_signals() as stop, stop.deferred():
        threading.Thread(target=stop.request, args=(ValueError("refused"),)).start()
        assert stop.requested.wait(10) and str(stop.error) == "refused"
        stop.request(ValueError("again"))
        os.kill(os.getpid(), signal.SIGTERM)
        assert str(stop.error) == "refused" and not stop.forced
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.forced
    with stop_on_signals() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.request(ValueError("too late"))
        assert stop.requested.is_set() and stop.error is None
