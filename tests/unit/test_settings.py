"""Settings: defaults, what is refused and in which words, and combinations that cannot work."""

import re
from pathlib import Path

import pytest

from orchestrator.errors import SettingsError
from orchestrator.recipes import WAITING, recipes, spec_of
from orchestrator.settings import Settings, describe, is_loopback, load

# Variable without its prefix, default as the docs show it, a wrong value (None: every text is right), what is allowed.
TABLE = [
    ("HOST", "127.0.0.1", None, "text"),
    ("PORT", "8000", "80.5", "a whole number at least 1 at most 65535"),
    ("API_KEYS", "", "secretsecretsecret", "`name:key` pairs separated by commas"),
    ("ALLOW_UNAUTHENTICATED", "false", "maybe", "true or false"),
    ("ENGINE", "docker", "podman", "one of docker, local"),
    ("INSTANCE", "default", "a b", "text"),
    ("IMAGE", "sandbox-python:latest", None, "text"),
    ("TEMPLATES_FILE", "", None, "text"),
    ("UID_BASE", "60706", "999", "a whole number at least 1000"),
    ("APPARMOR_PROFILE", "", "a=b", "text"),
    ("STATE_DIR", "/tmp/sandbox-orchestrator", None, "text"),
    ("CPU_QUOTA", "2", "0", "a number above 0"),
    ("MEMORY_LIMIT", "131072", "128M", "a whole number at least 32768"),
    ("WORKSPACE_LIMIT", "65536", "1023", "a whole number at least 1024"),
    ("SCRATCH_LIMIT", "65536", "1023", "a whole number at least 1024"),
    ("ALLOW_NETWORK", "true", "2", "true or false"),
    ("EGRESS_ALLOW", "*", None, "text"),
    ("EGRESS_DENY", "", None, "text"),
    ("EGRESS_CONNECTIONS", "32", "129", "a whole number at least 1 at most 128"),
    ("EGRESS_MAX_CONNECTIONS", "512", "0", "a whole number at least 1"),
    ("EGRESS_BYTES", "17179869184", "1 GB", "a whole number at least 1024"),
    ("EGRESS_CONNECT_SECONDS", "10", "0", "a number above 0"),
    ("EGRESS_IDLE_SECONDS", "300", "0", "a number above 0"),
    ("EGRESS_TOTAL_SECONDS", "3600", "0", "a number above 0"),
    ("TIMEOUT_SECONDS", "300", "5m", "a number above 0"),
    ("MAX_TIMEOUT_SECONDS", "3600", "inf", "a number above 0"),
    ("MAX_OUTPUT", "1048576", "1023", "a whole number at least 1024"),
    ("DRAIN_OUTPUT", "16777216", "16 MB", "a whole number at least 1024"),
    ("MAX_DISPLAY", "8388608", "1023", "a whole number at least 1024"),
    ("PROCESSES", "64", "129", "a whole number at least 8 at most 128"),
    ("MAX_BODY", "8388608", "-1", "a whole number at least 1024"),
    ("POOL_SIZE", "2", "401", "a whole number at least 0 at most 400"),
    ("PREBOOT", "2", "0", "a whole number at least 1 at most 16 or `name:number` pairs separated by commas"),
    ("MAX_CONTAINERS", "64", "451", "a whole number at least 1 at most 450"),
    ("MAX_AGE_SECONDS", "3600", "-1", "a number above 0"),
    ("ACQUIRE_TIMEOUT_SECONDS", "30", "", "a number above 0"),
    ("TTL_SECONDS", "3600", "nan", "a number above 0"),
    ("MAX_TTL_SECONDS", "86400", "1e999", "a number above 0"),
    ("IDLE_TIMEOUT_SECONDS", "600", "-inf", "a number above 0"),
    ("SESSION_EXECUTIONS", "4", "65", "a whole number at least 1 at most 64"),
    ("SESSION_BACKGROUND", "8", "-1", "a whole number at least 0 at most 64"),
    ("SESSION_CONTEXTS", "4", "17", "a whole number at least 0 at most 16"),
    ("MAX_EXECUTIONS", "256", "0", "a whole number at least 1"),
    ("MAX_WAITING", "256", "-1", "a whole number at least 0"),
    ("SESSION_TERMINALS", "4", "17", "a whole number at least 1 at most 16"),
    ("SESSION_STREAMS", "16", "0", "a whole number at least 1"),
    ("MAX_STREAMS", "256", "0", "a whole number at least 1"),
    ("STREAM_HEARTBEAT_SECONDS", "10", "0", "a number above 0"),
    ("FUNCTION_CONTAINERS", "16", "0", "a whole number at least 1 at most 450"),
    ("FUNCTION_IDLE_SECONDS", "300", "0", "a number above 0"),
    ("FUNCTION_STORAGE", "1073741824", "1 GB", "a whole number at least 1024"),
    ("ENGINE_TIMEOUT_SECONDS", "15", "0", "a number above 0"),
    ("START_TIMEOUT_SECONDS", "30", "0", "a number above 0"),
    ("HEARTBEAT_SECONDS", "5", "0", "a number above 0"),
    ("HEARTBEAT_MISSES", "3", "0", "a whole number at least 1"),
    ("RECONCILE_SECONDS", "5", "0", "a number above 0"),
    ("REATTACH_SECONDS", "120", "541", "a number above 0 at most 540"),
    ("GRACE_SECONDS", "5", "0", "a number above 0"),
    ("DRAIN_SECONDS", "20", "0", "a number above 0"),
    ("ON_EXIT", "keep", "forget", "one of keep, remove"),
    ("LOG_LEVEL", "info", "INFO", "one of debug, info, warning, error"),
    ("LOG_FORMAT", "auto", "text", "one of auto, json, console"),
    ("OTLP_ENDPOINT", "", None, "text"),
]
KEY = "0123456789abcdef"


def refusal(**variables: str) -> str:
    """Return the one line with which these settings are refused."""
    with pytest.raises(SettingsError) as caught:
        load({f"SANDBOX_{name}": value for name, value in variables.items()})
    assert "\n" not in caught.value.detail
    return caught.value.detail


def test_every_setting_is_described_with_default_allowed_values_and_meaning() -> None:
    assert [(f"SANDBOX_{name}", default, allowed) for name, default, _, allowed in TABLE] == [
        (variable, default, allowed) for variable, default, allowed, _ in describe()
    ]
    assert [variable for variable, *_, meaning in describe() if not meaning] == []


def test_without_variables_every_setting_has_its_default() -> None:
    assert load({}) == Settings()


@pytest.mark.parametrize(("name", "default"), [(name, default) for name, default, *_ in TABLE if default])
def test_a_default_may_be_written_down(name: str, default: str) -> None:
    assert load({f"SANDBOX_{name}": default}) == Settings()


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"), [(name, wrong, allowed) for name, _, wrong, allowed in TABLE if wrong is not None]
)
def test_a_wrong_value_is_refused_in_a_line_that_names_variable_value_and_what_is_allowed(
    name: str, wrong: str, allowed: str
) -> None:
    line = refusal(**{name: wrong})
    assert line.startswith(f"SANDBOX_{name}=")
    assert ("(hidden)" if name == "API_KEYS" else repr(wrong)) in line
    assert line.endswith(allowed)


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("PORT", "65535", "port", 65535),
        ("CPU_QUOTA", "0.5", "cpu_quota", 0.5),
        ("POOL_SIZE", "0", "pool_size", 0),
        ("ALLOW_NETWORK", "No", "allow_network", False),
        ("ALLOW_UNAUTHENTICATED", "1", "allow_unauthenticated", True),
        ("TIMEOUT_SECONDS", "0.5", "timeout_seconds", 0.5),
        ("INSTANCE", "a" * 63, "instance", "a" * 63),
        ("API_KEYS", f"ann:{KEY}, bob:{KEY}2,", "api_keys", {"ann": KEY, "bob": f"{KEY}2"}),
        ("API_KEYS", f"ann:{KEY}:x", "api_keys", {"ann": f"{KEY}:x"}),
        ("PREBOOT", "16", "preboot", 16),
        ("PREBOOT", "python:1, javascript:2", "preboot", {"python": 1, "javascript": 2}),
        ("PREBOOT", "javascript:0", "preboot", {"javascript": 0}),
    ],
)
def test_a_right_value_is_taken(variable: str, value: str, field: str, expected: object) -> None:
    assert getattr(load({f"SANDBOX_{variable}": value}), field) == expected


def test_a_variable_that_is_no_setting_is_refused() -> None:
    assert refusal(POOLSIZE="3") == "SANDBOX_POOLSIZE is no setting; see docs/configuration.md for those that are"


def test_variables_of_others_of_tests_and_of_the_client_are_left_alone() -> None:
    others = {"PATH": "/bin", "SANDBOX": "x", "SANDBOX_TEST_ENGINE": "none", "SANDBOX_URL": "http://x"}
    assert load(others | {"SANDBOX_API_KEY": "x"}) == Settings()


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"TIMEOUT_SECONDS": "11", "MAX_TIMEOUT_SECONDS": "10"}, ["TIMEOUT_SECONDS", "MAX_TIMEOUT_SECONDS"]),
        ({"TTL_SECONDS": "11", "MAX_TTL_SECONDS": "10"}, ["TTL_SECONDS", "MAX_TTL_SECONDS"]),
        ({"MAX_OUTPUT": "2048", "DRAIN_OUTPUT": "2047"}, ["MAX_OUTPUT", "DRAIN_OUTPUT"]),
        ({"HOST": "0.0.0.0"}, ["HOST=0.0.0.0", "API_KEYS", "ALLOW_UNAUTHENTICATED"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(variables: dict[str, str], names: list[str]) -> None:
    line = refusal(**variables)
    assert [name for name in names if f"SANDBOX_{name}" not in line] == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "sandbox.example", ""])
def test_an_address_that_others_reach_needs_a_key_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    assert "not a loopback address" in refusal(HOST=host)
    assert load({"SANDBOX_HOST": host, "SANDBOX_API_KEYS": f"ann:{KEY}"}).host == host
    assert load({"SANDBOX_HOST": host, "SANDBOX_ALLOW_UNAUTHENTICATED": "true"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(host: str) -> None:
    assert load({"SANDBOX_HOST": host}).host == host


@pytest.mark.parametrize("keys", ["nocolonhere-secret", "ann:secret", f"a b:{KEY}", f":{KEY}", f"-x:{KEY}"])
def test_a_refused_key_is_not_shown(keys: str) -> None:
    line = refusal(API_KEYS=keys)
    assert "secret" not in line
    assert KEY not in line


# --- templates


def templates(folder: Path, text: str, **variables: str) -> Settings:
    path = folder / "templates.toml"
    path.write_text(text)
    return load({"SANDBOX_TEMPLATES_FILE": str(path)} | {f"SANDBOX_{name}": value for name, value in variables.items()})


def test_the_default_template_comes_from_the_settings() -> None:
    default = load({"SANDBOX_POOL_SIZE": "7", "SANDBOX_MEMORY_LIMIT": "65536"}).read_templates()["python"]
    assert (default.image, default.pool_size, default.memory_kb) == ("sandbox-python:latest", 7, 65536)


def test_a_further_template_takes_what_it_leaves_out_from_the_default_but_for_the_pool(tmp_path: Path) -> None:
    text = '[big]\nmemory_kb = 524288\n[python]\npool_size = 3\n[gvisor]\nruntime = "runsc"\npool_size = 1\n'
    tables = templates(tmp_path, text, CPU_QUOTA="1.5").read_templates()
    assert list(tables) == ["python", "big", "gvisor"]
    assert (tables["big"].memory_kb, tables["big"].cpu_quota, tables["big"].pool_size) == (524288, 1.5, 0)
    assert (tables["gvisor"].runtime, tables["gvisor"].pool_size) == ("runsc", 1)
    assert tables["python"].pool_size == 3


@pytest.mark.parametrize("value", ["ruby:1", "javascript:17", "javascript:", "python:-1", "1:javascript", "1,2", "two"])
def test_a_wrong_number_of_waiting_sandboxes_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="SANDBOX_PREBOOT="):
        load({"SANDBOX_PREBOOT": value})


@pytest.mark.parametrize(
    ("setting", "table", "expected"),
    [
        ("2", "", {"python": 2}),
        ("3", "preboot = 5", {"python": 5}),
        ("3", "preboot = { javascript = 1 }", {"python": 3, "javascript": 1}),
        ("javascript:1", "", {"python": 2, "javascript": 1}),
        ("javascript:1", "preboot = { python = 0, javascript = 2 }", {"python": 0, "javascript": 2}),
    ],
)
def test_what_a_template_has_waiting_adds_to_the_settings(
    tmp_path: Path, setting: str, table: str, expected: dict[str, int]
) -> None:
    assert recipes(templates(tmp_path, f"[big]\n{table}\n", PREBOOT=setting))["big"].preboot == expected


def test_a_waiting_sandbox_of_another_language_adds_to_the_containers_memory(tmp_path: Path) -> None:
    chosen = templates(tmp_path, "[big]\npreboot = { python = 4, javascript = 2 }\n")
    plain, big = (spec_of(chosen, recipe, uid=1).memory_bytes for recipe in recipes(chosen).values())
    assert big - plain == 2 * WAITING


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[big\n", "Expected"),
        ("[big]\npreboot = 0\n", ">= 1"),
        ("[big]\npreboot = { ruby = 1 }\n", "ruby"),
        ("big = 1\n", "Expected `object`"),
        ("[big]\nmemory = 1\n", "unknown field `memory`"),
        ("[big]\nmemory_kb = 1\n", ">= 32768"),
        ("[big]\npool_size = 401\n", "<= 400"),
        ("['a b']\n", "regex"),
    ],
)
def test_a_bad_templates_file_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(reason)) as caught:
        templates(tmp_path, text).read_templates()
    assert caught.value.detail.startswith("SANDBOX_TEMPLATES_FILE=")
    assert "\n" not in caught.value.detail


def test_a_missing_templates_file_is_refused() -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load({"SANDBOX_TEMPLATES_FILE": "/nowhere.toml"}).read_templates()


@pytest.mark.parametrize("name", ["EGRESS_ALLOW", "EGRESS_DENY"])
@pytest.mark.parametrize("value", ["a..b", "*,a:0", "10.0.0.1/8", "0x7f.1"])
def test_what_is_no_pattern_of_hosts_is_refused_with_its_variable(name: str, value: str) -> None:
    line = refusal(**{name: value})
    assert line.startswith(f"SANDBOX_{name}: `")
    assert value.rpartition(",")[2] in line
