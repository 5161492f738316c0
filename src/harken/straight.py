"""A server that overrides no hook: the same steps, straight through.

Each hook is a call that costs more than the work in it, and a short connection passes eight of them. Where all are
harken's own nobody can tell whether they were called, so engines that take connections in bursts go this way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any

from harken import events
from harken.acceptor import MAX_ACCEPT
from harken.connection import door_of, is_plain_door, shown
from harken.datagrams import is_lean
from harken.engines import Terms, Way
from harken.listener import Listener

if TYPE_CHECKING:
    from harken.engines import Lane
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["is_straight", "serve", "serve_known", "stock", "take"]

_NAMES = (
    "get_request",
    "verify_request",
    "process_request",
    "process_request_thread",
    "finish_request",
    "shutdown_request",
    "close_request",
    "service_actions",
    "_handle_request_noblock",
    "_process_elsewhere",
)
_read: Callable[[type], tuple[Any, ...]] = attrgetter(*_NAMES)
_new: Callable[[Any], Any] = object.__new__
_own_names = frozenset(_NAMES)
_stock: set[Any] = set()
_seen: dict[type, tuple[tuple[Any, ...], bool]] = {}
_MANY = 1 << 30  # places where there is no bound
_MOST_SEEN = 256  # classes; programs that make one a server must not fill the memory


def stock(server_class: type) -> None:
    """Say that the hooks that ``server_class`` defines do what harken's do."""
    _stock.update(vars(server_class)[name] for name in _NAMES if name in vars(server_class))


def is_straight(serving: Serving) -> bool:
    """Tell whether the server of ``serving`` has harken's own hooks alone, at this moment: programs patch them."""
    server = serving.server
    kind = type(server)
    try:
        hooks = _read(kind)
    except AttributeError:
        return False
    known, straight = _seen.get(kind, (None, False))
    if hooks != known:
        straight = _stock.issuperset(hooks)
        if len(_seen) >= _MOST_SEEN:
            _seen.clear()
        _seen[kind] = (hooks, straight)
    if not straight or not _own_names.isdisjoint(vars(server)):
        return False  # whoever has hooks of its own need not even have a socket
    known_client = serving.entry is None or not serving.entry.tells_client
    return known_client and is_plain_door(server.socket, serving.engine.connection)


def take(serving: Serving) -> bool | None:
    """Take what waits at the door, at most a burst, and let it in; tell whether there may be more.

    None is no, too: and nobody has to be told of it, since no hook of a turn does anything.
    """
    server, acceptor, admission = serving.server, serving.acceptor, serving.bounds.admission
    places = _places(serving) if _is_quiet(serving) else 0
    lane = serving.engine.lane(server, partial(_way, serving)) if places else None
    if lane is not None:
        return _take_by(lane, serving, places)
    burst = _burst(serving)
    most = burst if admission is None else admission.places(burst)
    if admission is not None and not most:  # another process, or loop, has filled the last places just now
        serving.intake.wait_for_room(admission)
        return False
    try:
        taken = serving.engine.connection.take(door_of(server.socket), most)
    except OSError as error:
        acceptor.failed(error)
        taken = []
    if not taken:
        acceptor.found_empty()
        if admission is not None:
            admission.unclaim()
    if taken and len(taken[0][1]) > 2:
        taken = [(request, shown(server.socket, address)) for request, address in taken]
    if taken:
        _start(serving, serving.books.let_in(taken, None if admission is None else serving.intake.admit))
    if acceptor.troubled:
        acceptor.settle(taken=bool(taken))
    if len(taken) == MAX_ACCEPT:
        return serving.intake.readable()  # a door of socketserver's kind blocks, and might have been emptied
    return False if acceptor.paused else None


def _burst(serving: Serving) -> int:
    """How many to take before the first of them is served.

    Where the accept of a further one may wait, since somebody else took who was there, nobody may wait with it. And
    after trouble the first tells whether it is over: a burst for which no thread can be started would be lost whole.
    """
    door = serving.server.socket
    if serving.acceptor.troubled:
        return 1
    if isinstance(door, Listener) or (serving.holding is not None and serving.holding.alone(door)):
        return MAX_ACCEPT
    return 1


def _is_quiet(serving: Serving) -> bool:
    """Whether nobody has to be told of connections that come."""
    books, listened = serving.books, events.subscribers
    return (
        (books.on_open is None or (serving.bounds.deadlines is not None and serving.entry is None))
        and books.meter is None
        and not listened["accepted"]
        and not listened["opened"]
        and not getattr(serving.server.RequestHandlerClass, "lazy", False)
    )


def _places(serving: Serving) -> int:
    """How many may be taken before anybody looks again whether there is room."""
    if serving.bounds.admission is None:
        return _MANY
    return serving.bounds.admission.spare(_MANY) if serving.entry is None else 0


def _way(serving: Serving) -> Way:
    books = serving.books
    known = books.connections

    def failed(request: Any, client_address: Any, error: BaseException) -> None:
        books.failed(request, client_address, error)
        if not isinstance(error, Exception):
            raise error  # shown as in a thread
        serving.server.handle_error(request, client_address)

    return Way(
        server=serving.server,
        registry=known,
        filed=known.filed,
        counts=books.counts,
        reasons=books.reasons,
        subscribers=events.subscribers,
        remember=partial(_remember, serving),
        close=books.close,
        failed=failed,
        shown=shown,
        enter=None if serving.entry is None else partial(enter, serving),
    )


def _remember(serving: Serving, request: Any, client_address: Any, started: float, ticket: Any) -> Record:
    """Make the record of a connection that was let in without one."""
    books = serving.books
    record = books.connections.remember(request, client_address, started)
    if ticket is not None:
        record.ticket = ticket
    if books.on_open is not None:
        books.on_open(record)
    return record


def _take_by(lane: Lane, serving: Serving, places: int) -> bool | None:
    """As :func:`take`, by the engine's own means, which may go on so for a moment without asking."""
    server, acceptor = serving.server, serving.acceptor
    handler_class = server.RequestHandlerClass
    serving.connections.use(lane)
    most, deadlines = min(places, MAX_ACCEPT), serving.bounds.deadlines
    if deadlines is not None:
        deadlines.expect()
    terms = Terms(
        handler_class,
        lean=is_lean(handler_class),
        stamps=deadlines is not None and deadlines.needs_stamps(server.socket),
        gate=None if serving.bounds.admission is None else serving.intake.admit_unrecorded,
    )
    try:
        taken = lane.take(door_of(server.socket), most, terms)
    except OSError as error:
        acceptor.failed(error)
        taken = 0
    if not taken:
        acceptor.found_empty()
    if acceptor.troubled:
        acceptor.settle(taken=bool(taken))
    elif taken:
        lane.trust(server, places - taken)
    if taken == most:
        return True
    return False if acceptor.paused else None


def _start(serving: Serving, admitted: list[tuple[Any, Any]]) -> None:
    server, engine = serving.server, serving.engine
    serve_here = serve if serving.entry is None else enter
    # Where each connection has a thread, that begins at once, and is to be known.
    lazy = engine.shares_threads and serving.entry is None and getattr(server.RequestHandlerClass, "lazy", False)
    start = engine.starter()
    if not engine.shares_threads:
        serve_here = process_request_thread  # by this name programs find its thread
        engine.show_threads(server)
    waiting = iter(admitted)
    for request, client_address in waiting:
        try:
            if lazy:
                engine.spawn_on_data(serving.intake.serve, request)
            else:
                start(serve_here, serving, request, client_address)
        except Exception as error:  # noqa: BLE001 - that connection's trouble
            if isinstance(error, RuntimeError):
                serving.acceptor.starved(error)
            serving.books.failed(request, client_address, error)
            server.handle_error(request, client_address)
            server.shutdown_request(request)
        except:
            serving.intake.broken_off(request)
            for unserved, _ in waiting:
                server.shutdown_request(unserved)
            raise


def serve_known(serving: Serving, request: Any) -> None:
    """Serve a connection whose client's address is on record."""
    record = request.record
    if record is not None:  # or somebody has closed it before its first byte
        serve(serving, request, record.client_address)


def process_request_thread(serving: Serving, request: Any, client_address: Any) -> None:
    """As :func:`serve`, or :func:`enter`, in a thread of the connection's own."""
    if serving.entry is not None:
        enter(serving, request, client_address)
        return
    request.record.thread = get_ident()
    serve(serving, request, client_address)


def enter(serving: Serving, request: Any, client_address: Any) -> None:
    """Take one connection through its preambles, and serve what it goes on as."""
    passed = serving.entry.enter(request, client_address)  # type: ignore[union-attr]
    if passed is None:
        return
    request, client_address = passed
    kind = type(request)
    if hasattr(kind, "record") and hasattr(kind, "end"):
        request.record.thread = get_ident()
        serve(serving, request, client_address)
    else:  # a preamble's or a program's own class, which the hooks close
        serving.server.process_request_thread(request, client_address)


def serve(serving: Serving, request: Any, client_address: Any) -> None:
    """Serve one connection where the engine runs handlers: the hooks after ``process_request``."""
    server = serving.server
    handler_class = server.RequestHandlerClass
    meter = serving.books.meter
    begun = monotonic() if meter is not None else 0.0
    try:
        if type(handler_class) is type and getattr(handler_class, "__new__", None) is _new:
            # What calling the class does, without a frame of the C stack to be kept for each connection that waits.
            _new(handler_class).__init__(request, client_address, server)
        else:
            handler_class(request, client_address, server)
    except BaseException as error:
        serving.books.failed(request, client_address, error)
        if not isinstance(error, Exception):
            raise
        server.handle_error(request, client_address)
    finally:
        if meter is not None:
            meter.handled(begun)
        serving.books.close(request)
