"""The chart's values: the schema knows each of them, its README explains it, and a wrong one is refused by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import yaml
from charts import CHART, helm, leaves, needs_helm, nested, values_list
from repository import ROOT

from udpwatch.agent.config import SETTINGS, Setting
from udpwatch.dns.option_table import OPTIONS

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())

#: Settings that are no values, each for a reason.
SET_BY_THE_CHART = {
    "metrics_listen": "the pod's address, metrics.port",
    "node": "spec.nodeName",
    "dns": "dns.enabled",
    "dns_conf": "made from dns",
    **dict.fromkeys(("heal", "heal_process", "heal_namespace", "heal_dry_run"), "heal, healProcesses, ..."),
    "cache": "off: nothing that a container keeps is loaded by the next one",
    "state": "state.enabled",
    "state_keep": "crash: nothing may be left when the release is uninstalled",
    "socket": "the one folder that is there for it",
    "socket_group": "nobody else is in the container",
    "btf": "no other file is there",
    "replay": "no file of events is there",
}

#: Options of the responder that are no lines of dns.options.
_ADDRESS = "dns.address, port 53, is what the kubelet is told"
_FILE = "no such file is there"
DNS_BY_THE_CHART = {
    **dict.fromkeys(("port", "listen-address", "interface", "except-interface"), _ADDRESS),
    **dict.fromkeys(("addn-hosts", "hostsdir", "resolv-file", "conf-file", "conf-dir"), _FILE),
    "no-hosts": "always: the node's hosts are not the pods'",
    "no-resolv": "with dns.upstreamServers",
    "upstream-tcp": "dns.forceTCP",
    "metrics-listen": "metrics.port, and the agent's own",
    **dict.fromkeys(("user", "group"), "the agent needs root"),
    "pid-file": "of `udpwatch dns` only",
}


def refused(values: dict[str, Any]) -> str:
    """Return helm's error for these values."""
    done = helm("template", "udpwatch", str(CHART), values=values)
    assert done.returncode != 0, f"accepted: {values}"
    return done.stderr


def names(message: str, path: Sequence[str]) -> bool:
    """Whether the message names this value, or a part of it."""
    pointer = "/".join(name.replace("/", "~1") for name in path)
    return re.search(f"at '/{pointer}['/]", message) is not None


def merged(trees: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge all values."""
    result: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = merged([result[name], value]) if both else value
    return result


def test_golden_list_of_values() -> None:
    path, begin, end = CHART / "README.md", "<!-- values: begin -->\n", "<!-- values: end -->"
    before, _, rest = path.read_text().partition(begin)
    old, _, after = rest.partition(end)
    if os.environ.get("UDPWATCH_GOLDEN") == "write":
        path.write_text(before + begin + values_list() + end + after)
        old = values_list()
    assert old == values_list(), f"{path} differs: `make golden` rewrites it"


def test_every_value_is_explained() -> None:
    rows = re.findall(r"^- `([\w.]+)`", values_list(), re.MULTILINE)
    for path, _ in leaves(DEFAULTS):
        above = {".".join(path[:length]) for length in range(1, len(path) + 1)}
        assert above & set(rows), f"{'.'.join(path)} has no comment that begins with `# --`"
    assert len(rows) == len(set(rows))


def test_schema_has_all_values_and_no_others() -> None:
    def compare(schema: dict[str, Any], values: dict[str, Any], where: str) -> None:
        schema = SCHEMA["definitions"][schema["$ref"].split("/")[-1]] if "$ref" in schema else schema
        if "properties" not in schema or where in {".config", ".affinity", ".seLinuxOptions"}:  # the user's, or empty
            return
        assert schema["additionalProperties"] is False, where
        assert schema["properties"].keys() == values.keys(), where
        for name, value in values.items():
            if isinstance(value, dict):
                compare(schema["properties"][name], value, f"{where}.{name}")

    others = {"global", "enabled"}  # of charts that have this one as a part
    top = SCHEMA | {"properties": {name: value for name, value in SCHEMA["properties"].items() if name not in others}}
    compare(top, DEFAULTS, "")


def test_settings_are_those_of_the_agent() -> None:
    settings = {setting.name for setting in SETTINGS}
    assert settings >= SET_BY_THE_CHART.keys()
    assert SCHEMA["properties"]["config"]["properties"].keys() == settings - SET_BY_THE_CHART.keys()
    documented = values_list().partition("- `config` ")[2].partition("\n- ")[0]
    assert all(f"`{name}`" in documented for name in settings - SET_BY_THE_CHART.keys())


def test_dns_options_are_those_of_the_responder() -> None:
    pattern = SCHEMA["properties"]["dns"]["properties"]["options"]["items"]["pattern"]
    accepted = pattern.removeprefix("^(").partition(")")[0].split("|")
    options = {option.name for option in OPTIONS if not option.command_line_only}
    assert options >= DNS_BY_THE_CHART.keys()
    assert accepted == [option.name for option in OPTIONS if option.name in options - DNS_BY_THE_CHART.keys()]


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.name not in SET_BY_THE_CHART], ids=lambda s: s.name)
def test_schema_accepts_what_the_agent_accepts(setting: Setting) -> None:
    schema = SCHEMA["properties"]["config"]["properties"][setting.name]
    if "minimum" in schema:
        low, high = schema["minimum"], schema["maximum"]
        assert (setting.parse(low), setting.parse(high)) == (low, high)
        for beyond in (low - 0.01 if schema["type"] == "number" else low - 1, high + 1):
            with pytest.raises(ValueError):
                setting.parse(beyond)
    elif setting.name != "cgroup":
        accepted = {setting.parse(value) for value in schema["enum"]}
        if setting.name != "events":  # any file, to the agent; in the container there is none to write to
            assert accepted == set(type(next(iter(accepted))))


@needs_helm
def test_wrong_type_is_refused_for_every_value() -> None:
    paths = [path for path, _ in leaves(DEFAULTS)]
    message = refused(merged(nested(path, [[]]) for path in paths))  # nothing takes a list of lists
    assert not [path for path in paths if not names(message, path)]


@needs_helm
def test_unknown_name_is_refused_at_every_level() -> None:
    maps = {path[:length] for path, _ in leaves(DEFAULTS) for length in range(len(path))} | {("config",), ("affinity",)}
    maps -= {("dashboards", "labels"), ("nodeSelector",), ("resources", "requests"), ("resources", "limits")}  # free
    message = refused(merged(nested([*path, "tpyo"], "x") for path in maps))
    for path in maps:
        assert f"at '{''.join(f'/{name}' for name in path)}': additional properties 'tpyo' not allowed" in message


PAGES = (CHART / "README.md", ROOT / "docs/kubernetes.md", ROOT / "docs/security.md")


def test_values_named_in_the_docs_exist() -> None:
    known = {".".join(path[:length]) for path, _ in leaves(DEFAULTS) for length in range(1, len(path) + 1)}
    known |= {f"config.{name}" for name in SCHEMA["properties"]["config"]["properties"]} | {"podMonitor.labels.release"}
    for page in (*PAGES, CHART / "templates/NOTES.txt"):
        text = page.read_text()
        named = set(re.findall(r"--set(?:-\w+)? ([\w.]+)=", text))
        named |= set(re.findall(rf"`((?:{'|'.join(DEFAULTS)})\.[\w.]+)", text)) - {"config.v2.json", "heal.c"}
        assert not named - known, page


WRONG = {
    "enabled": ("yes",),
    "config.window": (0, 3601, "30"),
    "config.max_peers": (15, 1.5, 1 << 23),
    "config.max_series": (0, 10_001),
    "config.events_per_second": (0,),
    "config.forget": (0.5, 1e8),
    "config.hooks": ("kprobe", ""),
    "config.forwarded": ("yes", "maybe"),
    "config.events": ("/var/log/events.jsonl",),
    "config.cgroup": ("sys/fs/cgroup", "/a\nwindow = 3"),
    "heal": (53, [0], [65_536], ["53"], ["all", 53], ["off"]),
    "healProcesses": ("snmpd", ["a,b"], [""]),
    "healNamespaces": ("shop", ["Shop"], ["a/b"]),
    "healDryRun": ("yes",),
    "metrics.port": (0, 65_536, "http"),
    "image.repository": ("", "registry.example.org/udpwatch:latest", "Udpwatch"),
    "image.tag": ("a b", "-x"),
    "image.digest": ("sha256:abc", "latest"),
    "image.pullPolicy": ("Sometimes",),
    "imagePullSecrets": (["regcred"], [{"name": ""}]),
    "fullnameOverride": ("Udp_watch",),
    "dns.address": ("169.254.20.10/32", "10.0.0", "lo; reboot", ""),
    "dns.clusterDNS": ("kube-dns", "10.96.0.10#53"),
    "dns.clusterDomain": ("", "cluster.local.", "a/b"),
    "dns.upstreamServers": (["dns.example.org"], ["1.1.1.1:53 "], "1.1.1.1"),
    "dns.options": (
        ["--cache-size=1"],
        ["cache-size=1\nport=5"],
        ["cache size=1"],
        ["dhcp-range=10.0.0.1"],
        ["port=54"],
    ),
    "hostNetwork": ("true", 1),
    "hostPID": ("no",),
    "capabilities.sysResource": ("5.10",),
    "seccompProfile.type": ("runtime/default", ""),
    "seccompProfile.localhostProfile": ("a.json",),
    "appArmorProfile.type": ("unconfined",),
    "resources.limits.memory": ("lots", "256 Mi", [1]),
    "priorityClassName": ("System Critical",),
    "tolerations": ([{"operator": "Always"}], [{"key": 1}], ["Exists"]),
    "nodeSelector": ({"a": True}, {"a": "b c"}, {"a b": "c"}),
    "affinity": ({"nodeAfinity": {}}, []),
    "updateStrategy.type": ("Recreate",),
    "updateStrategy.rollingUpdate.maxUnavailable": (0, "0%", "101%", "ten"),
    "terminationGracePeriodSeconds": (0, 601),
    "startupProbe.failureThreshold": (0,),
    "livenessProbe.periodSeconds": (0, "10s"),
    "podLabels": ({"a": "b c"}, {"a": 1}),
    "podAnnotations": ({"a": 1}, {"/a": "b"}),
    "serviceAccount.name": ("A",),
    "podMonitor.interval": ("30", "1s1m", "often"),
    "serviceMonitor.scrapeTimeout": ("10",),
    "podMonitor.relabelings": (["drop"],),
    "prometheusRule.runbookUrl": ("docs/runbooks", "https://a b"),
    "prometheusRule.disabled": (["HighLoad"], "UdpwatchX"),
    "dashboards.labels": ({"grafana_dashboard": 1},),
    "dashboards.namespace": ("Grafana",),
    "networkPolicy.from": ([{"podSelecter": {}}], {"podSelector": {}}),
}


@needs_helm
@pytest.mark.parametrize("turn", range(max(map(len, WRONG.values()))))
def test_error_names_each_wrong_value(turn: int) -> None:
    """Helm reports all errors at once, so the first wrong value of each goes into one call, then the second one."""
    wrong = {tuple(name.split(".")): values[turn] for name, values in WRONG.items() if turn < len(values)}
    message = refused(merged(nested(path, value) for path, value in wrong.items()))
    assert not {path: value for path, value in wrong.items() if not names(message, path)}


@needs_helm
@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"dns": {"enabled": True}}, "dns.clusterDNS"),
        ({"dns": {"enabled": True, "clusterDNS": "10.96.0.10"}, "hostNetwork": False}, "dns.enabled"),
        ({"dns": {"enabled": True, "clusterDNS": "169.254.20.10"}}, "dns.clusterDNS"),
        ({"capabilities": {"enterNamespaces": True}}, "capabilities.enterNamespaces"),
        ({"healDryRun": True}, "healDryRun needs servers"),
        ({"podMonitor": {"enabled": True}, "serviceMonitor": {"enabled": True}}, "podMonitor.enabled"),
        ({"prometheusRule": {"enabled": True, "disabled": ["UdpwatchNoSuch"]}}, "UdpwatchNoSuch"),
        ({"seccompProfile": {"type": "Localhost"}}, "/seccompProfile/localhostProfile"),
        ({"appArmorProfile": {"type": "Localhost"}}, "/appArmorProfile/localhostProfile"),
        ({"podLabels": {"app.kubernetes.io/name": "x"}}, "podLabels: app.kubernetes.io/name"),
        ({"podAnnotations": {"checksum/config": "x"}}, "podAnnotations: checksum/config"),
        ({"podMonitor": {"labels": {"helm.sh/chart": "x"}}}, "podMonitor.labels: helm.sh/chart"),
        ({"serviceMonitor": {"labels": {"helm.sh/chart": "x"}}}, "serviceMonitor.labels: helm.sh/chart"),
        ({"prometheusRule": {"labels": {"helm.sh/chart": "x"}}}, "prometheusRule.labels: helm.sh/chart"),
        ({"dashboards": {"labels": {"helm.sh/chart": "x"}}}, "dashboards.labels: helm.sh/chart"),
        (
            {"dashboards": {"folder": "Network", "annotations": {"grafana_folder": "x"}}},
            "dashboards.annotations: grafana_folder",
        ),
    ],
)
def test_error_names_values_that_contradict_each_other(values: dict[str, Any], name: str) -> None:
    assert name in refused(values)
