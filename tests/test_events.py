"""Events: subscribing, unsubscribing, and observers that break."""

import os
import threading
import time

import pytest

from harken import events
from harken.errors import ConfigError


@pytest.fixture
def seen():
    """A list that collects events for the length of the test; subscribe ``seen.append``."""
    before = dict(events.subscribers)
    yield []
    events.subscribers.update(before)


def test_a_subscriber_gets_the_events_that_it_named(seen):
    """Other names do not reach it."""
    events.subscribe(seen.append, "opened", "closed")
    events.emit("opened", connection="a")
    events.emit("paused", reason="b")
    events.emit("closed", reason="c")
    assert [(event.name, event.fields) for event in seen] == [
        ("opened", {"connection": "a"}),
        ("closed", {"reason": "c"}),
    ]


def test_without_names_it_gets_them_all(seen):
    """No name means every name."""
    events.subscribe(seen.append)
    for name in events.NAMES:
        events.emit(name)
    assert [event.name for event in seen] == list(events.NAMES)


def test_unsubscribe_ends_it_and_may_be_repeated(seen):
    """After the returned function was called nothing arrives; a second call is harmless."""
    end = events.subscribe(seen.append, "opened", "closed")
    events.emit("opened")
    end()
    end()
    events.emit("opened")
    events.emit("closed")
    assert [event.name for event in seen] == ["opened"]


def test_unsubscribing_twice_takes_nothing_from_another(seen):
    """Each subscription ends once, also when one callback has two."""
    first = events.subscribe(seen.append, "opened")
    events.subscribe(seen.append, "opened")
    first()
    first()
    events.emit("opened")
    assert len(seen) == 1


def test_an_unknown_name_is_refused_with_the_nearest(seen):
    """Nothing is subscribed then, not even the names before it."""
    with pytest.raises(ConfigError, match=r"'opend'; did you mean 'opened'\?"):
        events.subscribe(seen.append, "closed", "opend")
    events.emit("closed")
    assert seen == []


@pytest.mark.parametrize("arguments", [("closed", print), (None,), (7, "closed")], ids=repr)
def test_a_callback_that_cannot_be_called_is_refused(arguments):
    """By the order in which arguments are taken, since they may have changed places."""
    with pytest.raises(ConfigError, match=r"cannot be called: subscribe\(\) takes a callback, and then the names"):
        events.subscribe(*arguments)


def test_a_raising_observer_disturbs_nobody(seen, capsys):
    """The next observer is told, the emitter goes on, and stderr says whose fault it was."""

    def broken(event):
        raise RuntimeError("observer's fault")

    events.subscribe(broken, "opened")
    events.subscribe(seen.append, "opened")
    events.emit("opened")
    assert len(seen) == 1
    printed = capsys.readouterr().err
    assert "an observer of 'opened' raised" in printed
    assert "RuntimeError: observer's fault" in printed


def test_nobody_listening_costs_no_event(monkeypatch):
    """With no subscriber no Event is made."""
    assert not events.subscribers["upgrade_failed"]
    monkeypatch.setattr(events, "Event", None)
    events.emit("upgrade_failed", reason="x")  # would raise: None is not callable


def test_an_observer_may_unsubscribe_while_it_is_told(seen):
    """The one being told ends its own subscription, and the others still hear of this event."""
    ends = []

    def once(event):
        ends[0]()
        seen.append("once")

    ends.append(events.subscribe(once, "opened"))
    events.subscribe(seen.append, "opened")
    events.emit("opened")
    events.emit("opened")
    assert seen.count("once") == 1
    assert len(seen) == 3


class Meeting(dict):
    """Subscribers, of which the reader of one name is met by somebody else before it writes."""

    def __init__(self, known, meet):
        super().__init__(known)
        self._meet = meet

    def __getitem__(self, name):
        """Read one name's, and let the other come once."""
        found = super().__getitem__(name)
        meet, self._meet = self._meet, lambda: None
        meet()
        return found


@pytest.mark.parametrize("elsewhere", [True, False], ids=["in another thread", "in a signal handler"])
def test_of_changes_that_meet_none_is_lost(seen, monkeypatch, elsewhere):
    """Neither of two threads, nor of a thread and a signal handler that comes in between."""
    others = []

    def subscribe_another():
        other = threading.Thread(target=lambda: others.append(events.subscribe(seen.append, "opened")))
        others.append(other)
        if elsewhere:
            other.start()
            other.join(0.2)  # it must wait for us
        else:
            other.run()

    monkeypatch.setattr(events, "subscribers", Meeting(events.subscribers, subscribe_another))
    end = events.subscribe(seen.append, "opened")
    if elsewhere:
        others[0].join()
    events.emit("opened")
    assert len(seen) == 2
    end()
    others[1]()
    events.emit("opened")
    assert len(seen) == 2


def test_a_child_that_is_forked_in_the_midst_of_a_change_can_make_others():
    """The thread that makes it stayed in the parent."""
    with events._changes._lock:
        pid = os.fork()
        if pid == 0:
            other = threading.Thread(target=lambda: events.subscribe(print, "opened"), daemon=True)
            other.start()
            other.join(10.0)
            os._exit(other.is_alive())
    assert os.waitpid(pid, 0)[1] == 0


def test_fields_are_attributes_and_absent_ones_are_none():
    """``event.reason`` reads a field; one that the event does not carry is None."""
    before = time.time()
    event = events.Event("closed", {"reason": "killed"})
    assert event.reason == "killed"
    assert event.connection is None
    assert before <= event.time <= time.time()
    assert repr(event) == "<Event closed reason='killed'>"


def test_special_methods_are_not_made_up():
    """copy and pickle ask for ``__deepcopy__`` and the like, and must learn that there is none."""
    with pytest.raises(AttributeError):
        _ = events.Event("closed", {}).__deepcopy__


def test_an_unknown_name_cannot_be_emitted():
    """A misspelt name in the core fails at once instead of reaching nobody."""
    with pytest.raises(KeyError):
        events.emit("opend")
