"""Who holds a port."""

import os
import socket

import pytest

from harken.transports.holder import holder, program

HOLD = """
import socket, sys
kind = socket.SOCK_STREAM if sys.argv[1] == "tcp" else socket.SOCK_DGRAM
door = socket.socket(socket.AF_INET6, kind)
door.bind(("::1", 0))
if sys.argv[1] == "tcp":
    door.listen()
open("/proc/self/comm", "w").write("odd\\x1b[31m")
print(door.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_another_process_is_named(run_program, protocol):
    """By pid and program, and what the program calls itself cannot reach the terminal as a control sequence."""
    process = run_program("-c", HOLD, protocol, stdin=-1)
    port = int(process.stdout.readline())
    assert holder(protocol, port) == f"pid {process.pid} (odd?[31m)"


def test_this_process_and_nobody():
    """One's own port is said to be so; a free one and a connected one have no holder."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        assert holder("tcp", port) == "this process"
        assert holder("udp", port) == ""
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            assert holder("tcp", client.getsockname()[1]) == ""


def test_a_process_that_has_gone():
    """Its pid must do."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert program(pid) == f"pid {pid}"
