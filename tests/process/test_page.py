"""The page of ``metrics`` of a running service: it speaks for all workers, and for those that were."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from waiting import wait_until

import harken
from harken.errors import ConfigError
from harken.process import page
from harken.settings import Settings

PATIENCE = 20.0
ASK = ("--metrics", "tcp://127.0.0.1:0")


def fetch(port, path):
    """Return status and text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(port):
    """Return the samples, by name and labels as they are written but for the listener."""
    status, text = fetch(port, "/metrics")
    assert status == 200, text
    lines = [re.sub(r'listener="[^"]*",?', "", line) for line in text.splitlines() if not line.startswith("#")]
    return {name.replace("{}", ""): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def wait_for(port, condition):
    """Scrape until ``condition`` holds of the samples; return them."""
    end = time.monotonic() + PATIENCE
    while not condition(samples := scrape(port)):
        assert time.monotonic() < end, samples
        time.sleep(0.05)
    return samples


@pytest.fixture
def watched(service):
    """Return a function that starts a service with a page; it returns the service and the page's port."""

    def start(*words):
        served = service(*ASK, *words)
        return served, int(served.wait_log(r"page opened: address http://127\.0\.0\.1:(\d+)/")[1])

    return start


def test_one_scrape_shows_all_workers(watched):
    """Four workers' connections, bytes and handlers are added up, and what is open is open."""
    service, port = watched("--workers", "4")
    service.workers(4)
    with contextlib.ExitStack() as open_now:
        for _ in range(3):
            client = open_now.enter_context(service.connect())
            assert client.recv(100)
        for _ in range(9):
            service.ask()
        samples = wait_for(port, lambda found: found["harken_connections_open"] == 3)
        closed = sum(value for name, value in samples.items() if name.startswith("harken_connections_closed_total"))
        assert samples["harken_accepted_total"] == samples["harken_connections_opened_total"] == 12
        assert closed == samples["harken_handler_seconds_count"] == 9
        assert samples['harken_workers{state="ready"}'] == samples["harken_workers_wanted"] == 4
        assert samples["harken_accept_queue_seconds_count"] >= 1
        assert samples["harken_accept_queue_limit"] > 0
        assert samples["harken_threads"] >= 4
    wait_for(port, lambda found: found["harken_connections_open"] == 0)


def test_counters_outlive_the_worker_that_counted(watched):
    """Neither kill -9 nor recycling takes anything back, and the cause is counted."""
    service, port = watched("--workers", "1", "--max-requests", "6")
    (first,) = service.workers(1)
    for _ in range(3):
        service.ask()
    before = wait_for(port, lambda found: found["harken_handler_seconds_count"] == 3)
    os.kill(first, signal.SIGKILL)
    service.workers(2)
    after = wait_for(port, lambda found: found['harken_worker_restarts_total{cause="signal"}'] == 1)
    assert {name: value for name, value in before.items() if after[name] < value and "total" in name} == {}
    for _ in range(6):
        service.ask()
    wait_for(port, lambda found: found['harken_worker_restarts_total{cause="max_requests"}'] == 1)
    assert wait_for(port, lambda found: found["harken_handler_seconds_count"] == 9)["harken_accepted_total"] == 9


def test_a_worker_that_dies_while_it_is_asked_takes_nothing_back(watched, tmp_path):
    """Who has asked is answered when it is dead, and hears of what it had counted: a counter never goes down."""
    control = tmp_path / "control"
    service, port = watched("--workers", "1", "--control", str(control))
    (worker,) = service.workers(1)
    for _ in range(3):
        service.ask()
    wait_for(port, lambda found: found["harken_handler_seconds_count"] == 3)
    os.kill(worker, signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX) as asker:
        asker.settimeout(PATIENCE)
        asker.connect(str(control))
        replies = asker.makefile()
        for number, verb in enumerate(("figures", "health")):
            asker.sendall(json.dumps({"version": 1, "number": number, "verb": verb}).encode() + b"\n")
        assert json.loads(replies.readline())["number"] == 1  # so the worker was asked before
        os.kill(worker, signal.SIGKILL)
        figures = json.loads(replies.readline())["result"]
    assert [numbers for name, _, numbers in figures if name == "harken_accepted_total"] == [[3]]


def test_exceptions_and_reasons_are_counted(watched, target):
    """What a handler raises, why connections closed, and who was refused by which limit."""
    target.write_text("import harken\nclass Tell(harken.BaseRequestHandler):\n    def handle(self):\n        1 / 0\n")
    service, port = watched("--workers", "2", "--deny", "127.0.0.2")
    for _ in range(3):
        with service.connect() as client:
            client.recv(1)
    with contextlib.suppress(ConnectionResetError):  # connect() itself may be reset
        with socket.create_connection(("127.0.0.1", service.port), PATIENCE, ("127.0.0.2", 0)) as client:
            client.recv(1)
    samples = wait_for(port, lambda found: found["harken_handler_exceptions_total"] == 3)
    assert samples['harken_connections_closed_total{reason="handler_failed"}'] == 3
    assert samples['harken_connections_rejected_total{reason="deny"}'] == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_readiness_follows_the_service(watched, workers, tmp_path):
    """Ready; suspended, not ready but alive; ready again; and draining as long as somebody is served."""
    service, port = watched("--workers", workers, "--control", str(tmp_path / "control"))
    assert fetch(port, "/health/ready") == (200, "ready\n")
    with service.connect() as client:
        assert client.recv(100)
        for verb, answer in (("suspend", (503, "suspended\n")), ("resume", (200, "ready\n"))):
            control(tmp_path / "control", verb)
            wait_answer(port, answer)
            assert fetch(port, "/health/live") == (200, "live\n")
        service.process.terminate()
        wait_answer(port, (503, "draining\n"))
        assert fetch(port, "/health/live")[0] == 200
        client.shutdown(socket.SHUT_RDWR)
    assert service.end()[0] == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), PATIENCE)


def control(path, verb):
    """Ask the control socket."""
    from harken.process.control import replies

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        sock.settimeout(None)
        assert "result" in next(replies(sock, verb, {}))


def wait_answer(port, answer):
    """Ask for readiness until it is ``answer``."""
    end = time.monotonic() + PATIENCE
    while (found := fetch(port, "/health/ready")) != answer:
        assert time.monotonic() < end, found
        time.sleep(0.02)


def test_the_page_leaves_with_its_supervisor(watched):
    """Killed with -9 the supervisor leaves no page behind: its port is free."""
    service, port = watched("--workers", "1")
    service.workers(1)
    os.kill(service.pid, signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    with pytest.raises(ConnectionRefusedError):
        while time.monotonic() < end:
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
            time.sleep(0.02)


def test_a_page_that_dies_comes_back(watched):
    """Its process is started again, on the same port, and has lost nothing."""
    service, port = watched("--workers", "1")
    (worker,) = service.workers(1)
    service.ask()
    wait_for(port, lambda found: found["harken_accepted_total"] == 1)
    (other,) = children_of(service.pid) - {worker}
    os.kill(other, signal.SIGKILL)
    assert wait_for(port, lambda found: True)["harken_accepted_total"] == 1
    assert other not in children_of(service.pid)


def children_of(pid):
    """The pids of a process's children."""
    with open(f"/proc/{pid}/task/{pid}/children") as listed:
        return set(map(int, listed.read().split()))


def test_the_page_survives_a_reload(watched):
    """New workers write on the same bill."""
    service, port = watched("--workers", "1")
    service.workers(1)
    service.ask()
    wait_for(port, lambda found: found["harken_handler_seconds_count"] == 1)
    service.process.send_signal(signal.SIGHUP)
    service.wait_log("reloaded")
    service.ask()
    samples = wait_for(port, lambda found: found["harken_handler_seconds_count"] == 2)
    assert samples['harken_worker_restarts_total{cause="reload"}'] <= 1


def test_a_unix_path_serves_too(service, tmp_path):
    """For a scraper on the same machine; the path goes with the service."""
    path = tmp_path / "page"
    served = service("--metrics", f"unix:{path}")
    served.wait_log("page opened")

    class Client(http.client.HTTPConnection):
        def connect(self):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(str(path))

    client = Client("local")
    client.request("GET", "/health/ready")
    assert client.getresponse().status == 200
    client.close()
    served.process.terminate()
    served.end()
    assert not path.exists()


class Echo(harken.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self):
        """Until the end."""
        while data := self.request.recv(100):
            self.request.sendall(data)


@pytest.mark.parametrize(
    "kind", [harken.TCPServer, harken.ThreadingTCPServer, harken.PoolTCPServer, harken.GreenTCPServer]
)
def test_a_server_in_a_program_has_one_too(kind, free_port):
    """By keyword, on every engine that serves here; it goes when the server is closed."""
    server = kind(("127.0.0.1", 0), Echo, metrics=f"tcp://127.0.0.1:{free_port}")
    with harken.background(server):
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"12345")
            assert client.recv(10) == b"12345"
        whole = {
            "harken_sent_bytes_total": 5,
            "harken_handler_seconds_count": 1,
        }  # one after the other, at its very end
        samples = wait_for(free_port, lambda found: {name: found[name] for name in whole} == whole)
        assert samples["harken_received_bytes_total"] == 5
        assert fetch(free_port, "/health/ready") == (200, "ready\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", free_port), PATIENCE)


def test_servers_of_one_program_share_a_page(free_port):
    """Two that name the same address are added up; what the first has counted stays when it goes."""
    address = f"tcp://127.0.0.1:{free_port}"
    one, two = (harken.ThreadingTCPServer(("127.0.0.1", 0), Echo, metrics=address) for _ in range(2))
    with harken.background(two):
        with harken.background(one):
            socket.create_connection(one.server_address, PATIENCE).close()
            wait_closed(free_port, 1)
        socket.create_connection(two.server_address, PATIENCE).close()
        wait_closed(free_port, 2)


@pytest.mark.parametrize("daemons", [False, True])
def test_connections_that_outlive_their_server_are_counted_to_their_end(free_port, daemons):
    """Whether server_close() waits for them or not: the page is another server's, and stays."""
    address, go_on = f"tcp://127.0.0.1:{free_port}", threading.Event()

    class Slow(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(10)
            assert go_on.wait(PATIENCE)
            self.request.sendall(b"at last")

    with harken.background(harken.ThreadingTCPServer(("127.0.0.1", 0), Echo, metrics=address)):
        closed = harken.ThreadingTCPServer(("127.0.0.1", 0), Slow, metrics=address)
        closed.daemon_threads = daemons
        listener = closed._harken.address()
        serving = threading.Thread(target=closed.serve_forever)
        serving.start()
        with socket.create_connection(closed.server_address, PATIENCE) as client:
            client.sendall(b"12345")
            wait_until(lambda: labelled(free_port, "harken_received_bytes_total", listener) == 5)
            closing = threading.Thread(target=closed.server_close)
            closing.start()
            wait_until(lambda: closed._harken._leave_page is None)
            assert labelled(free_port, "harken_connections_open", listener) == 1
            go_on.set()
            assert client.recv(10) == b"at last"
            closing.join(PATIENCE)
        wait_closed(free_port, 1)
        serving.join(PATIENCE)
        assert labelled(free_port, "harken_connections_opened_total", listener) == 1
        assert labelled(free_port, "harken_sent_bytes_total", listener) == 7


def test_a_drained_server_keeps_its_name(free_port):
    """Its socket is closed before its connections have ended: they count under the address that it had."""
    address = f"tcp://127.0.0.1:{free_port}"
    with harken.background(harken.ThreadingTCPServer(("127.0.0.1", 0), Echo, metrics=address)) as server:
        listener = server._harken.address()
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"1")
            assert client.recv(1) == b"1"
            drain = threading.Thread(target=server.drain, args=(PATIENCE,))
            drain.start()
            wait_until(lambda: server.socket.fileno() < 0)
            assert labelled(free_port, "harken_connections_open", listener) == 1
        drain.join(PATIENCE)


def labelled(port, name, listener):
    """What one listener has counted; None where the page does not know it."""
    lines = [
        line for line in fetch(port, "/metrics")[1].splitlines() if line.startswith(f'{name}{{listener="{listener}"')
    ]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else None


def wait_closed(port, count):
    """Wait until so many connections have closed, on all listeners."""
    end = time.monotonic() + PATIENCE
    while True:
        lines = [line for line in fetch(port, "/metrics")[1].splitlines() if line.startswith("harken_connections_c")]
        found = sum(float(line.rsplit(" ", 1)[1]) for line in lines)
        if found == count:
            return
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_a_connection_of_a_program_can_be_followed(free_port, tmp_path):
    """By the token, as under a supervisor; what a program serves by itself answers for itself."""
    (tmp_path / "token").write_text("0123456789abcdef\n")
    address = f"tcp://127.0.0.1:{free_port}"
    server = harken.GreenTCPServer(
        ("127.0.0.1", 0), Echo, metrics=address, metrics_token=str(tmp_path / "token"), idle_timeout=None
    )
    with harken.background(server), socket.create_connection(server.server_address, PATIENCE) as client:
        client.sendall(b"first")
        assert client.recv(10) == b"first"
        (info,) = server.connections()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{free_port}/connections/{info.id}/trace",
            headers={"Authorization": "Bearer 0123456789abcdef"},
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE) as told:
            assert next_entry(told)["begin"]
            client.sendall(b"second")
            assert client.recv(10) == b"second"
            moved = [next_entry(told) for _ in range(2)]
            assert [(entry["direction"], entry["text"]) for entry in moved] == [("in", "second"), ("out", "second")]
            server.close_connection(info.id)
            assert next_entry(told)["end"] == "killed"


def next_entry(told):
    """The next event of a stream."""
    while not (line := told.readline()).startswith(b"data: "):
        assert line
    return json.loads(line[6:])


def test_a_hung_loop_is_not_live(free_port):
    """A green handler that keeps the loop for longer than ``worker_timeout`` is told where no supervisor sees it."""
    release, begun = threading.Event(), threading.Event()

    class Keep(harken.BaseRequestHandler):
        def handle(self):
            begun.set()
            release.wait(PATIENCE)

    address = f"tcp://127.0.0.1:{free_port}"
    server = harken.GreenTCPServer(("127.0.0.1", 0), Keep, metrics=address, worker_timeout=0.2)
    with harken.background(server), socket.create_connection(server.server_address, PATIENCE):
        try:
            assert begun.wait(PATIENCE)
            end = time.monotonic() + PATIENCE
            while fetch(free_port, "/health/live") != (503, "hung\n"):
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            release.set()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"metrics": "udp://127.0.0.1:0"}, "no address for a page"),
        ({"metrics": "127.0.0.1:9100"}, "no address for a page"),
    ],
)
def test_wrong_addresses_are_refused(values, message):
    """In one line that says what would be right."""
    with pytest.raises(ConfigError, match=message):
        page.open_listener(Settings(None, values, "serve"))


@pytest.mark.parametrize(
    "url, opened",
    [("tcp://127.0.0.1:0", "http://127.0.0.1:"), ("tcp://[::1]:0", "http://[::1]:"), ("tcp://:0", "http://localhost:")],
)
def test_the_address_that_is_told_can_be_opened(url, opened):
    """Also where the page is at every address of the machine."""
    with page.open_listener(Settings(None, {"metrics": url})) as listener:
        assert page.web_address(listener) == f"{opened}{listener.getsockname()[1]}/"


def test_tokens_that_can_be_guessed_are_refused(tmp_path):
    """A missing file, a short word; a good one is read without its line's end."""
    path = tmp_path / "token"
    settings = Settings(None, {"metrics_token": str(path)}, "serve")
    with pytest.raises(ConfigError, match="cannot be read"):
        page.read_token(settings)
    path.write_text("secret\n")
    with pytest.raises(ConfigError, match=r"has 6 letters.*openssl rand"):
        page.read_token(settings)
    path.write_text("0123456789abcdef\n")
    assert page.read_token(settings) == "0123456789abcdef"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_successor_takes_the_page_over(watched, workers):
    """After USR2 the same port answers for the new program, which counts anew, and the old one answers no more."""
    service, port = watched("--workers", workers)
    service.ask()
    wait_for(port, lambda found: found["harken_handler_seconds_count"] == 1)
    with service.connect() as client:
        assert client.recv(100)
        service.process.send_signal(signal.SIGUSR2)
        service.wait_log("page opened", 2)
        service.wait_log("draining")
        for _ in range(5):
            assert fetch(port, "/health/ready") == (200, "ready\n")
        assert scrape(port)["harken_accepted_total"] < 2  # its own probe
    assert service.process.wait(PATIENCE) == 0
    assert fetch(port, "/health/ready") == (200, "ready\n")
