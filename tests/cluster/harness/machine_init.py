"""
The whole of: process 1 of a machine of the test cluster: it starts programs, stops them, and reaps what is orphaned.

Called from: `machine.Machine`, with ``python machine_init.py SOCKET FOLDER=TARGET ...`` in namespaces of its own (network, mounts,
process ids). When it ends, the kernel ends everything in the machine: containers, shims and mounts too.

    {"start": name, "command": [...], "log": path}     ->  {"pid": 7}      process id in the machine
    {"stop": name, "signal": 15, "within_s": 10}       ->  {"status": -15}
    {"list": true}                                     ->  {"kubelet": 7, ...}

Must never: import anything of ours; it runs by path.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

REQUEST_BYTES = 1 << 16
POLL_S = 0.1


def main() -> None:
    path, *binds = sys.argv[1:]
    # What is mounted in the machine is seen by all of its programs, and by nobody outside.
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    for bind in binds:
        folder, target = bind.split("=")
        os.makedirs(target, exist_ok=True)
        subprocess.run(["mount", "--bind", folder, target], check=True)
        subprocess.run(["mount", "--make-rshared", target], check=True)
    programs: dict[str, subprocess.Popen[bytes]] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen(8)
        while True:
            if select.select([server], [], [], POLL_S)[0]:
                connection, _ = server.accept()
                with connection:
                    request = json.loads(connection.recv(REQUEST_BYTES))
                    try:
                        answer = serve(request, programs)
                    except OSError as err:
                        answer = {"error": str(err)}
                    connection.sendall(json.dumps(answer).encode())
            reap(programs)


def serve(request: dict[str, Any], programs: dict[str, subprocess.Popen[bytes]]) -> dict[str, Any]:
    if "start" in request:
        with open(request["log"], "ab") as log:
            process = subprocess.Popen(
                request["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        programs[request["start"]] = process
        return {"pid": process.pid}
    if "stop" in request:
        process = programs.pop(request["stop"])
        process.send_signal(request["signal"])
        deadline = time.monotonic() + request["within_s"]
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if process.poll() is None:
            process.kill()
        return {"status": process.wait()}
    return {name: process.pid for name, process in programs.items() if process.poll() is None}


def reap(programs: dict[str, subprocess.Popen[bytes]]) -> None:
    """Reap orphans; a program's own end is its Popen's to read."""
    own = {process.pid for process in programs.values()}
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None:
            return
        if found.si_pid in own:
            next(process for process in programs.values() if process.pid == found.si_pid).poll()
        else:
            os.waitpid(found.si_pid, os.WNOHANG)


if __name__ == "__main__":
    main()
