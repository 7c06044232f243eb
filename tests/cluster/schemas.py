"""Schemas of the fields of Kubernetes, KubeRay 1.6 (ray.io/v1) and Compose that our files use; others are mistakes.

From the API references: docs.ray.io/en/master/cluster/kubernetes/references/api.html, kubernetes.io/docs/reference
(Pod v1, NetworkPolicy networking.k8s.io/v1) and docs.docker.com/reference/compose-file.
"""

STRING = {"type": "string"}
INTEGER = {"type": "integer", "minimum": 0}
BOOLEAN = {"type": "boolean"}
ANYTHING: dict = {}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(m|[KMGT]i?)?$"}}


def fields(*required, **known):
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


def several(item):
    return {"type": "array", "items": item}


METADATA = fields(name=STRING, generateName=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS)
RESOURCES = fields("requests", "limits", requests=QUANTITIES, limits=QUANTITIES)
PROBE = fields(
    httpGet=fields("path", "port", path=STRING, port=INTEGER, host=STRING, scheme=STRING),
    exec=fields("command", command=several(STRING)),
    **dict.fromkeys(["initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"], INTEGER),
    successThreshold=INTEGER,
)
SECRET_REFERENCE = fields("name", name=STRING, key=STRING, optional=BOOLEAN)
CONTAINER = fields(
    "name",
    "image",
    "resources",
    name=STRING,
    image=STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    command=several(STRING),
    args=several(STRING),
    env=several(fields("name", name=STRING, value=STRING, valueFrom=fields(secretKeyRef=SECRET_REFERENCE))),
    envFrom=several(fields(secretRef=SECRET_REFERENCE, configMapRef=SECRET_REFERENCE, prefix=STRING)),
    ports=several(fields("containerPort", name=STRING, containerPort=INTEGER, protocol=STRING)),
    volumeMounts=several(fields("name", "mountPath", name=STRING, mountPath=STRING, readOnly=BOOLEAN, subPath=STRING)),
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    startupProbe=PROBE,
    resources=RESOURCES,
    securityContext=fields(
        allowPrivilegeEscalation=BOOLEAN,
        capabilities=fields(drop=several(STRING), add=several(STRING)),
        readOnlyRootFilesystem=BOOLEAN,
        runAsNonRoot=BOOLEAN,
        runAsUser=INTEGER,
    ),
)
POD = fields(
    "containers",
    "securityContext",
    containers=several(CONTAINER),
    initContainers=several(CONTAINER),
    volumes=several(
        fields(
            "name",
            name=STRING,
            persistentVolumeClaim=fields("claimName", claimName=STRING, readOnly=BOOLEAN),
            emptyDir=fields(medium=STRING, sizeLimit=STRING),
            secret=fields("secretName", secretName=STRING),
        )
    ),
    nodeSelector=STRINGS,
    tolerations=several(fields(key=STRING, operator={"enum": ["Equal", "Exists"]}, value=STRING, effect=STRING)),
    serviceAccountName=STRING,
    automountServiceAccountToken=BOOLEAN,
    terminationGracePeriodSeconds=INTEGER,
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    securityContext=fields(
        runAsNonRoot=BOOLEAN,
        runAsUser=INTEGER,
        runAsGroup=INTEGER,
        fsGroup=INTEGER,
        seccompProfile=fields("type", type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
    ),
)
POD_TEMPLATE = fields("spec", metadata=METADATA, spec=POD)
GROUP = {"template": POD_TEMPLATE, "rayStartParams": STRINGS, "resources": STRINGS, "labels": STRINGS}
RAY_CLUSTER_SPEC = fields(
    "headGroupSpec",
    "rayVersion",
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    suspend=BOOLEAN,
    managedBy=STRING,
    headServiceAnnotations=STRINGS,
    gcsFaultToleranceOptions=ANYTHING,
    upgradeStrategy=ANYTHING,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=INTEGER,
        resources=RESOURCES,
        image=STRING,
        imagePullPolicy=STRING,
        env=ANYTHING,
        envFrom=ANYTHING,
        volumeMounts=ANYTHING,
        securityContext=ANYTHING,
        command=several(STRING),
        args=several(STRING),
    ),
    headGroupSpec=fields(
        "template",
        **GROUP,
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        headService=ANYTHING,
        enableIngress=BOOLEAN,
    ),
    workerGroupSpecs=several(
        fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            **GROUP,
            groupName=STRING,
            suspend=BOOLEAN,
            scaleStrategy=ANYTHING,
            **dict.fromkeys(["replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"], INTEGER),
        )
    ),
)


def resource(kind, version, spec):
    named = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}
    return fields(*named, **named)


RAY_CLUSTER = resource("RayCluster", "ray.io/v1", RAY_CLUSTER_SPEC)
RAY_JOB = resource(
    "RayJob",
    "ray.io/v1",
    fields(
        "entrypoint",
        entrypoint=STRING,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        rayClusterSpec=RAY_CLUSTER_SPEC,
        clusterSelector=STRINGS,
        submitterPodTemplate=POD_TEMPLATE,
        submitterConfig=ANYTHING,
        deletionStrategy=ANYTHING,
        metadata=STRINGS,
        managedBy=STRING,
        suspend=BOOLEAN,
        shutdownAfterJobFinishes=BOOLEAN,
        runtimeEnvYAML=STRING,
        jobId=STRING,
        **dict.fromkeys(["ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"], INTEGER),
        **dict.fromkeys(["entrypointNumCpus", "entrypointNumGpus"], {"type": "number"}),
        entrypointResources=STRING,
    ),
)
SELECTOR = fields(matchLabels=STRINGS, matchExpressions=ANYTHING)
NETWORK_POLICY = resource(
    "NetworkPolicy",
    "networking.k8s.io/v1",
    fields(
        "podSelector",
        "policyTypes",
        podSelector=SELECTOR,
        policyTypes=several({"enum": ["Ingress", "Egress"]}),
        ingress=several(
            {
                "type": "object",
                "properties": {
                    "from": several(fields(podSelector=SELECTOR, namespaceSelector=SELECTOR)),
                    "ports": several(fields("port", protocol={"enum": ["TCP", "UDP"]}, port=INTEGER)),
                },
                "additionalProperties": False,
            }
        ),
        egress=ANYTHING,
    ),
)

WAITED_FOR = {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
COMPOSE = {
    "type": "object",
    "required": ["services"],
    "properties": {
        "name": STRING,
        "services": {
            "type": "object",
            "additionalProperties": fields(
                "image",
                image=STRING,
                build=fields("context", context=STRING, dockerfile=STRING, args=STRINGS),
                command=several(STRING),
                environment=STRINGS,
                restart={"enum": ["no", "always", "on-failure", "unless-stopped"]},
                user=STRING,
                working_dir=STRING,
                shm_size=STRING,
                ports=several(STRING),
                volumes=several(STRING),
                cap_drop=several(STRING),
                cap_add=several(STRING),
                read_only=BOOLEAN,
                tmpfs=several(STRING),
                network_mode=STRING,
                entrypoint=several(STRING),
                security_opt=several(STRING),
                depends_on={"type": "object", "additionalProperties": fields("condition", condition=WAITED_FOR)},
                healthcheck=fields(
                    "test", test=several(STRING), interval=STRING, timeout=STRING, retries=INTEGER, start_period=STRING
                ),
            ),
        },
        "volumes": {"type": "object"},
    },
    "patternProperties": {"^x-": ANYTHING},
    "additionalProperties": False,
}
