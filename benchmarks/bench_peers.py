"""
Time to durable and stall beside what a user would pick instead: DCP's save and async_save (thread, process), torch_checkpointing, and DLRover.

Called from: run.py. Pillion and DCP take turns in one process. The two others need packages of their own, so each runs in a
virtual environment under the user's cache, made at the first run; where that fails it is skipped, with the reason. They run
in a process of their own, right after the others: their ratios are of the medians of the two.
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

DLROVER = "DLRover 0.6.1"
DLROVER_REQUIREMENTS = ("dlrover==0.6.1", "grpcio", "protobuf", "psutil", "deprecated", "ray")
TORCH_CHECKPOINTING = "torch_checkpointing 0.1.1"
TORCH_CHECKPOINTING_REQUIREMENTS = ("torch_checkpointing==0.1.1", "safetensors")
PEER_TIMEOUT_S = 180.0
"""Timeout for the install of a peer, and for its saves."""
LEAST = 1.0
"""Goal of each ratio of a peer's time to ours. Both write at the rate of one disk, so that a higher one would not be honest."""


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
                shutil.rmtree(root / "run" / f"step-{step}")
                for name in ("DCP save", "thread", "process"):
                    times[name].append(_dcp_s(name, state_dict, root / "dcp"))
                    shutil.rmtree(root / "dcp")
    finally:
        dist.destroy_process_group()
    peers = {"DCP save": "DCP save", "thread": "DCP async_save thread", "process": "DCP async_save process"}
    stalls, ours = ([pair[column] for pair in times["pillion"][1:]] for column in (0, 1))
    lines = [
        measures.median_line("Pillion, stall", stalls, unit="s"),
        measures.median_line("Pillion, until durable", ours, unit="s"),
    ]
    for name, text in peers.items():
        their_stalls, totals = zip(*times[name][1:], strict=True)
        lines.append(measures.median_line(f"{text}, stall", their_stalls, unit="s"))
        lines.append(measures.median_line(f"{text}, until durable", totals, unit="s"))
        for what, theirs, mine in (("stall", their_stalls, stalls), ("until durable", totals, ours)):
            ratios = [each / own for each, own in zip(theirs, mine, strict=True)]
            lines.append(measures.median_line(f"{text} / Pillion, {what}", ratios, goal=LEAST, sense=">="))
    medians = (statistics.median(stalls), statistics.median(ours))
    return lines + _torch_checkpointing(of, *medians) + _dlrover(of, *medians)


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


def _torch_checkpointing(of: measures.Settings, stall_s: float, ours_s: float) -> list[measures.Line]:
    try:
        python = _python("torch_checkpointing", TORCH_CHECKPOINTING_REQUIREMENTS)
        rows = _peer_saves(of, [python], "torch_checkpointing_saves.py")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as err:
        return [_skipped(TORCH_CHECKPOINTING, f"{type(err).__name__}: {err}")]
    return _peer_lines(TORCH_CHECKPOINTING, "until its future", rows, stall_s, ours_s)


def _dlrover(of: measures.Settings, stall_s: float, ours_s: float) -> list[measures.Line]:
    problem = ""
    # Its trainer gives up now and then while its saver starts ("Timed out waiting for socket server"): one more chance.
    for _ in range(2):
        try:
            launch = [_python("dlrover", DLROVER_REQUIREMENTS), "-m", "torch.distributed.run", "--standalone"]
            rows = _peer_saves(of, [*launch, "--nproc-per-node=1"], "dlrover_saves.py")
            return _peer_lines(DLROVER, "until its tracker names the step", rows, stall_s, ours_s)
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as err:
            problem = f"{type(err).__name__}: {err}"
    return [_skipped(DLROVER, problem)]


def _skipped(peer: str, problem: str) -> measures.Line:
    return measures.Line(what=f"{peer}: skipped", measured=0.0, note=problem)


def _peer_lines(peer: str, said: str, rows: list[list[float]], stall_s: float, ours_s: float) -> list[measures.Line]:
    """Lines of a peer's saves: stall, until it says that it is done, until durable. The first save is not in them."""
    stalls, done, durable = (tuple(map(float, column)) for column in zip(*rows[1:], strict=True))
    lines = [
        measures.median_line(f"{peer}, stall", stalls, unit="s"),
        measures.median_line(f"{peer}, {said}", done, unit="s", note="not synced"),
        measures.median_line(f"{peer}, until durable", durable, unit="s", note="with an fsync that we make"),
    ]
    for what, theirs, own in (("stall", stalls, stall_s), ("until durable", durable, ours_s)):
        ratios = [each / own for each in theirs]
        lines.append(measures.median_line(f"{peer} / Pillion, {what}", ratios, goal=LEAST, sense=">="))
    return lines


def _peer_saves(of: measures.Settings, launch: list[str], script: str) -> list[list[float]]:
    """
    What a script of this folder prints that saves with a peer.

    Raises:
        OSError, SubprocessError, ValueError, IndexError: it failed.
    """
    # torch comes from this environment: both sides run the same one.
    environ = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    with (
        measures.scratch(of) as root,
        # To files: a saver process inherits a pipe, and would keep the reader of it waiting.
        open(root / "output", "w+", encoding="utf-8") as output,
        open(root / "errors", "w+", encoding="utf-8") as errors,
    ):
        path = str(Path(__file__).with_name(script))
        command = [*launch, path, str(root / "saves"), str(of.num_bytes), str(of.repeat + 1)]
        (root / "saves").mkdir()
        done = subprocess.run(command, env=environ, stdout=output, stderr=errors, timeout=PEER_TIMEOUT_S, check=False)
        output.seek(0)
        errors.seek(0)
        if done.returncode != 0:
            raise OSError(next((line.strip() for line in errors if "Error: " in line), f"status {done.returncode}"))
        found: list[list[float]] = json.loads(output.read().strip().splitlines()[-1])
        return found


def _python(peer: str, requirements: tuple[str, ...]) -> str:
    """
    The interpreter of a peer's environment, which is made when it is not there.

    Raises:
        OSError, SubprocessError: it cannot be installed.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pillion-bench" / peer
    python = base / "bin" / "python"
    stamp = base / ".ready"
    if not stamp.exists():
        venv.create(base, with_pip=True, clear=True)
        # Their own requirements pin much that a checkpoint does not need: only what they import.
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *requirements]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PEER_TIMEOUT_S)
        stamp.touch()
    return str(python)
