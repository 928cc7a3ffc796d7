"""Checks what deploy/ ships, without a cluster: schemas, security, and that the parts fit each other and the binary.

usage: check_manifests.py        (needs kubectl, systemd-analyze and requirements.txt)
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import kubernetes_validate
import yaml

DEPLOY = Path(__file__).resolve().parents[1]
OVERLAYS = ["insecure", "tls"]
MONITORED = "monitored"
# Kinds of other projects, whose schemas are not in the package.
FOREIGN_GROUPS = {"cert-manager.io", "monitoring.coreos.com"}
KUBERNETES = "1.32"
# Lower is better; systemd calls everything below 2.0 "OK".
MOST_EXPOSURE = 2.0


def known_variables() -> set[str]:
    """The settings that the binary takes from its environment."""
    source = (DEPLOY.parent / "crates/moerun/src/settings/environment.rs").read_text()
    return set(re.findall(r'^\s*\("(MOERUN_\w+)", "\w+", Form::', source, re.M))


def render(overlay: str) -> list[dict]:
    text = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes/overlays" / overlay)],
        check=True, capture_output=True, text=True,
    ).stdout
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(objects: list[dict], kind: str) -> list[dict]:
    return [it for it in objects if it["kind"] == kind]


def pods(objects: list[dict]) -> list[tuple[str, dict]]:
    """Name and pod template of each workload."""
    workloads = of_kind(objects, "Deployment") + of_kind(objects, "StatefulSet")
    return [(it["metadata"]["name"], it["spec"]["template"]) for it in workloads]


def restricted_violations(template: dict) -> list[str]:
    """What the Pod Security Standard "restricted" forbids."""
    spec = template["spec"]
    pod = spec.get("securityContext", {})
    found = []
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            found.append(key)
    allowed_volumes = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for volume in spec.get("volumes", []):
        if not allowed_volumes & volume.keys():
            found.append(f"volume {volume['name']}")
    for container in spec["containers"] + spec.get("initContainers", []):
        own = container.get("securityContext", {})
        either = lambda key: own.get(key, pod.get(key))
        if own.get("privileged"):
            found.append("privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        if either("runAsNonRoot") is not True or either("runAsUser") == 0:
            found.append("runAsNonRoot")
        if (either("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccompProfile")
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append("capabilities")
        if any("hostPort" in port for port in container.get("ports", [])):
            found.append("hostPort")
        # Not of the standard, but ours.
        if own.get("readOnlyRootFilesystem") is not True:
            found.append("readOnlyRootFilesystem")
    return found


def environment(objects: list[dict], container: dict) -> dict[str, str]:
    maps = {it["metadata"]["name"]: it["data"] for it in of_kind(objects, "ConfigMap")}
    values = {}
    for source in container.get("envFrom", []):
        values.update(maps[source["configMapRef"]["name"]])
    values.update({it["name"]: it["value"] for it in container.get("env", [])})
    return values


def test_objects_follow_the_schemas():
    for overlay in OVERLAYS:
        for it in render(overlay):
            if it["apiVersion"].split("/")[0] not in FOREIGN_GROUPS:
                kubernetes_validate.validate(it, KUBERNETES, strict=True)
    broken = of_kind(render("tls"), "StatefulSet")[0]
    broken["spec"]["replicaz"] = 1
    try:
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError:
        return
    raise AssertionError("a field that does not exist was not found")


def test_pods_are_restricted():
    for overlay in OVERLAYS:
        objects = render(overlay)
        assert len(pods(objects)) == 2
        for name, template in pods(objects):
            assert restricted_violations(template) == [], name
            assert template["spec"]["automountServiceAccountToken"] is False, name
        assert of_kind(objects, "Namespace")[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    # The check finds what it is for.
    _, template = pods(render("tls"))[0]
    for spoil, wanted in [
        (lambda pod, box: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
        (lambda pod, box: pod["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda pod, box: box["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]), "capabilities"),
        (lambda pod, box: box["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
        (lambda pod, box: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}), "volume host"),
    ]:
        spoilt = copy.deepcopy(template)
        spoil(spoilt["spec"], spoilt["spec"]["containers"][0])
        assert wanted in restricted_violations(spoilt), wanted


def test_settings_are_those_of_the_binary():
    known = known_variables()
    assert len(known) > 20
    for overlay in OVERLAYS:
        objects = render(overlay)
        for name, template in pods(objects):
            for container in template["spec"]["containers"]:
                unknown = environment(objects, container).keys() - known
                assert not unknown, f"{overlay}/{name}: {unknown}"
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    for name, service in compose["services"].items():
        unknown = {it for it in service.get("environment", {}) if it.startswith("MOERUN_")} - known
        assert not unknown, f"compose/{name}: {unknown}"


def test_every_shard_has_its_workers_and_the_gateway_knows_them():
    for overlay in OVERLAYS:
        objects = render(overlay)
        workers = of_kind(objects, "StatefulSet")[0]
        count = workers["spec"]["replicas"]
        service = workers["spec"]["serviceName"]
        assert service in {it["metadata"]["name"] for it in of_kind(objects, "Service") if it["spec"].get("clusterIP") == "None"}
        told = environment(objects, workers["spec"]["template"]["spec"]["containers"][0])
        assert told["MOERUN_SHARD"] == f"ordinal/{count}"
        assert 2 <= int(told["MOERUN_REPLICAS"]) <= count
        gateway = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]
        port = told["MOERUN_LISTEN"].rpartition(":")[2]
        names = [f"{workers['metadata']['name']}-{i}.{service}:{port}" for i in range(count)]
        assert environment(objects, gateway)["MOERUN_WORKER"].split(",") == names


def test_ports_probes_and_selectors_meet():
    for overlay in OVERLAYS:
        objects = render(overlay)
        labels = {name: template["metadata"]["labels"] for name, template in pods(objects)}
        for name, template in pods(objects):
            spec, container = template["spec"], template["spec"]["containers"][0]
            told = environment(objects, container)
            ports = {it["name"]: it["containerPort"] for it in container["ports"]}
            assert str(ports["health"]) == told["MOERUN_HEALTH_ADDR"].rpartition(":")[2]
            for probe, service in [("startupProbe", "startup"), ("readinessProbe", "readiness"), ("livenessProbe", "liveness")]:
                assert container[probe]["grpc"] == {"port": ports["health"], "service": service}, f"{name} {probe}"
            mounts = {it["name"] for it in container["volumeMounts"]}
            assert mounts == {it["name"] for it in spec["volumes"]}, name
            # The pause for endpoints to be told comes out of the same time as the drain of 120 or 10 seconds.
            pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert spec["terminationGracePeriodSeconds"] >= pause + (120 if "gateway" in name else 10) + 30
        for kind, path in [("Service", ["spec", "selector"]), ("PodDisruptionBudget", ["spec", "selector", "matchLabels"])]:
            found = of_kind(objects, kind)
            assert len(found) == 2
            for it in found:
                selector = it
                for key in path:
                    selector = selector[key]
                chosen = [name for name, own in labels.items() if selector.items() <= own.items()]
                assert len(chosen) == 1, f"{kind} {it['metadata']['name']} selects {chosen}"
        policies = {it["metadata"]["name"]: it["spec"] for it in of_kind(objects, "NetworkPolicy")}
        assert policies["moerun-default-deny"]["podSelector"] == {}
        [ingress] = policies["moerun-worker"]["ingress"]
        assert ingress["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"


def test_prometheus_reads_every_pod_and_only_metrics():
    objects = render(MONITORED)
    for it in objects:
        if it["apiVersion"].split("/")[0] not in FOREIGN_GROUPS:
            kubernetes_validate.validate(it, KUBERNETES, strict=True)
    [monitor] = of_kind(objects, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    [service] = [it for it in of_kind(objects, "Service") if wanted.items() <= it["metadata"]["labels"].items()]
    [endpoint] = monitor["spec"]["endpoints"]
    [port] = service["spec"]["ports"]
    assert endpoint["port"] == port["name"] and endpoint["path"] == "/metrics"
    [policy] = [it["spec"] for it in of_kind(objects, "NetworkPolicy") if it["metadata"]["name"] == "moerun-metrics"]
    assert [it["port"] for it in policy["ingress"][0]["ports"]] == [port["targetPort"]]
    for name, template in pods(objects):
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items(), name
        container = template["spec"]["containers"][0]
        ports = {it["name"]: it["containerPort"] for it in container["ports"]}
        assert environment(objects, container)["MOERUN_METRICS_ADDR"].rpartition(":")[2] == str(ports[port["targetPort"]])


def test_compose_prometheus_and_grafana_fit_the_cluster():
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"]
    monitoring = DEPLOY / "monitoring"
    prometheus = yaml.safe_load((monitoring / "prometheus.yaml").read_text())
    [job] = prometheus["scrape_configs"]
    targets = {target for it in job["static_configs"] for target in it["targets"]}
    told = {f"{name}:{it['environment']['MOERUN_METRICS_ADDR'].rpartition(':')[2]}"
            for name, it in compose.items() if "MOERUN_METRICS_ADDR" in it.get("environment", {})}
    assert targets == told, targets ^ told
    mounted = {it["target"] for it in compose["prometheus"]["volumes"]}
    assert set(prometheus["rule_files"]) < mounted
    for name in ["prometheus", "grafana"]:
        for it in compose[name]["volumes"]:
            assert (DEPLOY / "docker" / it["source"]).is_file(), it["source"]
    [source] = yaml.safe_load((monitoring / "datasource.yaml").read_text())["datasources"]
    dashboard = json.loads((monitoring / "dashboard.json").read_text())
    assert len(dashboard["panels"]) >= 8
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"] and panel["targets"], panel["title"]
    [group] = yaml.safe_load((monitoring / "rules.yaml").read_text())["groups"]
    assert all(rule["expr"] and rule["annotations"]["summary"] for rule in group["rules"])


def test_compose_runs_without_privileges():
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    ours = compose["services"]
    wanted = {"gateway", "worker-0", "worker-1", "worker-2", "worker-3", "etcd", "prometheus", "grafana"}
    assert wanted == ours.keys()
    for name, service in ours.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["user"].split(":")[0] not in ("", "0", "root"), name
        assert "no-new-privileges:true" in service["security_opt"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_units_are_hardened_and_valid():
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        analysis = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True
        )
        level = re.search(r"Overall exposure level for \S+: ([\d.]+)", analysis.stdout)
        assert level, analysis.stdout + analysis.stderr
        assert float(level[1]) < MOST_EXPOSURE, f"{unit.name}: {level[1]}"
        with tempfile.TemporaryDirectory() as folder:
            # Verification wants a binary that exists.
            copied = Path(folder) / unit.name.replace("@", "@0")
            copied.write_text(unit.read_text().replace("/usr/local/bin/moerun", "/bin/true"))
            verified = subprocess.run(["systemd-analyze", "verify", str(copied)], capture_output=True, text=True)
        complaints = [line for line in verified.stderr.splitlines() if "moerun" in line]
        assert verified.returncode == 0 and not complaints, verified.stderr


def main() -> int:
    tests = [(name, it) for name, it in globals().items() if name.startswith("test_")]
    if shutil.which("kubectl") is None:
        print("kubernetes manifests: SKIPPED, no kubectl")
        tests = [(name, it) for name, it in tests if "compose" in name or "units" in name]
    failed = 0
    for name, test in tests:
        try:
            test()
            print(f"{name} ... ok")
        except Exception:
            failed += 1
            print(f"{name} ... FAILED")
            traceback.print_exc()
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
