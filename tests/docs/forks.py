"""`python cli.py ...` as a fork of one process that has imported what all commands need, so that each starts at once.

forks.py serve SOCKET              answers calls, one at a time, until it is ended
forks.py call SOCKET cli.py ...    a call with this process's streams, working directory and environment
"""

import json
import os
import runpy
import socket
import sys
from importlib import import_module

PRELOADED = ("rat_cli.lightning", "rat_cli.info", "rat_cli.evaluate", "rat.evaluation.harness", "rat.evaluation.tasks")


def call(path: str, argv: list[str]) -> int:
    """Run `argv`, a script and its arguments, in a fork of the server at `path`; its exit status."""
    request = json.dumps({"argv": argv, "cwd": os.getcwd(), "environ": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [len(request).to_bytes(8)], [0, 1, 2])
        connection.sendall(request)
        return int(connection.makefile().read())


def serve(path: str) -> None:
    """Answer calls at `path`. Returns in a fork, once its script has run to its end."""
    for name in PRELOADED:
        import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            size, streams, _, _ = socket.recv_fds(connection, 8, 3)
            request = json.loads(connection.makefile("rb").read(int.from_bytes(size)))
            child = os.fork()
            if child == 0:
                listener.close()
                connection.close()
                return run(request, streams)
            for stream in streams:
                os.close(stream)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(str(status).encode())
            connection.close()


def run(request: dict, streams: list[int]) -> None:
    """Be the process that was asked for."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.argv, sys.path[0] = request["argv"], request["cwd"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _, role, address, *rest = sys.argv
    sys.exit(call(address, rest) if role == "call" else serve(address))
