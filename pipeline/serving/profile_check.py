"""vLLM's word on a serve config: its arguments, and whether the GPU that was stated holds its KV cache."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.checkpoint.result import PROFILE
from pipeline.errors import UsageError
from pipeline.plan.plan import Plan
from pipeline.serving import profile
from pipeline.serving.cache_need import cache_need
from pipeline.vllm_env.environment import VllmEnvironment
from pipeline.vllm_env.worker import VllmWorker

EARLY = 1 << 30  # bytes of a source from which on a start of vLLM, for the profile alone, is little beside the work


def hold_against(worker: VllmWorker, text: str, checkpoint: Path, weights: int) -> dict[str, Any]:
    """A profile against a vLLM: see vllm_env/jobs/arguments.py; a cache that does not fit is a ``problem``, too.

    Args:
        worker: of that vLLM.
        text: of the profile.
        checkpoint: a directory, of which config.json is read.
        weights: bytes of the result.
    """
    with tempfile.TemporaryDirectory(prefix="profile-") as place:
        path = Path(place) / Path(PROFILE).name
        path.write_text(text, encoding="utf-8")
        (answer,) = worker.run([{"kind": "arguments", "profile": str(path), "checkpoint": str(checkpoint.absolute())}])
    need = cache_need(answer, text, weights)
    if need is not None and answer["problem"] is None:
        answer["problem"] = need.problem
    return answer


@contextmanager
def profile_in_time(
    plan: Plan, environment: VllmEnvironment | None, refused: Callable[[UsageError], None]
) -> Iterator[None]:
    """Within, beside long work: vLLM's word on the profile, seconds after the start and not hours later.

    A run that is short learns it from the verification; so does one whose vLLM gives no answer.

    Args:
        plan: whose profile it is.
        environment: the vLLM; None where there is none.
        refused: called at most once, from another thread, with the error to end with.
    """
    if environment is None or plan.read_nbytes < EARLY:
        yield
        return
    text = profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes, plan.source_dtypes)
    running, one = ExitStack(), threading.Lock()

    def end() -> None:
        """End vLLM's process, which gives its memory back; not twice, whoever comes first."""
        with one:
            running.close()

    def ask(worker: VllmWorker) -> None:
        try:
            answer = hold_against(worker, text, plan.checkpoint.root, plan.output_nbytes)
        finally:
            end()
        if not answer.get("error") and (problem := answer.get("problem")):
            refused(
                UsageError(
                    f"serve: {environment.name} refuses the profile: {problem}",
                    remedy="fix it and run the same command to go on",
                )
            )

    with ThreadPoolExecutor(1, thread_name_prefix="profile") as beside:
        try:
            # begun here: Linux ends vLLM's process with the thread that started it
            worker = running.enter_context(VllmWorker(environment)).begin()
            beside.submit(ask, worker)
            yield
        finally:
            end()
