"""
Time to durable and stall beside what a user would pick instead: DCP's save and async_save (thread, process), and DLRover.

Called from: run.py. Pillion and DCP take turns in one process. DLRover 0.6.1 needs packages of its own, so it runs in a
virtual environment under the user's cache, made at the first run; where that fails it is skipped, with the reason. It runs
in a process of its own, right after the others: its ratio is of the medians of the two.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import measures
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

DLROVER_REQUIREMENTS = ("dlrover==0.6.1", "grpcio", "protobuf", "psutil", "deprecated", "ray")
DLROVER_TIMEOUT_S = 180.0
GOAL = 5.0


def measure(of: measures.Settings) -> list[measures.Line]:
    state_dict = measures.state(of.num_bytes, 64)
    times: dict[str, list[tuple[float, float]]] = {"pillion": [], "DCP save": [], "thread": [], "process": []}
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    # DCP's background process finds its rendezvous in the environment, as torchrun would set it.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with measures.scratch(of) as root, measures.checkpointer(root / "run", keep_last=1000) as checkpointer:
            measures.prepare(checkpointer, state_dict)
            for step in range(1, of.repeat + 2):
                handle = checkpointer.save(state_dict, step)
                waited = measures.seconds(lambda made=handle: made.result(measures.SAVE_TIMEOUT_S))  # type: ignore[misc]
                times["pillion"].append((handle.stall_s, handle.stall_s + waited))
                # Removing a GiB takes 0.2 s on some file systems: everybody writes to a fresh place, and it is not timed.
                shutil.rmtree(handle.result(0).path)
                for name in ("DCP save", "thread", "process"):
                    times[name].append(_dcp_s(name, state_dict, root / "dcp"))
                    shutil.rmtree(root / "dcp")
    finally:
        dist.destroy_process_group()
    peers = {"DCP save": "DCP save", "thread": "DCP async_save thread", "process": "DCP async_save process"}
    ours = [total for _, total in times["pillion"][1:]]
    lines = [
        measures.median_line("Pillion, stall", [stall for stall, _ in times["pillion"][1:]], unit="s"),
        measures.median_line("Pillion, until durable", ours, unit="s"),
    ]
    for name, text in peers.items():
        stalls, totals = zip(*times[name][1:], strict=True)
        lines.append(measures.median_line(f"{text}, stall", stalls, unit="s"))
        lines.append(measures.median_line(f"{text}, until durable", totals, unit="s"))
        ratios = [theirs / mine for theirs, mine in zip(totals, ours, strict=True)]
        goal = GOAL if name == "process" else None
        lines.append(measures.median_line(f"{text} / Pillion, until durable", ratios, goal=goal, sense=">="))
    return lines + _dlrover(of, statistics.median(ours))


def _dcp_s(name: str, state_dict: dict[str, Any], path: Path) -> tuple[float, float]:
    """Stall and time until durable of one save of stock DCP, with its files synced (its default)."""
    writer = dcp.FileSystemWriter(path, sync_files=True)
    if name == "DCP save":
        took_s = measures.seconds(lambda: dcp.save(state_dict, storage_writer=writer))
        return took_s, took_s
    kind = AsyncCheckpointerType.THREAD if name == "thread" else AsyncCheckpointerType.PROCESS
    made: list[Any] = []
    stall_s = measures.seconds(
        lambda: made.append(dcp.async_save(state_dict, storage_writer=writer, async_checkpointer_type=kind))
    )
    return stall_s, stall_s + measures.seconds(lambda: made[0].result(measures.SAVE_TIMEOUT_S))


def _dlrover(of: measures.Settings, ours_s: float) -> list[measures.Line]:
    problem = ""
    pairs: list[list[float]] = []
    # Its trainer gives up now and then while its saver starts ("Timed out waiting for socket server"): one more chance.
    for _ in range(2):
        try:
            pairs = _dlrover_saves(of)
            break
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as err:
            problem = f"{type(err).__name__}: {err}"
    if not pairs:
        return [measures.Line(what="DLRover flash checkpoint: skipped", measured=0.0, note=problem)]
    stalls, told, durable = (tuple(map(float, column)) for column in zip(*pairs[1:], strict=True))
    ratios = [each / ours_s for each in durable]
    return [
        measures.median_line("DLRover 0.6.1, stall", stalls, unit="s"),
        measures.median_line("DLRover 0.6.1, until its tracker names the step", told, unit="s", note="not synced"),
        measures.median_line("DLRover 0.6.1, until durable", durable, unit="s", note="with an fsync that we make"),
        measures.median_line("DLRover 0.6.1 / Pillion, until durable", ratios, goal=GOAL, sense=">="),
    ]


def _dlrover_saves(of: measures.Settings) -> list[list[float]]:
    """
    What dlrover_saves.py prints.

    Raises:
        OSError, SubprocessError, ValueError, IndexError: it cannot be installed, or failed.
    """
    python = _dlrover_python()
    # torch comes from this environment: both sides run the same one.
    environ = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    with (
        measures.scratch(of) as root,
        # To files: its saver process inherits a pipe, and would keep the reader of it waiting.
        open(root / "output", "w+", encoding="utf-8") as output,
        open(root / "errors", "w+", encoding="utf-8") as errors,
    ):
        script = str(Path(__file__).with_name("dlrover_saves.py"))
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", script]
        command += [str(root), str(of.num_bytes), str(of.repeat + 1)]
        done = subprocess.run(
            command, env=environ, stdout=output, stderr=errors, timeout=DLROVER_TIMEOUT_S, check=False
        )
        output.seek(0)
        errors.seek(0)
        if done.returncode != 0:
            raise OSError(next((line.strip() for line in errors if "Error: " in line), f"status {done.returncode}"))
        found: list[list[float]] = json.loads(output.read().strip().splitlines()[-1])
        return found


def _dlrover_python() -> str:
    """The interpreter of DLRover's environment, which is made when it is not there."""
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pillion-bench" / "dlrover"
    python = base / "bin" / "python"
    stamp = base / ".ready"
    if not stamp.exists():
        venv.create(base, with_pip=True, clear=True)
        # Its own requirements pin much that a checkpoint does not need: only what it imports.
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *DLROVER_REQUIREMENTS]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DLROVER_TIMEOUT_S)
        stamp.touch()
    return str(python)
