"""
The commands of `pillion`, their arguments and their help. Pure: builds the parser, from which docs/reference/cli.md and the shell completions are made.

Called from: `cli.main`, `tools/cli_reference.py`.
"""

from __future__ import annotations

import argparse
from typing import Final, TypeAlias

EPILOG: Final = """exit status:
  0    all is well
  1    something wrong was found: damage, a difference, or nothing of that name
  2    wrong usage
  69   a storage, a sidecar or a cluster does not answer, or refuses
  70   an error of pillion itself
  130  interrupted by Ctrl-C

ROOT is a directory or a URL (s3://bucket/run-1, gs://, az://) with folders such as step-200. Credentials of a bucket come from the environment."""
ROOT_HELP: Final = (
    "directory or URL of the checkpoints; it may end with a step, as in runs/a/step-200, or be one checkpoint"
)
STEP_HELP: Final = "number of the step; without it the newest, which a load takes"
_RAW: Final = argparse.RawDescriptionHelpFormatter

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def build(program: str = "pillion") -> argparse.ArgumentParser:
    """Return the parser. `command` of a result is the name of the command."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Look at checkpoints, check, copy, export, pin and remove them.",
        epilog=EPILOG,
        formatter_class=_RAW,
    )
    parser.add_argument("--version", action="store_true", help="print the release, and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _ls(commands)
    _show(commands)
    _verify(commands)
    _diff(commands)
    _export(commands)
    _cp(commands)
    _pin(commands)
    _unpin(commands)
    _prune(commands)
    _report(commands)
    _save(commands, in_cluster=program.startswith("kubectl"))
    _doctor(commands, in_cluster=program.startswith("kubectl"))
    _completion(commands)
    return parser


def _command(
    commands: Commands, name: str, summary: str, description: str, outputs: tuple[str, ...] = ("table", "json")
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=_RAW
    )
    if outputs:
        parser.add_argument(
            "-o", "--output", choices=outputs, default=outputs[0], help=f"form of the output; default: {outputs[0]}"
        )
    return parser


def _storage(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of a bucket, as in a policy's storage.objectStore")
    group.add_argument(
        "--endpoint", metavar="URL", help="address of the store; default: the cloud's own, or AWS_ENDPOINT_URL"
    )
    group.add_argument("--region", help="region of an S3 bucket")
    group.add_argument(
        "--requester-pays", action="store_true", default=None, help="charge requests to the account that sends them"
    )
    group.add_argument("--parallelism", type=int, metavar="N", help="requests in flight, 1 to 64")
    group.add_argument(
        "--policy", metavar="FILE", help="policy with these options; flags take precedence; environment: PILLION_POLICY"
    )
    group.add_argument(
        "--ca-file", metavar="FILE", help="certificates (PEM) that are trusted too; environment: PILLION_STORAGE_CA"
    )


def _other_storage(parser: argparse.ArgumentParser, of: str) -> None:
    group = parser.add_argument_group(f"the same for {of}, where they differ")
    group.add_argument("--to-endpoint", metavar="URL", help=f"address of the store of {of}")
    group.add_argument("--to-region", metavar="REGION", help=f"region of the bucket of {of}")
    group.add_argument("--to-policy", metavar="FILE", help=f"policy with the options of {of}")


def _filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--include", metavar="GLOB", action="append", default=[], help="only items whose name matches; repeatable"
    )
    parser.add_argument(
        "--exclude", metavar="GLOB", action="append", default=[], help="no items whose name matches; repeatable"
    )


def _quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="show no progress; without a terminal there is none anyway"
    )


def _ls(commands: Commands) -> None:
    parser = _command(
        commands,
        "ls",
        "list the steps of a root",
        "List the steps of a root, with their state: committed; stock (written by another program); damaged; torn (without a commit: running or\n"
        "interrupted); complete (without a commit, and the next load commits it). 'newest' is the step that a load takes, 'verified' the one that a\n"
        "load has verified last, 'left behind' one that training has gone back behind. RANKS of a torn step says how many of them have written.",
        ("table", "wide", "json", "name"),
    )
    parser.add_argument("root", metavar="ROOT", nargs="?", help=f"{ROOT_HELP}; environment: PILLION_ROOT")
    _storage(parser)


def _show(commands: Commands) -> None:
    parser = _command(
        commands,
        "show",
        "show what a checkpoint consists of",
        "Show a checkpoint: who wrote it and when, and its items with type, shape and files. An opaque leaf is no tensor, and is stored pickled.",
    )
    parser.add_argument("root", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("step", metavar="STEP", nargs="?", help=STEP_HELP)
    parser.add_argument(
        "--include", metavar="GLOB", action="append", default=[], help="only items whose name matches; repeatable"
    )
    parser.add_argument("--files", action="store_true", help="list the files too")
    _storage(parser)


def _verify(commands: Commands) -> None:
    parser = _command(
        commands,
        "verify",
        "read a checkpoint, and compare every byte with its digest",
        "Read all bytes of a checkpoint, and compare each item with its digest. Exit status 1: something is damaged. Nothing is changed.\n"
        "A checkpoint of another program has no digests: 'readable' says that every byte that its metadata names can be read.",
    )
    parser.add_argument("root", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("step", metavar="STEP", nargs="?", help=STEP_HELP)
    parser.add_argument("--all", action="store_true", help="verify every committed step")
    _quiet(parser)
    _storage(parser)


def _diff(commands: Commands) -> None:
    parser = _command(
        commands,
        "diff",
        "show what differs between two checkpoints",
        "Compare two checkpoints: items that one of them lacks, other shapes and types, other values. Values are compared by digests. They are read\n"
        "only where the checkpoints are cut differently, as after a change of the world size. Exit status 1: something differs.",
    )
    parser.add_argument("a", metavar="A", help=f"first checkpoint: {ROOT_HELP}; without a step the newest")
    parser.add_argument(
        "b", metavar="B", help="second checkpoint in the same form; or only a number: that step of the first one's root"
    )
    _filters(parser)
    _quiet(parser)
    _storage(parser)
    _other_storage(parser, "B")


def _export(commands: Commands) -> None:
    parser = _command(
        commands,
        "export",
        "write tensors as safetensors, or as a .pt file",
        "Write the tensors of a checkpoint, whatever the number of ranks that saved it. OUT is a directory: model.safetensors, or shards with the index\n"
        "of Hugging Face's tools; or a file that ends with .safetensors or .pt (.pth, .bin). Only .pt needs torch. Its content is a flat dictionary.\n"
        "Every value is verified while it is read. Leaves that are no tensors are left out and named.",
        (),
    )
    parser.add_argument("root", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("step", metavar="STEP", help="number of the step, or latest")
    parser.add_argument("out", metavar="OUT", help="directory, or name of a file")
    _filters(parser)
    parser.add_argument(
        "--strip", metavar="TEXT", default="", help="taken from the beginning of names that have it, such as model."
    )
    parser.add_argument("--prefix", metavar="TEXT", default="", help="put in front of every name, after --strip")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="size at which a file of a directory ends; default: 5GB"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    _quiet(parser)
    _storage(parser)


def _cp(commands: Commands) -> None:
    parser = _command(
        commands,
        "cp",
        "copy a step to another root",
        "Copy a step between any two places, verified, and visible only when it is whole. A second cp goes on where an interrupted one ended. In its new\n"
        "root the copy is older than all that is saved there, and retention counts it: --pin keeps it.",
        (),
    )
    parser.add_argument("src", metavar="SRC", help=ROOT_HELP)
    parser.add_argument("dst", metavar="DST", help="root of the copy, a directory or a URL; it need not exist")
    parser.add_argument("--step", metavar="STEP", help=STEP_HELP)
    parser.add_argument("--pin", action="store_true", help="pin the copy, so that no retention removes it")
    _quiet(parser)
    _storage(parser)
    _other_storage(parser, "DST")


def _pin(commands: Commands) -> None:
    parser = _command(
        commands,
        "pin",
        "keep a step from retention",
        "Pin a step: no sidecar's retention removes it, and no prune, until it is unpinned.",
        (),
    )
    parser.add_argument("root", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("step", metavar="STEP", nargs="?", help=STEP_HELP)
    parser.add_argument("--reason", metavar="TEXT", default="", help="why, for people")
    _storage(parser)


def _unpin(commands: Commands) -> None:
    parser = _command(
        commands,
        "unpin",
        "let retention have a step again",
        "Remove the pin that `pillion pin` has set. A pin of the cluster stays.",
        (),
    )
    parser.add_argument("root", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("step", metavar="STEP", nargs="?", help="number of the step")
    _storage(parser)


def _prune(commands: Commands) -> None:
    parser = _command(
        commands,
        "prune",
        "remove steps that a rule does not keep",
        "Say which steps would go; with --yes, remove them, by the rules of a policy's retention. The newest, pinned and last verified step stay, and so\n"
        "do those of other programs. Exit status 1: with --yes, a step that should go is still there.",
    )
    parser.add_argument("root", metavar="ROOT", help=ROOT_HELP)
    parser.add_argument("--keep-last", metavar="N", type=int, help="number of newest checkpoints that stay")
    parser.add_argument(
        "--keep-every", metavar="STEPS", type=int, help="besides, every step that is a multiple of this stays"
    )
    parser.add_argument(
        "--max-age", metavar="AGE", help="remove what is older than the newest by more than this, such as 30d or 36h"
    )
    parser.add_argument(
        "--max-bytes", metavar="SIZE", help="remove the oldest while all together have more bytes, such as 2Ti"
    )
    parser.add_argument(
        "--torn", action="store_true", help="remove saves without a commit too, if no training uses the root"
    )
    parser.add_argument("--yes", action="store_true", help="remove them; without it nothing is changed")
    _storage(parser)


def _report(commands: Commands) -> None:
    parser = _command(
        commands,
        "report",
        "write a page about a run",
        "Write one HTML page about a run from what it left under its root: goodput, attempts, restarts and what each lost, stalls, persist rate, lag, and recovery\n"
        "points. The page loads nothing from elsewhere. It says which parts are not known. A run may train meanwhile; nothing in its root is changed.",
        (),
    )
    parser.add_argument(
        "root", metavar="RUN", nargs="?", help="root of the run: a directory or a URL; environment: PILLION_ROOT"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="pillion-report.html",
        help="file to write, replaced if it exists: a page (.html), or the numbers (.json); - is standard output; default: pillion-report.html",
    )
    _storage(parser)


def _cluster(parser: argparse.ArgumentParser, in_cluster: bool) -> None:
    parser.add_argument(
        "--cluster",
        action=argparse.BooleanOptionalAction,
        default=in_cluster,
        help="the argument is NAMESPACE/JOB of a cluster, which kubectl reaches; default: as kubectl pillion, and not as pillion",
    )


def _save(commands: Commands, *, in_cluster: bool) -> None:
    parser = _command(
        commands,
        "save",
        "ask a running job to save now",
        "Ask the running job to save at one of its next steps, and wait until the checkpoint is committed. Exit status 1: it was not. Here the request goes\n"
        "to the sidecar; in a cluster it is the annotation pillion.dev/save-now, and events tell the outcome. The script must call due(step).",
        (),
    )
    parser.add_argument(
        "job", metavar="ROOT", nargs="?", help="root of the job; may be left out if one job runs here; or NAMESPACE/JOB"
    )
    parser.add_argument(
        "--runtime-dir", metavar="DIR", default="", help="directory of the sidecar; environment: PILLION_RUNTIME_DIR"
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=600.0, help="timeout for the outcome; default: 600"
    )
    _cluster(parser, in_cluster)


def _doctor(commands: Commands, *, in_cluster: bool) -> None:
    parser = _command(
        commands,
        "doctor",
        "say what works here, and what does not",
        "Look at this machine: versions, shared memory, sidecars and their last saves; and with a ROOT at its storage: whether it can be written, its rate,\n"
        "who uses it, and what a restart would load. In a cluster: pods, policy, checkpoints and warnings of a job. Exit status 1: a problem was found.\n"
        "It writes a file of 32 MiB below .pillion in the root, and removes it again.",
    )
    parser.add_argument(
        "root",
        metavar="ROOT",
        nargs="?",
        help="directory or URL of the checkpoints; environment: PILLION_ROOT; or NAMESPACE/JOB",
    )
    parser.add_argument(
        "--runtime-dir", metavar="DIR", default="", help="directory of the sidecar; environment: PILLION_RUNTIME_DIR"
    )
    _cluster(parser, in_cluster)
    _storage(parser)


def _completion(commands: Commands) -> None:
    parser = _command(
        commands,
        "completion",
        "print the completion of a shell",
        "Print a script that completes commands and arguments: source <(pillion completion bash). It starts no Python at the Tab key.",
        (),
    )
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")
