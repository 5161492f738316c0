"""Settings: kinds of values, where one comes from, and what is refused."""

import socket
import socketserver

import pytest

import harken
from harken import settings
from harken.errors import ConfigError
from harken.server import BaseServer, TCPServer, UDPServer
from harken.serving import serving_of
from harken.settings import REGISTRY, Kind, Operator, Settings, known, setting

SOMAXCONN = max(128, socket.SOMAXCONN)


@pytest.fixture
def operator(monkeypatch):
    """An operator who has said nothing yet."""
    fresh = Operator()
    monkeypatch.setattr(settings, "operator", fresh)
    return fresh


@pytest.fixture
def declare(monkeypatch):
    """Declare settings for one test alone."""
    monkeypatch.setattr(settings, "REGISTRY", dict(REGISTRY))

    def declared(name, kind, default, **more):
        return setting(name, kind, default, meaning="a test's", origin="a test's", **more)

    return declared


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────

COUNT, SECONDS, SIZE, FLAG = settings.count(), settings.seconds(optional=True), settings.size(), settings.flag()
WORD, TEXT, LIST = settings.choice("text", "json"), settings.text(optional=True), Kind("list", (tuple,))


@pytest.mark.parametrize(
    "kind, written, value",
    [
        (COUNT, "12", 12),
        (COUNT, " 0 ", 0),
        (SECONDS, "0.5", 0.5),
        (SECONDS, "3", 3.0),
        (SECONDS, "none", None),
        (SECONDS, "None", None),
        (SIZE, "4096", 4096),
        (SIZE, "4KiB", 4096),
        (SIZE, "1 mib", 1 << 20),
        (SIZE, "2GiB", 2 << 30),
        *((FLAG, word, True) for word in ("true", "yes", "on", "1", "TRUE")),
        *((FLAG, word, False) for word in ("false", "no", "off", "0", "Off")),
        (WORD, "json", "json"),
        (settings.choice("a"), "my.module:Engine", "my.module:Engine"),
        (TEXT, " /var/log/x ", "/var/log/x"),
        (TEXT, "none", None),
        (LIST, "a, b,,c", ("a", "b", "c")),
        (LIST, "", ()),
    ],
)
def test_text_is_read_by_kind(kind, written, value):
    """Flags, variables and files write values as text."""
    read = kind.parse(written)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "kind, written, said",
    [
        (COUNT, "many", "is not a whole number"),
        (COUNT, "1.5", "is not a whole number"),
        (COUNT, "-1", "is below the smallest value allowed, 0"),
        (settings.count(1), "0", "is below the smallest value allowed, 1"),
        (COUNT, "none", "is not a whole number"),
        (SECONDS, "soon", "is not a number of seconds or none"),
        (SECONDS, "-0.1", "is below the smallest value allowed, 0"),
        (SECONDS, "1e10", "is above the largest value allowed, 1000000000$"),
        (SIZE, "4MB", r"is not a number of bytes \(KiB, MiB and GiB may follow\)"),
        (SIZE, "KiB", "is not a number of bytes"),
        (FLAG, "perhaps", "is not true or false"),
        (FLAG, "", "is not true or false"),
        (WORD, "jsn", r"is not one of text, json; did you mean 'json'\?"),
        (WORD, "xml", r"is not one of text, json$"),
    ],
)
def test_wrong_text_is_refused_and_says_what_is_right(kind, written, said):
    """The message describes the values that there are."""
    with pytest.raises(ValueError, match=said):
        kind.parse(written)


@pytest.mark.parametrize("written", ["nan", "inf", "-inf", "1e400"])
def test_a_time_is_a_finite_number(written):
    """``inf`` and ``nan`` would break the first wait that they reach; "none" is the word for no end."""
    with pytest.raises(ValueError, match="^is "):
        SECONDS.parse(written)


@pytest.mark.parametrize(
    "kind, value",
    [(COUNT, 3), (SECONDS, 2), (SECONDS, 2.5), (SECONDS, None), (FLAG, True), (FLAG, 1), (TEXT, b"raw"), (LIST, ())],
)
def test_values_of_the_right_type_are_taken(kind, value):
    """Programs give values, and they stay what they are."""
    assert kind.check(value) == value


@pytest.mark.parametrize(
    "kind, value", [(COUNT, True), (COUNT, 1.0), (COUNT, None), (SECONDS, True), (FLAG, None), (WORD, 1), (TEXT, 1)]
)
def test_values_of_another_type_are_refused(kind, value):
    """True is no number, and None is a value only where the setting says so."""
    assert not kind.fits(value)
    with pytest.raises(ValueError, match="^is not "):
        kind.check(value)


def test_a_flag_is_true_or_false_whatever_stood_for_it():
    """http.server writes ``allow_reuse_address = 1``."""
    assert FLAG.check(1) is True
    assert FLAG.check(0) is False


# ── precedence ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_flag_environment_file_keyword_attribute_default(operator, declare, monkeypatch, tmp_path):
    """Each source wins over those after it; taking them away one by one shows the next."""
    declare("patience", settings.count(), 1, serve=2)
    owner = type("Owner", (), {"patience": 3, "__module__": "program"})()
    values = Settings(owner, {"patience": 4})
    path = tmp_path / "harken.toml"
    path.write_text("patience = 5\n")
    operator.load(path)
    monkeypatch.setenv("HARKEN_PATIENCE", "6")
    operator.flags["patience"] = "7"

    assert values.find("patience") == (7, "flag --patience")
    del operator.flags["patience"]
    assert values.find("patience") == (6, "environment HARKEN_PATIENCE")
    monkeypatch.delenv("HARKEN_PATIENCE")
    assert values.find("patience") == (5, f"file {path}")
    operator.file.clear()
    assert values.find("patience") == (4, "keyword argument")
    assert Settings(owner).find("patience") == (3, "class attribute program.Owner.patience")
    assert Settings(object()).find("patience") == (1, "default of drop-in")
    assert Settings(object(), profile="serve").find("patience") == (2, "default of serve")


def test_a_live_change_wins_over_all(operator, declare):
    """configure() is the operator's latest word."""
    declare("patience", settings.count(), 1, live=True)
    operator.flags["patience"] = "7"
    values = Settings(object())
    values.configure({"patience": 8})
    assert values.find("patience") == (8, "configure()")


def test_reading_is_late(operator, declare, monkeypatch):
    """What changes after construction is seen at the next reading."""
    declare("patience", settings.count(), 1)
    cls = type("Owner", (), {})
    values = Settings(cls())
    assert values["patience"] == 1
    cls.patience = 2
    assert values["patience"] == 2
    monkeypatch.setenv("HARKEN_PATIENCE", "3")
    assert values["patience"] == 3


def test_the_environment_may_be_left_out(operator, declare, monkeypatch):
    """Plain servers are not moved to another engine by a variable."""
    declare("patience", settings.count(), 1)
    monkeypatch.setenv("HARKEN_PATIENCE", "3")
    assert Settings(object()).find("patience", environment=False).value == 1


def test_a_wrong_value_names_setting_value_and_source(operator, monkeypatch):
    """One line for each place that a wrong value may come from."""
    monkeypatch.setenv("HARKEN_BACKLOG", "many")
    with pytest.raises(ConfigError, match=r"backlog = 'many' \(environment HARKEN_BACKLOG\) is not a whole number"):
        _ = Settings(object())["backlog"]
    operator.flags["backlog"] = "-1"
    with pytest.raises(ConfigError, match=r"backlog = '-1' \(flag --backlog\) is below the smallest value allowed, 0"):
        _ = Settings(object())["backlog"]
    with pytest.raises(ConfigError, match=r"pool_size = -1 \(keyword argument\) is below"):
        Settings(object(), {"pool_size": -1})


def test_keywords_may_be_text_or_values():
    """``backlog="7"`` and ``backlog=7`` are the same."""
    assert Settings(object(), {"backlog": "7"})["backlog"] == Settings(object(), {"backlog": 7})["backlog"] == 7


# ── attributes of programs ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    [object(), None, "nine", 1.5, True, property(lambda self: 9), lambda self: 9],
    ids=lambda v: type(v).__name__,
)
def test_a_class_attribute_of_another_type_is_the_programs_own(declare, value):
    """A subclass may call its own things by the name of a setting."""
    declare("patience", settings.count(), 1)
    assert Settings(type("Owner", (), {"patience": value})())["patience"] == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("engine", "diesel"),
        ("lifetime", -1),
        ("max_connections", 0),
        ("proxy", "http://proxy:1"),
        ("metrics", "statsd"),
        ("allow", ["alice"]),
        ("deny", ("bob",)),
        ("alarm_connections", 0),
    ],
)
def test_a_class_attribute_that_is_not_allowed_is_the_programs_own_where_it_knows_of_no_settings(operator, name, value):
    """Under `harken run`; elsewhere it is a mistake, which is told."""
    owner = type("Owner", (), {name: value})()
    with pytest.raises(harken.ConfigError, match=f"{name} = "):
        _ = Settings(owner)[name]
    operator.unaware = True
    assert Settings(owner)[name] == REGISTRY[name].default


def test_an_instance_attribute_is_the_programs_own(declare):
    """``self.engine = Engine()`` of a car park is no setting, even when the type fits."""
    declare("patience", settings.count(), 1)
    owner = type("Owner", (), {})()
    owner.patience = 9
    assert Settings(owner)["patience"] == 1


def test_an_engine_of_the_programs_own_leaves_the_server_inline():
    """A real server with ``self.engine`` and ``self.workers`` set before ``__init__`` serves as ever."""

    class Garage(TCPServer):
        def __init__(self):
            self.engine = "V8"
            self.workers = ["Ann"]
            super().__init__(("127.0.0.1", 0), harken.BaseRequestHandler)

    with Garage() as server:
        assert serving_of(server).engine_name == "inline"
        assert server.engine == "V8"


def test_the_nearest_class_wins():
    """A subclass's class attribute is read before its parents'."""
    parent = type("Parent", (), {"pool_size": 5})
    child = type("Child", (parent,), {"pool_size": 6})
    assert Settings(parent())["pool_size"] == 5
    assert Settings(child())["pool_size"] == 6


# ── stdlib's names ───────────────────────────────────────────────────────────────────────────────────────────────────

ALIASES = [
    ("backlog", "request_queue_size", 9, SOMAXCONN),
    ("reuse_port", "allow_reuse_port", True, False),
    ("allow_reuse_address", "allow_reuse_address", True, False),
    ("max_packet_size", "max_packet_size", 100, 65535),
    ("max_children", "max_children", 3, 40),
]


@pytest.mark.parametrize("name, alias, value, default", ALIASES)
def test_stdlibs_attribute_counts_on_a_class_and_on_an_instance(name, alias, value, default):
    """Programs set ``request_queue_size`` and the like on either."""

    class Base(harken.ForkingMixIn, UDPServer):
        pass

    bare = Base.__new__(Base)
    assert Settings(bare)[name] == default
    setattr(bare, alias, value)
    assert Settings(bare)[name] == value
    assert Settings(bare).find(name).source == f"attribute {alias}"
    derived = type("Derived", (Base,), {alias: value, "__module__": "program"})
    found = Settings(derived.__new__(derived)).find(name)
    assert found == (value, f"class attribute program.Derived.{alias}")


@pytest.mark.parametrize("server", [TCPServer, socketserver.TCPServer], ids=["harken", "stdlib"])
def test_stdlibs_default_that_nobody_changed_is_no_wish(server):
    """The 5 that stands in the class itself is not what a program asked for."""
    assert Settings(server.__new__(server)).find("backlog") == (SOMAXCONN, "default of drop-in")


def test_stdlibs_default_said_by_the_program_is_a_wish():
    """Who writes ``request_queue_size = 5`` in a class or on an instance gets 5."""
    derived = type("Derived", (TCPServer,), {"request_queue_size": 5})
    assert Settings(derived.__new__(derived))["backlog"] == 5
    plain = TCPServer.__new__(TCPServer)
    plain.request_queue_size = 5
    assert Settings(plain)["backlog"] == 5


def test_a_changed_default_of_stdlibs_counts_for_all(monkeypatch):
    """``TCPServer.request_queue_size = 77`` holds for every server made later."""
    monkeypatch.setattr(TCPServer, "request_queue_size", 77)
    assert Settings(UDPServer.__new__(UDPServer))["backlog"] == 77


@pytest.mark.parametrize("value, backlog", [(0, 0), (1, 1), (-1, None)])
def test_a_queue_may_be_as_small_as_the_kernel_makes_it(value, backlog):
    """listen(2) takes 0; the socket module makes 0 of what is less, which nobody means."""

    class Small(harken.ThreadingTCPServer):
        request_queue_size = value

    with Small(("127.0.0.1", 0), None) as server:
        found = serving_of(server).settings["backlog"]
        assert found == (backlog if backlog is not None else REGISTRY["backlog"].default)


def test_the_class_attributes_are_stdlibs():
    """Whoever reads the attributes finds stdlib's values."""
    for name in ("request_queue_size", "allow_reuse_address", "address_family", "socket_type"):
        assert getattr(TCPServer, name) == getattr(socketserver.TCPServer, name), name
    assert UDPServer.max_packet_size == socketserver.UDPServer.max_packet_size
    assert harken.ForkingMixIn.max_children == socketserver.ForkingMixIn.max_children
    assert BaseServer.timeout is None


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_keyword_is_refused_with_the_nearest_name():
    """A server with a misspelt setting is not made, and leaves no socket."""
    with pytest.raises(
        ConfigError, match=r"unknown setting 'pool_sise' \(keyword argument\); did you mean 'pool_size'\?"
    ):
        TCPServer(("127.0.0.1", 0), harken.BaseRequestHandler, pool_sise=3)


def test_dashes_are_underscores():
    """A setting is found as flags spell it."""
    assert known("pool-size", "a test").name == "pool_size"


def test_a_setting_is_found_before_its_module_is_imported(run_program):
    """Nothing but ``harken.settings`` was imported, and yet the setting of a room is known."""
    program = "from harken.settings import known; print(known('pool_queue', 'test').default)"
    process = run_program("-c", program)
    assert process.communicate(timeout=20)[0] == "128\n"


def test_flag_and_variable_follow_from_the_name():
    """One declaration, three spellings."""
    declared = known("pool_size", "a test")
    assert (declared.flag, declared.variable) == ("--pool-size", "HARKEN_POOL_SIZE")


def test_every_default_is_a_value_of_its_own_kind():
    """Both columns hold what the declaration itself would accept."""
    for declared in settings.declare_all().values():
        assert declared.kind.check(declared.default) == declared.default, declared.name
        assert declared.kind.check(declared.serve) == declared.serve, declared.name
        assert declared.meaning
        assert declared.origin


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_gives_values_and_leaves_bind_to_the_command(operator, tmp_path):
    """``bind`` is no setting but an address."""
    path = tmp_path / "harken.toml"
    path.write_text('bind = ["tcp://:1"]\npool-size = 3\nlog_format = "json"\nallow_reuse_address = true\n')
    operator.load(path)
    values = Settings(object())
    assert (values["pool_size"], values["log_format"], values["allow_reuse_address"]) == (3, "json", True)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"pool_size = ", "is not TOML: "),
        (b"pool_size = 1\npool_size = 2", "is not TOML: "),
        (b"log_file = '\xff'", "is not TOML: "),
        (b"pool_sise = 3", r"unknown setting 'pool_sise' \(file .*\); did you mean 'pool_size'\?"),
    ],
)
def test_a_wrong_file_is_one_clear_line(operator, tmp_path, content, said):
    """The message names the file and what is wrong in it."""
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        operator.load(path)
    assert "wrong.toml" in str(caught.value)
    assert operator.file == {}


@pytest.mark.parametrize("name, why", [("missing.toml", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_says_why(operator, tmp_path, name, why):
    """The operating system's reason is in the line."""
    with pytest.raises(ConfigError, match=f"cannot read the configuration file .*{why}"):
        operator.load(tmp_path / name)


def test_a_wrong_value_in_a_file_names_the_file(operator, tmp_path):
    """The type is checked when the value is read."""
    path = tmp_path / "harken.toml"
    path.write_text("pool_size = [1]\n")
    operator.load(path)
    with pytest.raises(ConfigError, match=r"pool_size = \(1,\) \(file .*harken.toml\) is not a whole number"):
        _ = Settings(object())["pool_size"]


# ── live ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_live_cannot_be_configured():
    """The message says by which flag a restart sets it."""
    with pytest.raises(ConfigError, match="engine cannot change while the server runs; restart it with --engine"):
        Settings(object()).configure({"engine": "pool"})


@pytest.mark.parametrize(
    "wrong", [{"engine": "pool"}, {"pool_queue": -1}, {"pool_queue": "many"}, {"pol_queue": 1}], ids=str
)
def test_all_changes_are_made_or_none(wrong):
    """One wrong setting among several leaves every one as it was."""
    values = Settings(object())
    with pytest.raises(ConfigError):
        values.configure({"pool_size": 3, **wrong})
    assert values["pool_size"] == 32


def test_live_changes_are_one_servers_own():
    """Another server keeps its values."""
    first, second = Settings(object()), Settings(object())
    first.configure({"pool_size": "3"})
    assert (first["pool_size"], second["pool_size"]) == (3, 32)


def test_configure_reaches_a_running_server():
    """The verb of the server changes what its engine reads."""
    with harken.background(harken.PoolTCPServer(("127.0.0.1", 0), harken.BaseRequestHandler)) as server:
        server.configure(pool_size=2, pool_queue=0)
        engine = serving_of(server).engine
        assert (engine._crew.limit, engine._crew.max_backlog) == (2, 0)
        with pytest.raises(ConfigError, match="unknown setting"):
            server.configure(pool_sise=2)
