"""Schemas, versions and security of the deployment files, as far as they can be checked without a cloud."""

import json
import re
import shlex
import tomllib
import urllib.request
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from schemas import COMPOSE, NETWORK_POLICY, RAY_CLUSTER, RAY_JOB

from cluster.session import LOCAL_ENVIRONMENT
from raydit import __version__

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
VERSION = __version__
RAY_VERSION = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


RAY_UP, COMPOSE_FILE = load("ray-up.aws.yaml"), load("compose.yaml")
CLUSTER, POLICY = yaml.safe_load_all((DEPLOY / "raycluster.yaml").read_text())
JOB_POLICY, JOB = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
PODS = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
SERVICES = COMPOSE_FILE["services"]


def ray_schema():
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.mark.parametrize(
    ("content", "schema"),
    [
        (RAY_UP, ray_schema()),
        (CLUSTER, RAY_CLUSTER),
        (POLICY, NETWORK_POLICY),
        (JOB_POLICY, NETWORK_POLICY),
        (JOB, RAY_JOB),
        (COMPOSE_FILE, COMPOSE),
    ],
    ids=["ray-up", "RayCluster", "NetworkPolicy", "NetworkPolicy of the job", "RayJob", "compose"],
)
def test_every_field_is_known_and_of_its_type(content, schema):
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(content, schema, cls=jsonschema.Draft7Validator)


@pytest.mark.parametrize(
    ("content", "schema", "path", "value"),
    [
        (RAY_UP, ray_schema(), ("idle_timeout_minute",), 5),
        (CLUSTER, RAY_CLUSTER, ("spec", "headGroupSpec", "rayStartParam"), {}),
        (CLUSTER, RAY_CLUSTER, ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (JOB, RAY_JOB, ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "nodeselector"), {}),
        (COMPOSE_FILE, COMPOSE, ("services", "s3", "port"), []),
    ],
)
def test_a_mistake_is_found(content, schema, path, value):
    broken = json.loads(json.dumps(content))
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema, cls=jsonschema.Draft7Validator)


def test_images_and_ray_are_those_of_this_version():
    text = "".join(path.read_text() for path in FILES)
    assert set(re.findall(r"raydit:([\w.]+)", text)) == {VERSION}
    assert CLUSTER["spec"]["rayVersion"] == RAY_VERSION


def test_every_image_is_built_here_or_has_a_place_for_its_digest():
    """No digest is written here: none was looked up where it could be compared with the publisher's."""
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)\nFROM \$\{PYTHON_IMAGE\}$", DOCKERFILE, re.MULTILINE)[1]
    assert SERVICES["ray-head"]["build"]["args"] == {"PYTHON_IMAGE": f"${{PYTHON_IMAGE:-{base}}}"}
    example = (DEPLOY / "env.example").read_text()
    assert f"# PYTHON_IMAGE={base}@sha256:DIGEST" in example
    for service in SERVICES.values():
        if service["image"] != f"raydit:{VERSION}":  # built by ray-head
            name, default = re.fullmatch(r"\$\{(\w+):-(\S+)\}", service["image"]).groups()
            assert re.search(r":\S*\d", default) and f"# {name}={default}@sha256:DIGEST" in example
    pods = [pod["template"]["spec"] for pod in PODS] + [JOB["spec"]["submitterPodTemplate"]["spec"]]
    pushed = {container["image"] for pod in pods for container in pod["containers"]} | {RAY_UP["docker"]["image"]}
    assert pushed == {f"REGISTRY/raydit:{VERSION}@sha256:DIGEST"}


def test_the_job_has_the_same_cluster_and_network_policy_as_raycluster_yaml():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]
    assert JOB_POLICY["spec"] == POLICY["spec"]
    assert JOB_POLICY["metadata"]["namespace"] == JOB["metadata"]["namespace"]
    # `kubectl create` of a fixed name would fail the second time.
    assert set(JOB_POLICY["metadata"]) & {"name", "generateName"} == {"generateName"}


def test_the_command_of_the_job_is_a_raydit_command_on_a_recipe_of_the_image():
    from pipelines.cli.main import cli
    from pipelines.cli.submission.command_line import CommandLine
    from pipelines.config.reader import load_recipe

    program, *texts = shlex.split(JOB["spec"]["entrypoint"])
    command = CommandLine.read(cli, texts)
    assert program == "raydit" and command.recipe and command.recipe.startswith("/opt/raydit/recipes/")
    config = load_recipe(ROOT / "pipelines" / "recipes" / Path(command.recipe).name, command.overrides)
    assert config.output.startswith(PODS[0]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"])


def test_heads_run_no_tasks_and_workers_are_autoscaled():
    assert RAY_UP["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in SERVICES["ray-head"]["command"] and "--num-gpus=0" in SERVICES["ray-head"]["command"]
    start = CLUSTER["spec"]["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
    assert CLUSTER["spec"]["enableInTreeAutoscaling"]
    workers = {name: node for name, node in RAY_UP["available_node_types"].items() if name != RAY_UP["head_node_type"]}
    for worker in workers.values():
        assert worker["min_workers"] == 0 < worker["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(worker["max_workers"] for worker in workers.values()) == RAY_UP["max_workers"]
    for group in CLUSTER["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == 0 < group["maxReplicas"] and "spot" in str(
            group["template"]["spec"]["nodeSelector"]
        )


def test_every_pod_has_probes_shared_storage_and_tracking_and_is_not_root():
    for pod in PODS:
        spec = pod["template"]["spec"]
        (container,) = spec["containers"]
        assert container["readinessProbe"] and container["livenessProbe"]
        assert spec["securityContext"]["runAsUser"] == 1000
        assert {volume["name"] for volume in spec["volumes"]} >= {mount["name"] for mount in container["volumeMounts"]}
        assert "MLFLOW_TRACKING_URI" in {variable["name"] for variable in container["env"]}
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert POLICY["spec"]["podSelector"]["matchLabels"].items() <= pod["template"]["metadata"]["labels"].items()


def test_every_container_has_no_more_privileges_than_it_needs():
    dropped = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in [*PODS, {"template": JOB["spec"]["submitterPodTemplate"]}]:
        spec = pod["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert [container["securityContext"] for container in spec["containers"]] == [dropped]
        # The head's autoscaler asks Kubernetes for pods; nothing else has a token of Kubernetes.
        assert pod is PODS[0] or spec["automountServiceAccountToken"] is False
    assert CLUSTER["spec"]["autoscalerOptions"]["securityContext"] == dropped
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("cap_add", []) == (["CHOWN"] if name == "owner" else [])
        assert "privileged" not in service and (service.get("user") != "0:0" or service["network_mode"] == "none")
        for mount in service.get("volumes", []):
            assert not mount.startswith(".") or mount.endswith(":ro"), "a file of this folder is not written to"
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges:true"} <= set(RAY_UP["docker"]["run_options"])


def test_containers_in_which_jobs_run_hold_no_administrators_keys():
    def secrets_of(name):
        return set(re.findall(r"\$\{(\w+):\?", json.dumps(SERVICES[name])))

    for name in ("ray-head", "ray-worker"):
        assert secrets_of(name) == {"RAY_AUTH_TOKEN", "S3_PASSWORD", "MLFLOW_PASSWORD"}
    holders = {name: secrets_of(name) & {"S3_ROOT_PASSWORD", "MLFLOW_ADMIN_PASSWORD"} for name in SERVICES}
    assert {name: keys for name, keys in holders.items() if keys} == {
        "s3": {"S3_ROOT_PASSWORD"},
        "bucket": {"S3_ROOT_PASSWORD"},
        "mlflow": {"MLFLOW_ADMIN_PASSWORD"},
        "mlflow-user": {"MLFLOW_ADMIN_PASSWORD"},
    }
    users = {SERVICES["s3"]["environment"]["MINIO_ROOT_USER"], SERVICES["ray-head"]["environment"]["AWS_ACCESS_KEY_ID"]}
    assert users == {"root", "raydit"}
    policy = json.loads((DEPLOY / "minio-policy.json").read_text())
    resources = {resource for statement in policy["Statement"] for resource in statement["Resource"]}
    assert resources == {"arn:aws:s3:::raydit", "arn:aws:s3:::raydit/*"}
    assert not [action for statement in policy["Statement"] for action in statement["Action"] if "*" in action]


def test_no_secret_is_in_a_command_line():
    for name, service in SERVICES.items():
        words = [*service["command"], *service.get("entrypoint", [])] if "command" in service else service["entrypoint"]
        assert not any("$" in word for word in words), name
    options = " ".join(RAY_UP["docker"]["run_options"])
    assert not re.search(r"--env \w*(PASSWORD|SECRET|TOKEN|KEY)=", options)


def test_a_token_is_required_everywhere():
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token", "secretName": "raydit-token"}
    assert "--env RAY_AUTH_MODE=token" in RAY_UP["docker"]["run_options"]
    assert RAY_UP["file_mounts"] == {"/home/raydit/.ray/auth_token": "~/.ray/auth_token"}
    assert re.search(r"^ENV RAY_AUTH_MODE=token", DOCKERFILE, re.MULTILINE)
    for name in ("ray-head", "ray-worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "--app-name=basic-auth" in SERVICES["mlflow"]["command"]


def test_nothing_is_published_beyond_this_machine():
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", []))
    head = " ".join(RAY_UP["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in head
    assert CLUSTER["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "security_group" not in RAY_UP["provider"]  # Ray would add SSH from 0.0.0.0/0 to it
    assert all(node["node_config"]["SecurityGroupIds"] for node in RAY_UP["available_node_types"].values())
    from_elsewhere = [rule for rule in POLICY["spec"]["ingress"] if {"podSelector": {}} in rule["from"]]
    assert [rule["ports"] for rule in from_elsewhere] == [[{"protocol": "TCP", "port": 8265}]]
    assert any(part.startswith("--allowed-hosts=") and "*" not in part for part in SERVICES["mlflow"]["command"])


def test_no_secret_is_written_in_any_file():
    """Every value with a secret name comes from an environment variable that must be set, or from a secret."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|_TOKEN$", name):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
            assert not re.search(r"://[^/@:]*:(?!\$\{|\d)", value), name
    lines = (DEPLOY / "env.example").read_text().splitlines()
    assert all(line.startswith("#") or line.endswith("=") or not line for line in lines)
    needed = {name for service in SERVICES.values() for name in re.findall(r"\$\{(\w+):\?", json.dumps(service))}
    assert {line[:-1] for line in lines if line.endswith("=")} == needed
    for path in FILES:
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{40,}\b", path.read_text()), path.name
    for container in (pod["template"]["spec"]["containers"][0] for pod in PODS):
        assert not [each for each in container["env"] if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", each["name"])]


def instructions():
    """Return the instructions of the Dockerfile with their arguments, with continuation lines joined."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_dockerfile_is_pinned_small_and_not_root():
    steps = instructions()
    names = [name for name, _ in steps]
    assert names[:2] == ["ARG", "FROM"] and (names.count("ARG"), names.count("FROM")) == (1, 1)
    assert [argument for name, argument in steps if name == "USER"] == ["raydit"]
    assert "RUN" not in names[names.index("USER") :]
    assert "ADD" not in names
    for name, argument in steps:
        if name in ("ENV", "COPY"):
            assert not re.search(r"PASSWORD|SECRET|TOKEN=|ACCESS_KEY|auth_token|\.env\b", argument)
        if name == "RUN" and "apt-get install" in argument:
            assert "--no-install-recommends" in argument and "rm -rf /var/lib/apt/lists" in argument
        if name == "RUN" and "pip install" in argument:
            assert "--no-cache-dir" in argument and ("--constraint" in argument or "--no-deps" in argument)
            assert all(
                "==" in requirement for requirement in re.findall(r'"([\w-]+[^" ]*)"', argument.split("pip", 1)[1])
            )
            # Without it, pip would fetch a back end of any version.
            assert "--no-build-isolation" in argument or not re.search(r"pip install.* \. ", argument)


def test_what_builds_raydit_is_pinned_as_everything_else():
    pins = set(re.findall(r"^[\w.-]+==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    named = {requirement for _, argument in instructions() for requirement in re.findall(r'"([\w-]+==\S+)"', argument)}
    assert requires and set(requires) <= named <= pins


def test_the_image_sets_the_same_malloc_options_as_a_local_ray():
    given = dict(part.split("=") for name, argument in instructions() if name == "ENV" for part in argument.split())
    ours = {name: value for name, value in LOCAL_ENVIRONMENT.items() if name.startswith("MALLOC")}
    assert ours and ours.items() <= given.items()


def test_the_build_context_holds_exactly_the_files_that_the_dockerfile_copies():
    copied = {part for name, argument in instructions() if name == "COPY" for part in argument.split()[:-1]}
    assert all((ROOT / part).exists() for part in copied)
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore and {line[1:] for line in ignore if line.startswith("!")} == copied


def test_services_wait_only_for_services_that_report_readiness():
    for service in SERVICES.values():
        for other, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert SERVICES[other]["healthcheck"]
            else:
                assert "restart" not in SERVICES[other], "a service whose end is waited for must not restart"
    mounts = {mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])}
    files = {mount for mount in mounts if mount.startswith("./")}
    assert mounts - files == set(COMPOSE_FILE["volumes"])
    assert all((DEPLOY / file).is_file() for file in files)


def test_probes_answer_without_a_token_and_nothing_else_does(ray_head):
    probes = [PODS[0]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"]]
    probes += re.findall(r"8265(/[\w/]+)", json.dumps(SERVICES["ray-head"]["healthcheck"]))
    for path in probes:
        assert urllib.request.urlopen(ray_head.address + path, timeout=10).status == 200
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(ray_head.address + path, timeout=10)


def test_the_readme_names_every_file_and_every_port_that_is_opened():
    readme = (ROOT / "cluster" / "README.md").read_text()
    assert [path.name for path in FILES if path.name not in readme and path.suffix != ".dockerignore"] == []
    text = "".join(path.read_text() for path in FILES)
    ports = {int(port) for port in re.findall(r"(?:containerPort: |port: |port=|127\.0\.0\.1:)(\d{4,5})", text)}
    assert ports >= {6379, 8265, 5000} and [port for port in ports if str(port) not in readme] == []
    assert "CVE-2023-48022" in readme
