"""The chart, rendered by the real helm: valid for Kubernetes, minimal rights, and settings that the agent accepts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from charts import CHART, HELM, NAMESPACE, Manifest, Values, helm, needs_helm, only, render, template
from repository import ROOT

from udpwatch.agent import __version__
from udpwatch.agent.cli import parse
from udpwatch.agent.config import Settings, resolve
from udpwatch.agent.model import Forwarded, HealSelection, Hooks, StateKeep
from udpwatch.dns.options import read_conf
from udpwatch.dns.settings import Server

pytestmark = needs_helm

#: The oldest version that Chart.yaml accepts, and the newest that there are schemas for.
KUBERNETES = ("1.25.0", "1.37.0")

DNS = {"enabled": True, "clusterDNS": "10.96.0.10"}
MONITOR = {
    "enabled": True,
    "labels": {"release": "prometheus"},
    "interval": "30s",
    "scrapeTimeout": "10s",
    "relabelings": [{"targetLabel": "cluster", "replacement": "east", "action": "replace"}],
    "metricRelabelings": [{"sourceLabels": ["__name__"], "regex": "python_.*", "action": "drop"}],
}
SETTINGS = {
    "cgroup": '/host/sys/fs/cgroup/a "b".slice',
    "events": "-",
    "events_per_second": 3,
    "forget": 1e7,
    "forwarded": False,
    "hooks": "cgroup",
    "max_peers": 1 << 22,
    "max_series": 10_000,
    "window": 0.5,
}
MATRIX: dict[str, Values] = {
    "defaults": {},
    "dns": {"dns": DNS},
    "dns-ipv6": {
        "dns": DNS | {"address": "fd00:53::1", "clusterDNS": "fd00:96::a", "upstreamServers": ["1.1.1.1#5353"]}
    },
    "pod-monitor": {"podMonitor": MONITOR},
    "service-monitor": {"serviceMonitor": MONITOR, "service": {"annotations": {"a": "b"}}},
    "service": {"service": {"enabled": True}},
    "rules-and-dashboards": {
        "prometheusRule": {"enabled": True, "labels": {"release": "p"}, "alertLabels": {"team": "net"}},
        "dashboards": {"enabled": True, "namespace": "grafana", "folder": "Network", "annotations": {"a": "b"}},
    },
    "host-pid": {"hostPID": True},
    "netlink": {"hostPID": True, "capabilities": {"enterNamespaces": True}, "config": {"forwarded": "on"}},
    "old-kernel": {"capabilities": {"sysResource": True}},
    "docker-node": {"dockerContainers": True},
    "pod-network": {
        "hostNetwork": False,
        "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]},
    },
    "network-policy": {"networkPolicy": {"enabled": True}},
    "settings": {"config": SETTINGS},
    "state": {"state": {"enabled": True}},
    "heal": {"heal": [69, 161], "config": {"window": 20}},
    "heal-pods": {
        "healProcesses": ["snmpd", "dns-*"],
        "healNamespaces": ["shop"],
        "healDryRun": True,
        "hostPID": True,
        "capabilities": {"enterNamespaces": True},
    },
    "profiles": {
        "dns": DNS,
        "seccompProfile": {"type": "Localhost", "localhostProfile": "udpwatch.json"},
        "appArmorProfile": {"type": "Localhost", "localhostProfile": "udpwatch"},
        "seLinuxOptions": {"level": "s0:c1"},
    },
    "scheduling": {
        "priorityClassName": "",
        "tolerations": [{"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute", "tolerationSeconds": 5}],
        "nodeSelector": {"disk": "ssd"},
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
        "updateStrategy": {"type": "OnDelete"},
        "resources": {"limits": {"cpu": 1, "memory": "1Gi"}},
    },
    "names": {
        "image": {"repository": "registry.example.org:5000/net/udpwatch", "digest": "sha256:" + "a" * 64},
        "imagePullSecrets": [{"name": "regcred"}],
        "nameOverride": "wrong-replies",
        "fullnameOverride": "wrong-replies-east",
        "serviceAccount": {"create": False, "name": "shared"},
        "podLabels": {"team": "net"},
        "podAnnotations": {"prometheus.io/scrape": "true"},
    },
}

#: What the chart uses of the Prometheus Operator's types (its API reference, monitoring.coreos.com/v1), and no more.
DURATION = {"type": "string", "pattern": r"^(0|(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$"}


def closed(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
RELABELING = closed(
    (),
    sourceLabels={"type": "array", "items": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}},
    targetLabel={"type": "string"},
    replacement={"type": "string"},
    regex={"type": "string"},
    action={"enum": ["replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"]},
)
ENDPOINTS = {
    "type": "array",
    "minItems": 1,
    "items": closed(
        ("port",),
        port={"type": "string"},
        path={"type": "string"},
        honorLabels={"type": "boolean"},
        interval=DURATION,
        scrapeTimeout=DURATION,
        relabelings={"type": "array", "items": RELABELING},
        metricRelabelings={"type": "array", "items": RELABELING},
    ),
}
SELECTION = {
    "selector": closed((), matchLabels=TEXTS),
    "namespaceSelector": closed((), any={"type": "boolean"}, matchNames={"type": "array", "items": {"type": "string"}}),
}
RULE = closed(
    ("expr",),
    alert={"type": "string"},
    record={"type": "string"},
    expr={"type": ["string", "integer"]},
    labels=TEXTS,
    annotations=TEXTS,
    keep_firing_for=DURATION,
    **{"for": DURATION},
)
GROUP = closed(("name", "rules"), name={"type": "string"}, interval=DURATION, rules={"type": "array", "items": RULE})
OPERATOR = {
    "PodMonitor": closed(("selector", "podMetricsEndpoints"), podMetricsEndpoints=ENDPOINTS, **SELECTION),
    "ServiceMonitor": closed(("selector", "endpoints"), endpoints=ENDPOINTS, **SELECTION),
    "PrometheusRule": closed(("groups",), groups={"type": "array", "items": GROUP}),
}


def pod(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = only(manifests, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def agent(manifests: list[Manifest]) -> dict[str, Any]:
    (container,) = pod(manifests)["containers"]
    assert container["name"] == "udpwatch"
    return dict(container)


def settings(manifests: list[Manifest], folder: Path, address: str = "192.0.2.7") -> Settings:
    """Resolve the settings from the agent's arguments, environment and mounted files."""
    container = agent(manifests)
    mounted = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    volume = next(volume for volume in pod(manifests)["volumes"] if volume["name"] == "config")
    wanted = volume["configMap"]["name"]
    (config,) = (m for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"] == wanted)
    for name, content in config["data"].items():
        (folder / name).write_text(content)
    values = {"status.podIP": address, "spec.nodeName": "node-1"}
    environment: dict[str, str] = {}
    for variable in container["env"]:
        value = variable.get("value") or values[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        environment[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], value)
    arguments = [argument.replace(mounted, str(folder)) for argument in container["args"]]
    flags = vars(parse(arguments)[1])
    return resolve(flags, environment, Path(flags["config"]))


def test_helm_lint_passes() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_chart_has_the_version_of_the_agent() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}-0"
    done = helm("template", "udpwatch", str(CHART), "--kube-version", "1.24.9")
    assert "chart requires kubeVersion: >=1.25.0-0" in done.stderr


def test_golden_defaults() -> None:
    from golden import compare  # noqa: PLC0415  beside it, there is one way to write golden files

    compare("helm-template.yaml", template())


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", MATRIX)
def test_manifests_are_valid(name: str, version: str) -> None:
    for manifest in render(MATRIX[name], version):
        if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            jsonschema.validate(manifest["spec"], OPERATOR[manifest["kind"]])
        else:
            assert kubernetes_validate.validate(manifest, version, strict=True) == version.rpartition(".")[0]


@pytest.mark.parametrize("version", KUBERNETES)
def test_unknown_field_in_a_manifest_is_noticed(version: str) -> None:
    manifests = render()
    only(manifests, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readonly"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readonly"):
        kubernetes_validate.validate(only(manifests, "DaemonSet"), version, strict=True)


@pytest.mark.parametrize("name", MATRIX)
def test_objects_refer_to_each_other(name: str) -> None:
    manifests = render(MATRIX[name])
    labels = only(manifests, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector", {})
        selected = selector.get("matchLabels", selector)
        owner = labels if manifest["kind"] != "ServiceMonitor" else only(manifests, "Service")["metadata"]["labels"]
        assert selected.items() <= owner.items()
        if not manifest["metadata"]["name"].startswith("udpwatch-dashboard"):
            assert manifest["metadata"]["namespace"] == NAMESPACE
        if selected:  # nothing that changes with a version: a DaemonSet's selector cannot be changed
            assert selected.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
    assert "metrics" in {port["name"] for port in agent(manifests)["ports"]}
    identities = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(identities) == len(set(identities))


# ---- rights ----

BASE = ["BPF", "NET_ADMIN", "PERFMON"]
CAPABILITIES = {
    "dns": [*BASE, "NET_BIND_SERVICE"],
    "dns-ipv6": [*BASE, "NET_BIND_SERVICE"],
    "profiles": [*BASE, "NET_BIND_SERVICE"],
    "old-kernel": [*BASE, "SYS_RESOURCE"],
    "netlink": [*BASE, "SYS_ADMIN", "SYS_PTRACE"],
    "heal-pods": [*BASE, "SYS_ADMIN", "SYS_PTRACE"],
}
HOST_PATHS = {
    "/sys/fs/cgroup": "/host/sys/fs/cgroup",
    "/var/log/pods": "/var/log/pods",
    "/var/log/containers": "/var/log/containers",
}
DOCKER = "/var/lib/docker/containers"


@pytest.mark.parametrize("name", MATRIX)
def test_containers_have_only_the_documented_rights(name: str) -> None:
    manifests = render(MATRIX[name])
    spec = pod(manifests)
    assert {manifest["kind"] for manifest in manifests} <= {
        *("ConfigMap", "DaemonSet", "NetworkPolicy", "PodMonitor", "PrometheusRule", "Service", "ServiceAccount"),
        "ServiceMonitor",
    }, "no Role, no Secret"
    assert spec["automountServiceAccountToken"] is False
    assert spec["hostNetwork"] is (name != "pod-network")
    assert spec["hostPID"] is (name in {"host-pid", "netlink", "heal-pods"})
    assert "hostIPC" not in spec
    assert spec["securityContext"]["seccompProfile"]["type"] == (
        "Localhost" if name == "profiles" else "RuntimeDefault"
    )
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        context = container["securityContext"]
        wanted = ["NET_ADMIN"] if container["name"] == "address" else CAPABILITIES.get(name, BASE)
        assert context == {
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsUser": 0,
            "runAsGroup": 0,
            "capabilities": {"drop": ["ALL"], "add": wanted},
        }


@pytest.mark.parametrize("name", MATRIX)
def test_mounts_are_as_documented(name: str) -> None:
    spec, container = pod(render(MATRIX[name])), agent(render(MATRIX[name]))
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    from_host = {
        volume["hostPath"]["path"]: mounts[key]["mountPath"] for key, volume in volumes.items() if "hostPath" in volume
    }
    bpffs = {"/sys/fs/bpf": "/host/sys/fs/bpf"} if name == "state" else {}
    assert from_host == HOST_PATHS | bpffs | ({DOCKER: DOCKER} if name == "docker-node" else {})
    writable = {mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")}
    assert writable - set(bpffs.values()) == {"/run/udpwatch", "/tmp"}, "nothing that the next start would load"
    for mount in mounts.values():
        volume = volumes[mount["name"]]
        assert mount.get("readOnly") or mount["mountPath"] in bpffs.values() or volume["emptyDir"]["sizeLimit"]
    assert not any("volumeMounts" in init for init in spec.get("initContainers", ()))


def test_every_capability_has_a_reason_and_is_documented() -> None:
    text = (
        (CHART / "templates/daemonset.yaml")
        .read_text()
        .partition("              add:\n")[2]
        .partition("volumeMounts")[0]
    )
    reasons = re.findall(r"((?: +#.*\n)+) +- ([A-Z_]+)\n", text)
    everything = set(BASE).union(*CAPABILITIES.values())
    assert {capability for _, capability in reasons} == everything
    assert all(re.search(r"\b(kernel|net|fs)/[\w/]+\.c\b", reason) for reason, _ in reasons), "each cites the kernel"
    rows = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/kubernetes.md").read_text(), re.MULTILINE)
    assert set(rows) == everything


@pytest.mark.parametrize("kind", ["", "RuntimeDefault", "Unconfined", "Localhost"])
def test_apparmor_is_an_annotation_before_kubernetes_1_30_and_a_field_since(kind: str) -> None:
    profile = "udpwatch" if kind == "Localhost" else ""
    values = {"dns": DNS, "appArmorProfile": {"type": kind, "localhostProfile": profile}}
    annotation = {"RuntimeDefault": "runtime/default", "Unconfined": "unconfined", "Localhost": "localhost/udpwatch"}
    prefix = "container.apparmor.security.beta.kubernetes.io/"

    def found(version: str) -> tuple[dict[str, str], dict[str, str] | None]:
        manifests = render(values, version)
        annotations = only(manifests, "DaemonSet")["spec"]["template"]["metadata"]["annotations"]
        field = pod(manifests)["securityContext"].get("appArmorProfile")
        return {name: value for name, value in annotations.items() if name.startswith(prefix)}, field

    by_annotation = {prefix + name: annotation[kind] for name in ("udpwatch", "address")} if kind else {}
    by_field = ({"type": kind} | ({"localhostProfile": profile} if profile else {})) if kind else None
    assert found("1.29.9") == (by_annotation, None)
    assert found("1.30.0-gke.100") == found("1.37.0") == ({}, by_field)


def test_agent_that_enters_namespaces_is_not_confined_by_apparmor() -> None:
    assert pod(render(MATRIX["netlink"]))["securityContext"]["appArmorProfile"] == {"type": "Unconfined"}


# ---- settings ----


@pytest.mark.parametrize("name", MATRIX)
def test_agent_accepts_its_configuration(name: str, tmp_path: Path) -> None:
    manifests = render(MATRIX[name])
    found = settings(manifests, tmp_path)
    assert found.metrics_listen is not None
    (port,) = (port for port in agent(manifests)["ports"] if port["name"] == "metrics")
    assert (found.metrics_listen.host, found.metrics_listen.port) == ("192.0.2.7", port["containerPort"])
    assert found.node == "node-1"
    writable = [mount["mountPath"] for mount in agent(manifests)["volumeMounts"] if not mount.get("readOnly")]
    assert str(found.socket.parent if found.socket else "") in writable
    assert found.cache is None
    assert found.dns is ("dns" in MATRIX[name])
    if found.dns:
        assert found.dns_conf
        assert read_conf(found.dns_conf).listen_addresses


def test_pods_end_removes_what_is_kept_on_the_node(tmp_path: Path) -> None:
    """A pod cannot know whether it is updated or uninstalled."""
    found = settings(render({"state": {"enabled": True}}), tmp_path)
    assert (found.state, found.state_keep) == (Path("/host/sys/fs/bpf/udpwatch"), StateKeep.CRASH)
    assert settings(render(), tmp_path).state is None


def test_metrics_are_served_on_an_ipv6_address(tmp_path: Path) -> None:
    listen = settings(render(), tmp_path, "fd00::7").metrics_listen
    assert listen is not None
    assert (listen.host, listen.port) == ("fd00::7", 9953)


def test_settings_reach_the_agent_unchanged(tmp_path: Path) -> None:
    found = settings(render(MATRIX["settings"]), tmp_path)
    given = SETTINGS | {"hooks": Hooks.CGROUP, "forwarded": Forwarded.OFF}
    assert {name: getattr(found, name) for name in SETTINGS} == given


@pytest.mark.parametrize(
    ("values", "selected"),
    [
        ({}, None),
        (MATRIX["heal"], HealSelection(ports=frozenset({69, 161}))),
        (
            MATRIX["heal-pods"],
            HealSelection(all_ports=True, processes=("snmpd", "dns-*"), namespaces=("shop",), dry_run=True),
        ),
        ({"heal": ["all"]}, HealSelection(all_ports=True)),
        ({"heal": ["standby"]}, HealSelection()),
    ],
    ids=str,
)
def test_agent_heals_what_the_values_select(values: Values, selected: HealSelection | None, tmp_path: Path) -> None:
    assert settings(render(values), tmp_path).healing == selected


def test_dns_forwards_cluster_names_to_the_cluster_and_others_to_the_nodes_servers(tmp_path: Path) -> None:
    manifests = render(MATRIX["dns"])
    found = settings(manifests, tmp_path)
    assert found.dns_conf
    dns = read_conf(found.dns_conf)
    domains = {b"\x07cluster\x05local\0", b"\x07in-addr\x04arpa\0", b"\x03ip6\x04arpa\0"}
    assert {item.domain: item.servers for item in dns.domain_servers} == dict.fromkeys(domains, (Server("10.96.0.10"),))
    assert (dns.hosts, dns.resolv, dns.servers) == (False, True, ())
    assert pod(manifests)["dnsPolicy"] == "Default", "the node's resolv.conf"

    values = {"dns": DNS | {"upstreamServers": ["192.0.2.1", "2001:db8::1#5353"], "options": ["cache-size=7"]}}
    values["dns"]["forceTCP"] = True
    (tmp_path / "more").mkdir()
    conf = settings(render(values), tmp_path / "more").dns_conf
    assert conf
    dns = read_conf(conf)
    assert (dns.resolv, dns.servers, dns.cache_size) == (False, (Server("192.0.2.1"), Server("2001:db8::1", 5353)), 7)
    assert dns.upstream_tcp


@pytest.mark.parametrize(("name", "address"), [("dns", "169.254.20.10/32"), ("dns-ipv6", "fd00:53::1/128")])
def test_dns_address_is_added_and_removed_with_the_pod(name: str, address: str) -> None:
    manifests = render(MATRIX[name])
    (init,) = pod(manifests)["initContainers"]
    put = ["ip", "address", "replace", address, "dev", "lo", "scope", "host"]
    hooks = {name: hook["exec"]["command"] for name, hook in agent(manifests)["lifecycle"].items()}
    assert init["command"] == put
    assert hooks == {"postStart": put, "preStop": ["ip", "address", "del", address, "dev", "lo"]}
    ports = [(port["protocol"], port["hostIP"]) for port in agent(manifests)["ports"] if port["hostPort"] == 53]
    assert ports == [("UDP", address.partition("/")[0]), ("TCP", address.partition("/")[0])]


def test_changed_settings_restart_the_pods() -> None:
    def checksum(values: Values) -> str:
        annotations = only(render(values), "DaemonSet")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    every = [
        {},
        {"config": {"window": 60}},
        {"config": {"window": 61}},
        {"heal": [69]},
        {"dns": DNS},
        {"dns": DNS | {"options": ["no-ident"]}},
    ]
    assert len({checksum(values) for values in every}) == len(every)
    assert checksum({}) == checksum({"podMonitor": {"enabled": True}})


def test_probes_request_pages_that_the_agent_serves() -> None:
    container = agent(render())
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    health, ready = {"path": "/healthz", "port": "metrics"}, {"path": "/readyz", "port": "metrics"}
    assert asked == {"startup": health, "liveness": health, "readiness": ready}
    patience = container["livenessProbe"]
    assert patience["periodSeconds"] * patience["failureThreshold"] >= 120, (
        "a flood on the port is no reason to restart"
    )


@pytest.mark.parametrize("name", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_probe_can_be_disabled(name: str) -> None:
    every = {"startupProbe", "livenessProbe", "readinessProbe"}
    assert {key for key in agent(render({name: None})) if key.endswith("Probe")} == every - {name}


def test_nodes_without_a_kernel_of_their_own_are_excluded() -> None:
    """Each requirement of the one term excludes only those nodes: NotIn is true for nodes without the label."""
    affinity = pod(render())["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    found = {each["key"]: (each["operator"], each["values"]) for each in term["matchExpressions"]}
    assert found == {
        "eks.amazonaws.com/compute-type": ("NotIn", ["fargate"]),
        "type": ("NotIn", ["virtual-kubelet"]),
    }
    assert "affinity" not in pod(render({"affinity": None}))


# ---- Prometheus, Grafana ----


MONITORS = {"pod-monitor": ("PodMonitor", "podMetricsEndpoints"), "service-monitor": ("ServiceMonitor", "endpoints")}


@pytest.mark.parametrize(("name", "kind", "endpoints"), [(name, *each) for name, each in MONITORS.items()])
def test_monitors_keep_the_senders_labels_and_add_the_node(name: str, kind: str, endpoints: str) -> None:
    monitor = only(render(MATRIX[name]), kind)
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"][endpoints]
    assert endpoint["honorLabels"] is True
    node, job, *more = endpoint["relabelings"]
    assert (node["sourceLabels"], node["targetLabel"]) == (["__meta_kubernetes_pod_node_name"], "node")
    assert (job["targetLabel"], job["replacement"]) == ("job", "udpwatch")
    assert more == MONITOR["relabelings"]
    assert endpoint["metricRelabelings"] == MONITOR["metricRelabelings"]
    assert (endpoint["interval"], endpoint["scrapeTimeout"]) == ("30s", "10s")


@pytest.mark.parametrize("name", ["pod-monitor", "service-monitor"])
def test_alerts_find_the_job_under_any_release_name(name: str) -> None:
    """UdpwatchAgentDown looks for udpwatch in the job's name, so the job's name must not depend on object names."""
    monitor = only(render(MATRIX[name] | {"nameOverride": "wrong-replies"}), MONITORS[name][0])
    (endpoint,) = monitor["spec"][MONITORS[name][1]]
    jobs = [each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"]
    (down,) = (rule["expr"] for rule in alerts(SOURCE) if rule["alert"] == "UdpwatchAgentDown")
    assert all(re.fullmatch(pattern, job) for pattern in re.findall(r'job=~"(.+?)"', down) for job in jobs)
    assert jobs


def alerts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in spec["groups"] for rule in group["rules"] if "alert" in rule]


SOURCE = yaml.safe_load((CHART / "files/alerts.yaml").read_text())


def test_rules_are_those_of_the_file_by_default() -> None:
    assert only(render({"prometheusRule": {"enabled": True}}), "PrometheusRule")["spec"] == SOURCE


def test_rules_take_labels_runbook_urls_and_exclusions() -> None:
    out, *kept = (rule["alert"] for rule in alerts(SOURCE))
    values = {
        "enabled": True,
        "alertLabels": {"team": "net"},
        "disabled": [out],
        "runbookUrl": "https://git.example.org/udpwatch/",
    }
    spec = only(render({"prometheusRule": values}), "PrometheusRule")["spec"]
    assert [rule["alert"] for rule in alerts(spec)] == kept
    for rule in alerts(spec):
        assert rule["labels"]["team"] == "net"
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        runbook = f"https://git.example.org/udpwatch/docs/runbooks/{rule['alert']}.md"
        assert rule["annotations"]["runbook_url"] == runbook


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(only(render(MATRIX["rules-and-dashboards"]), "PrometheusRule")["spec"]))
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sum(len(group['rules']) for group in SOURCE['groups'])} rules found" in done.stdout


def test_documented_scrape_has_the_relabelling_of_the_monitors() -> None:
    (block,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.DOTALL)
    endpoint = only(render(MATRIX["pod-monitor"]), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    (scrape,) = yaml.safe_load(block)["scrape_configs"]
    assert scrape["honor_labels"] is endpoint["honorLabels"]
    keep, node = scrape["relabel_configs"]
    assert scrape["job_name"] == endpoint["relabelings"][1]["replacement"]
    assert (node["source_labels"], node["target_label"]) == (["__meta_kubernetes_pod_node_name"], "node")
    assert keep["regex"] == f"udpwatch;{endpoint['port']}"


def test_dashboards_are_in_the_configmaps_unchanged() -> None:
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "files/grafana").glob("*.json")}
    maps = [m for m in render(MATRIX["rules-and-dashboards"]) if m["metadata"]["namespace"] == "grafana"]
    assert files
    assert {name: json.loads(text) for manifest in maps for name, text in manifest["data"].items()} == files
    for manifest in maps:
        assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert manifest["metadata"]["annotations"] == {"grafana_folder": "Network", "a": "b"}
        assert len(json.dumps(manifest)) < 1 << 20, "an object of Kubernetes holds 1 MB"


# ---- the package, the notes ----


def test_package_has_the_files_and_renders_the_same(tmp_path: Path) -> None:
    done = subprocess.run([HELM, "package", CHART, "-d", tmp_path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    values = MATRIX["rules-and-dashboards"]
    done = helm(
        "template", "udpwatch", str(package), "--namespace", NAMESPACE, "--kube-version", "1.37.0", values=values
    )
    assert done.stdout == template(values)


@pytest.mark.parametrize("value", ["prometheusRule", "dashboards"])
@pytest.mark.parametrize("how", ["left out", "text"])
def test_chart_without_its_linked_files_is_refused(value: str, how: str, tmp_path: Path) -> None:
    """Flux leaves out links; a checkout on Windows turns them into files that hold a path."""
    chart = tmp_path / "udpwatch"
    shutil.copytree(CHART, chart, symlinks=True)
    for link in (chart / "files").iterdir():
        target = str(link.readlink())
        link.unlink()
        if how == "text":
            link.write_text(target)
    done = helm("template", "udpwatch", str(chart), values={value: {"enabled": True}})
    assert done.returncode != 0
    assert f"{value}.enabled: files/" in done.stderr
    assert "helm package helm/udpwatch" in done.stderr
    assert helm("template", "udpwatch", str(chart)).returncode == 0


def test_chart_works_as_a_subchart(tmp_path: Path) -> None:
    dependency = {
        "name": "udpwatch",
        "version": ">=0",
        "repository": f"file://{CHART}",
        "condition": "udpwatch.enabled",
    }
    chart = {"apiVersion": "v2", "name": "platform", "version": "1.0.0", "dependencies": [dependency]}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(chart))
    command = [HELM, "dependency", "update", tmp_path]
    subprocess.run(command, check=True, capture_output=True, env={"HOME": str(tmp_path)})
    for wanted in (True, False):
        values = {"udpwatch": {"enabled": wanted, "podMonitor": {"enabled": True}}, "global": {"region": "east"}}
        done = helm("template", "platform", str(tmp_path), values=values)
        assert done.returncode == 0, done.stderr
        assert ("kind: DaemonSet" in done.stdout) is wanted


def notes(values: Values) -> str:
    done = helm("install", "udpwatch", str(CHART), "--namespace", NAMESPACE, "--dry-run=client", values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:\n")[2]


def test_notes_say_what_to_do_next() -> None:
    text = notes({})
    for command in (
        f"kubectl -n {NAMESPACE} rollout status daemonset/udpwatch",
        "udpwatch doctor --agent",
        f"kubectl label namespace {NAMESPACE} --overwrite pod-security.kubernetes.io/enforce=privileged",
        "udpwatch top",
        f"kubectl get --raw /api/v1/namespaces/{NAMESPACE}/pods/POD:9953/proxy/metrics",
        "--set podMonitor.enabled=true",
        "--set prometheusRule.enabled=true",
        "--set dashboards.enabled=true",
    ):
        assert command in text
    assert max(map(len, text.splitlines())) <= 140
    done = notes(
        {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}}
    )
    assert "--set" not in done
    assert "clusterDNS" in notes({"dns": DNS})
    assert f"kubectl -n {NAMESPACE} exec POD -- udpwatch heal off" in notes({"heal": [69]})
    assert "heal" not in text


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({}, 'image.repository is "udpwatch"'),
        ({"hostNetwork": False}, "hostNetwork is off"),
        ({"networkPolicy": {"enabled": True}}, "networkPolicy has no effect"),
        ({"hostPID": True}, "can signal, and so end, all of root's processes"),
        (MATRIX["netlink"], "equal root on the node"),
        ({"healNamespaces": ["shop"]}, "only servers with hostNetwork are healed"),
        ({"heal": [69], "hostNetwork": False}, "nothing is healed"),
        ({"seccompProfile": {"type": "Unconfined"}}, "seccompProfile.type is Unconfined"),
        ({"prometheusRule": {"enabled": True}}, "prometheusRule.runbookUrl is empty"),
    ],
)
def test_notes_warn_of_risks(values: Values, warning: str) -> None:
    assert warning in " ".join(notes(values).split())
    assert not values or warning not in " ".join(notes({}).split())


def test_notes_have_no_warning_by_default() -> None:
    assert "Mind:" not in notes({"image": {"repository": "registry.example.org/udpwatch"}})
