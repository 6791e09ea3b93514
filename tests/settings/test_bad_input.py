"""Whatever is wrong with the files: one line each, all at once, with file, place, value and remedy."""

from typing import Any

import pytest

from tests.conftest import AUTHORITY, Project
from vllm_unified.errors import ConfigError

CHAT = {"name": "a", "type": "chat"}
SECRET = "sk-of-theirs"


def remote(*endpoints: Any, **fields: Any) -> dict[str, Any]:
    return {"a": {**CHAT, "endpoints": list(endpoints), **fields}}


def lines_of(project: Project, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        project.load(environ)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("models", "line"),
    [
        (
            '{"models": {"chat": {"name": "x",}}}',
            "config/models.json: line 1, column 34: Expecting property name enclosed in double quotes "
            "(JSON allows no comma before a closing bracket)",
        ),
        ("", "config/models.json: line 1, column 1: Expecting value"),
        ("[]", "config/models.json: []: should be an object in braces"),
        ("[" * 100_000, "config/models.json: nested too deep"),
        (
            '{"models": {"a": {}, "a": {}}}',
            'config/models.json: the key "a" stands twice in one object; rename or remove one',
        ),
        ("{}", 'config/models.json: "models" is missing'),
        ({}, "config/models.json: models: at least one is needed"),
        ({"a": {"type": "chat"}}, 'config/models.json: models.a: "name" is missing'),
        (
            {"a": {**CHAT, "max_modellen": 1}},
            'config/models.json: models.a: nothing reads "max_modellen"; did you mean "max_model_len"?',
        ),
        (
            {"a": {**CHAT, "type": "vision"}},
            "config/models.json: models.a.type: \"vision\": choose one of 'chat', 'embedding', 'rerank' or 'ocr'",
        ),
        (
            {"a": {**CHAT, "tensor_parallel_size": 0}},
            "config/models.json: models.a.tensor_parallel_size: 0: should be greater than or equal to 1",
        ),
        (
            {"a": {**CHAT, "gpu_memory_utilization": 1.5}},
            "config/models.json: models.a.gpu_memory_utilization: 1.5: should be less than or equal to 1",
        ),
        (
            {"a": {**CHAT, "port": "8001"}},
            'config/models.json: models.a.port: "8001": should be a valid integer',
        ),
        (
            {"a": CHAT, "b": {**CHAT, "name": "b"}},
            'config/models.json: models.b.port: 8001 is already used by "a"; choose another',
        ),
        (
            {"a": {**CHAT, "port": 8000}},
            "config/models.json: models.a.port: 8000 is already used by the router; choose another",
        ),
        (
            {"a": CHAT, "b": {"name": "b", "type": "ocr", "aliases": ["a"]}},
            'config/models.json: models.b.name: the name "a" is already used by "a"; every name must lead to one model',
        ),
        ({"a": {**CHAT, "enabled": False}}, "config/models.json: models: every model is disabled; enable at least one"),
        (
            {"router": CHAT},
            'config/models.json: models: the key "router" is taken by a part of the deployment; choose another',
        ),
        ({"a": {**CHAT, "gpus": [0, 0]}}, "config/models.json: models.a: gpus [0, 0] names a GPU twice"),
        (
            {"a": {**CHAT, "cuda_device": "0,1"}},
            "config/models.json: models.a: gpus names 2 of them, but tensor_parallel_size × pipeline_parallel_size "
            "is 1; name 1, or leave gpus out",
        ),
        (
            {"a": {**CHAT, "engine_args": {"max_num_seq": 4, "host": "x", "enforce-eager": "yes"}}},
            'config/models.json: models.a.engine_args: vLLM\'s server has no flag "max_num_seq"; did you mean '
            '"max-num-seqs"?; "host" is set by the deployment; use VLLM_ENGINE_HOST; "enforce-eager" is a switch: '
            'true or false, not "yes"',
        ),
        (
            {"a": {**CHAT, "engine_args": {"dtype": "auto"}}},
            'config/models.json: models.a.engine_args: "dtype" is a field of the model; write it beside engine_args, '
            "not in it",
        ),
        ({"a": {**CHAT, "repo": "../x"}}, None),
        (
            {"a": {**CHAT, "env": {"VLLM_API_KEY": "x"}}},
            'config/models.json: models.a.env: "VLLM_API_KEY" is set by the deployment; use .env',
        ),
        (
            {"a": {**CHAT, "env": {"A": "x\0y"}}},
            "config/models.json: holds the character \\u0000, which no command line can carry; remove it",
        ),
        (
            '{"models": {"a": {"name": "a", "type": "chat", "startup_timeout": Infinity}}}',
            "config/models.json: cannot be read as JSON: Infinity is no number in JSON",
        ),
        (
            {"a-b": CHAT, "a_b": {"name": "b", "type": "ocr"}},
            'config/models.json: models.a_b: is the same as "a-b" but for case and dashes; rename one',
        ),
        (
            remote("gpu-2:8000"),
            'config/models.json: models.a.endpoints.0.url: "gpu-2:8000" is no address of a server; use '
            "http://HOST:PORT/v1 or https://HOST/v1",
        ),
        (
            remote(f"http://me:{SECRET}@gpu-2"),
            "config/models.json: models.a.endpoints.0.url: an address has no user name in it; put the key into api_key",
        ),
        (
            remote({"url": "http://gpu-2", "wieght": 2}),
            'config/models.json: models.a.endpoints.0: nothing reads "wieght"; did you mean "weight"?',
        ),
        (
            remote({"url": "http://gpu-2", "api_key": f"{SECRET} x"}),
            "config/models.json: models.a.endpoints.0.api_key: use printable ASCII without spaces; it travels in an "
            "HTTP header",
        ),
        (
            remote({"url": "http://gpu-2", "api_key": "$THEIR_KEY"}),
            "config/models.json: models.a.endpoints.0.api_key: the variable THEIR_KEY is not set; set it in .env, as "
            "THEIR_KEY=KEY",
        ),
        (
            {"a": {**CHAT, "endpoints": {"api_key": SECRET}}},
            'config/models.json: models.a.endpoints: {"api_key": "…"}: should be a valid list',
        ),
        (
            remote("http://gpu-2/v1", {"url": "http://gpu-2", "weight": 2}),
            'config/models.json: models.a.endpoints.1.url: "http://gpu-2" stands twice; remove one, or give it a '
            "larger weight",
        ),
        (
            remote("http://localhost:8000/v1"),
            'config/models.json: models.a.endpoints.0.url: "http://localhost:8000" is the router itself, so that a '
            "request would never end; name another",
        ),
        (
            remote({"url": "http://gpu-2", "ca": "ca.pem"}),
            "config/models.json: models.a.endpoints.0: ca is for an https address; remove it, or write https in url",
        ),
        (
            remote("http://gpu-2", gpus=[0], port=8001),
            "config/models.json: models.a: its endpoints alone serve it, and port and gpus would be of an engine on "
            "this machine; remove that, or say in path or repo which weights an engine here serves",
        ),
    ],
)
def test_models_json(project: Project, models: Any, line: str | None) -> None:
    project.write(models)
    lines = lines_of(project)
    assert len(lines) == 1
    assert SECRET not in lines[0]
    if line is not None:
        assert lines == [line]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "0.0.0.0", "10.1.2.3"])
def test_no_endpoint_is_the_router_itself(project: Project, host: str) -> None:
    listening = {"VLLM_ROUTER_HOST": "10.1.2.3", "VLLM_ROUTER_PORT": "9000"}
    project.write(remote(f"http://{host}:9000"))
    assert "is the router itself" in lines_of(project, listening)[0]
    project.write(remote(f"http://{host}:9001", "http://10.1.2.4:9000"))
    assert len(project.load(listening).models[0].endpoints) == 2


def test_the_authority_of_an_endpoint(project: Project) -> None:
    project.write(remote({"url": "https://gpu-2", "ca": "config/ca.pem"}))
    file = project.home / "config" / "ca.pem"
    (line,) = lines_of(project)
    place = f"config/models.json: models.a.endpoints.0.ca: {file}"
    remedy = "name the PEM file of the authority"
    assert line == f"{place}: No such file or directory; {remedy}"
    file.write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    (line,) = lines_of(project)
    assert line == f"{place}: no certificate in PEM form in it; {remedy}"
    file.write_bytes(AUTHORITY.read_bytes())
    assert project.load().models[0].endpoints[0].ca == str(file)


def test_the_key_of_an_endpoint_is_taken_from_a_variable_and_shown_nowhere(project: Project) -> None:
    project.write({**remote({"url": "http://gpu-2", "api_key": "$THEIR_KEY"}), "here": {"name": "h", "type": "ocr"}})
    (project.home / ".env").write_text(f"THEIR_KEY={SECRET}\nNCCL_DEBUG=INFO\n")
    settings = project.load()
    endpoint = settings.models[0].endpoints[0]
    assert endpoint.api_key == SECRET
    assert SECRET not in repr(settings) + settings.models[0].model_dump_json()
    assert settings.engine_env == {"NCCL_DEBUG": "INFO"}
    assert "THEIR_KEY" in settings.own_variables  # those that no engine gets
    (project.home / ".env").write_text(f"THEIR_KEY='{SECRET} {SECRET}'\n")
    assert lines_of(project) == [
        ".env: THEIR_KEY: use printable ASCII without spaces; it travels in an HTTP header",
    ]


def test_a_variable_of_an_endpoint_is_no_typo(project: Project) -> None:
    (project.home / ".env").write_text(f"VLLM_API_KEYS={SECRET}\n")
    project.write(remote({"url": "http://gpu-2", "api_key": "$VLLM_API_KEYS"}))
    assert project.load().models[0].endpoints[0].api_key == SECRET


def test_what_counts_only_for_the_enabled_is_not_checked_of_a_disabled_entry(project: Project) -> None:
    off = {**CHAT, "enabled": False, "endpoints": [{"url": "http://localhost:8000", "api_key": "$UNSET"}]}
    project.write({"a": CHAT, "b": {**CHAT, "enabled": False}, "c": off})
    settings = project.load()
    assert [model.key for model in settings.models] == ["a"]
    assert [model.key for model in settings.disabled] == ["b", "c"]
    assert [model.key for model in settings.all_engines] == ["a", "b"]


@pytest.mark.parametrize("odd", ["two words", 'quo"te', "se;mi", "ha#sh", "per%cent", "", "../up", "new\nline"])
def test_odd_names_are_refused(project: Project, odd: str) -> None:
    project.write({"a": {**CHAT, "name": odd}})
    assert lines_of(project)[0].startswith("config/models.json: models.a.name: ")
    project.write({odd: CHAT})
    assert lines_of(project)[0].startswith(f"config/models.json: models.{odd}".splitlines()[0])


def test_all_at_once_and_from_every_file(project: Project) -> None:
    project.write({"a": {**CHAT, "tensor_parallel_size": 0}, "b": {"name": "b", "type": "x"}})
    project.write_defaults("server:\n  no_such_flag: 1\n")
    (project.home / ".env").write_text("VLLM_ROUTR_PORT=9000\nVLLM_API_KEY='two words'\n")
    assert lines_of(project) == [
        "config/models.json: models.a.tensor_parallel_size: 0: should be greater than or equal to 1",
        "config/models.json: models.b.type: \"x\": choose one of 'chat', 'embedding', 'rerank' or 'ocr'",
        'config/vllm_config.yaml: server: vLLM\'s server has no flag "no_such_flag"; see `vllm serve --help=all`',
        ".env: VLLM_ROUTR_PORT: nothing reads this variable; did you mean VLLM_ROUTER_PORT?",
        ".env: VLLM_API_KEY: use printable ASCII without spaces; it travels in an HTTP header",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\n", "config/vllm_config.yaml: line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("servr: {}\n", 'config/vllm_config.yaml: nothing reads "servr"; did you mean "server"?'),
        (
            "env:\n  VLLM_PORT: '1'\n",
            'config/vllm_config.yaml: env: "VLLM_PORT" is set by the deployment; use port',
        ),
        ("cache: 5\n", "config/vllm_config.yaml: cache: 5: should be a valid dictionary"),
        (
            "cache:\n  gpu_memory_utilization: 2\n",
            "config/vllm_config.yaml: gpu_memory_utilization: 2: should be less than or equal to 1",
        ),
    ],
)
def test_vllm_config_yaml(project: Project, text: str, line: str) -> None:
    project.write({"a": CHAT})
    project.write_defaults(text)
    assert lines_of(project) == [line]


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"VLLM_FAR_PORT": "9"},
            'environment: VLLM_FAR_PORT: its endpoints alone serve "far", so that it has no port here; '
            "remove the variable",
        ),
        ({"VLLM_CHAT_PORT": "99999"}, 'environment: VLLM_CHAT_PORT: "99999" is no port; use 1 to 65535'),
        ({"VLLM_ROUTER_PORT": "x"}, None),
        (
            {"VLLM_OCR_PORT": "9"},
            'environment: VLLM_OCR_PORT: 2 models are of the type "ocr" (b, c); set "port" in each',
        ),
        ({"VLLM_CHAT_PORT": "²"}, 'environment: VLLM_CHAT_PORT: "²" is no port; use 1 to 65535'),
        (
            {"VLLM_ROUTER_HOST": "everywhere"},
            'environment: VLLM_ROUTER_HOST: "everywhere" is no address; use 127.0.0.1, 0.0.0.0 or one of this machine',
        ),
        (
            {"VLLM_UNIFIED_ENGINE_PROGRAM": 'vllm "serve'},
            "environment: VLLM_UNIFIED_ENGINE_PROGRAM: 'vllm \"serve' can't be split into words: no closing quotation",
        ),
        ({"CUDA_VISIBLE_DEVICES": "0;rm"}, None),
    ],
)
def test_environment(project: Project, environ: dict[str, str], line: str | None) -> None:
    ocr = {"type": "ocr"}
    far = {"far": {"name": "far", "type": "ocr", "endpoints": ["http://gpu-2"]}}
    project.write({"a": CHAT, "b": {**ocr, "name": "b", "port": 1}, "c": {**ocr, "name": "c", "port": 2}, **far})
    lines = lines_of(project, environ)
    assert len(lines) == 1
    assert lines[0].startswith("environment: ")
    if line is not None:
        assert lines == [line]


BESIDE = {"COMPOSE_PROFILES": "nginx,monitoring"}
DOCKER = {"VLLM_UNIFIED_RUNTIME": "docker"}


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"VLLM_NGINX_PORT": "8000"}, "VLLM_NGINX_PORT: 8000 is already used by the router"),
        ({"VLLM_GRAFANA_PORT": "8010"}, "VLLM_GRAFANA_PORT: 8010 is already used by the document service"),
        ({"VLLM_PROMETHEUS_PORT": "8001"}, 'VLLM_PROMETHEUS_PORT: 8001 is already used by "a"'),
        ({"VLLM_ROUTER_PORT": "9090"}, "VLLM_PROMETHEUS_PORT: 9090 is already used by the router"),
        ({"VLLM_GRAFANA_PORT": "80"}, "VLLM_GRAFANA_PORT: 80 is already used by Nginx"),
        ({"VLLM_GRAFANA_PORT": "9090"}, "VLLM_GRAFANA_PORT: 9090 is already used by Prometheus"),
        ({"VLLM_NGINX_TLS_PORT": "80"}, "VLLM_NGINX_TLS_PORT: 80 is already used by Nginx"),
        ({"VLLM_GRAFANA_PORT": "443"}, "VLLM_GRAFANA_PORT: 443 is already used by Nginx for HTTPS"),
        (
            {"VLLM_NGINX_PORT": "8000", "VLLM_NGINX_HOST": "0.0.0.0"},
            "VLLM_NGINX_PORT: 8000 is already used by the router",
        ),
        (
            {"VLLM_NGINX_PORT": "8000", "VLLM_NGINX_HOST": "localhost"},
            "VLLM_NGINX_PORT: 8000 is already used by the router",
        ),
        ({**DOCKER, "VLLM_GRAFANA_PORT": "9090"}, "VLLM_GRAFANA_PORT: 9090 is already used by Prometheus"),
        ({**DOCKER, "VLLM_PROMETHEUS_PORT": "8000"}, "VLLM_PROMETHEUS_PORT: 8000 is already used by the router"),
    ],
)
def test_ports_of_what_runs_beside(project: Project, environ: dict[str, str], line: str) -> None:
    project.write({"a": CHAT, "b": {"name": "b", "type": "ocr"}})
    (project.home / "config" / "tls").mkdir()
    (project.home / "config" / "tls" / "cert.pem").touch()
    assert lines_of(project, {**BESIDE, **environ}) == [f"environment: {line}; choose another"]


@pytest.mark.parametrize(
    "environ",
    [
        {"VLLM_NGINX_PORT": "8000"},  # which nobody wants
        {**BESIDE, "VLLM_NGINX_TLS_PORT": "80"},  # without a certificate
        {**BESIDE, "VLLM_NGINX_PORT": "8000", "VLLM_NGINX_HOST": "10.1.2.3"},
        {**BESIDE, **DOCKER, "VLLM_GRAFANA_PORT": "8010"},  # of a container that has its own 8010
    ],
)
def test_ports_that_do_not_meet(project: Project, environ: dict[str, str]) -> None:
    project.write({"a": CHAT, "b": {"name": "b", "type": "ocr"}})
    project.load(environ)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"A=\xff\n", ".env: byte 2: not UTF-8; save the file as UTF-8"),
        (
            b"VLLM_PORT=5000\n",
            ".env: VLLM_PORT: would be the same for every engine, and each needs its own; remove it",
        ),
        (b"VLLM_UNIFIED_HOME=/x\n", ".env: VLLM_UNIFIED_HOME: is read before .env is; set it in the shell"),
    ],
)
def test_dot_env(project: Project, text: bytes, line: str) -> None:
    project.write({"a": CHAT})
    (project.home / ".env").write_bytes(text)
    assert lines_of(project) == [line]


def test_a_missing_file(project: Project) -> None:
    assert lines_of(project) == ["config/models.json: no such file; name another with --config FILE"]


def test_not_utf8(project: Project) -> None:
    project.file.write_bytes(b'{"models": "\xff"}')
    assert lines_of(project) == ["config/models.json: byte 12: not UTF-8; save the file as UTF-8"]
