"""What a machine lacks for a sandbox is told in words, with the remedy."""

import os
import re
import subprocess
import sys

import pytest

from megatron_klear.errors import UserError
from megatron_klear.rewards.base import RewardError
from megatron_klear.rewards.sandbox import check_sandbox, open_sandbox
from megatron_klear.rewards.sandbox.inside import landlock
from megatron_klear.rewards.sandbox.remedies import remedy
from tests.hostile_runs import HONEST, INPUTS
from tests.sandboxes import KINDS, ROOT, as_another_user, needs_bubblewrap, needs_root, told


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_has_tried_it(kind):
    assert kind in check_sandbox(kind).casefold()


def test_without_bubblewrap_the_package_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for use in (check_sandbox, lambda: open_sandbox().run(HONEST, INPUTS)):
        with pytest.raises(RewardError, match="apt-get install bubblewrap"):
            use()


@pytest.mark.parametrize(
    ("words", "remedied"),
    [
        ("bwrap: No permissions to create new namespace", "--cap-add SYS_ADMIN"),
        ("bwrap: Can't find source path /root/python: Permission denied", "outside of another user's home"),
    ],
)
def test_a_bubblewrap_that_fails_is_told_with_the_remedy(tmp_path, monkeypatch, words, remedied):
    fake = tmp_path / "bwrap"
    fake.write_text(f'#!/bin/sh\necho "{words}" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError) as raised:
        check_sandbox()
    assert words in str(raised.value)
    assert remedied in str(raised.value)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("user/max_user_namespaces", "0"),
    ],
)
def test_the_kernels_switches_are_named(tmp_path, switch, value):
    path = tmp_path / switch
    path.parent.mkdir()
    path.write_text(value + "\n")
    assert f"sysctl -w {switch.replace('/', '.')}=" in remedy("bwrap: setting up uid map: Permission denied", tmp_path)
    path.write_text("7\n")
    assert "--cap-add" in remedy("bwrap: setting up uid map: Permission denied", tmp_path)


def test_an_old_kernel_refuses_landlock_in_words(monkeypatch):
    for version, said in ((0, "has none"), (2, "version 2")):
        monkeypatch.setattr(landlock, "version", lambda version=version: version)
        with pytest.raises(RewardError, match=f"Linux 6.2.*{said}.*bubblewrap"):
            open_sandbox("landlock")


def test_an_unknown_kind_is_refused():
    with pytest.raises(RewardError, match="bubblewrap and landlock"):
        open_sandbox("docker")


TRIES = """
import json
from megatron_klear.errors import UserError
from megatron_klear.rewards.sandbox import check_sandbox
found = {}
for kind in ("bubblewrap", "landlock"):
    try:
        found[kind] = check_sandbox(kind)
    except UserError as error:
        found[kind] = str(error)
print(json.dumps(found))
"""
CONTAINERS_ROOT = "chown dac_override fowner fsetid kill setgid setuid setpcap sys_chroot mknod audit_write setfcap"


@needs_bubblewrap
@needs_root
def test_root_of_a_container_is_told_what_it_lacks():
    """With the rights that containers have by default, CAP_SYS_ADMIN not among them."""
    rights = ",".join(["-all", *(f"+{right}" for right in CONTAINERS_ROOT.split())])
    command = ["setpriv", "--bounding-set", rights, sys.executable, "-c", TRIES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = told(subprocess.run(command, text=True, capture_output=True, env=environment, timeout=120))
    assert "--cap-add SYS_ADMIN" in found["bubblewrap"]
    assert re.search("CAP_DAC_READ_SEARCH|version [3-9]|Linux 6.2", found["landlock"])


@needs_bubblewrap
@needs_root
def test_a_user_whose_proc_is_partly_covered_is_told():
    found = told(as_another_user("-c", TRIES, before="mount --bind /dev/null /proc/version"))
    assert "systempaths=unconfined" in found["bubblewrap"]
    assert re.search("version [3-9]|Linux 6.2", found["landlock"])


@needs_bubblewrap
@needs_root
def test_a_user_without_rights_has_both():
    found = told(as_another_user("-c", TRIES))
    assert found["bubblewrap"].startswith("bubblewrap")
    assert re.search("version [3-9]|Linux 6.2", found["landlock"])
