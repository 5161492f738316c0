"""The hub inside gevent's, in processes that gevent has patched: before harken was imported, and after."""

from __future__ import annotations

import signal

import pytest
import trustme

from .patched import PROLOGUE, SERVE, run

LIBRARIES = """
class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(0.3)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"hi")
    def log_message(self, *words):
        pass

def fetch(handler, word):
    if int(word) % 2:
        return requests.get(url, timeout=20).text
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()

with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Slow)) as web:
    url = "http://127.0.0.1:{}/".format(web.server_address[1])
    with serving(fetch) as server:
        answers, seconds = ask_at_once(server)
        print(set(answers), seconds < 10 * 0.3)
"""

WAITS = """
import queue
things = queue.Queue()
def work(handler, word):
    before = green.current()
    match int(word) % 6:
        case 0: time.sleep(0.01)
        case 1: green.sleep(0.01)
        case 2: assert green.offload(sum, [1, 2]) == 3
        case 3:
            try:
                with green.timeout(0.02):
                    time.sleep(30)
            except TimeoutError:
                pass
        case 4:
            try:
                with gevent.Timeout(0.02):
                    handler.rfile.readline()
            except gevent.Timeout:
                pass
        case 5:
            threading.Thread(target=things.put, args=(word,)).start()
            assert things.get(timeout=20)
    assert green.current() is before
    return word

with serving(work) as server:
    for _ in range(3):
        answers, seconds = ask_at_once(server, 30)
        assert answers == [str(number) for number in range(30)], answers
print("done", threading.active_count() < 10)
"""

COROUTINE = """
import asyncio
with serving(lambda handler, word: green.wait(asyncio.sleep(0.01, word))) as server:
    print(ask(server, "waited"), ask(server, "again"))
"""

COROUTINE_LATE = """
import asyncio
from harken import _hub
begun = threading.Event()
def late(handler, word):
    done = []
    async def endless():
        try:
            begun.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            done.append("cleaned up")
            if word == "raises":
                raise LookupError("nobody is to be told")
    begun.clear()
    waiting = green.current()
    def interrupt():
        begun.wait(20)
        _hub.current().throw(waiting, TimeoutError("interrupted"))
    green.spawn(interrupt)
    try:
        green.wait(endless())
    except TimeoutError:
        done.append("went on")
    return done

with serving(late) as server:
    print(ask(server, "quiet"), ask(server, "raises"))
"""

DUE = """
wrong = []

def turns():
    while True:
        green.sleep()

def unparked():
    event = green.Event()
    gevent.get_hub().loop.timer(0.0005).start(event.set)
    event.wait()

def work(handler, word):
    for wait in (turns, unparked) * 200:
        try:
            with gevent.Timeout(0.0005):
                wait()
        except gevent.Timeout:
            pass
        try:
            gevent.sleep(0.001)
        except BaseException as error:
            wrong.append(error)

with serving(work) as server:
    ask(server)
print(wrong[:1])
"""

LOCKED = """
class Turns:
    def __init__(self, lock):
        self.lock, self.entered = lock, 0
        self.acquire, self.release = lock.acquire, lock.release
    def __enter__(self):
        self.lock.acquire()
        self.entered += 1
        if self.entered == 3:
            signal.raise_signal(signal.SIGINT)  # and the lock is held already
        return self
    def __exit__(self, *error):
        self.lock.release()

with harken.GreenTCPServer(("127.0.0.1", 0), harken.StreamRequestHandler) as server:
    engine = server._harken.engine
    engine._turns = turns = Turns(engine._turns)
    try:
        server.serve_forever(0.01)
    except KeyboardInterrupt:
        print("interrupted", turns.entered >= 3)
"""

HASTY = """
import asyncio, gc, warnings
warnings.simplefilter("error")
sys.unraisablehook = lambda unraisable: print(unraisable.exc_value)

def hasty(handler, word):
    try:
        with green.timeout(1e-7):
            return green.wait(asyncio.sleep(5))
    except TimeoutError:
        return "late"

with serving(hasty) as server:
    print(ask(server), ask(server))
gc.collect()
"""

FORK = """
def fork(handler, word):
    pid = os.fork()
    if pid == 0:
        handler.wfile.write(b"child ")
        os._exit(0)
    monkey.get_original("os", "waitpid")(pid, 0)  # gevent's own misses a child that ends at once, now and then
    return "parent"

with serving(fork) as server:
    print(ask(server), ask(server))
"""

SIGNALS = """
def term(signum, frame):
    print("heeded", flush=True)
    server.shutdown()

signal.signal(signal.SIGTERM, term)
with harken.GreenTCPServer(("127.0.0.1", 0), harken.StreamRequestHandler) as server:
    print(os.getpid(), flush=True)
    server.serve_forever(30)
print("over")
"""

INTERRUPT = """
class Busy(harken.StreamRequestHandler):
    def handle(self):
        print("busy", flush=True)
        while True:
            sum(range(10_000))
            green.sleep()

with harken.GreenTCPServer(("127.0.0.1", 0), Busy) as server:
    with socket.create_connection(server.server_address):
        try:
            server.serve_forever(30)
        except KeyboardInterrupt:
            print("interrupted")
            os._exit(0)  # the handler would compute on
"""

HANDLERS = """
def own(signum, frame):
    pass

def serve():
    with serving(lambda handler, word: signal.getsignal(signal.SIGINT) is signal.default_int_handler) as server:
        return ask(server)

print(serve(), signal.getsignal(signal.SIGINT) is signal.default_int_handler, end=" ")
signal.signal(signal.SIGINT, own)
serve()
print(signal.getsignal(signal.SIGINT) is own)
"""

OFFLOADS = """
def fail():
    raise LookupError("failed")

def offload(handler, word):
    try:
        green.offload(fail)
    except LookupError as error:
        return str(error) + f" {green.offload(sum, [1, 2])}"

with serving(offload) as server:
    print(ask(server))
"""

CHECKS = """
from harken.engines.green import Engine
from harken.testing import ENGINE_CHECKS
wanted = ("echo", "half_close", "slow_reader", "handler_raises", "close_connection", "shutdown_while_busy",
          "shutdown_from_handler", "shutdown_from_signal_handler", "close_waits_for_handlers", "several_loops",
          "suspend_and_resume", "drain_cuts", "datagram_echo")
done = [check(Engine, check.transports[0]) for check in ENGINE_CHECKS if str(check) in wanted]
print(len(done) == len(wanted))
"""

LATE = """
def late(handler, word):
    for step in range(-3, 4):
        try:
            with green.timeout(0.003 + step * 0.0002):
                gevent.sleep(0.003)
        except TimeoutError:
            pass
        gevent.sleep(0.002)
    return word

with serving(late) as server:
    answers, _ = ask_at_once(server, 20)
    print(answers == [str(number) for number in range(20)])
"""

SEVERAL = """
from gevent.event import Event
gone, waits, told = Event(), Event(), green.Event()

def mixed(handler, word):
    time.sleep(0.001)  # gevent goes on with us, and another hub's turn was the last
    with green.timeout(20):
        green.spawn(green.sleep, 0).join()
    return word

def joined(handler, word):
    if word == "second":
        told.wait(20)
    else:
        ask(two)  # so that its hub's turn is the last
    return word

def late(handler, word):
    waits.set()
    gone.wait(20)
    return f"{word} {green.current() is not None}"

with serving(late) as one:
    with serving(mixed) as two, serving(mixed) as three, serving(joined) as four:
        asked = [gevent.spawn(ask, server, str(number)) for number in range(30) for server in (two, three)]
        gevent.joinall(asked, timeout=20)
        print([answer.value for answer in asked] == [str(number) for number in range(30) for _ in "ab"])
        with socket.create_connection(four.server_address, 20) as client, client.makefile("rb") as answers:
            client.sendall(b"first\\nsecond\\n")
            first = answers.readline()
            told.set()
            print(first, answers.readline())
        last = gevent.spawn(ask, one, "last")
        waits.wait(20)
        ask(two)
    gone.set()
    print(last.get(timeout=20))
"""

BETWEEN = {
    "sleep": "green.sleep(0.01)",
    "turn": "green.sleep(0)",
    "timeout": "self.request.settimeout(0.01), self.request.recv(1)",
}

WAIT_BETWEEN = """
class Waits(harken.StreamRequestHandler):
    def handle(self):
        word = self.rfile.readline()
        for _ in range(3):
            gevent.sleep(0.001)  # it is gevent that goes on with us
            with contextlib.suppress(TimeoutError):
                {wait}
        self.wfile.write(word)

with harken.GreenTCPServer(("127.0.0.1", 0), Waits) as server:
    loop = gevent.spawn(server.serve_forever, 30)
    print(ask(server, "in time"))
    server.shutdown()
    loop.join()
"""

OTHERS = """
for kind in (harken.ThreadingTCPServer, harken.PoolTCPServer, harken.AsyncTCPServer):
    with serving(lambda handler, word: time.sleep(0.1) or word, kind) as server:
        answers, seconds = ask_at_once(server)
        print(answers == [str(number) for number in range(10)], seconds < 1)
    print(server.stats()["state"])
"""


@pytest.mark.parametrize("order", PROLOGUE)
def test_requests_and_urllib_give_way(run_program, order):
    """Ten handlers that ask a slow web server wait at the same time."""
    assert run(run_program, order, LIBRARIES) == "{'hi'} True"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
@pytest.mark.parametrize("order", PROLOGUE)
def test_whatever_waits_gives_way(run_program, order, kind):
    """gevent's waits and harken's, interrupted by either's timeouts, in one handler after the other."""
    assert run(run_program, order, WAITS, kind) == "done True"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_a_timeout_that_is_left_is_over(run_program, kind):
    """Also when gevent ends the wait in the very turn in which the time has passed."""
    assert run(run_program, "before", LATE, kind) == "True"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_servers_share_a_thread(run_program, kind):
    """All hubs of gevent's threads are in one; a green thread is its own hub's, whose ever turn was the last."""
    assert run(run_program, "before", SEVERAL, kind) == "True\nb'first\\n' b'second\\n'\nlast True"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
@pytest.mark.parametrize("wait", BETWEEN)
def test_what_begins_between_two_turns_ends_in_time(run_program, wait, kind):
    """A wait in harken after one in gevent, where the hub's turns are 30 s apart."""
    assert run(run_program, "before", WAIT_BETWEEN.format(wait=BETWEEN[wait]), kind) == "in time"


def test_coroutines_run_elsewhere(run_program):
    """There is no asyncio loop under the hub, and ``green.wait`` works all the same."""
    assert run(run_program, "before", COROUTINE) == "waited again"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_a_coroutine_elsewhere_has_ended_when_its_waiter_goes_on(run_program, kind):
    """Also there: it is cancelled and waited for, and what it raises then is nobody's."""
    assert run(run_program, "before", COROUTINE_LATE, kind) == "['cleaned up', 'went on'] ['cleaned up', 'went on']"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_what_gevent_interrupts_is_due_no_more(run_program, kind):
    """A green thread that was to go on at the next turn is not resumed in a wait of gevent's."""
    assert run(run_program, "before", DUE, kind) == "[]"


def test_a_coroutine_that_is_given_up_at_once_is_closed(run_program):
    """Also where its loop has to be started first, which waits."""
    assert run(run_program, "before", HASTY) == "late late"


def test_a_handler_may_fork(run_program):
    """The child has the connection, the parent's hub goes on."""
    assert run(run_program, "before", FORK) == "child parent child parent"


def test_signals_are_heeded_at_once(run_program):
    """``shutdown()`` in a signal handler ends ``serve_forever()``, whose turns are 30 s apart."""
    process = run_program("-W", "ignore", "-c", PROLOGUE["before"] + SERVE + SIGNALS)
    assert int(process.stdout.readline()) == process.pid
    process.terminate()
    out, errors = process.communicate(timeout=20)
    assert out.splitlines() == ["heeded", "over"], errors


def test_ctrl_c_ends_the_loop_and_not_a_handler(run_program):
    """All run in the main thread, where Python would raise it in whoever is busy."""
    process = run_program("-W", "ignore", "-c", PROLOGUE["before"] + SERVE + INTERRUPT)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (out, process.returncode) == ("interrupted\n", 0), errors


def test_ctrl_c_in_a_turn_leaves_no_lock_behind(run_program):
    """It comes in the moment in which the loop has taken one."""
    assert run(run_program, "before", LOCKED) == "interrupted True"


def test_the_handler_of_ctrl_c_is_given_back(run_program):
    """One of the program's own is never touched."""
    assert run(run_program, "before", HANDLERS) == "False True True"


def test_what_an_offload_raises_is_raised_and_not_shown(run_program):
    """Where it was asked for, as elsewhere."""
    process = run_program("-W", "ignore", "-c", PROLOGUE["before"] + SERVE + OFFLOADS)
    assert process.communicate(timeout=50) == ("failed 3\n", "")


def test_the_contract_of_an_engine(run_program):
    """The checks of what gevent might break: stops, drains, cuts, several loops."""
    assert run(run_program, "before", CHECKS) == "True"


@pytest.mark.parametrize("order", PROLOGUE)
def test_threads_are_gevents_own(run_program, order):
    """Threads are greenlets and connections gevent's sockets, as under ``socketserver``. Listeners close, too."""
    assert run(run_program, order, OTHERS).splitlines() == ["True True", "closed"] * 3


SECURED = """
import ssl, sys
client_context = ssl.create_default_context(cafile=sys.argv[1] + "/ca.pem")

def seen(engine):
    class Upper(harken.StreamRequestHandler):
        def handle(self):
            self.wfile.write(str(self.request.version()).encode() + b"\\n")
            for line in self.rfile:
                self.wfile.write(line.upper())
            assert self.request.recv(1) == b""
    tls = harken.TLS(sys.argv[1] + "/cert.pem")
    with harken.background(harken.TCPServer(("127.0.0.1", 0), Upper, engine=engine, tls=tls)) as server:
        with socket.create_connection(server.server_address, 20) as plain:
            plain.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            assert plain.recv(100)[:1] in (b"", b"\\x15")
        with socket.create_connection(server.server_address, 20) as plain:
            with client_context.wrap_socket(plain, server_hostname="localhost") as client:
                client.sendall(b"hello\\n" * 20000)
                got = b""
                while len(got) < 8 + 120000:
                    got += client.recv(65536)
                client.shutdown(socket.SHUT_WR)
        while server.connections():
            time.sleep(0.01)
        stats = server.stats()
    return got[:14], stats["handler_failed_total"], sorted(stats["closed_total"].items())

for engine in ("green", "thread", "inline"):
    print(*seen(engine))
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
@pytest.mark.parametrize("order", PROLOGUE)
def test_tls(run_program, order, kind, tmp_path):
    """On the hub's connections and on gevent's, whenever ``ssl`` was imported first."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    program = PROLOGUE[order] + SERVE + SECURED
    process = run_program("-W", "ignore", "-c", program, str(tmp_path), env={"HARKEN_HUB": kind})
    out, errors = process.communicate(timeout=40)
    assert out == "b'TLSv1.3\\nHELLO\\n' 0 [('peer_closed', 1), ('preamble_failed', 1)]\n" * 3, errors
