"""The files in examples/ by which a service is run: they are well-formed, and say the same as harken's settings do."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from harken import settings, transports
from harken.cli import root
from harken.observe import page
from harken.process.workers import GRACE_SECONDS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGES = EXAMPLES.parent / "docs" / "how-to"
READ = ("metrics", "control", "drain_timeout", "drain_jitter")


@pytest.fixture
def options_of(monkeypatch):
    """Return a function that parses a ``harken serve`` as harken does: the settings, and the line's own parts."""

    def parse(words):
        monkeypatch.setattr(settings, "operator", settings.Operator())
        assert words[0].rpartition("/")[2] == "harken"
        params = root.get_command(None, words[1]).make_context(words[1], list(words[2:])).params
        found = {name: settings.Settings(None, profile="serve")[name] for name in READ} | params
        for url in (*found["urls"], found["metrics"]):
            if url is not None:
                transports.for_url(url).parse(url)
        return found

    return parse


def unit(name):
    """Read a unit file: sections, keys, and the values of each."""
    section, found = "", {}
    for line in (EXAMPLES / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault((section, key), []).append(value)
    return found


# ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: systemd)"
)
def test_systemd_finds_nothing_wrong(tmp_path):
    """The units as they are, but for the program, which is not installed here."""
    for name in ("harken.service", "harken.socket"):
        text = (EXAMPLES / name).read_text().replace("/srv/echo/.venv/bin/harken", "/bin/true")
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(map(str, tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if str(tmp_path) in line or "harken." in line]
    assert (done.returncode, said) == (0, [])


def test_the_service_finds_its_socket_and_has_time_to_drain(options_of):
    """The name of the descriptor, the times, and where the control socket lies."""
    service, sock = unit("harken.service"), unit("harken.socket")
    options = options_of(shlex.split(service["Service", "ExecStart"][0]))
    assert options["urls"] == ("fd://" + sock["Socket", "FileDescriptorName"][0],)
    assert int(service["Service", "TimeoutStopSec"][0]) > options["drain_timeout"] + GRACE_SECONDS
    assert options["control"].startswith(f"/run/{service['Service', 'RuntimeDirectory'][0]}/")
    assert service["Service", "KillSignal"] == ["SIGTERM"]
    assert service["Service", "ExecReload"][0].split()[1] == "-HUP"


def test_each_line_of_the_units_is_explained():
    """The how-to names every key but those of the list of what is taken away, which it speaks of as a whole."""
    text = (PAGES / "systemd.md").read_text()
    hardening = (EXAMPLES / "harken.service").read_text().partition("\nNoNewPrivileges")[2]
    for name in ("harken.socket", "harken.service"):
        for section, key in unit(name):
            if section in ("Socket", "Service") and f"\n{key}=" not in hardening:
                assert key in text or key in ("NoNewPrivileges", "ExecStart", "WorkingDirectory"), key


# ── Docker ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_image_is_small_and_not_root(options_of):
    """No compiler in the last stage, a user by number, the program as process 1, a drain at the stop."""
    text = (EXAMPLES / "docker" / "Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    assert "gcc" not in last
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", last, re.MULTILINE)
    words = yaml.safe_load(re.search(r"^CMD (\[.*\])$", last, re.MULTILINE)[1])
    options = options_of(words)
    ports = {url.rpartition(":")[2] for url in (*options["urls"], options["metrics"])}
    assert set(re.search(r"^EXPOSE (.*)$", last, re.MULTILINE)[1].split()) == ports
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", last)
    assert asked[1] == options["metrics"].rpartition(":")[2]
    assert asked[2] in Path(page.__file__).read_text()
    target = (EXAMPLES.parent / re.search(r"^COPY (\S+) /app/app.py$", last, re.MULTILINE)[1]).read_text()
    assert f"class {options['target'].rpartition(':')[2]}(" in target


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_manifest_agrees_with_itself_and_with_harken(options_of):
    """Ports, paths, labels and times."""
    deployment, service = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    template = deployment["spec"]["template"]
    pod = template["spec"]
    (container,) = pod["containers"]
    options = options_of(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert options["urls"] == (f"tcp://:{ports['echo']}",)
    assert options["metrics"] == f"tcp://:{ports['metrics']}"
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])

    for probe, path in (("startup", "/health/ready"), ("readiness", "/health/ready"), ("liveness", "/health/live")):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked == {"path": path, "port": "metrics"}
        assert f'"{path}"' in Path(page.__file__).read_text()

    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["echo"]

    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > sleep + options["drain_timeout"] + GRACE_SECONDS
    assert options["drain_jitter"] < options["drain_timeout"]
    readiness = container["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= sleep
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0


def test_options_that_do_not_exist_are_found(options_of):
    """The parser of these tests is harken's own."""
    with pytest.raises(click.NoSuchOption):
        options_of(["harken", "serve", "app:Echo", "--dran-timeout", "3"])
