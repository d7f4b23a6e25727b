"""Runs functions of test files on several ranks: ``python ranks.py FOLDER`` reads jobs from stdin, one JSON per line.

A job forks its ranks from this process, which has imported everything once; they meet through a file. Each rank leaves
what it returned, or its traceback, as a pickle under the job's folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  (imported once, before the forks)
import torch
import torch.distributed as dist
import torch.utils.tensorboard

import distill.tasks.distillation  # noqa: F401

PATIENCE = 300
"""Seconds after which a job whose ranks wait for each other is ended."""


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        children = [_start(rank, job) for rank in range(job["size"])]
        print(json.dumps(_wait(children)), flush=True)


def _start(rank: int, job: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(2, 1)  # answers alone go to stdout
    try:
        _run(rank, job)
    finally:
        os._exit(0)


def _run(rank: int, job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    try:
        store = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job["size"])
        spec = importlib.util.spec_from_file_location("job", job["file"])
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["job"] = module
        spec.loader.exec_module(module)
        result = True, getattr(module, job["function"])(*pickle.loads((folder / "arguments").read_bytes()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = False, traceback.format_exc()
    (folder / f"{rank}.tmp").write_bytes(pickle.dumps(result))
    os.replace(folder / f"{rank}.tmp", folder / f"{rank}.result")


def _wait(children: list[int]) -> str:
    """Wait for ranks; one that died or a deadlock ends all of them."""
    waiting, deadline = set(children), time.monotonic() + PATIENCE
    while waiting and time.monotonic() < deadline:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            waiting.discard(child)
            if os.WIFSIGNALED(status):
                break
        else:
            time.sleep(0.01)
    for child in waiting:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return "ended" if waiting else "done"


if __name__ == "__main__":
    main()
